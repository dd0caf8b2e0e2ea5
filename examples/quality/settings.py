"""The settings of the tables: which ways of sampling stand beside which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rules import Heterogeneous, Unaged
from torch import Tensor

from ras_compile.config import RASConfig, fitting
from ras_compile.sampling.schedule import Schedule
from ras_compile.sampling.selection import SelectionInfo

STEPS = (3, 4, 5, 7, 10, 14, 20, 28)  # of the dense baselines
REFERENCE_STEPS, EXACT_STEPS = 28, 200
WARMUP = RASConfig().warmup_steps
AUTHORS_SCALE = 0.1  # what microsoft/RAS always uses
GUIDANCE = 4.0
# What tables A and B and that of the options measure: the paper's metric, with what fits it. Rows may have others of these.
PAPERS_METRIC = dict(metric="std", reset_interval=8, noise_reuse="hold", ratio_schedule="constant")


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        method: "dense", "RAS", or a name in `others.METHODS`.
        steps: steps of the scheduler.
        sampler: "euler", "even", "unipc" or "dpm++" (`sampler.scheduler_of`).
        options: of `ras_compile.attach`, where the method is RAS, or of the other method.
        variant: what is unlike the default, in words.
        default: key of the row that this one is compared with picture by picture, or "".
    """

    method: str
    steps: int
    sampler: str = "euler"
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = "default"
    default: str = ""

    @property
    def ratio(self) -> float:
        """Share of the tokens in a sparse step."""
        return RASConfig.from_options(self.options).ratio if self.method == "RAS" else 1.0

    @property
    def key(self) -> str:
        """Names the row."""
        share = f" {self.ratio:.1%}" if self.method == "RAS" else ""
        sampler = f" {self.sampler}" if self.sampler != "euler" else ""
        variant = f", {self.variant}" if self.variant != "default" else ""
        return f"{self.method}{share}{sampler}, {self.steps} steps{variant}"


def ras(steps: int, ratio: float, variant: str = "default", default: str = "", **options: Any) -> Setting:
    """Region-adaptive sampling, by the paper's metric where nothing else is said; dense for the first four steps."""
    given = {**PAPERS_METRIC, "sample_ratio": ratio, **options}
    return Setting("RAS", steps, options=given, variant=variant, default=default)


def table_a() -> list[Setting]:
    """Quality against cost: fewer steps, better solvers, and region-adaptive sampling (paper, table 2)."""
    dense = [Setting("dense", steps) for steps in reversed(STEPS)]
    even = [Setting("dense", steps, "even") for steps in STEPS if steps <= 14]
    solvers = [Setting("dense", steps, name) for name in ("unipc", "dpm++") for steps in STEPS if 5 <= steps <= 14]
    adaptive = []
    for ratio in (0.25, 0.5, 0.125, 0.75):
        adaptive += [ras(steps, ratio) for steps in (28, 20, 14, 10, 7)]
        if ratio in (0.25, 0.5):
            adaptive += [replace(ras(steps, ratio), sampler="even") for steps in (14, 10)]
    return dense + even + adaptive + solvers


def table_b() -> list[Setting]:
    """What each part of the method is worth (paper, table 4): every part taken away alone."""
    rows, whole, shares = [], [], []
    for steps in (28, 10, 14):
        for ratio in (0.125, 0.25):
            default = ras(steps, ratio)

            def without(variant: str, default: Setting = default, **options: Any) -> Setting:
                return ras(default.steps, default.ratio, variant, default.key, **options)

            rows += [
                default,
                without("random tokens", metric="random"),
                without("no drop count", starvation_scale=0.0, max_absence=10**6),
            ]
            if resets(steps):  # a short run has none by default
                rows.append(without("no error reset", reset_interval=None))
            sparse = steps - WARMUP
            rows += [
                without(f"one reset, {name}", reset_steps=(WARMUP + round(share * sparse),))
                for name, share in (("early", 0.25), ("middle", 0.5), ("late", 0.75))
            ]
            whole.append(without("no K/V cache", kv_cache=False))
            if steps != 14:
                shares.append(without("falling ratio", ratio_schedule="linear"))
    # these compile programs of their own: one more for each mask of keys, four more for each ratio that falls
    return rows + whole + shares


