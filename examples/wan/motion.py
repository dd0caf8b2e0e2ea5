"""Moving scenes: one or two emoji that stand still or move at one of two speeds, nine frames of 64 x 64 pixels.

As in `examples/emoji/scenes.py` everything follows from a seed, coordinates are in 128ths of the picture's side, and
a tenth of the tuples (objects, relation, motions) is held out from training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

EMOJI = Path(__file__).parents[1] / "emoji"
if str(EMOJI) not in sys.path:
    sys.path.append(str(EMOJI))  # the emoji example is a folder of scripts that import each other

from compose import Atlas, background, paste  # noqa: E402  (found through the line above)
from objects import BACKGROUND_NAMES, COLOUR_NAMES, FILLS, OBJECTS, OWN_COLOUR, UNCOUNTED, article  # noqa: E402
from scenes import held_out  # noqa: E402
from text import ids_of  # noqa: E402

FRAMES, SIZE, SLOTS = 9, 64, 2
MOVERS = tuple(name for name in OBJECTS if name in OWN_COLOUR and name not in UNCOUNTED)
FILLED = FILLS[:5]  # the finer textures are lost in so few pixels
# Class of a motion -> its words and its way in 128ths over the nine frames.
_WAYS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS: tuple[tuple[str, float, float], ...] = (
    ("standing still", 0, 0),
    *(
        (f"moving {speed} {way}", way_x * length, way_y * length)
        for way, (way_x, way_y) in _WAYS.items()
        for speed, length in (("slowly", 22), ("fast", 56))
    ),
)
_ACROSS = tuple(index for index, (_, _, y) in enumerate(MOTIONS) if y == 0)
_ALONG = tuple(index for index, (_, x, _) in enumerate(MOTIONS) if x == 0)
# Relation -> the centres of both objects in the middle of the time, and the motions in which they do not meet.
_RELATIONS = {
    "to the left of": (((33, 64), (95, 64)), _ALONG),
    "to the right of": (((95, 64), (33, 64)), _ALONG),
    "above": (((64, 33), (64, 95)), _ACROSS),
    "below": (((64, 95), (64, 33)), _ACROSS),
}


@dataclass(frozen=True)
class Clip:
    """A moving scene: per object its item, colour (-1: the artwork's), motion, and pose in the middle of the time."""

    items: tuple[int, ...]
    colours: tuple[int, ...]
    motions: tuple[int, ...]
    poses: tuple[tuple[float, float, float, float], ...]
    background: int
    fill: int
    caption: str
    key: tuple
    seed: tuple[float, ...]


class ClipSampler:
    """Draws clips without end; `split` False gives the training split, True the held-out one, None both."""

    def __init__(self, seed: int | tuple[int, ...], split: bool | None = False) -> None:
        self.split, self.rng = split, np.random.default_rng(seed)

    def clip(self) -> Clip:
        """One clip of the split."""
        while True:
            clip = self._draw()
            if self.split is None or held_out(clip.key) == self.split:
                return clip

    def _phrase(self, name: str) -> tuple[int, str]:
        """A colour for the object, and the words for both."""
        own = COLOUR_NAMES.index(OWN_COLOUR[name])
        if self.rng.random() < 0.4:
            return own, article(name if self.rng.random() < 0.5 else f"{COLOUR_NAMES[own]} {name}")
        colour = int(self.rng.integers(len(COLOUR_NAMES)))
        return colour, article(f"{COLOUR_NAMES[colour]} {name}")

    def _draw(self) -> Clip:
        rng = self.rng
        pair = rng.random() < 0.5
        names = [str(name) for name in rng.choice(MOVERS, 2 if pair else 1, replace=False)]
        colours, phrases = zip(*(self._phrase(name) for name in names), strict=True)
        relation = str(rng.choice(list(_RELATIONS))) if pair else ""
        centres, allowed = _RELATIONS[relation] if pair else (((64, 64),), range(len(MOTIONS)))
        motions = tuple(int(motion) for motion in rng.choice(list(allowed), len(names)))
        told = [f"{phrase} {MOTIONS[motion][0]}" for phrase, motion in zip(phrases, motions, strict=True)]
        size = rng.uniform(44, 52) if pair else rng.uniform(54, 66)
        poses = tuple(
            (
                x + rng.uniform(-3, 3),
                y + rng.uniform(-3, 3),
                size * rng.uniform(0.96, 1.04),
                rng.uniform(-0.12, 0.12),
            )
            for x, y in centres
        )
        back = int(rng.integers(len(BACKGROUND_NAMES)))
        fill = 0 if rng.random() < 0.5 else int(rng.integers(1, len(FILLED)))
        where = BACKGROUND_NAMES[back] if fill == 0 else f"{FILLED[fill]} {BACKGROUND_NAMES[back]}"
        return Clip(
            items=tuple(OBJECTS.index(name) for name in names),
            colours=colours,
            motions=motions,
            poses=poses,
            background=back,
            fill=fill,
            caption=f" {relation} ".join(told) + f" on {article(where)} background",
            key=(*names, relation, motions),
            seed=tuple(rng.random(8)),
        )


def collate(clips: list[Clip]) -> dict[str, torch.Tensor]:
    """Clips -> item, colour, motion `b slot` (-1: none), pose `b slot (x y size angle)`, seed `b 8`, the rest `b`."""
    out = {name: torch.full((len(clips), SLOTS), -1) for name in ("item", "colour", "motion")}
    pose = torch.zeros(len(clips), SLOTS, 4)
    for row, clip in enumerate(clips):
        for slot, values in enumerate(zip(clip.items, clip.colours, clip.motions, clip.poses, strict=True)):
            out["item"][row, slot], out["colour"][row, slot], out["motion"][row, slot] = values[:3]
            pose[row, slot] = torch.tensor(values[3])
    return out | {
        "pose": pose,
        "background": torch.tensor([clip.background for clip in clips]),
        "fill": torch.tensor([clip.fill for clip in clips]),
        "seed": torch.tensor([clip.seed for clip in clips], dtype=torch.float32),
    }


class Clips(IterableDataset):
    """Collated training clips, with `tokens` `b t` where there is a tokenizer; a tenth of the captions are empty."""

    def __init__(self, batch: int, seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.batch, self.seed, self.tokenizer = batch, seed, tokenizer

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        sampler = ClipSampler((self.seed, worker.id if worker else 0))
        while True:
            clips = [sampler.clip() for _ in range(self.batch)]
            out = collate(clips)
            if self.tokenizer is not None:
                told = [clip.caption if sampler.rng.random() >= 0.1 else "" for clip in clips]
                out["tokens"] = ids_of(self.tokenizer, told)
            yield out


def film(atlas: Atlas, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Collated clips -> videos `b 3 9 64 64` in [-1, 1]; the background stands still."""
    count, device = len(batch["item"]), batch["item"].device
    canvas = background(batch, SIZE).repeat_interleave(FRAMES, 0)
    way = torch.tensor([motion[1:] for motion in MOTIONS], device=device)
    when = torch.linspace(-0.5, 0.5, FRAMES, device=device)
    for slot in range(SLOTS):
        item, motion = batch["item"][:, slot], batch["motion"][:, slot].clamp(min=0)
        row = atlas.variant[item.clamp(min=0), batch["colour"][:, slot] + 1]
        pose = batch["pose"][:, slot, None].repeat(1, FRAMES, 1)  # [b, f, 4]
        pose[..., :2] += way[motion][:, None] * when[:, None]
        sprites = atlas.levels[36][row].repeat_interleave(FRAMES, 0)
        canvas = paste(canvas, sprites, pose.flatten(0, 1), (item >= 0).repeat_interleave(FRAMES))
    return (canvas.clamp(0, 1) * 2 - 1).view(count, FRAMES, 3, SIZE, SIZE).transpose(1, 2)
