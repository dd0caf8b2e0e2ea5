"""What a legal graph looks like after each stage, compared with the stage before. Cheap enough to run on every graph.

    Dynamo's graph -> capture -> check_captured -> propagate -> check_analysis -> dense_program  -> check_dense
                                                                               -> sparse_program -> check_sparse

A violation is a defect of the compiler and not of the user's model; each names the node and the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import fx

from ras_compile._torch import OpOverload, schema_of
from ras_compile.passes.algebra.layout import Axis, Concat, Dim, Frame, Layout, Sizes, atoms_of, opened
from ras_compile.passes.analysis.propagate import Analysis
from ras_compile.passes.analysis.splices import SparsePlan, Splice
from ras_compile.passes.programs.aliases import overlaps_itself, root, roots, shows, writes
from ras_compile.passes.rules.registry import Gather, Step, Use, named_arguments, nodes_in, operands
from ras_compile.passes.spec.demand import AMBIENT, demand

aten = torch.ops.aten

WRITES = (aten.index_put_.default, aten.copy_.default)  # splices; custom ops that declare what they mutate come beside


def check_captured(graph: fx.Graph, source: fx.Graph | None = None) -> None:
    """A captured graph is functional ATen with static sizes, and keeps the user's source lines.

    Args:
        source: the graph that it was captured from; where that one has stack traces, so must ``graph``.

    Raises:
        SpecViolation: it is not.
    """
    for node in graph.nodes:
        demand(node.op in ("placeholder", "call_function", "get_attr", "output"), node, f"a node of kind {node.op}")
        if node.op == "call_function":
            check_functional(node)
        if node.op != "output" and node.target not in AMBIENT:
            check_value(node)
    last = next(iter(reversed(graph.nodes)))
    demand(last.op == "output" and isinstance(last.args[0], (tuple, list)), last, "the graph does not end in a tuple")
    if source is not None and any("stack_trace" in node.meta for node in source.nodes):
        traced = any(node.meta.get("stack_trace") for node in graph.nodes if node.op == "call_function")
        demand(traced, last, "the user's stack traces were lost")


def check_functional(node: fx.Node) -> None:
    """A call is an ATen overload (or an item of a result, or a border of an autocast region) that writes nowhere."""
    if node.target is operator.getitem or node.target in AMBIENT:
        return
    demand(isinstance(node.target, OpOverload), node, "not an overload of an op")
    demand(not schema_of(node.target).is_mutable, node, "an op that writes into its arguments")


def check_value(node: fx.Node) -> None:
    """A node says what it gives, and every size is a plain int."""
    demand("val" in node.meta, node, "no value in its meta")
    value = node.meta["val"]
    for item in value if isinstance(value, (tuple, list)) else [value]:
        demand(not isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)), node, "a symbolic number")
        if isinstance(item, torch.Tensor):
            demand(all(type(size) is int for size in item.shape), node, f"symbolic sizes {tuple(item.shape)}")


def check_analysis(analysis: Analysis) -> None:
    """After the propagation, each node that sees the region has a step, and each layout tells the whole truth.

    Raises:
        SpecViolation: a step is missing, a layout has other sizes than the value, does not hold the grid exactly once, or
            the uses of a step do not fit its operands.
    """
    layouts, steps, frame = analysis.layouts, analysis.steps, analysis.frame
    demand(bool(frame.region), analysis.latent, "a frame without a region")
    for node in analysis.graph.nodes:
        if node.op == "call_function" and any(layouts.get(operand) is not None for operand in operands(node)):
            demand(node in steps, node, "an operand carries the region, but no step says what becomes of the node")
            check_step(analysis, node, steps[node])
        if node in layouts:
            check_layouts(node, layouts[node], frame)
    for index in analysis.outputs:
        node = analysis.output_nodes[index]
        demand(isinstance(layouts.get(node), Layout), node, "an output with the region that has no layout")


def check_layouts(node: fx.Node, layouts: Any, frame: Frame) -> None:
    """The layouts of a node's results have the sizes of its values, and each holds the grid."""
    value = node.meta["val"]
    several = isinstance(value, (tuple, list))
    values, found = (value, layouts) if several else ((value,), (layouts,))
    demand(isinstance(found, tuple) and len(found) == len(values), node, "not one layout for each result")
    for item, layout in zip(values, found, strict=True):
        if layout is not None:
            known = frame if frame.carries(layout) else frame.everyone
            demand(layout.shape == tuple(item.shape), node, f"layout {layout} for a value of shape {tuple(item.shape)}")
            once = holds_grid(layout.dims, known, layout.raw)
            demand(once, node, f"layout {layout} does not hold the grid exactly once")


