"""Every node says what it gives, and gives it: each op is run again on fake tensors.

The shape, dtype, strides and device of the result must be those in the node's ``meta``, and the result may share memory with
those operands alone that the alias analysis says it shows. So a pass that writes a wrong shape into ``meta``, or an op whose
schema is silent about a view, is seen before anything relies on it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import OpOverload, auto_functionalized_v2, exit_autocast
from ras_compile.errors import first_line
from ras_compile.passes.analysis.emit import Emitter, described
from ras_compile.passes.programs.aliases import INVOKE, memories, shows
from ras_compile.passes.rules.registry import called
from ras_compile.passes.spec.demand import AMBIENT, demand

# How a program for several lengths computes sizes, and numbers of which they are fractions.
NUMBERS = {operator.add: int, operator.mul: int, operator.truediv: float}
HIGHER = (INVOKE, auto_functionalized_v2)  # calls of calls: `blocks.py` and `memory.py` look at them
MOST = 1 << 14  # results that are remembered

# What an op gave on operands of some kinds, and the places of the operands whose memory it shares.
_known: dict[Any, tuple[str, tuple[int, ...]]] = {}


def check_values(graph: fx.Graph, known: Container[fx.Node] = ()) -> None:
    """Raises SpecViolation where a node is no op, or gives something else than it says.

    ``known``: the nodes that are as they were when this was last found true, in a graph without regions of autocast.
    """
    mode = Emitter.of(graph).mode
    regions: list[Any] = []
    try:
        for node in graph.nodes:
            demand(node.op in ("placeholder", "call_function", "get_attr", "output"), node, f"a node of kind {node.op}")
            if node.op == "placeholder":
                demand("val" in node.meta, node, "no value in its meta")
            if node.op != "call_function":
                continue
            if node in known and all(operand in known for operand in node.all_input_nodes):
                continue
            if node.target in AMBIENT:
                _enter_or_exit(node, regions)
            else:
                check_call(node)
                _run_again(node, mode, str([region[0] for region in regions]))
    finally:
        for _, region in reversed(regions):
            exit_autocast(region)


def check_call(node: fx.Node) -> None:
    """A call is one of an overload, an item of a result, arithmetic of lengths, or a call of a repeated block."""
    numbers = NUMBERS.get(node.target) is type(node.meta.get("val"))
    known = isinstance(node.target, OpOverload) or node.target in (operator.getitem, *HIGHER)
    demand(known or numbers, node, "not an overload of an op")
    demand("val" in node.meta, node, "no value in its meta")


def _enter_or_exit(node: fx.Node, regions: list[Any]) -> None:
    if node.target is AMBIENT[0]:
        regions.append((node.args, node.target(*node.args)))
    elif regions:
        exit_autocast(regions.pop()[1])


def _run_again(node: fx.Node, mode: Any, regions: str) -> None:
    operands = node.all_input_nodes
    if node.target in HIGHER or any("val" not in operand.meta for operand in operands):
        return
    found = [described(operand.meta["val"]) for operand in operands]
    kinds = tuple(one if isinstance(one, tuple) else repr(one) for one in found)  # of numbers 1, 1.0 and True differ
    key = node.target, kinds, regions, _pattern(node)
    if key not in _known:
        while len(_known) >= MOST:
            _known.pop(next(iter(_known)))
        _known[key] = _ran(node, mode)
    result, shared = _known[key]
    says = repr(kind(node.meta["val"], view=bool(shared)))
    demand(says == result, node, f"says {says} and gives {result}")
    shown = shows(node, may=True)
    for place in shared:
        demand(operands[place] in shown, node, f"shows memory of `{operands[place].name}` and is not known to")


def _pattern(node: fx.Node) -> str:
    """Which operands are the same node."""
    places = {operand: place for place, operand in enumerate(node.all_input_nodes)}
    return repr(fx.node.map_arg((node.args, node.kwargs), lambda operand: places[operand]))


def _ran(node: fx.Node, mode: Any) -> tuple[str, tuple[int, ...]]:
    """What a node gives on fake tensors of memory of their own, and whose memory it shares."""
    with mode if mode is not None else torch.no_grad(), torch.no_grad():
        given = _apart(node.all_input_nodes, mode)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        try:
            result = called(node, args, kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            demand(False, node, f"cannot run: {first_line(error)}")
    found = set(memories(result))
    shared = [place for place, operand in enumerate(given) if found.intersection(memories(given[operand]))]
    return repr(kind(result, view=bool(shared))), tuple(shared)


def kind(value: Any, *, view: bool = False) -> Any:
    """What must agree of two values: where in its memory a tensor begins only if it is a view of another."""
    if isinstance(value, Tensor):
        dtype, shape, strides, offset, device = described(value)
        return (dtype, shape, strides, offset, device) if view else (dtype, shape, strides, device)
    return [kind(item, view=view) for item in value] if isinstance(value, (tuple, list)) else value


def _apart(nodes: Sequence[fx.Node], mode: Any) -> dict[fx.Node, Any]:
    """A value for each node, of its kind and in memory of its own; one op after the other is given the same ones."""
    kept = {} if mode is None else vars(mode).setdefault("_ras_apart", {})
    used: Counter[str] = Counter()
    given = {}
    for node in nodes:
        value = node.meta["val"]
        like = repr(described(value))
        known = kept.setdefault(like, [])
        if used[like] == len(known):
            known.append(_fresh(value))
        given[node] = known[used[like]]
        used[like] += 1
    return given


def _fresh(value: Any) -> Any:
    """A value of the same kind, in memory of its own (results of one call stay in one)."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_fresh, value))
    if not isinstance(value, Tensor):
        return value
    if not value.storage_offset():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    spread = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    base = torch.empty(value.storage_offset() + spread + 1, dtype=value.dtype, device=value.device)
    return base.as_strided(value.shape, value.stride(), value.storage_offset())


def graphs(program: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph of a program, then those of its repeated blocks."""
    yield program.graph
    for block in program.children():
        if isinstance(block, fx.GraphModule):
            yield block.graph