def resets(steps: int) -> list[int]:
    """Dense steps after the warm-up of those runs."""
    interval = RASConfig(metric="std").reset_interval or steps
    return list(range(WARMUP + interval, steps, interval))


def table_c() -> list[Setting]:
    """What each part of the default is worth, taken away alone, at three points of the frontier."""
    rows, programs = [], []
    for steps in (14, 20, 28):
        default = Setting("RAS", steps, "dpm++", dict(metric="drift", **fitting("drift")))

        def without(variant: str, default: Setting = default, **options: Any) -> Setting:
            return replace(default, options={**default.options, **options}, variant=variant, default=default.key)

        rows += [
            default,
            without("std in place of drift", metric="std"),
            without("random tokens", metric="random"),
            without("no age", metric=Unaged(), starvation_scale=0.0),
            without("flat budget", ratio_schedule="constant"),
            without("noise held", noise_reuse="hold"),
            without("no dense steps after the first", reset_interval=None),
        ]
        programs.append(without("no K/V cache", kv_cache=False))
    return rows + programs  # the last ones compile programs of their own


def table_options() -> list[Setting]:
    """Why the options of the paper's metric are what they are, and other ways to save the same time; 28 steps at 25 %."""
    default = ras(28, 0.25)

    def other(variant: str, **options: Any) -> Setting:
        return ras(28, 0.25, variant, default.key, **options)

    tried = [
        *(other(f"focus {focus}", focus=focus) for focus in ("low", 0.5)),
        other("metric l2norm", metric="l2norm"),
        other("metric of the guided noise", metric=guided),
        other("metric of the prompt's branch", metric=prompted),
        other("one selection for all pictures", metric=shared),
        *(other(f"starvation scale {s}", starvation_scale=s) for s in (0.0, AUTHORS_SCALE, 0.5, 1.0, 4.0, 8.0)),
        # at the default the drop count decides most; here the metric does
        other(f"focus low, starvation scale {AUTHORS_SCALE}", focus="low", starvation_scale=AUTHORS_SCALE),
        *(other(f"reset every {interval} steps", reset_interval=interval) for interval in (4, 6, 12)),
        other("no error reset", reset_interval=None),
        *(other(f"{steps} dense steps first", warmup_steps=steps) for steps in (2, 6)),
    ]
    faster = [Setting("dense", steps, name) for name in ("euler", "even") for steps in (10, 14, 18, 22)]
    weak = f"starvation scale {AUTHORS_SCALE}"
    frozen = dict(context="frozen", starvation_scale=AUTHORS_SCALE)
    programs = [
        ras(28, 0.25, f"frozen context, {weak}", f"{default.key}, {weak}", **frozen),
        other("noise goes on linearly", noise_reuse="linear"),
    ]
    layers = [
        Setting(method, 28, options=options, variant=variant, default=default.key)
        for method, options, variant in (
            *(("attention reuse", dict(warmup=WARMUP, every=k), f"computed every {k} steps") for k in (2, 4, 8)),
            *(("TaylorSeer", dict(interval=k, order=1), f"computed every {k} steps") for k in (2, 3, 5)),
            *(("FirstBlockCache", dict(threshold=t), f"threshold {t}") for t in (0.1, 0.2, 0.4)),
        )
    ]
    return [default, *tried, *faster, *programs, *layers]


def frontier(rows: str = "points,caches") -> list[Setting]:
    """What a picture costs and how near it comes to the exact one: the rows of groups of `FRONTIER`, each row once.

    Args:
        rows: names of groups, with commas between them; "all" for all.

    Raises:
        ValueError: there is no such group.
    """
    names = list(FRONTIER) if rows == "all" else rows.split(",")
    for name in names:
        if name not in FRONTIER:
            raise ValueError(f"{name!r} is no group of rows: take {', '.join(FRONTIER)} or all")
    return list({setting.key: setting for name in names for setting in FRONTIER[name]()}.values())


