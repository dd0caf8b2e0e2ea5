"""Models whose Python code reads values of their text's mask, and runs of them: Dynamo breaks their graphs."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import ras_compile

OPTIONS = {
    "inner_backend": "eager",
    "sample_ratio": 0.25,
    "warmup_steps": 2,
    "reset_interval": None,
    "ratio_schedule": "constant",
}


class Reads(nn.Module):
    """A small DiT `b c h w` with a text in front of the tokens; ``read(text, mask)`` is what its code reads."""

    def __init__(self, channels: int = 4, dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.qkv, self.time = nn.Linear(dim, 3 * dim), nn.Linear(1, dim)
        self.scale = 1.0

    def read(self, text: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        batch, _, height, width = hidden_states.shape
        x = self.enter(hidden_states.flatten(2).transpose(1, 2)) + self.time(timestep.reshape(-1, 1, 1)) * self.scale
        context = self.read(text, mask)
        x = torch.cat([context.expand(batch, -1, -1), x], 1)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        x = self.leave(x[:, context.shape[1] :])
        return x.transpose(1, 2).reshape(hidden_states.shape)


class Length(Reads):
    """Cuts the text at the length that its mask gives."""

    def read(self, text, mask):
        return text[:, : max(mask.sum(1).tolist())]


def inputs(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return dict(text=torch.randn(1, 6, 8, generator=generator), mask=(torch.arange(6) < length).long()[None])


def latents(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(1, 4, 4, 6, generator=generator) for _ in range(count)]


def sample(model, context: dict, steps: int = 4) -> list[Tensor]:
    """The noises of a run whose latents are given, so that runs can be compared step by step; no sampler makes such."""
    noises = []
    with torch.no_grad(), ras_compile.generation(num_steps=steps) as gen:
        for latent in latents(steps):
            noises.append(model(latent, torch.tensor([1 - gen.step() / steps]), **context))
    return noises


def kinds(model) -> list[str]:
    return [record.kind for record in ras_compile.trace(model)]


class Pipe:
    """A pipeline of two calls a step, with a prompt and without, whose texts differ in length."""

    config: dict = {}

    def __init__(self) -> None:
        self.transformer, self.scheduler = Length(), FlowMatchEulerDiscreteScheduler()

    def run(self, steps: int) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x, branches = latents(1)[0], [inputs(5, seed=1), inputs(2, seed=2)]
        for t in self.scheduler.timesteps:
            cond, uncond = (self.transformer(hidden_states=x, timestep=t[None] / 1000, **given) for given in branches)
            x = self.scheduler.step(uncond + 2 * (cond - uncond), t, x, return_dict=False)[0]
        return x
