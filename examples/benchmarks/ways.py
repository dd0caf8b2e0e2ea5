"""Ways of sampling, as data: what is set up before a run, and taken down after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import hooks
from sizes import WARMUP, Workload
from torch import nn

import ras_compile
from ras_compile.passes.analysis.cost import Cost, cost
from ras_compile.sampling.locate import owner
from ras_compile.sampling.registry import states_of

__all__ = ["METHODS", "NotAvailable", "Setup", "Way", "set_up", "ways_of"]

# Kinds of torch.compile, by the name of the row; "compile" is what x_compiled refers to.
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
# diffusers' own caches, at their defaults where they have some.
CACHES: dict[str, Callable[[Workload], Any]] = {
    "first-block-cache": lambda work: hooks.FirstBlockCacheConfig(),
    "taylorseer": lambda work: hooks.TaylorSeerCacheConfig(),
    # ratios depend on the checkpoint; ones (no change from step to step) skip as often as the other options allow
    "magcache": lambda work: hooks.MagCacheConfig(mag_ratios=[1.0] * work.steps, num_inference_steps=work.steps),
}
METHODS = ("eager", *COMPILED, "ras", "fewer-steps", *CACHES, "cache-dit")


class NotAvailable(Exception):
    """A way that this model or this machine has not; the text is the row's reason."""


@dataclass(frozen=True)
class Way:
    """One row: a method, with ratio (or preset) and context of RAS (of the RAS row with the same cost for "fewer-steps")."""

    method: str
    sample_ratio: float | str | None = None
    context: str | None = None


@dataclass
class Setup:
    """A way that is ready to run.

    Args:
        scheduler: the scheduler to run with.
        compiled: what `transformer(...)` calls in place of forward, or None for eager.
        close: takes everything down.
        kinds: the kinds ("dense", "sparse") and active rows of the last run, by step.
        between: called after each run.
        cost: what the last run's steps cost by the cost model; of RAS only.
        handle: of `ras_compile.attach`.
        resets: its error resets in a whole run.
        pipe: what it is attached to; kept here, since a handle holds it weakly.
        exclusive: the transformer's modules are changed, so that no other way can run until this one is closed.
        note: more keys of the row.
    """

    scheduler: Any
    compiled: Callable | None = None
    close: Callable[[], None] = lambda: None
    kinds: Callable[[], dict[int, tuple[str, int]]] = dict
    between: Callable[[], None] = lambda: None
    cost: Callable[[], Cost] | None = None
    handle: Any = None
    resets: tuple[int, ...] = ()
    pipe: Any = None
    exclusive: bool = False
    note: dict[str, Any] = field(default_factory=dict)


def ways_of(methods: Sequence[str], ratios: Sequence[float | str], contexts: Sequence[str]) -> list[Way]:
    """The rows to measure, in order; "fewer-steps" stands behind every row of RAS.

    Args:
        methods: some of `METHODS`.
        ratios: of RAS; a preset's name is a row with that preset's options.
        contexts: of RAS.

    Raises:
        ValueError: an unknown method.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    found: list[Way] = []
    for method in sorted(set(methods), key=METHODS.index):
        if method in ("ras", "fewer-steps"):
            found += [Way(method, ratio, context) for context in contexts for ratio in ratios]
        else:
            found.append(Way(method))
    return found


def set_up(work: Workload, way: Way, inner_backend: str, options: dict[str, Any]) -> Setup:
    """Makes a way ready; the transformer is left uncompiled, `Setup.compiled` is what a run puts in.

    Args:
        work: the workload.
        way: the way; not "fewer-steps", which runs what "compile" has set up.
        inner_backend: "inductor", or "eager" to try things out.
        options: further options of RAS.

    Raises:
        NotAvailable: the model or the machine has no such thing.
        ras_compile.ConfigError: an option of RAS that is not allowed.
    """
    transformer = work.transformer
    transformer._compiled_call_impl = None
    torch._dynamo.config.recompile_limit = 64  # several ways share the code object of forward
    if way.method == "eager":
        return Setup(work.scheduler())
    if way.method in COMPILED:
        return Setup(work.scheduler(), _compile(transformer, inner_backend, **COMPILED[way.method]))
    if way.method == "ras":
        return _ras(work, way, inner_backend, options)
    if way.method == "cache-dit":
        return _cache_dit(work, inner_backend)
    return _cache(work, CACHES[way.method](work), inner_backend)


def _compile(transformer: nn.Module, inner_backend: str, **options: Any) -> Callable:
    transformer.compile(backend=inner_backend, **options if inner_backend == "inductor" else {})
    compiled, transformer._compiled_call_impl = transformer._compiled_call_impl, None
    assert compiled is not None
    return compiled


class Pipe:
    """As much of a pipeline as `ras_compile.attach` looks at."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler = transformer, scheduler


