"""Values that are computed twice: the one search for common subexpressions, for all passes that take two nodes for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def word(node: fx.Node, operand: Callable[[fx.Node], Any] = lambda operand: operand) -> tuple[Any, str]:
    """What two nodes have in common that compute the same: their op and their arguments.

    Args:
        operand: how an operand is spelled; by itself it stands for its own node.
    """
    return node.target, str(fx.node.map_arg((node.args, node.kwargs), operand))


def equals(
    graph: fx.Graph, counts: Callable[[fx.Node], bool], spelled: Callable[[fx.Node], Any] = lambda operand: operand
) -> dict[fx.Node, fx.Node]:
    """For each node that counts the first one that computes the same from the same values, wherever it stands.

    Args:
        counts: asked of each call, in order: may it be taken for another one?
        spelled: how an operand is spelled, see :func:`word`.
    """
    first: dict[fx.Node, fx.Node] = {}
    known: dict[object, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and counts(node):
            key = word(node, lambda operand: spelled(first.get(operand, operand)))
            first[node] = known.setdefault(key, node)
    return first
