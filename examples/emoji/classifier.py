"""A judge of pictures, trained on scenes: what stands in each of 3 x 3 cells, its colour, the background, the number.

    python examples/emoji/classifier.py --cache .cache/emoji --vae runs/emoji/vae --out runs/emoji

It never sees generated pictures. Half of its training pictures pass through the autoencoder, and all get a little
noise, so that it judges what is drawn and not how it was decoded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from compose import Atlas, compose
from diffusers import AutoencoderKL
from feed import Scenes, batches
from objects import BACKGROUND_NAMES, COLOUR_NAMES, FILLS, OBJECTS
from safetensors.torch import load_file, save_file
from scenes import GRID, SceneSampler, cell_targets, collate
from torch import nn
from tqdm import tqdm


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; `stride` 2 halves the picture."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`b c h w -> b c' h/stride w/stride`."""
        return F.relu(self.body(x) + self.skip(x))


class Judge(nn.Module):
    """`b 3 128 128` -> logits: item and colour `b 9 n` (class 0: nothing), background, fill, two digits (10: none)."""

    HEADS = {"background": len(BACKGROUND_NAMES), "fill": len(FILLS), "tens": 11, "ones": 11}

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 160)
        blocks = [Residual(a, b, 2) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.trunk = nn.Sequential(*blocks, Residual(160, 160, 1))  # [b, 160, 8, 8]
        self.cells = nn.Sequential(
            nn.AdaptiveAvgPool2d(2 * GRID), nn.Conv2d(160, 256, 4, 2, 1), nn.ReLU()
        )  # [b, 256, 3, 3]
        self.item = nn.Conv2d(256, len(OBJECTS) + 1, 1)
        self.colour = nn.Conv2d(256, len(COLOUR_NAMES) + 1, 1)
        self.whole = nn.Sequential(nn.Flatten(), nn.Linear(256 * GRID * GRID, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, size) for name, size in self.HEADS.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """All logits by name."""
        cells = self.cells(self.trunk(x))
        whole = self.whole(cells)
        out = {name: head(whole) for name, head in self.heads.items()}
        out["item"], out["colour"] = (head(cells).flatten(2).transpose(1, 2) for head in (self.item, self.colour))
        return out


def targets(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Class indices for every head of `Judge`."""
    item, colour = cell_targets(batch)
    number = batch["number"]
    return {
        "item": item + 1,
        "colour": colour + 1,
        "background": batch["background"],
        "fill": batch["fill"],
        "tens": torch.where(number >= 0, number // 10, 10),
        "ones": torch.where(number >= 0, number % 10, 10),
    }


@torch.no_grad()
def verdict(judge: Judge, pictures: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Right or wrong, `b` bool: `objects` (each cell holds what it should and nothing else), `colours` of those, ..."""
    want = targets(batch)
    got = {name: logits.argmax(-1) for name, logits in judge(pictures).items()}
    there = want["item"] > 0
    return {
        "objects": (got["item"] == want["item"]).all(1),
        "colours": ((got["colour"] == want["colour"]) | ~there).all(1),
        "background": got["background"] == want["background"],
        "fill": got["fill"] == want["fill"],
        "number": (got["tens"] == want["tens"]) & (got["ones"] == want["ones"]),
    }


def load(file: Path, device: str) -> Judge:
    """A trained judge, ready to judge."""
    judge = Judge().to(device).eval()
    judge.load_state_dict({name: value.float() for name, value in load_file(file, device=device).items()})
    return judge


def train(args: argparse.Namespace) -> None:
    """Write `judge.safetensors` (half precision) and print its accuracy on held-out scenes."""
    device = args.device
    torch.manual_seed(0)
    atlas = Atlas(args.cache, device)
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).to(device).eval().requires_grad_(False)
    judge = Judge().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    feed = batches(Scenes(args.batch, seed=5), device, args.workers)
    for _ in tqdm(range(args.steps), mininterval=20):
        batch = next(feed)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                picture = compose(atlas, batch)
                half = len(picture) // 2
                passed = vae.decode(vae.encode(picture[:half]).latent_dist.mode()).sample.float()
                picture = torch.cat((passed, picture[half:]))
                picture = picture + torch.randn_like(picture) * 0.1 * torch.rand(len(picture), 1, 1, 1, device=device)
            logits = judge(picture.contiguous(memory_format=torch.channels_last))
            loss = sum(
                F.cross_entropy(logits[name].flatten(0, -2).float(), index.flatten())
                for name, index in targets(batch).items()
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    save_file(
        {name: value.half().contiguous() for name, value in judge.state_dict().items()}, args.out / "judge.safetensors"
    )
    sampler = SceneSampler(9, held_out=True)
    report = {}
    for kind in ("one", "pair", "count"):
        batch = {
            name: value.to(device) for name, value in collate([sampler.scene(kind) for _ in range(args.batch)]).items()
        }
        picture = vae.decode(vae.encode(compose(atlas, batch)).latent_dist.mode()).sample
        report[kind] = {
            name: round(right.float().mean().item(), 4) for name, right in verdict(judge, picture, batch).items()
        }
    (args.out / "judge.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)
