"""Which end of the metric should be computed? PSNR against the dense pictures for `focus` from low to high.

python examples/quality/focus.py --pictures 64 --output examples/quality/results/focus.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

import ras_compile

PIPELINE = Path(__file__).parents[1] / "emoji" / "pipeline"
NOUNS = ["apple", "cat", "tree", "rocket", "house", "lemon", "dog", "car"]
COLOURS = ["blue", "green", "orange", "purple"]


def prompts(count: int) -> list[str]:
    """Single objects and pairs, in turns."""
    found = []
    for index in range(count):
        first, second = NOUNS[index % len(NOUNS)], NOUNS[(3 * index + 1) % len(NOUNS)]
        one = f"a {COLOURS[index // len(NOUNS) % len(COLOURS)]} {first}"
        found.append(one if index % 2 else f"a {first} to the left of a {second}")
    return found


def pictures(pipe: StableDiffusion3Pipeline, texts: list[str], steps: int, guidance: float) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1] from one noise per prompt, the same in every call."""
    generators = [torch.Generator().manual_seed(index) for index in range(len(texts))]
    return pipe(
        texts, num_inference_steps=steps, guidance_scale=guidance, height=128, width=128, generator=generators,
        max_sequence_length=1, output_type="pt",
    ).images.float()  # fmt: skip


def main() -> None:
    """Runs the comparison and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[28])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--focus", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1])
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--inner-backend", default="inductor")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    texts, rows = prompts(args.pictures), []
    for steps in args.steps:
        dense = pictures(pipe, texts, steps, args.guidance)
        todo = [(ratio, focus, scale) for ratio in args.ratios for focus in args.focus for scale in args.scales]
        for ratio, focus, scale in tqdm(todo, desc=f"{steps} steps"):
            options = dict(sample_ratio=ratio, focus=focus, starvation_scale=scale, inner_backend=args.inner_backend)
            with ras_compile.attach(pipe, **options):
                found = pictures(pipe, texts, steps, args.guidance)
            psnr = torch.stack(
                [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(found, dense, strict=True)]
            )
            ssim = structural_similarity_index_measure(found, dense, data_range=1.0)
            rows.append({
                "steps": steps, "sample_ratio": ratio, "focus": focus, "starvation_scale": scale, "n": len(texts),
                "psnr": psnr.mean().item(), "psnr_5th": psnr.quantile(0.05).item(), "ssim": ssim.item(),
            })  # fmt: skip
            print(rows[-1])
    meta = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
