"""Sizes as Dynamo knows them: from a graph's second shape on, some of them are symbols instead of numbers."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor


def expression(size: Any) -> sympy.Expr:
    """One size, as an expression in Dynamo's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def expressions(example: Any) -> list[sympy.Expr]:
    """The sizes of a tensor, or a number itself; nothing for any other value."""
    if isinstance(example, Tensor):
        return [expression(size) for size in example.shape]
    return [expression(example)] if isinstance(example, (int, torch.SymInt)) else []
