"""Which steps are dense, and how many tokens a sparse step computes (RAS section 3.3). Plain Python."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Literal

from ras_compile.config import RASConfig
from ras_compile.errors import ConfigError
from ras_compile.notices import warn_once

__all__ = ["Kind", "Schedule"]

Kind = Literal["dense", "sparse"]

# Each distinct count of active tokens is a compiled program of its own.
LEVELS = 4
_STEPS = 1024  # of which a schedule remembers what they are to do
# Of "ends": the shares of the run at which its middle begins and ends, and how many times as many tokens are computed
# outside of it. Measured on the trained model; within them, the expected change of the noise in a step is a U.
EARLY, LATE = 0.3, 0.9
END_SHARE = 8


class Schedule:
    """The plan of one generation, counted from its first step (0).

    Args:
        config: `warmup_steps`, `reset_interval`, `reset_steps`, `sample_ratio` and `ratio_schedule` are read.
    """

    def __init__(self, config: RASConfig) -> None:
        self.config = config
        self._ratio = config.ratio
        self._counts = lru_cache(maxsize=64)(self._plan)
        # what a step is to do is worked out once: generations of one config ask the same at each of their calls
        self.kind = lru_cache(maxsize=_STEPS)(self._kind)
        self.active = lru_cache(maxsize=_STEPS)(self._active)
        self.observes = lru_cache(maxsize=_STEPS)(self._observes)

    def _kind(self, step: int) -> Kind:
        """ "dense" in the warm-up and at an error reset, else "sparse"."""
        config = self.config
        if step < config.warmup_steps:
            return "dense"
        if config.reset_steps is not None:
            return "dense" if step in config.reset_steps else "sparse"
        since = step - config.warmup_steps
        if config.reset_interval is not None and since > 0 and since % config.reset_interval == 0:
            return "dense"
        return "sparse"

    def _observes(self, step: int) -> bool:
        """Whether a later step chooses its tokens by the noise of `step`."""
        # drift is measured between calls: that of the step before the one that is needed has to be known, too
        ahead = (1, 2) if self.config.metric == "drift" else (1,)
        return self._ratio < 1 and any(self.kind(step + steps) == "sparse" for steps in ahead)

    def ratio(self, step: int, num_steps: int | None = None) -> float:
        """Share of tokens that sparse step `step` of `num_steps` should compute, in (0, 1].

        The mean over the run's sparse steps is `sample_ratio`, whatever the schedule:

        - "constant": in each step.
        - "linear": falls from `sample_ratio` + d to `sample_ratio` - d in at most four levels (RAS, section 3.3); d =
          min(1 - ratio, ratio / 2) keeps every level in (0, 1].
        - "ends": in the first 30 % and the last 10 % of the run eight times as many as between, or all of them: there the
          noise changes most from step to step, times the step in noise level (measured on the trained model). Without a
          known number of steps it is "constant".

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
        return kind == "constant" or (kind == "ends" and num_steps is None)

    @staticmethod
    def fewest(tokens: int) -> int:
        """The fewest of `tokens` rows that a sparse step may have."""
        return _rounded(0.0, tokens)

    def dense_steps(self, num_steps: int) -> int:
        """How many of `num_steps` steps are dense."""
        return sum(self.kind(step) == "dense" for step in range(num_steps))

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
        elif not any(self.kind(step) == "sparse" for step in range(num_steps)):
            why, advice = self.none_sparse(num_steps)
            warn_once(f"ras_compile: {why}; every step runs dense. {advice.capitalize()}.")

    def none_sparse(self, num_steps: int) -> tuple[str, str]:
        """Of a run in which every step is dense: why that is so, and what to do."""
        warmup = self.config.warmup_steps
        if num_steps > warmup:
            return f"each of the {num_steps} steps is a warm-up or an error reset", "give fewer reset_steps"
        advice = "lower warmup_steps or take more steps" if warmup > 1 else "take more steps"
        return f"none of the {num_steps} steps can be sparse with warmup_steps={warmup}", advice

    def _levels(self, num_steps: int | None) -> list[tuple[float, list[int]]]:
        """The run's sparse steps by the share of tokens that they compute: at most four shares, with their steps."""
        if num_steps is None:
            raise ConfigError(
                "option ratio_schedule='linear' needs the number of steps: use ras_compile.attach(pipe, ...) or "
                "ras_compile.generation(num_steps=...)."
            )
        sparse = [step for step in range(num_steps) if self.kind(step) == "sparse"] or [num_steps]
        return self._ends(sparse, num_steps) if self.config.ratio_schedule == "ends" else self._line(sparse)

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
