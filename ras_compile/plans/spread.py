"""A latent that every process has whole, and of which each computes its shard; the noise that it returns is gathered.

What is made of the noise behind the model, such as a forecast of inactive tokens, each process makes of its own tokens. The others
have to get it: a scheduler steps the whole latent in every process, and all of them have to hold the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ras_compile.passes.algebra.layout import Frame, Group
from ras_compile.passes.algebra.tokens import TokenView

c10d = torch.ops._c10d_functional


def largest(group: Group | None, numbers: Sequence[int], device: torch.device) -> list[int]:
    """Of several numbers the largest that any process of a group has found, for all of them; read from the device.

    What a process sees of its own tokens may differ from what the others see. Where that decides about a step, all of them
    have to decide the same: the next exchange would hang otherwise.

    Args:
        group: the processes; None: this one alone.
        numbers: what this process has found.
        device: where its tokens are.
    """
    if group is None:
        return list(numbers)
    found = c10d.all_reduce(torch.tensor(numbers, device=device), "max", group.name)
    return c10d.wait_tensor(found).tolist()


class Spread:
    """The tokens of all processes, where they share a latent."""

    def __init__(self, frame: Frame, latent: TokenView, noise: TokenView) -> None:
        assert frame.shards is not None
        self._group: Group = frame.shards
        self._tokens, self._noise = frame.tokens, noise
        self.view = latent.everyone

    def share(self, noise: Tensor) -> None:
        """Writes what each process has made of its own tokens' noise into that of all."""
        every = self.gathered(self._noise(noise)).movedim(0, 1).flatten(1, 2)
        self._noise.everyone.write(noise, every)

    def rows(self, rows: Tensor) -> Tensor:
        """The active rows of all processes among the tokens of the whole latent, [B, n A], from this one's [B, A]."""
        every = self.gathered(rows)
        first = torch.arange(self._group.size, device=rows.device).reshape(-1, 1, 1) * self._tokens
        return (every + first).movedim(0, 1).flatten(1)

    def gathered(self, value: Tensor) -> Tensor:
        sent = c10d.all_gather_into_tensor(value.contiguous(), self._group.size, self._group.name)
        return c10d.wait_tensor(sent).reshape(self._group.size, *value.shape)
