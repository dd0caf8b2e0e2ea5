"""`explain`: what the compiler makes of a transformer, and why."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ras_compile._torch import compiled_call, original
from ras_compile.capture.inputs import check_timestep
from ras_compile.config import RASConfig, is_whole
from ras_compile.errors import ConfigError, SpecViolation, UnsupportedGraph, UnusableInput
from ras_compile.execute.compiling import compiling
from ras_compile.kernels.fallbacks import Fallback
from ras_compile.notices import slower
from ras_compile.passes.algebra.layout import Concat, Layout
from ras_compile.passes.analysis.cost import Cost
from ras_compile.passes.analysis.splices import Splice
from ras_compile.passes.fusion.group import launches
from ras_compile.passes.rules.registry import operands, source_line
from ras_compile.plans.plan import Plan
from ras_compile.preview import first_call, named, plan_of
from ras_compile.sampling.models import transformers_of
from ras_compile.sampling.schedule import Schedule, at_speedup

# Steps of a run, where nobody says how many.
_STEPS = 28
# What tokens that are skipped return, by the option `noise_reuse`.
_REUSED = {
    "hold": "keep the noise that they had",
    "linear": "take the line of their last two noises",
    "forecast": "take a forecast from their last two noises",
    "x0": "keep the clean sample that they had",
}


@dataclass(frozen=True)
class SplicePoint:
    """One splice: a value that is made whole from its cache and the active rows.

    Attributes:
        value: name of the value in the captured graph.
        layout: its dimensions in factors; ``d1`` is a part of the latent's dimension 1, ``|`` parts segments.
        reason: the op that needs the whole value, or that it is the output.
        source: the user's source line, where known.
        shape: its shape.
        bytes: size of its cache.
    """

    value: str
    layout: str
    reason: str
    source: str | None
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """What the compiler makes of one call of a transformer. ``str()`` is a table.

    Attributes:
        supported: whether the call can be sampled region-adaptively.
        reason: why not, in one sentence; empty where it can.
        latent: the forward argument that is the latent.
        region: the latent's dimensions in factors.
        grid: extent of the token grid.
        shared_rows: whether all pictures of a call have the same active tokens, because the model takes its batch apart.
        tokens: N, tokens of one sample.
        splices: every splice, the output's last.
        gathers: dense values of which a sparse step takes the active rows, with the user's source line.
        context: lengths of the segments that stand beside the region in joint sequences.
        cost: FLOPs and bytes, those of a sparse step as sympy expressions in ``A``.
        fused: scatter-GEMMs (`linear -> splice` as one kernel) in a sparse step on the inputs' device.
        config: the options.
        fallbacks: what this process has done in a slower way so far, because the faster one failed (this model or another;
            models that were refused are left out).
        num_steps: steps of the run of which :attr:`words` speaks.
    """

    supported: bool
    reason: str = ""
    latent: str = ""
    region: str = ""
    grid: tuple[int, ...] = ()
    shared_rows: bool = False
    tokens: int = 0
    splices: tuple[SplicePoint, ...] = ()
    gathers: tuple[tuple[str, str | None], ...] = ()
    context: tuple[int, ...] = ()
    cost: Cost | None = None
    fused: int = 0
    config: RASConfig = RASConfig()
    fallbacks: tuple[Fallback, ...] = field(default_factory=slower)
    num_steps: int = _STEPS

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of one guidance branch."""
        return self.cost.cache_bytes if self.cost else 0

    def dense_steps(self, num_steps: int) -> int:
        """Dense steps among ``num_steps`` under the schedule of ``config``."""
        return Schedule(self.config).dense_steps(num_steps)

    def speedup(self, sample_ratio: float | None = None, num_steps: int = 28) -> float:
        """Predicted speed-up by FLOPs of a whole run over dense steps alone, under the schedule of ``config``.

        Args:
            sample_ratio: share of tokens in sparse steps, in (0, 1]; by default that of ``config``.
            num_steps: steps of the run.

        Raises:
            UnsupportedGraph: the call is not supported.
            ConfigError: another ratio, no step, or a `speedup` in ``config`` that is out of reach.
        """
        changed = {} if sample_ratio is None else {"sample_ratio": sample_ratio, "tolerance": None}
        config = self._solved(num_steps, **changed)
        return self._price.speedup(config.ratio, num_steps, Schedule(config).dense_steps(num_steps))

    def ratio_for(self, speedup: float, num_steps: int = 28) -> float:
        """The sample ratio that gives ``speedup`` (by FLOPs) under the schedule of ``config``.

        Where the option `speedup` would space the dense steps further apart, it is the ratio that goes with those.

        Args:
            speedup: of a whole run over dense steps alone, at least 1.
            num_steps: steps of the run.

        Raises:
            UnsupportedGraph: the call is not supported.
            ConfigError: out of reach, and the text gives the limits; or no step.
        """
        return self._solved(num_steps, speedup=speedup, tolerance=None).ratio

    def budget(self, num_steps: int = 28) -> tuple[int, ...]:
        """How many of the tokens each step of a run computes under ``config``; all of them where a step is dense.

        `ratio_schedule="sigmas"` needs the scheduler of a run, and counts as "ends" here.

        Args:
            num_steps: steps of the run.

        Raises:
            UnsupportedGraph: the call is not supported.
            ConfigError: no step, a `speedup` in ``config`` that is out of reach, or a `tolerance`, which plans nothing.
        """
        schedule = Schedule(self._solved(num_steps))
        return tuple(
            self.tokens if schedule.kind(step, num_steps) == "dense" else schedule.active(step, self.tokens, num_steps)
            for step in range(num_steps)
        )

    def seconds(
        self, ranks: int = 1, *, tflops: float, gigabytes: float, ratio: float | None = None
    ) -> tuple[float, float]:
        """Predicted seconds of a dense and of a sparse step that several processes share: docs/across.md has the formula.

        Args:
            ranks: how many processes share the tokens by Ulysses' way; of a call that one process makes alone.
            tflops: 10^12 FLOPs that a device does in a second, in these layers.
            gigabytes: 10^9 bytes that a process sends to the others in a second.
            ratio: share of tokens in the sparse step; by default that of ``config``.

        Raises:
            UnsupportedGraph: the call is not supported.
            ConfigError: a number that is not above 0, or a ratio above 1.
        """
        ratio = self.config.ratio if ratio is None else ratio
        for name, value, most in (
            ("ranks", ranks, math.inf), ("tflops", tflops, math.inf), ("gigabytes", gigabytes, math.inf), ("ratio", ratio, 1),
        ):  # fmt: skip
            if not 0 < value <= most:
                upper = "" if most == math.inf else f" and at most {most}"
                raise ConfigError(f"{name}={value!r} is not allowed; it takes a number above 0{upper}.")
        active = max(1, round(ratio * self.tokens))
        return self._price.seconds(active, ranks, 1e12 * tflops, 1e9 * gigabytes)

    def _planned(self, num_steps: int) -> str:
        """The budget in words."""
        try:
            counts = Counter(self.budget(num_steps))
        except ConfigError as error:
            return str(error)
        whole = counts.pop(self.tokens, 0)
        sparse = ", ".join(f"{steps} of {tokens} tokens" for tokens, steps in sorted(counts.items(), reverse=True))
        faster = f", {self.speedup(num_steps=num_steps):.2f}x by FLOPs" if sparse else ""
        return f"{num_steps} steps: {whole} dense" + (f", {sparse}" if sparse else "") + faster

    @property
    def _price(self) -> Cost:
        """The cost of what is supported."""
        if self.cost is None:
            raise UnsupportedGraph(self.reason)
        return self.cost

    def _solved(self, num_steps: Any, **changed: Any) -> RASConfig:
        """The config, with other runtime options, and with the ratio that gives its `speedup` in so many steps."""
        price, config = self._price, self.config.with_runtime(**changed)
        if not is_whole(num_steps) or num_steps < 1:
            raise ConfigError(f"num_steps={num_steps!r} is not allowed; it takes a whole number of at least 1.")
        if config.tolerance is not None:
            raise ConfigError("option tolerance chooses the tokens of each step as it comes, so no run can be planned.")
        return at_speedup(config, lambda: price, num_steps)

    def __str__(self) -> str:
        slower = [f"fell back {fallback}" for fallback in self.fallbacks]
        if self.cost is None:
            return "\n".join([f"not supported: {self.reason}", *slower, "", self.words])
        lines = [
            f"latent    {self.latent} {self.region}",
            f"region    {self.tokens} tokens, grid {' x '.join(map(str, self.grid))}"
            + (", the same active ones in all pictures of a call: the model takes its batch apart" * self.shared_rows),
            f"context   {' | '.join(f'{length} tokens' for length in self.context) or 'none in joint sequences'}",
            f"FLOPs     dense {self.cost.dense_flops:.4g}, sparse {self.cost.sparse_flops}",
            f"caches    {_mebibytes(self.cache_bytes)} a branch{self.config.caches_are}, {len(self.splices)} splices",
            *self._sent(),
            f"kernels   {self.fused} splices as scatter-GEMMs",
            "predicted "
            + ", ".join(f"{r:.1%} of tokens: {self.speedup(r, self.num_steps):.2f}x" for r in (0.5, 0.25, 0.125)),
            f"          (by FLOPs, {self.num_steps} steps)",
            f"planned   {self._planned(self.num_steps)}",
            *slower,
            "",
            f"{'splice':<24} {'needed by':<44} layout",
        ]
        lines += [f"{point.value:<24} {point.reason:<44} {point.layout}" for point in self.splices]
        lines += ["", f"{'gather':<24} source"]
        lines += [f"{name:<24} {source or ''}" for name, source in self.gathers]
        return "\n".join([*lines, "", self.words])

    def _sent(self) -> list[str]:
        """What a process sends to the others, where the model runs over several."""
        if self.cost is None or not self.cost.dense_sent:
            return []
        return [f"sent      dense {self.cost.dense_sent:,} bytes a process, sparse {self.cost.sparse_sent}"]

    @property
    def words(self) -> str:
        """In plain words: what will be skipped, what that saves, and what it costs in memory."""
        if self.cost is None:
            return f"Nothing is skipped: every step computes the whole picture, because {self.reason}."
        steps = self.num_steps
        if self.dense_steps(steps) == steps:
            return f"Nothing is skipped: {'; '.join(Schedule(self.config).none_sparse(steps))}."
        if self.config.tolerance is not None:
            return (
                "How much is skipped is decided in each step, by the tolerance; handle.summary() says how much it was."
            )
        config = self._solved(steps)
        dense, ratio = Schedule(config).dense_steps(steps), config.ratio
        return (
            f"In a run of {steps} steps, {dense} compute the whole picture, and {steps - dense} compute {100 * ratio:.3g} % of its "
            f"{self.tokens:,} tokens on average and skip the others, which {_REUSED[config.noise_reuse]}. The transformer has "
            f"{self.speedup(num_steps=steps):.2f} times less to compute than with {steps} dense steps; how much time that saves "
            "depends on the machine, and handle.summary() measures it. The caches take "
            f"{_mebibytes(self.cache_bytes)} of memory{self.config.caches_are}, once more for each guidance branch that is "
            "a call of its own."
        )


