"""From the tokens of a model's latent to the sample that the scheduler steps, and back.

The two have the same dimensions. Guidance repeats the sample along the batch, the latent may have more channels (a mask
beside the noise), and tokens of reference pictures beside those of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ras_compile.passes.algebra.tokens import TokenView


class SampleMap:
    """Made by :func:`sample_map`."""

    def __init__(self, view: TokenView, latent: Sequence[int], sample: Sequence[int]) -> None:
        self._view, self._latent, self._sample = view, tuple(latent), tuple(sample)
        self._channels = [dim for dim in range(1, len(self._latent)) if dim not in view.token_dims]

    def to_sample(self, tokens: Tensor) -> Tensor:
        """Bool [B, N] as a mask that broadcasts to the sample; of a batch that guidance repeats, its first copy."""
        mask = torch.zeros(self._latent, dtype=torch.bool, device=tokens.device)
        self._view.write(mask, tokens[..., None, None].expand_as(self._view(mask)))
        mask = self._view.cut(mask)
        for dim in self._channels:
            mask = mask.narrow(dim, 0, 1)
        return mask[: self._sample[0]]

    def to_tokens(self, mask: Tensor) -> Tensor:
        """Which tokens a mask [of the sample's shape] covers, each pixel in one channel at least: bool [B, N]."""
        for dim in self._channels:
            mask = mask.any(dim, keepdim=True)
        mask = mask.repeat(self._latent[0] // self._sample[0], *[1] * (mask.dim() - 1))
        whole = torch.zeros(self._latent, dtype=torch.bool, device=mask.device)
        covered = self._view.cut(whole)
        covered.copy_(mask.expand_as(covered))
        return self._view(whole).any(-1).all(-1)


def sample_map(view: TokenView, latent: Sequence[int], sample: Sequence[int]) -> SampleMap | None:
    """The map between a latent and a sample of these shapes; None where they do not belong together."""
    if len(latent) != len(sample) or not latent or latent[0] != view.shape[0] or latent[0] % sample[0]:
        return None
    sizes = list(latent)
    for dim, _, length in view.cuts:
        sizes[dim] = length
    fits = all(sizes[dim] == sample[dim] for dim in view.token_dims)
    return SampleMap(view, latent, sample) if fits else None


def picture_window(latent: Tensor, sample: Tensor) -> slice | None:
    """Where the sample's tokens [B, n, C] stand among the latent's [B, N, C], N > n; None unless its start or its end is them.

    Compares the contents, and so reads from the device.
    """
    batch, tokens = sample.shape[:2]
    if latent.dim() != 3 or sample.dim() != 3 or latent.shape[2] != sample.shape[2] or latent.shape[0] % batch:
        return None
    if not 0 < tokens < latent.shape[1]:
        return None
    wanted = sample.to(latent.dtype)
    for window in (slice(0, tokens), slice(latent.shape[1] - tokens, latent.shape[1])):
        if torch.equal(latent[:batch, window], wanted):
            return window
    return None
