"""What inactive tokens return instead of the noise that was last computed for them (`noise_reuse`). On the device.

"linear" and "forecast" act on what the model returns (as a velocity, see `velocity.py`), one :class:`Extrapolation` for each
guidance branch. "x0" acts on what the scheduler gets, after guidance, where signs and scales are known: one :class:`CleanSample`
for each run.
The caches of the programs know of none of them: they keep what was computed last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DECAY = 0.8  # a step; of what is known of the line
_LEAST = 1e-30  # of the sum that is divided by


def active_tokens(rows: Tensor, tokens: int) -> Tensor:
    """Which tokens are active: bool [B, N] from rows [B, A]."""
    return torch.zeros(len(rows), tokens, dtype=torch.bool, device=rows.device).scatter_(1, rows, True)


def continued(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(returned, slope, since, sums)``: one call of :class:`Extrapolation`, as a pure function.

    Args:
        given: noise [B, N, P, C], that of inactive tokens as last computed; the same at the call before; the slope of each
            token's line, float32 [B, N, P, C]; when each token was computed, float64 [B, N, 1, 1]; sums over the tokens
            computed so far, float32 [2, B]: their change times the line's, and the line's squared; the active tokens,
            bool [B, N, 1, 1]; the time now, float64 [B] or [1]; and whether the line is followed only as far as it has
            come true.
    """
    noise, last, slope, since, sums, computed, now, fitted = given
    now = now.reshape(-1, 1, 1, 1)
    passed = now - since
    moved = computed & (passed != 0)
    change = noise.float() - last.float()
    line = slope * passed.float()
    share = torch.ones((), device=noise.device)
    if fitted:
        products = torch.stack([change * line, line * line]).nan_to_num(0.0, 0.0, 0.0)
        sums = DECAY * sums + torch.where(moved, products, 0.0).sum((2, 3, 4))
        share = (sums[0] / sums[1].clamp_min(_LEAST)).clamp(0, 1).reshape(-1, 1, 1, 1)
    ahead = noise + (share * line).to(noise.dtype)  # where nothing is added, the very noise
    found = change * torch.where(passed == 0, 0.0, 1 / passed).float()
    slope = torch.where(moved, found.nan_to_num(0.0, 0.0, 0.0), slope)
    return torch.where(computed, noise, ahead), slope, torch.where(computed, now, since), sums


class Extrapolation:
    """The line through each token's last two computed noises, continued to the present time.

    For a token computed at times s and t, `noise(u) = n_t + alpha * (n_t - n_s) / (t - s) * (u - t)`; until it has been
    computed twice, and while time stands still, it holds n_t. Time is the scheduler's timestep where it is known exactly:
    the noise changes with the noise level, and the steps of shifted schedules are far from equal in it. Else it is the
    step's number.

    "linear" follows the whole line, alpha = 1, and overshoots where a token has not been computed for long. "forecast" measures
    the line: at each token that a step computes, what came meets what the line would have said, and alpha, one for each
    sample and step, is the least squares fit of the one by the other, within [0, 1]:

        alpha = sum_i <change_i, line_i> / sum_i <line_i, line_i>

    over all tokens that were computed up to now, those of each step before weighing `DECAY` times as much as the next
    one's. Where lines tell nothing of the noise, alpha is near 0, and tokens hold their noise.

    Args:
        fitted: "forecast" rather than "linear".
        run: what runs :func:`continued`, given its tensors as a list.
    """

    def __init__(
        self, fitted: bool = False, run: Callable[[Sequence[Tensor], bool], Sequence[Tensor]] | None = None
    ) -> None:
        self._fitted = fitted
        self._run = run or (lambda tensors, fitted: continued(*tensors, fitted))
        self._last: Tensor | None = None  # [B, N, P, C], as computed
        self._line: list[Tensor] = []  # slope, since and sums

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
        now = torch.as_tensor(time, dtype=torch.float64, device=noise.device).reshape(-1)
        last, self._last = self._last, noise.clone()
        if last is None:
            since = now.reshape(-1, 1, 1, 1).repeat(batch // len(now), tokens, 1, 1)
            slope = torch.zeros_like(self._last, dtype=torch.float32)
            self._line = [slope, since, torch.zeros(2, batch, device=noise.device)]
            return noise
        if rows is None:
            computed = torch.ones(batch, tokens, dtype=torch.bool, device=noise.device)
        else:
            computed = active_tokens(rows, tokens)
        returned, *self._line = self._run([noise, last, *self._line, computed[..., None, None], now], self._fitted)
        return noise if rows is None else returned


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
