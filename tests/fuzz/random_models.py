"""Random diffusion transformers: a recipe of numbers is a model, so that a failure can be kept, and made smaller.

A recipe names the latent, the ways to cut and to join its patches, and a list of blocks. Every block reads its numbers as
choices among spellings of one idea. The zero is the plainest choice, so that a smaller number is a simpler model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TEXT, CHOICES = 8, 3, 8


@dataclass(frozen=True)
class Recipe:
    """One model: the choices of its latent and of its frame, then of its blocks, by name."""

    frame: tuple[int, ...]
    blocks: tuple[tuple[str, tuple[int, ...]], ...]


def random_recipe(seed: int) -> Recipe:
    generator = random.Random(seed)
    numbers = lambda: tuple(generator.randrange(60) for _ in range(CHOICES))  # noqa: E731
    names = [generator.choice(sorted(BLOCKS)) for _ in range(generator.randint(1, 4))]
    return Recipe((*numbers(), *numbers()), tuple((name, numbers()) for name in names))


class Choices:
    """Reads numbers as choices, one after another."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.left = iter(numbers)

    def of(self, *options: Any) -> Any:
        return options[next(self.left, 0) % len(options)]


class RandomModel(nn.Module):
    """The model of a recipe, as a function of latent, timestep, text and its weights; they are drawn in the first call."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.drawn = recipe, False
        self.weights: list[Tensor] = []
        choose = Choices(recipe.frame)
        self.batch = choose.of(2, 1, 3)
        self.kind = choose.of("image", "packed", "video", "audio", "last", "patches of one", "odd")
        self.f = choose.of(2, 3, 4) if self.kind == "video" else 1
        self.h = 1 if self.kind == "audio" else choose.of(2, 3, 4)
        self.w = choose.of(3, 2, 4, 5)
        self.cut, self.join, self.place = choose.of(*range(5)), choose.of(*range(4)), choose.of(*range(6))
        self.skip, self.channels = choose.of(False, True), choose.of(4, 3, 2)
        self.mode = choose.of("constant", "circular", "reflect", "replicate")
        self.grid = tuple(size for size in (self.f, self.h, self.w) if size > 1)
        self.tokens = self.f * self.h * self.w

    @property
    def latent_shape(self) -> tuple[int, ...]:
        b, c, h, w = self.batch, self.channels, self.h, self.w
        shapes = {"packed": (b, h * w, c), "video": (b, c, self.f, 2 * h, 2 * w), "audio": (b, c, 4 * w)}
        more = {"last": (b, 2 * h, 2 * w, c), "patches of one": (b, c, h, w), "odd": (b, c, 2 * h - 1, 2 * w)}
        return {**shapes, **more}.get(self.kind, (b, c, 2 * h, 2 * w))

    def inputs(self) -> list[Tensor]:
        """Latent, timestep, text: standard normal, in double precision."""
        self.generator = torch.Generator().manual_seed(7)
        return [self._normal(*shape) for shape in (self.latent_shape, (self.batch,), (self.batch, TEXT, WIDTH))]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def weight(self, *shape: int) -> Tensor:
        """The next weight: drawn where this is the first call, else one of the inputs."""
        if self.drawn:
            return next(self.given)
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        self.weights.append(self._normal(*shape) * scale)
        return self.weights[-1]

    def order(self) -> Tensor:
        """An order of the tokens, which stands among the weights."""
        if self.drawn:
            return next(self.given)
        self.weights.append(torch.randperm(self.tokens, generator=self.generator))
        return self.weights[-1]

    def linear(self, x: Tensor, out: int) -> Tensor:
        return F.linear(x, self.weight(out, x.shape[-1]), self.weight(out))

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, *weights: Tensor) -> Tensor:
        self.given: Iterator[Tensor] = iter(weights)
        self.emb = self.linear(torch.stack([timestep.sin(), timestep.cos()], -1), WIDTH)
        self.text = text
        x = self.positions(self.patches(latent))
        for name, numbers in self.recipe.blocks:
            x = x + self.weight(1) * BLOCKS[name](self, self.norm(x), Choices(numbers))
        out = self.picture(self.norm(x))
        return 0.5 * latent + out if self.skip else out

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],))

    def patches(self, latent: Tensor) -> Tensor:
        """The latent's patches as tokens: `b n c`."""
        b, c = self.batch, self.channels
        if self.kind == "packed":
            return self.linear(latent, WIDTH)
        if self.kind == "last":
            latent = latent.permute(0, 3, 1, 2)
        if self.kind == "audio":
            x = [lambda: latent.reshape(b, c, self.w, 4), lambda: latent.unfold(2, 4, 4)][self.cut % 2]()
            return self.linear(x.permute(0, 2, 1, 3).flatten(2), WIDTH)
        if self.kind == "patches of one":
            return self.linear(latent.flatten(2).transpose(1, 2), WIDTH)
        if self.kind == "video":
            if self.cut == 1:
                x = F.conv3d(latent, self.weight(WIDTH, c, 1, 2, 2), None, (1, 2, 2))
                return x.flatten(2).transpose(1, 2)
            x = latent.reshape(b, c, self.f, self.h, 2, self.w, 2).permute(0, 2, 3, 5, 4, 6, 1)
            return self.linear(x.reshape(b, self.tokens, 4 * c), WIDTH)
        if self.kind == "odd":
            latent = F.pad(latent, (0, 0, 0, 1), mode=self.mode)
        if self.cut == 1:
            return F.conv2d(latent, self.weight(WIDTH, c, 2, 2), None, 2).flatten(2).transpose(1, 2)
        if self.cut == 2:
            return self.linear(F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2), WIDTH)
        if self.cut == 3:
            return self.linear(
                latent.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), WIDTH
            )
        x = latent.reshape(b, c, self.h, 2, self.w, 2)
        x = torch.einsum("bchpwq->bhwpqc", x) if self.cut == 4 else x.permute(0, 2, 4, 3, 5, 1)
        return self.linear(x.reshape(b, self.tokens, 4 * c), WIDTH)

    def picture(self, x: Tensor) -> Tensor:
        """The tokens as a picture of the latent's shape."""
        b, c = self.batch, self.channels
        if self.kind == "packed":
            return self.linear(x, c)
        if self.kind == "patches of one":
            return self.linear(x, c).transpose(1, 2).reshape(b, c, self.h, self.w)
        x = self.linear(x, 4 * c)
        if self.kind == "audio":
            return x.reshape(b, self.w, c, 4).permute(0, 2, 1, 3).reshape(b, c, 4 * self.w)
        if self.kind == "video":
            x = x.reshape(b, self.f, self.h, self.w, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5)
            return x.reshape(b, c, self.f, 2 * self.h, 2 * self.w)
        if self.join == 1:
            x = F.pixel_shuffle(x.transpose(1, 2).reshape(b, 4 * c, self.h, self.w), 2)
        else:
            x = x.reshape(b, self.h, self.w, 2, 2, c)
            x = torch.einsum("bhwpqc->bchpwq", x) if self.join == 2 else x.permute(0, 5, 1, 3, 2, 4)
            x = x.reshape(b, c, 2 * self.h, 2 * self.w)
        if self.kind == "odd":
            x = x[:, :, :-1]
        return x.permute(0, 2, 3, 1) if self.kind == "last" else x

    def positions(self, x: Tensor) -> Tensor:
        n, (f, h, w) = self.tokens, (self.f, self.h, self.w)
        if self.place == 1:
            return x + self.weight(1, n, WIDTH)
        if self.place == 2:
            return x + torch.outer(torch.arange(n, dtype=x.dtype), self.weight(WIDTH)).sin()
        if self.place == 3:
            table = self.weight(f, 1, 1, WIDTH) + self.weight(1, h, 1, WIDTH) + self.weight(1, 1, w, WIDTH)
            return x + table.reshape(n, WIDTH)
        if self.place == 4:
            high, wide = torch.meshgrid(torch.arange(f * h), torch.arange(w), indexing="ij")
            places = torch.stack([high, wide], -1).reshape(n, 2).to(x.dtype)
            return x + self.linear(places.sin(), WIDTH)
        if self.place == 5:
            return x.unflatten(1, (f, h * w)).add(self.weight(f, 1, WIDTH)).flatten(1, 2)
        return x


