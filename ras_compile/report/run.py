"""A generation as plain data, which a page shows, a JSON file keeps, and pictures are drawn from."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from ras_compile.config import RASConfig
from ras_compile.errors import ConfigError
from ras_compile.report.pictures import as_uri, few, frames_of
from ras_compile.summary import Step, Summary, amount, memory, percent

VERSION = 1


def collect(summary: Summary, picture: Any, dense: Any, prompt: str, video: bool) -> dict[str, Any]:
    """What a report holds: numbers, texts, pictures as addresses, and one bit for each token of each sparse step.

    Raises:
        ConfigError: there was no generation, what is given is no picture, or the two have different sizes.
    """
    if not summary.steps:
        raise ConfigError("there is no run to report yet: call the pipeline, then handle.report(...).")
    frames = [] if picture is None else frames_of(picture, video)
    beside = [] if dense is None else frames_of(dense, video)
    if frames and beside and frames[0].size != beside[0].size:
        sizes = [" x ".join(map(str, found[0].size)) for found in (beside, frames)]
        raise ConfigError(f"dense= is a picture of {sizes[0]} and the other one of {sizes[1]}; draw both in one size.")
    tokens = max((step.tokens for step in summary.steps), default=0)
    size = frames[0].size if frames else None
    shown = few(frames)
    return {
        "version": VERSION,
        "prompt": str(prompt),
        "sentence": str(summary).splitlines(),
        "tokens": tokens,
        "grid": grid_of(summary.grid, tokens, size, len(frames)),
        "steps": [_step(step) for step in summary.steps],
        "picture": [as_uri(frame, len(shown) == 1) for frame in shown],
        "dense": [as_uri(frame, len(shown) == 1) for frame in few(beside)],
        "facts": _facts(summary),
        "options": _options(summary.config),
        "splices": [
            [
                point.value,
                point.reason,
                point.source or "",
                " x ".join(map(str, point.shape)),
                f"{point.bytes / 2**20:.2f}",
            ]
            for point in summary.splices
        ],
    }


def load(path: Path) -> dict[str, Any]:
    """The data that a report saved as JSON.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        data = json.loads(path.read_text())
    except OSError:
        why = "" if path.exists() else ": there is no such file"
        raise ConfigError(f"{path} cannot be read{why}; give the file that handle.report('run.json') wrote.") from None
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise ConfigError(f"{path} is no report of this version; give the file that handle.report('run.json') wrote.")
    return data


def masks_of(data: dict[str, Any]) -> torch.Tensor:
    """Which tokens each step computed: bool [steps, N]."""
    masks = torch.ones(len(data["steps"]), max(1, data["tokens"]), dtype=torch.bool)
    for mask, step in zip(masks, data["steps"], strict=True):
        if step["mask"] is not None:
            packed = torch.frombuffer(bytearray(base64.b64decode(step["mask"])), dtype=torch.uint8)
            mask.copy_((packed[:, None] >> torch.arange(8)).bitwise_and(1).flatten()[: len(mask)].bool())
    return masks


def finite(value: float | None) -> float | None:
    """A number as JSON holds it, which knows neither infinity nor what is not a number: None in their place."""
    return value if value is not None and math.isfinite(value) else None


def grid_of(grid: tuple[int, ...], tokens: int, size: tuple[int, int] | None, frames: int) -> list[int]:
    """Frames, rows and columns of the tokens.

    Some models take a picture as a list of tokens, of which nobody says how many make a row: the picture's own
    proportions tell. What fits nothing is shown as a strip.

    Args:
        grid: the token grid, as the model has it.
        tokens: N.
        size: width and height of the picture, where there is one.
        frames: of the video; 1 for a picture.
    """
    if len(grid) in (2, 3):
        return [1] * (3 - len(grid)) + list(grid)
    width, height = size or (1, 1)
    counts = [1] if frames <= 1 else [(frames - 1) // stride + 1 for stride in (4, 8, 6, 2, 1)]
    for count in counts:
        each = tokens // count
        rows = min(
            (rows for rows in range(1, each + 1) if each % rows == 0),
            key=lambda rows: abs(rows * rows * width - each * height),
            default=0,
        )
        if rows and tokens % count == 0 and abs(rows * rows * width / (each * height) - 1) < 0.25:
            return [count, rows, each // rows]
    return [1, 1, max(1, tokens)]


def _step(step: Step) -> dict[str, Any]:
    mask = None
    if step.rows is not None:
        bits = torch.zeros(-(-step.tokens // 8) * 8, dtype=torch.uint8)
        bits[step.rows.cpu()] = 1
        packed = (bits.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        mask = base64.b64encode(bytes(packed.tolist())).decode()
    return {
        "kind": step.kind,
        "active": step.active,
        "ms": None if step.seconds is None else round(1000 * step.seconds, 3),
        "compiled": round(step.compiled, 3),
        "change": finite(step.change),
        "reason": step.reason,
        "mask": mask,
    }


def _facts(summary: Summary) -> list[list[str]]:
    steps = summary.steps
    tokens = sum(step.active for step in steps)
    every = sum(step.tokens for step in steps)
    facts = [["steps", f"{len(steps)}"], ["dense steps", f"{sum(step.kind == 'dense' for step in steps)}"]]
    if every:
        facts.append(["tokens computed", f"{tokens:,} of {every:,} ({percent(tokens / every)} %)"])
    spent = sum(step.flops or 0.0 for step in steps)
    if spent:
        facts.append(["computed by the transformer", f"{spent / 1e12:,.3g} TFLOP"])
    for name, ratio in (
        ("speed-up predicted by FLOPs", summary.flop_speedup),
        ("speed-up by the clock", summary.speedup),
    ):
        facts.append([name, "not known" if ratio is None else f"{ratio:.2f}x"])
    if summary.seconds is not None:
        facts.append(["seconds of all steps", amount(summary.seconds)])
    if summary.compiled:
        facts.append(["of them compiling", amount(summary.compiled)])
    facts.append(["memory of the caches", memory(summary.cache_bytes)])
    return facts


def _options(config: RASConfig) -> list[list[str]]:
    """Name, value, and "default" or "set"."""
    default = RASConfig()
    found = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        text = getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)
        found.append([option.name, text, "default" if value == getattr(default, option.name) else "set"])
    return found
