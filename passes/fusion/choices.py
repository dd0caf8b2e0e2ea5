"""Asking whether an op of ours is worth it: each question once, since most layers of a model are of the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ras_compile._torch import pytree


class Asked:
    """A choice that remembers its answers while one program is made.

    Args:
        choice: is asked with the arguments of ops, whose tensors are fake: only sizes, strides and dtypes count. None: all are
            worth it.
    """

    def __init__(self, choice: Callable[..., bool] | None) -> None:
        self.choice, self.answers = choice, dict[str, bool]()

    def __call__(self, *ops: Any) -> bool:
        """The answer for arguments of ops that are nodes."""
        if self.choice is None:
            return True
        given = fx.node.map_arg(ops, lambda operand: operand.meta["val"])
        question = str(pytree.tree_map_only(Tensor, lambda t: (t.dtype, tuple(t.shape), t.stride()), given))
        if question not in self.answers:
            self.answers[question] = self.choice(*given)
        return self.answers[question]
