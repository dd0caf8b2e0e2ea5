"""Which steps are dense, and how many tokens a sparse step computes (RAS section 3.3). Plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

from ras_compile.config import RASConfig, fitting
from ras_compile.errors import ConfigError
from ras_compile.notices import warn_once
from ras_compile.passes.analysis.cost import Cost

Kind = Literal["dense", "sparse"]

# Each distinct count of active tokens is a compiled program of its own.
LEVELS = 4
_STEPS = 1024  # of which a schedule remembers what they are to do
# Of "ends": the shares of the run at which its middle begins and ends, and how many times as many tokens are computed
# outside of it. Measured on the trained model; within them, the expected change of the noise in a step is a U.
EARLY, LATE = 0.3, 0.9
END_SHARE = 8
# Where a speed-up is out of reach with the default's dense steps, they come so far apart, or not at all.
WIDER: tuple[int | None, ...] = (4, 6, 8, None)
# Of "sigmas": how fast the error of a step falls with the share p of its tokens that is computed, exp(-p / FALL), where
# those that change most come first; the least share; and where noise levels are cut off, whose logarithms end nowhere.
FALL, LEAST, CUT = 0.3, 1 / 16, 1e-3


class Schedule:
    """The plan of one generation, counted from its first step (0).

    Args:
        config: `warmup_steps`, `reset_interval`, `reset_from`, `reset_steps`, `sample_ratio` and `ratio_schedule` are read.
        levels: of each step, and of the end of the run, how much of the latent is noise, in [0, 1]; where known.
    """

    def __init__(self, config: RASConfig, levels: Sequence[float] = ()) -> None:
        self.config, self._noise_levels = config, levels
        self._ratio = config.ratio
        self._counts = lru_cache(maxsize=64)(self._plan)
        # what a step is to do is worked out once: generations of one config ask the same at each of their calls
        self.kind = lru_cache(maxsize=_STEPS)(self._kind)
        self.active = lru_cache(maxsize=_STEPS)(self._active)
        self.observes = lru_cache(maxsize=_STEPS)(self._observes)

    def _kind(self, step: int, num_steps: int | None = None) -> Kind:
        """ "dense" in the warm-up and at an error reset, else "sparse"."""
        config = self.config
        if step < config.warmup_steps:
            return "dense"
        if config.reset_steps is not None:  # with a tolerance, too
            return "dense" if step in config.reset_steps else "sparse"
        if config.tolerance is not None:
            return "sparse"  # or dense, if the error asks for it
        if config.reset_interval is None:
            return "sparse"
        since = step - config.warmup_steps
        # the last step settles what the others left; a run that ends within one interval of the warm-up has no such step
        if (
            config.reset_from == "end"
            and num_steps is not None
            and num_steps > config.warmup_steps + config.reset_interval
        ):
            return "sparse" if (num_steps - 1 - step) % config.reset_interval else "dense"
        return "dense" if since > 0 and since % config.reset_interval == 0 else "sparse"

    def _observes(self, step: int, num_steps: int | None = None) -> bool:
        """Whether a later step chooses its tokens by the noise of `step`."""
        # drift is measured between calls: that of the step before the one that is needed has to be known, too;
        # a callable may remember as well
        ahead = (1, 2) if self.config.metric == "drift" or callable(self.config.metric) else (1,)
        return self._ratio < 1 and any(self.kind(step + steps, num_steps) == "sparse" for steps in ahead)

    def ratio(self, step: int, num_steps: int | None = None) -> float:
        """Share of tokens that sparse step `step` of `num_steps` should compute, in (0, 1].

        The mean over the run's sparse steps is `sample_ratio`, whatever the schedule:

        - "constant": in each step.
        - "linear": falls from `sample_ratio` + d to `sample_ratio` - d in at most four levels (RAS, section 3.3); d =
          min(1 - ratio, ratio / 2) keeps every level in (0, 1].
        - "ends": in the first 30 % and the last 10 % of the run eight times as many as between, or all of them: there the
          noise changes most from step to step, times the step in noise level (measured on the trained model). Without a
          known number of steps it is "constant".
        - "sigmas": as many as the expected error of each step asks for, see `_by_error`, in at most three levels; like
          "ends" where nobody knows the noise levels.

        Raises:
            ConfigError: "linear" without a known number of steps.
        """
        if self._flat(num_steps):
            return self._ratio
        levels = self._levels(num_steps)
        return next((ratio for ratio, steps in levels if step in steps), levels[-1][0])

    def _active(self, step: int, tokens: int, num_steps: int | None = None) -> int:
        """Active rows of sparse step `step`, in 1..`tokens`: a multiple that suits the hardware when there are many.

        Raises:
            ConfigError: "linear" without a known number of steps.
        """
        if self._ratio == 1.0:
            return tokens
        if self._flat(num_steps):
            return _rounded(self._ratio * tokens, tokens)
        counts = self._counts(tokens, num_steps)
        return counts.get(step, counts[max(counts)])

    def _flat(self, num_steps: int | None) -> bool:
        """Whether every sparse step computes as many tokens as any other."""
        kind = self.config.ratio_schedule
        return kind == "constant" or (kind in ("ends", "sigmas") and num_steps is None)

    @staticmethod
    def tolerable(tokens: int) -> list[int]:
        """Active rows of the sparse programs among which a `tolerance` chooses, the fewest first."""
        return sorted({_rounded(share * tokens, tokens) for share in (1 / 16, 1 / 4, 1 / 2)})

    @staticmethod
    def fewest(tokens: int) -> int:
        """The fewest of `tokens` rows that a sparse step may have."""
        return _rounded(0.0, tokens)

    def dense_steps(self, num_steps: int) -> int:
        """How many of `num_steps` steps are dense."""
        return sum(self.kind(step, num_steps) == "dense" for step in range(num_steps))

    def check(self, num_steps: int | None, late: bool = False) -> None:
        """Say once what this run's number of steps makes impossible.

        Args:
            num_steps: steps of the run, where known.
            late: the run begins after the first step of its schedule (image-to-image), and so is shorter than asked for.

        Raises:
            ConfigError: "linear" without a known number of steps; `reset_steps` beyond the run, unless it is late.
        """
        beyond = [step for step in self.config.reset_steps or () if num_steps is not None and step >= num_steps]
        if beyond and not late:
            raise ConfigError(
                f"option reset_steps={list(self.config.reset_steps or ())}: this run has {num_steps} steps, from 0 to "
                f"{num_steps - 1 if num_steps else 0}."
            )
        if beyond:
            warn_once(
                f"ras_compile: this run starts late and has {num_steps} steps, so reset_steps {beyond} do not come."
            )
        if num_steps is None:
            if self.config.ratio_schedule == "linear":
                self._levels(None)
        else:
            self.warn_if_dense(num_steps)

    def warn_if_dense(self, num_steps: int) -> None:
        """Say once that a run of so many steps has no sparse one."""
        if not any(self.kind(step, num_steps) == "sparse" for step in range(num_steps)):
            why, advice = self.none_sparse(num_steps)
            warn_once(f"ras_compile: {why}; every step runs dense. {advice.capitalize()}.")

    def none_sparse(self, num_steps: int) -> tuple[str, str]:
        """Of a run in which every step is dense: why that is so, and what to do."""
        warmup = self.config.warmup_steps
        if num_steps > warmup:
            advice = "give a larger reset_interval" if self.config.reset_steps is None else "give fewer reset_steps"
            return f"each of the {num_steps} steps is a warm-up or an error reset", advice
        advice = "lower warmup_steps or take more steps" if warmup > 1 else "take more steps"
        return f"none of the {num_steps} steps can be sparse with warmup_steps={warmup}", advice

    def _levels(self, num_steps: int | None) -> list[tuple[float, list[int]]]:
        """The run's sparse steps by the share of tokens that they compute: at most four shares, with their steps."""
        if num_steps is None:
            raise ConfigError(
                "option ratio_schedule='linear' needs the number of steps: use ras_compile.attach(pipe, ...) or "
                "ras_compile.generation(num_steps=...)."
            )
        sparse = [step for step in range(num_steps) if self.kind(step, num_steps) == "sparse"] or [num_steps]
        if self.config.ratio_schedule == "linear":
            return self._line(sparse)
        if self.config.ratio_schedule == "sigmas" and len(self._noise_levels) > num_steps:
            return self._by_error(sparse)
        return self._ends(sparse, num_steps)

    def _line(self, sparse: list[int]) -> list[tuple[float, list[int]]]:
        """Up to four groups of nearly equal length along a falling line."""
        mean, count = self._ratio, min(LEVELS, len(sparse))
        reach = min(1 - mean, mean / 2)
        edges = [len(sparse) * group // count for group in range(count + 1)]
        # the mean of the line's values over a group is the line's value at the group's middle
        return [(mean + reach * (1 - (low + high) / len(sparse)), sparse[low:high]) for low, high in pairwise(edges)]

    def _ends(self, sparse: list[int], num_steps: int) -> list[tuple[float, list[int]]]:
        """Few tokens between the ends of the run, `END_SHARE` times as many at its ends."""
        mean, last = self._ratio, max(num_steps - 1, 1)
        middle = [step for step in sparse if EARLY <= step / last <= LATE]
        ends = [step for step in sparse if step not in middle]
        most = min(mean * len(sparse) * END_SHARE / (len(ends) * END_SHARE + len(middle)), 1.0)
        least = (mean * len(sparse) - most * len(ends)) / max(len(middle), 1)
        # of levels that are rounded to whole tokens, the last one makes up for the others
        return [(share, steps) for share, steps in ((most, ends), (least, middle)) if steps]

    def _by_error(self, sparse: list[int]) -> list[tuple[float, list[int]]]:
        """Shares that make the sum of all steps' expected errors least, drawn together in three levels.

        From one step to the next a model's noise changes by about as much as the logarithm of the signal-to-noise ratio,
        lambda = log((1 - s) / s) at noise level s; on the trained model the two keep a ratio of 0.11 to 0.28 over a run. A held
        noise is off by that, times the step in noise level that it is used for:

            w_t = |lambda_t - lambda_(t-1)| * |s_(t+1) - s_t|

        With a share p_t of the tokens computed w_t * exp(-p_t / FALL) is left, and the sum of that is least where
        p_t = FALL * log(w_t) + a constant, between `LEAST` and 1.
        """
        levels, mean = self._noise_levels, self.config.ratio
        least = min(LEAST, mean)
        signal = [math.log((1 - s) / s) for s in (min(max(level, CUT), 1 - CUT) for level in levels)]
        # of solvers that evaluate a level more than once, each evaluation stands for its level
        places = [0, *accumulate(int(one != two) for one, two in pairwise(levels))]
        firsts = [places.index(place) for place in range(places[-1] + 1)]
        ends = [*firsts, firsts[-1]]
        wanted = {}
        for t in sparse:
            before, here, after = ends[max(places[t] - 1, 0)], ends[places[t]], ends[places[t] + 1]
            error = abs(signal[here] - signal[before]) * abs(levels[after] - levels[here])
            wanted[t] = FALL * math.log(max(error, 1e-9))

        def shares(shift: float) -> dict[int, float]:
            return {t: min(max(share + shift, least), 1.0) for t, share in wanted.items()}

        low, high = least - max(wanted.values()), 1 - min(wanted.values())
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(shares(middle).values()) < mean * len(sparse) else (low, middle)
        found = shares(high)
        bottom, width = min(found.values()), (max(found.values()) - min(found.values())) / (LEVELS - 1)
        groups: dict[int, list[int]] = {}
        for t, share in found.items():
            groups.setdefault(min(int((share - bottom) / width), LEVELS - 2) if width else 0, []).append(t)
        return [(sum(found[t] for t in steps) / len(steps), steps) for _, steps in sorted(groups.items(), reverse=True)]

    def _plan(self, tokens: int, num_steps: int | None) -> dict[int, int]:
        """Rows of each sparse step; what rounding takes from one level the next gets back, so that the sum stays right."""
        counts, owed = {}, 0.0
        for share, steps in self._levels(num_steps):
            wanted = share * tokens * len(steps) + owed
            count = _rounded(wanted / len(steps), tokens)
            counts.update(dict.fromkeys(steps, count))
            owed = wanted - count * len(steps)
        return counts


def _rounded(wanted: float, tokens: int) -> int:
    """`wanted` rows as a multiple of 64, 32, 16 or 8 where that moves the ratio by less than 1 %."""
    multiple = next((m for m in (64, 32, 16, 8) if tokens >= 64 * m), 1)
    return max(min(round(wanted / multiple) * multiple, tokens), min(multiple, tokens))


def at_speedup(config: RASConfig, cost: Callable[[], Cost] | None, num_steps: int | None) -> RASConfig:
    """The config with the ratio that gives its `speedup` in this run, by FLOPs; without one, as it is.

    Where "drift" decides and the default's frequent dense steps leave too little to save, they come further apart.

    Raises:
        ConfigError: nobody says how many steps there are, or the speed-up is out of reach.
    """
    if config.speedup is None:
        return config
    if num_steps is None:
        raise ConfigError(
            "option speedup needs the number of steps: use ras_compile.attach(pipe, ...) or "
            "ras_compile.generation(num_steps=...)."
        )
    if cost is None:
        raise ConfigError("option speedup needs the costs of the compiled programs; give a sample_ratio instead.")
    schedule = Schedule(config)
    if schedule.dense_steps(num_steps) == num_steps:
        raise ConfigError(f"option speedup={config.speedup}: {'; '.join(schedule.none_sparse(num_steps))}.")
    price = cost()
    usual = config.metric == "drift" and config.reset_interval == fitting("drift")["reset_interval"]
    for interval in (config.reset_interval, *(WIDER if usual and config.reset_steps is None else ())):
        dense = Schedule(config.with_runtime(reset_interval=interval)).dense_steps(num_steps)
        try:
            ratio = price.ratio_for(config.speedup, num_steps, dense, Schedule.fewest(price.tokens))
        except ValueError as error:
            refused = error
        else:
            return config.with_runtime(sample_ratio=ratio, reset_interval=interval)
    raise ConfigError(f"option speedup: {refused} (by FLOPs).")
