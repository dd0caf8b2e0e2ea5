"""`ras-compile evaluate`: how near each way comes to the exact picture, and in what time, on the user's own weights.

The exact picture is that of many dense steps from the same noise. Each preset stands beside as many plain steps, and as many of
DPM-Solver++, as take the same time: a preset that these beat is not worth having.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from torch import Tensor

from ras_compile.cli.drawing import DPM, Artist, Drawn, as_tensor, dpm_solver
from ras_compile.cli.measures import Judge, psnr, ssim
from ras_compile.errors import ConfigError
from ras_compile.report.pictures import as_uri, few, frames_of
from ras_compile.report.run import finite

# What tells how well a picture fits its prompt, by the names that the data has, and how a table calls it.
JUDGES = {"clip": "CLIPScore", "image_reward": "ImageReward"}


@dataclass
class Row:
    """One way.

    Attributes:
        seconds, psnr, ssim: of each prompt: seconds of its steps, and how near it is to the exact picture.
    """

    name: str
    steps: int
    preset: bool = False  # whether it is one
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    judged: dict[str, list[float]] = field(default_factory=dict)  # of each prompt, what each of the judges says
    pictures: list[Any] = field(default_factory=list)  # of each prompt
    speedup: float | None = None  # by FLOPs, against as many dense steps

    def add(self, drawn: Drawn, exact: Tensor, prompt: str, judges: Mapping[str, Judge]) -> None:
        """Takes a picture and what is known of it."""
        picture = as_tensor(drawn.picture, drawn.video)
        self.seconds.append(drawn.seconds)
        self.psnr.append(psnr(picture, exact))
        self.ssim.append(ssim(picture, exact))
        self.speedup = drawn.summary.flop_speedup
        shown = frames_of(drawn.picture, drawn.video)
        self.pictures.append(shown)
        for name, judge in judges.items():
            self.judged.setdefault(name, []).append(judge(shown[len(shown) // 2], prompt))

    def told(self) -> dict[str, Any]:
        """As plain numbers: means over the prompts."""
        found = {"way": self.name, "steps": self.steps, "seconds": mean(self.seconds), "flop_speedup": self.speedup}
        found |= {"psnr": mean(self.psnr), "ssim": mean(self.ssim)}
        return found | {name: mean(self.judged[name]) if name in self.judged else None for name in JUDGES}


@dataclass
class Frontier:
    """All ways."""

    prompts: Sequence[str]  # what was drawn, the `n`-th with the seed `n`
    exact_steps: int  # dense steps of the pictures that count as exact
    rows: list[Row] = field(default_factory=list)  # the ways, the exact one left out
    exact: list[Any] = field(default_factory=list)  # the exact picture of each prompt
    rivals: dict[str, int] = field(default_factory=dict)  # of each preset the number of plain steps that take its time
    notes: list[str] = field(default_factory=list)  # what could not be compared

    def told(self) -> dict[str, Any]:
        """As plain data."""
        data = {
            "exact_steps": self.exact_steps,
            "prompts": len(self.prompts),
            "ways": [
                {name: finite(value) if isinstance(value, float) else value for name, value in row.told().items()}
                for row in self.rows
            ],
        }
        return data | {"same_time": self.rivals, "notes": self.notes}

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each preset: how near it comes, and how near plain steps come in its time."""
        rows = {row.name: row for row in self.rows}
        found = []
        for preset, count in self.rivals.items():
            dense = "dense" if count == rows["dense"].steps else f"{count} plain steps"
            near = [
                f"{name}: {mean(rows[name].psnr):.1f} dB"
                for name in (dense, f"{count} DPM-Solver++ steps")
                if name in rows
            ]
            found.append(
                f"{preset}: {mean(rows[preset].psnr):.1f} dB; in the time of {count} dense steps, {', '.join(near)}"
            )
        return found


