"""Draw batches of scenes on the device: sprites pasted by `grid_sample`, backgrounds by formula."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import TILE, load_tiles
from objects import BACKGROUNDS, COLOUR_NAMES, COLOURS, OBJECTS, OWN_COLOUR
from scenes import SIZE, SLOTS

_NUMBER_SIZE, _NUMBER_GAP, _NUMBER_CENTRE = 38.0, 19.0, (102.0, 108.0)


def _rgb_to_hsv(rgb: torch.Tensor) -> torch.Tensor:
    """`... 3 -> ... 3`; hue in turns."""
    top, which = rgb.max(-1)
    spread = (top - rgb.min(-1).values).clamp(min=1e-6)
    r, g, b = rgb.unbind(-1)
    sector = torch.stack((((g - b) / spread) % 6, (b - r) / spread + 2, (r - g) / spread + 4), -1)
    hue = sector.gather(-1, which[..., None])[..., 0] / 6
    return torch.stack((hue, spread / top.clamp(min=1e-6), top), -1)


def _hsv_to_rgb(hsv: torch.Tensor) -> torch.Tensor:
    hue, saturation, value = hsv.unbind(-1)
    turn = (torch.tensor((5.0, 3.0, 1.0), device=hsv.device) + hue[..., None] * 6) % 6
    fall = torch.minimum(turn, 4 - turn).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * fall)


def dominant_hue(tile: torch.Tensor) -> float:
    """The mean hue (turns) of a tile `h w 4` in [0, 1], weighted by ink and saturation."""
    hue, saturation, value = _rgb_to_hsv(tile[..., :3]).unbind(-1)
    weight = tile[..., 3] * saturation**2 * value
    return float(torch.polar(weight, hue * 2 * math.pi).sum().angle() / (2 * math.pi) % 1)


class Atlas:
    """All sprites as premultiplied RGBA tensors; row `variant[item, colour + 1]` is the sprite to draw.

    Only the objects named in `OWN_COLOUR` have recoloured variants; for the others every column is the artwork itself.
    """

    def __init__(self, cache: Path, device: str | torch.device = "cpu") -> None:
        tiles = torch.from_numpy(load_tiles(cache).astype(np.float32) / 255)  # [items + 10, 96, 96, 4]
        objects, digits = tiles[: len(OBJECTS)], tiles[len(OBJECTS) :]
        hues = torch.tensor(list(COLOURS.values())) / 360
        sprites = list(objects)
        variant = torch.arange(len(OBJECTS))[:, None].repeat(1, len(COLOURS) + 1)
        for item, tile in enumerate(objects):
            if OBJECTS[item] not in OWN_COLOUR:
                continue
            away = (hues - dominant_hue(tile) + 0.5) % 1 - 0.5
            hsv = _rgb_to_hsv(tile[..., :3])
            for colour, turn in enumerate(away.tolist()):
                if COLOUR_NAMES[colour] != OWN_COLOUR[OBJECTS[item]]:
                    turned = torch.cat(((hsv[..., :1] + turn) % 1, hsv[..., 1:]), -1)
                    variant[item, colour + 1] = len(sprites)
                    sprites.append(torch.cat((_hsv_to_rgb(turned), tile[..., 3:]), -1))
        self.variant = variant.to(device)
        planes = self._planes(torch.stack(sprites))
        self.levels = {
            size: F.interpolate(planes, size=(size, size), mode="area").to(device) for size in (TILE, 56, 36)
        }
        self.digits = F.interpolate(self._planes(digits), size=(40, 40), mode="area").to(device)

    @staticmethod
    def _planes(tiles: torch.Tensor) -> torch.Tensor:
        """Straight alpha `n h w 4` -> premultiplied `n 4 h w`."""
        return torch.cat((tiles[..., :3] * tiles[..., 3:], tiles[..., 3:]), -1).permute(0, 3, 1, 2).contiguous()


def background(batch: dict[str, torch.Tensor], size: int = SIZE) -> torch.Tensor:
    """Fill the canvases: `b 3 size size` in [0, 1]; two tones of the named colour, mixed by the fill's formula."""
    device = batch["seed"].device
    base = torch.tensor(list(BACKGROUNDS.values()), device=device)[batch["background"]] / 255  # [b, 3]
    seed = batch["seed"][:, :, None, None]  # [b, 8, 1, 1]
    base = base + (seed[:, 0, :, 0] - 0.5) * 0.05
    light = base.mean(1, keepdim=True) < 0.5
    other = torch.where(light, base + (1 - base) * 0.42, base * 0.68)

    axis = torch.arange(size, device=device) * (SIZE / size)
    y, x = (plane[None] for plane in torch.meshgrid(axis, axis, indexing="ij"))
    turn = seed[:, 1] * math.pi
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    period = 14 + 10 * seed[:, 2]
    phase, phase2 = seed[:, 3] * period, seed[:, 4] * period
    wave = 2 * math.pi / period

    def crisp(field: torch.Tensor, width: float) -> torch.Tensor:  # an edge of about one pixel
        return (field / width + 0.5).clamp(0, 1)

    du, dv = ((u + phase) % period - period / 2), ((v + phase2) % period - period / 2)
    row = ((y + phase) / period * 2).floor()
    brick_y, brick_x = (y + phase) % (period / 2), (x + phase2 + (row % 2) * period / 2) % period
    noise = sum(
        torch.sin(wave * k * (u * math.cos(a) + v * math.sin(a)) * 0.42 + 6.28 * seed[:, 3 + i % 5] + 2.1 * i) / k
        for i, (k, a) in enumerate(((0.6, 0.3), (0.9, 1.7), (1.3, 2.6), (1.9, 0.9), (2.6, 2.1)))
    )
    grain = torch.frac(
        torch.sin((x + 3.1 * seed[:, 3]).floor() * 12.9898 + y.floor() * 78.233 + seed[:, 4] * 43) * 43758.5453
    ).abs()
    zero = torch.zeros_like(noise)
    fields = torch.stack(
        (
            zero,
            ((u - 64 * (turn.cos() + turn.sin())) / 150 + 0.5 + 0 * v).clamp(0, 1).expand_as(noise),
            crisp(torch.sin(wave * u + 6.28 * seed[:, 3]), 0.45),
            crisp(torch.sin(wave * u * 0.7 + 6.28 * seed[:, 3]) * torch.sin(wave * v * 0.7 + 6.28 * seed[:, 4]), 0.3),
            crisp(0.3 * period - (du.square() + dv.square()).sqrt(), 1.2),
            crisp(torch.sin(wave * (u + 3.5 * torch.sin(v * 0.22 + 6.28 * seed[:, 4])) + 6.28 * seed[:, 3]), 0.5),
            crisp(1.2 - torch.minimum(brick_y, brick_x), 1.0),
            (0.5 + 0.28 * noise).clamp(0, 1),
            (0.5 + 0.5 * torch.sin(wave * u * 0.6 + 3.2 * noise)).clamp(0, 1) ** 2,
            crisp(grain - 0.86, 0.1),
        ),
        1,
    )  # [b, fills, h, w]
    index = batch["fill"][:, None, None, None].expand(-1, 1, size, size)
    mix = fields.gather(1, index)  # [b, 1, h, w]
    return base[:, :, None, None] * (1 - mix) + other[:, :, None, None] * mix


