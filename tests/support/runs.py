"""A generation without a model, for what tells of one."""

from __future__ import annotations

import torch
from PIL import Image

from ras_compile.report.run import collect
from ras_compile.summary import Step, Summary

__all__ = ["generated", "picture", "told"]


def generated(steps: int = 6, grid: tuple[int, ...] = (4, 6), warmup: int = 2) -> Summary:
    """Step `s` computes the tokens s, s + 3, s + 6, ...; the first ones are dense."""
    tokens = int(torch.tensor(grid).prod())
    rows = [None if step < warmup else torch.arange(step % 3, tokens, 3) for step in range(steps)]
    return Summary(
        tuple(
            Step(
                number, "dense" if found is None else "sparse", tokens if found is None else len(found), tokens, found,
                "warm-up" if found is None else "", 3e9, 9e9, 0.010 if found is None else 0.004, 0.0, 0.25 if number else None,
            )
            for number, found in enumerate(rows)
        ),
        grid,
        cache_bytes=3 << 20,
    )  # fmt: skip


def picture(width: int = 48, height: int = 32) -> Image.Image:
    shades = torch.arange(width * height * 3) % 251
    return Image.frombytes("RGB", (width, height), bytes(shades.tolist()))


def told(steps: int = 6, grid: tuple[int, ...] = (4, 6), prompt: str = "a red apple", **more) -> dict:
    """The data of a report."""
    given = {"picture": picture(), "dense": picture(), "video": False, **more}
    return collect(generated(steps, grid), prompt=prompt, **given)
