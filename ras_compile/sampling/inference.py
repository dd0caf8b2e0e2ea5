"""Finding the step without help: a transformer call says neither its step nor where a generation begins.

The calls of one evaluation share the latent and differ in their contexts; an evaluation ends when a branch repeats or
the latent and the time move on; a generation ends when time turns round, returns to where it began, when an evaluation
begins with a context that has not been seen, or with a latent that no sampler can have made of what the evaluations
before it returned. In doubt a new generation begins, because a dense step too many costs time and a sparse step too
early costs the picture.

Samplers that add noise make latents that nothing tells from unrelated ones, and so run dense here. What this cannot tell
(use `ras_compile.generation` or `ras_compile.attach`): a run that was abandoned and is continued by another one with
the same context tensors further along in time, from a latent that the abandoned run returned.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ras_compile.notices import warn_once
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.sampling.branches import Branch, Match, equal_prints, fingerprint, same_tensor, tensor_mark

Move = Literal["begin", "advance", "stay"]
MOVES: tuple[Move, ...] = get_args(Move)
Seen = list[tuple[Tensor, Tensor]]  # latents and noises of the calls of one evaluation, as sketched

# So many tokens of each sample are compared, evenly spread.
_TOKENS = 128
# So many evaluations before the present one may enter a solver's step (the fourth-order ones take four).
_ORDER = 4
# Share of a latent's change (Euclidean norms) that may be left unexplained. Fresh noise leaves 0.4 and more; the noise that a
# trained model is asked to predict 0.4 and more; what pipelines do to a prediction, such as scaling rows of it, less than 0.2.
_UNEXPLAINED = 0.25
_TRIMMED = 4  # fits, each after the first to the half of the tokens that the one before explains best
_ENOUGH = 128  # entries of a sample; half of fewer would fit anything


def read_time(timestep: Any) -> float | None:
    """The call's time as a number; per-token timesteps are reduced by max. On CUDA this is a host read."""
    if isinstance(timestep, Tensor):
        return float(timestep.detach().max()) if timestep.numel() else None
    return None if timestep is None else float(timestep)