def paste(canvas: torch.Tensor, sprites: torch.Tensor, pose: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Blend premultiplied sprites `b 4 s s` at poses `b (x y size angle)` over the canvas `b 3 h w`, where `shown`.

    Poses are in pixels of a canvas of 128 x 128, whatever its size is.
    """
    x, y, size, angle = pose.unbind(-1)
    scale = SIZE / size.clamp(min=1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    dx, dy = 1 - 2 * x / SIZE, 1 - 2 * y / SIZE
    theta = torch.stack((cos, sin, cos * dx + sin * dy, -sin, cos, cos * dy - sin * dx), -1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(canvas), 4, *canvas.shape[-2:]], align_corners=False)
    layer = F.grid_sample(sprites, grid, align_corners=False) * shown[:, None, None, None]
    return canvas * (1 - layer[:, 3:]) + layer[:, :3]


def compose(atlas: Atlas, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Collated scenes -> pictures `b 3 128 128` in [-1, 1]."""
    canvas = background(batch)
    for slot in range(SLOTS):
        item, pose = batch["item"][:, slot], batch["pose"][:, slot]
        row = atlas.variant[item.clamp(min=0), batch["colour"][:, slot] + 1]
        large = pose[:, 2] > 62
        if slot == 0:  # only a single object is large
            canvas = paste(canvas, atlas.levels[TILE][row], pose, (item >= 0) & large)
        canvas = paste(canvas, atlas.levels[56][row], pose, (item >= 0) & ~large)
    shown = batch["number"] >= 0
    for place, digit in enumerate((batch["number"] // 10, batch["number"] % 10)):
        pose = torch.zeros(len(canvas), 4, device=canvas.device)
        pose[:, 0] = _NUMBER_CENTRE[0] + (place - 0.5) * _NUMBER_GAP + (batch["seed"][:, 5] - 0.5) * 4
        pose[:, 1] = _NUMBER_CENTRE[1] + (batch["seed"][:, 6] - 0.5) * 4
        pose[:, 2] = _NUMBER_SIZE
        canvas = paste(canvas, atlas.digits[digit.clamp(min=0)], pose, shown)
    return canvas.clamp(0, 1) * 2 - 1
