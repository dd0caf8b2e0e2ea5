"""The eager twins of the scatter-GEMM and of its epilogue: the definition, in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import ScatterArguments


def epilogue_reference(
    y: Tensor,
    head_dim: int,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    rope: str = "none",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """What happens to each head between the linear and the splice, in fp32 (fp64 for fp64): [B, A, N] -> [B, A, N].

    `z = y / sqrt(mean(y^2) + eps) * weight` ("rms"), of `y - mean(y)` for "layer"; then `z * cos + rotate(z) * sin` where
    rotate maps a pair (a, b) to (-b, a): neighbours for "interleaved", (i, i + head_dim / 2) for "half".
    """
    if norm == rope == "none":
        return y
    wide = torch.float64 if y.dtype is torch.float64 else torch.float32
    z = y.to(wide).unflatten(-1, (-1, head_dim))  # [B, A, H, D]
    if norm == "layer":
        z = z - z.mean(-1, keepdim=True)
    if norm != "none":
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
        z = z if norm_weight is None else z * norm_weight.to(wide)
        z = z if norm_bias is None else z + norm_bias.to(wide)
    if rope != "none":
        assert cos is not None and sin is not None
        pairs = (-1, 2) if rope == "interleaved" else (2, -1)
        dim = -1 if rope == "interleaved" else -2
        a, b = z.unflatten(-1, pairs).unbind(dim)  # [B, A, H, D / 2]
        (c, c2), (s, s2) = (_pair(table.to(wide), head_dim, pairs, dim) for table in (cos, sin))
        z = torch.stack((a * c - b * s, b * c2 + a * s2), dim).flatten(-2)
    return z.flatten(-2).to(y.dtype)


def _pair(table: Tensor, head_dim: int, pairs: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    """A rotary table [B, A, D or D / 2] at the first and the second entries of each pair: [B, A, 1, D / 2]."""
    table = table.unsqueeze(2)
    if table.shape[-1] != head_dim:
        return table, table
    first, second = table.unflatten(-1, pairs).unbind(dim)
    return first, second


def scatter_linear_reference(*arguments: Any) -> None:
    """The eager twin: `cache[b, rows[b, i]] = epilogue(x[b, i] @ weight.T + bias)`, everything else in `cache` stays.

    Arguments are those of `scatter_linear`, in its order.
    """
    given: ScatterArguments[Tensor] = ScatterArguments(*arguments)
    y = epilogue_reference(
        F.linear(given.x, given.weight, given.bias), given.head_dim, given.norm, given.norm_weight, given.norm_bias,
        given.eps, given.rope, given.cos, given.sin,
    )  # fmt: skip
    cache, rows, channels = given.cache, given.rows.long(), 1 + given.grid_dims
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None]  # [B, 1]
    # torch.unravel_index copies the sizes to the device, which no CUDA graph can capture
    places = [rows] if given.grid_dims == 1 else torch.unravel_index(rows, cache.shape[1:channels])
    cache.index_put_((batch, *places), y.reshape(*y.shape[:2], *cache.shape[channels:]))
