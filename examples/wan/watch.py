"""A judge of videos, trained on real clips and never on generated ones: what is where, its colour, how it moves.

It sees the nine frames at once. As `examples/emoji/classifier.py` it answers for each of 3 x 3 cells, in which an
object stands in the middle of the time, and for the background.
"""

from __future__ import annotations

from pathlib import Path

import torch
from motion import FILLED, FRAMES, MOTIONS, MOVERS  # puts the emoji scripts on the path
from safetensors.torch import load_file
from torch import nn

from classifier import Residual  # isort: skip
from objects import BACKGROUND_NAMES, COLOUR_NAMES, OBJECTS  # isort: skip
from scenes import GRID, cell_targets  # isort: skip

_CELL = {"item": len(MOVERS), "colour": len(COLOUR_NAMES), "motion": len(MOTIONS)}
_WHOLE = {"background": len(BACKGROUND_NAMES), "fill": len(FILLED)}


class Watcher(nn.Module):
    """Videos `b 3 9 64 64` -> logits: item, colour and motion `b 9 n` (class 0: nothing), background and fill `b n`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3 * FRAMES, 48, 64, 80, 96)
        blocks = [Residual(a, b, 2 if at else 1) for at, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))]
        self.trunk = nn.Sequential(*blocks)  # [b, 96, 8, 8]
        self.cells = nn.Sequential(
            nn.AdaptiveAvgPool2d(2 * GRID), nn.Conv2d(96, 128, 4, 2, 1), nn.ReLU()
        )  # [b, 128, 3, 3]
        self.at = nn.ModuleDict({name: nn.Conv2d(128, size + 1, 1) for name, size in _CELL.items()})
        self.whole = nn.Sequential(nn.Flatten(), nn.Linear(128 * GRID * GRID, 64), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(64, size) for name, size in _WHOLE.items()})

    def forward(self, videos: torch.Tensor) -> dict[str, torch.Tensor]:
        """All logits by name."""
        cells = self.cells(self.trunk(videos.flatten(1, 2)))
        whole = self.whole(cells)
        out = {name: head(whole) for name, head in self.heads.items()}
        return out | {name: head(cells).flatten(2).transpose(1, 2) for name, head in self.at.items()}


def targets(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Class indices for every head of `Watcher`."""
    index = torch.full((len(OBJECTS) + 1,), -1, device=batch["item"].device)
    index[[OBJECTS.index(name) for name in MOVERS]] = torch.arange(len(MOVERS), device=index.device)
    item, colour = cell_targets(batch)
    motion = cell_targets(batch | {"colour": batch["motion"]})[1]
    return {
        "item": index[item] + 1,  # -1 reads the last place, which holds -1
        "colour": colour + 1,
        "motion": motion + 1,
        "background": batch["background"],
        "fill": batch["fill"],
    }


def loss(watcher: Watcher, videos: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the cross-entropies of all answers."""
    logits, want = watcher(videos), targets(batch)
    return sum(
        (
            nn.functional.cross_entropy(logits[name].flatten(0, -2).float(), index.flatten())
            for name, index in want.items()
        ),
        start=torch.zeros((), device=videos.device),
    )


@torch.no_grad()
def verdict(watcher: Watcher, videos: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Right or wrong, `b` bool: `objects` (each cell holds what it should and nothing else), their `colours`, ..."""
    return right(watcher(videos), batch)


def right(logits: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The verdict of answers that the judge has given already."""
    want = targets(batch)
    got = {name: odds.argmax(-1) for name, odds in logits.items()}
    there = want["item"] > 0
    return {
        "objects": (got["item"] == want["item"]).all(1),
        "colours": ((got["colour"] == want["colour"]) | ~there).all(1),
        "motions": ((got["motion"] == want["motion"]) | ~there).all(1),
        "background": got["background"] == want["background"],
        "fill": got["fill"] == want["fill"],
    }


def scores(logits: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per video, float32 `b`: `alignment`, `accuracy` (all of the verdict, 1 or 0), and the parts of the verdict.

    `alignment` is the mean log-probability (nats) that the judge gives to what the caption says: each object in its
    cell, its colour and motion, the background's colour and fill.
    """
    want = targets(batch)
    there = want["item"] > 0
    known = {name: there if name in _CELL else torch.ones_like(there[:, :1]) for name in want}
    odds = {
        name: value.float().log_softmax(-1).gather(-1, want[name][..., None])[..., 0].reshape(len(there), -1)
        for name, value in logits.items()
    }
    total = sum((odds[name] * known[name]).sum(1) for name in want)
    hits = right(logits, batch)
    found = {"alignment": total / sum(mask.sum(1) for mask in known.values())}
    found["accuracy"] = torch.stack(list(hits.values())).all(0).float()
    return found | {name: hit.float() for name, hit in hits.items()}


def load(file: Path, device: str) -> Watcher:
    """A trained judge, ready to judge."""
    watcher = Watcher().to(device).eval()
    watcher.load_state_dict({name: value.float() for name, value in load_file(file, device=device).items()})
    return watcher