def _ras(work: Workload, way: Way, inner_backend: str, options: dict[str, Any]) -> Setup:
    scheduler = work.scheduler()
    pipe = Pipe(work.transformer, scheduler)
    chosen: dict[str, Any] = dict(context=way.context, unsupported="error", inner_backend=inner_backend)
    if isinstance(way.sample_ratio, str):
        chosen |= dict(preset=way.sample_ratio)
    else:
        chosen |= dict(
            sample_ratio=way.sample_ratio, warmup_steps=WARMUP, reset_steps=work.resets,
            # as many tokens in each sparse step, so that a row has one ratio; the metric hardly counts in the time
            metric="std", ratio_schedule="constant", noise_reuse="hold",
        )  # fmt: skip
    handle = ras_compile.attach(pipe, **chosen | options)
    compiled, work.transformer._compiled_call_impl = work.transformer._compiled_call_impl, None

    def kinds() -> dict[int, tuple[str, int]]:
        return {record.step: (record.kind, record.active) for record in ras_compile.trace(handle)}

    resets = handle.config.reset_steps or ()
    return Setup(
        scheduler, compiled, handle.detach, kinds, cost=lambda: _cost(work), handle=handle, resets=resets, pipe=pipe
    )


def _cost(work: Workload) -> Cost:
    """The price of the plan that ran last; `ras_compile.explain` would make the plan anew, which takes its time."""
    states = [state for state in states_of(work.transformer.parameters()) if state.records]
    last = max(states, key=lambda state: state.records[-1].serial)
    plan = owner().runs[last].branches.known[0].graph()
    return cost(plan.analysis, plan.sparse)


def _cache(work: Workload, config: Any, inner_backend: str) -> Setup:
    """One of diffusers' caches, compiled where that runs, else eager (the row says which)."""
    transformer = work.transformer
    if not hasattr(transformer, "enable_cache"):
        raise NotAvailable(f"diffusers: {type(transformer).__name__} has no enable_cache")
    transformer.enable_cache(config)

    def between() -> None:
        transformer._reset_stateful_cache()

    compiled = _compile(transformer, inner_backend)
    return Setup(work.scheduler(), compiled, transformer.disable_cache, between=between, exclusive=True)


def _cache_dit(work: Workload, inner_backend: str) -> Setup:
    """cache-dit at its defaults."""
    try:
        import cache_dit
    except Exception as error:  # it reads many internals of diffusers at import
        raise NotAvailable(f"cache-dit: {type(error).__name__}: {error}") from None
    transformer = work.transformer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache_dit.enable_cache(transformer)
    compiled = _compile(transformer, inner_backend)
    return Setup(
        work.scheduler(), compiled, lambda: cache_dit.disable_cache(transformer), exclusive=True,
        between=lambda: cache_dit.refresh_context(transformer, num_inference_steps=work.steps),
        note=dict(cache_dit=cache_dit.__version__),
    )  # fmt: skip
