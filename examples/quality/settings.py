"""The settings of the tables: which ways of sampling stand beside which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = (3, 4, 5, 7, 10, 14, 20, 28)  # of the dense baselines
REFERENCE_STEPS, EXACT_STEPS = 28, 200


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        method: "dense" or "RAS".
        steps: steps of the scheduler.
        sampler: "euler", "even", "unipc" or "dpm++" (`sampler.scheduler_of`).
        options: of `ras_compile.attach`, where the method is RAS.
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
        return self.options.get("sample_ratio", 1.0)

    @property
    def key(self) -> str:
        """Names the row."""
        share = f" {self.ratio:.1%}" if self.method == "RAS" else ""
        sampler = f" {self.sampler}" if self.sampler != "euler" else ""
        variant = f", {self.variant}" if self.variant != "default" else ""
        return f"{self.method}{share}{sampler}, {self.steps} steps{variant}"


def ras(steps: int, ratio: float, variant: str = "default", default: str = "", **options: Any) -> Setting:
    """Region-adaptive sampling; dense for the first four steps, or for fewer where it says so."""
    return Setting("RAS", steps, options=dict(sample_ratio=ratio, **options), variant=variant, default=default)


def table_a() -> list[Setting]:
    """Quality against cost: fewer steps, better solvers, and region-adaptive sampling (paper, table 2)."""
    dense = [Setting("dense", steps) for steps in reversed(STEPS)]
    solvers = [Setting("dense", steps, name) for name in ("even", "unipc", "dpm++") for steps in STEPS if steps <= 14]
    adaptive = []
    for ratio in (0.5, 0.25, 0.125, 0.75):
        adaptive += [ras(steps, ratio) for steps in (28, 20, 14, 10, 7)]
        # four dense steps are most of so short a run
        adaptive += [ras(steps, ratio, "2 dense steps first", warmup_steps=2) for steps in (10, 7)]
    return dense + adaptive + solvers


def settings(table: str) -> list[Setting]:
    """The settings of table "a".

    Raises:
        ValueError: no such table.
    """
    tables = {"a": table_a}
    if table not in tables:
        raise ValueError(f"table {table!r} is not one of {', '.join(tables)}")
    return tables[table]()
