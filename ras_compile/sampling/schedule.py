"""Which steps are dense, and how many tokens a sparse step computes (RAS section 3.3). Plain Python."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from ras_compile.config import RASConfig
from ras_compile.errors import ConfigError
from ras_compile.notices import warn_once

__all__ = ["Kind", "Schedule"]

Kind = Literal["dense", "sparse"]

# Each distinct count of active tokens is a compiled program of its own.
LEVELS = 4


class Schedule:
    """The plan of one generation, counted from its first step (0).

    Args:
        config: `warmup_steps`, `reset_interval`, `reset_steps`, `sample_ratio` and `ratio_schedule` are read.
    """

    def __init__(self, config: RASConfig) -> None:
        self.config = config
        self._counts = lru_cache(maxsize=64)(self._plan)

    def kind(self, step: int) -> Kind:
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

    def ratio(self, step: int, num_steps: int | None = None) -> float:
        """Share of tokens that sparse step `step` of `num_steps` should compute, in (0, 1].

        "linear" falls from `sample_ratio` + d to `sample_ratio` - d in at most four levels, with the same mean over
        the run's sparse steps; d = min(1 - ratio, ratio / 2) keeps every level in (0, 1].

        Raises:
            ConfigError: "linear" without a known number of steps.
        """
        mean = self.config.ratio
        if self.config.ratio_schedule == "constant":
            return mean
        groups = self._groups(num_steps)
        reach = min(1 - mean, mean / 2)
        total = sum(len(group) for group in groups)
        # the mean of the line's values over a group is the line's value at the group's middle
        done = 0
        for group in groups:
            if step <= group[-1] or group is groups[-1]:
                middle = (done + len(group) / 2) / total
                return mean + reach * (1 - 2 * middle)
            done += len(group)
        return mean

    def active(self, step: int, tokens: int, num_steps: int | None = None) -> int:
        """Active rows of sparse step `step`, in 1..`tokens`: a multiple that suits the hardware when there are many.

        Raises:
            ConfigError: "linear" without a known number of steps.
        """
        if self.config.ratio == 1.0:
            return tokens
        if self.config.ratio_schedule == "constant":
            return _rounded(self.config.ratio * tokens, tokens)
        groups = self._groups(num_steps)
        counts = self._counts(tokens, num_steps)
        return next((count for group, count in zip(groups, counts, strict=True) if step <= group[-1]), counts[-1])

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
                self._groups(None)
        elif not any(self.kind(step) == "sparse" for step in range(num_steps)):
            warn_once(
                f"ras_compile: none of the {num_steps} steps can be sparse with warmup_steps="
                f"{self.config.warmup_steps}; every step runs dense. Lower warmup_steps or take more steps."
            )

    def _groups(self, num_steps: int | None) -> list[list[int]]:
        """The run's sparse steps in at most four runs of nearly equal length."""
        if num_steps is None:
            raise ConfigError(
                "option ratio_schedule='linear' needs the number of steps: use ras_compile.attach(pipe, ...) or "
                "ras_compile.generation(num_steps=...)."
            )
        sparse = [step for step in range(num_steps) if self.kind(step) == "sparse"] or [num_steps]
        groups = min(LEVELS, len(sparse))
        edges = [len(sparse) * group // groups for group in range(groups + 1)]
        return [sparse[low:high] for low, high in zip(edges, edges[1:], strict=False)]

    def _plan(self, tokens: int, num_steps: int | None) -> list[int]:
        """One count per group; what rounding takes from one group the next gets back, so that the sum stays right."""
        counts, owed = [], 0.0
        for group in self._groups(num_steps):
            wanted = self.ratio(group[0], num_steps) * tokens * len(group) + owed
            counts.append(_rounded(wanted / len(group), tokens))
            owed = wanted - counts[-1] * len(group)
        return counts


def _rounded(wanted: float, tokens: int) -> int:
    """`wanted` rows as a multiple of 64, 32, 16 or 8 where that moves the ratio by less than 1 %."""
    multiple = next((m for m in (64, 32, 16, 8) if tokens >= 64 * m), 1)
    return max(min(round(wanted / multiple) * multiple, tokens), min(multiple, tokens))
