"""The options of `torch.compile(transformer, backend="ras", options={...})`, checked once and for all."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, Unpack, get_args, get_origin, get_type_hints

from ras_compile.errors import ConfigError
from ras_compile.options import Options, RuntimeOptions

# Options that no compiled program depends on: each generation may have others, see `RASConfig.with_runtime`.
RUNTIME_OPTIONS = tuple(name for name in RuntimeOptions.__annotations__ if name != "preset")


def _words(kind: Any) -> tuple[str, ...]:
    """The words among what a type allows."""
    kinds = (kind,) if get_origin(kind) is Literal else get_args(kind)
    return tuple(word for one in kinds if get_origin(one) is Literal for word in get_args(one))


# The words that options take, as options.py has them for type checkers.
WORDS = {name: _words(kind) for name, kind in get_type_hints(Options).items()}

# Defaults that follow the metric. Drift tells which tokens matter, so that few of them do, and the time goes to dense
# steps, between which a forecast holds. Other metrics measured best (examples/quality) with more tokens and fewer dense
# steps, and a forecast makes their pictures worse: the tokens that they leave out change as much as any.
_WITH_DRIFT: Mapping[str, Any] = dict(
    sample_ratio=0.1, ratio_schedule="ends", reset_interval=3, reset_from="end", noise_reuse="forecast"
)
_WITH_OTHERS: Mapping[str, Any] = dict(
    sample_ratio=0.5, ratio_schedule="constant", reset_interval=8, reset_from="start", noise_reuse="hold"
)

# What `preset=` stands for. Each sets all runtime options: those that it does not name have their defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # RAS as published: arXiv 2502.10389, eq. 1 and section 3.3; its dense steps are the 12th and the 20th of 28
    "paper": dict(
        sample_ratio=0.5, warmup_steps=4, reset_interval=8, metric="std", focus="high", starvation_scale=0.1,
        max_absence=1_000_000,
    ),
    "fast": dict(
        sample_ratio=0.125, ratio_schedule="constant", reset_interval=4, reset_from="start", metric="drift", noise_reuse="hold"
    ),
    "balanced": dict(metric="drift", **_WITH_DRIFT),  # what nobody's options are, too
    "quality": dict(metric="drift", **{**_WITH_DRIFT, "reset_interval": 2}),
}  # fmt: skip

# Up to so many steps from one dense step, which ends all lags, to the next, drift decides alone which tokens are left out.
NEAR = 4
_ABSENCE = 8
_STARVATION = 2.0  # of any metric but "drift", which has a factor of age in it


def fitting(metric: Any) -> Mapping[str, Any]:
    """The defaults of the options that follow the metric."""
    return _WITH_DRIFT if isinstance(metric, str) and metric == "drift" else _WITH_OTHERS


@dataclass(frozen=True, init=False)
class RASConfig:
    """Every option of region-adaptive sampling (RAS, arXiv 2502.10389). Compared and hashed by value.

    Args:
        preset: a name for a set of runtime options that was measured (examples/quality), over which options that are given
            beside it rule. "fast", "balanced" (the defaults) and "quality" take more time for pictures nearer to the exact
            ones; "paper" is the published method.
        sample_ratio: average share of the region's tokens that a sparse step computes, in (0, 1]; 0.1 where nothing is
            given, 0.5 with another metric than "drift". None with `speedup`, which is solved for it.
        speedup: instead of `sample_ratio`: the speed-up over dense steps that a whole run is to have, at least 1. The
            cost model solves for the ratio, so this counts FLOPs and is no promise about time; needs the number of steps.
            Where the default's dense steps leave too little to save, they come every 4, 6 or 8 steps, or not at all.
        warmup_steps: dense steps at the start of a generation, at least 1.
        reset_interval: a dense step every so many steps after the warm-up (section 3.3), or None for no such step. 3,
            or 8 with another metric than "drift".
        reset_from: where these steps are counted from: the "start", behind the warm-up (section 3.3), or the "end", so that the
            last step is dense; from the start, too, where nobody says the number of steps. A run of no more than
            `warmup_steps + reset_interval` has no such step. "end", or "start" with another metric than "drift".
        reset_steps: exactly these steps are dense error resets; rules over `reset_interval` when given.
        ratio_schedule: how the ratio runs over the steps, with the same average: "constant", "ends" (more tokens at the
            beginning and at the end of a run, few between; constant where nobody says the number of steps), "linear"
            (falls over the run, section 3.3), or "sigmas" (by the error that is expected of each step from the noise
            levels of the scheduler, which are read from the device once in a run; "ends" without `ras_compile.attach`).
            The default is "ends", or "constant" with another metric than "drift".
        tolerance: None, or for research, in place of a ratio: how far a step's noise may be expected to be off, as a share
            of its own spread, above 0. Each step behind the warm-up then computes the fewest of 1/16, 1/4, 1/2 or all of
            the tokens with which the drift of the others, summed, stays below that share. This reads one number from the
            device in each step. Needs "drift"; `sample_ratio`, `ratio_schedule`, `reset_interval` and `reset_from` are not used.
        metric: what tells which tokens need computing: "drift" (how far the noise that a token holds should be off by
            now, from how much it last changed: see `ras_compile.sampling.selection`), "std" (the paper's: how its noise
            spreads over channels), "l2norm", "random", or a callable ``(noise [B, N, P * C], info) -> [B, N]``,
            non-negative. The defaults of `sample_ratio`, `reset_interval`, `reset_from`, `ratio_schedule`,
            `noise_reuse` and `starvation_scale` are those that measured best with "drift" or with the others.
            With guidance, a metric sees the noise of each branch before guidance joins them (the authors' code ranks
            the guided noise), and the mean over the branches counts (where the branches are samples of one batch, the
            callable sees them in that batch). A callable is called once for each model call whose next step is sparse,
            and may keep a state: an object with ``__call__``, which begins anew where ``info.step`` falls or the shapes
            change. It is given what each token last computed, so that a token whose noise has not changed was not
            computed.
        focus: which end of the metric is computed: "low", "high", or the share of the dropped tokens that is taken
            from the high end, in [0, 1] ("low" is 1.0, "high" is 0.0).
        starvation_scale: k of eq. 1, at least 0: how strongly a drop count raises a token's priority. None: what fits
            the metric, 0 with "drift", which has a factor of its own that grows with each drop, and 2 with all others,
            where that measured best on the trained model (examples/quality). 0.1 in the authors' code, which computes
            the lowest values of eq. 1 (docs/paper.md).
        max_absence: D_max: a token that was left out of so many sparse steps goes first; at least 1. None is 8; with "drift" it
            is 1 in a step that computes at least half of the tokens, where dense steps are more than four steps apart.
        selector: None, or a callable ``(metric [B, N], drops [B, N], k, info) -> rows [B, k]`` for research.
        region: None (inferred), or the slice of the latent's tokens that is the picture; a pair (start, stop) will do.
        context: "fresh", or "frozen": text and reference tokens are computed in dense steps only.
        noise_reuse: what an inactive token returns: "hold" (the noise last computed for it), "linear" (its last two
            computed noises continued in time), "forecast" (that line, as far as it has come true so far: see
            `ras_compile.sampling.reuse`; the default with "drift") or "x0" (the noise that implies the clean sample it
            had). Under `ras_compile.attach`, a scheduler that adds noise at each step makes it "x0", with a warning.
        cache_reuse: what active tokens find in the caches of keys, values and other values that sparse steps read whole:
            "hold" (what was computed last), or "forecast": between dense steps these go on along 3/4 of the line through
            their last two dense values, see `ras_compile.execute.slopes`. With a dense step every second step this measured
            0 to 2.7 dB nearer to the exact picture on three trained models. It takes one more copy of these caches, and one
            pass over them in each sparse step, whose time on a GPU has not been measured yet. Not beside `cache_dtype`,
            `cache_device`, `context="frozen"` or `kv_cache=False`.
        kv_cache: False lets active tokens attend among themselves only (ablation).
        inner_backend: "inductor", "eager" or "aot_eager", or any other backend's name.
        inner_options: options of the inner backend; the key "mode" holds torch.compile's mode, if one was given.
        cuda_graphs: capture the programs as CUDA graphs where there is CUDA.
        cache_budget: bytes of caches that all compiled models may keep for their next generations; beyond, those used
            longest ago go. None: a quarter of the device's memory.
        cache_dtype: what caches of keys, values and other values that sparse steps read whole are kept in: None (as the
            model computes them), "float8" (e4m3, off by about 2.5 %) or "int8" (about 0.6 %, and more where a few entries are
            many times the others), each with a scale for every token and head. A dense step is not rounded.
        cache_device: None (the device that computes), or "cpu": these values wait in the host's memory, each copied in for
            its layer of a sparse step and back behind it. Without CUDA graphs. With "float8" half as much is copied.
        unsupported: "dense": warn and run dense; "error": refuse.
        latent: name of the forward argument that is the latent, where inference cannot tell; or of what one holds, such as
            ``inputs['x']``.
        timestep: name of the forward argument that is the timestep, where inference cannot tell.

    Raises:
        ConfigError: a bad value; the text names the option and what it takes.
    """

    sample_ratio: float | None = None
    warmup_steps: int = 4
    reset_interval: int | None = 3
    reset_from: str = "end"
    reset_steps: tuple[int, ...] | None = None
    ratio_schedule: str = "ends"
    metric: str | Callable[..., Any] = "drift"
    focus: str | float = "high"
    starvation_scale: float | None = None
    max_absence: int | None = None
    selector: Callable[..., Any] | None = None
    region: slice | None = field(default=None, hash=False)  # a slice has no hash before Python 3.12
    context: str = "fresh"
    noise_reuse: str = "forecast"
    cache_reuse: str = "hold"
    kv_cache: bool = True
    inner_backend: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    cuda_graphs: bool = True
    cache_budget: int | None = None
    cache_dtype: str | None = None
    cache_device: str | None = None
    unsupported: str = "dense"
    latent: str | None = None
    timestep: str | None = None
    speedup: float | None = None
    tolerance: float | None = None

    def __init__(self, **options: Unpack[Options]) -> None:
        put = object.__setattr__
        given = _given(options)
        fit = fitting(given.get("metric", "drift"))
        for option in fields(self):
            plain = {} if option.default is MISSING else option.default  # inner_options alone
            put(self, option.name, given.get(option.name, fit.get(option.name, plain)))
        if self.speedup is not None and "sample_ratio" not in given:
            put(self, "sample_ratio", None)
        elif self.speedup is None and self.sample_ratio is None:
            put(self, "sample_ratio", fit["sample_ratio"])
        self._check()

    def _check(self) -> None:
        put = object.__setattr__
        if self.sample_ratio is not None:
            put(self, "sample_ratio", _number(self, "sample_ratio", low=0.0, high=1.0, open_low=True))
        if self.starvation_scale is not None:
            put(self, "starvation_scale", _number(self, "starvation_scale", low=0.0))
        if self.speedup is not None:
            put(self, "speedup", _number(self, "speedup", low=1.0))
            if self.sample_ratio is not None:
                raise ConfigError(
                    f"options sample_ratio={self.sample_ratio:g} and speedup={self.speedup:g} exclude each other: a "
                    "speed-up is reached by choosing the ratio."
                )
        if self.tolerance is not None:
            put(self, "tolerance", _number(self, "tolerance", low=0.0, open_low=True))
            if self.speedup is not None or not isinstance(self.metric, str) or self.metric != "drift":
                why = "excludes speedup" if self.speedup is not None else "needs metric='drift', whose errors it bounds"
                raise ConfigError(f"option tolerance={self.tolerance:g} {why}.")
        for name, low in (("warmup_steps", 1), ("max_absence", 1), ("cache_budget", 0), ("reset_interval", 1)):
            if getattr(self, name) is not None or name == "warmup_steps":
                put(self, name, _integer(self, name, low))
        put(self, "reset_steps", _steps(self.reset_steps))
        for name in ("reset_from", "ratio_schedule", "context", "noise_reuse", "cache_reuse", "unsupported"):
            _one_of(self, name)
        for name in ("cache_dtype", "cache_device"):
            if getattr(self, name) is not None:
                _one_of(self, name, "None")
        if not callable(self.metric):
            _one_of(self, "metric", "a callable (noise [B, N, C], info) -> [B, N]")
        if isinstance(self.focus, str):
            _one_of(self, "focus", "a number in [0, 1]")
        else:
            put(self, "focus", _number(self, "focus", low=0.0, high=1.0))
        if self.selector is not None and not callable(self.selector):
            raise _bad(self, "selector", "None or a callable (metric [B, N], drops [B, N], k, info) -> rows [B, k]")
        put(self, "region", _region(self.region))
        if self.context == "frozen" and self.kv_cache is False:
            raise ConfigError("context='frozen' keeps the context's keys and values, so it needs kv_cache=True.")
        for name in ("kv_cache", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(self, name, "True or False")
        if self.cache_reuse == "forecast":
            for option in fields(self):
                name = option.name
                if (
                    name in ("cache_dtype", "cache_device", "context", "kv_cache")
                    and getattr(self, name) != option.default
                ):
                    raise ConfigError(
                        f"options cache_reuse='forecast' and {name}={getattr(self, name)!r} exclude each other: caches that are "
                        "rounded, in the host's memory, frozen or not there stay as they were computed."
                    )
        if not isinstance(self.inner_backend, str) or not self.inner_backend:
            raise _bad(self, "inner_backend", "the name of a backend, such as 'inductor', 'eager' or 'aot_eager'")
        if self.inner_backend == "ras":
            raise ConfigError("inner_backend='ras' would compile for ever; it takes another backend's name.")
        if not isinstance(self.inner_options, Mapping):
            raise _bad(self, "inner_options", "a dictionary of the inner backend's options")
        put(self, "inner_options", dict(self.inner_options))
        # torch hands `mode=` to the backend instead of options, never beside them
        if self.inner_options.get("mode", "default") not in WORDS["mode"]:
            raise ConfigError(
                f"mode={self.inner_options['mode']!r} is not one of {', '.join(map(repr, WORDS['mode']))}."
            )
        for name in ("latent", "timestep"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.partition("[")[0].isidentifier()):
                raise _bad(
                    self, name, "None or the name of a forward argument, or of what one holds, such as \"inputs['x']\""
                )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None) -> RASConfig:
        """The config of an options dictionary, as torch.compile hands it over.

        `mode` is no option of ours: it goes to ``inner_options["mode"]``, where the inner backend finds it.

        Raises:
            ConfigError: no dictionary, an unknown key (with the nearest known one) or a bad value.
        """
        if not isinstance(options, Mapping | None):
            raise ConfigError(f"options takes a dictionary, not {type(options).__name__}.")
        return cls(**_given(options or {}))

    def with_runtime(self, **options: Any) -> RASConfig:
        """This config with other runtime options; all others stay, but a `preset` sets them all.

        With another `metric`, those that had the defaults of the one before get those of the new one.

        Raises:
            ConfigError: an option that compiled programs depend on, an unknown one, or a bad value.
        """
        given = _given(options)
        fixed = [name for name in given if name not in RUNTIME_OPTIONS]
        if fixed:
            raise ConfigError(
                f"option {fixed[0]} changes what is compiled; detach and attach anew. Options that may change between "
                f"generations: {', '.join(RUNTIME_OPTIONS)}."
            )
        kept = {option.name: getattr(self, option.name) for option in fields(self)}
        if "preset" in options:
            kept = {name: value for name, value in kept.items() if name not in RUNTIME_OPTIONS}
        elif "metric" in given:
            fit = fitting(self.metric)
            kept = {name: value for name, value in kept.items() if name not in fit or value != fit[name]}
        if given.get("speedup") is not None:
            given.setdefault("sample_ratio", None)
        elif "sample_ratio" in given:
            given["speedup"] = None
        return RASConfig(**{**kept, **given})

    @property
    def ratio(self) -> float:
        """`sample_ratio` as a number, also before a `speedup` has been solved for it."""
        return fitting(self.metric)["sample_ratio"] if self.sample_ratio is None else self.sample_ratio

    @property
    def starvation(self) -> float:
        """`starvation_scale`, or what fits the metric."""
        if self.starvation_scale is not None:
            return self.starvation_scale
        return 0.0 if self.metric == "drift" else _STARVATION

    @property
    def longest_absences(self) -> tuple[int, int]:
        """`max_absence`, or what measured best (docs/quality.md): where fewer than half of the tokens are computed, and elsewhere.

        A token that is left out again and again lags in the same direction each time, and a run adds that up. Where half are
        computed, and dense steps are far apart, taking turns is better than what drift says of the next step alone.
        """
        if self.max_absence is not None:
            return self.max_absence, self.max_absence
        far = self.reset_interval is None or self.reset_interval > NEAR
        return _ABSENCE, 1 if self.metric == "drift" and far else _ABSENCE

    @property
    def caches_are(self) -> str:
        """Where, and as what, caches are kept, in words that follow their bytes; nothing by default."""
        where = " in the host's memory" if self.cache_device == "cpu" else ""
        return where + (f" as {self.cache_dtype}" if self.cache_dtype else "")

    @property
    def high_share(self) -> float:
        """`focus` as a number: the share of the dropped tokens that is taken from the metric's high end."""
        return {"low": 1.0, "high": 0.0}[self.focus] if isinstance(self.focus, str) else float(self.focus)


