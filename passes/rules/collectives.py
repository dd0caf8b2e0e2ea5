"""Collectives: what becomes of tokens that processes exchange, `(r a) b -> (r a) b`, and of features that they add up.

Where processes exchange tokens (context parallel), each holds a shard of them: its own tokens are its region, and each
computes equally many of them. So what a collective moves is as compact as what it is computed from, and behind it a
dimension counts the processes (:data:`RANKS`): entry r of it holds the active rows of process r. Where such a value is
spliced, the active rows of all processes are gathered first, a few whole numbers. Nothing else need be known of the others.

Where processes only add up features of the same tokens (tensor parallel), all have the active rows of the first of them.

Any other collective runs on whole values: that is always right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ras_compile._torch import process_group
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Axis, Dim, Frame, Group, Layout, normal
from ras_compile.passes.algebra.order import RANKS
from ras_compile.passes.rules.contraction import grid_atoms
from ras_compile.passes.rules.registry import Call, Step, named_arguments, rule_for, source_line
from ras_compile.passes.rules.views import only_layout

c10d = torch.ops._c10d_functional


def known(*names: str) -> tuple[Any, ...]:
    """Those of PyTorch's collectives that there are: a PyTorch that is built for one process has none."""
    return tuple(getattr(c10d, name).default for name in names if hasattr(c10d, name))


GATHERED, WAIT = known("all_gather_into_tensor"), known("wait_tensor")
EXCHANGES = (*known("all_to_all_single"), *GATHERED)
SUMS = known("all_reduce", "reduce_scatter_tensor", "broadcast")
COLLECTIVES = (*EXCHANGES, *SUMS)


def joined_by(graph: fx.Graph, frame: Frame) -> Frame:
    """The frame of a graph's latent with the processes that its collectives join.

    Raises:
        UnsupportedGraph: they are of several groups.
    """
    nodes = [node for node in graph.nodes if node.target in COLLECTIVES]
    names = {named_arguments(node)["group_name"]: node for node in nodes}
    groups: dict[tuple[int, ...], Group] = {}
    for name in names:  # a mesh may give the same processes several names
        members, rank = process_group(name)
        groups.setdefault(members, Group(name, len(members), rank))
    if len(groups) > 1:
        raise UnsupportedGraph(
            f"collectives of {len(groups)} groups of processes in one model; those of one group are supported, "
            "as of a Ulysses degree or of a ring degree, not of both",
            source=source_line(list(names.values())[-1]),
        )
    group = next(iter(groups.values()), None)
    exchanged = any(node.target in EXCHANGES for node in nodes)
    return frame.across(group, None) if exchanged else frame.across(None, group)


def part_of(call: Call, dim: Dim) -> Dim | None:
    """One process's part of a dimension whose first factor counts processes, or can: n parts of equally many entries."""
    group = call.frame.group
    first = dim[0] if dim else None
    if group is None or not isinstance(first, Axis) or first.size % group.size:
        return None
    if first.atom is not None and first.atom != RANKS:
        return None
    return normal([Axis(first.size // group.size), *dim[1:]])


def sent_by(node: fx.Node, shape: Sequence[Any]) -> Any:
    """Entries that one process sends in a collective whose operand has ``shape``, by the algorithm that moves fewest."""
    count = len(process_group(named_arguments(node)["group_name"])[0])
    entries = math.prod(shape)
    if node.target in GATHERED:
        return (count - 1) * entries
    once = entries * (count - 1) / sympy.Integer(count)
    return 2 * once if node.target in known("all_reduce") else once


@rule_for(*WAIT)
def wait(call: Call) -> Step:
    """`... -> ...`"""
    return Step(only_layout(call, "tensor"), call.uses())


@rule_for(*known("all_to_all_single"))
def exchange(call: Call) -> Step:
    """`(r a) b -> (r a) b`: part r goes to process r, and part r of the result comes from it.

    Of features that are sent, process r gives back those that are this process's, of its own tokens; tokens that came
    from process r, and are sent back to it, are its own again.
    """
    layout, group = only_layout(call, "input"), call.frame.shards
    part = part_of(call, layout.dims[0])
    sizes = {*call.args["input_split_sizes"], *call.args["output_split_sizes"]}
    if group is None or part is None or len(sizes) > 1 or layout.raw:
        return call.whole()
    first = layout.dims[0][0]
    comes = first.atom != RANKS
    if comes == layout.ranked:  # a second exchange of what was exchanged, or parts that are not those of the first one
        return call.whole()
    out = layout.replace(0, (Axis(group.size, RANKS if comes else None), *part))

    def rewrite(sparse):
        equal = [sparse.dim(layout.dims[0]) // group.size] * group.size
        return call.with_args(output_split_sizes=equal, input_split_sizes=equal)

    return Step(out, call.uses(), rewrite=rewrite)


@rule_for(*GATHERED)
def all_gather(call: Call) -> Step:
    """`a b -> (r a) b`: what every process holds of its tokens."""
    layout, group = only_layout(call, "input"), call.frame.shards
    if group is None or layout.ranked or layout.raw:
        return call.whole()
    return Step(layout.replace(0, (Axis(group.size, RANKS), *layout.dims[0])), call.uses())


@rule_for(*known("all_reduce", "broadcast"))
def all_reduce(call: Call) -> Step:
    """`... -> ...`: features of the same tokens; where processes hold other tokens, it mixes them."""
    layout = only_layout(call, "input")
    out = Layout(layout.dims)
    return call.whole(None if layout.ranked else out) if call.frame.shards else Step(out, call.uses())


@rule_for(*known("reduce_scatter_tensor"))
def reduce_scatter(call: Call) -> Step:
    """`(r a) b -> a b`: the sum of all processes' parts r for process r."""
    layout = only_layout(call, "input")
    part = part_of(call, layout.dims[0])
    if part is None or layout.ranked != (call.frame.shards is not None) or layout.raw:
        return call.whole()
    if layout.ranked and not grid_atoms(call, [layout.dims[0][:1]]):
        return call.whole()
    return Step(layout.replace(0, part), call.uses())
