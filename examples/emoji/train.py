"""Train the transformer and both text encoders, together and from scratch, as a rectified flow on the latents.

x_s = (1 - s) x_0 + s e,   loss = | f(x_s, s, text) - (e - x_0) |^2,   s logit-normal, then shifted by `SHIFT`

python examples/emoji/train.py --cache .cache/emoji --out runs/emoji     # --resume goes on from the last checkpoint
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from components import text_encoder, tokenizer, transformer
from compose import Atlas, compose
from diffusers import AutoencoderKL
from feed import Scenes, batches
from muon import Muon
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

SHIFT = 2.0
ZEROS = 256  # the zero tokens that the pipeline appends for its absent T5 in a default call
ZEROS_EVERY = 8  # one step in so many is trained with them, the others with none


class Model(nn.Module):
    """What is trained: tokens `b t`, noisy latents `b 8 32 32`, noise levels `b` -> velocity `b 8 32 32`."""

    def __init__(self, tokens, **shape: int) -> None:
        super().__init__()
        self.text = nn.ModuleList((text_encoder(tokens), text_encoder(tokens)))
        self.transformer = transformer(**shape)

    def encode(self, tokens: torch.Tensor, zeros: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As the pipeline does: the encoders' last hidden states but one, `b t 256`, then zeros; pooled, `b 256`."""
        outs = [encoder(tokens, output_hidden_states=True) for encoder in self.text]
        hidden = torch.cat([out.hidden_states[-2] for out in outs], -1)
        pooled = torch.cat([out.text_embeds for out in outs], -1)
        return nn.functional.pad(hidden, (0, 0, 0, zeros)), pooled


def noise_levels(count: int, device: str) -> torch.Tensor:
    """Logit-normal in (0, 1), pulled toward noise by the shift."""
    s = torch.randn(count, device=device).sigmoid()
    return SHIFT * s / (1 + (SHIFT - 1) * s)


def optimizers(model: Model, rate: float, muon_rate: float, device: str) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' projections, AdamW for modulations, embeddings, norms and the text encoders."""
    blocks = {
        name
        for name, param in model.transformer.transformer_blocks.named_parameters()
        if param.ndim == 2 and "norm" not in name
    }
    inside = [param for name, param in model.transformer.transformer_blocks.named_parameters() if name in blocks]
    chosen = {id(param) for param in inside}
    rest = [param for param in model.parameters() if id(param) not in chosen]
    return [
        Muon(inside, muon_rate),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda"),
    ]


def rate_at(step: int, steps: int, first: int = 0, warmup: int = 150, flat: float = 0.5) -> float:
    """Warm up (again after a warm start at step `first`), stay, then fall linearly to a fiftieth."""
    fall = (steps - step) / max(1, steps * (1 - flat))
    return min(1.0, (step - first + 1) / warmup, max(0.02, fall))


def save(model: Model, average: Model, opts: list[torch.optim.Optimizer], step: int, out: Path) -> None:
    """`state.pt` to resume from, and the moving average in half precision, `average.safetensors`."""
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "opts": [o.state_dict() for o in opts],
        "step": step,
    }
    torch.save(state, out / "state.tmp")
    (out / "state.tmp").rename(out / "state.pt")
    half = {key: value.half().contiguous().cpu() for key, value in average.state_dict().items()}
    save_file(half, out / "average.tmp", metadata={"step": str(step)})
    (out / "average.tmp").rename(out / "average.safetensors")


def train(args: argparse.Namespace) -> None:
    """Run `args.steps` steps; checkpoints and `train_log.jsonl` go to `args.out`."""
    device = args.device
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    atlas = Atlas(args.cache, device)
    vae = (
        AutoencoderKL.from_pretrained(args.vae or args.out / "vae").to(device, memory_format=torch.channels_last).eval()
    )
    vae.requires_grad_(False)
    tokens = tokenizer()
    model = Model(tokens, layers=args.layers, heads=args.heads, head_dim=args.head_dim).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    opts, first, warm = optimizers(model, args.rate, args.muon_rate, device), 0, 0
    if args.resume and (args.out / "state.pt").exists():
        state = torch.load(args.out / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        first = state["step"]
    elif args.warm_start:  # weights only, from a pipeline folder
        for trained in (model, average):
            trained.transformer.load_state_dict(
                load_file(args.warm_start / "transformer/diffusion_pytorch_model.safetensors")
            )
            for encoder, name in zip(trained.text, ("text_encoder", "text_encoder_2"), strict=True):
                encoder.load_state_dict(load_file(args.warm_start / name / "model.safetensors"))
        first = warm = args.first
    bases = [[opt.defaults["lr"]] * len(opt.param_groups) for opt in opts]
    on_gpu = device == "cuda"
    network = torch.compile(model.transformer, dynamic=False) if on_gpu else model.transformer
    draw = torch.compile(lambda picture: vae.encoder(picture), dynamic=False) if on_gpu else vae.encoder
    feed = batches(Scenes(args.batch, seed=100 + first, tokenizer=tokens), device, args.workers)
    log = (args.out / "train_log.jsonl").open("a")
    start, seen, total = time.time(), first, torch.zeros((), device=device)
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=20):
        batch = next(feed)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            picture = compose(atlas, batch).contiguous(memory_format=torch.channels_last)
            clean = draw(picture)[:, :8].float()
        clean = ((clean - vae.config.shift_factor) * vae.config.scaling_factor).contiguous()
        noise = torch.randn_like(clean)
        level = noise_levels(len(clean), device)
        noisy = clean + level[:, None, None, None] * (noise - clean)
        with torch.autocast(device, torch.bfloat16):
            text, pooled = model.encode(batch["tokens"], ZEROS if step % ZEROS_EVERY == ZEROS_EVERY - 1 else 0)
            velocity = network(
                hidden_states=noisy,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=level * 1000,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - clean)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = rate_at(step, args.steps, warm)
        for opt, base in zip(opts, bases, strict=True):
            for group, rate in zip(opt.param_groups, base, strict=True):
                group["lr"] = rate * factor
            opt.step()
            opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            keep = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
            total += loss.detach()
        if (step + 1) % args.log_every == 0:
            entry = {
                "step": step + 1,
                "loss": round(total.item() / (step + 1 - seen), 5),
                "seconds": round(time.time() - start, 1),
            }
            total.zero_()
            seen = step + 1
            log.write(json.dumps(entry) + "\n")
            log.flush()
            tqdm.write(json.dumps(entry))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(model, average, opts, step + 1, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--vae", type=Path, help="the autoencoder's folder, if not OUT/vae")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--muon-rate", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--warm-start", type=Path, help="a pipeline folder whose weights to start from")
    parser.add_argument("--first", type=int, default=0, help="the step at which a warm start goes on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)
