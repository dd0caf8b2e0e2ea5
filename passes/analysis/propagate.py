"""Propagation of layouts through a graph, to the fixpoint at which no fact about the latent's atoms changes any more."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes import rules
from ras_compile.passes.algebra.layout import Coarsen, Frame, Layout, Refine, Restart
from ras_compile.passes.rules.pointwise import is_pointwise, pointwise
from ras_compile.passes.rules.registry import RULES, Call, Result, Rule, Step, Use, operands, source_line

aten = torch.ops.aten

__all__ = ["Analysis", "propagate", "rules"]

ROUNDS = 200
CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding
)  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """What the propagation found.

    Attributes:
        graph: the dense graph: functional, pre-dispatch ATen with static shapes.
        latent: the placeholder that carries the region.
        frame: how the latent falls into atoms, and which of them are the region.
        layouts: layout of every value that carries the region (a tuple for a node with several results).
        steps: what becomes of each node that has an operand with the region.
        outputs: positions of the graph's outputs that carry the region.
    """

    graph: fx.Graph
    latent: fx.Node
    frame: Frame
    layouts: dict[fx.Node, Result]
    steps: dict[fx.Node, Step]
    outputs: tuple[int, ...]

    @property
    def output_nodes(self) -> list[fx.Node]:
        return list(next(iter(reversed(self.graph.nodes))).args[0])  # type: ignore[arg-type]


def find_rule(node: fx.Node) -> Rule:
    """The rule of a node's op.

    Raises:
        UnsupportedGraph: the op has none.
    """
    rule = RULES.get(node.target)  # type: ignore[arg-type]
    if rule is None and is_pointwise(node.target):
        rule = pointwise
    if rule is None:
        raise UnsupportedGraph(
            f"no rule says how {node.target} treats the tokens of the picture; add one to the registry",
            op=str(node.target),
            source=source_line(node),
        )
    return rule


def propagate(graph: fx.Graph, latent: fx.Node, frame: Frame, *, kv_cache: bool = True) -> Analysis:
    """Finds the layout of every value of ``graph``.

    Args:
        graph: functional, pre-dispatch ATen; every node's ``meta["val"]`` has static sizes.
        latent: the placeholder whose grid is the region.
        frame: the latent's shape, its dimensions not yet cut.
        kv_cache: False attends among the active tokens alone.

    Raises:
        UnsupportedGraph: an op has no rule, no region reaches an output, or the latent is empty.
    """
    if 0 in frame.shape:
        raise UnsupportedGraph(f"`{_name(latent)}` {list(frame.shape)} is empty")
    for _ in range(ROUNDS):
        if not frame.region:
            break
        try:
            return _round(graph, latent, frame, kv_cache)
        except Restart as fact:
            if isinstance(fact, Refine) and fact.atom == frame.batch:
                frame = frame.unbatched()
            frame = fact.apply(frame)
    raise UnsupportedGraph(
        f"no token grid: no dimension of `{_name(latent)}` {list(frame.shape)} reaches the output as tokens (all are channels)"
    )


def _round(graph: fx.Graph, latent: fx.Node, frame: Frame, kv_cache: bool) -> Analysis:
    layouts: dict[fx.Node, Result] = {latent: frame.layout()}
    steps: dict[fx.Node, Step] = {}
    mixed: set[fx.Node] = set()
    for node in graph.nodes:
        if any(operand in mixed for operand in node.all_input_nodes[node.target is aten.copy.default :]):
            mixed.add(node)
        if node.op != "call_function" or not any(layouts.get(operand) is not None for operand in operands(node)):
            continue
        if node.target is operator.getitem:
            source, index = node.args
            result: Result = layouts[source][index]  # type: ignore[index]
            steps[node] = Step(result, (Use.ROWS,))
        else:
            call = Call(node, layouts, frame, kv_cache=kv_cache, mixed=mixed)
            step = find_rule(node)(call)
            check(node, step)
            steps[node], result = step, step.out
        if result is not None and not (isinstance(result, tuple) and not any(result)):
            layouts[node] = result
            mixed.discard(node)
        elif node in steps and steps[node].whole:
            mixed.add(node)
    for node, result in layouts.items():
        for layout in result if isinstance(result, tuple) else (result,):
            if layout is not None and not frame.separable(layout):
                raise UnsupportedGraph(
                    f"tokens of the picture stand in several places of one tensor, {layout}", source=source_line(node)
                )
    outputs = next(iter(reversed(graph.nodes))).args[0]
    found = tuple(index for index, node in enumerate(outputs) if isinstance(layouts.get(node), Layout))
    if not found:
        if not frame.coarse and any(node.target in CONVOLUTIONS and steps[node].whole for node in steps):
            raise Coarsen
        lost = next(
            (node for node in graph.nodes if node in mixed and steps.get(node) is not None and steps[node].whole), None
        )
        raise UnsupportedGraph(
            f"no output carries the token grid of `{_name(latent)}`: not a model from a latent to its noise"
            + (f", or its tokens are lost in {lost.target}" if lost is not None else ""),
            source=source_line(lost) if lost is not None else None,
        )
    return Analysis(graph, latent, frame, layouts, steps, found)


def _name(latent: fx.Node) -> str:
    """What the user calls the latent, where that is known."""
    return latent.meta.get("argument", latent.name)


def check(node: fx.Node, step: Step) -> None:
    """A layout names the very sizes of the value that it describes: a rule that says otherwise is wrong."""
    value = node.meta["val"]
    values, outs = (value, step.out) if isinstance(value, (tuple, list)) else ((value,), (step.out,))
    for item, out in zip(values, outs if isinstance(outs, tuple) else (None,) * len(values), strict=True):
        if out is not None and out.shape != tuple(item.shape):
            raise UnsupportedGraph(
                f"the rule of {node.target} gives {out} for a value of shape {tuple(item.shape)}",
                op=str(node.target),
                source=source_line(node),
            )
