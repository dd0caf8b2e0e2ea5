"""Caches that go on between dense steps (`cache_reuse="forecast"`), on the device, without a read from it.

Active tokens attend to keys and values that the last dense step left behind, and these get old. A dense step tells where
each cache went since the dense step before, so before a sparse step all caches go on along that line:

    slope  =  (cache at dense step t - cache at dense step s) / (t - s)
    cache  += GAIN * slope * (steps since the branch's last call)

The rows that a sparse step computes are put where they belong by its splices, and go on from there. What the model returns is
a cache, too, and stays: `noise_reuse` is about that one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ras_compile._torch import add_tensors, memory_key, scale_tensors

SLOPES = "slopes"  # their place among what a branch keeps
# The share of the line that is followed: with it three trained models came up to 2.7 dB nearer to the exact picture, and none
# lost more than 0.1 dB (28 steps, every second one dense, float32; lines through the very values of dense steps).
GAIN = 0.75


class Slopes:
    """The lines of one branch's caches, in one more copy of them, which is made at its second dense call.

    Attributes:
        step: the step of the call that is about to run; who decides about the call says it.
    """

    def __init__(self) -> None:
        self.step = 0
        self._last = self._dense = -1  # the steps of the last call, and of the last dense one; -1: there was none
        self._ahead = 0.0  # how many times their slope caches have gone on by since the last dense call
        self._places: list[int] = []  # of those among all caches
        self._values: list[Tensor] = []

    @property
    def bytes(self) -> int:
        """Bytes of the copy."""
        return sum(value.nbytes for value in self._values)

    @torch.inference_mode()  # there tensors of all modes may be written
    def go_on(self, caches: Sequence[Tensor]) -> None:
        """Moves the caches to where a sparse call is to find them."""
        share, self._last = GAIN * (self.step - self._last), self.step
        if self._values and share:
            add_tensors(self._of(caches), self._values, alpha=share)
            self._ahead += share

    @torch.inference_mode()
    def remember(self, caches: Sequence[Tensor] | None, returned: Collection[int]) -> None:
        """Takes what the last dense call left, before another one may write into the same memory.

        A row that was computed since then is taken as if it had gone on along the line to its present value.

        Args:
            caches: those of the branch; None before its first call.
            returned: which of them hold what the model returns.
        """
        if caches is None or self._dense in (-1, self.step):
            return
        if self._values:
            scale_tensors(self._values, -self._ahead)
            add_tensors(self._values, self._of(caches))
        else:
            self._places = _apart(caches, returned)
            self._values = [cache.clone() for cache in self._of(caches)]

    @torch.inference_mode()
    def compare(self, caches: Sequence[Tensor]) -> None:
        """Makes slopes of what was remembered and what a dense call has left now."""
        if self._values and self.step != self._dense:
            add_tensors(self._values, self._of(caches), alpha=-1)
            scale_tensors(self._values, 1 / (self._dense - self.step))  # where nothing changed -0, which changes no bit
        self._last = self._dense = self.step
        self._ahead = 0.0

    def _of(self, caches: Sequence[Tensor]) -> list[Tensor]:
        return [caches[place] for place in self._places]


def _apart(caches: Sequence[Tensor], returned: Collection[int]) -> list[int]:
    """The caches that go on: numbers in 16 bits or more, none of them returned, and no memory twice.

    Two caches may be views of one value, and what is returned may be a view of a cache.
    """
    taken: dict[int, list[Tensor]] = {}
    for place in returned:
        taken.setdefault(memory_key(caches[place]), []).append(caches[place])
    found = []
    for place, cache in enumerate(caches):
        beside = taken.setdefault(memory_key(cache), [])
        if (
            place not in returned
            and cache.is_floating_point()
            and cache.element_size() > 1
            and all(disjoint(cache, other) for other in beside)
        ):
            beside.append(cache)
            found.append(place)
    return found


def disjoint(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in one memory have no entry in common; False in doubt.

    Keys and values may be parts of one product: the rows of both alternate with the same period. So each stride is tried for
    a period: if it divides all larger strides, an entry's place within the period depends on the smaller ones alone.
    """
    strides = [[(size, step) for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (one, other)]
    apart = other.storage_offset() - one.storage_offset()
    for period in sorted({step for part in strides for _, step in part if step}, reverse=True):
        if any(step % period for part in strides for _, step in part if step > period):
            continue
        first, second = (1 + sum((size - 1) * step for size, step in part if step < period) for part in strides)
        if first <= apart % period <= period - second:
            return True
    first, second = (1 + sum((size - 1) * step for size, step in part) for part in strides)
    return apart >= first or -apart >= second