def explain(model: Any, *args: Any, options: dict[str, Any] | None = None, **inputs: Any) -> Explanation:
    """Says what region-adaptive sampling makes of one call, and ends in plain words. No step is computed.

    ::

        print(ras_compile.explain(pipe, prompt="a red apple", height=1024, width=1024))

    Args:
        model: a transformer, compiled or not, or a pipeline, which is called up to its first call of a transformer: its
            text encoders run, and a generator among the inputs is drawn from.
        options: options as for the backend; see :class:`RASConfig`. None: those of the handle, where `attach` has compiled
            the model, and else the defaults.
        *args, **inputs: the arguments of one call.

    Raises:
        ConfigError: a bad option, or a pipeline that calls no transformer.
        TypeError: neither a module nor a pipeline, or arguments that its forward does not take.
    """
    config = RASConfig.from_options(options)
    steps, given = _STEPS, model
    if not isinstance(model, nn.Module):
        found = transformers_of(model)
        if not found or not callable(model):
            raise TypeError(
                "explain takes a transformer and the arguments of one call of it, or a pipeline that has a transformer, not "
                f"{type(model).__name__}{'; give its .transformer' if found else ''}."
            )
        inputs = named(model, args, inputs) if args else inputs
        steps = _steps_of(model, inputs)
        model, inputs = first_call(model, found, inputs)
    transformer: nn.Module = model
    module: nn.Module = original(transformer)
    attached = getattr(compiled_call(module), "config", None)
    if options is None and isinstance(attached, RASConfig):
        config = attached
    inputs = named(module.forward, args, inputs) if args and transformer is given else inputs
    check_timestep(config.timestep, type(module))
    try:
        plan, described, values = plan_of(transformer, inputs, config)
    except (UnsupportedGraph, SpecViolation, UnusableInput) as error:
        return Explanation(False, str(error), config=config, num_steps=steps)
    analysis = plan.analysis
    with compiling():
        program = plan.build(max(1, analysis.frame.tokens // 4), outline_blocks=False)
    paths = [given.path for given, value in zip(described, values, strict=True) if isinstance(value, torch.Tensor)]
    names = dict(zip(analysis.graph.find_nodes(op="placeholder"), paths, strict=False))
    return Explanation(
        True,
        latent=described[plan.latent].path,
        region=str(analysis.frame.layout()),
        grid=analysis.frame.grid,
        shared_rows=analysis.frame.shared_rows,
        tokens=analysis.frame.tokens,
        splices=points_of(plan),
        gathers=tuple((names.get(node, node.name), source_line(node)) for node in plan.sparse.gathers),
        context=_context(plan),
        cost=plan.cost,
        fused=launches(program.graph),
        config=config,
        num_steps=steps,
    )


def _steps_of(pipe: Any, inputs: dict[str, Any]) -> int:
    """Steps of a call of a pipeline: those asked for, else the pipeline's own number."""
    known = inspect.signature(pipe).parameters.get("num_inference_steps")
    steps = inputs.get("num_inference_steps", known.default if known else None)
    return int(steps) if steps is not None and is_whole(steps) and steps > 0 else _STEPS


def points_of(plan: Plan) -> tuple[SplicePoint, ...]:
    """Every splice of a plan, the output's last."""
    return tuple(_point(plan, splice) for splice in plan.sparse.splices)


def _point(plan: Plan, splice: Splice) -> SplicePoint:
    value = splice.node.meta["val"]
    steps = plan.analysis.steps
    mixing = [u for u in splice.node.users if u in steps and splice.node in operands(u)]
    reason = "the output: noise of the other tokens" if splice.is_output else str(mixing[-1].target if mixing else "")
    return SplicePoint(
        splice.node.name,
        str(splice.layout),
        reason,
        source_line(splice.node),
        tuple(value.shape),
        value.numel() * value.element_size(),
    )


def _mebibytes(count: int) -> str:
    size = count / 2**20
    return f"{size:,.1f} MiB" if size >= 1 else f"{size:.2g} MiB"


def _context(plan: Plan) -> tuple[int, ...]:
    counts = plan.analysis.frame.counts_tokens
    for layout in plan.analysis.layouts.values():
        if isinstance(layout, Layout):
            for factor in (factor for dim in layout.dims for factor in dim if isinstance(factor, Concat)):
                plain = [s for s in factor.segments if not any(counts(getattr(axis, "atom", None)) for axis in s)]
                return tuple(Concat((segment,)).size for segment in plain)
    return ()
