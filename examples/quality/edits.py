"""Edits that keep most of a picture: which tokens are computed there, and how far is the picture from the dense run's?

    python examples/quality/edits.py --pictures 4 --size 64

A picture is drawn, and then edited by another caption with one object exchanged: *image to image* begins at a noisy version
of it, *inpainting* puts all but a square in the middle back after every step (by a callback, as the inpainting pipelines
do). Inside is the square, or the quarter of the tokens whose latents the dense run has changed most. One JSON line for each
edit and way of sampling: shares of the tokens that an average step computed inside and outside, PSNR inside and outside to
the dense run's picture (dB), and seconds of the processor beside the dense run's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import ras_compile

PIPELINE = Path(__file__).parents[1] / "emoji" / "pipeline"
EDITS = [
    ("a red apple on a blue background", "a green apple on a blue background"),
    ("a cat on a striped green background", "a pizza on a striped green background"),
    ("two bananas on a yellow background", "two cats on a yellow background"),
    ("a dog on a red background", "a blue house on a red background"),
]
QUARTER = {
    "ratio_schedule": "constant",
    "sample_ratio": 0.25,
}  # of inpainting: all that is drawn anew, and nothing else
WAYS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "metric std": {"metric": "std"},
    "sample_ratio 0.15": {"sample_ratio": 0.15},
    "a quarter, dense every 3": QUARTER,
    "a quarter, dense every 6": {**QUARTER, "reset_interval": 6},
    "tolerance 0.05": {"tolerance": 0.05},
}


class Editor:
    """Draws and edits pictures of the shipped model.

    Args:
        pictures: how many, of one batch.
        size: pixels of a side.
        steps: of a whole run.
        strength: of image to image.
    """

    def __init__(self, pictures: int, size: int, steps: int, strength: float) -> None:
        self.pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
            PIPELINE, dtype=torch.float32, local_files_only=True
        )
        self.again = diffusers.StableDiffusion3Img2ImgPipeline(**self.pipe.components)
        for pipe in (self.pipe, self.again):
            pipe.set_progress_bar_config(disable=True)
        self.given = {
            "num_inference_steps": steps, "guidance_scale": 4.0, "max_sequence_length": 1, "output_type": "latent",
            "height": size, "width": size,
        }  # fmt: skip
        edits = [EDITS[index % len(EDITS)] for index in range(pictures)]
        captions, self.wanted = ([edit[place] for edit in edits] for place in (0, 1))
        self.strength = strength
        self.source = self.pipe(captions, generator=self.seeds(0), **self.given).images
        self.noise = torch.randn(self.source.shape, generator=torch.Generator().manual_seed(2))
        side = self.source.shape[-1]
        self.square = torch.zeros(self.source.shape[-2:], dtype=torch.bool)
        self.square[side // 4 : side - side // 4, side // 4 : side - side // 4] = True

    def seeds(self, first: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(first + index) for index in range(len(self.wanted))]

    def image_to_image(self) -> Tensor:
        picture = self.pictures(self.source)
        given = {"image": picture, "strength": self.strength}
        return self.again(self.wanted, generator=self.seeds(100), **given, **self.given).images

    def inpainting(self) -> Tensor:
        def put_back(pipe: Any, step: int, time: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            level = pipe.scheduler.sigmas[step + 1]
            kept = (1 - level) * self.source + level * self.noise
            return {"latents": torch.where(self.square, values["latents"], kept)}

        return self.pipe(
            self.wanted, generator=self.seeds(100), callback_on_step_end=put_back, **self.given
        ).images  # fmt: skip

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """[n, 3, size, size] in [0, 1]."""
        config = self.pipe.vae.config
        decoded = self.pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
        return (decoded.clamp(-1, 1) + 1) / 2

    def most_changed(self, edited: Tensor) -> Tensor:
        """Bool [n, h, w]: the quarter of the tokens that are furthest from the source."""
        away = (edited - self.source).abs().mean(1)
        return away > away.flatten(1).quantile(0.75, dim=1)[:, None, None]


def psnr(one: Tensor, other: Tensor, where: Tensor) -> float:
    """Mean over pictures [n, 3, H, W] of the PSNR (dB) among the latent pixels `where` [n, h, w]."""
    scale = one.shape[-1] // where.shape[-1]
    wide = where.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    squares = (one - other).square().mean(1)
    mean = (squares * wide).flatten(1).sum(1) / wide.flatten(1).sum(1)
    return float((-10 * mean.clamp_min(1e-10).log10()).mean())


def shares(records: Sequence[ras_compile.Record], inside: Tensor) -> tuple[float, float]:
    """Of the tokens inside [n, h, w], and of those outside, the share that an average step computed."""
    flat, computed = inside.flatten(1), torch.zeros(2)
    for record in records:
        active = torch.ones_like(flat)
        if record.rows is not None:
            both = torch.zeros(len(record.rows), flat.shape[1], dtype=torch.bool).scatter_(1, record.rows, True)
            active = both[: len(flat)]
        computed += torch.stack([active[flat].float().mean(), active[~flat].float().mean()])
    found = computed / len(records)
    return float(found[0]), float(found[1])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Draws and prints; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=4, help="in one batch")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--strength", type=float, default=0.8, help="of image to image")
    parser.add_argument("--inner-backend", default="eager", help="inductor compiles, in the first picture of each way")
    args = parser.parse_args(argv)
    editor, rows = Editor(args.pictures, args.size, args.steps, args.strength), []
    for edit, draw in (("image to image", editor.image_to_image), ("inpainting", editor.inpainting)):
        began = time.process_time()
        dense = draw()
        took = time.process_time() - began
        inside = editor.most_changed(dense) if edit == "image to image" else editor.square.expand(len(dense), -1, -1)
        exact, source = editor.pictures(dense), editor.pictures(editor.source)
        for way, options in WAYS.items():
            with ras_compile.attach(editor.pipe, inner_backend=args.inner_backend, **options) as handle:
                draw()
                began = time.process_time()
                found = editor.pictures(draw())
                seconds = time.process_time() - began
                within, without = shares(ras_compile.trace(handle), inside)
            row = {"edit": edit, "way": way, "computed_inside": within, "computed_outside": without}
            row |= {"psnr_inside": psnr(found, exact, inside), "psnr_outside": psnr(found, exact, ~inside)}
            row |= {"dense_psnr_outside_to_source": psnr(exact, source, ~inside), "seconds_to_dense": seconds / took}
            rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
            print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
