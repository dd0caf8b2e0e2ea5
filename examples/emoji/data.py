"""Sprites: emoji artwork from the npm package `@iconify-json/noto`, rendered once to an atlas.

    python examples/emoji/data.py --cache .cache/emoji

The cache then holds `atlas.png` (rows of 96 x 96 RGBA tiles: objects, then the ten digits) and `atlas.json` (names).
Labels come from `emojibase-data`, joined on the code point without the variation selector FE0F.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from objects import NOUNS, OBJECTS
from PIL import Image

TILE = 96
COLUMNS = 16
ARTWORK = "@iconify-json/noto@1.2.9"
LABELS = "emojibase-data@17.0.0"

# A stroke font of our own, on a 20 x 32 box: the numbers in the scenes depend on no installed font.
_DIGITS = (
    "M10 3 C3 3 3 10 3 16 C3 22 3 29 10 29 C17 29 17 22 17 16 C17 10 17 3 10 3 Z",
    "M4 9 L11 3 L11 29",
    "M3 9 C3 1 17 1 17 9 C17 16 4 21 3 29 L17 29",
    "M3 6 C6 2 16 1 16 9 C16 14 11 15 8 15 C11 15 17 16 17 22 C17 31 5 31 3 26",
    "M14 29 L14 3 L3 21 L18 21",
    "M16 3 L5 3 L4 14 C8 11 17 12 17 20 C17 30 6 31 3 26",
    "M15 3 C7 7 3 14 3 21 C3 32 17 31 17 21 C17 13 6 12 3 20",
    "M3 3 L17 3 L8 29",
    "M10 15 C3 14 3 3 10 3 C17 3 17 14 10 15 C2 16 1 29 10 29 C19 29 18 16 10 15 Z",
    "M5 29 C13 25 17 18 17 11 C17 0 3 1 3 11 C3 19 14 20 17 12",
)


def digit_svg(digit: int) -> str:
    """One digit, white with a dark rim, so that it can be read on every background."""
    strokes = "".join(
        f'<path d="{_DIGITS[digit]}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linecap="round" '
        f'stroke-linejoin="round"/>'
        for colour, width in (("#202028", 7.5), ("#ffffff", 3.6))
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -2 36 36" width="36" height="36">{strokes}</svg>'


def fetch(package: str, cache: Path) -> Path:
    """Download an npm package by name into the cache; returns its folder."""
    folder = cache / package.replace("/", "-").lstrip("@")
    if not folder.exists():
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(cache / packed) as archive:
            archive.extractall(folder, filter="data")
        (cache / packed).unlink()
    return folder / "package"


def artwork_svgs(cache: Path) -> list[str]:
    """The SVG of every object, in the order of `OBJECTS`."""
    artwork, labels = fetch(ARTWORK, cache), fetch(LABELS, cache)
    code_of = {
        entry["label"]: entry["hexcode"].replace("-FE0F", "").lower()
        for entry in json.loads((labels / "en/data.json").read_text())
    }
    name_of = json.loads((artwork / "chars.json").read_text())
    icons = json.loads((artwork / "icons.json").read_text())
    svgs = []
    for name in OBJECTS:
        icon = name_of[code_of[NOUNS[name]]]
        icon = icons["aliases"][icon]["parent"] if icon not in icons["icons"] else icon
        entry = icons["icons"][icon]
        width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = max(width, height)
        view = f"{(width - box) / 2} {(height - box) / 2} {box} {box}"  # non-square icons are padded
        svgs.append(
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}" width="{box}" height="{box}">{entry["body"]}</svg>'
        )
    return svgs


def render(svg: str, size: int = TILE) -> np.ndarray:
    """SVG -> straight-alpha RGBA, uint8 [size, size, 4]."""
    import resvg_py  # needed for this step only

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def fitted(tile: np.ndarray, margin: int = 2) -> np.ndarray:
    """Crop to the drawing and scale its longer side to the tile, so that a size means the same for all objects."""
    rows, columns = np.where(tile[..., 3].max(1) > 8)[0], np.where(tile[..., 3].max(0) > 8)[0]
    drawing = Image.fromarray(tile[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = (TILE - 2 * margin) / max(drawing.size)
    drawing = drawing.resize([max(1, round(side * scale)) for side in drawing.size], Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (TILE, TILE))
    out.paste(drawing, [(TILE - side) // 2 for side in drawing.size])
    return np.asarray(out)


def build(cache: Path) -> None:
    """Render all sprites into `cache/atlas.png` and `cache/atlas.json`."""
    cache.mkdir(parents=True, exist_ok=True)
    tiles = [fitted(render(svg, 2 * TILE)) for svg in artwork_svgs(cache)]
    tiles += [render(digit_svg(digit)) for digit in range(10)]
    rows = -(-len(tiles) // COLUMNS)
    sheet = np.zeros((rows * TILE, COLUMNS * TILE, 4), np.uint8)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, COLUMNS)
        sheet[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = tile
    Image.fromarray(sheet).save(cache / "atlas.png", optimize=True)
    (cache / "atlas.json").write_text(json.dumps({"objects": OBJECTS, "digits": 10}))


def load_tiles(cache: Path) -> np.ndarray:
    """All tiles of the atlas: straight-alpha RGBA, uint8 [objects + 10, 96, 96, 4]."""
    count = len(json.loads((cache / "atlas.json").read_text())["objects"]) + 10
    if count != len(OBJECTS) + 10:
        raise ValueError(
            f"the atlas in {cache} has {count - 10} objects, the table has {len(OBJECTS)}: run data.py again"
        )
    sheet = np.asarray(Image.open(cache / "atlas.png"))
    rows = sheet.shape[0] // TILE
    tiles = sheet.reshape(rows, TILE, COLUMNS, TILE, 4).transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, 4)
    return tiles[:count]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    build(parser.parse_args().cache)
