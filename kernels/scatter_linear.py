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

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .gemm import INTERPRETED
from .launch import KERNEL_DTYPES, NORMS, ROPES, Launch, cache_runs, interpreted_tile, runs_kernel
from .reference import scatter_linear_reference

DTYPES = (*KERNEL_DTYPES, torch.float64)


def check(
    cache: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, grid_dims: int = 1, head_dim: int = 0,
    norm: str = "none", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 0.0,
    rope: str = "none", cos: Tensor | None = None, sin: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise ValueError unless the shapes, dtypes, devices and strides are those that `scatter_linear` documents."""
    named = dict(cache=cache, x=x, weight=weight, rows=rows, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias,
                 cos=cos, sin=sin)  # fmt: skip
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}

    def require(condition: bool, allowed: str) -> None:
        if not condition:
            given = ", ".join(f"{name} {t.dtype} {list(t.shape)} on {t.device}" for name, t in tensors.items())
            options = f"grid_dims={grid_dims}, head_dim={head_dim}, norm={norm!r}, rope={rope!r}"
            raise ValueError(f"scatter_linear: {allowed}; given: {given}, {options}")

    require(x.dim() == 3 and weight.dim() == 2, "x must be [B, A, K] and weight [N, K]")
    (B, A, K), N = x.shape, weight.shape[0]
    require(weight.shape[1] == K, "weight must be [N, K] with the K of x [B, A, K]")
    require(bias is None or tuple(bias.shape) == (N,), "bias must be None or [N] with the N of weight [N, K]")
    require(grid_dims >= 1, "grid_dims must be at least 1")
    middle = 1 + grid_dims
    require(cache.dim() > middle and cache.shape[0] == B, "cache must be [B, S, N] or [B, S, heads, N / heads]")
    require(
        math.prod(cache.shape[middle:]) == N, "the cache's dims after [B, S] must multiply to the N of weight [N, K]"
    )
    require(rows.dim() == 2 and rows.shape[1] == A, "rows must be [B, A] or [1, A] with the A of x [B, A, K]")
    require(rows.shape[0] == 1 or rows.shape[0] == B, "rows must be [B, A] or [1, A] with the B of x [B, A, K]")
    require(
        math.prod(cache.shape[1:middle]) >= A,
        "at most S rows of cache [B, S, ...] can be active, since rows are unique",
    )
    require(math.prod(cache.shape[1:middle]) < 2**31, "cache must have fewer than 2**31 rows for each sample")
    require(rows.dtype in (torch.int64, torch.int32), "rows must be int64 or int32")
    floats = {tensor.dtype for tensor in (cache, x, weight, bias) if tensor is not None}
    require(len(floats) == 1 and floats <= set(DTYPES), f"cache, x, weight and bias must share one dtype of {DTYPES}")
    require(len({t.device for t in tensors.values()}) == 1, "all tensors must be on one device")
    expanded = any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True))
    require(not expanded, "cache must not be expanded (a dim of stride 0), since its elements are written")
    require(
        max(map(len, cache_runs(cache, grid_dims))) <= 3,
        "the cache's dims after [B, S] must be viewable as [patch, heads, channels], three dims at most, and S as three",
    )

    require(norm in NORMS, f"norm must be one of {NORMS}")
    require(rope in ROPES, f"rope must be one of {ROPES}")
    inside = norm != "none" or rope != "none"
    require(not inside or (head_dim > 0 and N % head_dim == 0), "head_dim must divide the N of weight [N, K]")
    require(rope == "none" or head_dim % 2 == 0, "head_dim must be even where there is a rotary embedding")
    for vector in (norm_weight, norm_bias):
        require(vector is None or norm != "none", "norm_weight and norm_bias belong to a norm")
        require(vector is None or tuple(vector.shape) == (head_dim,), "norm_weight and norm_bias must be [head_dim]")
    require((cos is None) == (sin is None) == (rope == "none"), "cos and sin must be given together, with a rope")
    for table in (cos, sin):
        if table is not None:
            fits = table.dim() == 3 and table.shape[0] in (1, B) and table.shape[1] == A
            fits = fits and table.shape[2] in (head_dim, head_dim // 2)
            require(
                fits, "cos and sin must be [B or 1, A, head_dim or head_dim / 2], a row for each row of x [B, A, K]"
            )
    others = {tensor.dtype for tensor in (norm_weight, norm_bias, cos, sin) if tensor is not None}
    require(others <= set(DTYPES), f"norm_weight, norm_bias, cos and sin must be of {DTYPES}")


@torch.library.custom_op(
    "ras_compile::scatter_linear",
    mutates_args={"cache"},
    schema="(Tensor(a!) cache, Tensor x, Tensor weight, Tensor? bias, Tensor rows, int grid_dims=1, int head_dim=0,"
    ' str norm="none", Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0.0,'
    ' str rope="none", Tensor? cos=None, Tensor? sin=None) -> ()',
)
def scatter_linear(
    cache: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    grid_dims: int = 1,
    head_dim: int = 0,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    rope: str = "none",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
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
    given = (cache, x, weight, bias, rows, grid_dims, head_dim, norm, norm_weight, norm_bias, eps, rope, cos, sin)
    check(*given)
    if writes(cache, rows, grid_dims):
        splice(*given)


def writes(cache: Tensor, rows: Tensor, grid_dims: int) -> bool:
    """Whether there is anything to write. Raises IndexError for a row outside of the cache, on the CPU."""
    if cache.numel() == 0 or rows.numel() == 0:
        return False
    S = math.prod(cache.shape[1 : 1 + grid_dims])
    if rows.device.type == "cpu" and not (rows.min() >= 0 and rows.max() < S):
        raise IndexError(f"scatter_linear: rows must be in [0, {S}), given {rows.min()} to {rows.max()}")
    return True


def splice(*given) -> None:
    """Runs checked arguments of `scatter_linear`: by the kernel where there is one and a tile of it fits."""
    x, head_dim, norm, rope = given[1], given[6], given[7], given[11]
    if not runs_kernel(x, head_dim, norm, rope):
        scatter_linear_reference(*given)
        return
    # A launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        launch = Launch(*given)
        tile = interpreted_tile(launch.DP) if INTERPRETED else launch.fastest()
        if tile is None:
            scatter_linear_reference(*given)
        else:
            launch(tile)


@scatter_linear.register_fake
def _(cache, x, weight, bias, rows, *others) -> None:
    check(cache, x, weight, bias, rows, *others)


@register_flop_formula(torch.ops.ras_compile.scatter_linear)
def _scatter_linear_flops(cache_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B A N K, as for the linear alone: bias and epilogue are not counted, as in torch's own formulas."""
    return 2 * math.prod(x_shape) * weight_shape[0]
