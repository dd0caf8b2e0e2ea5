"""Finding the step without help: a transformer call says neither its step nor where a generation begins.

The calls of one evaluation share the latent and differ in their contexts; an evaluation ends when a branch repeats or
the latent and the time move on; a generation ends when time turns round, returns to where it began, or an evaluation
begins with a context that has not been seen. In doubt a new generation begins, because a dense step too many costs
time and a sparse step too early costs the picture.

What this cannot tell (use `ras_compile.generation` or `ras_compile.attach`): a run that was abandoned and is continued
by another one with the same context tensors further along in time, and several pictures that are advanced in lock-step
by separate calls with the same context tensors.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ras_compile.sampling.branches import Branch, Match, equal_prints, fingerprint, same_tensor, tensor_mark

__all__ = ["Move", "TimeLine", "read_time"]

Move = Literal["begin", "advance", "stay"]


def read_time(timestep: Any) -> float | None:
    """The call's time as a number; per-token timesteps are reduced by max. On CUDA this is a host read."""
    if isinstance(timestep, Tensor):
        return float(timestep.detach().max()) if timestep.numel() else None
    return None if timestep is None else float(timestep)


class TimeLine:
    """Time and latent of one generation as they move from evaluation to evaluation."""

    def __init__(self, time: float | None, latent: Tensor) -> None:
        self.first = self.last = time
        self.direction = 0
        self.corroborated = time is None
        self.evaluations = 1
        self._latent = tensor_mark(latent)
        self._print = fingerprint(latent)

    def place(self, time: float | None, latent: Tensor, match: Match, used: list[Branch]) -> Move:
        """What the call is: the first of a generation, the first of a step, or one more of the same step.

        Takes the branch from a match that turns out to be another branch of the same evaluation.
        """
        same_object = self._latent[0]() is latent
        same_latent, same_time = same_tensor(self._latent, latent), time == self.last
        if not match.known or (match.branch in used and not match.sure):
            # another branch of this evaluation; at the very start also one that was given an equal latent
            if same_time and (
                same_latent or (self.evaluations == 1 and equal_prints(self._print, fingerprint(latent)))
            ):
                match.branch = None
                return "stay"
            if not match.known:
                return "begin"
        if match.branch in used:
            unseen_write = same_object and latent.is_inference()
            return "stay" if same_time and (same_latent or unseen_write) else self._advance(time)
        if same_time and (same_latent or time is not None):
            return "stay"
        return self._advance(time)

    def _advance(self, time: float | None) -> Move:
        if time is None or self.last is None:
            return "advance" if time == self.last else "begin"
        if time == self.first:
            return "begin"
        turn = (time > self.last) - (time < self.last)
        return "begin" if turn * self.direction < 0 else "advance"

    def note(self, time: float | None, latent: Tensor) -> None:
        """Take an evaluation that was placed as "advance"."""
        if time is not None and self.last is not None:
            turn = (time > self.last) - (time < self.last)
            # one pair of times only shows a direction; a step may be sparse once a second pair agrees
            self.corroborated = self.corroborated or (self.direction != 0 and turn == self.direction)
            self.direction = self.direction or turn
        self.last = time
        self.evaluations += 1
        self._latent = tensor_mark(latent)
