"""Scenes and captions: what is drawn where, and the sentence that says so. Deterministic from a seed.

A scene is one object, two objects side by side or one above the other, or two to four of one object; on a flat, shaded
or textured background; sometimes with a two-digit number in the lower right corner. `held_out` names the tenth of the
tuples (objects, relation or count or colours) that training never sees; each object and relation is seen in others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from objects import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    COUNT_WORDS,
    FILLS,
    OBJECTS,
    OWN_COLOUR,
    UNCOUNTED,
    article,
    plural,
)

SIZE = 128  # pixels
SLOTS = 4  # objects in a scene, at most
GRID = 3  # the classifier's cells: every layout puts at most one object's centre into a cell

_RELATION_TEXT = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}
_MIRRORED = {"right": "left", "below": "above"}
_LAYOUTS: dict[str, tuple[tuple[float, float], ...]] = {
    "one": ((64, 64),),
    "left": ((33, 64), (95, 64)),
    "right": ((95, 64), (33, 64)),
    "above": ((64, 33), (64, 95)),
    "below": ((64, 95), (64, 33)),
    "two": ((33, 64), (95, 64)),
    "three": ((64, 34), (34, 94), (94, 94)),
    "four": ((34, 34), (94, 34), (34, 94), (94, 94)),
}
_SIZES = {"one": (74, 92), "two": (52, 60), "three": (44, 52), "four": (44, 52)}


@dataclass(frozen=True)
class Placement:
    """One sprite: `colour` indexes the colours, -1 is the artwork's; centre and size in pixels, angle in radians."""

    item: int
    colour: int
    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A scene, its caption, and the tuple by which it is held out or not."""

    placements: tuple[Placement, ...]
    background: int
    fill: int
    number: int | None
    caption: str
    key: tuple
    seed: tuple[float, ...] = field(default=())  # eight uniforms that the background and the number draw from


def held_out(key: tuple) -> bool:
    """About a tenth of all keys, by a hash that does not change between runs."""
    return zlib.crc32(repr(key).encode()) % 10 == 0


class SceneSampler:
    """Draws scenes without end; `held_out=False` gives the training split, `True` the held-out one, `None` both."""

    def __init__(self, seed: int | tuple[int, ...], held_out: bool | None = False) -> None:
        self.split = held_out
        self.rng = np.random.default_rng(seed)
        self.countable = [index for index, name in enumerate(OBJECTS) if name not in UNCOUNTED]

    def scene(self, kind: str | None = None, number: bool | None = None) -> Scene:
        """One scene of the split; `kind` is "one", "pair" or "count", `number` says whether it bears a number."""
        kind = kind or ("one", "pair", "count")[int(self.rng.choice(3, p=(0.42, 0.40, 0.18)))]
        number = kind != "count" and self.rng.random() < 0.12 if number is None else number
        while True:
            scene = self._draw(kind, number)
            if self.split is None or held_out(scene.key) == self.split:
                return scene

    def __iter__(self) -> Iterator[Scene]:
        while True:
            yield self.scene()

    def _object(self, item: int) -> tuple[int, str]:
        """A colour for the object and the phrase that names both."""
        name = OBJECTS[item]
        if name not in OWN_COLOUR:
            return -1, name
        natural = COLOUR_NAMES.index(OWN_COLOUR[name])
        if self.rng.random() < 0.4:
            return natural, name if self.rng.random() < 0.5 else f"{COLOUR_NAMES[natural]} {name}"
        colour = int(self.rng.integers(len(COLOUR_NAMES)))
        return colour, f"{COLOUR_NAMES[colour]} {name}"

    def _draw(self, kind: str, number: bool) -> Scene:
        rng = self.rng
        background = int(rng.integers(len(BACKGROUND_NAMES)))
        roll = rng.random()  # the last third is textured
        fill = 0 if roll < 0.40 else 1 if roll < 0.66 else int(rng.integers(2, len(FILLS)))
        if kind == "one":
            item = int(rng.integers(len(OBJECTS)))
            colour, phrase = self._object(item)
            layout, items, colours, text = "one", (item,), (colour,), article(phrase)
            key: tuple = (OBJECTS[item], colour, background)
        elif kind == "pair":
            items = tuple(int(item) for item in rng.choice(len(OBJECTS), 2, replace=False))
            layout = str(rng.choice(list(_RELATION_TEXT)))
            colours, phrases = zip(*(self._object(item) for item in items), strict=True)
            words = _RELATION_TEXT[layout]
            text = f"{article(phrases[0])} {words[int(rng.integers(len(words)))]} {article(phrases[1])}"
            ordered = items[::-1] if layout in _MIRRORED else items
            key = (OBJECTS[ordered[0]], _MIRRORED.get(layout, layout), OBJECTS[ordered[1]])
        else:
            item = int(rng.choice(self.countable))
            count = int(rng.integers(2, 5))
            colour, phrase = self._object(item)
            layout, items, colours = COUNT_WORDS[count], (item,) * count, (colour,) * count
            text = f"{COUNT_WORDS[count]} {phrase.removesuffix(OBJECTS[item])}{plural(OBJECTS[item])}"
            key = (OBJECTS[item], count)
        value = int(rng.integers(10, 100)) if number else None
        where = BACKGROUND_NAMES[background] if fill == 0 else f"{FILLS[fill]} {BACKGROUND_NAMES[background]}"
        text += f" on {article(where)} background" + (f" with the number {value}" if number else "")
        return Scene(
            placements=self._place(layout, items, colours, number),
            background=background,
            fill=fill,
            number=value,
            caption=text,
            key=key,
            seed=tuple(rng.random(8)),
        )

    def _place(self, layout: str, items: tuple, colours: tuple, number: bool) -> tuple[Placement, ...]:
        rng = self.rng
        low, high = _SIZES.get(layout, _SIZES["two"])
        size = rng.uniform(low, high)
        jitter, shift = (5.0, (0.0, 0.0)) if layout == "one" else (2.5, (0.0, 0.0))
        if number and layout == "one":  # leave the corner to the number
            size, shift = size * 0.86, (-8.0, -8.0)
        elif number and layout in ("left", "right"):
            shift = (0.0, -10.0)
        elif number:
            shift = (-8.0, -2.0)
        return tuple(
            Placement(
                item,
                colour,
                x + shift[0] + rng.uniform(-jitter, jitter),
                y + shift[1] + rng.uniform(-jitter, jitter),
                size * rng.uniform(0.96, 1.04),
                rng.uniform(-0.12, 0.12),
            )
            for item, colour, (x, y) in zip(items, colours, _LAYOUTS[layout], strict=True)
        )


def collate(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Scenes -> tensors: item, colour `b slot` (-1: none), pose `b slot (x y size angle)`, seed `b 8`, the rest `b`."""
    item = torch.full((len(scenes), SLOTS), -1)
    colour = torch.full((len(scenes), SLOTS), -1)
    pose = torch.zeros(len(scenes), SLOTS, 4)
    for row, scene in enumerate(scenes):
        for slot, placed in enumerate(scene.placements):
            item[row, slot], colour[row, slot] = placed.item, placed.colour
            pose[row, slot] = torch.tensor((placed.x, placed.y, placed.size, placed.angle))
    return {
        "item": item,
        "colour": colour,
        "pose": pose,
        "background": torch.tensor([scene.background for scene in scenes]),
        "fill": torch.tensor([scene.fill for scene in scenes]),
        "number": torch.tensor([-1 if scene.number is None else scene.number for scene in scenes]),
        "seed": torch.tensor([scene.seed for scene in scenes], dtype=torch.float32),
    }


def cell_targets(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands in each cell of the 3 x 3 grid: item `b 9` and colour `b 9`, -1 where nothing does."""
    cells = (batch["pose"][..., :2] / (SIZE / GRID)).long().clamp(0, GRID - 1)
    index = torch.where(batch["item"] >= 0, cells[..., 1] * GRID + cells[..., 0], GRID * GRID)  # [b, slot]
    shape = (len(index), GRID * GRID + 1)
    item = torch.full(shape, -1, device=index.device).scatter(1, index, batch["item"])
    colour = torch.full(shape, -1, device=index.device).scatter(1, index, batch["colour"])
    return item[:, :-1], colour[:, :-1]
