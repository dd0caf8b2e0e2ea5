"""What every layer computes again from inputs alone is computed once: gathered rotary tables, numbers of rows.

    t_0 = cos[rows]; k_0 = rope(.., t_0); .. t_1 = cos[rows]; k_1 = rope(.., t_1)
    becomes    t_0 = cos[rows]; k_0 = rope(.., t_0); .. k_1 = rope(.., t_0)

Inductor does so inside one kernel's operands, but not where repeated blocks are compiled once: so it is done before they are
outlined, and after several lengths of a context have become one program. Before, a length that happens to be the number of
samples would make two values one at that length alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ras_compile._torch import OpOverload, schema_of
from ras_compile.passes.analysis.emit import sweep
from ras_compile.passes.analysis.roles import Role, role_of
from ras_compile.passes.programs.aliases import root, writes
from ras_compile.passes.programs.equals import equals, word

aten = torch.ops.aten
NUMBERS = (operator.add, operator.mul, operator.truediv)  # how `interpolate.py` spells what depends on a length


def share_tables(graph: fx.Graph) -> int:
    """Takes equal values before the first linears for one, in place; returns how many nodes went."""
    after = {root(operand) for node in graph.nodes for operand in writes(node)}  # what is written is no table

    def counts(node: fx.Node) -> bool:
        if node.target in NUMBERS:
            return False
        if node in after or after.intersection(node.all_input_nodes) or not shareable(node):
            after.add(node)
            return False
        return True

    twins = [(node, first) for node, first in equals(graph, counts, spelled).items() if node is not first]
    for node, first in twins:
        node.replace_all_uses_with(first)
        graph.erase_node(node)
    sweep(graph)
    return len(twins)


def spelled(operand: fx.Node) -> Any:
    """A number by how it is computed: each stands beside its only use, so that repeated blocks stay alike."""
    return word(operand, spelled) if operand.target in NUMBERS else operand


def shareable(node: fx.Node) -> bool:
    """Whether two such nodes with equal operands are one: no linear, and an op that writes nothing, draws nothing and reads
    no cache."""
    if not isinstance(node.target, OpOverload) or node.target is aten.linear.default:
        return False
    tags = node.target.tags
    reads_cache = any(role_of(operand) is Role.CACHE for operand in node.all_input_nodes)
    return not schema_of(node.target).is_mutable and torch.Tag.nondeterministic_seeded not in tags and not reads_cache
