"""What every layer computes again from inputs alone is computed once: gathered rotary tables, numbers of rows.

    t_0 = cos[rows]; k_0 = rope(.., t_0); .. t_1 = cos[rows]; k_1 = rope(.., t_1)
    becomes    t_0 = cos[rows]; k_0 = rope(.., t_0); .. k_1 = rope(.., t_0)

Inductor does so inside one kernel's operands, but not where repeated blocks are compiled once: so it is done before they are
outlined, and after several lengths of a context have become one program. Before, a length that happens to be the number of
samples would make two values one at that length alone.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ras_compile.passes.fusion.group import root, writes

aten = torch.ops.aten
NUMBERS = (operator.add, operator.mul)  # how `interpolate.py` spells what depends on a length


def share_tables(graph: fx.Graph) -> int:
    """Takes equal values before the first linears for one, in place; returns how many nodes went."""
    after = {root(operand) for node in graph.nodes for operand in writes(node)}  # what is written is no table
    known: dict[object, fx.Node] = {}
    count = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target in NUMBERS:
            continue
        if node in after or after.intersection(node.all_input_nodes) or not shareable(node):
            after.add(node)
            continue
        key = (node.target, str(fx.node.map_arg((node.args, node.kwargs), spelled)))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
    graph.eliminate_dead_code()
    return count


def spelled(operand: fx.Node) -> str:
    """A number by how it is computed: each stands beside its only use, so that repeated blocks stay alike."""
    if operand.target in NUMBERS:
        return f"{operand.target}{tuple(map(str, fx.node.map_arg(operand.args, spelled)))}"
    return operand.name


def shareable(node: fx.Node) -> bool:
    """Whether two such nodes with equal operands are one: no linear, and an op that writes nothing, draws nothing and reads
    no cache."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is aten.linear.default:
        return False
    tags = node.target.tags
    reads_cache = any(
        operand.op == "placeholder" and operand.name.startswith("cache_") for operand in node.all_input_nodes
    )
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags and not reads_cache