def points() -> list[Setting]:
    """Region-adaptive rows from 0.9 to 3.3 ms (of the first model, on an H200), and plain steps of about the same times."""
    adaptive = [
        preset("fast", 14, "euler"),
        *(preset("quality", steps) for steps in (14, 17, 20, 24, 28, 31, 36, 40, 43)),
        *(preset("balanced", steps) for steps in (14, 20, 28)),
    ]
    plain = (("dpm++", (7, 9, 10, 12, 14, 16, 18, 22, 25, 28)), ("even", (7, 10, 14)), ("unipc", (10, 20)))
    return adaptive + [Setting("dense", steps, sampler) for sampler, counts in plain for steps in counts]


def ratios() -> list[Setting]:
    """The presets with other shares of the tokens in sparse steps than they have by default."""
    counts: dict[float, dict[str, tuple[int, ...]]] = {
        0.22: dict(quality=(14, 19, 25, 29, 36), balanced=(20, 28)),
        0.15: dict(quality=(24, 28, 32)),
        0.05: dict(quality=(20, 28, 34), balanced=(28, 40)),
        0.02: dict(quality=(14, 20, 28, 34)),
    }
    return [
        replace(preset(name, steps), options=dict(preset=name, sample_ratio=ratio))
        for ratio, presets in counts.items()
        for name, several in presets.items()
        for steps in several
    ]


def slopes() -> list[Setting]:
    """Region-adaptive rows whose cached keys and values go on between dense steps."""

    def going_on(name: str, steps: int, variant: str = "", **options: Any) -> Setting:
        given = dict(preset=name, cache_reuse="forecast", **options)
        return Setting("RAS", steps, "dpm++", given, f"preset {name}{variant}, caches go on")

    return [
        *(going_on("quality", steps) for steps in (12, 14, 17, 20, 22, 25, 29, 36)),
        *(going_on("balanced", steps) for steps in (14, 20, 24, 28)),
        *(going_on("quality", steps, ", half the tokens", sample_ratio=0.11) for steps in (20, 28)),
    ]


def caches() -> list[Setting]:
    """Whole layers reused or forecast, with the solver that serves region-adaptive rows best; and another rule for tokens."""

    def other(method: str, variant: str, *counts: int, **options: Any) -> list[Setting]:
        return [Setting(method, steps, "dpm++", options, variant) for steps in counts]

    rule = dict(
        metric=Heterogeneous(), starvation_scale=0.0, reset_interval=None, noise_reuse="hold", ratio_schedule="constant"
    )
    return [
        *other("TaylorSeer", "computed every 2 steps", 28, interval=2, order=1),
        *other("TaylorSeer", "computed every 3 steps", 28, 20, interval=3, order=1),
        *other("FirstBlockCache", "threshold 0.1", 28, threshold=0.1),
        *other("FirstBlockCache", "threshold 0.2", 28, 20, threshold=0.2),
        *other("MagCache", "threshold 0.06", 28, threshold=0.06),
        *other("MagCache", "threshold 0.12", 28, 20, threshold=0.12),
        *other("Spectrum", "every second step", 28, growth=0.0),
        *other("Spectrum", "growing window", 28, 40),
        *(row for mask in ("slow", "medium", "fast") for row in other("cache-dit", f"preset {mask}", 28, mask=mask)),
        *other("RAS", "heterogeneous steps", 28, sample_ratio=0.25, **rule),
        *other("RAS", "heterogeneous steps", 20, sample_ratio=0.5, **rule),
    ]


def solvers() -> list[Setting]:
    """Plain steps from 5 to 40 of three solvers."""
    return [
        Setting("dense", steps, sampler)
        for sampler in ("even", "dpm++", "unipc")
        for steps in (5, 7, 10, 14, 20, 28, 40)
    ] + [Setting("dense", 28)]


def preset(name: str, steps: int, sampler: str = "dpm++") -> Setting:
    """Region-adaptive sampling by a preset."""
    return Setting("RAS", steps, sampler, dict(preset=name), f"preset {name}")


def presets() -> list[Setting]:
    """The presets as pipelines and users have them."""
    return [
        preset("paper", 28, "euler"), preset("fast", 14, "euler"), preset("fast", 28, "euler"),
        preset("balanced", 20), preset("balanced", 28, "euler"), preset("quality", 20), preset("quality", 28),
    ]  # fmt: skip


