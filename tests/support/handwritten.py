"""Small diffusion transformers as people write them by hand, in plain PyTorch: each differs in one idea from the base.

The base is `DiT`: patches by reshape, adaptive norms without weights, one fused projection, bias-free attention, an MLP,
and a linear head. A variant replaces a method; `MODELS` holds one case per variant with the inputs of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TEXT = 16, 2, 3


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        build: makes the module.
        shapes: shape of every argument of forward, by name.
        ratio: most FLOPs that a sparse step with a quarter of the tokens may take, as a share of a dense step's.
        tokens: N, where the region is not all of the base's grid.
        refused: pattern of the sentence with which the compiler refuses the model; None where it must be supported.
        idle: how many splices are there for want of a finer rule: no active row depends on them.
    """

    build: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]
    ratio: float = 0.45
    tokens: int = 24
    refused: str | None = None
    idle: int = 0

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}


MODELS: dict[str, Case] = {}


def model(name: str, *args: Any, latent=(2, 4, 8, 12), time=(2,), text=(2, TEXT, 6), ratio=0.45, tokens=24, refused=None,
          idle=0, **config: Any):  # fmt: skip
    """Registers a class, built with ``args`` and ``config``, under ``name``; the shapes are those of a call."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        assert name not in MODELS, name
        shapes = {"latent": latent, "timestep": time, "text": text}
        shapes = {key: shape for key, shape in shapes.items() if shape is not None}
        MODELS[name] = Case(lambda: kind(*args, **config), shapes, ratio, tokens, refused, idle)
        return kind

    return register


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """`b n (h d) -> b h n d`"""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """`b h n d -> b n (h d)`"""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


class Block(nn.Module):
    """`b n c -> b n c`: attention and MLP under adaptive norms."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.cross, self.text = nn.Linear(width, width), nn.Linear(6, 2 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ada = nn.Linear(width, 4 * width)
        self.width = width

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        shift, scale, gate, second = self.ada(F.silu(emb)).chunk(4, dim=-1)
        x = x + gate * self.out(self.attend(self.norm(x) * (1 + scale) + shift, grid))
        if text is not None:
            key, value = self.text(text).chunk(2, dim=-1)
            x = x + merge(F.scaled_dot_product_attention(heads(self.cross(self.norm(x))), heads(key), heads(value)))
        return x + second * self.mlp(self.norm(x), grid)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],))

    def attend(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return merge(self.mix(*(heads(part) for part in self.qkv(x).chunk(3, dim=-1))))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def mlp(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class DiT(nn.Module):
    """`b c (h p) (w q) -> b c (h p) (w q)`"""

    block: type[Block] = Block

    def __init__(self, patch=(2, 2), channels=4, depth=1) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.embed = nn.Linear(channels * math.prod(patch), WIDTH)
        self.time = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList([self.block() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, channels * math.prod(patch))
        self.frequencies = nn.Buffer(torch.exp(-torch.arange(8) / 8.0))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor | None = None) -> Tensor:
        x, grid = self.patchify(latent)
        x = self.run(x, self.condition(timestep), text, grid)
        return self.unpatchify(x, grid)

    def condition(self, timestep: Tensor) -> Tensor:
        """`b -> b 1 c`, or `b n -> b n c`"""
        emb = self.time((timestep[..., None] * self.frequencies).sin())
        return emb if emb.ndim == 3 else emb[:, None]

    def patchify(self, latent: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        b, c, height, width = latent.shape
        p, q = self.patch
        x = latent.reshape(b, c, height // p, p, width // q, q).permute(0, 2, 4, 3, 5, 1)
        return self.embed(x.reshape(b, -1, p * q * c)), (height // p, width // q)

    def run(self, x: Tensor, emb: Tensor, text: Tensor | None, grid: tuple[int, ...]) -> Tensor:
        for block in self.blocks:
            x = block(x, emb, text, grid)
        return x

    def unpatchify(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        (h, w), (p, q) = grid, self.patch
        x = self.head(x).reshape(x.shape[0], h, w, p, q, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.channels, h * p, w * q)


# Sizes

model("base", depth=2)(DiT)
model("patch 1", patch=(1, 1), latent=(2, 4, 4, 6))(DiT)
model("patch 4", patch=(4, 4), latent=(2, 4, 16, 24))(DiT)
model("patch 2 by 4", patch=(2, 4), latent=(2, 4, 8, 24))(DiT)
model("one sample", latent=(1, 4, 8, 12), time=(1,), text=(1, TEXT, 6))(DiT)
model("batch of three", latent=(3, 4, 8, 12), time=(3,), text=(3, TEXT, 6))(DiT)
model("a single column", latent=(2, 4, 48, 2))(DiT)
model("per-token timesteps", time=(2, 24))(DiT)
model("as much text as picture", text=(2, 24, 6))(DiT)
model("no text", text=None)(DiT)


# Latents


@model("channels last", latent=(2, 8, 12, 4))
class ChannelsLast(DiT):
    def forward(self, latent, timestep, text=None):
        return super().forward(latent.permute(0, 3, 1, 2), timestep, text).permute(0, 2, 3, 1)


@model("audio", latent=(2, 4, 96))
class Audio(DiT):
    """`b c (n p) -> b c (n p)`"""

    def patchify(self, latent):
        x = latent.unfold(2, 4, 4)
        return self.embed(x.permute(0, 2, 3, 1).flatten(2)), (x.shape[2],)

    def unpatchify(self, x, grid):
        return self.head(x).unflatten(2, (4, 4)).permute(0, 3, 1, 2).flatten(2)


class Factorised(Block):
    """Attention among the tokens of a frame, then along time: `(b f) n c` and `(b n) f c`."""

    def attend(self, x, grid):
        (b, _, c), f = x.shape, grid[0]
        inside = super().attend(x.reshape(b * f, -1, c), grid).reshape(b, f, -1, c)
        turned = inside.transpose(1, 2).reshape(-1, f, c)
        return super().attend(turned, grid).reshape(b, -1, f, c).transpose(1, 2).reshape(b, -1, c)


@model("video with joint attention", latent=(2, 4, 3, 4, 8), tokens=24)
class Video(DiT):
    """`b c f (h p) (w q) -> b c f (h p) (w q)`"""

    def patchify(self, latent):
        b, c, f, height, width = latent.shape
        x = latent.reshape(b, c, f, height // 2, 2, width // 2, 2).permute(0, 2, 3, 5, 4, 6, 1)
        return self.embed(x.reshape(b, -1, 4 * c)), (f, height // 2, width // 2)

    def unpatchify(self, x, grid):
        (f, h, w), c = grid, self.channels
        x = self.head(x).reshape(x.shape[0], f, h, w, 2, 2, c)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape[0], c, f, 2 * h, 2 * w)


@model("video with attention over space and over time", latent=(2, 4, 3, 4, 8), tokens=8)
class FactorisedVideo(Video):
    block = Factorised


@model("a mask in the latent's channels")
class Inpainting(DiT):
    """The latent is joined with a picture of its own size before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8 * 4, WIDTH)
        self.known = nn.Parameter(torch.randn(1, 4, 8, 12))

    def patchify(self, latent):
        return super().patchify(torch.cat([latent, self.known.expand_as(latent)], 1))


@model("preconditioned")
class Preconditioned(DiT):
    """`skip * latent + out * f(in * latent)`"""

    def forward(self, latent, timestep, text=None):
        sigma = timestep.exp()[:, None, None, None]
        scale = (sigma**2 + 1).rsqrt()
        return scale**2 * latent + sigma * scale * super().forward(scale * latent, timestep, text)


@model("learned variance")
class Variance(DiT):
    """`b c h w -> b (2 c) h w`"""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 8 * 4)

    def unpatchify(self, x, grid):
        (h, w), x = grid, self.head(x)
        return x.reshape(-1, h, w, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, 2 * h, 2 * w)


# Ways to cut and to join patches


@model("patches by unfold")
class Unfold(DiT):
    def patchify(self, latent):
        x = latent.unfold(2, 2, 2).unfold(3, 2, 2)  # b c h w p q
        b, _, h, w, *_ = x.shape
        return self.embed(x.permute(0, 2, 3, 4, 5, 1).reshape(b, h * w, -1)), (h, w)


@model("patches by im2col and col2im")
class Im2Col(DiT):
    def patchify(self, latent):
        return self.embed(F.unfold(latent, 2, stride=2).transpose(1, 2)), (latent.shape[2] // 2, latent.shape[3] // 2)

    def unpatchify(self, x, grid):
        return F.fold(self.head(x).transpose(1, 2), (2 * grid[0], 2 * grid[1]), 2, stride=2)


@model("pixel shuffle")
class Shuffle(DiT):
    def patchify(self, latent):
        x = F.pixel_unshuffle(latent, 2)
        return self.embed(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])

    def unpatchify(self, x, grid):
        return F.pixel_shuffle(self.head(x).transpose(1, 2).unflatten(2, grid), 2)


@model("transposed convolution")
class Transposed(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(4, WIDTH, 2, 2), nn.ConvTranspose2d(WIDTH, 4, 2, 2)

    def patchify(self, latent):
        x = self.embed(latent)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def unpatchify(self, x, grid):
        return self.head(x.transpose(1, 2).unflatten(2, grid))


@model("strided convolutions on either side", latent=(2, 4, 16, 24), ratio=0.75)
class Stem(Transposed):
    """Two layers that overlap in, two out: 4x4 pixels are one token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, WIDTH, 3, 2, 1))
        self.head = nn.Sequential(nn.ConvTranspose2d(WIDTH, 8, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(8, 4, 4, 2, 1))


@model("patches by strided slices")
class Strided(DiT):
    """Space to depth: `torch.cat([x[..., i::2, j::2] for ...])`."""

    def patchify(self, latent):
        x = torch.cat([latent[:, :, i::2, j::2] for i in range(2) for j in range(2)], 1)
        return self.embed(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


@model("convolutional head")
class ConvHead(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.smooth = nn.Conv2d(4, 4, 3, padding=1)

    def unpatchify(self, x, grid):
        return self.smooth(super().unpatchify(x, grid))


@model("overlapping patches", ratio=0.7)
class Overlapping(DiT):
    """A convolution whose kernel is larger than its stride."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, WIDTH, 4, stride=2, padding=1)

    def patchify(self, latent):
        x = self.embed(latent)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])


# Attention


def variant(name: str, **config: Any) -> Callable[[type[Block]], type[Block]]:
    """Registers the base with another block."""

    def register(block: type[Block]) -> type[Block]:
        model(name, **config)(type(block.__name__, (DiT,), {"block": block}))
        return block

    return register


@variant("bias-free rms norms")
class RmsNorms(Block):
    def norm(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    def mix(self, q, k, v):
        return super().mix(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)


@variant("einsum attention")
class Einsum(Block):
    def attend(self, x, grid):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).unbind(2)
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.3).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


@variant("manual attention")
class Manual(Block):
    def mix(self, q, k, v):
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@variant("manual attention with a mask")
class Masked(Block):
    def mix(self, q, k, v):
        place = torch.arange(q.shape[2])
        near = (place[:, None] - place[None]).abs() < 9
        scores = q @ k.transpose(-2, -1)
        return scores.masked_fill(~near, float("-inf")).softmax(-1) @ v


@variant("manual attention with a bias of distances")
class Alibi(Block):
    def mix(self, q, k, v):
        place = torch.arange(q.shape[2])
        return (q @ k.transpose(-2, -1) - 0.1 * (place[:, None] - place).abs()).softmax(-1) @ v


@variant("manual attention with an explicit softmax")
class Explicit(Block):
    def mix(self, q, k, v):
        scores = q @ k.mT
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return weights @ v / weights.sum(-1, keepdim=True)


@variant("baddbmm attention")
class Baddbmm(Block):
    def mix(self, q, k, v):
        b, h, n, d = q.shape
        q, k, v = (part.reshape(b * h, n, d) for part in (q, k, v))
        zero = torch.zeros(b * h, n, n, dtype=q.dtype)
        return torch.bmm(torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=0.4).softmax(-1), v).reshape(
            b, h, n, d
        )


@variant("talking heads")
class TalkingHeads(Block):
    """The scores of different heads are mixed before the softmax: `b h n m, h g -> b g n m`."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS))

    def mix(self, q, k, v):
        scores = torch.einsum("bhnm,hg->bgnm", q @ k.transpose(-2, -1), self.talk)
        return scores.softmax(-1) @ v


@variant("differential attention")
class Differential(Block):
    def mix(self, q, k, v):
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return ((q1 @ k1.mT).softmax(-1) - 0.3 * (q2 @ k2.mT).softmax(-1)) @ v


@variant("linear attention")
class LinearAttention(Block):
    def mix(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = k.transpose(-2, -1) @ v
        return q @ state / (q @ k.sum(-2).unsqueeze(-1))


@variant("linear attention by einsum")
class LinearEinsum(Block):
    def mix(self, q, k, v):
        q, k = q.softmax(-1), k.softmax(-2)
        return torch.einsum("bhde,bhnd->bhne", torch.einsum("bhnd,bhne->bhde", k, v), q)


@variant("attention over channels")
class ChannelAttention(Block):
    """Channels attend to channels (XCiT): `b h d n, b h n e -> b h d e`."""

    def mix(self, q, k, v):
        weights = (F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1)
        return (weights @ v.mT).mT


@variant("grouped queries")
class Grouped(Block):
    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = heads(q, 4), heads(k[..., :8], 2), heads(v[..., :8], 2)
        return merge(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@variant("grouped queries by repetition")
class GroupedByHand(Block):
    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = heads(q, 4), heads(k[..., :8], 2), heads(v[..., :8], 2)
        k = k[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
        return merge(self.mix(q, k, v.repeat_interleave(2, dim=1)))


@variant("one key for all heads")
class MultiQuery(Block):
    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        return merge(self.mix(heads(q, 4), k[:, None, :, :4], v[:, None, :, :4]))


@variant("causal attention")
class Causal(Block):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@variant("causal attention by a mask")
class CausalMask(Block):
    def mix(self, q, k, v):
        mask = torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
        return (q @ k.mT + mask).softmax(-1) @ v


@variant("no attention among tokens")
class CrossOnly(Block):
    def attend(self, x, grid):
        return self.qkv(x)[..., :WIDTH]


def windows(x: Tensor, grid: tuple[int, ...], side: int) -> Tensor:
    """`b ((h s) (w s)) c -> (b h w) (s s) c`"""
    b, _, c = x.shape
    x = x.reshape(b, grid[0] // side, side, grid[1] // side, side, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, c)


def unwindow(x: Tensor, grid: tuple[int, ...], side: int) -> Tensor:
    x = x.reshape(-1, grid[0] // side, grid[1] // side, side, side, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], grid[0] * grid[1], x.shape[-1])


@variant("windows", tokens=6)
class Windows(Block):
    def attend(self, x, grid):
        return unwindow(super().attend(windows(x, grid, 2), grid), grid, 2)


@variant("shifted windows", idle=1)  # of the queries in a window, which all run, only the active ones count
class ShiftedWindows(Block):
    def attend(self, x, grid):
        rolled = x.unflatten(1, grid).roll((-1, -1), (1, 2)).flatten(1, 2)
        y = unwindow(super().attend(windows(rolled, grid, 2), grid), grid, 2)
        return y.unflatten(1, grid).roll((1, 1), (1, 2)).flatten(1, 2)


@variant("axial attention", tokens=6)
class Axial(Block):
    """Along rows, then along columns."""

    def attend(self, x, grid):
        b, _, c = x.shape
        rows = super().attend(x.reshape(b * grid[0], grid[1], c), grid).reshape(b, *grid, c)
        columns = super().attend(rows.transpose(1, 2).reshape(b * grid[1], grid[0], c), grid)
        return columns.reshape(b, grid[1], grid[0], c).transpose(1, 2).reshape(b, -1, c)


@variant("neighbours by im2col")
class Neighbours(Block):
    """Each token attends to the nine tokens around it."""

    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = (
            F.unfold(part.transpose(1, 2).unflatten(2, grid), 3, padding=1).unflatten(1, (WIDTH, 9)).permute(0, 3, 2, 1)
            for part in (k, v)
        )
        return ((q[:, :, None] @ k.mT).softmax(-1) @ v).squeeze(2)


@variant("keys of a coarser grid")
class Pooled(Block):
    """Keys and values are averaged over 2x2 tokens (PVT)."""

    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = (F.avg_pool2d(part.transpose(1, 2).unflatten(2, grid), 2).flatten(2).transpose(1, 2) for part in (k, v))
        return merge(self.mix(heads(q), heads(k), heads(v)))


@variant("keys of a coarser grid by a convolution", tokens=6)
class Reduced(Block):
    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def attend(self, x, grid):
        small = self.reduce(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        q, (k, v) = self.qkv(x)[..., :WIDTH], self.qkv(small)[..., WIDTH:].chunk(2, -1)
        return merge(self.mix(heads(q), heads(k), heads(v)))


@variant("learned slots")
class Slots(Block):
    """Slots read the tokens, then the tokens read the slots (Perceiver)."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, 5, WIDTH))

    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        slots = merge(self.mix(heads(self.slots.expand(x.shape[0], -1, -1)), heads(k), heads(v)))
        return merge(self.mix(heads(q), heads(slots), heads(slots)))


@variant("torch's own layer of attention")
class Library(Block):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def attend(self, x, grid):
        return self.layer(x, x, x, need_weights=False)[0]


# Rotary embeddings


def angles(grid: tuple[int, ...], dim: int) -> Tensor:
    """`n d/2`: half of the channels turn with the row, half with the column."""
    turns = 0.5 ** torch.arange(dim // 4)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.cat([rows.reshape(-1, 1) * turns, columns.reshape(-1, 1) * turns], -1)


@variant("rotary embedding by complex numbers")
class ComplexRotary(Block):
    def attend(self, x, grid):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        table = torch.polar(torch.ones(()), angles(grid, q.shape[-1]))
        q, k = (
            torch.view_as_real(torch.view_as_complex(p.reshape(*p.shape[:-1], -1, 2)) * table).flatten(-2)
            for p in (q, k)
        )
        return merge(self.mix(q, k, v))


@variant("rotary embedding by halves")
class HalfRotary(Block):
    def attend(self, x, grid):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        angle = angles(grid, q.shape[-1]).repeat(1, 2)

        def turn(part):
            first, second = part.chunk(2, -1)
            return part * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

        return merge(self.mix(turn(q), turn(k), v))


@variant("rotary embedding written into slices")
class SliceRotary(Block):
    def attend(self, x, grid):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        angle = angles(grid, q.shape[-1])

        def turn(part):
            out = torch.empty_like(part)
            out[..., 0::2] = part[..., 0::2] * angle.cos() - part[..., 1::2] * angle.sin()
            out[..., 1::2] = part[..., 0::2] * angle.sin() + part[..., 1::2] * angle.cos()
            return out

        return merge(self.mix(turn(q), turn(k), v))


# MLPs and blocks


@variant("depthwise convolution in the MLP")
class Depthwise(Block):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4 * WIDTH, 4 * WIDTH, 3, padding=1, groups=4 * WIDTH)

    def mlp(self, x, grid):
        y = self.up(x).transpose(1, 2).unflatten(2, grid)
        return self.down(F.gelu(self.depthwise(y)).flatten(2).transpose(1, 2))


@variant("gated convolution with a group norm")
class Grouping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.GroupNorm(4, WIDTH)

    def mlp(self, x, grid):
        return super().mlp(self.normed(x.transpose(1, 2)).transpose(1, 2), grid)


@variant("attention and MLP in parallel")
class Parallel(Block):
    def forward(self, x, emb, text, grid):
        y = self.norm(x) + emb
        return x + self.out(self.attend(y, grid)) + self.mlp(y, grid)


@variant("mixer", ratio=0.7)
class Mixer(Block):
    """The MLP works along the tokens instead of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))

    def attend(self, x, grid):
        return self.tokens(x.transpose(1, 2)).transpose(1, 2)


@variant("spatial gating", ratio=0.5)
class SpatialGating(Block):
    """One half of the channels gates the other after a linear along the tokens (gMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Linear(24, 24)

    def attend(self, x, grid):
        first, second = self.qkv(x).chunk(3, -1)[:2]
        return first * self.along(second.transpose(1, 2)).transpose(1, 2)


@variant("pooled mean fed back")
class PooledMean(Block):
    def mlp(self, x, grid):
        return super().mlp(x + x.mean(1, keepdim=True), grid)


@variant("squeeze and excitation")
class Excitation(Block):
    def mlp(self, x, grid):
        y = self.up(x)
        return self.down(y * self.up(x.mean(dim=1)).sigmoid()[:, None])


@variant("statistics over the whole sample")
class GlobalStatistics(Block):
    def norm(self, x):
        return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)


@variant("token shift")
class TokenShift(Block):
    """Half of the channels come from the token before (RWKV)."""

    def mlp(self, x, grid):
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return super().mlp(torch.cat([x[..., : WIDTH // 2], before[..., WIDTH // 2 :]], -1), grid)


@variant("running sums", ratio=0.5)
class RunningSums(Block):
    """A scan along the tokens, forward and backward."""

    def attend(self, x, grid):
        y = self.qkv(x)[..., :WIDTH]
        return y.cumsum(1) * 0.1 + y.flip(1).cumsum(1).flip(1) * 0.1


@variant("tokens in another order", ratio=0.6)
class Reordered(Block):
    """A snake through the grid: every other row backwards."""

    def attend(self, x, grid):
        order = torch.arange(24).reshape(grid)
        order = torch.cat([row if index % 2 == 0 else row.flip(0) for index, row in enumerate(order)])
        return super().attend(x[:, order], grid)[:, order.argsort()]


@variant("only the strongest tokens as keys")
class TopKeys(Block):
    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        best = x.norm(dim=-1).topk(8, dim=1).indices[..., None].expand(-1, -1, WIDTH)
        return merge(self.mix(heads(q), heads(k.gather(1, best)), heads(v.gather(1, best))))


@variant("experts chosen per token")
class Experts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.second = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def mlp(self, x, grid):
        chosen = F.one_hot(self.router(x).argmax(-1), 2).to(x.dtype)
        return chosen[..., :1] * super().mlp(x, grid) + chosen[..., 1:] * self.second(x)


# Whole models


@model("registers before the picture")
class RegistersBefore(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.randn(1, 2, WIDTH)), nn.Parameter(torch.randn(1, 3, WIDTH))

    def join(self, x):
        return torch.cat([self.before.expand(x.shape[0], -1, -1), x], 1)

    def run(self, x, emb, text, grid):
        return super().run(self.join(x), emb, text, grid)[:, 2:]


@model("registers behind the picture")
class RegistersAfter(RegistersBefore):
    def run(self, x, emb, text, grid):
        count = x.shape[1]
        return DiT.run(self, torch.cat([x, self.after.expand(x.shape[0], -1, -1)], 1), emb, text, grid)[:, :count]


@model("registers on both sides")
class RegistersAround(RegistersBefore):
    def join(self, x):
        return torch.cat([super().join(x), self.after.expand(x.shape[0], -1, -1)], 1)

    def run(self, x, emb, text, grid):
        _, x, _ = DiT.run(self, self.join(x), emb, text, grid).split([2, x.shape[1], 3], dim=1)
        return x


@model("time and text as tokens")
class InContext(DiT):
    """U-ViT: everything is a token, and a long skip is joined to the channels."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.words, self.skip = nn.Linear(6, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def run(self, x, emb, text, grid):
        x = torch.cat([emb, self.words(text), x], 1)
        first = self.blocks[0](x, emb, None, grid)
        middle = self.blocks[1](first, emb, None, grid)
        joined = self.skip(torch.cat([middle, first], -1))
        return self.blocks[2](joined, emb, None, grid)[:, -grid[0] * grid[1] :]


@model("in-context with as much text as picture", text=(2, 24, 6), ratio=0.7)
class InContextSameLength(InContext):
    pass


@model("a pooled token conditions all")
class PooledToken(DiT):
    def run(self, x, emb, text, grid):
        for block in self.blocks:
            x = block(x, emb + x.mean(1, keepdim=True), text, grid)
        return x


@model("learned positions")
class Positions(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(24, WIDTH))

    def run(self, x, emb, text, grid):
        return super().run(x + self.positions, emb, text, grid)


@model("positions of rows and of columns")
class RowsAndColumns(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.randn(4, 1, WIDTH)), nn.Parameter(torch.randn(6, WIDTH))

    def run(self, x, emb, text, grid):
        x = (x.unflatten(1, grid) + self.rows + self.columns).flatten(1, 2)
        return super().run(x, emb, text, grid)


@model("interpolated positions")
class Interpolated(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, WIDTH, 3, 3))

    def run(self, x, emb, text, grid):
        table = F.interpolate(self.positions, size=grid, mode="bilinear")
        return super().run(x + table.flatten(2).transpose(1, 2), emb, text, grid)


@model("merged patches", latent=(2, 4, 8, 12), tokens=6)
class Hourglass(DiT):
    """2x2 tokens become one of more channels and are taken apart again, with a long skip."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.down, self.up, self.skip = (
            nn.Linear(4 * WIDTH, WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def run(self, x, emb, text, grid):
        h, w = grid
        x = self.blocks[0](x, emb, text, grid)
        small = x.reshape(-1, h // 2, 2, w // 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], -1, 4 * WIDTH)
        small = self.up(self.blocks[1](self.down(small), emb, text, (h // 2, w // 2)))
        large = small.reshape(-1, h // 2, w // 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return self.blocks[2](self.skip(torch.cat([x, large], -1)), emb, text, grid)


@model("downsampled by a convolution, upsampled by repetition", tokens=6)
class Pyramid(Hourglass):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(WIDTH, WIDTH, 2, 2)

    def run(self, x, emb, text, grid):
        h, w = grid
        x = self.blocks[0](x, emb, text, grid)
        small = self.down(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        small = self.blocks[1](small, emb, text, (h // 2, w // 2))
        large = F.interpolate(small.transpose(1, 2).unflatten(2, (h // 2, w // 2)), scale_factor=2, mode="nearest")
        return self.blocks[2](self.skip(torch.cat([x, large.flatten(2).transpose(1, 2)], -1)), emb, text, grid)


@model("two streams")
class TwoStreams(DiT):
    """Text and picture have weights of their own and attend jointly (MMDiT)."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.words = nn.Linear(6, WIDTH)
        self.other = nn.ModuleList([Block() for _ in range(2)])
        self.mine = nn.ModuleList([Block() for _ in range(2)])

    def run(self, x, emb, text, grid):
        y = self.words(text)
        for mine, other in zip(self.mine, self.other, strict=True):
            parts = [m.qkv(m.norm(t + emb)).chunk(3, -1) for m, t in ((other, y), (mine, x))]
            q, k, v = (heads(torch.cat(pair, 1)) for pair in zip(*parts, strict=True))
            mixed = merge(mine.mix(q, k, v))
            y, x = y + other.out(mixed[:, :TEXT]), x + mine.out(mixed[:, TEXT:])
            y, x = y + other.mlp(other.norm(y), grid), x + mine.mlp(mine.norm(x), grid)
        return x


@model("convolutions between the layers", ratio=0.5)
class Between(DiT):
    """A residual 3x3 convolution over the grid between the layers."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.between = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")

    def run(self, x, emb, text, grid):
        x = self.blocks[0](x, emb, text, grid)
        x = x + self.between(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.blocks[1](x, emb, text, grid)


@model("guidance inside")
class GuidanceInside(DiT):
    """Both branches in one call: the latent is doubled, and the results are combined."""

    def forward(self, latent, timestep, text=None):
        both = torch.cat([latent, latent])
        text = torch.cat([text, torch.zeros_like(text)])
        cond, uncond = super().forward(both, timestep.repeat(2), text).chunk(2)
        return uncond + 3 * (cond - uncond)


@model("norm of the whole noise")
class Rescaled(DiT):
    """The noise is divided by its own norm: every token counts for every other."""

    def forward(self, latent, timestep, text=None):
        noise = super().forward(latent, timestep, text)
        return noise / noise.flatten(1).norm(dim=1)[:, None, None, None]


@variant("frequencies instead of attention")
class Frequencies(Block):
    """FNet: the real part of the Fourier transform over the grid."""

    def attend(self, x, grid):
        y = self.qkv(x)[..., :WIDTH].unflatten(1, grid)
        return torch.fft.fft2(y, dim=(1, 2)).real.flatten(1, 2) * 0.2


@variant("tokens merged by slices")
class MergedSlices(Block):
    """Keys and values of 2x2 tokens side by side (Swin's merging)."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x, grid):
        y = x.unflatten(1, grid)
        small = self.merge(torch.cat([y[:, i::2, j::2] for i in range(2) for j in range(2)], -1)).flatten(1, 2)
        q, (k, v) = self.qkv(x)[..., :WIDTH], self.qkv(small)[..., WIDTH:].chunk(2, -1)
        return merge(self.mix(heads(q), heads(k), heads(v)))


@variant("positions relative to rows and to columns", idle=1)
class Decomposed(Block):
    """The scores get a term for the row and one for the column of the key, which depends on the query (SAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.randn(4, 4, 8)), nn.Parameter(torch.randn(6, 6, 8))

    def mix(self, q, k, v):
        (b, h, n, d), grid = q.shape, (4, 6)
        scores = (q @ k.mT).reshape(b * h, *grid, *grid)
        query = q.reshape(b * h, *grid, d)
        scores = scores + torch.einsum("bhwc,hkc->bhwk", query, self.rows)[..., None]
        scores = scores + torch.einsum("bhwc,wkc->bhwk", query, self.columns)[..., None, :]
        return scores.reshape(b, h, n, n).softmax(-1) @ v


@variant("a sink beside the keys")
class Sink(Block):
    """One more score that no value belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS))

    def mix(self, q, k, v):
        sink = self.sink[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
        return torch.cat([q @ k.mT, sink], -1).softmax(-1)[..., :-1] @ v


@variant("each query reads its best keys")
class BestKeys(Block):
    def mix(self, q, k, v):
        scores = q @ k.mT
        least = scores.topk(6, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v


@variant("a key read before the tokens")
class AddedKeys(Block):
    """Keys and values are joined with learned ones, on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(2, 1, HEADS, 2, WIDTH // HEADS))

    def mix(self, q, k, v):
        k, v = (torch.cat([m.expand(q.shape[0], -1, -1, -1), t], 2) for m, t in zip(self.memory, (k, v), strict=True))
        return super().mix(q, k, v)


@variant("batch norm")
class BatchNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.batched = nn.BatchNorm1d(WIDTH)

    def norm(self, x):
        return self.batched(x.transpose(1, 2)).transpose(1, 2)


@variant("windows that do not divide the grid", ratio=0.6)
class PaddedWindows(Block):
    """The grid is padded to whole windows and cropped."""

    def attend(self, x, grid):
        padded = F.pad(x.unflatten(1, grid), (0, 0, 0, 2)).flatten(1, 2)
        y = unwindow(super().attend(windows(padded, (4, 8), 4), grid), (4, 8), 4)
        return y.unflatten(1, (4, 8))[:, :, :6].flatten(1, 2)


@variant("pairs of neighbours as one token", tokens=12)
class Pairs(Block):
    """`b (n 2) c -> b n (2 c)`"""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(2 * WIDTH, 2 * WIDTH)

    def mlp(self, x, grid):
        return F.gelu(self.joint(x.reshape(x.shape[0], -1, 2 * WIDTH))).reshape(x.shape)


@variant("in place", idle=2)
class InPlace(Block):
    """Writes into fresh tensors, as hand-written code does."""

    def attend(self, x, grid):
        y = super().attend(x, grid)
        y += x
        y[:, :, :4] *= 2
        y[:, 5] = 0
        return y.clamp_(-3, 3)


@variant("samples in the sequence")
class Packed(Block):
    """All samples stand behind one another, apart by a mask (NaViT)."""

    def mix(self, q, k, v):
        b, h, n, d = q.shape
        sample = torch.arange(b).repeat_interleave(n)
        q, k, v = (part.transpose(0, 1).reshape(1, h, b * n, d) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sample[:, None] == sample)
        return y.reshape(h, b, n, d).transpose(0, 1)


@model("sequence first")
class SequenceFirst(DiT):
    """`n b c` between the layers, and torch's attention in that order."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.layers = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS) for _ in range(2)])

    def run(self, x, emb, text, grid):
        x = (x + emb).transpose(0, 1)
        for layer in self.layers:
            x = x + layer(x, x, x)[0]
        return x.transpose(0, 1)


@model("torch's own encoder")
class Encoder(DiT):
    def __init__(self) -> None:
        super().__init__(depth=0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(self, x, emb, text, grid):
        return self.encoder(x + emb)


@model("columns first")
class ColumnsFirst(DiT):
    """The sequence counts the grid column by column."""

    def patchify(self, latent):
        x, grid = super().patchify(latent.transpose(2, 3))
        return x, grid

    def unpatchify(self, x, grid):
        return super().unpatchify(x, grid).transpose(2, 3)


@model("window by window")
class WindowOrder(DiT):
    """The sequence counts window by window all the way, positions are rotated in that order."""

    def run(self, x, emb, text, grid):
        place = windows(torch.arange(24.0)[None, :, None], grid, 2).reshape(1, 24, 1)
        x = windows(x, grid, 2).reshape(x.shape)
        x = super().run(x * (0.1 * place).cos(), emb, text, grid)
        return unwindow(x.reshape(-1, 4, WIDTH), grid, 2)


@model("channels first all along")
class ChannelsFirst(DiT):
    """`b c h w` between the layers, 1x1 convolutions, attention over the flattened grid."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.embed, self.head = nn.Conv2d(4, WIDTH, 2, 2), nn.ConvTranspose2d(WIDTH, 4, 2, 2)
        self.qkv, self.norm = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.GroupNorm(1, WIDTH)
        self.mlp = nn.Sequential(nn.Conv2d(WIDTH, 32, 1), nn.SiLU(), nn.Conv2d(32, WIDTH, 1))

    def forward(self, latent, timestep, text=None):
        x = self.embed(latent) + self.condition(timestep).transpose(1, 2)[..., None]
        for _ in range(2):
            q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)
            weights = torch.einsum("bcn,bcm->bnm", q, k).softmax(-1)
            x = x + torch.einsum("bnm,bcm->bcn", weights, v).view_as(x)
            x = x + self.mlp(x)
        return self.head(x)


@model("text reads the picture")
class TextReads(DiT):
    """Text is updated from the picture's tokens, and the picture reads it."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.words, self.kv = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def run(self, x, emb, text, grid):
        words = self.words(text)
        for _ in range(2):
            k, v = self.kv(x).chunk(2, -1)
            words = words + merge(F.scaled_dot_product_attention(heads(words), heads(k), heads(v)))
            k, v = self.kv(words).chunk(2, -1)
            x = self.blocks[0](x + merge(F.scaled_dot_product_attention(heads(x), heads(k), heads(v))), emb, text, grid)
        return x


@model("values of the first layer in all")
class ValueResidual(DiT):
    def __init__(self) -> None:
        super().__init__(depth=0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3)])

    def run(self, x, emb, text, grid):
        first = None
        for layer in self.layers:
            q, k, v = (heads(part) for part in layer(F.rms_norm(x, (WIDTH,)) + emb).chunk(3, -1))
            first = v if first is None else first
            x = x + merge(F.scaled_dot_product_attention(q, k, v + 0.5 * first))
        return x


@model("the mean of the latent", ratio=0.5)
class LatentMean(DiT):
    """Statistics of the whole latent condition the layers and are added to the noise."""

    def forward(self, latent, timestep, text=None):
        mean = latent.mean((2, 3), keepdim=True)
        noise = super().forward(latent - mean, timestep + latent.std((1, 2, 3)), text)
        return noise + mean


@model("two patch sizes", tokens=6)
class TwoScales(DiT):
    """Coarse tokens and fine tokens come from the same latent; the coarse ones are repeated and added."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.coarse = nn.Conv2d(4, WIDTH, 4, 4)

    def run_coarse(self, latent, emb):
        x = self.coarse(latent)
        b, c, h, w = x.shape
        x = self.blocks[0](x.flatten(2).transpose(1, 2), emb, None, (h, w))
        x = x.reshape(b, h, 1, w, 1, c).expand(-1, -1, 2, -1, 2, -1)
        return x.reshape(b, 4 * h * w, c)

    def forward(self, latent, timestep, text=None):
        emb = self.condition(timestep)
        x, grid = self.patchify(latent)
        return self.unpatchify(self.blocks[1](x + self.run_coarse(latent, emb), emb, text, grid), grid)


@model("sorted tokens", ratio=0.97, idle=1)
class Sorted(DiT):
    """Tokens are brought into the order of their norms and back."""

    def run(self, x, emb, text, grid):
        order = x.norm(dim=-1).argsort(1)[..., None].expand_as(x)
        place = 0.2 * torch.arange(x.shape[1])[:, None]
        y = super().run(x.gather(1, order) * place.cos(), emb, text, grid)
        return torch.zeros_like(x).scatter(1, order, y)


@model("most tokens are dropped in the middle", depth=2)
class Dropped(DiT):
    """Only the strongest tokens take part in a layer (mixture of depths); the others pass by."""

    def run(self, x, emb, text, grid):
        best = x.norm(dim=-1).topk(8, dim=1).indices[..., None].expand(-1, -1, WIDTH)
        y = self.blocks[0](x.gather(1, best), emb, text, grid)
        return self.blocks[1](x.scatter(1, best, y), emb, text, grid)


@model("several outputs")
class Outputs(DiT):
    """Noise, its own features, and their mean."""

    def forward(self, latent, timestep, text=None):
        x, grid = self.patchify(latent)
        x = self.run(x, self.condition(timestep), text, grid)
        return {"noise": self.unpatchify(x, grid), "features": x, "mean": x.mean(1)}


@model("video counted in time first", latent=(2, 4, 3, 4, 8), tokens=24)
class TimeFirst(Video):
    """The sequence counts the frames of a place one after the other."""

    def run(self, x, emb, text, grid):
        x = x.unflatten(1, (grid[0], -1)).transpose(1, 2).flatten(1, 2)
        x = super().run(x, emb, text, grid)
        return x.unflatten(1, (-1, grid[0])).transpose(1, 2).flatten(1, 2)


# What looks like something else


@variant("distances instead of products")
class Distances(Block):
    def mix(self, q, k, v):
        return (-torch.cdist(q, k)).softmax(-1) @ v


@variant("causal products without a softmax", idle=1)
class CausalProducts(Block):
    def mix(self, q, k, v):
        return (q @ k.mT).tril() @ v * 0.1


@variant("softmax over the queries")
class OverQueries(Block):
    def mix(self, q, k, v):
        return (q @ k.mT).softmax(-2) @ v


@variant("weights that are used twice")
class Twice(Block):
    def mix(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ (weights @ v)


@variant("gated linear units")
class Gated(Block):
    def mlp(self, x, grid):
        return self.down(F.glu(self.up(x), dim=-1).repeat(1, 1, 2))


@variant("samples that see each other")
class AcrossSamples(Block):
    def mlp(self, x, grid):
        return super().mlp(x + x.mean(0, keepdim=True) + x.flip(0), grid)


@variant("the transposed picture is added", latent=(2, 4, 8, 8), tokens=16, ratio=0.7, idle=1)
class TransposedAdded(Block):
    """Tokens and their mirror images have the same shape, and as many entries as there are channels."""

    def mlp(self, x, grid):
        y = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
        return super().mlp(x + y, grid)


@variant("as many tokens as channels", latent=(2, 4, 8, 8), tokens=16)
class SquareProducts(Block):
    """`b n c, b n d -> b c d` has the shape of the tokens and is none."""

    def attend(self, x, grid):
        y = self.qkv(x)[..., :WIDTH]
        return x @ (y.transpose(1, 2) @ y) * 0.05


@model("registers from fresh tensors")
class FreshRegisters(DiT):
    def run(self, x, emb, text, grid):
        b, n, c = x.shape
        both = x.new_zeros(b, n + 2, c)
        both[:, 2:] = x
        both[:, :2] = both.new_full((2, c), 0.5)
        return super().run(both, emb, text, grid)[:, 2:] + x.new_ones(n, 1)


# What else is around


@variant("norms of queries and keys over all heads")
class NormOverHeads(Block):
    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.rms_norm(q, (WIDTH,)), F.normalize(k, dim=-1) * 4
        weights = torch.tanh(heads(q) @ heads(k).mT / 5) * 5
        return merge(weights.softmax(-1) @ heads(v))


@variant("linear attention with decays", ratio=0.6, idle=1)
class Decayed(Block):
    """Gated linear attention in one piece: what a token keeps of those before it is a product of their gates."""

    def mix(self, q, k, v):
        decay = F.logsigmoid(k.mean(-1)).cumsum(-1)  # b h n
        gap = decay[..., :, None] - decay[..., None, :]
        before = torch.ones(gap.shape[-2:], dtype=torch.bool).tril()
        return (q @ k.mT * gap.masked_fill(~before, -torch.inf).exp()) @ v * 0.1


@variant("a convolution along the sequence in the MLP", ratio=0.6)
class Convolved(Block):
    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(4 * WIDTH, 4 * WIDTH, 3, padding=1, groups=WIDTH)

    def mlp(self, x, grid):
        return self.down(F.silu(self.along(self.up(x).mT).mT))


@variant("attention among every other token", tokens=6)
class Downsampled(Block):
    """`b (h 2) (w 2) c -> (b 2 2) (h w) c`: four coarser pictures, as in U-DiT."""

    def attend(self, x, grid):
        (b, _, c), (height, width) = x.shape, grid
        y = x.reshape(b, height // 2, 2, width // 2, 2, c).permute(0, 2, 4, 1, 3, 5).reshape(b * 4, -1, c)
        y = super().attend(y, grid)
        return y.reshape(b, 2, 2, height // 2, width // 2, c).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


@variant("channels that look in four directions", ratio=0.6)
class FourDirections(Block):
    """Quarters of the channels come from the neighbour above, below, left and right, as in vision RWKV."""

    def mlp(self, x, grid):
        picture = x.unflatten(1, grid)  # b h w c
        up, down, left, right = picture.chunk(4, -1)
        up, down = F.pad(up, (0, 0, 0, 0, 1, -1)), F.pad(down, (0, 0, 0, 0, -1, 1))
        left, right = F.pad(left, (0, 0, 1, -1)), F.pad(right, (0, 0, -1, 1))
        return super().mlp(x + torch.cat([up, down, left, right], -1).flatten(1, 2), grid)


@variant("a convolution round the panorama", ratio=0.6)
class Panorama(Block):
    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Conv2d(4 * WIDTH, 4 * WIDTH, 3, groups=4 * WIDTH)

    def mlp(self, x, grid):
        y = self.up(x).mT.unflatten(2, grid)
        y = F.pad(F.pad(y, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return self.down(F.gelu(self.around(y)).flatten(2).mT)


@variant("a loop over the samples")
class Loop(Block):
    """Every sample has a temperature of its own; those of one batch share their active rows."""

    def mix(self, q, k, v):
        found = []
        for sample, (one, key, value) in enumerate(zip(q, k, v, strict=True)):
            found.append(F.scaled_dot_product_attention(one * (1 + sample), key, value))
        return torch.stack(found)


@variant("keys of the first sample for all")
class SharedKeys(Block):
    """Pictures of one look: each attends to itself and to the first of the batch."""

    def mix(self, q, k, v):
        both = [torch.cat([part, part[:1].expand_as(part)], 2) for part in (k, v)]
        return F.scaled_dot_product_attention(q, *both)


@variant("merged tokens by likeness", ratio=0.9)
class Merged(Block):
    """Each odd token is averaged into the even one that it is most like, for the MLP; which ones, the values say."""

    def mlp(self, x, grid):
        even, odd = x[:, ::2], x[:, 1::2]
        best = (odd @ even.mT).argmax(-1, keepdim=True).expand_as(odd)
        merged = super().mlp(even.scatter_reduce(1, best, odd, "mean"), grid)
        return torch.stack([merged, merged.gather(1, best)], 2).flatten(1, 2)


@variant("experts that pick their tokens in a loop", refused="value that depends on the latent's values.*in mlp")
class ExpertLoop(Block):
    """How many tokens an expert gets hangs on the latent: no graph of fixed sizes is right for the next step."""

    def mlp(self, x, grid):
        flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        choice = self.up(flat)[:, :2].argmax(-1)
        for expert in range(2):
            place = torch.where(choice == expert)[0]
            out.index_add_(0, place, super().mlp(flat[place] * (1 + expert), grid))
        return out.view_as(x)


@variant("a mask of likenesses", refused="mask computed from the latent's values")
class Likeness(Block):
    def mix(self, q, k, v):
        seen = torch.cdist(q.mean(1, True), k.mean(1, True)) < 1.5
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | torch.eye(q.shape[2], dtype=torch.bool))


@variant("a mask of all pairs", ratio=0.6, idle=1)
class Brighter(Block):
    """Which pairs see each other hangs on the values: made anew at each step, of cached values where tokens are not active."""

    def mix(self, q, k, v):
        seen = q.mean(-1)[..., :, None] <= k.mean(-1)[..., None, :] + 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | torch.eye(q.shape[2], dtype=torch.bool))


@model("long skips over the blocks", depth=3)
class LongSkips(DiT):
    def __init__(self, **config) -> None:
        super().__init__(**config)
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def run(self, x, emb, text, grid):
        first = self.blocks[0](x, emb, text, grid)
        middle = self.blocks[1](first, emb, text, grid)
        return self.blocks[2](self.join(torch.cat([middle, first], -1)), emb, text, grid)


@model("coordinates among the channels")
class Coordinates(DiT):
    def patchify(self, latent):
        b, _, height, width = latent.shape
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        extra = torch.stack([rows, columns, rows * columns, rows**2]).to(latent).expand(b, -1, -1, -1)
        return super().patchify(torch.cat([latent[:, :2], (latent[:, 2:] + extra[:, :2]) * extra[:, 2:]], 1))


@model("another picture to look at", text=(2, 4, 8, 8), ratio=0.6)
class LooksAt(DiT):
    """The text is a picture of another size: its patches go through the same embedding, in front of the tokens."""

    def forward(self, latent, timestep, text=None):
        shown, _ = self.patchify(text)
        x, grid = self.patchify(latent)
        x = self.run(torch.cat([shown, x], 1), self.condition(timestep), None, grid)
        return self.unpatchify(x[:, shown.shape[1] :], grid)


@variant("experts weighed by a scatter")
class Scattered(Block):
    """Each token's two best experts, by weights that are scattered into zeros."""

    def mlp(self, x, grid):
        scores = self.up(x)[..., :4]
        best, place = scores.topk(2, -1)
        weights = torch.zeros_like(scores).scatter_(-1, place, best.softmax(-1))
        return sum(weights[..., k, None] * super(Scattered, self).mlp(x * (k + 1), grid) for k in range(4))


class Routed(Block):
    """Each token's two best of three experts, as models with routed experts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in "abc"]
        )

    def mlp(self, x, grid):
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        return self.routed(x, weights, chosen)


@variant("experts for all tokens, weighed by zero where they are not chosen")
class RoutedByWeights(Routed):
    """The spelling of routed experts whose sizes hang on no values."""

    def routed(self, x, weights, chosen):
        shares = [(weights * (chosen == index)).sum(-1, keepdim=True) for index in range(3)]
        return sum(expert(x) * share for expert, share in zip(self.experts, shares, strict=True))


@variant("experts for the tokens that chose them", refused="reads a value that depends on the latent's values")
class RoutedByPlaces(Routed):
    """How many tokens an expert has hangs on the latent, and so do the sizes of all tensors inside."""

    def routed(self, x, weights, chosen):
        x, weights, chosen = x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return out.unflatten(0, (2, -1))


@variant("experts looked up per token")
class LookedUp(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, WIDTH))

    def mlp(self, x, grid):
        return super().mlp(x * self.table[self.up(x)[..., :3].argmax(-1)], grid)


@variant("a layer of torch's functions")
class Functional(Block):
    """Sequence first, with the weights of all heads."""

    def attend(self, x, grid):
        x, bias = x.transpose(0, 1), torch.zeros(3 * WIDTH, dtype=x.dtype)
        mixed, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, self.qkv.weight, bias, None, None, False, 0.0, self.out.weight, None, training=False
        )
        return mixed.transpose(0, 1)


@variant("response norms over the picture")
class Responses(Block):
    """As in ConvNeXt's second version: each channel by its norm over all tokens."""

    def mlp(self, x, grid):
        hidden = F.gelu(self.up(x))
        size = hidden.norm(dim=1, keepdim=True)
        return self.down(hidden + hidden * size / (size.mean(-1, keepdim=True) + 1e-6))


@model("a constant channel padded onto the latent")
class PaddedChannel(DiT):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5 * 4, WIDTH)

    def patchify(self, latent):
        return super().patchify(F.pad(latent, (0, 0, 0, 0, 0, 1), value=1.0))


@model("a grid that is padded to whole patches", latent=(2, 4, 7, 12), idle=2)
class PaddedGrid(DiT):
    def forward(self, latent, timestep, text=None):
        return super().forward(F.pad(latent, (0, 0, 0, 1)), timestep, text)[:, :, :-1]


@model("a sequence padded to a multiple of eight", text=(2, TEXT, 6))
class PaddedSequence(DiT):
    """Text, picture, and zeros that a mask hides."""

    def run(self, x, emb, text, grid):
        both = torch.cat([F.pad(text, (0, WIDTH - 6)), x], 1)
        length = both.shape[1]
        both = F.pad(both, (0, 0, 0, -length % 8))
        seen = torch.arange(both.shape[1]) < length
        for block in self.blocks:
            q, k, v = (heads(part) for part in block.qkv(block.norm(both) + emb).chunk(3, -1))
            both = both + merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None, None]))
            both = both + block.mlp(both, grid)
        return both[:, text.shape[1] : length]


@variant("two variants of every token, one first, one last", idle=1)
class Variants(Block):
    """Queries `(b 2 n) h d` and keys `(b n 2) h d`, paired by their places in the batch: across tokens."""

    def attend(self, x, grid):
        b, n, c = x.shape
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        first = torch.cat([q, q.sin()], 1).flatten(0, 1)
        last = [torch.stack([part, part.cos()], 2).flatten(0, 2) for part in (k, v)]
        return self.mix(first, *last).reshape(b, 2, n, c).sum(1)


@variant("heads and tokens in one dimension of grouped attention", idle=1)
class GroupedTokens(Block):
    """`b (n g) l d` beside `b n l d`: each token attends among its own channels, and beside those of others."""

    def attend(self, x, grid):
        b, n, c = x.shape
        q, k, v = (part.reshape(b, n, 4, 4) for part in self.qkv(x).chunk(3, -1))
        own = F.scaled_dot_product_attention(q.repeat_interleave(2, 1), k, v, enable_gqa=True)
        others = F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), k, v, enable_gqa=True)
        return own.reshape(b, n, 2, c).sum(2) + others.reshape(b, 2, n, c).sum(1)


@model("a video with nothing to pad", latent=(2, 4, 3, 4, 8), tokens=24)
class NothingPadded(Video):
    """What is behind the last token is cut off and joined again, and is nothing."""

    def run(self, x, emb, text, grid):
        n = math.prod(grid)
        x = torch.cat([x[:, :n], x[:, n:]], 1)
        return torch.cat([super().run(x, emb, text, grid), x[:, n:]], 1)


@model("patches by einsum", latent=(2, 16, 4, 6), channels=16, tokens=6)
class EinsumPatches(DiT):
    """More channels in a patch than there are tokens."""

    def patchify(self, latent):
        b, c, height, width = latent.shape
        x = torch.einsum("nchpwq->nhwpqc", latent.view(b, c, height // 2, 2, width // 2, 2))
        return self.embed(x.reshape(b, -1, 4 * c)), (height // 2, width // 2)


@variant("leaky units of learned slopes, and a view by strides")
class LearnedSlopes(Block):
    """PReLU with a slope for all, and one for each head of channels; every other channel by `as_strided`."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.slopes = nn.PReLU(), nn.PReLU(4)

    def mlp(self, x, grid):
        hidden = self.slope(self.up(x))
        hidden = self.slopes(hidden.unflatten(-1, (4, -1)).movedim(-2, 1)).movedim(1, -2).flatten(2).contiguous()
        b, n, c = hidden.shape
        even, odd = (hidden.as_strided((b, n, c // 2), (n * c, c, 2), start) for start in (0, 1))
        return self.down(torch.cat([even * odd, odd], -1))


# Tokens in another order


class InOrder(DiT):
    """All blocks work on the tokens in another order, which is undone behind them."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.order = nn.Buffer(torch.randperm(24, generator=torch.Generator().manual_seed(3)))

    def run(self, x, emb, text, grid):
        order = self.places(x, grid)
        place = torch.arange(24, dtype=x.dtype)[:, None].sin()
        x = super().run(self.moved(x, order) + place, emb, text, grid)
        return self.moved(x, order.argsort()) + place

    def places(self, x, grid):
        return self.order

    def moved(self, x, order):
        return x[:, order]


model("tokens in the order of a buffer")(InOrder)


@model("tokens along a zigzag")
class Zigzag(InOrder):
    """Each other row is walked backwards, as in models of states and scans; the order is computed in every call."""

    def places(self, x, grid):
        places = torch.arange(24).view(grid)
        return torch.where(torch.arange(grid[0])[:, None] % 2 == 1, places.flip(1), places).flatten()

    def moved(self, x, order):
        return x.index_select(-2, order)


@model("tokens column by column, by gather", latent=(1, 4, 8, 12), time=(1,), text=(1, TEXT, 6))
class ByGather(InOrder):
    def places(self, x, grid):
        return torch.arange(24).view(grid).T.reshape(-1)

    def moved(self, x, order):
        return x.gather(1, order[None, :, None].expand(x.shape))


@model("windows of an order", idle=2)
class OrderedWindows(InOrder):
    """Neighbours on a curve attend to each other, as in transformers of point clouds."""

    class InRuns(Block):
        def attend(self, x, grid):
            return super().attend(x.reshape(-1, 4, WIDTH), grid).reshape(x.shape)

    block = InRuns


@model("windows, and windows between them", depth=2, idle=3)
class BothWindows(DiT):
    """As in Swin: every other block shifts the windows by half of one."""

    def run(self, x, emb, text, grid):
        first, second = self.blocks
        x = second(first(x, emb, text, grid), emb, text, grid)
        rolled = x.unflatten(1, grid).roll((-1, -1), (1, 2)).flatten(1, 2)
        y = unwindow(first.attend(windows(rolled, grid, 2), grid), grid, 2)
        return x + y.unflatten(1, grid).roll((1, 1), (1, 2)).flatten(1, 2)

    class InWindows(Windows):
        def attend(self, x, grid):
            return super().attend(x, grid) if x.shape[1] > 4 else Block.attend(self, x, grid)

    block = InWindows


@model("a picture upside down and back", idle=2)
class Flipped(DiT):
    def forward(self, latent, timestep, text=None):
        return super().forward(latent.flip(-1, -2), timestep, text).flip((-1, -2))


@model("tokens backwards for half of the channels")
class Backwards(DiT):
    """Both ways over the tokens."""

    class BothWays(Block):
        def mlp(self, x, grid):
            first, second = self.up(x).chunk(2, -1)
            return self.down(torch.cat([first, (second.flip(1) * torch.arange(24)[:, None].cos()).flip(1)], -1))

    block = BothWays


@model("tokens given back in another order", refused="another order than the latent's; undo the order")
class NotUndone(InOrder):
    def run(self, x, emb, text, grid):
        return DiT.run(self, x[:, self.order], emb, text, grid)


# Parts of the tokens, worked apart and joined again


class AfterTheFirst(Video):
    """A signal is added to all frames but the first, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.signal = nn.Parameter(torch.randn(WIDTH, 8))

    def run(self, x, emb, text, grid):
        x = x.unflatten(1, (grid[0], -1))
        x = self.joined(x, emb.unsqueeze(1) * (self.signal @ self.signal.mT)[: grid[0] - 1, None])
        return super().run(x.flatten(1, 2), emb, text, grid)


@model("all frames but the first, by a concatenation", latent=(2, 4, 5, 4, 8), tokens=40)
class AfterTheFirstCat(AfterTheFirst):
    def joined(self, x, signal):
        return torch.cat([x[:, :1], x[:, 1:] + signal], 1)


@model("all frames but the first, by a write", latent=(2, 4, 2, 4, 8), tokens=16)
class AfterTheFirstWrite(AfterTheFirst):
    def joined(self, x, signal):
        x = x.clone()
        x[:, 1:] = x[:, 1:] + signal
        return x


@variant("a feed-forward layer in chunks of tokens")
class ChunkedFeedForward(Block):
    """As diffusers does to save memory."""

    def mlp(self, x, grid):
        return torch.cat([super(ChunkedFeedForward, self).mlp(part, grid) for part in x.chunk(3, 1)], 1)


@variant("attention in chunks of queries, with positions")
class ChunkedQueries(Block):
    def attend(self, x, grid):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        places = torch.arange(x.shape[1], dtype=x.dtype)[:, None].sin()
        parts = [self.mix(part * place, k, v) for part, place in zip(q.split(10, 2), places.split(10), strict=True)]
        return merge(torch.cat(parts, 2))


class PaddedToPatches(DiT):
    """A latent whose sides its patches do not divide, padded behind; what is padded is cut off again."""

    mode = "circular"

    def patchify(self, latent):
        b, c, height, width = latent.shape
        latent = F.pad(latent, (0, width % 2, 0, height % 2), mode=self.mode)
        return self.embed(self.cut(latent).flatten(1, 2)), (latent.shape[2] // 2, latent.shape[3] // 2)

    def cut(self, latent):
        return latent.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3)

    def forward(self, latent, timestep, text=None):
        return super().forward(latent, timestep, text)[:, :, : latent.shape[2], : latent.shape[3]]


@model("an odd latent, padded by its other side", latent=(2, 4, 7, 11), idle=1)
class PaddedCircular(PaddedToPatches):
    def forward(self, latent, timestep, text=None):
        return 0.5 * latent + super().forward(latent, timestep, text)


@model("an odd latent, padded by its last row", latent=(2, 4, 7, 12), idle=2)
class PaddedReplicate(PaddedToPatches):
    mode = "replicate"

    def cut(self, latent):
        b, c, height, width = latent.shape
        x = latent.reshape(b, c, height // 2, 2, width // 2, 2)
        return torch.einsum("bchpwq->bhwpqc", x).flatten(3)


@model("an odd latent, padded by its row before the last", latent=(1, 4, 8, 11), time=(1,), text=(1, TEXT, 6), idle=1)
class PaddedReflect(PaddedToPatches):
    mode = "reflect"

    def cut(self, latent):
        return F.pixel_unshuffle(latent, 2).permute(0, 2, 3, 1)


@model("an odd video, padded with zeros", latent=(2, 4, 3, 3, 8), tokens=24, idle=2)
class PaddedVideo(Video):
    def forward(self, latent, timestep, text=None):
        padded = F.pad(latent, (0, 0, 0, 1))
        return super().forward(padded, timestep, text).narrow(3, 0, latent.shape[3])


@model("channels shuffled between groups")
class ShuffledGroups(DiT):
    """A latent with its channels in another order, and a shuffle behind each grouped layer, as in ShuffleNet."""

    class Shuffling(Block):
        def mlp(self, x, grid):
            groups = super().mlp(x, grid).transpose(1, 2).unflatten(2, grid)  # b c h w
            return torch.channel_shuffle(groups, 4).flatten(2).transpose(1, 2)

    block = Shuffling

    def patchify(self, latent):
        return super().patchify(torch.channel_shuffle(latent, 2))

    def unpatchify(self, x, grid):
        return torch.channel_shuffle(super().unpatchify(x, grid), 2)


@model("tokens of pictures behind each other, without samples", latent=(24, 16), time=(1,), text=(1, TEXT, 6))
class WithoutSamples(DiT):
    """`n c -> n c`: the first dimension is the sequence, as where pictures of several sizes are packed."""

    def patchify(self, latent):
        return self.embed(latent)[None], (4, 6)

    def unpatchify(self, x, grid):
        return self.head(x)[0]


@model("vectors that never meet", latent=(24, 16), time=(24, 1), text=None, refused="no token grid")
class Vectors(WithoutSamples):
    """Each sample is a vector: nothing is to be left out of a picture of one token."""

    def run(self, x, emb, text, grid):
        return self.blocks[0].mlp(x, grid) + emb[None]


@variant("keys of the nearest tokens on a coarser grid", tokens=24)
class NearestKeys(Block):
    def attend(self, x, grid):
        q, k, v = self.qkv(x).chunk(3, -1)
        kv = torch.cat([k, v], -1).transpose(1, 2).unflatten(2, grid)
        k, v = F.interpolate(kv, scale_factor=0.5, mode="nearest-exact").flatten(2).transpose(1, 2).chunk(2, -1)
        return merge(self.mix(heads(q), heads(k), heads(v)))


class Counted(nn.Module):
    """Experts that are given the tokens that chose them, however many these are."""

    token_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x):
        flat = x.view(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        order, out = chosen.flatten().argsort(), torch.zeros_like(flat)
        ends = chosen.flatten().bincount(minlength=3).cpu().numpy().cumsum(0)
        for expert, start, end in zip(self.experts, [0, *ends[:-1]], ends, strict=True):
            place = order[start:end]
            out.index_add_(0, place // 2, F.silu(expert(flat[place // 2])) * weights.flatten()[place, None])
        return out.view_as(x)


@variant("experts that are said to treat each token alone")
class SaidToBeTokenWise(Block):
    def __init__(self) -> None:
        super().__init__()
        self.routed = Counted()

    def mlp(self, x, grid):
        return self.routed(x) + super().mlp(x, grid)


class Centred(Counted):
    def forward(self, x):
        return super().forward(x - x.mean(1, True))


@variant("experts that are said so, and are not", refused="given half of the tokens")
class NotTokenWise(SaidToBeTokenWise):
    def __init__(self) -> None:
        super().__init__()
        self.routed = Centred()


class Placed(Counted):
    def forward(self, x):
        return super().forward(x) * torch.linspace(0, 1, x.shape[1])[:, None]


@variant("experts that are said so, and know the tokens' places", refused="in another order")
class PlaceWise(SaidToBeTokenWise):
    def __init__(self) -> None:
        super().__init__()
        self.routed = Placed()


class SeeingOthers(Counted):
    def forward(self, x):
        return super().forward(x) + x.mean(0, keepdim=True)


@variant("experts that are said so, and see the other samples", refused="in another order")
class SampleWise(SaidToBeTokenWise):
    def __init__(self) -> None:
        super().__init__()
        self.routed = SeeingOthers()


class Writing(Counted):
    def forward(self, x):
        return super().forward(x.relu_().contiguous())


@variant("experts that are said so, and write into their tokens", refused="writes into its tokens")
class WritesItsTokens(SaidToBeTokenWise):
    def __init__(self) -> None:
        super().__init__()
        self.routed = Writing()


class InAPair(Counted):
    def forward(self, x):
        return super().forward(x), None


@variant("experts that are said so, and return a pair", refused="returns a tuple")
class ReturnsAPair(SaidToBeTokenWise):
    def __init__(self) -> None:
        super().__init__()
        self.routed = InAPair()

    def mlp(self, x, grid):
        return self.routed(x)[0] + Block.mlp(self, x, grid)


@variant("experts that are said so, and are told the time", refused="something else than one tensor")
class ToldTheTime(SaidToBeTokenWise):
    def mlp(self, x, grid):
        return self.routed(x=x)


@model("a latent padded to the longest sequence, by a write")
class PaddedByAWrite(DiT):
    def patchify(self, latent):
        b, c, height, width = latent.shape
        x = latent.reshape(b, c, height // 2, 2, width // 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(b, c, -1, 4)
        out = torch.zeros(b, c, 29, 4, dtype=x.dtype)
        out[:, :, : x.shape[2]] = x
        return self.embed(out.permute(0, 2, 3, 1).reshape(b, 29, -1)), (height // 2, width // 2)

    def unpatchify(self, x, grid):
        return super().unpatchify(x[:, : grid[0] * grid[1]], grid)


@model("patches by a wavelet, undone by writes into every other pixel")
class Wavelet(DiT):
    """`b c (h 2) (w 2) -> b (h w) (4 c)` by sums and differences of neighbours, and back."""

    SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))

    def patchify(self, latent):
        a, b, c, d = (latent[..., p::2, q::2] for p in (0, 1) for q in (0, 1))
        bands = [(s[0] * a + s[1] * b + s[2] * c + s[3] * d) / 2 for s in self.SIGNS]
        return self.embed(torch.cat(bands, 1).flatten(2).mT), tuple(latent[0, 0, ::2, ::2].shape)

    def unpatchify(self, x, grid):
        bands = self.head(x).mT.unflatten(2, grid).chunk(4, 1)
        out = torch.zeros(x.shape[0], self.channels, 2 * grid[0], 2 * grid[1], dtype=x.dtype)
        for k, (p, q) in enumerate((p, q) for p in (0, 1) for q in (0, 1)):
            out[..., p::2, q::2] = sum(s[k] * band for s, band in zip(self.SIGNS, bands, strict=True)) / 2
        return out


@model("a latent rolled by less than a patch", refused="roll or flip it by whole patches")
class Rolled(DiT):
    def forward(self, latent, timestep, text=None):
        return super().forward(latent.roll(1, -1), timestep, text).roll(-1, -1)


class AttendingLatent(DiT):
    """Patches of the latent attend to each other as they are, before anything is projected."""

    def patchify(self, latent):
        b, c, height, width = latent.shape
        p, q = self.patch
        x = latent.reshape(b, c, height // p, p, width // q, q).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * q * c)
        return self.embed(x + self.mix(x)), (height // p, width // q)


@model("the latent itself attends, in heads")
class LatentInHeads(AttendingLatent):
    def mix(self, x):
        return merge(F.scaled_dot_product_attention(heads(x), heads(x), heads(x)))


@model("the latent itself attends, by hand")
class LatentByHand(AttendingLatent):
    def mix(self, x):
        return (x @ x.mT / 4).softmax(-1) @ x


@model("the latent itself is the values of its own attention")
class LatentAsValues(AttendingLatent):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(16, 16)

    def mix(self, x):
        return F.scaled_dot_product_attention(self.query(x), self.query(x), x)
