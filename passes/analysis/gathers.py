"""Collectives in one spelling, before layouts are propagated."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.rules.collectives import COLLECTIVES, GATHERED, WAIT
from ras_compile.passes.rules.concatenation import CONCATENATIONS, SPLITS
from ras_compile.passes.rules.registry import named_arguments

aten = torch.ops.aten


def spell_collectives(graph: fx.Graph) -> None:
    """Waits once for each collective, gives it memory without gaps, and gathers along another dimension by a permutation.

    In a sparse step an operand may have other strides than in the dense one, and a backend takes no strides.
    """
    emit = Emitter.of(graph)
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
