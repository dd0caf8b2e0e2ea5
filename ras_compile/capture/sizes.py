"""Sizes as Dynamo knows them: from a graph's second shape on, some of them are symbols instead of numbers."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ras_compile._torch import source_of


def expression(size: Any) -> sympy.Expr:
    """One size, as an expression in Dynamo's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def expressions(example: Any) -> list[sympy.Expr]:
    """The sizes of a tensor, or a number itself; nothing for any other value."""
    if isinstance(example, Tensor):
        return [expression(size) for size in example.shape]
    return [expression(example)] if isinstance(example, (int, torch.SymInt)) else []


def sides_that_vary(graph: fx.Graph) -> dict[str | None, set[int]]:
    """Which sizes of a Dynamo graph's inputs should be symbols of their own, by Dynamo's expression of the tensor.

    With dynamic sizes Dynamo makes equal sizes one symbol. For a batch, or for tokens and their places, that is right; a square
    picture's sides are equal by chance, as a side or a number of tokens and a text's length may be. Then all sizes of that
    symbol are told apart; those that have to be equal the model makes one again. And where height or width varies, both do.
    """
    returned = [expressions(node.meta.get("example_value")) for node in graph.output_node().all_input_nodes]
    grids = [sizes[2:] if len(sizes) > 3 else sizes[1:2] for sizes in returned]
    sides = {symbol for grid in grids for size in grid for symbol in size.free_symbols}
    given = {
        source_of(node): expressions(example)
        for node in graph.find_nodes(op="placeholder")
        if isinstance(example := node.meta.get("example_value"), Tensor)
    }
    counted = [size for sizes in given.values() if len(sizes) > 2 for size in sizes]
    shared = {side for side in sides if counted.count(side) > 1}
    found = {}
    for source, sizes in given.items():
        found[source] = {dim for dim, size in enumerate(sizes) if size in shared}
        if len(sizes) > 3 and sides.intersection(sizes[-2:]):
            found[source] |= {dim for dim in (len(sizes) - 2, len(sizes) - 1) if sizes[dim].is_Integer}
    return found