def frontier(
    artist: Artist,
    prompts: Sequence[str],
    presets: Sequence[str],
    steps: int,
    exact_steps: int,
    judges: Mapping[str, Judge],
    on_drawn: Callable[[str], None] = lambda said: None,
) -> Frontier:
    """Draws every prompt in every way.

    Args:
        prompts: the `n`-th with the seed `n`.
        judges: by names of `JUDGES`.
        on_drawn: told what has been drawn, in words.
    """
    found = Frontier(prompts, exact_steps)
    exacts: list[Tensor] = []

    def draw(name: str, count: int, way: Callable[..., Drawn], preset: bool = False) -> list[float | None]:
        row, speedups = Row(name, count, preset), []
        for seed, prompt in enumerate(prompts):
            drawn = way(count, prompt=prompt, seed=seed)
            row.add(drawn, exacts[seed], prompt, judges)
            speedups.append(drawn.summary.speedup)
            on_drawn(f"{name}, prompt {seed + 1} of {len(prompts)}")
        found.rows.append(row)
        return speedups

    for seed, prompt in enumerate(prompts):
        drawn = artist.dense(exact_steps, prompt=prompt, seed=seed)
        exacts.append(as_tensor(drawn.picture, drawn.video))
        found.exact.append(frames_of(drawn.picture, drawn.video))
        on_drawn(f"{exact_steps} dense steps, prompt {seed + 1} of {len(prompts)}")
    draw("dense", steps, artist.dense)
    for preset in dict.fromkeys(presets):

        def adaptive(count: int, preset: str = preset, **more: Any) -> Drawn:
            return artist.adaptive(count, preset, **more)

        # against the dense steps of the same runs: a machine that is busy for a while slows both
        ratios = [ratio for ratio in draw(preset, steps, adaptive, True) if ratio is not None]
        ratio = median(ratios) if ratios else mean(found.rows[0].seconds) / mean(found.rows[-1].seconds)
        found.rivals[preset] = min(steps, max(2, round(steps / ratio)))
    if type(artist.pipe.scheduler).__name__ == DPM:
        found.notes.append("plain steps are those of DPM-Solver++, which this pipeline has.")
    for count in dict.fromkeys(found.rivals.values()):
        if count != steps:
            draw(f"{count} plain steps", count, artist.dense)
        if found.notes:
            continue
        try:
            with artist.solver(dpm_solver(artist.pipe.scheduler)):
                draw(f"{count} DPM-Solver++ steps", count, artist.dense)
        except (ConfigError, ValueError, TypeError) as error:
            found.notes.append(f"DPM-Solver++ does not fit this pipeline: {error}")
    return found


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Head and lines of the comparison."""
    judges = [name for name in JUDGES if any(name in row.judged for row in rows)]
    lines = [["way", "steps", "seconds", "saved by FLOPs", "PSNR dB", "SSIM", *(JUDGES[name] for name in judges)]]
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
        lines.append([*cells, *("" if told[name] is None else f"{told[name]:.3g}" for name in judges)])
    return lines


def page(found: Frontier) -> str:
    """One page that needs nothing else: the table, seconds against PSNR, and the pictures."""
    lines = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for line, tag in zip(table(found.rows), ["th", *["td"] * len(found.rows)], strict=True)
    )
    exactly = len(found.prompts) * (len(found.rows) + 1) <= 32  # more of them are held as JPEG, so that the page opens
    pictures = ""
    for place, prompt in enumerate(found.prompts):
        shown = [(f"exact: {found.exact_steps} dense steps", found.exact[place])]
        shown += [(f"{row.name}, {row.psnr[place]:.1f} dB", row.pictures[place]) for row in found.rows]
        tiles = ""
        for said, frames in shown:
            few_frames = few(frames)
            uri = as_uri(few_frames[len(few_frames) // 2], exactly)
            said = html.escape(said)
            tiles += f"<figure><img src='{uri}' alt='{said}'><figcaption>{said}</figcaption></figure>"
        pictures += f"<h2>{html.escape(prompt)}</h2><div class=row>{tiles}</div>"
    noted = "".join(f"<p>{html.escape(line)}</p>" for line in [*found.verdicts, *found.notes])
    return _PAGE.format(exact=found.exact_steps, table=lines, plot=_plot(found.rows), pictures=pictures, notes=noted)


def _plot(rows: Sequence[Row]) -> str:
    """Seconds to the right and PSNR upwards, a point and its name for each way."""
    told = [row.told() for row in rows]
    most = max(entry["seconds"] for entry in told) * 1.1 or 1
    low, high = (f(entry["psnr"] for entry in told) for f in (min, max))
    span = max(high - low, 1e-9)
    marks = ""
    taken: list[tuple[float, float]] = []
    for row, entry in sorted(zip(rows, told, strict=True), key=lambda pair: -pair[1]["psnr"]):
        x, y = 50 + 530 * entry["seconds"] / most, 260 - 220 * (entry["psnr"] - low) / span
        anchor, aside = ("end", -8) if x > 400 else ("start", 8)
        # a name goes below those of the points beside it
        label = max([y + 4, *(other + 13 for at, other in taken if abs(at - x) < 130 and other + 13 > y + 4)])
        taken.append((x, label))
        marks += f"<circle cx={x:.1f} cy={y:.1f} r=5 fill='{'#e8833a' if row.preset else '#3b6fb6'}'/>"
        marks += f"<text x={x + aside:.1f} y={label:.1f} text-anchor={anchor}>{html.escape(row.name)}</text>"
    for part in range(5):
        x, y = 50 + 530 * part / 4, 260 - 220 * part / 4
        marks += f"<text x={x:.1f} y=300 text-anchor=middle>{most * part / 4:.3g}</text>"
        marks += f"<text x=44 y={y + 4:.1f} text-anchor=end>{low + (high - low) * part / 4:.1f}</text>"
    marks += "<text x=580 y=318 text-anchor=end>seconds of the steps</text><text x=10 y=16>PSNR in dB</text>"
    axes = "<path d='M50 26V284H580' fill=none stroke=#888 />"
    return f"<svg viewBox='0 0 610 324' role=img aria-label='seconds against PSNR'>{axes}{marks}</svg>"


_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>The frontier</title><link rel=icon href="data:,"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 20px 16px; color: #1d2330; }}
h1 {{ font-size: 19px; }} h2 {{ font-size: 15px; overflow-wrap: anywhere; }} .wide {{ overflow-x: auto; margin-bottom: 14px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }} p {{ margin: 0 0 6px; }}
th, td {{ text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid #d9dee7; white-space: nowrap; }}
svg {{ width: 100%; max-width: 640px; font-size: 11px; }} .row {{ display: flex; flex-wrap: wrap; gap: 8px; }}
figure {{ margin: 0; width: 168px; }} img {{ width: 100%; }} figcaption {{ font-size: 12px; color: #667085; }}
.key {{ display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin: 0 4px 0 10px; }}
@media (max-width: 500px) {{ figure {{ width: calc(50% - 4px); }} svg {{ font-size: 15px; }} }}
</style><h1>How near each way comes to the exact picture, and in what time</h1>
<p>Exact is the picture of {exact} dense steps from the same noise. Means over the prompts; seconds of the steps alone.</p>
<div class=wide><table>{table}</table></div>{notes}{plot}
<p><span class=key style="background:#e8833a"></span>presets<span class=key style="background:#3b6fb6"></span>plain steps</p>
{pictures}</html>
"""
