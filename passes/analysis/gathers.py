"""Collectives in one spelling, before layouts are propagated."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx

from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.rules.collectives import COLLECTIVES, GATHERED, WAIT
from ras_compile.passes.rules.concatenation import CONCATENATIONS, SPLITS
from ras_compile.passes.rules.registry import named_arguments
from ras_compile.passes.rules.views import VIEWS

aten = torch.ops.aten


def spell_collectives(graph: fx.Graph) -> None:
    """Waits once for each collective, gives it memory without gaps, and gathers along another dimension by a permutation.

    In a sparse step an operand may have other strides than in the dense one, and a backend takes no strides.
    """
    emit = Emitter.of(graph)
    for node in list(graph.nodes):
        if node.target in GATHERED:
            spell_joint_gather(emit, node)
    for node in list(graph.nodes):
        if node.target in WAIT and node.args[0].target in WAIT:
            emit.replace(node, node.args[0])
        elif node.target in COLLECTIVES and not is_copy(node.args[0]):
            with graph.inserting_before(node):
                copy = emit(aten.clone.default, node.args[0], memory_format=torch.contiguous_format)
            node.replace_input_with(node.args[0], copy)
    for node in list(graph.nodes):
        if node.target in CONCATENATIONS:
            spell_gather(emit, node)


def is_copy(node: fx.Node) -> bool:
    return node.target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format


def spell_gather(emit: Emitter, node: fx.Node) -> None:
    """`cat(split(all_gather(x), n), dim)  ->  all_gather(x) as [r, n, ...], with r moved beside the dimension`"""
    parts = node.args[0]
    if not parts or any(part.target is not operator.getitem or part.args[0] is not parts[0].args[0] for part in parts):
        return
    split = parts[0].args[0]
    if split.target not in SPLITS or named_arguments(split)["dim"] != 0:
        return
    source = split.args[0]
    gathered = source.args[0] if source.target in WAIT else source
    if gathered.target not in GATHERED:
        return
    count, shape = named_arguments(gathered)["group_size"], list(node.meta["val"].shape)
    dim = named_arguments(node)["dim"] % len(shape)
    sizes = [list(value.shape) for value in split.meta["val"]]
    if [part.args[1] for part in parts] != list(range(count)) or len(sizes) != count or sizes[0] != sizes[-1]:
        return
    order = [index + 1 for index in range(len(shape))]
    order.insert(dim, 0)
    with emit.graph.inserting_before(node):
        made = emit(aten.reshape.default, source, [count, *sizes[0]])
        made = emit(aten.permute.default, made, order)
        made = emit(aten.reshape.default, made, shape)
    emit.replace(node, made)


def spell_joint_gather(emit: Emitter, node: fx.Node) -> None:
    """`all_gather(cat([k.flatten(), v.flatten()]))  ->  all_gather(k), all_gather(v)`: what is sent together, part by part.

    Only where each value that is taken out of the gathered ones is one process's part: ring attention takes them like so.
    """
    joint = node.args[0].args[0] if is_copy(node.args[0]) else node.args[0]
    if joint.target not in CONCATENATIONS or joint.meta["val"].ndim != 1:
        return
    parts = [part.args[0] for part in joint.args[0] if part.target in VIEWS]
    stops = list(itertools.accumulate(part.meta["val"].numel() for part in parts))
    levels = [[node]]
    for wanted in (WAIT, SPLITS, (operator.getitem,), (aten.slice.Tensor,), VIEWS):
        levels.append([user for one in levels[-1] for user in one.users])
        if any(user.target not in wanted for user in levels[-1]):
            return
    taken = {}
    for view in levels[-1]:
        part, given = view.args[0], named_arguments(view.args[0])
        stop = min(given["end"], stops[-1])
        found = stops.index(stop) if stop in stops else 0
        shape, first = parts[found].meta["val"].shape, stop - parts[found].meta["val"].numel()
        if view.meta["val"].shape != shape or (given["start"] or 0, given["step"]) != (first, 1):
            return
        taken[view] = found, part.args[0].args[1]
    count = named_arguments(node)["group_size"]
    if len(parts) != len(joint.args[0]) or any(len(cut.meta["val"]) != count for cut in levels[2]):
        return
    gathered = []
    with emit.graph.inserting_before(node):
        for source in parts:
            copy = emit(aten.clone.default, source, memory_format=torch.contiguous_format)
            sent = emit(WAIT[0], emit(node.target, copy, *node.args[1:]))
            gathered.append(emit(aten.reshape.default, sent, [count, *source.meta["val"].shape]))
    for view, (found, process) in taken.items():
        with emit.graph.inserting_before(view):
            emit.replace(view, emit(aten.select.int, gathered[found], 0, process))
    for one in [one for level in levels[-2::-1] for one in level]:
        emit.graph.erase_node(one)
