"""One model call, as `ras_compile.trace` tells it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ras_compile.sampling.inference import read_time
from ras_compile.sampling.schedule import Kind


@dataclass(frozen=True, repr=False)
class Record:
    """One model call; prints as one line.

    Args:
        step: step of the generation, from 0.
        branch: the guidance branch: the name that somebody gave it, or its number.
        kind: "dense" or "sparse".
        active: active rows per sample; all tokens in a dense step, and 0 where the model was refused, so that none are known.
        rows: the active rows, int64 [B, active] on the device, or None in a dense step. Kept as it is until it is read.
        transformer: the pipeline's name for the transformer, else "transformer".
        reason: why a step that could have been sparse ran dense; empty otherwise.
        raw_timestep: the call's timestep as it was passed.
        serial: place among all calls of the process.
    """

    step: int
    branch: str
    kind: Kind
    active: int
    rows: Tensor | None
    transformer: str
    reason: str
    raw_timestep: Any
    serial: int = field(default_factory=itertools.count().__next__)

    def __repr__(self) -> str:
        why = f" because {self.reason}" if self.reason else ""
        return f"<step {self.step}, {self.transformer}, branch {self.branch}: {self.kind}, {self.active} tokens{why}>"

    @property
    def timestep(self) -> float | None:
        """The call's time; per-token timesteps reduced by max. Reading a tensor's on CUDA waits for the device."""
        return read_time(self.raw_timestep)
