"""A part is not the whole: block-wise compilation hands a backend one block's graph, which looks like a small DiT.

What gives it away: the output of one instance is the latent of the next one, with the same graph. A transformer's
output goes to a scheduler first.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from ras_compile.clock import owner
from ras_compile.notices import warn_once

__all__ = ["is_block", "leave_output"]

_blocks: set[Hashable] = set()


def leave_output(state: object, output: Any) -> None:
    """Remember what `state` has just returned in this thread."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    owner().last_output = (weakref.ref(first), weakref.ref(state)) if isinstance(first, Tensor) else None


def is_block(state: object, graph: Hashable, latent: Tensor) -> bool:
    """Whether `graph` is known to be a block, or shows it with this call; says so once."""
    last = owner().last_output
    if last is not None and last[0]() is latent and last[1]() not in (None, state) and graph not in _blocks:
        _blocks.add(graph)
        warn_once(
            "ras_compile: the compiled graph is one block of a transformer (the output of one instance is the input of "
            "the next), as block-wise compilation and group offload make it; it runs dense. Compile the whole "
            "transformer instead."
        )
    return graph in _blocks