def holds_grid(dims: Sequence[Dim], frame: Frame, raw: bool = False) -> bool:
    """Whether these dimensions hold every region atom and the samples once: outside of all segments, or within one.

    Of a value that is ``raw``, several segments may be copies of the latent (they become channels).
    """
    # a side that its patches do not fill may share a dimension with others: rows and columns in one
    dims = [tuple(chain.from_iterable(opened((factor,)) for factor in dim)) for dim in dims]
    wanted = sorted([atom for atom, _ in frame.region] + ([frame.batch] if frame.batch is not None else []))
    outside = [[factor for factor in dim if isinstance(factor, Axis)] for dim in dims]

    def held(parts: Sequence[Sequence[Any]]) -> list[Any]:
        return [*frame.tokens_in(parts), *(a for part in parts for a in atoms_of(part) if a == frame.batch)]

    plain = held(outside)
    joint = [factor for dim in dims for factor in dim if isinstance(factor, Concat) and held([(factor,)])]
    if not joint or raw:
        found = sorted(set(held(dims)) if raw else plain)
        return found == wanted
    inside = [held([segment]) for segment in joint[0].segments]
    return len(joint) == 1 and any(inside) and all(sorted([*plain, *part]) == wanted for part in inside if part)


def check_step(analysis: Analysis, node: fx.Node, step: Step) -> None:
    """Each operand that takes part has one use, and it is one that its layout allows."""
    layouts, frame = analysis.layouts, analysis.frame
    taking = operands(node)
    if node.target is operator.getitem:
        demand(len(step.uses) == 1, node, "an item of a result has one operand")
        return
    if step.rewrite is not None:
        taking = nodes_in(step.rewrite(Sizes(frame, 1))[1:])
    demand(len(step.uses) == len(taking), node, f"{len(step.uses)} uses for {len(taking)} operands")
    for operand, use in zip(taking, step.uses, strict=True):
        carries = layouts.get(operand) is not None
        has, fits = "has" if carries else "has no", (use in (Use.ROWS, Use.WHOLE)) == carries
        demand(fits, node, f"`{operand.name}` {has} tokens: {use}")
        fits = not step.whole or use in (Use.WHOLE, Use.SAME)
        demand(fits, node, f"a node that runs whole takes `{operand.name}` as {use}")
        if isinstance(use, Gather):
            fits = holds_grid(use.layout.dims, frame)
            demand(fits, node, f"gathers `{operand.name}` by a part of the grid, {use.layout}")


def check_dense(program: fx.GraphModule, analysis: Analysis, sparse: SparsePlan) -> None:
    """The dense program is the graph, and leaves one cache per splice that is no output, then the frozen values.

    Raises:
        SpecViolation: it writes somewhere, returns something else first, or a cache is not the splice's value in memory of
            its own.
    """
    for node in program.graph.nodes:
        if node.op == "call_function":
            check_functional(node)
    last = program.graph.output_node()
    results, wanted = list(last.args[0]), analysis.output_nodes
    kept = [*(splice.node for splice in sparse.splices if not splice.is_output), *sparse.frozen]
    fits = len(results) == len(wanted) + len(kept)
    demand(fits, last, f"{len(results)} results: {len(wanted)} outputs, {len(kept)} caches")
    for found, node in zip(results, wanted, strict=False):
        fits = getattr(found, "name", found) == getattr(node, "name", node)
        demand(fits, last, f"returns {found} in place of output {node}")
    for cache, node in zip(results[len(wanted) :], kept, strict=True):
        held = cache.args[0] if cache.target is aten.clone.default and cache.name != node.name else cache
        demand(held.name == node.name, cache, f"the cache of `{node.name}` is another value")
        for base in roots(cache):
            reason = f"the cache of `{node.name}` may be the input `{base.name}` itself"
            demand(base.op == "call_function", cache, reason)
        demand(not overlaps_itself(cache.meta["val"]), cache, "the entries of a cache share memory")


def check_sparse(program: fx.GraphModule, analysis: Analysis, sparse: SparsePlan) -> None:
    """The sparse program reads the latent's active rows alone, and writes each cache once, before anyone reads it.

    Raises:
        SpecViolation: it does not, or a value has other sizes than the sparse form of its dense one.
    """
    graph = program.graph
    inputs = graph.find_nodes(op="placeholder")
    given = analysis.graph.find_nodes(op="placeholder")
    fits = len(inputs) == len(given) + 1 + len(sparse.splices) + len(sparse.frozen)
    demand(fits, inputs[-1], "not the inputs, the rows, one cache per splice and the values of a frozen context")
    rows, caches = inputs[len(given)], inputs[len(given) + 1 :][: len(sparse.splices)]
    value = rows.meta["val"]
    demand(value.dtype == torch.int64 and value.ndim == 2, rows, "rows are int64 [B, A]")
    demand(value.shape[0] == analysis.frame.samples, rows, f"rows of {analysis.frame.samples} samples")
    for cache, splice in zip(caches, sparse.splices, strict=True):
        same = cache.meta["val"].shape == splice.node.meta["val"].shape
        demand(same, cache, f"a cache for `{splice.node.name}` of another shape")
    check_caches(graph, caches, whole=sparse.live is None)
    check_values_of_caches(graph, dict(zip(caches, sparse.splices, strict=True)))
    if analysis.frame.stretch is None:
        check_reads_of_latent(inputs[given.index(analysis.latent)])
    check_sparse_sizes(graph, analysis, sparse.sizes(analysis.frame, value.shape[1]))
    last = graph.output_node()
    for result in last.args[0]:
        if isinstance(result, fx.Node):
            demand(roots(result).isdisjoint(caches), last, f"returns `{result.name}`, which may be a cache itself")


