"""The plan of one captured graph at concrete shapes: its analysis, and its programs, compiled when first needed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile import kernels
from ras_compile.capture.inputs import GraphInput
from ras_compile.capture.numbers import capture_numbers
from ras_compile.capture.on_disk import Unkeepable, pickled, read, text, unpickled, values_of, written
from ras_compile.config import RUNTIME_OPTIONS, RASConfig
from ras_compile.errors import ConfigError, SpecViolation, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.execute.cudagraphs import DEVICE, ProgramGraphs, warn_without
from ras_compile.execute.inner import Compiled, Program, compile_inner, compile_or_run
from ras_compile.execute.memory import Keeper, default_budget
from ras_compile.execute.shelf import name_of, shelf
from ras_compile.execute.slopes import SLOPES, Slopes
from ras_compile.kernels.tiles import build, postponed
from ras_compile.notices import fell_back, warn_once
from ras_compile.passes.algebra.layout import Layout
from ras_compile.passes.algebra.tokens import TokenView, channel_count, token_view
from ras_compile.passes.analysis.cost import Cost, cost
from ras_compile.passes.analysis.propagate import Analysis
from ras_compile.passes.analysis.splices import SparsePlan, plan
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.lowering.hosted import leave_on_host
from ras_compile.passes.lowering.narrow import DTYPES, cache_bytes, round_dense, round_sparse, rounded_rows
from ras_compile.passes.pipeline import check_built, prepare
from ras_compile.passes.programs.program import dense_program, sparse_program
from ras_compile.passes.rules.constants import FIXED
from ras_compile.passes.spec import legal
from ras_compile.passes.spec.stages import check_analysis, check_captured, check_dense, check_sparse
from ras_compile.plans.latent import analyse, likeness
from ras_compile.plans.spread import Spread

# Active rows of the program on which fusion sites are found, likely no other size of the model: fewer for many samples.
PROBED_ROWS = (61, 31, 13, 7)
PROBED = 8192  # rows of all samples


class Plan:
    """One graph at concrete shapes.

    Args:
        graph: the Dynamo graph, or one that is captured already.
        proved: the same graph was proved right at other lengths of the context.
        like: a plan of the same graph at other lengths, whose analysis serves this one, too; then ``graph`` is its capture.

    Raises:
        UnsupportedGraph: the graph cannot be proved right.
    """

    _original: Plan | None = None  # of what :meth:`serving` gave

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[GraphInput],
        values: Sequence[Any],
        config: RASConfig,
        *,
        proved: bool = False,
        like: Plan | None = None,
    ) -> None:
        self.config = config
        self.chosen: Callable[..., bool] | None = None  # answers in place of kernels' measurements, which it is given
        self.captured = graph if "constants" in graph.meta else capture_numbers(graph, values)
        self.constants: list[Tensor] = self.captured.meta["constants"]
        self.analysis: Analysis
        self.sparse: SparsePlan
        # Programs that the spec has checked already, until they are used: by their active rows, and "dense".
        self._proved: dict[int | str, fx.GraphModule] = {}
        self.name: str | None = None  # see `_named`
        if like is None:
            self.analysis = analyse(self.captured.graph, inputs, values, config)
            self.sparse = plan(self.analysis, frozen=config.context == "frozen")
            self.name = self._named(inputs)
            if not proved:
                self._prove_or_thaw()
        else:
            self.analysis, self.sparse = like.analysis, like.sparse
        self._take(inputs, values)
        # what belongs to this set of shapes alone: programs, CUDA graphs, and what branches keep
        self._device = values[self.latent].device
        if config.cache_dtype == "float8" and self._device.type == "cuda":
            number = torch.cuda.get_device_capability(self._device)
            if number < (8, 9):
                raise ConfigError(
                    f"option cache_dtype='float8' needs a GPU of compute capability 8.9 or later, and this one has {number[0]}."
                    f"{number[1]}; 'int8' runs on all."
                )
        self._graphs = self._program_graphs(values) if config.cuda_graphs else None
        self._programs: dict[int | str, Compiled] = {}
        self.identity = weakref.ref(self)  # what a branch remembers the plan by, without keeping it alive
        budget = config.cache_budget
        if budget is None and not self.hosted:
            budget = default_budget(self._device)
        self.kept = Keeper(self, self._cache_bytes(), budget)

    def _take(self, inputs: Sequence[GraphInput], values: Sequence[Any]) -> None:
        """From now on calls have such inputs."""
        self.inputs, self._is_tensor = inputs, [isinstance(value, Tensor) for value in values]
        self._only_tensors = all(self._is_tensor)
        tensors = list(compress(range(len(values)), self._is_tensor))
        self.latent = tensors[self.captured.graph.find_nodes(op="placeholder").index(self.analysis.latent)]

    def serving(self, inputs: Sequence[GraphInput], values: Sequence[Any]) -> Plan:
        """The plan of calls whose tensors are the same ones in the same order, with other sizes as numbers between them."""
        other = copy.copy(self)  # programs, CUDA graphs, caches and identity are those of this one
        other._original = self  # and so it has to live
        other._take(inputs, values)
        return other

    def _cache_bytes(self) -> int:
        """Bytes of the caches of one guidance branch."""
        return cache_bytes(self.sparse, self._rounded)

    @cached_property
    def _rounded(self) -> dict[int, int]:
        """The caches that are rounded, and along which dimension."""
        return {} if self.config.cache_dtype is None else rounded_rows(self.sparse, self.analysis.frame)

    @property
    def _narrow(self) -> torch.dtype:
        """What they are rounded to."""
        assert self.config.cache_dtype is not None
        return DTYPES[self.config.cache_dtype]

    @cached_property
    def hosted(self) -> list[int]:
        """The caches that are in the host's memory: all but those of what the model returns."""
        splices = enumerate(self.sparse.splices) if self.config.cache_device == "cpu" else ()
        return [index for index, splice in splices if not splice.is_output]

    def dense_graph(self) -> fx.GraphModule:
        """The dense program before the passes; it leaves caches as, and where, they are kept."""
        program = self._proved.pop("dense", None) or dense_program(self.analysis, self.sparse)
        if self._rounded:
            round_dense(program, self.sparse, self._rounded, self._narrow)
        count = len(self.analysis.output_nodes)
        return leave_on_host(program, range(count, count + len(self.hosted)))

    def sparse_graph(self, active: int) -> fx.GraphModule:
        """The sparse program for ``active`` rows before the passes."""
        program = self._proved.pop(active, None) or sparse_program(self.analysis, active, self.sparse)
        return round_sparse(program, self._rounded, self._narrow) if self._rounded else program

    def _named(self, inputs: Sequence[GraphInput]) -> str | None:
        """A name for all that the analysis and the programs follow from, in any process; None where there is none."""
        places = self.captured.graph.find_nodes(op="placeholder")
        options = {each.name: getattr(self.config, each.name) for each in fields(self.config)}
        compiled = {name: value for name, value in options.items() if name not in RUNTIME_OPTIONS}
        try:
            held = values_of([*self.constants, *[node.meta[FIXED] for node in places if FIXED in node.meta]])
            return name_of("plan", text(self.captured), str(inputs), str(compiled), held)
        except Unkeepable:
            return None

    def _prove_or_thaw(self) -> None:
        """Proves the plan, unless another process has; with a fresh context where it cannot be frozen."""
        proof = None if self.name is None else f"{self.name} proved"
        if proof is not None and shelf.get(proof) is not None:
            return
        try:
            self.prove()
            if proof is not None:
                shelf.put(proof, b"")
        except UnsupportedGraph as error:
            if self.sparse.live is None:
                raise
            fell_back("the context computed in every step", error)
            warn_once(
                f"ras_compile: this model's context is computed afresh in every step, it cannot be frozen: {error}"
            )
            self.sparse, self.name = plan(self.analysis), None
            self.prove()

    def prove(self) -> None:
        """Builds and checks both programs once, so that what cannot be built is known before the first step.

        Raises:
            UnsupportedGraph: an op cannot run at sparse sizes, or a sparse step saves nothing.
        """
        check_captured(self.captured.graph)
        check_analysis(self.analysis)
        tokens = self.analysis.frame.tokens
        few = max(1, tokens // 4)
        with torch.no_grad():
            programs = [dense_program(self.analysis, self.sparse), sparse_program(self.analysis, few, self.sparse)]
            check_dense(programs[0], self.analysis, self.sparse)
            check_sparse(programs[1], self.analysis, self.sparse)
            if legal.EVERY_PASS:
                counts = [few, *({1, tokens} - {few})]
                for active in counts[1:]:
                    programs.append(sparse_program(self.analysis, active, self.sparse))
                    check_sparse(programs[-1], self.analysis, self.sparse)
                for program in programs:
                    check_built(program)
                self._proved = dict(zip(["dense", *counts], programs, strict=True))
        self.noise_view  # noqa: B018  (what it refuses is known before the first step)
        price = cost(self.analysis, self.sparse)
        if price.dense_flops and price.flop_ratio(few) >= 1:
            raise UnsupportedGraph(
                "a sparse step would cost as much as a dense one: the operations that mix tokens are all there is"
            )

    def static_graph(self) -> fx.GraphModule:
        """The captured graph at this plan's sizes."""
        return self.captured

    @property
    def packed(self) -> bool:
        """Whether the latent is `[B, N, C]`, and its tokens are its second dimension as it is."""
        shape, frame = self.analysis.latent.meta["val"].shape, self.analysis.frame
        return len(shape) == 3 and [size for _, size in frame.region] == [shape[1]] and frame.samples == shape[0]

    @cached_property
    def cost(self) -> Cost:
        """FLOPs and bytes of both programs."""
        kept = self._cache_bytes()
        if self.config.cache_reuse == "forecast":
            kept += sum(splice.node.meta["val"].nbytes for splice in self.sparse.splices if not splice.is_output)
        return replace(cost(self.analysis, self.sparse), cache_bytes=kept)

    @cached_property
    def latent_view(self) -> TokenView:
        """Function from the latent to its token view [B, N, P, C]."""
        return token_view(self.analysis.frame.layout(), self.analysis.frame)

    @cached_property
    def noise_view(self) -> TokenView:
        """Function from the noise output to its token view [B, N, P, C], on the channels that match the latent's."""
        layout, frame = self.analysis.layouts[self.analysis.output_nodes[self.noise]], self.analysis.frame
        assert isinstance(layout, Layout)
        return token_view(layout, frame, min(channel_count(layout, frame), channel_count(frame.layout(), frame)))

    @cached_property
    def spread(self) -> Spread | None:
        """The tokens of all processes, where each of them has the whole latent; else None."""
        frame = self.analysis.frame
        return None if frame.stretch is None else Spread(frame, self.latent_view, self.noise_view)

    @cached_property
    def noise(self) -> int:
        """Position of the noise among the outputs: the first one with the region that looks like the latent most."""
        latent = self.analysis.latent.meta["val"]
        return min(
            self.analysis.outputs, key=lambda index: likeness(latent, [self.analysis.output_nodes[index].meta["val"]])
        )

    def dense(self, values: Sequence[Any], slots: dict, spare: dict | None = None) -> list[Any]:
        """Runs the dense program and leaves every splice operand in ``slots["caches"]``.

        Args:
            spare: what a finished generation kept; its memory may be taken over.
        """
        self.kept.use(slots)
        slopes: Slopes | None = slots.get(SLOPES)
        if slopes is not None:
            slopes.remember(slots.get("caches"), self._returned)
        slots.pop("caches", None)  # the new ones take their memory: what the system gives anew is slow at first touch
        results = list(self.run("dense", values, [], slots, spare))
        count = len(self.analysis.output_nodes)
        slots["caches"], outputs = self.caches_among(results), results[:count]
        if slopes is not None:
            slopes.compare(slots["caches"])
        for index in range(count) if self._graphs else self.analysis.outputs:
            outputs[index] = outputs[index].clone()
        return outputs

    def caches_among(self, results: Sequence[Any]) -> list[Any]:
        """Of what the dense program returns the caches, in the order in which the sparse ones take them."""
        nodes = self.analysis.output_nodes
        left = iter(results[len(nodes) :])
        return [results[nodes.index(s.node)] if s.is_output else next(left) for s in self.sparse.splices] + list(left)

    def bare(self, values: Sequence[Any]) -> list[Any]:
        """Runs the model as it is and keeps nothing: where there is no memory for caches, nor for a CUDA graph."""
        inputs = self.tensors(values)
        return list(self.program("bare", inputs)(*inputs))

    def run_sparse(self, values: Sequence[Any], rows: Tensor, slots: dict) -> list[Any]:
        """Runs the sparse program on ``rows`` (int64 [B, A]); the caches in ``slots`` are updated in place."""
        caches, slopes = slots["caches"], slots.get(SLOPES)
        if slopes is not None:
            slopes.go_on(caches)
        others = iter(self.run(rows.shape[1], values, [rows, *caches], slots))
        outputs: list[Any] = []
        for cache in self._cached_outputs:
            output = next(others) if cache is None else caches[cache]
            outputs.append(output.clone() if cache is not None or self._graphs else output)
        return outputs

    def cached_noise(self, slots: dict) -> Tensor | None:
        """The noise of a branch's last call, which :attr:`noise_view` views; its next call overwrites it.

        None where it has been released while the call ran.
        """
        caches = slots.get("caches")
        return None if caches is None else caches[self._noise_cache]

    @cached_property
    def _noise_cache(self) -> int:
        cache = self._cached_outputs[self.noise]
        assert cache is not None
        return cache

    @cached_property
    def _cached_outputs(self) -> list[int | None]:
        """For each output the cache that holds it, or None."""
        nodes = enumerate(self.analysis.output_nodes)
        return [self.sparse.splice(node) if index in self.analysis.outputs else None for index, node in nodes]

    @cached_property
    def _returned(self) -> list[int]:
        """The caches of what the model returns."""
        return [index for index, splice in enumerate(self.sparse.splices) if splice.is_output]

    def run(
        self, active: int | str, values: Sequence[Any], state: list[Tensor], slots: dict, spare: dict | None = None
    ) -> Sequence[Any]:
        """Runs one program, as a CUDA graph where there are any.

        Args:
            active: ``"dense"``, or the number of active rows per sample.
            state: what the sparse program takes besides: rows, then caches.
            spare: what a finished generation kept; its memory may be taken over.

        Returns:
            what the program returns.
        """
        inputs = [*self.tensors(values), *state]
        program = self.program(active, inputs)
        if self.hosted:
            with kernels.carrying(self._device, [state[1 + index] for index in self.hosted if state]):
                return program(*inputs)
        return program(*inputs) if self._graphs is None else self._graphs.run(active, program, inputs, slots, spare)

    @property
    def graph_slots(self) -> int:
        """How many branches' worth of static caches the CUDA graphs hold."""
        return 0 if self._graphs is None else self._graphs.slots

    def release_graphs(self) -> None:
        """Drops the CUDA graphs that no running generation holds."""
        if self._graphs is not None:
            self._graphs.release()

    def _program_graphs(self, values: Sequence[Any]) -> ProgramGraphs | None:
        if self.hosted:
            if self._device.type == DEVICE:
                warn_without("caches are in the host's memory")
            return None
        given = [given.weight for given, value in zip(self.inputs, values, strict=True) if isinstance(value, Tensor)]
        return ProgramGraphs.of(self.captured.graph, self.tensors(values), given + [True] * len(self.constants))

    def tensors(self, values: Sequence[Any]) -> list[Tensor]:
        tensors = values if self._only_tensors else compress(values, self._is_tensor)
        return [*tensors, *self.constants]

    def program(self, active: int | str, inputs: Sequence[Any]) -> Compiled:
        program = self._programs.get(active)
        if program is None:
            with compiling():
                program = self._programs.get(active)
                if program is None:
                    program = self._compile(active, inputs)
                    # another process of a group would wait for what is done twice here
                    if self.config.inner_backend != "eager" and self.analysis.frame.group is None:
                        program = Program(program, lambda: self.plain(active), self.config)
                    self._programs[active] = program
        return program

    def _compile(self, active: int | str, inputs: Sequence[Any]) -> Compiled:
        """Compiles a program, its repeated blocks once; block by block where the inner compiler refuses that."""
        if self.config.inner_backend == "inductor":
            try:
                return compile_inner(self.built(active), inputs, self.config)
            except SpecViolation:
                raise
            except Exception as error:
                fell_back("blocks compiled one by one", error)
        return compile_or_run(lambda: self.build(active, outline_blocks=False), inputs, self.config)

    def built(self, active: int | str) -> fx.GraphModule:
        """What :meth:`build` gives; what another process has built of the same program, if it was loaded."""
        if self.name is None or self.chosen is not None:
            return self.build(active)
        name = f"{self.name} {active}"
        content = shelf.get(name)
        if content is None:
            built = self.build(active)
            try:
                content = pickled(written(built, ("stack_trace",)))
            except Unkeepable:
                return built
            shelf.put(name, content)
        # read in any case: Inductor's cache asks for the order of a module's attributes, too
        return read(unpickled(content))

    def build(self, active: int | str, *, outline_blocks: bool = True) -> fx.GraphModule:
        """The program's graph as the inner compiler gets it: ``"dense"``, ``"bare"`` (dense, and leaves no caches), or the
        sparse one for ``active`` rows.

        Kernels that have yet to be timed are compiled side by side before the first of them is.
        """
        with torch.no_grad():
            if self.chosen is None:
                with postponed() as noted:
                    program = self.prepared(active, outline_blocks)
                if not noted:
                    return program
                build(noted)
            return self.prepared(active, outline_blocks)

    def plain(self, active: int | str) -> fx.GraphModule:
        """The program's graph without kernels of ours."""
        with compiling(), torch.no_grad():
            return self.prepared(active, outline_blocks=False, fused=False)

    def prepared(self, active: int | str, outline_blocks: bool, fused: bool = True) -> fx.GraphModule:
        few_rows, hosted = partial(self._choose, kernels.many_pays) if fused else None, self.hosted
        if active in ("dense", "bare"):
            program = self.dense_graph() if active == "dense" else dense_program(self.analysis, SparsePlan())
            fusion, hosted = None, []
        else:
            assert isinstance(active, int)
            program = self.sparse_graph(active)
            fusion = self.fusion if fused and self.analysis.latent.meta["val"].is_cuda else None
        return prepare(program, fusion=fusion, few_rows=few_rows, outline_blocks=outline_blocks, hosted=hosted)

    @cached_property
    def fusion(self) -> Fusion:
        """Fusion sites are found on a program of few rows: it has the same ones as any other, and is quicker to run."""
        tokens, samples = self.analysis.frame.tokens, self.analysis.frame.samples
        few = next((rows for rows in PROBED_ROWS if rows * samples <= PROBED), PROBED_ROWS[-1])
        probe = self.sparse_graph(min(tokens, few))
        choices = kernels.pays, kernels.gather_pays, kernels.attention_pays, kernels.pays_grouped
        pays, gather, attention, grouped = (partial(self._choose, choice) for choice in choices)
        return Fusion(tokens, probe.graph, pays, gather_pays=gather, attention_pays=attention, grouped=grouped)

    def _choose(self, choice: Callable[..., bool], *ops: Any) -> bool:
        return choice(*ops) if self.chosen is None else self.chosen(choice, *ops)