def sketch(value: Tensor, view: TokenView | None) -> Tensor | None:
    """Some tokens of a latent or of a noise, [B, T, P, C] in float64 on its device; None where no view tells its tokens."""
    if view is None:
        return None
    tokens = view(value.detach())
    return tokens[:, :: max(1, tokens.shape[1] // _TOKENS)].to(torch.float64, copy=True)


def read_call(
    timestep: Any, latent: Tensor, view: TokenView | None, waiting: list[Tensor]
) -> tuple[float | None, Any, list]:
    """The time, the latent's sketch and the noises that wait, all on the host; in one read from the device.

    Args:
        waiting: sketches of noises, which are on the device.
    """
    seen = sketch(latent, view)
    if not latent.is_cuda:
        return read_time(timestep), seen, waiting
    timed = isinstance(timestep, Tensor) and timestep.numel() > 0
    values = [timestep.detach().max().double().reshape(1).to(latent.device)] if timed else []
    values += [value for value in (seen, *waiting) if value is not None]
    if not values:
        return read_time(timestep), None, []
    read = iter(torch.cat([value.flatten() for value in values]).cpu().split([value.numel() for value in values]))
    time = float(next(read)) if timed else read_time(timestep)
    seen = None if seen is None else next(read).view(seen.shape)
    return time, seen, [next(read).view(value.shape) for value in waiting]


def latent_is_made_of(seen: Tensor, before: list[Seen], rounding: float) -> bool:
    """Whether a sampler can have made a latent of the evaluations before it: by adding multiples of their noises to
    a multiple of the last one's latent.

    Each token may have a scale of its own (rescaled guidance; times that differ from token to token), and half of the tokens
    that have moved may come from elsewhere (inpainting puts them back). A latent that has not moved at all is another call
    on the same one, and no step.

    Args:
        seen: [B, T, P, C] of the latent.
        before: the evaluations before it, the last one at the end.
        rounding: relative error of the latent's dtype.
    """
    columns: list[Tensor] = []
    channels, sample = seen.shape[-1], torch.arange(seen.shape[0])
    for calls in reversed(before):
        new: list[Tensor] = []
        for latent, noise in calls:
            if noise.shape[1:3] != seen.shape[1:3]:
                return True  # nothing to judge by
            if noise.shape[0] != latent.shape[0]:
                warn_once(
                    "ras_compile: calls of one step have latents of different batch sizes, and nobody says which calls are a "
                    "step, so they all run dense. Use ras_compile.attach(pipe), or tell the steps with ras_compile.generation()."
                )
                return False  # whose noise it is cannot be told
            channels, rows = min(channels, noise.shape[-1], latent.shape[-1]), sample % latent.shape[0]
            # what it adds to: all earlier latents are that one less what was added since
            new += [noise[rows]] if columns or new else [latent[rows], noise[rows]]
            if latent.shape[0] > 1:  # the branches of guidance stand beside each other in a batch, with equal latents
                some = latent.flatten(1)[:, :64]
                equal = (some[:, None] == some).all(2).double()
                new.append((equal @ noise.flatten(1) / equal.sum(1, keepdim=True)).view(noise.shape)[rows])
        if columns and len(columns) + len(new) > seen[0].numel() // 8:
            break  # so many would fit anything
        columns += new
    basis = torch.stack([column[..., :channels].flatten(2) for column in columns], 1)  # [B, K, T, P C]
    basis = basis / basis.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-30)
    latent = seen[..., :channels].flatten(2)
    change = latent - columns[0][..., :channels].flatten(2)
    moved = (change != 0).any(2)
    if not bool(moved.any(1).all()):
        return False
    kept = moved
    for _ in range(_TRIMMED if seen[0].numel() >= _ENOUGH else 1):
        weights = kept.double()
        left = _unexplained(change, basis, weights)
        bound = _UNEXPLAINED * (weights * change.square().sum(2)).sum(1).sqrt()
        bound = bound + rounding * (weights * latent.square().sum(2)).sum(1).sqrt()
        if bool(((weights * left).sum(1).sqrt() <= bound).all()):
            return True
        left = left.masked_fill(~moved, torch.nan)
        kept = left <= left.nanmedian(1, keepdim=True).values
    return False


def _unexplained(change: Tensor, basis: Tensor, weights: Tensor) -> Tensor:
    """What the best sum of multiples of the columns, scaled token by token, leaves of the tokens' changes: squares [B, T].

    Args:
        change: [B, T, E].
        basis: [B, K, T, E], K columns of norm 1.
        weights: [B, T]: which tokens the sum is fitted to.
    """
    columns = (basis * weights[:, None, :, None]).flatten(2)
    gram = columns @ columns.mT + 1e-9 * torch.eye(columns.shape[1], dtype=columns.dtype)
    factors = torch.linalg.solve(gram, columns @ change.flatten(1)[:, :, None])
    guess = (factors[..., None] * basis).sum(1)
    scale = (change * guess).sum(2, keepdim=True) / guess.square().sum(2, keepdim=True).clamp_min(1e-30)
    return (change - scale * guess).square().sum(2)


class TimeLine:
    """Time, latent and noises of one generation as they move from evaluation to evaluation.

    Args:
        seen: its sketch, on the host; None where nothing tells its tokens.
    """

    def __init__(self, time: float | None, latent: Tensor, seen: Tensor | None) -> None:
        self.first = self.last = time
        self.direction = 0
        self.corroborated = time is None
        self.evaluations = 1
        self.waiting: list[Tensor] = []  # noises of the last calls, still on the device
        self._before: deque[Seen] = deque(maxlen=_ORDER)
        self._calls: Seen = []  # those of this evaluation
        self._mark, self._seen = tensor_mark(latent), seen
        self._began = seen
        self._print = fingerprint(latent) if seen is None else None

    def take(self, noises: list[Tensor]) -> None:
        """The noises that were waiting, as read to the host: of the calls of this evaluation."""
        for noise in noises:
            if self._seen is not None:
                self._calls.append((self._seen, noise))
        self.waiting = []

    def place(self, time: float | None, latent: Tensor, seen: Tensor | None, match: Match, used: list[Branch]) -> Move:
        """What the call is: the first of a generation, the first of a step, or one more of the same step.

        Takes the branch from a match that turns out to be another branch of the same evaluation.
        """
        same_object = self._mark[0]() is latent
        same_latent, same_time = same_tensor(self._mark, latent), time == self.last
        if not match.known or (match.branch in used and not match.sure):
            # another branch of this evaluation; at the very start also one that was given an equal latent
            if same_time and (same_latent or (self.evaluations == 1 and self._equals(latent, seen))):
                match.branch = None
                return "stay"
            if not match.known:
                return "begin"
        if match.branch in used:
            unseen_write = same_object and latent.is_inference() and (seen is None or self._equals(latent, seen))
            return "stay" if same_time and (same_latent or unseen_write) else self._advance(time, latent, seen)
        if same_time and (same_latent or (time is not None and (seen is None or self._equals(latent, seen)))):
            return "stay"
        return self._advance(time, latent, seen)

    def _equals(self, latent: Tensor, seen: Tensor | None) -> bool:
        """Whether this evaluation's latent has the same values, also where a batch holds it several times."""
        if seen is None or self._seen is None:
            return self._print is not None and equal_prints(self._print, fingerprint(latent))
        if seen.shape[1:] != self._seen.shape[1:]:
            return False
        return torch.equal(seen, self._seen[torch.arange(seen.shape[0]) % self._seen.shape[0]])

    def _is_back(self, seen: Tensor | None) -> bool:
        """Whether a latent is nearer to the generation's first one than to the last: no sampler goes back so far.

        Only this tells another picture from the same noise, or from almost the same, where nothing says the time: all that
        one step after the other has added lies between the last latent and the first.
        """
        first, last = self._began, self._seen
        if seen is None or first is None or last is None or not (seen.shape == first.shape == last.shape):
            return False
        nearer = (seen - first).flatten(1).norm(dim=1) < (seen - last).flatten(1).norm(dim=1)
        return bool(nearer.any())

    def _advance(self, time: float | None, latent: Tensor, seen: Tensor | None) -> Move:
        if time is None or self.last is None:
            if time != self.last or self._is_back(seen):
                return "begin"
        elif time == self.first:
            return "begin"
        else:
            turn = (time > self.last) - (time < self.last)
            if turn * self.direction < 0:
                return "begin"
        before = [*self._before, self._calls]
        if seen is None or not self._calls or latent_is_made_of(seen, before, torch.finfo(latent.dtype).eps):
            return "advance"
        return "begin"

    def note(self, time: float | None, latent: Tensor, seen: Tensor | None) -> None:
        """Take an evaluation that was placed as "advance"."""
        if time is not None and self.last is not None:
            turn = (time > self.last) - (time < self.last)
            # one pair of times only shows a direction; a step may be sparse once a second pair agrees
            self.corroborated = self.corroborated or (self.direction != 0 and turn == self.direction)
            self.direction = self.direction or turn
        self.last = time
        self.evaluations += 1
        self._before.append(self._calls)
        self._calls = []
        self._mark, self._seen = tensor_mark(latent), seen
