"""What all files of this folder share: their arguments, the pipeline, and what is said at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, ImageDraw

import ras_compile

__all__ = ["SHIPPED", "arguments", "load", "picture", "say", "seeded"]

SHIPPED = Path(__file__).parents[1] / "emoji" / "pipeline"


def arguments(doc: str, argv: Sequence[str] | None, prompt: str, steps: int, **more: Any) -> argparse.Namespace:
    """The arguments of a file; each of `more` is one with its default."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--pipeline", help="folder or name of a pipeline with real weights")
    parser.add_argument("--prompt", default=prompt)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--preset", default="balanced", help="fast, balanced, quality or paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner-backend", default="inductor", help="eager compiles nothing, to look at it at once")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of what is drawn")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def load(kind: str, args: argparse.Namespace, tiny: Callable[[], Any] | None = None) -> Any:
    """The pipeline that `--pipeline` names; else a tiny one with random weights, or the one that this repository ships."""
    if args.pipeline is None and tiny is not None:
        return tiny()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = getattr(diffusers, kind).from_pretrained(args.pipeline or SHIPPED, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(args: argparse.Namespace) -> torch.Generator:
    """The noise that a picture begins with; on the CPU, so that it is the same on every machine."""
    return torch.Generator().manual_seed(args.seed)


def picture(side: int) -> Image.Image:
    """A picture to begin with: a red disc on teal."""
    image = Image.new("RGB", (side, side), "teal")
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill="red")
    return image


def say(handle: ras_compile.Handle) -> list[ras_compile.Record]:
    """Prints what the last run did, and returns its records."""
    print(handle.summary())
    return ras_compile.trace(handle)
