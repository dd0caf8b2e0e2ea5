"""Splices written on the cache itself: what is left of them after fusion loses its views.

    part = permute(slice(cache, 2, 77, 1101), [0, 2, 1, 3])
    index_put_(part, (batch, rows), values)

becomes

    index_put_(cache, (batch, None, rows + 77), values)

because the inner compiler writes an `index_put_` of a graph's input in place, but one of a view into a copy of all of it,
which is then copied back. A `copy_` into a slice becomes an `index_put_` as well, for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ras_compile.passes.analysis.emit import Emitter, sweep

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """A view of a cache: its dimensions in another order, one of them from ``start`` on."""

    cache: fx.Node
    order: tuple[int, ...]
    dim: int | None = None  # the cache's dimension that is cut
    start: int = 0


def write_in_place(graph: fx.Graph) -> int:
    """Rewrites every splice into a view of a cache; returns how many there were.

    It does not fire on views other than slices with step one and permutations.
    """
    emit, count = Emitter.of(graph), 0
    for target in (aten.index_put_.default, aten.copy_.default):
        for node in list(graph.find_nodes(op="call_function", target=target)):
            part = part_written(node)
            if part is None:
                continue
            with graph.inserting_before(node):
                indices, values = (_put if target is aten.index_put_.default else _copy)(emit, node, part)
                put = emit.like(node, aten.index_put_.default, part.cache, indices, values)
            emit.replace(node, put)
            count += 1
    sweep(graph)
    return count


def part_of(node: fx.Node) -> Part | None:
    """What a node shows of an input of the graph; None for other views."""
    if node.op == "placeholder":
        return Part(node, tuple(range(node.meta["val"].ndim)))
    if node.op != "call_function" or node.target not in (aten.permute.default, aten.slice.Tensor):
        return None
    inner = part_of(node.args[0])
    if inner is None:
        return None
    if node.target is aten.permute.default:
        return Part(inner.cache, tuple(inner.order[dim] for dim in node.args[1]), inner.dim, inner.start)
    _, dim, start, _, *step = node.args
    if inner.dim is not None or step not in ([], [1]):
        return None
    return Part(inner.cache, inner.order, inner.order[dim], start)


def part_written(put: fx.Node) -> Part | None:
    """What a splice writes into that could be the cache itself; None where it is, and for other views.

    An `index_put_` has an index for the dimension that is cut, if there is one; a `copy_` is into a slice.
    """
    part = part_of(put.args[0])
    if part is None or put.target is aten.copy_.default:
        return part if part is not None and part.dim is not None else None
    indexed = part.dim is None or part.dim in part.order[: len(put.args[1])]
    return part if indexed and part.cache is not put.args[0] else None


def _put(emit: Emitter, node: fx.Node, part: Part) -> tuple[list[Any], Any]:
    """Indices into the cache, and the values as they belong there."""
    _, given, values = node.args
    rank, led = len(part.order), len(given)
    indices: list[Any] = [None] * rank
    for place, index in enumerate(given):
        dim = part.order[place]
        indices[dim] = emit(aten.add.Tensor, index, part.start) if dim == part.dim and part.start else index
    addressed = sorted(part.order[:led])
    rest = list(part.order[led:])
    lead = values.meta["val"].ndim - len(rest)  # dimensions of the broadcast indices
    # several indices side by side leave their result in their place, others put it in front; the rest is in order
    first = addressed[0] if addressed == list(range(addressed[0], addressed[-1] + 1)) else 0
    ahead = [dim for dim in sorted(rest) if dim < first]
    behind = [dim for dim in sorted(rest) if dim >= first]
    order = [lead + rest.index(dim) for dim in ahead] + list(range(lead)) + [lead + rest.index(dim) for dim in behind]
    if order != sorted(order):
        values = emit(aten.permute.default, values, order)
    return indices[: addressed[-1] + 1], values


def _copy(emit: Emitter, node: fx.Node, part: Part) -> tuple[list[Any], Any]:
    view, values = node.args[:2]
    assert part.dim is not None
    size = view.meta["val"].shape[part.order.index(part.dim)]
    device = part.cache.meta["val"].device
    index = emit(aten.arange.start, part.start, part.start + size, dtype=torch.int64, device=device)
    wanted = list(view.meta["val"].shape)
    if list(values.meta["val"].shape) != wanted:
        values = emit(aten.expand.default, values, wanted)
    if part.order != tuple(range(len(part.order))):
        values = emit(aten.permute.default, values, [part.order.index(dim) for dim in range(len(part.order))])
    return [*([None] * part.dim), index], values
