"""Inputs on which the model itself fails: one sentence in place of Dynamo's report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ras_compile._torch import TorchRuntimeError, pytree
from ras_compile.errors import UnusableInput, first_line


def unusable(reason: str, args: tuple, kwargs: dict) -> UnusableInput:
    """The error of a model that fails on these arguments."""
    sizes = []
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(leaf, Tensor):
            sizes.append(f"{pytree.keystr(path[1:]).strip('[]')} {list(leaf.shape)}".replace("'", ""))
    return UnusableInput(
        f"the model itself cannot run on these inputs ({reason}); the sides of a latent must be multiples of its patch "
        f"size, and everything that goes with it of the same sizes: {', '.join(sizes)}"
    )


@contextmanager
def translate_dynamo_errors(args: tuple, kwargs: dict) -> Iterator[None]:
    """Turns Dynamo's report of a failing model into an :class:`UnusableInput`; the report is its cause.

    Raises:
        UnusableInput: the model fails while Dynamo traces it.
    """
    try:
        yield
    except TorchRuntimeError as error:
        text = str(error)
        said = re.search(r"got \w+\((['\"])(.*?)\1\)", text)
        reason = said[2] if said else first_line(error)
        reason = re.sub(r"\bs\d+\b(?: [-+*/]+ \d+)*", "another size", reason)  # Dynamo's symbols, which nobody knows
        raise unusable(reason, args, kwargs) from error
