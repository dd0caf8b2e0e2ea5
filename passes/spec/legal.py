"""What a legal program is after every pass: the same for all passes, and what each of them leaves behind from then on."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container

import torch
from torch import fx

from ras_compile.passes.analysis.roles import Role, of_role, role_of
from ras_compile.passes.lowering.functional import writes_by_itself
from ras_compile.passes.lowering.inplace import part_written
from ras_compile.passes.spec.blocks import check_blocks
from ras_compile.passes.spec.demand import demand
from ras_compile.passes.spec.memory import check_memory
from ras_compile.passes.spec.values import check_values, graphs

aten = torch.ops.aten

# Whether each program is checked after each of its passes: always in our tests, and for a user with RAS_SPEC=1.
EVERY_PASS = os.environ.get("RAS_SPEC", "") not in ("", "0")


def check_program(
    program: fx.GraphModule, done: Collection[str] = (), changed: bool = True, known: Container[fx.Node] = ()
) -> None:
    """A program is legal, whichever passes have been through it.

    Args:
        program: dense or sparse, with blocks outlined or not.
        done: the names of the passes that have run, as `pipeline.py` has them.
        changed: False for a program that the last pass left as it was: what all passes keep is then known to hold.
        known: the nodes that it left as they were.

    Raises:
        SpecViolation: it is not.
    """
    if changed:
        for graph in graphs(program):
            check_roles(graph, inside=graph is not program.graph)
            check_values(graph, known)
            check_alive(graph)
        check_memory(program)
        check_blocks(program)
    for name, check in LEFT.items():
        if name in done:
            for graph in graphs(program):
                check(graph)


def check_roles(graph: fx.Graph, inside: bool = False) -> None:
    """Every input says what it is for, and the rows say what they count."""
    for node in graph.find_nodes(op="placeholder"):
        role = role_of(node)
        demand(isinstance(role, Role), node, "an input without a role")
        demand(inside or role is not Role.OPERAND, node, "an operand of a block among the inputs of a program")
        demand(role is not Role.LENGTH or type(node.meta["val"]) is int, node, "a length that is no number")
        if role is Role.ROWS and not inside:
            value = node.meta["val"]
            demand(value.dtype is torch.int64 and value.ndim == 2, node, "rows are int64 [B, A]")
            counts = 0 < value.shape[1] <= node.meta.get("tokens", 0) and "context" in node.meta
            demand(counts, node, "rows that do not say which tokens they count, or more of them than there are")
    many = len(of_role(graph, Role.ROWS))
    demand(many <= 1, next(iter(graph.nodes)), f"{many} inputs are the active rows")
    sparse = many == 1 or inside or not of_role(graph, Role.CACHE)
    demand(sparse, next(iter(graph.nodes)), "a cache in a program without active rows")


def check_alive(graph: fx.Graph) -> None:
    """Nothing is computed that nobody uses."""
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr"):
            demand(bool(node.users) or node.is_impure(), node, "is computed, and nobody uses it")


def check_on_caches(graph: fx.Graph) -> None:
    """A splice writes into the cache itself, not into a permutation or a slice of it."""
    for node in graph.nodes:
        if node.target in (aten.index_put_.default, aten.copy_.default):
            demand(part_written(node) is None, node, "splices into a view of a cache")


def check_functional(graph: fx.Graph) -> None:
    """No custom op writes by itself."""
    for node in graph.nodes:
        demand(not writes_by_itself(node), node, "a custom op that writes, where repeated blocks may hold it")


def check_flat(graph: fx.Graph) -> None:
    """Linears take matrices."""
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        demand(node.args[0].meta["val"].ndim < 3, node, "a linear of more than two dimensions")


# What holds from a pass on, by the name of the pass.
LEFT: dict[str, Callable[[fx.Graph], None]] = {
    "in place": check_on_caches,
    "functional": check_functional,
    "matrices": check_flat,
}
