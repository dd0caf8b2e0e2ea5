"""What the last generation of an attached pipeline did and saved: `handle.summary()`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from math import isfinite
from statistics import median

from torch import Tensor

from ras_compile.config import RASConfig
from ras_compile.explanation import SplicePoint, points_of
from ras_compile.history import Past, Record
from ras_compile.kernels.fallbacks import Fallback
from ras_compile.notices import MethodModule, slower
from ras_compile.plans.plan import Plan

sys.modules[__name__].__class__ = MethodModule
# Reasons for a dense step that the options ask for.
_PLANNED = ("", "warm-up", "error reset")


@dataclass(frozen=True)
class Step:
    """One step of a generation.

    Attributes:
        number: from 0.
        kind: "sparse" if any call of the step was.
        active: tokens that were computed, of those of one picture.
        tokens: N, tokens of one picture; 0 where the model was refused, so that none are known.
        rows: the tokens that were computed, of the first picture: int64 [active] on the device; None in a dense step.
        reason: why a step that could have been sparse was dense.
        flops: floating-point operations of the transformer in this step; None where nobody counted them.
        dense_flops: those that it would have cost with all tokens.
        seconds: how long it took, compilation included; None where no scheduler was followed.
        compiled: seconds of it that went into compilation.
        change: how far the predicted noise is from that of the step before, over its size; None where unknown, not a number
            where one of the two is none.
    """

    number: int
    kind: str
    active: int
    tokens: int
    rows: Tensor | None
    reason: str = ""
    flops: float | None = None
    dense_flops: float | None = None
    seconds: float | None = None
    compiled: float = 0.0
    change: float | None = None

    @property
    def like(self) -> tuple[str, int]:
        """Equal for steps that do the same work."""
        return self.kind, self.active

    @property
    def share(self) -> float:
        """Share of the tokens that were computed."""
        return self.active / self.tokens if self.tokens else 1.0


@dataclass(frozen=True)
class Summary:
    """What one generation did. ``str()`` is a sentence or two; notebooks show a table with a bar for each step.

    Attributes:
        steps: its steps; empty before the first generation.
        grid: extent of the token grid; empty where it is unknown.
        config: the options.
        cache_bytes: what the transformers keep, on the device or in the host's memory (`cache_device`).
        splices: values that are made whole from caches and active rows, with the user's source lines.
        fallbacks: what this process has done in a slower way so far, because the faster one failed; refused models left out.
        exchanged: the name of a transformer in whose place another one has worked since, whose steps are not told here.
        passed: model calls that never reached the backend, and are not told either.
    """

    steps: tuple[Step, ...] = ()
    grid: tuple[int, ...] = ()
    config: RASConfig = RASConfig()
    cache_bytes: int = 0
    splices: tuple[SplicePoint, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    exchanged: str = ""
    passed: int = 0

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps, compilation included; None where no scheduler was followed."""
        return _sum([step.seconds for step in self.steps])

    @property
    def compiled(self) -> float:
        """Seconds that went into capture and compilation: what those steps took beyond others like them, if there are any."""
        usual = self._usual()
        return sum(
            max(step.compiled, (step.seconds or 0.0) - median(usual[step.like] or [step.seconds or 0.0]))
            for step in self.steps
            if step.compiled
        )

    @property
    def flop_speedup(self) -> float | None:
        """FLOPs that dense steps would have cost over those of this generation; None where they are unknown."""
        spent, dense = _sum([step.flops for step in self.steps]), _sum([step.dense_flops for step in self.steps])
        return dense / spent if spent and dense else None

    @property
    def speedup(self) -> float | None:
        """The time of as many dense steps over that of these steps, compilation left out on both sides.

        A step counts with the median of those like it that compiled nothing. None where some kind of step has none of
        these, as in a generation that compiles a program for its last step, or where no scheduler was followed.
        """
        times = self._usual()
        dense = [seconds for (kind, _), found in times.items() if kind == "dense" for seconds in found]
        if not dense or not all(times.values()):
            return None
        return len(self.steps) * median(dense) / sum(median(times[step.like]) for step in self.steps)

    def _usual(self) -> dict[tuple[str, int], list[float]]:
        """Seconds of the steps that compiled nothing, those that do the same work together."""
        times: dict[tuple[str, int], list[float]] = {step.like: [] for step in self.steps}
        for step in self.steps:
            if step.seconds is not None and not step.compiled:
                times[step.like].append(step.seconds)
        return times

    def __str__(self) -> str:
        if not self.steps and not self.exchanged and not self.passed:
            return "no picture yet: call the pipeline, then ask again"
        count = f"{len(self.steps)} step{'s' * (len(self.steps) > 1)}"
        told = f"{count}{self._took}: {self._kinds}" if self.steps else "no step of this picture is known"
        lines = ["; ".join([told, *self._parts])]
        lines += [f"not as planned: {line}" for line in self.unplanned]
        return "\n".join(lines)

    @property
    def unplanned(self) -> list[str]:
        """What went otherwise than the options ask for, a sentence each."""
        lines = [
            f"{_steps([step.number for step in steps])} dense: {reason}"
            for reason, steps in _by_reason(self.steps)
            if reason not in _PLANNED
        ]
        if self.exchanged:
            lines.append(
                f"another module took the place of the attached {self.exchanged}: its steps are dense and not told here; "
                "call detach() on the handle, and attach again"
            )
        if self.passed:
            lines.append(
                f"{self.passed} call{'s' * (self.passed > 1)} of a transformer ran past the backend, dense, and are not told here: "
                "torch.compile is disabled, or Dynamo gave up at its recompile limit (run with TORCH_LOGS=recompiles)"
            )
        broken = next((step.number for step in self.steps if not isfinite(step.change or 0.0)), None)
        if broken is not None:
            lines.append(f"the noise is not a number from step {broken} on")
        return lines + [f"in this process so far: {fallback}" for fallback in self.fallbacks]

    @property
    def _took(self) -> str:
        return "" if self.seconds is None else f" in {amount(self.seconds)} s"

    @property
    def _kinds(self) -> str:
        shares = [step.share for step in self.steps if step.kind == "sparse"]
        if not shares:
            return "all dense"
        low, high = percent(min(shares)), percent(max(shares))
        # a reference may still count as picture in the first dense step
        tokens = max(step.tokens for step in self.steps if step.kind == "sparse")
        span = high if low == high else f"{low} to {high}"
        return f"{len(self.steps) - len(shares)} dense, {len(shares)} sparse at {span} % of {tokens:,} tokens"

    @property
    def _parts(self) -> list[str]:
        parts = []
        sparse = any(step.kind == "sparse" for step in self.steps)
        if sparse and (saved := self.flop_speedup) is not None:
            clock = self.speedup
            known = "" if clock is None else f", {clock:.1f}x by the clock"
            parts.append(f"{saved:.1f}x by FLOPs{known} against dense steps")
        if self.cache_bytes:
            parts.append(f"caches {memory(self.cache_bytes)}{self.config.caches_are}")
        if self.compiled:
            at = _list([step.number for step in self.steps if step.compiled])
            again = (
                "; the clock counts once nothing compiles" * (self.speedup is None) if sparse and self.seconds else ""
            )
            parts.append(f"compiled {amount(self.compiled)} s at step {at}{again}")
        return parts

    def _repr_html_(self) -> str:
        text = "<br>".join(map(escape, str(self).splitlines()))
        longest = max((step.seconds or 0 for step in self.steps if not step.compiled), default=0)
        bars = "".join(
            f'<span title="{escape(_told(step))}" style="display:inline-block;width:8px;margin-right:1px;'
            f"height:{_height(step, longest)}px;background:{'#3b6fb6' if step.kind == 'dense' else '#e8833a'}"
            '"></span>'
            for step in self.steps
        )
        return f'<div style="font-family:sans-serif">{text}<div style="margin-top:6px">{bars}</div></div>'


