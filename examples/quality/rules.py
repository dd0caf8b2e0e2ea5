"""Other rules for which tokens a step computes: metrics that remember, as `metric=` takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ras_compile.sampling.selection import FLOOR, UNKNOWN, SelectionInfo, expected, learned

__all__ = ["Changes", "Drift", "Heterogeneous", "Unaged"]


class Changes:
    """What each token's noise changed by when it was last computed, and how long ago that was.

    A metric is told the noise after each step, in which a token that was not computed has its old one.
    """

    def __init__(self) -> None:
        self._kept: dict[torch.Size, tuple[int, Tensor, Tensor, Tensor]] = {}

    def seen(self, noise: Tensor, info: SelectionInfo) -> tuple[Tensor, Tensor]:
        """Rates of change a step and ages in steps, float32 [b, n], after a step with noise [b, n, c]."""
        step, last, rates, ages = self._kept.get(noise.shape, (info.step, noise, noise, noise))
        if info.step <= step:  # the first step of a run
            rates = torch.full(noise.shape[:2], UNKNOWN, device=noise.device)
            last, ages = noise.clone(), torch.zeros_like(rates)
        else:
            ages = ages + (info.step - step)
            gaps = torch.where((noise != last).any(-1), ages, -ages)
            last, rates, ages = learned(noise[:, :, None], last[:, :, None], torch.stack([rates, gaps]), None)
            last = last[:, :, 0].clone()
        self._kept[noise.shape] = info.step, last, rates, ages
        return rates, ages


class Unaged(Changes):
    """Drift without its factor of age: the rate of change alone, so that what changed little once is never seen again."""

    def __call__(self, noise: Tensor, info: SelectionInfo) -> Tensor:
        """The metric [b, n] of noise [b, n, c]."""
        rates, ages = self.seen(noise, info)
        return expected(rates, torch.zeros_like(ages))


class Drift(Changes):
    """Drift with another floor or another power of age.

    Args:
        floor: of the mean rate, beside a token's own.
        power: of the steps since a token was computed, and one.
    """

    def __init__(self, floor: float = FLOOR, power: float = 1.0) -> None:
        super().__init__()
        self._floor, self._power = floor, power

    def __call__(self, noise: Tensor, info: SelectionInfo) -> Tensor:
        """The metric [b, n] of noise [b, n, c]."""
        rates, ages = self.seen(noise, info)
        rates = torch.where(rates < 0, rates.amax(1, keepdim=True).clamp_min(0), rates)
        return (rates + self._floor * rates.mean(1, keepdim=True)) * (ages + 1) ** self._power


class Heterogeneous(Changes):
    """Heterogeneous step allocation (arXiv 2605.06892): each token has a divisor, and its turn comes by that.

    A quarter of the tokens, those whose noise changed most when it was last computed, is due in each step, the next
    quarter in every second, the rest in every fourth: the metric is the steps since a token was computed over its divisor.
    Between its turns a token goes on with the noise that it has, as their cached Euler update, and keys and values are
    kept in step by the compiled program. How their paper groups tokens is known to us by summaries of it alone.
    """

    DIVISORS = (1, 2, 4, 4)  # of the quarters

    def __call__(self, noise: Tensor, info: SelectionInfo) -> Tensor:
        """The metric [b, n] of noise [b, n, c]."""
        rates, ages = self.seen(noise, info)
        rank = rates.argsort(-1, descending=True).argsort(-1)  # 0 is the token that changed most
        divisors = torch.tensor(self.DIVISORS, device=noise.device)[rank * len(self.DIVISORS) // noise.shape[1]]
        return (ages + 1) / divisors
