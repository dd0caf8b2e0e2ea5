"""Propagation of layouts through a graph, to the fixpoint at which no fact about the latent's atoms changes any more."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes import rules  # noqa: F401  (fills the registry)
from ras_compile.passes.algebra.layout import (
    Coarsen,
    Exclude,
    Frame,
    Layout,
    Padded,
    Refine,
    Restart,
    Sharded,
    Unbatch,
    atoms_of,
)
from ras_compile.passes.analysis.pieces import CUTS, join_parts
from ras_compile.passes.rules.collectives import COLLECTIVES, joined_by
from ras_compile.passes.rules.pointwise import find_rule
from ras_compile.passes.rules.registry import Call, Gather, Result, Step, Use, operands, source_line

aten = torch.ops.aten

ROUNDS = 200
CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding
)  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """What the propagation found."""

    graph: fx.Graph  # the dense graph: functional, pre-dispatch ATen with static shapes
    latent: fx.Node  # the placeholder that carries the region
    frame: Frame  # how the latent falls into atoms, and which of them are the region
    # layout of every value that carries the region (a tuple for a node with several results)
    layouts: dict[fx.Node, Result]
    steps: dict[fx.Node, Step]  # what becomes of each node that has an operand with the region
    outputs: tuple[int, ...]  # positions of the graph's outputs that carry the region

    @property
    def output_nodes(self) -> list[fx.Node]:
        return list(self.graph.output_node().args[0])


def propagate(graph: fx.Graph, latent: fx.Node, frame: Frame, *, kv_cache: bool = True) -> Analysis:
    """Finds the layout of every value of ``graph``.

    Args:
        graph: functional, pre-dispatch ATen; every node's ``meta["val"]`` has static sizes.
        kv_cache: False attends among the active tokens alone.

    Raises:
        UnsupportedGraph: an op has no rule, no region reaches an output, or the latent is empty.
    """
    if 0 in frame.shape:
        raise UnsupportedGraph(f"`{_name(latent)}` {list(frame.shape)} is empty")
    apart: set[fx.Node] = set()
    packed = False
    frame = joined_by(graph, frame)
    for _ in range(ROUNDS):
        # no more than one dimension is left: of tokens, if it is mixed
        if not frame.region and frame.batch is not None:
            packed, frame = True, frame.unbatched()
        if not frame.region:
            break
        try:
            found = _round(graph, latent, frame, kv_cache, apart)
            if packed and not any(Use.WHOLE in step.uses for step in found.steps.values()):
                break
            return found
        except Restart as fact:
            if isinstance(fact, Refine) and fact.atom == frame.batch:
                frame = frame.unbatched()
            frame = fact.apply(frame)
    raise UnsupportedGraph(
        f"no token grid: no dimension of `{_name(latent)}` {list(frame.shape)} reaches the output as tokens (all are channels)"
    )


def _round(graph: fx.Graph, latent: fx.Node, frame: Frame, kv_cache: bool, apart: set[fx.Node]) -> Analysis:
    layouts: dict[fx.Node, Result] = {latent: frame.layout()}
    steps: dict[fx.Node, Step] = {}
    mixed: set[fx.Node] = set()
    following = next(iter(graph.nodes))
    while following.op != "root":
        node, following = following, following.next
        if any(operand in mixed for operand in node.all_input_nodes[node.target is aten.copy.default :]):
            mixed.add(node)
        if node.op != "call_function" or not any(layouts.get(operand) is not None for operand in operands(node)):
            continue
        if node.target is operator.getitem:
            source, index = node.args
            result: Result = layouts[source][index]
            steps[node] = Step(result, (Use.ROWS,))
        else:
            call = Call(node, of_region(node, layouts, frame), frame, kv_cache=kv_cache, mixed=mixed)
            source, one = operands(node)[0], one_step(graph, call, apart)
            if one is None:  # the graph is another from where the parts were cut
                for known in (layouts, steps):
                    for gone in [erased for erased in known if erased._erased]:
                        del known[gone]
                following = source.next
                continue
            step = one
            check(node, step)
            steps[node], result = step, step.out
        if result is not None and not (isinstance(result, tuple) and not any(result)):
            layouts[node] = result
            mixed.discard(node)
        elif node in steps and steps[node].whole:
            mixed.add(node)
    if not frame.padded and any(pads_latent(node, step, layouts) for node, step in steps.items()):
        raise Padded
    for node, result in layouts.items():
        for layout in result if isinstance(result, tuple) else (result,):
            if layout is not None and not frame.separable(layout):
                raise UnsupportedGraph(
                    f"tokens of the picture stand in several places of one tensor, {layout}", source=source_line(node)
                )
    outputs: Any = graph.output_node().args[0]
    if not all(isinstance(result, fx.Node) for result in outputs):
        raise UnsupportedGraph(
            "the model returns, or keeps as an attribute, a number that depends on sizes (self.words = text.shape[1], say): leave "
            "that out of forward, or compile each size for itself with dynamic=False"
        )
    layouts = {node: known for node, known in layouts.items() if node in outputs or holds_region(known, frame)}
    found = tuple(index for index, node in enumerate(outputs) if isinstance(layouts.get(node), Layout))
    if not found:
        if not frame.coarse and any(node.target in CONVOLUTIONS and steps[node].whole for node in steps):
            raise Coarsen
        lost = next(
            (node for node in graph.nodes if node in mixed and steps.get(node) is not None and steps[node].whole), None
        )
        raise UnsupportedGraph(
            f"no output carries the token grid of `{_name(latent)}`: not a model from a latent to its noise"
            + (f", or its tokens are lost in {lost.target}" if lost is not None else "")
            + (
                ", where patches hold entries of several (roll or flip it by whole patches)"
                if torn(lost, layouts)
                else ""
            ),
            source=source_line(lost) if lost is not None else None,
        )
    return Analysis(graph, latent, frame, layouts, steps, found)


def torn(lost: fx.Node | None, layouts: dict[fx.Node, Result]) -> bool:
    """Whether tokens are lost because a latent was moved by less than a patch before it was cut into patches."""
    if lost is None or any(not isinstance(layouts.get(node), (Layout, type(None))) for node in operands(lost)):
        return False
    held = [layout for node in operands(lost) if isinstance(layout := layouts.get(node), Layout) and layout.raw]
    return any(atom.order is not None for layout in held for dim in layout.dims for atom in atoms_of(dim))


def pads_latent(node: fx.Node, step: Step, layouts: dict[fx.Node, Result]) -> bool:
    """Whether a latent is padded along its grid by entries of its own, and its tokens are lost there."""
    if node.target is not aten.pad.default or not step.whole or step.out is not None:
        return False
    padded = layouts[operands(node)[0]]
    return isinstance(padded, Layout) and padded.raw


def one_step(graph: fx.Graph, call: Call, apart: set[fx.Node]) -> Step | None:
    """What becomes of a node; None where parts of the tokens, cut there, are worked together instead.

    Args:
        apart: values whose parts are known to be worked apart; those that are found so are added.
    """
    node = call.node
    if not any(holds_region(result, call.frame) for result in call.layouts.values()):
        return of_all_tokens(call)
    if node.target not in CUTS:
        return applied(call)
    try:
        step = applied(call)
    except (Exclude, Unbatch):
        if together(graph, node, apart):
            return None
        raise
    return None if step.whole and together(graph, node, apart) else step


def holds_region(result: Result, frame: Frame) -> bool:
    """Whether a value has tokens of the region: of the whole latent, a process takes a part for its own."""
    return frame.stretch is None or any(layout is not None and frame.carries(layout) for layout in as_tuple(result))


def of_region(node: fx.Node, layouts: dict[fx.Node, Result], frame: Frame) -> dict[fx.Node, Result]:
    """The layouts by which a node's rule goes: beside tokens of the region, those of the whole latent are values as any other."""
    if frame.stretch is None:
        return layouts
    known = {operand: layouts[operand] for operand in operands(node) if layouts.get(operand) is not None}
    own = {operand: result for operand, result in known.items() if holds_region(result, frame)}
    return own or known


