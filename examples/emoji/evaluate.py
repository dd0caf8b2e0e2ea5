"""Draw held-out prompts with the shipped pipeline, let the judge look, and lay out a contact sheet of 64.

python examples/emoji/evaluate.py --out runs/emoji
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from classifier import load, verdict
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from scenes import Scene, SceneSampler, collate

# What is asked for: name -> (kind of scene, with a number or without).
SUITES = {"one": ("one", False), "pair": ("pair", False), "count": ("count", False), "number": ("one", True)}


def prompts(count: int, seed: int = 2024) -> dict[str, list[Scene]]:
    """`count` held-out scenes a suite; the counted and the numbered ones are half as many."""
    sampler = SceneSampler(seed, held_out=True)
    return {
        name: [sampler.scene(*asked) for _ in range(count if name in ("one", "pair") else count // 2)]
        for name, asked in SUITES.items()
    }


def draw(pipe: StableDiffusion3Pipeline, scenes: list[Scene], args: argparse.Namespace) -> torch.Tensor:
    """One picture a scene, `b 3 128 128` in [-1, 1]."""
    out = []
    for at in range(0, len(scenes), args.batch):
        part = scenes[at : at + args.batch]
        images = pipe(
            [scene.caption for scene in part],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            max_sequence_length=args.zeros,
            generator=[torch.Generator().manual_seed(at + row) for row in range(len(part))],
            output_type="pt",
        ).images
        out.append(images.float() * 2 - 1)
    return torch.cat(out)


def contact_sheet(pictures: list[torch.Tensor], captions: list[str], file: Path, columns: int = 8) -> None:
    """Pictures `3 128 128` in [-1, 1] under their captions."""
    width, height = 176, 172
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * width, index // columns * height
        pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        sheet.paste(Image.fromarray(pixels), (left + 24, top + 2))
        lines, line = [], ""
        for word in caption.split():
            if pen.textlength(f"{line} {word}") > width - 6:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        pen.multiline_text(
            (left + width // 2, top + 132),
            "\n".join((*lines, line)),
            fill="black",
            anchor="ma",
            align="center",
            spacing=1,
        )
    sheet.save(file, optimize=True)


def main(args: argparse.Namespace) -> None:
    """Write `evaluation.json` and `contact_sheet.png`."""
    pipe = StableDiffusion3Pipeline.from_pretrained(args.pipeline).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    judge = load(args.judge, args.device)
    report: dict = {
        "steps": args.steps,
        "guidance_scale": args.guidance,
        "max_sequence_length": args.zeros,
        "suites": {},
    }
    shown: list[torch.Tensor] = []
    captions: list[str] = []
    start = time.time()
    for name, scenes in prompts(args.count).items():
        pictures = draw(pipe, scenes, args)
        batch = {key: value.to(args.device) for key, value in collate(scenes).items()}
        right = verdict(judge, pictures, batch)
        if name != "number":
            right.pop("number")
        report["suites"][name] = {"prompts": len(scenes)} | {
            key: round(v.float().mean().item(), 4) for key, v in right.items()
        }
        share = {"one": 24, "pair": 24, "count": 8, "number": 8}[name]
        shown += list(pictures[:share])
        captions += [scene.caption for scene in scenes[:share]]
    report["seconds"] = round(time.time() - start, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"evaluation{args.tag}.json").write_text(json.dumps(report, indent=1) + "\n")
    contact_sheet(shown, captions, args.out / f"contact_sheet{args.tag}.png")
    print(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path(__file__).parent / "pipeline")
    parser.add_argument("--judge", type=Path, default=Path(__file__).parent / "judge.safetensors")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tag", default="", help="appended to the names of the files written")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--zeros", type=int, default=1, help="max_sequence_length")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
