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


def continued(*given: Any) -> tuple[Tensor, ...]:
    """``(returned, slope, owed, held, sums, clock)``: one call of :class:`Extrapolation`, as a pure function.

    Args:
        given: noise [B, N, P, C], that of inactive tokens as last computed; the same at the call before; then what is known of
            each token, float32 [B, N, P, C]: the slope of its line, and by how much less it has returned than it should have,
            times how long; float64 [2, B, N, 1, 1]: when it was computed, and the moment of the calls at which it has been
            held since then, how far each was from that time, times how long; float32 [3, B]: sums over the tokens computed
            so far, their change times the line's, the line's squared, and the share of the line that was followed last;
            float64 [2, B]: the time of the call before, and how long after the one before that; the active tokens, bool
            [B, N, 1, 1]; the time now, float64 [B] or [1]; and whether the line is followed only as far as it has come true.
    """
    noise, last, slope, owed, held, sums, clock, computed, now, fitted = given
    since, moment = held
    before, gap = clock.reshape(2, -1, 1, 1, 1)
    now = now.reshape(-1, 1, 1, 1)
    passed, step = now - since, now - before
    moved = computed & (passed != 0)
    change = noise.float() - last.float()
    line = slope * passed.float()
    found = change * torch.where(passed == 0, 0.0, 1 / passed).float()
    found = found.nan_to_num(0.0, 0.0, 0.0)
    share = torch.ones_like(sums[2])
    if fitted:
        # what the call before returned of tokens that it held is what they have had for as long as until now
        waited = before - since
        returned = slope * waited.float() + _paid(owed, moment, gap)
        owed = torch.where(waited != 0, owed - step.float() * sums[2].reshape(-1, 1, 1, 1) * returned, owed)
        moment = moment + step * waited
        owed = torch.where(moved, owed + moment.float() * found, owed)
        moment = torch.where(computed, 0.0, moment)
        products = torch.stack([change * line, line * line]).nan_to_num(0.0, 0.0, 0.0)
        totals = DECAY * sums[:2] + torch.where(moved, products, 0.0).sum((2, 3, 4))
        share = (totals[0] / totals[1].clamp_min(_LEAST)).clamp(0, 1)
        sums = torch.stack([*totals, share])
        line = line + _paid(owed, moment, step)
    ahead = noise + (share.reshape(-1, 1, 1, 1) * line).to(noise.dtype)  # where nothing is added, the very noise
    slope = torch.where(moved, found, slope)
    held = torch.stack([torch.where(computed, now, since), moment])
    clock = torch.stack([now.flatten().expand(clock.shape[1]), step.flatten()])
    return torch.where(computed, noise, ahead), slope, owed, held, sums, clock


def _paid(owed: Tensor, moment: Tensor, step: Tensor) -> Tensor:
    """What a token that has just begun to be held returns beside its line, in a call that counts for as long as `step`."""
    return owed * torch.where((moment == 0) & (step != 0), 1 / step, 0.0).float()


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

    What a forecast gets wrong has a direction, and would add up: a token that bends away from its line lags in the same way each
    time that it is held. So "forecast" keeps account. Once a token is computed again, the line between its two computed noises
    says what it should have returned in the calls between, each for as long as until the next call; what is missing is returned in
    the next call that holds the token, alpha times:

        owed = sum_k (u_(k+1) - u_k) * (n_s + (n_t - n_s) / (t - s) * (u_k - s) - returned_k)
        returned = n_t + alpha * ((n_t - n_s) / (t - s) * (u - t) + owed / (u - the time of the call before))

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
        self._line: list[Tensor] = []  # slope, owed, held, sums and clock

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
            since = now.repeat(batch // len(now))
            slope = torch.zeros_like(self._last, dtype=torch.float32)
            held = torch.stack([since, torch.zeros_like(since)])
            clock = held.clone()
            held = held.reshape(2, batch, 1, 1, 1).repeat(1, 1, tokens, 1, 1)
            self._line = [slope, slope.clone(), held, torch.zeros(3, batch, device=noise.device), clock]
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
