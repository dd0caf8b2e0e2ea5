"""The rows of each step of one generation: the noise of the step before, drop counts, and the choice itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ras_compile.config import WORDS, RASConfig
from ras_compile.execute import replay
from ras_compile.execute.replay import Function, Replayed
from ras_compile.passes.algebra.layout import Group
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.plans.spread import largest
from ras_compile.sampling.reuse import active_tokens, continued
from ras_compile.sampling.selection import (
    Drift,
    Measure,
    SelectionInfo,
    checked_rows,
    choose,
    going_on,
    mean_metric,
    rated,
    sample_groups,
    settle,
    spread,
    token_metric,
    update_counts,
)
from ras_compile.sampling.velocity import predicted, velocity

# a callable may do anything, and "random" draws numbers
_REPLAYED_METRICS = tuple(metric for metric in WORDS["metric"] if metric != "random")
# of all transformers: what is compiled for one serves the others
_KNOWN: tuple[Function, ...] = (choose, settle, continued, velocity, predicted)
_FUNCTIONS = {function: Replayed(function) for function in _KNOWN}
# their places among what a branch keeps
_OBSERVED, _DRIFT = "observed noise", "drift"

_Key = tuple[int, int]  # batch and tokens of a call


class Selection:
    """What a step computes beside the model, each a launch: compiled where the model is, and replayed from CUDA graphs.

    The graphs go when it goes.

    Args:
        functions: those that it knows, each as what is compiled of it and shared.
    """

    def __init__(self, functions: Mapping[Function, Replayed] = _FUNCTIONS) -> None:
        self._own = {function: shared.sharing_code() for function, shared in functions.items()}

    def __call__(
        self, function: Function, config: RASConfig, tensors: Sequence[Tensor], *settings: Hashable,
        kept: tuple[Tensor, ...] = (),
    ) -> Sequence[Tensor]:  # fmt: skip
        """The function of ``(*tensors, *kept, *settings)``: as one launch on CUDA, and as it is elsewhere."""
        if config.cuda_graphs and tensors[0].device.type == replay.DEVICE:
            return self._own[function](tensors, *settings, kept=kept, fuse=config.inner_backend == "inductor")
        return function(*tensors, *kept, *settings)


class RowChooser:
    """Chooses rows once per step, from what all branches of the step before returned. No host read, but for the values
    that a callable of the user's returns.
    """

    def __init__(self, config: RASConfig, selection: Selection | None = None) -> None:
        self._config, self._selection = config, selection or Selection()
        self._settings = config.high_share, config.starvation
        self._absences = config.longest_absences
        self._step = 0
        self._loose: dict[tuple, dict] = {}  # what branches keep that say no place for it
        self._seen: dict[_Key, list[tuple[dict, Measure]]] = {}
        self._before: dict[_Key, list[tuple[dict, Measure]]] = {}
        self._counts: dict[int, Tensor] = {}  # by tokens [2, B, N]: drop counts, absences
        self._chosen: dict[_Key, tuple[Tensor, Tensor]] = {}
        self._wanted: dict[int, int] = {}  # by tokens: of this step, where a tolerance chooses
        self._groups: dict[_Key, Tensor] = {}  # samples that share a latent do so for the whole generation
        self._nothing: Tensor | None = None  # an empty tensor on the device

    def advance(self, dense: bool) -> None:
        """A step begins. After a dense step, whoever wanted it, no token is absent."""
        ran_dense = {tokens for _, tokens in self._seen} - {tokens for _, tokens in self._chosen}
        for tokens in list(self._counts):
            if dense or tokens in ran_dense:
                self._all_computed(tokens)
        self._before, self._seen, self._chosen, self._wanted = self._seen, {}, {}, {}
        self._step += 1

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
        key = batch, tokens
        if slots is None:
            slots = self._loose.setdefault((key, len(self._seen.get(key, ()))), {})
        noise = noise.detach() if noise.requires_grad else noise
        if self._config.metric == "drift":
            drift = slots.get(_DRIFT)
            if drift is None:
                slots[_DRIFT] = Drift.begun(noise, view, batch, tokens, self._step)
            else:
                if drift.step != self._step:  # nobody said what this step computes: everything
                    self.computing(slots, None)
                drift.pending = True
        slots[_OBSERVED] = noise
        self._seen.setdefault(key, []).append((slots, measure))

    def computing(self, slots: dict, rows: Tensor | None) -> None:
        """A branch is about to compute `rows` [B, A], or all of its tokens (None), and to write over its noise.

        With `metric="drift"` what it remembers is brought up to this step, unless the choice of rows has done so.
        """
        drift: Drift | None = slots.get(_DRIFT)
        if drift is None or (drift.step == self._step and rows is not None):
            return
        if drift.step == self._step:  # rows were chosen, and it runs dense nevertheless
            drift.state = torch.stack([drift.state[0], drift.state[1].abs()])
            return
        if drift.pending:
            noise, view = slots[_OBSERVED], drift.view
            with _exact(noise.device):
                tensors = [noise, drift.last, drift.state]
                drift.last, drift.state = self._selection(settle, self._config, tensors, view)
            passed = self._step - drift.step - 1
        else:  # it was not called in the step that its gaps lead up to
            passed = self._step - drift.step
            drift.state = torch.stack([drift.state[0], drift.state[1].abs()])
        rates, gaps = drift.state
        gaps = gaps + passed if passed else gaps
        if rows is not None and rows.shape[1] < gaps.shape[1]:
            gaps = torch.where(active_tokens(rows, gaps.shape[1]), gaps, -gaps)
        drift.state = torch.stack([rates, gaps])
        drift.step, drift.pending = self._step, False

    def rows(
        self,
        latent: Tensor,
        batch: int,
        tokens: int,
        active: int,
        info: SelectionInfo,
        known: Callable[[], Tensor | None] | None = None,
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
        elif seen := [entry for entry in self._before.get(key, ()) if _OBSERVED in entry[0]]:
            with _exact(latent.device):
                rows = self._choice(latent, key, seen, active, info, known() if known is not None else None)
        else:
            return None
        self._chosen[key] = (rows, latent)
        return rows

    def wanted(
        self,
        latent: Tensor,
        batch: int,
        tokens: int,
        counts: Sequence[int],
        known: Callable[[], Tensor | None] | None = None,
        group: Group | None = None,
    ) -> int:
        """The first of `counts` of active tokens that keeps this step's expected error within `tolerance`; else `tokens`.

        Asked once in a step for all calls; reads one number from the device. A noise that is not a number has no error
        that could be told, and asks for all tokens. Processes that share the model take what the strictest of them needs.
        """
        seen = [entry for entry in self._before.get((batch, tokens), ()) if _OBSERVED in entry[0]]
        if tokens not in self._wanted and seen:
            with _exact(latent.device):
                groups = self._grouping((batch, tokens), latent)
                tensors, measures, _ = _gathered(seen)
                errors = mean_metric(rated(tensors, measures)[0], groups)
                noises = [(slots[_OBSERVED], measure[1] if measure else None) for slots, measure in seen]
                spreads = mean_metric([spread(view(noise) if view else noise) for noise, view in noises], groups)
                if known is not None and (unused := known()) is not None:
                    errors = torch.where(unused, 0.0, errors)
                left = errors.sort(dim=1).values.cumsum(dim=1)
                left = torch.nn.functional.pad(left, (1, 0))[:, [tokens - count for count in counts]]
                fits = (left <= (self._config.tolerance or 0.0) * spreads.sum(dim=1, keepdim=True)).all(dim=0)
                (place,) = largest(group, [int((~fits).int().cumprod(dim=0).sum())], latent.device)
            self._wanted[tokens] = (*counts, tokens)[place]
        return self._wanted.get(tokens, counts[0])

    def _choice(
        self,
        latent: Tensor,
        key: _Key,
        seen: Sequence[tuple[dict, Measure]],
        active: int,
        info: SelectionInfo,
        known: Tensor | None,
    ) -> Tensor:
        config = self._config
        tensors, measures, drifts = _gathered(seen)
        counts = self._counts_of(key, latent.device)
        groups = self._grouping(key, latent)
        settings = *self._settings, self._absences[2 * active >= key[1]]
        if config.selector is None:
            if known is None:
                if self._nothing is None:
                    self._nothing = groups.new_empty(0, dtype=torch.bool)
                known = self._nothing
            results = self._selection(
                choose, config, [*tensors, counts], tuple(measures), active, *settings, kept=(groups, known)
            )
            rows, self._counts[key[1]], *kept = results
        else:
            metrics, remembered = rated(tensors, measures)
            drops, absence = counts
            metric = mean_metric(metrics, groups)
            rows = checked_rows(config.selector(metric, drops, active, info), metric, active)
            self._counts[key[1]] = counts = torch.stack(update_counts(drops, absence, rows))
            kept = going_on(remembered, counts[1] == 0)
        for place, drift in enumerate(drifts):
            drift.last, drift.state = kept[2 * place : 2 * place + 2]
            drift.step, drift.pending = self._step, False
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


def _gathered(seen: Sequence[tuple[dict, Measure]]) -> tuple[list[Tensor], list[Measure], list[Drift]]:
    """Of all branches: what `rated` takes, and what those that measure drift remember."""
    tensors: list[Tensor] = []
    drifts: list[Drift] = []
    for slots, measure in seen:
        tensors.append(slots[_OBSERVED])
        if measure is not None and measure[0] == "drift":
            drifts.append(slots[_DRIFT])
            tensors += [drifts[-1].last, drifts[-1].state]
    return tensors, [measure for _, measure in seen], drifts


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
