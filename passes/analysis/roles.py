"""What an input of a program is for: said in ``meta["role"]``, since names are free and PyTorch changes them at will.

A role is given where a placeholder is made, and copies of a graph keep it. A program without roles is no program yet.
"""

from __future__ import annotations

from enum import Enum

from torch import fx


class Role(Enum):
    """What a placeholder stands for."""

    INPUT = "input"  # an argument of the model
    CONSTANT = "constant"  # a tensor of the model that all calls share
    ROWS = "rows"  # the active rows, int64 [B, A]
    CACHE = "cache"  # the whole value of a splice, written in place
    FROZEN = "frozen"  # a value of a frozen context, left behind by the dense step
    LENGTH = "length"  # a length of the context, a number
    OPERAND = "operand"  # of a repeated block: a value that its calls compute


def role_of(node: fx.Node) -> Role | None:
    """The role of a placeholder; None for a node that is none, or has none."""
    return node.meta.get("role") if node.op == "placeholder" else None


def of_role(graph: fx.Graph, role: Role) -> list[fx.Node]:
    """The placeholders of a graph that have a role, in order."""
    return [node for node in graph.find_nodes(op="placeholder") if role_of(node) is role]


def rows_of(graph: fx.Graph) -> fx.Node:
    """The active rows of a sparse program."""
    (rows,) = of_role(graph, Role.ROWS)
    return rows