def _stays(config: RASConfig, name: str, value: Any) -> NoReturn:
    text = f"a RASConfig stays as it is; write handle.configure({name}={value!r}), or make another RASConfig."
    raise FrozenInstanceError(text)


type.__setattr__(RASConfig, "__setattr__", _stays)  # what a frozen class says by itself does not say what to do


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options by the names of fields: a preset is what it stands for, over which what is given beside it rules."""
    given = dict(options)
    known = ["preset", *(option.name for option in fields(RASConfig))]
    for name in given:
        if name not in (*known, "mode"):
            if name == "dynamic":
                raise ConfigError(
                    "dynamic is no option, but stands beside them: attach(pipe, dynamic=True), or torch.compile(model, "
                    "backend='ras', dynamic=True). It changes what is compiled, so detach an attached pipeline first."
                )
            # "ratio" is meant for "sample_ratio"
            within = [option for option in known if len(str(name)) > 3 and str(name) in option]
            near = difflib.get_close_matches(str(name), known, n=1) or within
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown option {name!r}.{hint} Options: {', '.join(known)}.")
    mode, name = given.pop("mode", None), given.pop("preset", None)
    if mode is not None:
        inner = given.get("inner_options", {})
        given["inner_options"] = {**inner, "mode": mode} if isinstance(inner, Mapping) else inner
    if name is None:
        return given
    if not isinstance(name, str) or name not in PRESETS:
        allowed = " or ".join(map(repr, PRESETS))
        raise ConfigError(f"option preset={name!r} is not allowed{_meant(name, PRESETS)}; it takes {allowed}.")
    preset = dict(PRESETS[name])
    if given.get("speedup") is not None:  # it is reached by choosing the ratio
        del preset["sample_ratio"]
    return {**preset, **given}


def _bad(config: RASConfig, name: str, allowed: str) -> ConfigError:
    return ConfigError(f"option {name}={getattr(config, name)!r} is not allowed; it takes {allowed}.")


def _meant(value: Any, choices: Iterable[str]) -> str:
    """The part of a sentence that names the choice which a wrong word is near."""
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _one_of(config: RASConfig, name: str, also: str | None = None) -> None:
    value, choices = getattr(config, name), WORDS[name]
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join([*map(repr, choices), *([also] if also else [])])
        raise ConfigError(f"option {name}={value!r} is not allowed{_meant(value, choices)}; it takes {allowed}.")


def _integer(config: RASConfig, name: str, low: int) -> int:
    value = getattr(config, name)
    if not is_whole(value) or value < low:
        what = " of bytes, such as 2 * 2**30," if name == "cache_budget" else ""
        raise _bad(config, name, f"a whole number{what} of at least {low}")
    return int(value)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, NumPy's among them, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(config: RASConfig, name: str, low: float, high: float = math.inf, open_low: bool = False) -> float:
    value = getattr(config, name)
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value > high or value < low or (open_low and value == low):
        span = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
        raise _bad(config, name, f"a number in {span}" + ", such as 0.25 for a quarter" * (name == "sample_ratio"))
    return float(value)


def _steps(steps: Any) -> tuple[int, ...] | None:
    if steps is None:
        return None
    try:
        found = tuple(steps)
    except TypeError:
        found = (None,)
    if not all(is_whole(step) and step >= 0 for step in found):
        raise ConfigError(f"option reset_steps={steps!r} is not allowed; it takes None or a list of step numbers.")
    return tuple(sorted({int(step) for step in found}))


def _region(region: Any) -> slice | None:
    if isinstance(region, (tuple, list)) and len(region) == 2:
        region = slice(*region)
    if region is None:
        return None
    ends = (region.start, region.stop) if isinstance(region, slice) else ("no slice",)
    if not all(end is None or is_whole(end) for end in ends) or region.step not in (None, 1):
        raise ConfigError(
            f"option region={region!r} is not allowed; it takes None, slice(start, stop) or (start, stop)."
        )
    return slice(*(None if end is None else int(end) for end in ends))
