"""Calls of repeated blocks: each fits its block, and the block hands on memory of its own."""

from __future__ import annotations

import operator

from torch import fx

from ras_compile.passes.analysis.roles import Role, role_of
from ras_compile.passes.programs.aliases import INVOKE, apart, fills, root, run_on_fakes, subgraph, viewers, writes
from ras_compile.passes.spec.demand import demand
from ras_compile.passes.spec.values import kind

FIXED = (Role.CACHE, Role.ROWS, Role.LENGTH)  # what a block does with these, it does with no other value


def check_blocks(program: fx.GraphModule) -> None:
    """Raises SpecViolation where a call of a repeated block does not fit the block, or its results are not its own."""
    calls: dict[str, list[fx.Node]] = {}
    for call in program.graph.find_nodes(op="call_function", target=INVOKE):
        block = call.args[0]
        demand(isinstance(block, fx.Node) and block.op == "get_attr", call, "calls what is no block of the program")
        calls.setdefault(str(block.target), []).append(call)
    last = program.graph.output_node()
    for name, block in program.named_children():
        if not isinstance(block, fx.GraphModule):
            continue
        found = calls.get(name, [])
        demand(len(found) > 1, last, f"{name} is called {len(found)} times, and stands for no repeat")
        for call in found:
            check_call(call, block)
        check_results(found[0], block)


def check_call(call: fx.Node, block: fx.GraphModule) -> None:
    """A call gives its block what the block's placeholders say, and takes what the block returns."""
    demand(subgraph(call) is block, call, "calls another block than it names")
    inner, given = block.graph.find_nodes(op="placeholder"), call.args[2:]
    demand(len(inner) == len(given), call, f"gives {len(given)} operands to a block of {len(inner)}")
    for place, (wanted, operand) in enumerate(zip(inner, given, strict=True)):
        demand(isinstance(operand, fx.Node), call, f"operand {place} is no value")
        assert isinstance(operand, fx.Node)
        kinds = [kind(node.meta["val"]) for node in (wanted, operand)]
        demand(kinds[0] == kinds[1], call, f"operand {place} is {kinds[1]}, its block takes {kinds[0]}")
        roles = [role_of(wanted), role_of(operand)]
        fits = roles[0] is roles[1] or not set(roles).intersection(FIXED)
        demand(fits, call, f"operand {place} is of role {roles[1]}, its block takes {roles[0]}")
    wanted_results = [kind(node.meta["val"]) for node in block.graph.output_node().args[0]]
    results = [kind(value) for value in call.meta["val"]]
    demand(results == wanted_results, call, f"says {results}, its block returns {wanted_results}")
    for user in call.users:
        item = user.target is operator.getitem and user.args[1] in range(len(results))
        demand(item, user, "takes no result of the block")
    for operand in writes(call):
        owner = root(operand)
        shown = set(viewers(owner))
        others = {user for view in shown for user in view.users} - shown - {call}
        demand(not others, call, f"writes into `{owner.name}`, which others use as well")


def check_results(call: fx.Node, block: fx.GraphModule) -> None:
    """A block is run on fake tensors: each result fills its memory, and shares it with nothing."""
    given, returned = run_on_fakes(block, [operand.meta["val"] for operand in call.args[2:]])
    demand(apart(returned, given), call, "its block returns memory that something else uses")
    demand(all(map(fills, returned)), call, "its block returns a part of some memory")
