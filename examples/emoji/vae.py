"""Train the autoencoder: absolute error on pixels and on their gradients, a light KL term, and scale equivariance.

The last asks that a shrunken latent decodes to the shrunken picture (Kouzelis et al., EQ-VAE, 2025): such latents are
smoother, and a rectified flow learns them sooner.

    python examples/emoji/vae.py --cache .cache/emoji --out runs/vae
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from components import autoencoder
from compose import Atlas, compose
from diffusers import AutoencoderKL
from feed import Scenes, batches
from tqdm import tqdm


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbours, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels, and half of that of their gradients."""
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(x), gradients(y), strict=True))
    return (x - y).abs().mean() + 0.5 * edges


def train(
    cache: Path, out: Path, steps: int, batch: int, device: str, workers: int, kl: float = 2e-3, rate: float = 1e-3
) -> None:
    """Write `out/vae` (a diffusers folder, float32, with scale and shift set) and `out/vae_log.json`."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    atlas = Atlas(cache, device)
    model: AutoencoderKL = autoencoder().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=device == "cuda"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    encode = torch.compile(model.encoder, dynamic=False) if device == "cuda" else model.encoder
    decode = torch.compile(model.decoder, dynamic=False) if device == "cuda" else model.decoder
    feed, log, start = batches(Scenes(batch, seed=1), device, workers), [], time.time()
    for step in tqdm(range(steps), mininterval=10):
        picture = compose(atlas, next(feed)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            mean, logvar = encode(picture).float().chunk(2, 1)
            logvar = logvar.clamp(-20, 10)
            latent = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            target = picture
            if step % 4 == 3:
                size = 16 if step % 8 == 7 else 24
                latent = F.interpolate(
                    latent, size=(size, size), mode="area" if size == 16 else "bilinear", antialias=size != 16
                )
                target = F.interpolate(picture, size=(4 * size, 4 * size), mode="bilinear", antialias=True)
            output = decode(latent.contiguous(memory_format=torch.channels_last)).float()
        error = reconstruction(output, target)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error + kl * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 8 == 0 and (step % 96 == 0 or step >= steps - 8):
            log.append({"step": step, "l1": (output - target).abs().mean().item(), "kl": divergence.item()})
            log[-1]["seconds"] = round(time.time() - start, 1)
            tqdm.write(json.dumps(log[-1]))
    model.eval()
    with torch.no_grad():
        latent, error = [], []
        for _ in range(8 if device == "cuda" else 2):
            picture = compose(atlas, next(feed))
            latent.append(model.encode(picture).latent_dist.mode())
            error.append((model.decode(latent[-1]).sample.clamp(-1, 1) - picture).square().mean())
        values = torch.cat(latent)
    model.register_to_config(scaling_factor=1 / values.std().item(), shift_factor=values.mean().item())
    model.save_pretrained(out / "vae")
    psnr = (10 * torch.log10(4 / torch.stack(error).mean())).item()
    summary = {
        "psnr_db": round(psnr, 2),
        "channel_std": [round(v, 3) for v in values.std((0, 2, 3)).tolist()],
        "log": log,
    }
    (out / "vae_log.json").write_text(json.dumps(summary))
    print(
        {key: value for key, value in summary.items() if key != "log"},
        model.config.scaling_factor,
        model.config.shift_factor,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.cache, args.out, args.steps, args.batch, args.device, args.workers)