def sweep() -> list[Setting]:
    """The paper's choice of tokens, drift, drift with its budget at the ends of the run, forecasts and frequent dense
    steps; budgets that follow from the expected error, by step or by a tolerance.
    """
    shares = ((28, 0.125), (28, 0.25), (28, 0.5), (20, 0.25), (14, 0.25))
    chosen = [ras(steps, ratio, metric, metric=metric) for steps, ratio in shares for metric in ("std", "drift")]
    few = [
        replace(
            ras(steps, ratio, f"drift, dense every {every}", reset_interval=every, metric="drift"), sampler=sampler
        )
        for steps, ratio, every, sampler in (
            (14, 0.125, 4, "euler"), (14, 0.25, 3, "dpm++"), (20, 0.125, 3, "dpm++"),
        )
    ]  # fmt: skip
    rich = dict(metric="drift", ratio_schedule="ends")
    ends = [
        replace(
            ras(steps, at_ends(steps, every), f"drift, ends, {reuse}, dense every {every}", noise_reuse=reuse,
                reset_interval=every, **rich),
            sampler="dpm++",
        )
        for steps in (14, 20, 28, 34, 40)
        for every in (2, 3, 4)
        for reuse in (("forecast", "hold") if (steps, every) in ((20, 3), (28, 2), (28, 3)) else ("forecast",))
    ]  # fmt: skip
    by_error = [
        replace(ras(steps, 0.22, f"drift, sigmas, forecast, dense every {every}", metric="drift", reset_interval=every,
                    ratio_schedule="sigmas", noise_reuse="forecast"), sampler=sampler)
        for steps, every, sampler in ((28, 3, "euler"), (28, 3, "dpm++"), (20, 3, "dpm++"), (28, 2, "dpm++"))
    ] + [
        ras(28, 0.22, f"drift, tolerance {bound:g}, forecast", metric="drift", noise_reuse="forecast", tolerance=bound)
        for bound in (0.02, 0.05, 0.1)
    ]  # fmt: skip
    return [*chosen, *few, *ends, *by_error]


FRONTIER: dict[str, Callable[[], list[Setting]]] = {
    "points": points, "ratios": ratios, "slopes": slopes, "caches": caches, "solvers": solvers, "presets": presets,
    "sweep": sweep,
}  # fmt: skip


def at_ends(steps: int, every: int) -> float:
    """The ratio with which `ratio_schedule="ends"` computes half of the tokens at the ends of such a run."""
    half = Schedule(RASConfig(sample_ratio=0.01, ratio_schedule="ends", reset_interval=every))
    sparse = [half.ratio(step, steps) for step in range(steps) if half.kind(step, steps) == "sparse"]
    return sum(sparse) / len(sparse) * 0.5 / max(sparse)


def _spread(noise: Tensor) -> Tensor:
    """The default metric of noise [..., n, c]: [..., n]."""
    return noise.float().std(-1, correction=0)


def guided(noise: Tensor, info: SelectionInfo) -> Tensor:
    """The default metric [2 b, n] of the guided noise; `noise` [2 b, n, c] holds uncond, then cond samples."""
    uncond, cond = noise.float().chunk(2)
    return _spread(uncond + GUIDANCE * (cond - uncond)).repeat(2, 1)


def prompted(noise: Tensor, info: SelectionInfo) -> Tensor:
    """The default metric [2 b, n] of the cond samples alone."""
    return _spread(noise.chunk(2)[1]).repeat(2, 1)


def shared(noise: Tensor, info: SelectionInfo) -> Tensor:
    """The default metric [2 b, n], the mean over the batch for each sample: all compute the same tokens."""
    return _spread(noise).mean(0).expand(len(noise), -1)


TABLES = {"a": table_a, "b": table_b, "c": table_c, "options": table_options}


def settings(table: str) -> list[Setting]:
    """The settings of a table: "a", "b", "c" or "options".

    Raises:
        ValueError: no such table.
    """
    if table not in TABLES:
        raise ValueError(f"table {table!r} is not one of {', '.join(TABLES)}")
    return TABLES[table]()