Block = Callable[[RandomModel, Tensor, Choices], Tensor]
BLOCKS: dict[str, Block] = {}


def block(function: Block) -> Block:
    BLOCKS[function.__name__] = function
    return function


def activated(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    kind = choose.of("gelu", "prelu", "glu", "square", "cast", "sorted", "gate", "clamp")
    if kind == "prelu":
        return F.prelu(x, m.weight(1).abs())
    if kind == "glu":
        return torch.cat([F.glu(x, -1)] * 2, -1)
    if kind == "square":
        return F.relu(x).square()
    if kind == "cast":
        return x * (x > 0).to(x.dtype).type_as(x)
    if kind == "sorted":
        return x.sort(-1).values + x.gather(-1, x.argsort(-1))
    if kind == "gate":
        first, second = x.chunk(2, -1)
        return torch.cat([F.silu(first) * second, second], -1)
    return x.clamp(-1, 1) if kind == "clamp" else F.gelu(x)


@block
def mlp(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    hidden = activated(m, m.linear(x, 16), choose)
    return m.linear(hidden, WIDTH)


@block
def modulated(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """A shift and a scale for each sample, token, frame, row or column."""
    kind = choose.of("sample", "frame", "row", "column", "token", "repeated")
    b, f, h, w = m.batch, m.f, m.h, m.w
    shift = m.linear(m.emb, WIDTH)[:, None]
    if kind == "frame":
        return (x.unflatten(1, (f, -1)) * (shift[:, :, None] + m.weight(1, f, 1, WIDTH))).flatten(1, 2)
    if kind == "row":
        return (x.reshape(b, f * h, w, WIDTH) + m.weight(f * h, 1, WIDTH) * shift[:, None]).flatten(1, 2)
    if kind == "column":
        return (x.reshape(b, f * h, w, WIDTH) * m.weight(b, 1, w, WIDTH)).reshape(b, -1, WIDTH)
    if kind == "token":
        return x * m.weight(b, m.tokens, 1) + shift
    if kind == "repeated":
        return x * m.weight(b, f * h, WIDTH).repeat_interleave(w, 1) + shift
    return x * shift


def rotary(m: RandomModel, x: Tensor, kind: str) -> Tensor:
    """Of `... n d`, d even."""
    n, d = x.shape[-2:]
    angles = torch.outer(torch.arange(n, dtype=x.dtype), m.weight(d // 2))
    if kind == "halves":
        first, second = x.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )
    if kind == "complex":
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)
    if kind == "pairs":
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1)
        return turned.flatten(-2)
    return x


def mixed(m: RandomModel, q: Tensor, k: Tensor, v: Tensor, choose: Choices, mask: Tensor | None = None) -> Tensor:
    """Attention, in one of its spellings."""
    kind = choose.of("sdpa", "matmul", "einsum", "linear", "causal", "bmm")
    scale = q.shape[-1] ** -0.5
    if kind == "einsum" and q.ndim == 4:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        scores = scores if mask is None else scores + mask
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
    if kind == "linear":
        return F.elu(q).add(1) @ (F.elu(k).add(1).mT @ v) * scale
    if kind == "bmm" and q.ndim == 4 and mask is None:
        flat = [part.flatten(0, 1) for part in (q, k, v)]
        zero = torch.zeros(1, dtype=q.dtype)
        scores = torch.baddbmm(zero, flat[0], flat[1].mT, beta=0, alpha=scale)
        return torch.bmm(scores.softmax(-1), flat[2]).unflatten(0, q.shape[:2])
    if kind in ("matmul", "bmm", "einsum"):
        scores = q @ k.transpose(-1, -2) * scale
        return (scores if mask is None else scores + mask).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal" and mask is None)


@block
def attention(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    n = x.shape[1]
    spelled, turn = choose.of("chunk", "unbind", "three", "grouped"), choose.of("none", "halves", "complex", "pairs")
    mask = choose.of(None, "n n", "keys", "band")
    split = lambda part, count: part.unflatten(-1, (count, -1)).transpose(1, 2)  # noqa: E731
    if spelled == "chunk":
        q, k, v = (split(part, 2) for part in m.linear(x, 3 * WIDTH).chunk(3, -1))
    elif spelled == "unbind":
        q, k, v = m.linear(x, 3 * WIDTH).reshape(m.batch, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    elif spelled == "grouped":
        q = split(m.linear(x, 2 * WIDTH), 4)
        k, v = (split(m.linear(x, WIDTH), 2).repeat_interleave(2, 1) for _ in range(2))
        x = m.linear(mixed(m, q, k, v, choose).transpose(1, 2).flatten(2), WIDTH)
        return x
    else:
        q, k, v = (split(m.linear(x, WIDTH), 2) for _ in range(3))
    q, k = rotary(m, q, turn), rotary(m, k, turn)
    hidden = {"n n": (n, n), "keys": (m.batch, 1, 1, n)}.get(mask or "")
    bias = m.weight(*hidden) if hidden else None
    if mask == "band":
        away = torch.arange(n)[:, None] - torch.arange(n)
        bias = torch.where(away.abs() < 3, 0.0, -9.0).to(x.dtype)
    return m.linear(mixed(m, q, k, v, choose, bias).transpose(1, 2).flatten(2), WIDTH)


@block
def in_batch(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Attention of each token alone, the tokens in the batch, in two orders that may differ."""
    b, n = x.shape[:2]

    def ordered(part: Tensor, order: str) -> Tensor:
        pieces = part.reshape(b, n, 2, 4)
        if order == "first":
            return pieces.repeat(1, 2, 1, 1).flatten(0, 1)
        if order == "last":
            return pieces.repeat_interleave(2, 1).flatten(0, 1)
        if order == "cat":
            return torch.cat([pieces, pieces.sin()], 1).flatten(0, 1)
        if order == "stack":
            return torch.stack([pieces, pieces.cos()], 2).flatten(0, 2)
        if order == "transposed":
            return torch.stack([pieces, pieces.cos()], 0).transpose(1, 2).reshape(2 * b * n, 2, 4)
        return torch.stack([pieces, pieces.exp()], 0).flatten(0, 2)

    orders = ("first", "last", "cat", "stack", "transposed", "variant")
    q, k = ordered(m.linear(x, WIDTH), choose.of(*orders)), ordered(m.linear(x, WIDTH), choose.of(*orders))
    kind = choose.of("sdpa", "matmul", "einsum", "pointwise", "bmm", "grouped", "cdist")
    if kind == "grouped":
        first = q.reshape(b, 2 * n, 2, 4)
        k = m.linear(x, WIDTH).reshape(b, n, 2, 4)
        out = F.scaled_dot_product_attention(first, k, k, enable_gqa=True)
    elif kind == "einsum":
        out = torch.einsum("iqd,ikd,ike->iqe", q, k, k.sin())
    elif kind == "pointwise":
        out = torch.where(k > 0, q, k) * k.tanh()
    elif kind == "bmm":
        out = torch.bmm(q, torch.bmm(k.mT, k))
    elif kind == "cdist":
        out = torch.cdist(q, k) @ k
    else:
        out = F.scaled_dot_product_attention(q, k, k) if kind == "sdpa" else (q @ k.mT).softmax(-1) @ k
    back = out.reshape(b, 2, n, WIDTH).sum(1) if choose.of(True, False) else out.reshape(b, n, 2, WIDTH).mean(2)
    return m.linear(back, WIDTH)


@block
def cross(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    q = m.linear(x, WIDTH).unflatten(-1, (2, -1)).transpose(1, 2)
    k, v = (m.linear(m.text, WIDTH).unflatten(-1, (2, -1)).transpose(1, 2) for _ in range(2))
    return m.linear(mixed(m, q, k, v, choose).transpose(1, 2).flatten(2), WIDTH)


@block
def joint(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Text and picture in one sequence."""
    n, text = x.shape[1], m.linear(m.text, WIDTH)
    kind = choose.of("text first", "picture first", "written", "padded")
    if kind == "written":
        both = torch.zeros(m.batch, n + TEXT, WIDTH, dtype=x.dtype)
        both[:, :TEXT] = text
        both[:, TEXT:] = x
    elif kind == "padded":
        both = F.pad(torch.cat([text, x], 1), (0, 0, 0, 2))
    else:
        both = torch.cat([text, x] if kind == "text first" else [x, text], 1)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in m.linear(both, 3 * WIDTH).chunk(3, -1))
    out = m.linear(mixed(m, q, k, v, choose).transpose(1, 2).flatten(2), WIDTH)
    if choose.of(False, True):
        out = out + m.linear(F.gelu(m.linear(out, 2 * WIDTH)), WIDTH)
    return out[:, :n] if kind == "picture first" else out[:, TEXT : TEXT + n]


@block
def windows(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Attention in frames, rows, columns or windows of the grid, which may be rolled before."""
    b, f, h, w = m.batch, m.f, m.h, m.w
    kind, roll = choose.of("frames", "rows", "columns", "halves", "time"), choose.of(0, 1)
    x = x.reshape(b, f, h, w, WIDTH)
    x = x.roll((roll, roll), (2, 3)) if roll else x
    order = {"frames": (0, 1, 2, 3, 4), "rows": (0, 1, 2, 3, 4), "columns": (0, 1, 3, 2, 4), "time": (0, 2, 3, 1, 4)}
    if kind == "halves":
        p = next(size for size in (2, 3, 5, 1) if w % size == 0)
        parts = x.reshape(b * f * h, w // p, p, WIDTH).flatten(0, 1)
    else:
        moved = x.permute(order[kind])
        parts = moved.reshape(-1, h * w, WIDTH) if kind == "frames" else moved.reshape(-1, moved.shape[3], WIDTH)
    q, k, v = m.linear(parts, 3 * WIDTH).chunk(3, -1)
    out = mixed(m, q[:, None], k[:, None], v[:, None], choose)[:, 0]
    if kind == "halves":
        out = out.reshape(b, f, h, w, WIDTH)
    else:
        inverse = [order[kind].index(dim) for dim in range(5)]
        out = out.reshape(moved.shape).permute(inverse)
    out = out.roll((-roll, -roll), (2, 3)) if roll else out
    return m.linear(out.reshape(b, f * h * w, WIDTH), WIDTH)


@block
def convolved(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    b, f, h, w = m.batch, m.f, m.h, m.w
    kind = choose.of("depthwise", "pointwise", "sequence", "deep", "grouped", "pooled", "between", "strided")
    image = x.reshape(b * f, h, w, WIDTH).permute(0, 3, 1, 2)
    if kind == "depthwise":
        image = F.conv2d(image, m.weight(WIDTH, 1, 3, 3), None, 1, 1, 1, WIDTH)
    elif kind == "pointwise":
        image = F.conv2d(image, m.weight(WIDTH, WIDTH, 1, 1))
    elif kind == "grouped":
        image = F.conv2d(image, m.weight(WIDTH, WIDTH // 2, 1, 1), groups=2)
    elif kind == "sequence":
        return F.conv1d(x.transpose(1, 2), m.weight(WIDTH, WIDTH, 3), None, 1, 1).transpose(1, 2)
    elif kind == "deep":
        deep = x.reshape(b, f, h, w, WIDTH).permute(0, 4, 1, 2, 3)
        return F.conv3d(deep, m.weight(WIDTH, WIDTH, 3, 1, 1), None, 1, (1, 0, 0)).flatten(2).transpose(1, 2)
    elif kind == "pooled":
        image = F.avg_pool2d(image, 3, 1, 1) + image.mean((-1, -2), keepdim=True)
    elif kind == "between":
        image = F.avg_pool2d(F.interpolate(image, scale_factor=2, mode="nearest"), 2)
    else:
        small = F.conv2d(F.pad(image, (0, w % 2, 0, h % 2)), m.weight(WIDTH, WIDTH, 2, 2), None, 2)
        image = F.interpolate(small, scale_factor=2)[:, :, :h, :w] + image
    return image.permute(0, 2, 3, 1).reshape(b, -1, WIDTH)


@block
def written(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Writes into views of a copy."""
    kind, y = choose.of("channels", "tokens", "frames", "stride", "token", "mask", "fill"), x.clone()
    half = m.tokens // 2
    if kind == "channels":
        y[..., : WIDTH // 2] *= m.weight(WIDTH // 2)
    elif kind == "tokens":
        y[:, half:] += m.weight(m.tokens - half, WIDTH)
    elif kind == "frames":
        y.view(m.batch, m.f, m.h, m.w, WIDTH)[:, 1:] *= 0.5
    elif kind == "stride":
        y[..., ::2] = x[..., 1::2]
    elif kind == "token":
        y[:, -1] = m.weight(WIDTH)
    elif kind == "mask":
        y = y.masked_fill(m.weight(m.tokens, 1) > 0, 0.5)
    else:
        y[:, :, 1] = x.mean(-1)
    return m.linear(y, WIDTH)


@block
def pieces(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Parts of the tokens, each worked by itself, and joined."""
    kind = choose.of("chunks", "frames", "first", "rows", "attention", "tail", "samples")
    first, second = m.weight(WIDTH, WIDTH), m.weight(WIDTH, WIDTH)
    work = lambda part: F.linear(F.gelu(F.linear(part, first)), second)  # noqa: E731
    if kind == "chunks":
        return torch.cat([work(part) for part in x.split(max(1, m.tokens // 3), 1)], 1)
    if kind == "frames":
        y = x.unflatten(1, (m.f, -1))
        return torch.cat([y[:, :1], work(y[:, 1:]) + m.weight(m.f - 1, 1, WIDTH)], 1).flatten(1, 2)
    if kind == "first":
        return torch.cat([x[:, :1] + m.weight(WIDTH), x[:, 1:]], 1)
    if kind == "rows":
        return torch.stack([work(row) for row in x.unflatten(1, (m.f * m.h, m.w)).unbind(1)], 1).flatten(1, 2)
    if kind == "attention":
        return torch.cat([F.scaled_dot_product_attention(part, x, x) for part in work(x).chunk(2, 1)], 1)
    if kind == "samples":
        return torch.cat([work(x[index : index + 1]) for index in range(m.batch)], 0)
    n = m.tokens
    return torch.cat([work(x[:, :n]), x[:, n:]], 1)


@block
def scanned(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    kind = choose.of("tokens", "channels", "both ways", "sorted", "top", "quantile")
    if kind == "tokens":
        return x.cumsum(1) / m.tokens
    if kind == "channels":
        return x.cumsum(-1)
    if kind == "both ways":
        return (x.cumsum(1) + x.flip(1).cumsum(1).flip(1)) / m.tokens
    if kind == "sorted":
        return x.sort(1).values + x
    if kind == "top":
        return m.linear(x.topk(3, -1).values, WIDTH)
    return x - x.amax(1, keepdim=True)


@block
def ordered(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Tokens in another order, and back."""
    kind = choose.of("index", "select", "gather", "flip", "transposed", "roll")
    order = m.order()
    work = lambda part: F.scaled_dot_product_attention(part, part, part) + m.linear(part, WIDTH)  # noqa: E731
    if kind == "index":
        return work(x[:, order])[:, order.argsort()]
    if kind == "select":
        return work(x.index_select(1, order)).index_select(1, order.argsort())
    if kind == "gather":
        wide = order[None, :, None].expand(x.shape)
        return work(x.gather(1, wide)).gather(1, wide.argsort(1))
    if kind == "flip":
        return work(x.flip(1)).flip(1)
    if kind == "roll":
        return work(x.roll(1, 1)).roll(-1, 1)
    turned = x.unflatten(1, (m.f * m.h, m.w)).transpose(1, 2).flatten(1, 2)
    return work(turned).unflatten(1, (m.w, m.f * m.h)).transpose(1, 2).flatten(1, 2)


@block
def paired(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Two variants of every token, in one order each, met entry by entry."""
    orders = ("first", "last", "stack")

    def doubled(order: str) -> Tensor:
        if order == "first":
            return torch.cat([x, x.sin()], 1)
        return x.repeat_interleave(2, 1) if order == "last" else torch.stack([x, x.cos()], 2).flatten(1, 2)

    first, second = doubled(choose.of(*orders)), doubled(choose.of(*orders))
    kind = choose.of("add", "matmul", "einsum", "where", "cat", "index", "scatter")
    if kind == "matmul":
        both = (first.unsqueeze(-2) @ second.unsqueeze(-1)).squeeze(-1) * first
    elif kind == "einsum":
        both = torch.einsum("bnc,bnd->bncd", first, second).sum(-1)
    elif kind == "where":
        both = torch.where(first > second, first, second.neg())
    elif kind == "cat":
        both = m.linear(torch.cat([first, second], -1), WIDTH)
    elif kind == "index":
        both = first + m.weight(WIDTH, WIDTH)[second.argmax(-1)]
    elif kind == "scatter":
        both = first.scatter(-1, second.argsort(-1)[..., :2], second[..., :2])
    else:
        both = first + second
    return both.unflatten(1, (2, -1)).sum(1) if choose.of(True, False) else both.unflatten(1, (-1, 2)).mean(2)


@block
def across(m: RandomModel, x: Tensor, choose: Choices) -> Tensor:
    """Channels and tokens exchanged, outer products, sums over all tokens."""
    kind = choose.of("mixer", "global", "covariance", "outer", "strided view", "group norm", "expanded")
    if kind == "mixer":
        return m.linear(x.transpose(1, 2), m.tokens).transpose(1, 2)
    if kind == "global":
        return x + m.linear(x.mean(1, keepdim=True), WIDTH)
    if kind == "covariance":
        return x @ (x.mT @ x).softmax(-1)
    if kind == "outer":
        return (x[..., None] * x[:, :, None]).mean(-1)
    if kind == "strided view":
        y = x.contiguous()
        return m.linear(y.as_strided((m.batch, m.tokens, WIDTH // 2), (m.tokens * WIDTH, WIDTH, 2)), WIDTH)
    if kind == "group norm":
        return F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)
    return (x[:, :, None].expand(-1, -1, 3, -1) * m.weight(3, 1)).sum(2)
