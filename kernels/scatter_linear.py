"""The scatter-GEMM: `linear -> (norm) -> (rotary embedding) -> splice` as one kernel.

    y = linear(x, weight, bias)                          # [B, A, N], written to memory and read again
    y = rope(norm(y.unflatten(-1, (heads, head_dim))))   # optional, each head by itself
    cache.index_put_((batch, rows), y)

becomes

    ras_compile::scatter_linear(cache, x, weight, bias, rows, ...)

because a GEMM may put its output tiles anywhere: `x` is compact, so the main loop is that of a dense GEMM, and only
the epilogue looks up the row at which each result belongs. A tile holds whole heads, so that what happens inside a head
happens in registers. Keys and values go straight into the attention cache, and the output projection into the noise:
the pixels of a patch are channels of the cache with strides of their own.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import ScatterArguments, check, writes
from .gemm import INTERPRETED
from .launch import Launch, interpreted_tile, runs_kernel
from .reference import scatter_linear_reference


@torch.library.custom_op(
    "ras_compile::scatter_linear",
    mutates_args={"cache"},
    schema="(Tensor(a!) cache, Tensor x, Tensor weight, Tensor? bias, Tensor rows, int grid_dims=1, int head_dim=0,"
    ' str norm="none", Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0.0,'
    ' str rope="none", Tensor? cos=None, Tensor? sin=None) -> ()',
)
def scatter_linear(*arguments: Any) -> None:
    """`cache[b, rows[b, i]] = epilogue(x[b, i] @ weight.T + bias)` for every sample b and active row i, in place.

    Accumulates in fp32 and keeps the epilogue in fp32. Rounds once, or the product too, where a norm or a rotary embedding
    of what cuBLAS has computed is faster than one launch. Every tensor may have any strides.

    Args:
        cache: [B, S, N], or [B, S, H, D] with H * D == N: for a key or value cache [B, H, S, D] pass
            `cache.permute(0, 2, 1, 3)`; slices of a joint text|image cache are fine. With `grid_dims` above 1 the rows
            count that many dims: an image [B, C, h * p, w * p] is [B, h, w, p, p, C]. Rows that are not named in `rows`
            keep their bits.
        x: [B, A, K], the active rows. Must not overlap `cache` in memory.
        weight: [N, K].
        bias: [N] or None.
        rows: [B, A], or [1, A] for all samples; int64 or int32, each in [0, S), unique within a sample: which of two
            results for one row stays is undefined.
        grid_dims: how many dims after the first are S.
        head_dim: channels of a head, for `norm` and `rope`, which treat each head by itself.
        norm: "none", "rms" or "layer", with `norm_weight` and `norm_bias` ([head_dim] or None) and `eps`.
        rope: "none", or a rotary embedding of "interleaved" pairs (0, 1), (2, 3), .. or of "half" pairs
            (i, i + head_dim / 2): `z * cos + rotate(z) * sin`, rotate maps (a, b) to (-b, a).
        cos, sin: [B or 1, A, head_dim or head_dim / 2]; of half size, both entries of a pair share one.

    Cache, x, weight and bias share one dtype: bf16, fp16, fp32, or float64 (which always runs the eager twin). The
    Triton kernel runs on CUDA, and on a CPU where TRITON_INTERPRET=1 was set before Triton's import; otherwise, and for
    heads larger than 256, the eager twin does. The first call for a size times a few tile shapes, once per device: the
    timings are kept on disk. Make it before a CUDA graph is captured, since a capture takes the eager twin for a size
    that was not timed before.

    Raises:
        ValueError: shapes, dtypes, devices or strides other than these, with what is allowed.
        IndexError: a row outside [0, S), on the CPU. On CUDA the kernel leaves such a row out: reading the rows there
            would wait for the device.
    """
    given: ScatterArguments[Tensor] = ScatterArguments(*arguments)
    check(given)
    if writes(given):
        splice(given)


def splice(given: ScatterArguments[Tensor]) -> None:
    """Runs checked arguments: by the kernel where there is one and a tile of it fits."""
    if not runs_kernel(given):
        scatter_linear_reference(*given)
        return
    # A launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(given.x.device) if given.x.is_cuda else nullcontext():
        launch = Launch(given)
        tile = interpreted_tile(launch.DP) if INTERPRETED else launch.fastest()
        if tile is None:
            scatter_linear_reference(*given)
        else:
            launch(tile)


@scatter_linear.register_fake
def _(*given) -> None:
    check(ScatterArguments(*given))


@register_flop_formula(torch.ops.ras_compile.scatter_linear)
def _scatter_linear_flops(cache_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B A N K, as for the linear alone: bias and epilogue are not counted, as in torch's own formulas."""
    return 2 * math.prod(x_shape) * weight_shape[0]
