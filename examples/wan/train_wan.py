"""Train, one after the other and for a given time in all: autoencoder, judge, transformer with its T5.

The transformer learns a rectified flow, as in `examples/emoji/train.py`:
x_s = (1 - s) x_0 + s e,   loss = | f(x_s, s, text) - (e - x_0) |^2,   s logit-normal, then shifted by `SHIFT`

    python examples/emoji/data.py --cache .cache/emoji
    python examples/wan/train_wan.py --cache .cache/emoji --out runs/wan --seconds 270
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from motion import Atlas, Clips, ClipSampler, collate, film  # puts the emoji scripts on the path
from torch import Tensor
from wan import Model, autoencoder, decoded, tokenizer
from watch import Watcher, loss, verdict

from feed import batches  # isort: skip
from loop import Clock, Log, Pool, fit, optimizers  # isort: skip
from recipe import machine, training_arguments, training_parser  # isort: skip
from vae import reconstruction  # isort: skip

SHIFT = 2.0
SHARES = {"vae": 0.40, "judge": 0.12}  # of the time; the transformer has what is left


def adam(model: torch.nn.Module, rate: float, device: str) -> list[torch.optim.Optimizer]:
    """One AdamW over all."""
    return [torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=device == "cuda")]


class Encode(torch.nn.Module):
    """Videos -> mean and log variance of their latents, one behind the other, `b 16 5 16 16` in single precision."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor) -> Tensor:
        with torch.autocast(video.device.type, torch.bfloat16, cache_enabled=False):
            return self.vae.encode(video).latent_dist.parameters.float()


class Decode(Encode):
    """Latents -> videos in single precision, which no clamp cuts off."""

    def forward(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, torch.bfloat16, cache_enabled=False):
            return decoded(self.vae, latents).float()


def replayed(module: torch.nn.Module, given: Tensor) -> Callable[[Tensor], Tensor]:
    """The module as CUDA graphs of its two passes, where there is a GPU: it is some thousand small launches.

    What it returns is overwritten by its next call.
    """
    return torch.cuda.make_graphed_callables(module, (given,), allow_unused_input=True) if given.is_cuda else module


