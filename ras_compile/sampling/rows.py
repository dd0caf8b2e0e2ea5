"""The rows of each step of one generation: the noise of the step before, drop counts, and the choice itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ras_compile.config import RASConfig
from ras_compile.execute.replay import Replayed
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.sampling.selection import (
    Measure,
    SelectionInfo,
    choose,
    mean_metric,
    measured,
    sample_groups,
    select_rows,
    token_metric,
    update_counts,
)

__all__ = ["RowChooser", "selection"]

_REPLAYED_METRICS = ("std", "l2norm")  # a callable may do anything, and "random" draws numbers
_choose = Replayed(choose)
_OBSERVED = "observed noise"  # its place among what a branch keeps

_Key = tuple[int, int]  # batch and tokens of a call


def selection() -> Replayed:
    """The selection, with CUDA graphs that go when it goes."""
    return _choose.apart()


class RowChooser:
    """Chooses rows once per step, from what all branches of the step before returned. No host read, but for the values
    that a callable of the user's returns.

    Args:
        config: the options.
        selection: what :func:`selection` gave, for all choosers of a transformer.
    """

    def __init__(self, config: RASConfig, selection: Replayed | None = None) -> None:
        self._config, self._choose = config, selection or _choose
        self._seen: dict[_Key, list[tuple[dict, Measure]]] = {}
        self._before: dict[_Key, list[tuple[dict, Measure]]] = {}
        self._counts: dict[int, Tensor] = {}  # by tokens [2, B, N]: drop counts, absences
        self._chosen: dict[_Key, tuple[Tensor, Tensor]] = {}
        self._groups: dict[_Key, Tensor] = {}  # samples that share a latent do so for the whole generation
        self._nothing: Tensor | None = None  # an empty tensor on the device

    def advance(self, dense: bool) -> None:
        """A step begins. After a dense step, whoever wanted it, no token is absent."""
        ran_dense = {tokens for _, tokens in self._seen} - {tokens for _, tokens in self._chosen}
        for tokens in list(self._counts):
            if dense or tokens in ran_dense:
                self._all_computed(tokens)
        self._before, self._seen, self._chosen = self._seen, {}, {}

    def _all_computed(self, tokens: int) -> None:
        if tokens in self._counts:
            drops, away = self._counts[tokens]
            self._counts[tokens] = torch.stack([drops, torch.zeros_like(away)])

    def observe(
        self, noise: Tensor, info: SelectionInfo, view: TokenView | None = None, slots: dict | None = None
    ) -> None:
        """Take the noise [B, N, P, C] of one call of this step, or what becomes that through `view`.

        It must stay as it is until rows are chosen in the next step: its metric may be computed there, in one go with the
        choice. It is kept in `slots`, if given, and goes with what else stands there.
        """
        batch, tokens = (noise if view is None else view).shape[:2]
        measure: Measure = None
        if self._config.metric in _REPLAYED_METRICS:
            if view is not None:
                noise, view = view.cut(noise), view.uncut
            measure = (self._config.metric, view)
        else:
            noise = token_metric((view(noise) if view else noise).detach(), self._config.metric, info)
        slots = {} if slots is None else slots
        slots[_OBSERVED] = noise.detach() if noise.requires_grad else noise
        self._seen.setdefault((batch, tokens), []).append((slots, measure))

    def rows(
        self,
        latent: Tensor,
        batch: int,
        tokens: int,
        active: int,
        info: SelectionInfo,
        known: Callable[[], Tensor | None] = lambda: None,
    ) -> Tensor | None:
        """The active rows of this step for a call, int64 [batch, active]; None without noise of the step before.

        A later call of the step gets the first one's rows; where its batch differs (a guidance branch without the
        duplicated half), each sample gets those of the sample with the same latent. `known` is asked where rows are
        chosen: tokens [batch, tokens] whose noise is of no use.
        """
        key = (batch, tokens)
        if key in self._chosen:
            return self._chosen[key][0]
        if active >= tokens:
            rows = torch.arange(tokens, device=latent.device).repeat(batch, 1)
            self._all_computed(tokens)
        elif first := next((entry for (_, count), entry in self._chosen.items() if count == tokens), None):
            rows = first[0][_same_sample(latent, first[1], batch, len(first[0]))]
        elif seen := [
            (slots[_OBSERVED], measure) for slots, measure in self._before.get(key, ()) if _OBSERVED in slots
        ]:
            with _exact(latent.device):
                rows = self._choice(latent, key, seen, active, info, known())
        else:
            return None
        self._chosen[key] = (rows, latent)
        return rows

    def _choice(
        self,
        latent: Tensor,
        key: _Key,
        seen: Sequence[tuple[Tensor, Measure]],
        active: int,
        info: SelectionInfo,
        known: Tensor | None,
    ) -> Tensor:
        config, (noises, measures) = self._config, zip(*seen, strict=True)
        counts = self._counts_of(key, latent.device)
        groups = self._grouping(key, latent)
        if config.selector is None:
            if known is None:
                if self._nothing is None:
                    self._nothing = groups.new_empty(0, dtype=torch.bool)
                known = self._nothing
            settings = measures, active, config.high_share, config.starvation_scale, config.max_absence
            if config.cuda_graphs:
                fuse = config.inner_backend == "inductor"
                rows, self._counts[key[1]] = self._choose([*noises, counts], *settings, kept=(groups, known), fuse=fuse)
            else:
                rows, self._counts[key[1]] = choose(*noises, counts, groups, known, *settings)
            return rows
        metric = mean_metric(list(map(measured, noises, measures)), groups)
        drops, absence = counts
        rows = select_rows(metric, drops, absence, active, config, info)
        self._counts[key[1]] = torch.stack(update_counts(drops, absence, rows))
        return rows

    def _grouping(self, key: _Key, latent: Tensor) -> Tensor:
        """Averages over the samples that share a latent [B, B]; empty for a single sample. Made at the first choice."""
        if key not in self._groups:
            many = 1 < key[0] == latent.shape[0]
            self._groups[key] = sample_groups(latent) if many else torch.empty(0, device=latent.device)
        return self._groups[key]

    def _counts_of(self, key: _Key, device: torch.device) -> Tensor:
        """Drop counts and absences [2, B, N] up to this step; those of a batch that becomes larger or smaller go on."""
        batch, tokens = key
        counts = self._counts.get(tokens)
        if counts is None:
            return torch.zeros(2, batch, tokens, dtype=torch.int64, device=device)
        if counts.shape[1] == batch:
            return counts
        return counts[:, torch.arange(batch, device=device) % counts.shape[1]]


def _exact(device: torch.device) -> AbstractContextManager:
    """Without autocast: rows are chosen in float32, whatever the model computes in."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _same_sample(latent: Tensor, other: Tensor, batch: int, others: int) -> Tensor:
    """For each of `batch` samples the index of the sample of `other` with an equal latent; else they are dealt out."""
    dealt = torch.arange(batch, device=latent.device) % others
    if latent.shape[1:] != other.shape[1:] or latent.shape[0] != batch or other.shape[0] != others:
        return dealt
    flat = other.flatten(1)
    same = torch.stack([(flat == sample).all(dim=1) for sample in latent.flatten(1)])
    return torch.where(same.any(dim=1), same.int().argmax(dim=1), dealt)
