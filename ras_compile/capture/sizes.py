"""Sizes as Dynamo knows them: from a graph's second shape on, some of them are symbols instead of numbers."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ras_compile._torch import base_of, line_of_guard, source_of


def expression(size: Any) -> sympy.Expr:
    """One size, as an expression in Dynamo's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def expressions(example: Any) -> list[sympy.Expr]:
    """The sizes of a tensor, or a number itself; nothing for any other value."""
    if isinstance(example, Tensor):
        return [expression(size) for size in example.shape]
    return [expression(example)] if isinstance(example, (int, torch.SymInt)) else []


def packed_strides(sizes: Sequence[Any]) -> list[Any]:
    """The strides of a tensor of these sizes, numbers or expressions, that was made as it is."""
    return list(accumulate(sizes[:0:-1], operator.mul, initial=1))[::-1]


def without_channels(sizes: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """The sizes of a `[B, N, C]`, `[B, C, H, W]` or `[B, C, T, H, W]` that say how many tokens there are."""
    return [size for dim, size in enumerate(sizes) if dim != _channels(len(sizes))]


def _channels(ndim: int) -> int:
    return 1 if ndim > 3 else 2


def strided_latents(graph: fx.Graph) -> list[int]:
    """Positions of inputs of a Dynamo graph that have strides of a view, and as many tokens as what it returns.

    A picture may begin with such a latent, and goes on with what a scheduler makes of it, which has others.
    """
    return [
        index
        for index, example in _latents(graph)
        if list(map(expression, example.stride())) != packed_strides(expressions(example))
    ]


def held_size(graph: fx.Graph) -> tuple[int, int, int, str | None] | None:
    """A size of a latent that Dynamo was to let vary and holds as it is, since the model's code asks for its value.

    Returns:
        The position of the input, the dimension, its size, and the line of code, if that is known; None where there is none.
    """
    for index, example in _latents(graph):
        for dim in range(1, example.ndim):
            now = example.shape[dim]
            if dim != _channels(example.ndim) and isinstance(now, torch.SymInt) and expression(now).is_Integer:
                guards = now.node.shape_env.guards
                lines = (line_of_guard(each) for each in guards if set(each.expr.args) > {expression(now)})
                return index, dim, int(now), next((line for line in lines if line), None)
    return None


def _latents(graph: fx.Graph) -> list[tuple[int, Tensor]]:
    """The inputs of a Dynamo graph, by their positions, that have as many tokens as what it returns."""
    returned = [expressions(node.meta.get("example_value")) for node in graph.output_node().all_input_nodes]
    examples = enumerate(node.meta.get("example_value") for node in graph.find_nodes(op="placeholder"))
    return [
        (index, example)
        for index, example in examples
        if isinstance(example, Tensor) and example.is_floating_point() and example.ndim > 2
        if any(_as_many(expressions(example), other) for other in returned)
    ]


def _as_many(sizes: Sequence[sympy.Expr], other: Sequence[sympy.Expr]) -> bool:
    """Whether two tensors have as many tokens, as far as symbols tell: twice the half of a side is that side."""
    pairs = zip(without_channels(sizes), without_channels(other), strict=False)
    return len(sizes) == len(other) and all(a == b or a.free_symbols == b.free_symbols != set() for a, b in pairs)


def numbers_beside(graph: fx.Graph) -> int:
    """What a number of tokens is a multiple of, beside a Python number that varies: the product of those told with it; else 1."""
    sizes = {size for _, example in _latents(graph) for size in expressions(example)[1:2] if example.ndim == 3}
    return max((int(size.as_coeff_Mul()[0]) for size in sizes if size.is_Mul), default=1)


def sides_that_vary(graph: fx.Graph, weights: Collection[fx.Node] = ()) -> dict[str | None, set[int]]:
    """Which sizes of a Dynamo graph's inputs should be symbols of their own, by Dynamo's expression of the tensor.

    With dynamic sizes Dynamo makes equal sizes one symbol. For a batch, or for tokens and their places, that is right; a square
    picture's sides are equal by chance, as a side or a number of tokens and a text's length may be. Then all sizes of that
    symbol are told apart; those that have to be equal the model makes one again. So are a text's length and the latent's
    channels, which a weight has fixed, and the text with them. So are equal sizes of what a tensor is a view of: tables of
    places are views of rows and columns. And where height or width varies, both do.

    Args:
        weights: inputs whose sizes never vary.
    """
    returned = [expressions(node.meta.get("example_value")) for node in graph.output_node().all_input_nodes]
    grids = [sizes[2:] if len(sizes) > 3 else sizes[1:2] for sizes in returned]
    sides = {symbol for grid in grids for size in grid for symbol in size.free_symbols}
    examples = {
        source_of(node): example
        for node in graph.find_nodes(op="placeholder")
        if isinstance(example := node.meta.get("example_value"), Tensor) and node not in weights
    }
    given = {source: expressions(example) for source, example in examples.items()}
    several = [sizes for sizes in given.values() if len(sizes) > 2]
    counted = [size for sizes in several for size in sizes]
    # Dynamo took them for symbols at first, as it does with what is a number by now
    fixed = {
        size
        for source, sizes in given.items()
        for size, now in zip(sizes, examples[source].shape, strict=True)
        if size.is_Integer and isinstance(now, torch.SymInt)
    }
    counts = {size for sizes in several for size in without_channels(sizes)}
    shared = {size for size in sides | (fixed & counts) if counted.count(size) > 1}
    found = {}
    for source, sizes in given.items():
        found[source] = {dim for dim, size in enumerate(sizes) if size in shared}
        if len(sizes) > 3 and sides.intersection(sizes[-2:]):
            found[source] |= {dim for dim in (len(sizes) - 2, len(sizes) - 1) if sizes[dim].is_Integer}
        base = [size for size in expressions(base_of(examples[source])) if not size.is_Integer]
        if len(set(base)) < len(base):
            found[source] |= {dim for dim, size in enumerate(sizes) if not size.is_Integer}
    return found
