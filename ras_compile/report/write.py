"""Writes a report: a page (.html), a picture (.png), an animation (.gif), or the data of all of them (.json)."""

from __future__ import annotations

import json
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ras_compile.errors import ConfigError
from ras_compile.report.pictures import from_uri, pillow
from ras_compile.report.run import masks_of

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".html", ".png", ".gif", ".json")
# Pixels of the longer side of what is drawn.
_SIDE = 512
_TITLE = 22
_STEP_MS = 350


def checked(path: str | PathLike[str]) -> Path:
    """The path of a report that can be written.

    Raises:
        ConfigError: it is of another kind, its folder does not exist, or it is a folder itself.
    """
    if not isinstance(path, (str, PathLike)):
        raise ConfigError(f"a report is written to a path, such as 'run.html', and {type(path).__name__} is none.")
    found = Path(path)
    if found.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"a report is a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, not {found.name!r}."
        )
    if found.is_dir():
        raise ConfigError(f"{str(found)!r} is a folder; give the name of a file in it.")
    if not found.parent.is_dir():
        raise ConfigError(f"there is no folder {str(found.parent)!r} to write {found.name} to; make it first.")
    return found


def write(data: dict[str, Any], path: Path) -> None:
    """Writes the data of a report (see `collect`) as what the path's suffix says."""
    match path.suffix.lower():
        case ".json":
            path.write_text(json.dumps(data))
        case ".html":
            path.write_text(page(data), encoding="utf-8")
        case ".png":
            overview(data).save(path)
        case ".gif":
            frames = animation(data)
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=_STEP_MS, loop=0)


def page(data: dict[str, Any]) -> str:
    """One page that holds all it needs. What users wrote stands in it as data alone, and so is never taken for markup."""
    held = json.dumps(data).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    template = (files("ras_compile.report") / "page.html").read_text(encoding="utf-8")
    before, mark, after = template.partition("/*data*/")
    assert mark
    return before + held + after


def overview(data: dict[str, Any]) -> Image:
    """The dense picture, if there is one, the picture, and how many times each token was computed, side by side."""
    masks = masks_of(data)
    counts = masks.sum(0)
    least, most = int(counts.min()), int(counts.max())
    size = _size(data)
    tiles = [("all steps dense", _picture(data, "dense", size))] if data["dense"] else []
    tiles += [("region-adaptive", _picture(data, "picture", size))] if data["picture"] else []
    tiles.append((f"times computed: black {least}, white {most} of {len(masks)}", _heat(counts, data, size)))
    sheet = pillow().new("RGB", (len(tiles) * (size[0] + 4) - 4, size[1] + _TITLE), "white")
    for place, (title, tile) in enumerate(tiles):
        sheet.paste(tile, (place * (size[0] + 4), _TITLE))
        _label(sheet, (place * (size[0] + 4) + 4, 5), title)
    return sheet


def animation(data: dict[str, Any]) -> list[Image]:
    """A frame for each step: the picture, dark where nothing is computed."""
    size = _size(data)
    picture = _picture(data, "picture", size) if data["picture"] else pillow().new("RGB", size, "#f0a868")
    dark = picture.point(lambda value: value // 4)
    frames = []
    for number, (mask, step) in enumerate(zip(masks_of(data), data["steps"], strict=True)):
        frame = pillow().new("RGB", (size[0], size[1] + _TITLE), "white")
        frame.paste(pillow().composite(picture, dark, _tile(255 * mask.to(torch.uint8), data, size)), (0, _TITLE))
        share = 100 * step["active"] / data["tokens"] if data["tokens"] else 100
        _label(frame, (4, 5), f"step {number}: {step['kind']}, {share:.3g} %")
        frames.append(frame)
    return frames


def _size(data: dict[str, Any]) -> tuple[int, int]:
    _, rows, columns = data["grid"]
    width, height = from_uri(data["picture"][0]).size if data["picture"] else (columns, rows)
    scale = _SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _picture(data: dict[str, Any], name: str, size: tuple[int, int]) -> Image:
    frames = data[name]
    return from_uri(frames[len(frames) // 2]).resize(size)


def _tile(tokens: Tensor, data: dict[str, Any], size: tuple[int, int]) -> Image:
    """Values of the tokens, uint8 [N], as a grey picture; of a video those of its middle frame."""
    frames, rows, columns = data["grid"]
    shown = (
        tokens.reshape(frames, rows, columns)[frames // 2] if frames * rows * columns == len(tokens) else tokens[None]
    )
    image = pillow().frombytes("L", (shown.shape[1], shown.shape[0]), bytes(shown.flatten().tolist()))
    return image.resize(size, pillow().Resampling.NEAREST)


def _heat(counts: Tensor, data: dict[str, Any], size: tuple[int, int]) -> Image:
    """Black where fewest, through red and yellow to white where most."""
    share = (counts - counts.min()) / (counts.max() - counts.min()).clamp_min(1)
    bands = [_tile((255 * (3 * share - band).clamp(0, 1)).to(torch.uint8), data, size) for band in range(3)]
    return pillow().merge("RGB", bands)


def _label(image: Image, place: tuple[int, int], text: str) -> None:
    from PIL import ImageDraw

    ImageDraw.Draw(image).text(place, text, fill="black")
