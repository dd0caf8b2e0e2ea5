"""Drift: how far a token's noise, held since it was last computed, should be off by now. On the device, without a host read.

Where token i is computed at step t, and was last computed at step s, one number is learned of it:

    rate_i = std_c(n_i(t) - n_i(s)) / (t - s)          mean over the pixels of a patch; c: channels
    R_i = (rate_i + 0.05 * mean_j(rate_j)) * (age_i + 1)   age_i: steps since it was computed

R is the form of eq. 1 of RAS (arXiv 2502.10389), a metric times a factor that grows with each drop; the metric is of this
project. What a token's noise says by itself (`metric="std"`, the paper's) tells little about how much it will change; its
last change tells most of it. The second factor keeps tokens from starving, and the mean in the first one those whose
rate was once near nothing.

n is the prediction in the form in which settled tokens keep it, where a scheduler tells that: see `velocity.py`.

What a branch remembers between its calls is a :class:`Drift`: the noise that the next change is measured from, and `state`
[2, B, N], float32: rates, and gaps, which are the steps from a token's last computation to the branch's latest call. A gap
is negative where that call did not compute the token. A rate that is not known (of a token computed once, or of a noise that
is not a number) is `UNKNOWN`, and counts as the highest of its sample: such a token is computed soon, and never waits for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ras_compile.passes.algebra.tokens import TokenView

FLOOR = 0.05  # of the mean rate, beside a token's own
UNKNOWN = -1.0
_LARGEST = 1e30  # of a rate; beyond, sums would overflow


@dataclass(eq=False)
class Drift:
    """What a branch remembers."""

    last: Tensor  # the noise that changes are measured from, shaped like what the branch returns
    state: Tensor  # [2, B, N], float32: rates and gaps, see above
    view: TokenView | None  # makes what the branch returns [B, N, P, C], if it is not yet
    step: int  # the step that the gaps lead up to
    pending: bool = True  # the branch was called in that step, and its noise has not been compared with `last` yet

    @classmethod
    def begun(cls, noise: Tensor, view: TokenView | None, batch: int, tokens: int, step: int) -> Drift:
        """What is known after the first call: nothing. A gap of 0 makes the rate that :func:`learned` finds unknown."""
        state = torch.zeros(2, batch, tokens, device=noise.device)
        state[0] = UNKNOWN
        return cls(noise, state, view, step)


def spread(noise: Tensor) -> Tensor:
    """Standard deviation over C, mean over P, of [B, N, P, C]: float32 [B, N]. Of one channel it is taken over P."""
    batch, tokens, pixels, channels = noise.shape
    values = noise.float() if channels > 1 else noise.float().reshape(batch, tokens, 1, pixels)
    return values.std(dim=-1, correction=0).mean(dim=-1)


def learned(noise: Tensor, last: Tensor, state: Tensor, view: TokenView | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(last, rates [B, N], ages [B, N])`` after a call.

    Args:
        noise: what the call returned; [B, N, P, C], or what becomes that through ``view``.
        last: the noise before.
        state: see above.
        view: see ``noise``.
    """
    rates, gaps = state
    change = (view(noise) if view else noise).float() - (view(last) if view else last).float()
    found = spread(change) / gaps
    found = torch.where(found < _LARGEST, found, UNKNOWN)  # neither is what is not a number
    computed = gaps >= 0
    rates = torch.where(computed, found, rates)
    return noise.nan_to_num(0.0, 0.0, 0.0), rates, torch.where(computed, 0.0, -gaps)


def expected(rates: Tensor, ages: Tensor) -> Tensor:
    """R [B, N], positive: what the noise of each token should be off by if it is not computed in the next step."""
    highest = rates.amax(dim=1, keepdim=True)
    highest = torch.where(highest < 0, 1.0, highest)
    rates = torch.where(rates < 0, highest, rates)
    # where nothing changes at all, age alone decides
    floor = FLOOR * rates.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
    return (rates + floor) * (ages + 1)