def check_caches(graph: fx.Graph, caches: Sequence[fx.Node], whole: bool = True) -> None:
    """Every cache is written once in each of its parts, by a splice, before any other node reads it.

    Args:
        whole: False where the context is frozen: its segments are not written.
    """
    found: dict[fx.Node, list[fx.Node]] = {cache: [] for cache in caches}
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        targets = writes(node)
        for target in targets:
            custom = node.target.namespace not in ("aten", "prims")
            demand(node.target in WRITES or custom, node, "writes in place without being a splice")
            base = root(target)
            demand(base in found, node, f"writes into `{base.name}`, which is no cache")
            demand(base not in seen, node, f"`{base.name}` is read before it is spliced in full")
            found[base].append(target)
        if targets or not shows(node, may=True):
            reads = [operand for operand in node.all_input_nodes if operand not in targets]
            seen |= set().union(*map(roots, reads)) & found.keys()
    for cache, targets in found.items():
        check_parts(cache, targets, whole)


def check_values_of_caches(graph: fx.Graph, splices: dict[fx.Node, Splice]) -> None:
    """What is written into a cache is the sparse form of its splice's value, or of a segment of it."""
    for node in graph.nodes:
        for target in writes(node):
            splice = splices[root(target)]
            value = node.args[-1]
            names = {splice.node.name, *(operand.name for operand in splice.node.all_input_nodes)}
            while value.target is aten.permute.default and value.meta.get("dense", splice.node.name) not in names:
                value = value.args[0]
            wrong = value.meta.get("dense", splice.node.name) not in names
            demand(not wrong, node, f"writes `{value.meta.get('dense')}` into the cache of `{splice.node.name}`")


def check_parts(cache: fx.Node, targets: Sequence[fx.Node], whole: bool = True) -> None:
    """The writes into one cache are one write, or slices of one dimension that cover it (if ``whole``) without overlap."""
    demand(bool(targets), cache, "a cache that is never written")
    slices = [cut for target in targets if (cut := sliced(target)) is not None]
    if not slices:
        demand(len(targets) == 1, cache, f"a cache that is written {len(targets)} times")
        return
    one_dim = len(slices) == len(targets) and len({dim for dim, _, _ in slices}) == 1
    demand(one_dim, cache, "overlapping writes into a cache")
    place = 0
    for dim, start, stop in sorted(slices):
        fits = start == place if whole else start >= place
        demand(fits, cache, f"entries {place} to {start} of dimension {dim} are written twice or never")
        place = stop
    covered = not whole or place == cache.meta["val"].shape[slices[0][0]]
    demand(covered, cache, f"entries from {place} on are never written")


def sliced(node: fx.Node) -> tuple[int, int, int] | None:
    """``(dim, start, stop)`` of the slice of a cache that a view shows, or None where it shows all of it."""
    while node.op == "call_function":
        if node.target is aten.slice.Tensor:
            given = named_arguments(node)
            return given["dim"], given["start"], given["end"]
        node = operands(node)[0]
    return None


def check_reads_of_latent(latent: fx.Node) -> None:
    """The latent is only ever read through a gather: what is not active cannot matter."""
    views = [latent]
    while views:
        for user in views.pop().users:
            if user.target is aten.index.Tensor:
                continue
            demand(latent in roots(user), user, "reads the latent other than by its active rows")
            views.append(user)


def check_sparse_sizes(graph: fx.Graph, analysis: Analysis, sizes: Sizes) -> None:
    """A node that stays sparse has the sizes of the sparse form of its dense value."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if "dense" in node.meta and isinstance(value, torch.Tensor):
            shapes.setdefault(node.meta["dense"], []).append(tuple(value.shape))
    for node, step in analysis.steps.items():
        if isinstance(step.out, Layout) and not step.whole and node.name in shapes:
            wanted = sizes.shape(step.out)
            demand(wanted in shapes[node.name], node, f"no value of the sparse sizes {wanted}, but {shapes[node.name]}")