class Training:
    """The three parts, what they share, and what is told of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.clock = args, args.device, Clock(args.seconds, args.steps)
        self.atlas, self.tokens = Atlas(args.cache, args.device), tokenizer()
        self.told: dict = {name: value for name, value in vars(args).items() if name not in ("cache", "out", "device")}
        names = ("layers", "heads", "head_dim", "feed_forward")
        self.told["shape"] = {name: self.told.pop(name) for name in names}

    def part(self, share: float) -> Clock:
        """The clock of a part that has `share` of all the time."""
        return Clock(share * self.args.seconds, self.args.steps)

    def clips(self, batch: int, seed: int, tokens: bool = False):
        """Batches of training clips without end."""
        return batches(Clips(batch, seed, self.tokens if tokens else None), self.device, self.args.workers)

    def note(self, name: str, log: Log, **more: float) -> None:
        """Keep the losses of a part and its figures; write all that is known."""
        self.told[name] = more | {"log": log.entries}
        self.told |= machine(self.device) | {"seconds_taken": round(self.clock.elapsed(), 1)}
        (self.args.out / "wan.json").write_text(json.dumps(self.told, indent=1) + "\n")

    def held_out(self, count: int) -> dict[str, Tensor]:
        """Clips that are not trained on."""
        sampler = ClipSampler(9, split=True)
        return {name: value.to(self.device) for name, value in collate([sampler.clip() for _ in range(count)]).items()}

    def autoencoder(self) -> AutoencoderKLWan:
        """Absolute error of pixels and of their gradients, and a light KL term, as `examples/emoji/vae.py`.

        It leaves behind `encode` and `decode` for `args.vae_batch` clips: judge and transformer call them with as many.
        """
        args, model, feed = self.args, autoencoder().to(self.device), self.clips(self.args.vae_batch, 21)
        video = film(self.atlas, next(feed))
        self.encode = replayed(Encode(model), video)
        self.decode = replayed(Decode(model), self.encode(video).chunk(2, 1)[0].detach().clone().requires_grad_())

        def loss_of(step: int) -> Tensor:
            video = film(self.atlas, next(feed))
            mean, logvar = self.encode(video).chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            output = self.decode(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
            divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            return reconstruction(output, video) + args.kl * divergence

        clock, file = self.part(SHARES["vae"]), args.out / "wan_vae.safetensors"
        average, log = fit("vae", model, adam(model, 1.5e-3, self.device), loss_of, clock, file, args.log_every)
        model.load_state_dict(average.state_dict())  # `encode` and `decode` are of this one
        average.eval()
        with torch.no_grad():
            video = film(self.atlas, self.held_out(args.look))
            latents = average.encode(video).latent_dist.mode()
            error = (average.decode(latents).sample - video).square().mean()
        self.mean, self.std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        self.told |= {"latents_mean": self.mean.tolist(), "latents_std": self.std.tolist()}
        self.note("vae", log, psnr_db=round((10 * torch.log10(4 / error)).item(), 2), steps_done=clock.step)
        return average

    def judge(self, vae: AutoencoderKLWan) -> None:
        """Half of its clips (of twice `args.vae_batch`) pass through the autoencoder, and all get a little noise."""
        args, model, feed = self.args, Watcher().to(self.device), self.clips(2 * self.args.vae_batch, 22)

        def loss_of(step: int) -> Tensor:
            batch = next(feed)
            with torch.autocast(self.device, torch.bfloat16):
                video = film(self.atlas, batch)
                first, others = video.chunk(2)
                passed = self.decode(self.encode(first).chunk(2, 1)[0]).detach().clamp(-1, 1)
                video = torch.cat((passed, others))
                video = video + torch.randn_like(video) * 0.1 * torch.rand(len(video), 1, 1, 1, 1, device=self.device)
                return loss(model, video, batch)

        clock, file = self.part(SHARES["judge"]), args.out / "wan_judge.safetensors"
        average, log = fit("judge", model, adam(model, 2e-3, self.device), loss_of, clock, file, args.log_every)
        average.eval()
        batch = self.held_out(args.look)
        with torch.no_grad():
            video = film(self.atlas, batch)
            seen = {"real": video, "decoded": vae.decode(vae.encode(video).latent_dist.mode()).sample}
        right = {
            f"{name}_{what}": round(hit.float().mean().item(), 4)
            for name, shown in seen.items()
            for what, hit in verdict(average, shown, batch).items()
        }
        self.note("judge", log, **right, steps_done=clock.step)

    def transformer(self) -> None:
        """With the time that is left."""
        args, device = self.args, self.device
        model = Model(self.tokens, **self.told["shape"]).to(device)
        opts = optimizers(model, model.transformer.blocks, args.rate, args.muon_rate, device)
        network = torch.compile(model.transformer, dynamic=False) if args.compile else model.transformer
        feed, pool = self.clips(args.vae_batch, 23, tokens=True), Pool(args.pool)
        mean, std = (value.view(1, -1, 1, 1, 1) for value in (self.mean, self.std))

        def paint() -> None:
            batch = next(feed)
            clean = self.encode(film(self.atlas, batch)).detach().chunk(2, 1)[0]
            pool.add({"clean": ((clean - mean) / std).contiguous().bfloat16(), "ids": batch["tokens"]})

        def loss_of(step: int) -> Tensor:
            for _ in range(args.ahead if step == 0 else 1):
                paint()
            batch = pool.draw(args.batch)
            clean = batch["clean"].float()
            noise = torch.randn_like(clean)
            level = torch.randn(len(clean), device=device).sigmoid()
            level = SHIFT * level / (1 + (SHIFT - 1) * level)
            noisy = clean + level[:, None, None, None, None] * (noise - clean)
            with torch.autocast(device, torch.bfloat16):
                velocity = network(
                    hidden_states=noisy,
                    timestep=level * 1000,
                    encoder_hidden_states=model.encode(batch["ids"]),
                    return_dict=False,
                )[0]
            return (velocity.float() - (noise - clean)).square().mean()

        clock = Clock(max(1.0, args.seconds - self.clock.elapsed()), args.steps)
        average, log = fit("wan", model, opts, loss_of, clock, args.out / "wan.safetensors", args.log_every)
        count = sum(param.numel() for param in average.parameters())
        self.note("transformer", log, steps_done=clock.step, parameters=count)


def train(args: argparse.Namespace) -> None:
    """Write `wan_vae.safetensors`, `wan_judge.safetensors`, `wan.safetensors` and `wan.json`."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    training = Training(args)
    vae = training.autoencoder()
    training.judge(vae)
    training.transformer()
    print(f"{training.clock.elapsed():.0f} s", flush=True)


if __name__ == "__main__":
    parser = training_parser(
        __doc__, "runs/wan", "clips", "of each part instead",
        batch=128, rate=1e-3, muon_rate=3e-3, layers=4, heads=3, head_dim=64, workers=4,
    )  # fmt: skip
    parser.add_argument("--feed-forward", type=int, default=512)
    parser.add_argument("--vae-batch", type=int, default=64, help="clips filmed a step; the judge has twice as many")
    parser.add_argument("--kl", type=float, default=2e-3, help="weight of the autoencoder's KL term")
    parser.add_argument("--look", type=int, default=512, help="held-out clips that autoencoder and judge are tried on")
    train(training_arguments(parser))