def summarise(
    past: Past,
    config: RASConfig,
    seconds: Sequence[float] = (),
    compiled: Sequence[float] = (),
    changes: Sequence[float | None] = (),
    exchanged: str = "",
    passed: int = 0,
) -> Summary:
    """The summary of a generation."""
    steps = [
        replace(
            _step(number, list(calls)),
            seconds=_at(seconds, number),
            compiled=_at(compiled, number) or 0.0,
            change=_at(changes, number),
        )
        for number, calls in groupby(past.calls, key=lambda call: call[0].step)
    ]
    plan = next((plan for _, plan in past.calls if plan is not None), None)
    return Summary(
        tuple(steps),
        plan.analysis.frame.grid if plan else (),
        config,
        past.cache_bytes,
        points_of(plan) if plan else (),
        slower(),
        exchanged,
        passed,
    )


def _step(number: int, calls: list[tuple[Record, Plan | None]]) -> Step:
    sparse = [record for record, _ in calls if record.kind == "sparse"]
    first = sparse[0] if sparse else calls[0][0]
    tokens = [plan.analysis.frame.tokens for _, plan in calls if plan is not None]
    every = max([*tokens, *(record.active for record, _ in calls if record.kind == "dense")], default=first.active)
    flops: list[float | None] = []
    dense: list[float | None] = []
    for record, plan in calls:
        whole = None if plan is None else float(plan.cost.dense_flops)
        ratio = 1.0 if plan is None or record.kind == "dense" else plan.cost.flop_ratio(record.active)
        dense.append(whole)
        flops.append(None if whole is None else whole * ratio)
    return Step(
        number,
        first.kind,
        first.active,
        every,
        first.rows[0] if first.rows is not None else None,
        first.reason,
        _sum(flops),
        _sum(dense),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _at(values: Sequence[float | None], place: int) -> float | None:
    return values[place] if place < len(values) else None


def _by_reason(steps: Sequence[Step]) -> list[tuple[str, list[Step]]]:
    found: dict[str, list[Step]] = {}
    for step in steps:
        found.setdefault(step.reason if step.kind == "dense" else "", []).append(step)
    return list(found.items())


def _steps(numbers: Sequence[int]) -> str:
    return f"step{'s' * (len(numbers) > 1)} {_list(numbers)}"


def _list(numbers: Sequence[int]) -> str:
    """ "0, 3 to 5 and 8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spans = [f"{first}" if first == last else f"{first} to {last}" for first, last in runs]
    return " and ".join([", ".join(spans[:-1]), spans[-1]] if len(spans) > 1 else spans)


def amount(value: float) -> str:
    """A number as people say it: 46, 3.2, 0.041."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.2g}"


def percent(share: float) -> str:
    """A share in percent, without its sign: 50, 12.5, 6."""
    return f"{100 * share:.3g}"


def memory(count: float) -> str:
    """Bytes as people say them: 1.3 GB, 25 MB, 560 kB."""
    unit, size = next((each for each in (("GB", 1e9), ("MB", 1e6)) if count >= each[1]), ("kB", 1e3))
    return f"{count / size:.2g} {unit}" if count < 10 * size else f"{count / size:,.0f} {unit}"


def _told(step: Step) -> str:
    took = "" if step.seconds is None else f", {1000 * step.seconds:.3g} ms"
    return f"step {step.number}: {step.kind}, {percent(step.share)} %{took}"


def _height(step: Step, longest: float) -> int:
    share = step.share if step.seconds is None or not longest else min(1.0, step.seconds / longest)
    return max(2, round(40 * share))
