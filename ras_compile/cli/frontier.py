"""`ras-compile evaluate`: how near each way comes to the exact picture, and in what time, on the user's own weights.

The exact picture is that of many dense steps from the same noise. Each preset stands beside as many plain steps, and as many of
DPM-Solver++, as take the same time: a preset that these beat is not worth having.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ras_compile.cli.drawing import Artist, Drawn, as_tensor, dpm_solver
from ras_compile.errors import ConfigError
from ras_compile.report.pictures import as_uri, few, frames_of


@dataclass
class Row:
    """One way.

    Attributes:
        name: what it is called.
        steps: its number of steps.
        seconds, psnr, ssim: of each prompt: seconds of its steps, and how near it is to the exact picture.
        clip: of each prompt: 100 times the cosine of picture and prompt, where there is a model that tells.
        pictures: of each prompt.
        speedup: by FLOPs, against as many dense steps.
    """

    name: str
    steps: int
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    clip: list[float] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    speedup: float | None = None

    def add(self, drawn: Drawn, exact: Tensor, prompt: str, clip: Callable[[Any, str], float] | None) -> None:
        """Takes a picture and what is known of it."""
        picture = as_tensor(drawn.picture, drawn.video)
        self.seconds.append(drawn.seconds)
        self.psnr.append(psnr(picture, exact))
        self.ssim.append(ssim(picture, exact))
        self.speedup = drawn.summary.flop_speedup
        shown = frames_of(drawn.picture, drawn.video)
        self.pictures.append(shown)
        if clip is not None:
            self.clip.append(clip(shown[len(shown) // 2], prompt))

    def told(self) -> dict[str, Any]:
        """As plain numbers: means over the prompts."""
        found = {"way": self.name, "steps": self.steps, "seconds": mean(self.seconds), "flop_speedup": self.speedup}
        return {
            **found,
            "psnr": mean(self.psnr),
            "ssim": mean(self.ssim),
            "clip": mean(self.clip) if self.clip else None,
        }


def psnr(picture: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; at most 100, that of equal ones."""
    error = float((picture.double() - exact.double()).square().mean())
    return min(100.0, -10 * math.log10(max(error, 1e-10)))


