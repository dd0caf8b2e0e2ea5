"""What inactive tokens return instead of the noise that was last computed for them (`noise_reuse`). On the device.

"linear" acts on what the model returns, one :class:`Extrapolation` for each guidance branch. "x0" acts on what the
scheduler gets, after guidance, where signs and scales are known: one :class:`CleanSample` for each run.
The caches of the programs know of neither: they keep what was computed last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["CleanSample", "Extrapolation", "active_tokens"]


def active_tokens(rows: Tensor, tokens: int) -> Tensor:
    """Which tokens are active: bool [B, N] from rows [B, A]."""
    return torch.zeros(len(rows), tokens, dtype=torch.bool, device=rows.device).scatter_(1, rows, True)


class Extrapolation:
    """The line through each token's last two computed noises, continued to the present time.

    For a token computed at times s and t, `noise(u) = n_t + (n_t - n_s) / (t - s) * (u - t)`; until it has been computed
    twice, and while time stands still, it holds n_t. Time is the scheduler's timestep where it is known exactly: the
    noise changes with the noise level, and the steps of shifted schedules are far from equal in it. Else it is the
    step's number.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None  # [B, N, P, C], as computed
        self._slope: Tensor | None = None  # [B, N, P, C], float32
        self._since: Tensor | None = None  # [B, N, 1, 1], float64

    def __call__(self, noise: Tensor, rows: Tensor | None, time: Any) -> Tensor:
        """Take what a call computed and return what its tokens are to return.

        Args:
            noise: [B, N, P, C], that of inactive tokens as last computed.
            rows: the active rows [B, A]; None after a dense call.
            time: a number, or a tensor with one value for all samples or one for each.

        Returns:
            [B, N, P, C]; `noise` itself after a dense call.
        """
        batch, tokens = noise.shape[:2]
        now = torch.as_tensor(time, dtype=torch.float64, device=noise.device).reshape(-1, 1, 1, 1)
        now = now.expand(batch, tokens, 1, 1)
        if self._last is None or self._slope is None or self._since is None:
            self._last, self._since = noise.clone(), now
            self._slope = torch.zeros_like(noise, dtype=torch.float32)
            return noise
        passed = now - self._since
        inverse = torch.where(passed == 0, 0.0, 1 / passed)
        slope = (noise.float() - self._last.float()) * inverse.float()
        moved = passed != 0
        if rows is None:
            self._last, self._slope, self._since = noise.clone(), torch.where(moved, slope, self._slope), now
            return noise
        active = active_tokens(rows, tokens)[..., None, None]
        ahead = noise.float() + self._slope * passed.float()
        self._slope = torch.where(active & moved, slope, self._slope)
        self._last = noise.clone()
        self._since = torch.where(active, now, self._since)
        return torch.where(active, noise, ahead.to(noise.dtype))


class CleanSample:
    """The clean sample x0 that each entry's last computed prediction implies, held while its token is inactive.

    With `x0 = a * sample + b * prediction` (a and b belong to the step, see `samplers.py`), the prediction of an
    inactive token is the one that implies the same x0 from its present sample: `(x0 - a * sample) / b`. A sampler that
    adds fresh noise at each step has that noise in the sample, so an inactive token's prediction follows it, while
    one that is held would leave it in the picture. Along deterministic Euler steps of a flow the two are the same.
    """

    def __init__(self) -> None:
        self._clean: Tensor | None = None

    def __call__(self, prediction: Tensor, sample: Tensor, active: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """The prediction with which the scheduler steps.

        Args:
            prediction: what the pipeline made of the model's outputs, shaped like `sample`.
            sample: the noisy sample that the scheduler steps.
            active: bool, broadcasts to `sample`: what was computed in this step; None: everything.
            a, b: 0-d; b is not 0.
        """
        noisy, predicted = sample.float(), prediction.float()
        clean = a * noisy + b * predicted
        if active is None or self._clean is None or self._clean.shape != clean.shape:
            self._clean = clean
            return prediction
        self._clean = torch.where(active, clean, self._clean)
        return torch.where(active, prediction, ((self._clean - a * noisy) / b).to(prediction.dtype))
