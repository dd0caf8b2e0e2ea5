"""The scatter-GEMM: `linear -> splice` as one kernel.

    y = linear(x, weight, bias)                          # [B, A, N], written to memory and read again
    cache.index_put_((batch, rows), y)

becomes

    ras_compile::scatter_linear(cache, x, weight, bias, rows)

because a GEMM may put its output tiles anywhere: `x` is compact, so the main loop is that of a dense GEMM, and only
the epilogue looks up the row at which each result belongs. Keys and values go straight into the attention cache and
the output projection into the noise buffer.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the op runs its eager twin
    triton = None

# float64 is for proofs, not for speed: it always runs the eager twin.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)


def scatter_linear_reference(cache: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
    """The eager twin: `cache[b, rows[b, i]] = x[b, i] @ weight.T + bias`, everything else in `cache` stays.

    Shapes and dtypes as for `scatter_linear`.
    """
    y = F.linear(x, weight, bias)  # [B, A, N]
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None]  # [B, 1]
    cache.index_put_((batch, rows.long()), y.reshape(*y.shape[:2], *cache.shape[2:]))


if triton is not None:

    @triton.jit
    def _scatter_linear_kernel(
        cache, x, weight, bias, rows,
        M, N, K,  # rows of the GEMM (B * A), output channels, input channels
        A, S, D,  # active rows per sample, rows of the cache per sample, channels per head
        s_cb, s_cs, s_ch, s_cd,  # strides of cache [B, S, H, D], H * D == N
        s_xb, s_xa, s_xk,
        s_wn, s_wk,
        s_bn,
        s_rb, s_ra,
        HAS_BIAS: tl.constexpr,
        EVEN_K: tl.constexpr,
        WIDEN: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):  # fmt: skip
        """Prefixes: i_ a program's index, o_ offsets, m_ masks, p_ pointers, b_ blocks of values, s_ strides."""
        # Programs walk the output in groups of GROUP tile rows, so that neighbours in time share tiles in L2.
        i_p = tl.program_id(0)
        T_M = tl.cdiv(M, BM)
        T_N = tl.cdiv(N, BN)
        i_g = i_p // (GROUP * T_N)
        G = tl.minimum(T_M - i_g * GROUP, GROUP)
        i_m = i_g * GROUP + (i_p % (GROUP * T_N)) % G
        i_n = (i_p % (GROUP * T_N)) // G

        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        o_n = i_n * BN + tl.arange(0, BN)  # [BN]
        o_k = tl.arange(0, BK)  # [BK]

        # Rows and columns past the end repeat the last one instead of being masked, so that the loop has no mask on
        # them; the epilogue does not store them. Offsets of rows are int64: a video's cache passes 2**31 elements.
        o_mc = tl.minimum(o_m, M - 1)
        o_nc = tl.minimum(o_n, N - 1)
        o_xm = (o_mc // A).to(tl.int64) * s_xb + (o_mc % A).to(tl.int64) * s_xa  # [BM]
        p_x = x + o_xm[:, None] + o_k[None, :] * s_xk  # [BM, BK]
        p_w = weight + o_k[:, None] * s_wk + o_nc.to(tl.int64)[None, :] * s_wn  # [BK, BN]

        b_y = tl.zeros([BM, BN], dtype=tl.float32)
        for i_k in range(0, tl.cdiv(K, BK)):
            if EVEN_K:
                b_x = tl.load(p_x)  # [BM, BK]
                b_w = tl.load(p_w)  # [BK, BN]
            else:
                m_k = o_k < K - i_k * BK  # [BK]
                b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
                b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
            if WIDEN:
                b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
            # "ieee" matters for fp32 only: TF32, the default, keeps 10 bits of mantissa and misses 1e-4.
            b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
            p_x += BK * s_xk
            p_w += BK * s_wk

        m_n = o_n < N
        if HAS_BIAS:
            b_y += tl.load(bias + o_nc * s_bn).to(tl.float32)[None, :]

        # The splice: row i of sample b belongs at cache[b, rows[b, i]]. A row outside the cache is not written, so
        # that a wrong index cannot reach another tensor's memory.
        o_b = (o_mc // A).to(tl.int64)  # [BM]
        b_row = tl.load(rows + o_b * s_rb + (o_mc % A) * s_ra).to(tl.int64)  # [BM]
        m_m = (o_m < M) & (b_row >= 0) & (b_row < S)
        o_cm = o_b * s_cb + b_row * s_cs  # [BM]
        o_cn = (o_n // D).to(tl.int64) * s_ch + (o_n % D).to(tl.int64) * s_cd  # [BN]
        tl.store(
            cache + o_cm[:, None] + o_cn[None, :], b_y.to(cache.dtype.element_ty), mask=m_m[:, None] & m_n[None, :]
        )

    def _tile(bm: int, bn: int, bk: int, warps: int, stages: int) -> "triton.Config":
        return triton.Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": 8}, num_warps=warps, num_stages=stages)

    # Tensor-core tiles for Ampere and Hopper, large to small; those that need more shared memory than the device has
    # drop out when they are timed. All have at least the 64 rows of Hopper's instruction and add up K in one order, so
    # that a result does not depend on which one was fastest.
    _TILES_16_BIT = (
        _tile(128, 256, 64, 8, 4),
        _tile(128, 256, 64, 8, 3),
        _tile(128, 128, 64, 8, 3),
        _tile(128, 128, 64, 4, 4),
        _tile(128, 64, 64, 4, 4),
        _tile(64, 128, 64, 4, 4),
        _tile(64, 64, 64, 4, 4),
        _tile(64, 64, 128, 4, 3),
    )
    # IEEE fp32 runs on the ordinary cores, whose operands live in registers: small tiles.
    _TILES_32_BIT = (_tile(128, 64, 16, 8, 3), _tile(64, 64, 16, 4, 3), _tile(32, 64, 32, 4, 3))
    # The interpreter's tiles are small, so that small tests have several of them along each axis.
    _INTERPRETER_TILE = _tile(16, 32, 16, 4, 1)

    # With TRITON_INTERPRET=1 at import, `triton.jit` makes another class, which runs on the CPU.
    _INTERPRETED = not isinstance(_scatter_linear_kernel, triton.JITFunction)

_fastest: dict[tuple, Any] = {}


def _fastest_tile(key: tuple, launch: Callable[[Any], None]) -> Any | None:
    """The fastest tile for `key`, timed once per process; None if there is none, or if it may not be timed now.

    Timing is safe, since every launch writes the same values. `triton.autotune` is not used because it also times
    inside the capture of a CUDA graph (where waiting for the device is an error), keeps the launch's arguments on
    itself (threads), and can key only on the kernel's own arguments.
    """
    if key not in _fastest and not torch.cuda.is_current_stream_capturing():
        _, dtype, m, n, _ = key
        # A tile more than twice as large as the output only adds compile time.
        tiles = [
            tile
            for tile in (_TILES_32_BIT if dtype is torch.float32 else _TILES_16_BIT)
            if tile.kwargs["BM"] <= max(2 * m, 64) and tile.kwargs["BN"] <= max(2 * n, 64)
        ]
        times = {tile: _milliseconds(launch, tile) for tile in tiles}
        best = min(tiles, key=times.__getitem__)
        _fastest[key] = None if math.isinf(times[best]) else best
    return _fastest.get(key)


def _milliseconds(launch: Callable[[Any], None], tile: Any) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=20, return_mode="median")
    except (triton.OutOfResources, torch.OutOfMemoryError):  # a tile too large; the timer's own buffer
        return math.inf


def _heads(cache: Tensor) -> list[tuple[int, int]]:
    """The cache's channel dims as (size, stride) pairs, outermost first, neighbours that form one run merged."""
    runs: list[tuple[int, int]] = []
    for size, stride in zip(cache.shape[2:], cache.stride()[2:], strict=True):
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        elif size != 1:
            runs.append((size, stride))
    return runs


def _run_kernel(cache: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
    """Launch the Triton kernel; the arguments are checked and not empty."""
    (B, A, K), N = x.shape, weight.shape[0]
    runs = _heads(cache)
    (_, s_ch), (D, s_cd) = [(1, 0)] * (2 - len(runs)) + runs

    def launch(tile: Any) -> None:
        _scatter_linear_kernel[(triton.cdiv(B * A, tile.kwargs["BM"]) * triton.cdiv(N, tile.kwargs["BN"]),)](
            cache, x, weight, weight if bias is None else bias, rows,
            B * A, N, K,
            A, cache.shape[1], D,
            cache.stride(0), cache.stride(1), s_ch, s_cd,
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            0 if rows.shape[0] == 1 else rows.stride(0), rows.stride(1),
            HAS_BIAS=bias is not None,
            EVEN_K=K % tile.kwargs["BK"] == 0,
            WIDEN=_INTERPRETED,  # whose dot takes the bits of bf16 for integers
            **tile.all_kwargs(),
        )  # fmt: skip

    if _INTERPRETED:
        return launch(_INTERPRETER_TILE)
    # The active count may change at every step: powers of two keep the number of timings small.
    tile = _fastest_tile((x.device, x.dtype, triton.next_power_of_2(B * A), N, K), launch)
    if tile is None:
        scatter_linear_reference(cache, x, weight, bias, rows)
    else:
        launch(tile)


def _check(cache: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are those that `scatter_linear` documents."""
    tensors = {"cache": cache, "x": x, "weight": weight, "rows": rows} | ({} if bias is None else {"bias": bias})

    def require(condition: bool, allowed: str) -> None:
        if not condition:
            given = ", ".join(f"{name} {t.dtype} {list(t.shape)} on {t.device}" for name, t in tensors.items())
            raise ValueError(f"scatter_linear: {allowed}; given: {given}")

    require(x.dim() == 3 and weight.dim() == 2, "x must be [B, A, K] and weight [N, K]")
    (B, A, K), N = x.shape, weight.shape[0]
    require(weight.shape[1] == K, "weight must be [N, K] with the K of x [B, A, K]")
    require(bias is None or tuple(bias.shape) == (N,), "bias must be None or [N] with the N of weight [N, K]")
    require(cache.dim() >= 3 and cache.shape[0] == B, "cache must be [B, S, N] or [B, S, heads, N / heads]")
    require(math.prod(cache.shape[2:]) == N, "the cache's dims after [B, S] must multiply to the N of weight [N, K]")
    require(rows.dim() == 2 and rows.shape[1] == A, "rows must be [B, A] or [1, A] with the A of x [B, A, K]")
    require(rows.shape[0] == 1 or rows.shape[0] == B, "rows must be [B, A] or [1, A] with the B of x [B, A, K]")
    require(cache.shape[1] >= A, "at most S rows of cache [B, S, ...] can be active, since rows are unique")
    require(rows.dtype in (torch.int64, torch.int32), "rows must be int64 or int32")
    floats = {t.dtype for name, t in tensors.items() if name != "rows"}
    require(len(floats) == 1 and floats <= set(DTYPES), f"cache, x, weight and bias must share one dtype of {DTYPES}")
    require(len({t.device for t in tensors.values()}) == 1, "all tensors must be on one device")
    expanded = any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True))
    require(not expanded, "cache must not be expanded (a dim of stride 0), since its elements are written")
    require(len(_heads(cache)) <= 2, "the cache's dims after [B, S] must be viewable as [heads, channels]")


@torch.library.custom_op(
    "ras_compile::scatter_linear",
    mutates_args={"cache"},
    schema="(Tensor(a!) cache, Tensor x, Tensor weight, Tensor? bias, Tensor rows) -> ()",
)
def scatter_linear(cache: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
    """`cache[b, rows[b, i]] = x[b, i] @ weight.T + bias` for every sample b and active row i, in place.

    Accumulates in fp32 and rounds once. Every tensor may have any strides.

    Args:
        cache: [B, S, N], or [B, S, H, D] with H * D == N: for a key or value cache [B, H, S, D] pass
            `cache.permute(0, 2, 1, 3)`; slices of a joint text|image cache are fine. Rows that are not named in
            `rows` keep their bits.
        x: [B, A, K], the active rows. Must not overlap `cache` in memory.
        weight: [N, K].
        bias: [N] or None.
        rows: [B, A], or [1, A] for all samples; int64 or int32, each in [0, S), unique within a sample: which of two
            results for one row stays is undefined.

    Cache, x, weight and bias share one dtype: bf16, fp16, fp32, or float64 (which always runs the eager twin). The
    Triton kernel runs on CUDA, and on a CPU where TRITON_INTERPRET=1 was set before Triton's import; otherwise the
    eager twin does. The first call for a size times a few tile shapes: make it before a CUDA graph is captured, since
    a capture takes the eager twin for a size that was not timed before.

    Raises:
        ValueError: shapes, dtypes, devices or strides other than these, with what is allowed.
        IndexError: a row outside [0, S), on the CPU. On CUDA the kernel leaves such a row out: reading the rows there
            would wait for the device.
    """
    _check(cache, x, weight, bias, rows)
    if cache.numel() == 0 or rows.numel() == 0:
        return
    if rows.device.type == "cpu" and not (rows.min() >= 0 and rows.max() < cache.shape[1]):
        raise IndexError(f"scatter_linear: rows must be in [0, {cache.shape[1]}), given {rows.min()} to {rows.max()}")
    if triton is None or x.dtype not in KERNEL_DTYPES or not (x.is_cuda or _INTERPRETED):
        scatter_linear_reference(cache, x, weight, bias, rows)
        return
    # A launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _run_kernel(cache, x, weight, bias, rows)


@scatter_linear.register_fake
def _(cache: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
    _check(cache, x, weight, bias, rows)


@register_flop_formula(torch.ops.ras_compile.scatter_linear)
def _scatter_linear_flops(cache_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B A N K, as for the linear alone: the bias is not counted, as in torch's own formulas."""
    return 2 * math.prod(x_shape) * weight_shape[0]
