"""A DiT in a few lines, and a plain loop that samples with it."""

from __future__ import annotations

import torch
from torch import nn

import ras_compile


class TinyDiT(nn.Module):
    """A DiT in a few lines, `[B, 4, H, W] -> [B, 4, H, W]`, with patches of two and text in the joint sequence."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.patch, self.text = nn.Conv2d(4, width, 2, 2), nn.Linear(6, width)
        self.time, self.head = nn.Linear(8, width), nn.Linear(width, 16)
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(layers)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)])
        self.frequencies = nn.Buffer(torch.exp(-torch.arange(8) / 8.0))

    def forward(self, hidden_states, timestep, text):
        height, width = hidden_states.shape[-2] // 2, hidden_states.shape[-1] // 2
        emb = self.time(
            (self.frequencies * (timestep if isinstance(timestep, (int, float)) else timestep[:, None])).sin()
        )
        x = torch.cat([self.text(text), self.patch(hidden_states).flatten(2).transpose(1, 2)], 1)
        x = x + (emb if emb.ndim == 1 else emb[:, None])
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + mlp(x)
        x = self.head(x[:, text.shape[1] :]).unflatten(1, (height, width)).unflatten(3, (2, 2, 4))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


EAGER = {
    "inner_backend": "eager", "sample_ratio": 0.5, "ratio_schedule": "constant", "warmup_steps": 2,
    "reset_interval": None,
}  # fmt: skip


def model() -> TinyDiT:
    return TinyDiT().eval()


def run(compiled, latent, text, steps=6, time=lambda step, steps: torch.full((1,), 1 - step / steps)):
    """A plain Euler loop; returns the last latent."""
    with torch.no_grad():
        for step in range(steps):
            latent = latent - compiled(latent, time(step, steps).expand(len(latent)), text) / steps
    return latent


def kinds(compiled) -> str:
    return "".join(record.kind[0] for record in ras_compile.trace(compiled))


LATENT, TEXT = torch.randn(2, 4, 8, 12), torch.randn(2, 3, 6)
