"""Which tokens a sparse step computes (RAS, arXiv 2502.10389, eq. 1). On the device, without a host read.

Everything works on a batch: `B` samples, `N` region tokens, `k` active rows per sample.

The metric "drift" says how far a token's noise, held since it was last computed, should be off by now. Where token i is
computed at step t, and was last computed at step s, one number is learned of it:

    rate_i = std_c(n_i(t) - n_i(s)) / (t - s)          mean over the pixels of a patch; c: channels
    R_i = (rate_i + 0.05 * mean_j(rate_j)) * (age_i + 1)   age_i: steps since it was computed

R is the form of eq. 1, a metric times a factor that grows with each drop; the metric is of this project. What a token's noise
says by itself (`metric="std"`, the paper's) tells little about how much it will change; its last change tells most of it. The
second factor keeps tokens from starving, and the mean in the first one those whose rate was once near nothing.

n is the prediction in the form in which settled tokens keep it, where a scheduler tells that: see `velocity.py`.

What a branch remembers between its calls is a :class:`Drift`: the noise that the next change is measured from, and `state`
[2, B, N], float32: rates, and gaps, which are the steps from a token's last computation to the branch's latest call. A gap
is negative where that call did not compute the token. A rate that is not known (of a token computed once, or of a noise that
is not a number) is `UNKNOWN`, and counts as the highest of its sample: such a token is computed soon, and never waits for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ras_compile.errors import ConfigError
from ras_compile.passes.algebra.tokens import TokenView

# Beyond any score (log metric plus scaled drops) and any absence; sums with them stay exact in float32.
_OVERDUE = 1e6
_SCORE_LIMIT = 1e5
_KNOWN = 3e5  # takes any score below those of what is not known
_RANDOM_SEED = 0x5A5
_MIXER = 0x1E3779B97F4A7C15  # an odd number of mixed bits
_NEVER = torch.iinfo(torch.int64).min
# What counts as the metric of a token whose noise is no number, and what no other metric reaches: a mean over branches and samples
# in which one such token is stays above that, and nothing becomes infinite.
_NO_NUMBER, _LARGEST = 1e30, 1e20
FLOOR = 0.05  # of the mean rate, beside a token's own
UNKNOWN = -1.0
_LARGEST_RATE = 1e30  # beyond, sums would overflow
# How a branch's metric is made of what it returned: see `rated`.
Measure = tuple[str, TokenView | None] | None
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


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


@dataclass(frozen=True)
class SelectionInfo:
    """What a callable `metric` or `selector` is told.

    Args:
        step: step of the generation, from 0.
        num_steps: steps of the generation, where known.
        grid: the region's token grid, such as (height, width) or (frames, height, width); its product is N.
    """

    step: int = 0
    num_steps: int | None = None
    grid: tuple[int, ...] = ()


def token_metric(noise: Tensor, kind: str | Callable[..., Any], info: SelectionInfo) -> Tensor:
    """How much each token's predicted noise says: float32 [B, N], non-negative, finite; huge where it is no number.

    Args:
        noise: [B, N, P, C]: P pixels of a token's patch, C channels that match the latent's. Where the pipeline packs
            patches into channels, P is 1.
        kind: "std": standard deviation over C, mean over P; "l2norm": over P and C; "random": for ablations, the same
            at every run and not drawn from the global generator; a callable gets ([B, N, P * C], info), and what it
            returns is looked at, which reads from the device.

    Raises:
        ConfigError: the callable returned another shape than [B, N], or a value that is no number or negative.
    """
    batch, tokens, pixels, channels = noise.shape
    if callable(kind):
        metric = kind(noise.reshape(batch, tokens, pixels * channels), info)
        if not isinstance(metric, Tensor) or metric.shape != (batch, tokens):
            got = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
            raise ConfigError(f"option metric: the callable must return a tensor [{batch}, {tokens}], not {got}.")
        metric = metric.to(noise.device, torch.float32)
        if not bool((metric >= 0).all()):
            what = "a value that is not a number" if bool(metric.isnan().any()) else "a negative value"
            raise ConfigError(f"option metric: the callable returned {what}; it takes numbers of at least 0.")
    elif kind == "std":
        metric = spread(noise)
    elif kind == "l2norm":
        metric = noise.float().flatten(2).norm(dim=-1)
    elif kind != "random":
        raise ConfigError(f"token_metric takes 'std', 'l2norm', 'random' or a callable, not {kind!r}.")
    else:
        generator = torch.Generator(noise.device).manual_seed(_RANDOM_SEED + info.step)
        metric = torch.rand(batch, tokens, device=noise.device, generator=generator)
    return torch.where(metric.isfinite(), metric.clamp(0.0, _LARGEST), _NO_NUMBER)


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
    found = torch.where(found < _LARGEST_RATE, found, UNKNOWN)  # neither is what is not a number
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


def sample_groups(latent: Tensor) -> Tensor:
    """Averaging matrix [B, B] (float32, rows sum to 1): samples with exactly equal latents form a group.

    Batched classifier-free guidance duplicates the latent; both copies must compute the same tokens.
    """
    flat = latent.detach().flatten(1) + 0.0  # -0.0 equals 0.0, and its bits shall too
    bits = flat.view(_BITS[flat.element_size()]).to(torch.int64)
    bits = bits ^ (bits >> 40)  # simple numbers in double precision have no low bits
    # one number per sample, by which the first sample that may equal it is found; large batches want no loop over pairs
    weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _MIXER
    prints = (bits * ((weights ^ (weights >> 29)) * _MIXER | 1)).sum(dim=1)
    first = (prints[:, None] == prints).int().argmax(dim=1)
    # a sample with a NaN equals nothing, not even itself
    first = torch.where((flat == flat[first]).all(dim=1), first, torch.arange(len(flat), device=flat.device))
    same = (first[:, None] == first).float()
    return same / same.sum(dim=1, keepdim=True)


def choose(*given: Any) -> tuple[Tensor, ...]:
    """``(rows, counts, *remembered)`` of a sparse step: all of the built-in selection, on the device.

    Args:
        given: what `rated` takes of each branch of the step before; the counts [2, B, N] (drop counts, then absences), the
            batch's `sample_groups` (or an empty tensor), and which tokens are known, bool [B, N] (or none at all: empty);
            then for each branch how its metric is made, as `rated` takes it; k; and `focus`, `starvation_scale` and
            `max_absence` as in `select_rows`.

    Returns:
        The rows [B, k], the counts after this step, and of each branch that measures drift its noise and its state
        [2, B, N] (see above), up to the step that computes those rows.
    """
    *tensors, measures, k, high_share, scale, max_absence = given
    *seen, counts, groups, known = tensors
    drops, absence = counts
    metrics, remembered = rated(seen, measures)
    metric = mean_metric(metrics, groups)
    rows = select_rows(metric, drops, absence, k, high_share, scale, max_absence, known if known.numel() else None)
    counts = torch.stack(update_counts(drops, absence, rows))
    return rows, counts, *going_on(remembered, counts[1] == 0)


def settle(*given: Any) -> tuple[Tensor, Tensor]:
    """What a branch that measures drift remembers up to a step that computes all of its tokens; arguments of `learned`."""
    last, rates, ages = learned(*given)
    return last, torch.stack([rates, ages + 1])


# Of a branch that measures drift: its noise, rates [B, N] and ages [B, N].
_Remembered = tuple[Tensor, Tensor, Tensor]


def rated(seen: Sequence[Tensor], measures: Sequence[Measure]) -> tuple[list[Tensor], list[_Remembered]]:
    """The metric [B, N] of each branch; and what those that measure drift remember.

    Args:
        seen: of each branch what it returned, the metric itself where its measure is None; where it measures drift,
            then the noise before and the state.
        measures: of each branch None, or "std", "l2norm" or "drift", and the view that makes what it returned
            [B, N, P, C], if it is not yet.
    """
    left, metrics, remembered = iter(seen), [], []
    for measure in measures:
        noise = next(left)
        kind, view = measure or (None, None)
        if kind == "drift":
            remembered.append(learned(noise, next(left), next(left), view))
            metrics.append(expected(*remembered[-1][1:]))
        elif kind is None:
            metrics.append(noise)
        else:
            metrics.append(token_metric(view(noise) if view else noise, kind, SelectionInfo()))
    return metrics, remembered


def going_on(remembered: Sequence[_Remembered], computed: Tensor) -> list[Tensor]:
    """Noise and state of each branch up to the step that computes the tokens ``computed``, bool [B, N]."""
    kept = []
    for last, rates, ages in remembered:
        kept += [last, torch.stack([rates, torch.where(computed, ages + 1, -ages - 1)])]
    return kept


def mean_metric(metrics: Sequence[Tensor], groups: Tensor) -> Tensor:
    """The mean [B, N] over the guidance branches, and over the samples of a group (``groups`` empty: each is its own)."""
    metric = torch.stack(list(metrics)).mean(dim=0) if len(metrics) > 1 else metrics[0]
    return groups @ metric if groups.numel() else metric


def select_rows(
    metric: Tensor,
    drops: Tensor,
    absence: Tensor,
    k: int,
    high_share: float,
    scale: float,
    max_absence: int,
    known: Tensor | None = None,
) -> Tensor:
    """The active rows of a sparse step: int64 [B, k], ascending.

    With ``R = metric * exp(scale * drops)`` (eq. 1), the tokens with the lowest R are dropped at the low end and those
    with the highest ``metric * exp(-scale * drops)`` at the high end, so that a drop count raises a token's priority
    at either end. A token absent for `max_absence` sparse steps, or whose noise is no number, goes before all others, oldest
    first. Of equals the lower index is dropped. In logarithms: exp overflows.

    Args:
        metric: [B, N], non-negative.
        drops: [B, N], how often each token was dropped in this generation.
        absence: [B, N], sparse steps since each token was last computed.
        k: rows to select, 1..N.
        high_share, scale, max_absence: the options `focus`, `starvation_scale` and `max_absence` as numbers.
        known: bool [B, N], the known part of a picture (a sample of nothing else has none), whose noise the pipeline throws
            away: dropped before all others at either end, and never overdue.
    """
    batch, tokens = metric.shape
    from_high = round(high_share * (tokens - k))
    from_low = tokens - k - from_high
    log_metric = metric.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    lift = scale * drops.float()
    overdue = (absence >= max_absence) | (metric > 10 * _LARGEST)
    if known is not None:
        known = known & ~known.all(dim=1, keepdim=True)
        overdue = overdue & ~known
    last = _OVERDUE + absence.float()  # dropped after all others, the youngest of them first
    kept, left = None, tokens
    for count, score in ((from_high, lift - log_metric), (from_low, lift + log_metric)):
        if count:
            left -= count
            score = torch.where(overdue, last, score.clamp(-_SCORE_LIMIT, _SCORE_LIMIT))
            order = _ordered(score if known is None else torch.where(known, score - _KNOWN, score))
            order = order if kept is None else torch.where(kept, order, _NEVER)
            kept = order >= order.topk(left, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    if kept is None:
        return torch.arange(tokens, device=metric.device).repeat(batch, 1)
    place = torch.where(kept, kept.cumsum(dim=1) - 1, k)  # what is dropped goes to a column of its own
    columns = torch.arange(tokens, device=metric.device).expand(batch, tokens)
    return place.new_empty(batch, k + 1).scatter_(1, place, columns)[:, :k].contiguous()


def _ordered(score: Tensor) -> Tensor:
    """int64 keys in the order of float32 scores [B, N], all different: of equal scores the lower index comes first."""
    bits = (score + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) | torch.arange(score.shape[1], device=score.device)


def update_counts(drops: Tensor, absence: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Drop counts [B, N] (total in the generation) and absences [B, N] after a sparse step on `rows` [B, k]."""
    dropped = torch.ones_like(drops).scatter_(1, rows, 0)
    return drops + dropped, (absence + 1) * dropped


def checked_rows(rows: Any, metric: Tensor, k: int) -> Tensor:
    """Rows of a custom selector, sorted; their values are read from the device.

    Raises:
        ConfigError: it returned something else than k distinct rows for each sample.
    """
    batch, tokens = metric.shape
    if not isinstance(rows, Tensor) or rows.shape != (batch, k):
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ConfigError(f"option selector: the callable must return rows [{batch}, {k}], not {got}.")
    if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        raise ConfigError(f"option selector: the rows must be integers, not {rows.dtype}.")
    rows = rows.to(metric.device, torch.int64).sort(dim=1).values
    if int(rows.min()) < 0 or int(rows.max()) >= tokens:
        raise ConfigError(f"option selector: rows must lie in 0..{tokens - 1}.")
    if k > 1 and bool((rows.diff(dim=1) == 0).any()):
        raise ConfigError("option selector: a row was chosen twice for one sample.")
    return rows
