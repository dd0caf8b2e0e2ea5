"""Train the transformer and its T5 from scratch, for a given time, with the noise of DDPM.

x_t = a_t x_0 + s_t e,   loss = | f(x_t, t, text) - (a_t e - s_t x_0) |^2,   t uniform, spread evenly over a batch

    python examples/emoji/data.py --cache .cache/emoji
    python examples/pixart/train_pixart.py --cache .cache/emoji --out runs/pixart --seconds 270
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from diffusers import AutoencoderKL
from pixart import SCHEDULE, VAE, Model, scheduler, tokenizer  # puts the emoji scripts on the path

from compose import Atlas, compose  # isort: skip
from feed import Scenes, batches  # isort: skip
from loop import Clock, Pool, fit, optimizers  # isort: skip
from recipe import machine, training_arguments, training_parser  # isort: skip


def train(args: argparse.Namespace) -> None:
    """Write `pixart.safetensors` (the moving average) and `pixart.json` (settings and losses)."""
    clock = Clock(args.seconds, args.steps)
    device = args.device
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    atlas, tokens = Atlas(args.cache, device), tokenizer()
    vae = AutoencoderKL.from_pretrained(VAE).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    shape = dict(layers=args.layers, heads=args.heads, head_dim=args.head_dim)
    model = Model(tokens, **shape).to(device)
    for name, param in model.transformer.named_parameters():
        if name.endswith(
            "to_k.bias"
        ):  # adds the same to all scores of a query: its gradient is rounding, which Adam makes large
            param.requires_grad_(False)
    opts = optimizers(model, model.transformer.transformer_blocks, args.rate, args.muon_rate, device)
    network = torch.compile(model.transformer, dynamic=False) if args.compile else model.transformer
    draw = torch.compile(lambda picture: vae.encoder(picture), dynamic=False) if args.compile else vae.encoder
    feed, pool = batches(Scenes(args.fresh, seed=11, tokenizer=tokens), device, args.workers), Pool(args.pool)
    kept = scheduler().alphas_cumprod.to(device)  # [1000], the signal's share of the variance

    @torch.no_grad()
    def paint() -> None:
        batch = next(feed)
        with torch.autocast(device, torch.bfloat16):
            picture = compose(atlas, batch).contiguous(memory_format=torch.channels_last)
            clean = draw(picture)[:, :8].float() * vae.config.scaling_factor
        pool.add({"clean": clean.contiguous().bfloat16(), "ids": batch["tokens"]})

    def loss_of(step: int) -> torch.Tensor:
        for _ in range(args.ahead if step == 0 else 1):
            paint()
        batch = pool.draw(args.batch)
        clean = batch["clean"].float()
        noise = torch.randn_like(clean)
        spread = (torch.arange(args.batch, device=device) + torch.rand(args.batch, device=device)) / args.batch
        time_step = (spread * SCHEDULE["num_train_timesteps"]).long()
        signal, off = kept[time_step].sqrt()[:, None, None, None], (1 - kept[time_step]).sqrt()[:, None, None, None]
        noisy = signal * clean + off * noise
        target = noise if args.prediction == "epsilon" else signal * noise - off * clean
        with torch.autocast(device, torch.bfloat16):
            hidden, mask = model.encode(batch["ids"])
            found = network(
                noisy, encoder_hidden_states=hidden, encoder_attention_mask=mask, timestep=time_step, return_dict=False
            )[0]
        return (found.float() - target).square().mean()

    chosen = ("prediction", "batch", "fresh", "pool", "ahead", "rate", "muon_rate", "seconds", "steps")
    settings = {name: getattr(args, name) for name in chosen} | {
        "shape": shape,
        "parameters": sum(param.numel() for param in model.parameters()),
        **machine(device),
    }
    file = args.out / "pixart.json"
    file.write_text(json.dumps(settings, indent=1) + "\n")  # if this is cut short, the last saved weights can be used
    _, log = fit("pixart", model, opts, loss_of, clock, args.out / "pixart.safetensors", args.log_every)
    settings |= {"steps_done": clock.step, "seconds_taken": round(clock.elapsed(), 1), "log": log.entries}
    file.write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    parser = training_parser(
        __doc__, "runs/pixart", "scenes", "stop after so many steps instead",
        batch=256, rate=1e-3, muon_rate=3e-3, layers=5, heads=3, head_dim=64, workers=6,
    )  # fmt: skip
    parser.add_argument("--fresh", type=int, default=64, help="scenes painted a step")
    parser.add_argument("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction")
    begin = time.time()
    train(training_arguments(parser))
    print(f"{time.time() - begin:.0f} s", flush=True)
