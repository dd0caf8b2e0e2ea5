"""What is spliced and what is gathered: the plan of a sparse program, collected from the steps of the rules.

A value that an op needs whole is spliced; a dense value that meets active rows is gathered. With a frozen context the plan
also says what a sparse step need not compute, because the last dense step left it behind.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ras_compile.passes.algebra.layout import Concat, Frame, Layout, Sizes
from ras_compile.passes.analysis.propagate import Analysis
from ras_compile.passes.rules.concatenation import CONCATENATIONS
from ras_compile.passes.rules.registry import Gather, Step, Use, named_arguments, operands

aten = torch.ops.aten


@dataclass(frozen=True)
class Splice:
    """One splice point: the value of ``node`` is made whole from its cache and the active rows."""

    node: fx.Node
    layout: Layout
    is_output: bool


@dataclass
class SparsePlan:
    """Splices and gathers of the sparse program, in the order in which they appear."""

    splices: list[Splice] = field(default_factory=list)  # the values that are made whole from their caches
    # the dense values of which active rows are taken, and how they are read
    gathers: dict[fx.Node, list[Layout]] = field(default_factory=dict)
    # with a frozen context, the values of it that sparse steps take from the last dense one as they are
    frozen: list[fx.Node] = field(default_factory=list)
    # with a frozen context, the nodes that a sparse step computes or reads; else None: all of them
    live: set[fx.Node] | None = None

    def sizes(self, frame: Frame, active: Any) -> Sizes:
        """The sizes of the sparse world; a frozen context has no entries there."""
        return Sizes(frame, active, context=self.live is None)

    def skips(self, node: fx.Node) -> bool:
        """Whether a sparse step does without computing a node."""
        return self.live is not None and (node not in self.live or node in self.frozen)

    def splice(self, node: fx.Node) -> int:
        return next(index for index, splice in enumerate(self.splices) if splice.node is node)


def plan(analysis: Analysis, *, frozen: bool = False) -> SparsePlan:
    """Collects every splice and every gather that the steps ask for.

    Args:
        frozen: whether sparse steps leave the context as the last dense step left it.
    """
    result = frozen_plan(analysis) if frozen else SparsePlan()
    whole = {node for node, step in analysis.steps.items() if step.whole}
    seen: set[fx.Node] = set()

    def gather(node: fx.Node, layout: Layout) -> None:
        known = result.gathers.setdefault(node, [])
        if layout not in known:
            known.append(layout)

    def rows(node: fx.Node) -> None:
        layout = analysis.layouts[node]
        assert isinstance(layout, Layout)
        if analysis.frame.carries(layout) and (node is analysis.latent or source(node) in whole):
            gather(node, Layout(layout.dims))

    def splice(node: fx.Node, is_output: bool = False) -> None:
        layout = analysis.layouts[node]
        assert isinstance(layout, Layout)
        if node not in seen:
            seen.add(node)
            result.splices.append(Splice(node, layout, is_output))

    for node, step in analysis.steps.items():
        if result.skips(node):
            continue
        for operand, use in zip(operands(node), step.uses, strict=False):
            if isinstance(use, Gather):
                if not result.skips(operand) or operand in result.frozen:
                    gather(operand, use.layout)
            elif use is Use.ROWS and node.target is not operator.getitem:
                rows(operand)
            elif use is Use.WHOLE and source(operand) not in whole:
                splice(operand)
                rows(operand)
    for index in analysis.outputs:
        node = analysis.output_nodes[index]
        rows(node)
        if node in seen:
            result.splices[result.splice(node)] = Splice(node, analysis.layouts[node], True)
        else:
            splice(node, is_output=True)
    return result


def frozen_plan(analysis: Analysis) -> SparsePlan:
    """Which nodes a sparse step needs, backwards from the outputs, when the context's tokens are not computed in it.

    A concatenation needs its operand with the region alone: the other segments of what it makes are in the cache. Keys and
    values of attention to the context, and slices of a joint sequence that hold no region, are taken from the dense step.
    """
    result = SparsePlan(live=set())
    assert result.live is not None
    # borders of autocast regions, which give nothing
    ambient = [node for node in analysis.graph.nodes if node.op == "call_function" and "val" not in node.meta]
    todo = [*analysis.output_nodes, analysis.latent, *ambient]
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in result.live:
            continue
        result.live.add(node)
        step = analysis.steps.get(node)
        if step is not None and sliced_context(analysis, node, step):
            result.frozen.append(node)
            continue
        for place, operand in enumerate(operands(node)):
            known = analysis.layouts.get(operand)
            if step is None or known is not None:
                todo.append(operand)
            elif frozen_operand(node, step, place):
                result.live.add(operand)
                result.frozen.append(operand)
            elif not isinstance(step.out, Layout) or joined_dim(node, step.out) is None:
                todo.append(operand)
    order = {node: index for index, node in enumerate(analysis.graph.nodes)}
    result.frozen = sorted(set(result.frozen), key=order.__getitem__)
    return result


def sliced_context(analysis: Analysis, node: fx.Node, step: Step) -> bool:
    """Whether a node takes a segment without the region out of a joint sequence."""
    if node.target is operator.getitem:
        return not analysis.steps[source(node)].whole and analysis.layouts.get(node) is None
    return not step.whole and step.out is None and Use.ROWS in step.uses


def frozen_operand(node: fx.Node, step: Step, place: int) -> bool:
    """Whether an operand is a key or a value of attention from the picture to the context."""
    return (
        node.target is aten.scaled_dot_product_attention.default
        and place in (1, 2)
        and not step.whole
        and step.uses[place] is Use.SAME
    )


def joined_dim(node: fx.Node, layout: Layout) -> int | None:
    """The dimension along which a node puts the region's segment beside others; None where it does not."""
    if node.target not in CONCATENATIONS:
        return None
    dim = named_arguments(node)["dim"] % len(layout.dims)
    return dim if any(isinstance(factor, Concat) for factor in layout.dims[dim]) else None


def source(node: fx.Node) -> fx.Node:
    """The node that computes a value: the op behind a `getitem`."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node
