"""The training loop of the smaller models: it ends with the clock, and hands out the moving average of the weights."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from muon import Muon
from safetensors.torch import save_file
from torch import nn


class Clock:
    """How much of a stretch of training is over: by steps where their number is given, else by seconds."""

    def __init__(self, seconds: float, steps: int | None) -> None:
        self.seconds, self.steps, self.begin, self.step = seconds, steps, time.monotonic(), 0

    def share(self) -> float:
        """From 0 to 1; 1 says stop."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        return min(1.0, self.elapsed() / self.seconds)

    def elapsed(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self.begin


class Pool:
    """The newest `size` samples, to draw from again: to paint and to encode costs as much as to learn."""

    def __init__(self, size: int) -> None:
        self.size, self.count, self.at = size, 0, 0
        self.kept: dict[str, torch.Tensor] = {}

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """Put samples, `b ...` by name, in the place of the oldest ones."""
        count = len(next(iter(rows.values())))
        if not self.kept:
            self.kept = {name: value.new_empty(self.size, *value.shape[1:]) for name, value in rows.items()}
        if self.at + count > self.size:
            self.at = 0
        for name, value in rows.items():
            self.kept[name][self.at : self.at + count] = value
        self.at += count
        self.count = max(self.count, self.at)

    def draw(self, count: int) -> dict[str, torch.Tensor]:
        """`count` samples, each of them as likely as any other."""
        device = next(iter(self.kept.values())).device
        rows = torch.randint(self.count, (count,), device=device)
        return {name: value[rows] for name, value in self.kept.items()}


def optimizers(
    model: nn.Module, blocks: nn.Module, rate: float, muon_rate: float, device: str
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in `blocks`, AdamW for all else."""
    inside = [param for param in blocks.parameters() if param.ndim == 2]
    chosen = {id(param) for param in inside}
    rest = [param for param in model.parameters() if id(param) not in chosen]
    return [
        Muon(inside, muon_rate),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda"),
    ]


def rate_at(step: int, share: float, warmup: int = 150, flat: float = 0.5) -> float:
    """Warm up, stay, then fall linearly to a fiftieth when all is over."""
    return min(1.0, (step + 1) / warmup, max(0.02, (1 - share) / (1 - flat)))


@dataclass
class Log:
    """The mean losses, with their steps and seconds."""

    name: str
    entries: list[dict] = field(default_factory=list)

    def add(self, step: int, loss: float, seconds: float) -> None:
        """Note it, and print it."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of {self.name} is {loss} at step {step}: lower the rates")
        self.entries.append({"step": step, "loss": round(loss, 5), "seconds": round(seconds, 1)})
        print(json.dumps({"what": self.name} | self.entries[-1]), flush=True)


def fit(
    name: str, model: nn.Module, opts: list[torch.optim.Optimizer], loss_of: Callable[[int], torch.Tensor],
    clock: Clock, file: Path, log_every: int = 100, save_every: float = 60.0,
) -> tuple[nn.Module, Log]:  # fmt: skip
    """Train until the clock says 1; the moving average, and what was noted.

    Args:
        name: of the model, for the log.
        model: what is trained.
        opts: over all of its parameters.
        loss_of: step -> the loss of a batch, a scalar with a gradient.
        clock: its share sets the learning rate and ends the training.
        file: where the moving average is saved in half precision, now and then and at the end.
        log_every: steps.
        save_every: seconds.
    """
    average, log = copy.deepcopy(model).requires_grad_(False), Log(name)
    pairs = list(average.parameters()), list(model.parameters())
    counted = list(zip(average.buffers(), model.buffers(), strict=True))
    total, seen, saved = torch.zeros((), device=pairs[0][0].device), 0, clock.elapsed()
    while (share := clock.share()) < 1:
        step = clock.step
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = opt.defaults["lr"] * rate_at(step, share)
            opt.step()
            opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(*pairs, 1 - min(0.999, (step + 1) / (step + 10)))
            for mine, its in counted:
                mine.copy_(its)
            total += loss.detach()
        clock.step += 1
        if clock.step % log_every == 0:
            log.add(clock.step, total.item() / (clock.step - seen), clock.elapsed())
            total.zero_()
            seen = clock.step
        if clock.elapsed() - saved > save_every:
            save_half(average, file)
            saved = clock.elapsed()
    if clock.step > seen:
        log.add(clock.step, total.item() / (clock.step - seen), clock.elapsed())
    save_half(average, file)
    return average, log


def save_half(model: nn.Module, file: Path) -> None:
    """All weights in half precision; a reader never finds half a file."""
    half = {name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(half, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").rename(file)