def ssim(picture: Tensor, exact: Tensor) -> float:
    """Structural similarity of pictures [B, C, H, W] in [0, 1] (Wang et al. 2004, Gaussian windows of 11, sigma 1.5)."""
    size = min(11, *(2 * ((side + 1) // 2) - 1 for side in picture.shape[-2:]))
    line = torch.exp(-(torch.arange(size, dtype=torch.float64) - size // 2).square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    a, b = (value.double().flatten(0, 1)[:, None] for value in (picture, exact))

    def smooth(value: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(value, window)

    mean_a, mean_b = smooth(a), smooth(b)
    spread = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    shared = smooth(a * b) - mean_a * mean_b
    first, second = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + first) * (2 * shared + second)
    return float((top / ((mean_a**2 + mean_b**2 + first) * (spread + second))).mean())


def clip_score(folder: Path) -> Callable[[Any, str], float]:
    """A function that gives 100 times the cosine of a picture and a prompt (CLIPScore, Hessel et al. 2021).

    Raises:
        ConfigError: the folder holds no CLIP model.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ImportError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(
            f"--clip takes a folder with a CLIP model and its processor; {folder} is none ({line})."
        ) from None

    @torch.no_grad()
    def score(picture: Any, prompt: str) -> float:
        inputs = processor(text=[prompt], images=picture, return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs)
        return 100 * float(torch.cosine_similarity(found.image_embeds, found.text_embeds))

    return score


def frontier(
    artist: Artist,
    prompts: Sequence[str],
    presets: Sequence[str],
    steps: int,
    exact_steps: int,
    clip: Callable[[Any, str], float] | None = None,
    on_drawn: Callable[[str], None] = lambda name: None,
) -> tuple[list[Row], list[str]]:
    """Draws every prompt in every way.

    Args:
        artist: draws.
        prompts: the `n`-th with the seed `n`.
        presets: those that are compared.
        steps: of the presets.
        exact_steps: dense steps of the picture that counts as exact.
        clip: see `clip_score`.
        on_drawn: told the name of each way when it has drawn a prompt.

    Returns:
        a row for each way, the exact one left out, and what could not be compared.
    """
    rows: dict[str, Row] = {}
    notes: list[str] = []
    exacts: list[Tensor] = []

    def draw(name: str, count: int, way: Callable[..., Drawn]) -> Row:
        row = rows.setdefault(name, Row(name, count))
        for seed, prompt in enumerate(prompts):
            row.add(way(count, prompt=prompt, seed=seed), exacts[seed], prompt, clip)
            on_drawn(name)
        return row

    for seed, prompt in enumerate(prompts):
        drawn = artist.dense(exact_steps, prompt=prompt, seed=seed)
        exacts.append(as_tensor(drawn.picture, drawn.video))
        on_drawn("exact")
    dense = draw("dense", steps, artist.dense)
    per_step = mean(dense.seconds) / steps
    budgets: dict[int, None] = {}
    for preset in presets:

        def adaptive(count: int, preset: str = preset, **more: Any) -> Drawn:
            return artist.adaptive(count, preset, **more)

        row = draw(preset, steps, adaptive)
        budgets[min(steps, max(2, round(mean(row.seconds) / per_step)))] = None
    for count in budgets:
        if count != steps:
            draw(f"{count} plain steps", count, artist.dense)
        try:
            with artist.solver(dpm_solver(artist.pipe.scheduler)):
                draw(f"{count} DPM-Solver++ steps", count, artist.dense)
        except (ConfigError, ValueError, TypeError) as error:
            rows.pop(f"{count} DPM-Solver++ steps", None)
            notes.append(f"DPM-Solver++ does not fit this pipeline: {error}")
            break
    return list(rows.values()), notes


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Head and lines of the comparison."""
    clip = any(row.clip for row in rows)
    lines = [["way", "steps", "seconds", "FLOPs", "PSNR dB", "SSIM", *(["CLIPScore"] * clip)]]
    for row in rows:
        told = row.told()
        saved = "" if row.speedup is None else f"{row.speedup:.2f}x"
        cells = [
            row.name,
            f"{row.steps}",
            f"{told['seconds']:.3g}",
            saved,
            f"{told['psnr']:.2f}",
            f"{told['ssim']:.4f}",
        ]
        lines.append([*cells, *([f"{told['clip']:.2f}" if row.clip else ""] * clip)])
    return lines


def page(rows: Sequence[Row], prompts: Sequence[str], notes: Sequence[str], exact_steps: int) -> str:
    """One page that needs nothing else: the table, seconds against PSNR, and the pictures."""
    lines = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for line, tag in zip(table(rows), ["th", *["td"] * len(rows)], strict=True)
    )
    pictures = ""
    for place, prompt in enumerate(prompts):
        tiles = ""
        for row in rows:
            frames = few(row.pictures[place])
            uri = as_uri(frames[len(frames) // 2], len(prompts) * len(rows) <= 32)
            said = f"{html.escape(row.name)}, {row.psnr[place]:.1f} dB"
            tiles += f"<figure><img src='{uri}' alt=''><figcaption>{said}</figcaption></figure>"
        pictures += f"<h2>{html.escape(prompt)}</h2><div class=row>{tiles}</div>"
    noted = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return _PAGE.format(exact=exact_steps, table=lines, plot=_plot(rows), pictures=pictures, notes=noted)


def _plot(rows: Sequence[Row]) -> str:
    told = [row.told() for row in rows]
    most = max(entry["seconds"] for entry in told) * 1.1 or 1
    low, high = (f(entry["psnr"] for entry in told) for f in (min, max))
    span = max(high - low, 1e-9)
    marks = ""
    for row, entry in zip(rows, told, strict=True):
        x, y = 40 + 520 * entry["seconds"] / most, 270 - 230 * (entry["psnr"] - low) / span
        color = "#3b6fb6" if row.name == "dense" or "steps" in row.name else "#e8833a"
        anchor, aside = ("end", -8) if x > 400 else ("start", 8)
        marks += f"<circle cx={x:.1f} cy={y:.1f} r=5 fill='{color}'/>"
        marks += f"<text x={x + aside:.1f} y={y + 4:.1f} text-anchor={anchor}>{html.escape(row.name)}</text>"
    marks += f"<text x=580 y=300 text-anchor=end>seconds, to {most:.3g}</text>"
    marks += f"<text x=44 y=16>PSNR, {low:.1f} to {high:.1f} dB</text>"
    axes = "<path d='M40 20V280H580' fill=none stroke=#888 />"
    return f"<svg viewBox='0 0 600 310' role=img aria-label='seconds against PSNR'>{axes}{marks}</svg>"


_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>The frontier</title><link rel=icon href="data:,"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 20px 16px; color: #1d2330; }}
h1 {{ font-size: 19px; }} h2 {{ font-size: 15px; overflow-wrap: anywhere; }} .wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid #d9dee7; white-space: nowrap; }}
svg {{ width: 100%; max-width: 600px; font-size: 11px; }} .row {{ display: flex; flex-wrap: wrap; gap: 8px; }}
figure {{ margin: 0; width: 160px; }} img {{ width: 100%; }} figcaption {{ font-size: 12px; color: #667085; }}
</style><h1>How near each way comes to the exact picture, and in what time</h1>
<p>Exact: {exact} dense steps from the same noise. Means over the prompts; seconds of the steps alone.</p>
<div class=wide><table>{table}</table></div>{notes}{plot}{pictures}</html>
"""