def of_all_tokens(call: Call) -> Step:
    """What becomes of a node on tokens of the whole latent, of which this process takes its own, or to which they are joined.

    It is computed as it is; the rule says where the tokens stand.
    """
    before = Call(call.node, call.layouts, call.frame.everyone, kv_cache=call.kv_cache, mixed=call.mixed)
    out: Result
    try:
        out = applied(before).out
    except Sharded as own:
        out = own.outs
    return Step(out, (Use.SAME,) * len(call.operands), whole=True)


def applied(call: Call) -> Step:
    """The step of a node's rule.

    Raises:
        Restart: the rule says so. Tokens that stand in an order leave the region all at once; where only some would, the op
            runs whole.
    """
    try:
        step = find_rule(call.node)(call)
    except Exclude as fact:
        plain = call.frame.plain(fact.atoms)
        if plain is not None:
            raise Exclude(plain) from None
        return call.whole(call.each(None))
    return step if step.whole or same_rows(call, step) else call.whole(call.each(None))


def same_rows(call: Call, step: Step) -> bool:
    """Whether the rows that meet in a node are of the same processes: of all of them, or of this one alone.

    Only a collective leads from the one to the other.
    """
    if call.frame.shards is None or call.node.target in COLLECTIVES:
        return True
    met = [use.layout for use in step.uses if isinstance(use, Gather)]
    for operand, use in zip(call.operands, step.uses, strict=False):
        if use is Use.ROWS:
            met += [layout for layout in as_tuple(call.layouts[operand]) if layout is not None]
    outs = [layout for layout in as_tuple(step.out) if layout is not None]
    ranked = {layout.ranked for layout in [*met, *outs]}
    return len(ranked) < 2 and (bool(outs) or ranked != {True})


def as_tuple(result: Result) -> tuple[Layout | None, ...]:
    return result if isinstance(result, tuple) else (result,)


def together(graph: fx.Graph, node: fx.Node, apart: set[fx.Node]) -> bool:
    """:func:`join_parts`, once for each value: it depends on no fact about the latent."""
    (source, *_) = operands(node)
    if source in apart:
        return False
    if join_parts(graph, node):
        apart.clear()  # what meets the joined value may be joined, too
        return True
    apart.add(source)
    return False


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
