"""All of diffusers that is used here and that diffusers does not promise to keep: one function for each thing, in this file alone.

`tests/pipelines/test_diffusers_canaries.py` holds each of them to what is relied on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def begin_step(scheduler: Any, timestep: Any) -> None:
    """Let a scheduler find the present entry of its `sigmas`, as its `step` does; without it `x0` reuse has no first step."""
    scheduler._init_step_index(timestep)


def alpha_and_sigma(scheduler: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of `sample = alpha * x0 + sigma * noise` for an entry of `sigmas`; without it `x0` reuse is wrong."""
    return scheduler._sigma_to_alpha_sigma_t(sigma)
