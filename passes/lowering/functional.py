"""Ops of ours that write, spelled as PyTorch spells them once it has taken the writes out of a graph.

    scatter_linear(permute(cache), x, weight, bias, rows)

becomes

    _, written = auto_functionalized_v2(scatter_linear, x, weight, bias, rows, .., all_bases=[cache], the view of it)
    copy_(cache, written)

PyTorch does so by itself, but not inside of a repeated block: there it refuses a custom op that writes, and each block would be
compiled apart. Inductor undoes it again, and the op writes into the cache itself.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ras_compile._torch import OpOverload, auto_functionalized_v2, schema_of
from ras_compile.passes.analysis.emit import sweep
from ras_compile.passes.programs.aliases import root
from ras_compile.passes.rules.registry import named_arguments

aten = torch.ops.aten


def spell_writes(graph: fx.Graph) -> int:
    """Rewrites every custom op that writes, in place; returns how many there were. The graph has static sizes."""
    count = 0
    for node in list(graph.nodes):
        if not writes_by_itself(node):
            continue
        given, bases = arguments(node)
        with graph.inserting_before(node):
            call = graph.call_function(auto_functionalized_v2, (node.target,), given)
            call.meta = {**node.meta, "val": (None, *(base.meta["val"] for base in bases))}
            for index, base in enumerate(bases):
                written = graph.call_function(operator.getitem, (call, index + 1))
                copied = graph.call_function(aten.copy_.default, (base, written))
                written.meta["val"] = copied.meta["val"] = base.meta["val"]
        graph.erase_node(node)
        count += 1
    sweep(graph)  # views that it wrote into
    return count


def writes_by_itself(node: fx.Node) -> bool:
    """Whether a node is a custom op that writes into operands and returns nothing."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or target.namespace == "aten":
        return False
    return schema_of(target).is_mutable and not schema_of(target).returns


def arguments(node: fx.Node) -> tuple[dict[str, Any], list[fx.Node]]:
    """The arguments of such an op by name, what it writes into as views of tensors that fill their memory; and those."""
    schema, given = schema_of(node.target), named_arguments(node)
    bases: list[fx.Node] = []

    def view(prefix: str, operand: fx.Node) -> None:
        base = root(operand)
        if base not in bases:
            bases.append(base)
        given[f"{prefix}_base_index"] = bases.index(base)
        if operand is not base:
            value = operand.meta["val"]
            given[f"{prefix}_size"], given[f"{prefix}_stride"] = list(value.shape), list(value.stride())
            given[f"{prefix}_storage_offset"] = value.storage_offset()

    for argument in schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        operand = given.pop(argument.name)
        if isinstance(operand, (list, tuple)):
            given[f"_{argument.name}_length"] = len(operand)
            for index, one in enumerate(operand):
                view(f"_{argument.name}_{index}", one)
        else:
            view(f"_{argument.name}", operand)
    return {**given, "_all_bases": bases}, bases
