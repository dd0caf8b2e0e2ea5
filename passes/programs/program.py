"""Dense and sparse programs: the same graph with two primitives, `gather` and `splice`.

    dense:   x -> linear -> k -> sdpa(q, k, v) -> ... -> noise            (k, v and noise are also left behind as caches)
    sparse:  gather(x, rows) -> linear -> splice(k_cache, rows, k) -> sdpa(q, k_cache, v_cache) -> ...
             -> splice(noise_cache, rows, noise)

A splice is an `index_put_` into the cache: in place, with no buffer of full size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from ras_compile._torch import LazyGraphModule, no_modes
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Layout
from ras_compile.passes.analysis.emit import Emitter, fake_mode, sweep
from ras_compile.passes.analysis.propagate import Analysis
from ras_compile.passes.analysis.roles import Role, role_of
from ras_compile.passes.analysis.splices import SparsePlan, joined_dim, plan
from ras_compile.passes.programs.aliases import is_input, overlaps_itself
from ras_compile.passes.programs.positions import PositionBuilder
from ras_compile.passes.rules.registry import Gather, Step, Use, operands

aten = torch.ops.aten


def sparse_program(analysis: Analysis, active: int, sparse: SparsePlan | None = None) -> fx.GraphModule:
    """Builds the sparse program for ``active`` rows.

    The program takes the dense graph's inputs, then ``rows`` (int64 [B, active]), then one cache per splice, which it
    updates in place, then the values of a frozen context; it returns the outputs without the region. Outputs with the
    region are in their caches.

    Raises:
        UnsupportedGraph: an op cannot run at the sparse sizes.
    """
    return _SparseBuilder(analysis, active, sparse or plan(analysis)).build()


class _SparseBuilder:
    def __init__(self, analysis: Analysis, active: int, sparse: SparsePlan) -> None:
        self.analysis, self.plan = analysis, sparse
        self.sizes = sparse.sizes(analysis.frame, active)
        self.emit = Emitter(fake_mode(analysis.graph))
        self.owner = analysis.graph.owning_module or torch.nn.Module()
        self.env: dict[fx.Node, fx.Node] = {}  # values without the region, and whole values
        self.rows: dict[fx.Node, fx.Node] = {}  # active rows of values with the region
        self.gathered: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self.spliced: dict[fx.Node, fx.Node] = {}

    def build(self) -> fx.GraphModule:
        analysis, emit = self.analysis, self.emit
        frame = analysis.frame
        nodes = list(analysis.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        for node in inputs:
            self.env[node] = emit.placeholder(node.name, node.meta["val"], role_of(node) or Role.INPUT)
        with emit.mode:
            device = analysis.latent.meta["val"].device
            rows_value = torch.empty(frame.samples, self.sizes.active, dtype=torch.int64, device=device)
            values = [torch.empty_like(splice.node.meta["val"]) for splice in self.plan.splices]
            frozen = [torch.empty_like(node.meta["val"]) for node in self.plan.frozen]
        rows = emit.placeholder("rows", rows_value, Role.ROWS)
        # what they count, and what is fresh
        rows.meta["tokens"], rows.meta["context"] = frame.tokens, self.sizes.context
        self.caches = [emit.placeholder(f"cache_{index}", value, Role.CACHE) for index, value in enumerate(values)]
        for index, (node, value) in enumerate(zip(self.plan.frozen, frozen, strict=True)):
            self.env[node] = emit.placeholder(f"frozen_{index}", value, Role.FROZEN)
        self.positions = PositionBuilder(frame, self.sizes, rows, emit, self._table)
        for layout in self._addressed():
            if frame.carries(layout):
                self.positions.of(layout)
        for node in [*inputs, *self.plan.frozen]:
            self._gathers(node)
        for node in nodes:
            if self.plan.skips(node):
                continue
            if node.op == "get_attr":
                self.env[node] = emit.graph.node_copy(node)
            elif node.op == "call_function":
                emit.origin = node
                self._node(node)
                self._gathers(node)
                emit.origin = None
        for splice in self.plan.splices:
            if splice.is_output:
                self.whole(splice.node)
        results = [self._result(n) for i, n in enumerate(analysis.output_nodes) if i not in analysis.outputs]
        emit.graph.output(tuple(results))
        sweep(emit.graph)
        return LazyGraphModule(self.owner, emit.graph)

    def _table(self, name: str, value: torch.Tensor) -> fx.Node:
        """A constant of the program, on the latent's device."""
        if not hasattr(self.owner, name):
            with no_modes():
                self.owner.register_buffer(name, value.to(self.analysis.latent.meta["val"].device), persistent=False)
        node = self.emit.graph.get_attr(name)
        node.meta["val"] = self.emit.mode.from_tensor(getattr(self.owner, name))
        return node

    def _result(self, node: fx.Node) -> fx.Node:
        """An output without the region; one that is kept from the dense step is copied, as the next step reads it again."""
        value = self.env[node]
        return self.emit(aten.clone.default, value) if node in self.plan.frozen else value

    def _addressed(self) -> Iterator[Layout]:
        """Every layout that a gather or a splice addresses, so that index tensors stand before all else."""
        for splice in self.plan.splices:
            layouts = [self.analysis.layouts.get(operand) for operand in operands(splice.node)]
            joint = joined_dim(splice.node, splice.layout) is not None
            yield from [layout for layout in layouts if isinstance(layout, Layout)] if joint else [splice.layout]
        for gathers in self.plan.gathers.values():
            yield from gathers

    def _gathers(self, node: fx.Node) -> None:
        if node in self.env and not isinstance(self.env[node].meta["val"], (tuple, list)):
            for layout in self.plan.gathers.get(node, []):
                self.gather(node, layout)

    def _node(self, node: fx.Node) -> None:
        step = self.analysis.steps.get(node)
        if node.target is operator.getitem:
            origin, index = node.args
            table = self.rows if origin in self.rows else self.env
            value = self.emit(operator.getitem, table[origin], index)
            carries = self.analysis.layouts.get(node) is not None
            (self.rows if carries and origin in self.rows else self.env)[node] = value
            return
        if step is None:
            self.env[node] = self._copy(iter([Use.SAME] * len(operands(node))), node.target, node.args, node.kwargs)
            return
        target, args, kwargs = step.rewrite(self.sizes) if step.rewrite else (node.target, node.args, node.kwargs)
        dim = None if self.sizes.context or not isinstance(step.out, Layout) else joined_dim(node, step.out)
        if dim is None:
            value = self._copy(iter(step.uses), target, args, kwargs)
        else:  # the segments with the region alone
            parts = [self.value(*pair) for pair in zip(operands(node), step.uses, strict=True) if pair[1] is Use.ROWS]
            value = self.emit(target, parts, dim)
        several = isinstance(step.out, tuple)
        carries = any(out is not None for out in step.out) if several else step.out is not None
        sparse = carries and not step.whole
        (self.rows if sparse else self.env)[node] = value
        if sparse and not several:
            self._expect(node, value, step)

    def _expect(self, node: fx.Node, value: fx.Node, step: Step) -> None:
        assert isinstance(step.out, Layout)
        if tuple(value.meta["val"].shape) != self.sizes.shape(step.out):
            raise UnsupportedGraph(
                f"{node.target} gives {tuple(value.meta['val'].shape)} at the sparse sizes of {step.out}",
                op=str(node.target),
            )

    def _copy(self, uses: Iterator, target: Callable, args: tuple, kwargs: dict) -> fx.Node:
        new_args, new_kwargs = fx.node.map_arg((args, kwargs), lambda operand: self.value(operand, next(uses)))
        return self.emit(target, *new_args, **new_kwargs)

    def value(self, node: fx.Node, use: Use | Gather) -> fx.Node:
        """The operand in the form in which a step uses it."""
        if isinstance(use, Gather):
            return self.gather(node, use.layout)
        if use is Use.ROWS and node in self.rows:
            return self.rows[node]
        if use is Use.ROWS and isinstance(layout := self.analysis.layouts.get(node), Layout):
            return self.gather(node, Layout(layout.dims))
        if use is Use.WHOLE:
            return self.whole(node)
        return self.env[node]

    def whole(self, node: fx.Node) -> fx.Node:
        """The whole value: computed whole, or spliced into its cache."""
        if node in self.env and not any(splice.node is node for splice in self.plan.splices):
            return self.env[node]
        if node not in self.spliced:
            index = self.plan.splice(node)
            cache, layout = self.caches[index], self.plan.splices[index].layout
            for place, part, inner in self._segments(node, layout):
                self.splice(self._narrow(cache, place), part, inner)
            self.spliced[node] = cache
        return self.spliced[node]

    def _segments(
        self, node: fx.Node, layout: Layout
    ) -> list[tuple[tuple[int, int, int] | None, fx.Node, Layout | None]]:
        """The parts in which a value is written: the operands of a concatenation one by one, so that it is never made.

        Each part comes with its place in the cache, ``(dim, start, length)``, and its layout (None: no tokens).
        """
        if not self.analysis.frame.carries(layout):  # of the tokens of all processes, computed whole
            return [(None, self.env[node], None)]
        step = self.analysis.steps.get(node)
        dim = joined_dim(node, layout)
        if step is None or dim is None:
            return [(None, self.value(node, Use.ROWS), layout)]
        parts: list[tuple[tuple[int, int, int] | None, fx.Node, Layout | None]] = []
        start = 0
        for operand, use in zip(operands(node), step.uses, strict=True):
            inner, length = self.analysis.layouts.get(operand), operand.meta["val"].shape[dim]
            if self.sizes.context or use is Use.ROWS:
                known = inner if isinstance(inner, Layout) else None
                parts.append(((dim, start, length), self.value(operand, use), known))
            start += length
        return parts

    def _narrow(self, cache: fx.Node, place: tuple[int, int, int] | None) -> fx.Node:
        if place is None:
            return cache
        dim, start, length = place
        return self.emit(aten.slice.Tensor, cache, dim, start, start + length)

    def gather(self, node: fx.Node, layout: Layout) -> fx.Node:
        """`gather(full, rows)`: the active rows of a dense value."""
        if (node, layout) not in self.gathered:
            value, positions = self.env[node], self.positions.of(layout)
            shape = list(value.meta["val"].shape)
            full = [1] * (positions.rank - len(shape)) + shape
            if full != shape:
                value = self.emit(aten.reshape.default, value, full)
            wanted = [layout.shape[dim] if dim in positions.dims else size for dim, size in enumerate(full)]
            if wanted != full:
                value = self.emit(aten.expand.default, value, wanted)
            value = self.emit(aten.index.Tensor, self._permute(value, positions.order), list(positions.indices))
            self.gathered[node, layout] = self._permute(value, positions.inverse)
        return self.gathered[node, layout]

    def splice(self, cache: fx.Node, active: fx.Node, layout: Layout | None) -> None:
        """`splice(cache, rows, active)`: writes the active rows into the cache; what has no tokens is written in full."""
        if layout is None:
            self.emit(aten.copy_.default, cache, active)
            return
        positions = self.positions.of(layout)
        view, values = self._permute(cache, positions.order), self._permute(active, positions.order)
        self.emit(aten.index_put_.default, view, list(positions.indices), values)

    def _permute(self, value: fx.Node, order: tuple[int, ...]) -> fx.Node:
        return value if order == tuple(range(len(order))) else self.emit(aten.permute.default, value, list(order))


def dense_program(analysis: Analysis, sparse: SparsePlan) -> fx.GraphModule:
    """The dense graph that also returns the value of every splice operand, the outputs' own caches apart.

    It returns the outputs of the graph, then the caches in the order of ``sparse.splices`` (outputs left out: the caller
    keeps a copy of what it returns), then the values of a frozen context. A value that aliases an input, or overlaps
    itself, is cloned.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(analysis.graph, env)
    for node in graph.find_nodes(op="placeholder"):
        node.meta.setdefault("role", Role.INPUT)
    emit = Emitter(fake_mode(analysis.graph), graph)
    results = [env[node] for node in analysis.output_nodes]
    for node in [*(splice.node for splice in sparse.splices if not splice.is_output), *sparse.frozen]:
        value = env[node]
        if is_input(node) or overlaps_itself(node.meta["val"]):
            value = emit(aten.clone.default, value, memory_format=torch.contiguous_format)
        results.append(value)
    graph.output(tuple(results))
    owner = analysis.graph.owning_module
    return LazyGraphModule(owner if owner is not None else torch.nn.Module(), graph)
