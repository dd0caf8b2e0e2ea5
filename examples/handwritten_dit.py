"""A diffusion transformer written by hand, in plain PyTorch, sampled region-adaptively from a loop of one's own.

Nothing here knows of `ras_compile` but `torch.compile(model, backend="ras")` and the two lines of the loop that say which
step and which branch it is. The weights are random: this shows the machinery and no pictures.

    python examples/handwritten_dit.py                 # seconds on a CPU
    python examples/handwritten_dit.py inductor        # through Inductor
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import ras_compile

WIDTH, HEADS, PATCH, STEPS, GUIDANCE = 64, 4, 2, 12, 3.0


class Block(nn.Module):
    """`b n c -> b n c`: attention and MLP, each under an adaptive norm."""

    def __init__(self) -> None:
        super().__init__()
        self.ada, self.qkv, self.out = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each `b heads n d`
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(
            -1
        )  # by hand: the compiler finds k and v itself
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, f = self.ada(F.silu(emb))[:, None].chunk(6, dim=-1)
        x = x + c * self.attend(F.layer_norm(x, (WIDTH,)) * (1 + a) + b)
        return x + f * self.mlp(F.layer_norm(x, (WIDTH,)) * (1 + d) + e)


class HandwrittenDiT(nn.Module):
    """`b c (h p) (w p) -> b c (h p) (w p)`, with words before the picture's tokens in one sequence."""

    def __init__(self, channels: int = 4, depth: int = 3, words: int = 16) -> None:
        super().__init__()
        pixels = channels * PATCH**2
        self.embed, self.words, self.time = nn.Linear(pixels, WIDTH), nn.Linear(words, WIDTH), nn.Linear(32, WIDTH)
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(depth)]), nn.Linear(WIDTH, pixels)
        self.frequencies = nn.Buffer(1000 ** (-torch.arange(32) / 32))

    def forward(self, latent: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        b, c, height, width = latent.shape
        h, w = height // PATCH, width // PATCH
        x = latent.reshape(b, c, h, PATCH, w, PATCH).permute(0, 2, 4, 3, 5, 1)  # b h w p q c
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w))[:, :, None] * 0.9 ** torch.arange(WIDTH // 2)
        x = self.embed(x.reshape(b, h * w, -1)) + place.sin().flatten(1)
        emb = self.time((time[:, None] * self.frequencies).sin())
        x = torch.cat([self.words(text), x], 1)
        for block in self.blocks:
            x = block(x, emb)
        x = self.head(x[:, text.shape[1] :]).reshape(b, h, w, PATCH, PATCH, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


def sample(model: nn.Module, latent: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Euler's method from noise (time 1) to data (time 0), guided by two calls a step."""
    nothing = torch.zeros_like(prompt)
    times = torch.linspace(1, 0, STEPS + 1)
    with torch.no_grad(), ras_compile.generation(num_steps=STEPS) as gen:
        for now, later in zip(times[:-1], times[1:], strict=True):
            gen.step()
            with gen.branch("cond"):
                cond = model(latent, now.expand(len(latent)), prompt)
            with gen.branch("uncond"):
                uncond = model(latent, now.expand(len(latent)), nothing)
            latent = latent + (later - now) * (uncond + GUIDANCE * (cond - uncond))
    return latent


def main(inner_backend: str = "eager") -> None:
    torch.manual_seed(0)
    model = HandwrittenDiT().eval()
    latent, prompt = torch.randn(1, 4, 24, 32), torch.randn(1, 8, 16)
    options = {"sample_ratio": 0.5, "warmup_steps": 3, "reset_interval": 5, "inner_backend": inner_backend}
    print(ras_compile.explain(model, options=options, latent=latent, time=torch.ones(1), text=prompt), "\n")

    compiled = torch.compile(model, backend="ras", options=options)
    dense, sparse = sample(model, latent, prompt), sample(compiled, latent, prompt)
    for call in ras_compile.trace(compiled):
        print(f"step {call.step:2d}  {call.branch:<8} {call.kind:<8} {call.active} tokens")
    print(f"\ndistance to the dense result: {(sparse - dense).norm() / dense.norm():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
