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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .tiles import fastest

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the op runs its eager twin
    triton = None

# float64 is for proofs, not for speed: it always runs the eager twin.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)
NORMS = ("none", "rms", "layer")
ROPES = ("none", "interleaved", "half")


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
        pairs = (-1, 2) if rope == "interleaved" else (2, -1)
        dim = -1 if rope == "interleaved" else -2
        a, b = z.unflatten(-1, pairs).unbind(dim)  # [B, A, H, D / 2]
        (c, c2), (s, s2) = (_pair(table.to(wide), head_dim, pairs, dim) for table in (cos, sin))  # type: ignore[union-attr]
        z = torch.stack((a * c - b * s, b * c2 + a * s2), dim).flatten(-2)
    return z.flatten(-2).to(y.dtype)


def _pair(table: Tensor, head_dim: int, pairs: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    """A rotary table [B, A, D or D / 2] at the first and the second entries of each pair: [B, A, 1, D / 2]."""
    table = table.unsqueeze(2)
    if table.shape[-1] != head_dim:
        return table, table
    first, second = table.unflatten(-1, pairs).unbind(dim)
    return first, second


def scatter_linear_reference(
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
    """The eager twin: `cache[b, rows[b, i]] = epilogue(x[b, i] @ weight.T + bias)`, everything else in `cache` stays.

    Shapes and dtypes as for `scatter_linear`.
    """
    y = epilogue_reference(F.linear(x, weight, bias), head_dim, norm, norm_weight, norm_bias, eps, rope, cos, sin)
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None]  # [B, 1]
    grid = cache.shape[1 : 1 + grid_dims]
    places = [rows.long()] if grid_dims == 1 else list(torch.unravel_index(rows.long(), grid))
    cache.index_put_((batch, *places), y.reshape(*y.shape[:2], *cache.shape[1 + grid_dims :]))


@dataclass(frozen=True)
class Tile:
    """One way to cut the product: tiles of BM x BN, BK channels at a time; `tma`: Hopper's bulk loads; `persistent`:
    one program per processor walks over the tiles, and a tile's stores overlap the next one's loads."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    tma: bool = False
    persistent: bool = False

    @property
    def name(self) -> str:
        flags = "-tma" * self.tma + "-persistent" * self.persistent
        return f"{self.BM}x{self.BN}x{self.BK}-w{self.warps}-s{self.stages}{flags}"


# Tensor-core tiles for Ampere and Hopper, large to small; those that need more shared memory than the device has drop
# out when they are timed. All have at least the 64 rows of Hopper's instruction and add up K in one order, so that a
# result does not depend on which one was fastest.
TILES_16_BIT = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 256, 64, 8, 3),
)
# Those worth a compilation where operands can be loaded in bulk. A persistent tile's epilogue is compiled into the loop,
# which takes minutes where it has a norm or a rotary embedding: it is offered without them only.
TILES_HOPPER = (
    Tile(128, 256, 64, 8, 3, tma=True),
    Tile(128, 256, 64, 8, 3, tma=True, persistent=True),
    Tile(128, 128, 64, 8, 4, tma=True),
    Tile(128, 128, 64, 8, 4, tma=True, persistent=True),
    Tile(128, 128, 64, 4, 4, tma=True),
    Tile(64, 128, 64, 4, 4, tma=True),
    Tile(64, 64, 64, 4, 4, tma=True),
    Tile(64, 256, 64, 8, 3, tma=True),
    Tile(128, 128, 64, 8, 3),
)
# IEEE fp32 runs on the ordinary cores, whose operands live in registers: small tiles.
TILES_32_BIT = (
    Tile(128, 64, 16, 8, 3),
    Tile(64, 64, 16, 4, 3),
    Tile(32, 64, 32, 4, 3),
    Tile(32, 128, 16, 4, 3),
    Tile(32, 256, 16, 8, 2),
)
# The interpreter's tiles are small, so that small tests have several of them along each axis.
INTERPRETER_TILE = Tile(16, 32, 16, 4, 1)
GROUP = 8
WIDEST = 256  # columns of a tile, and so the largest head that has an epilogue in the kernel

if triton is not None:

    @triton.jit
    def _load_pair(table, o_b, o_a, o_p, m_p, s_tb, s_ta, s_tk, SECOND: tl.constexpr):
        """A rotary table for the first and the second entries of each pair: twice [BM, 1, DP / 2]."""
        p_t = table + (o_b * s_tb + o_a * s_ta)[:, None, None] + (o_p * s_tk)[None, None, :]
        b_first = tl.load(p_t, mask=m_p[None, None, :], other=0.0).to(tl.float32)
        if SECOND == 0:  # the table has one entry per pair
            return b_first, b_first
        b_second = tl.load(p_t + SECOND * s_tk, mask=m_p[None, None, :], other=0.0).to(tl.float32)
        return b_first, b_second

    @triton.jit
    def _write_tile(
        i_p,
        cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
        M, N, K, A, S, G0, G1, C0, C1, eps,
        s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
        s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
        s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        HAS_BIAS: tl.constexpr, NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
        ROPE: tl.constexpr, FULL_COS: tl.constexpr, FULL_SIN: tl.constexpr,
        D: tl.constexpr, DP: tl.constexpr,
        EVEN_K: tl.constexpr, WIDEN: tl.constexpr, TMA: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Tile number i_p. Prefixes: i_ an index, o_ offsets, m_ masks, p_ pointers, b_ blocks of values, s_ strides."""
        # Tiles are numbered in groups of GROUP tile rows, so that neighbours in time share operands in L2.
        T_M = tl.cdiv(M, BM)
        if D > 0:
            T_N = tl.cdiv(N // D, BN // DP)
        else:
            T_N = tl.cdiv(N, BN)
        i_g = i_p // (GROUP * T_N)
        G = tl.minimum(T_M - i_g * GROUP, GROUP)
        i_m = i_g * GROUP + (i_p % (GROUP * T_N)) % G
        i_n = (i_p % (GROUP * T_N)) // G

        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        o_j = tl.arange(0, BN)  # [BN]
        if D > 0 and D != DP:
            # Heads are padded to powers of two (each half of one, where halves are paired).
            if ROPE == 2:
                o_d = (o_j % DP) // (DP // 2) * (D // 2) + o_j % (DP // 2)
                m_d = o_j % (DP // 2) < D // 2
            else:
                o_d = o_j % DP
                m_d = o_d < D
            o_h = i_n * (BN // DP) + o_j // DP
            o_n = o_h * D + o_d  # [BN]
            m_n = m_d & (o_n < N)
        else:
            o_n = i_n * BN + o_j  # [BN]
            m_n = o_n < N

        # Rows and columns past the end repeat another one instead of being masked, so that the loop has no mask on
        # them; the epilogue does not store them. Offsets of rows are int64: a video's cache passes 2**31 elements.
        o_mc = tl.minimum(o_m, M - 1)
        o_nc = tl.minimum(o_n, N - 1)
        o_b = (o_mc // A).to(tl.int64)  # [BM]
        o_a = (o_mc % A).to(tl.int64)  # [BM]

        b_y = tl.zeros([BM, BN], dtype=tl.float32)
        if TMA:
            for i_k in range(0, tl.cdiv(K, BK)):
                b_x = x.load([i_m * BM, i_k * BK])  # [BM, BK], zeros past the end
                b_w = weight.load([i_n * BN, i_k * BK])  # [BN, BK]
                b_y = tl.dot(b_x, b_w.T, b_y)
        else:
            o_k = tl.arange(0, BK)  # [BK]
            p_x = x + (o_b * s_xb + o_a * s_xa)[:, None] + o_k[None, :] * s_xk  # [BM, BK]
            p_w = weight + o_k[:, None] * s_wk + o_nc.to(tl.int64)[None, :] * s_wn  # [BK, BN]
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

        if HAS_BIAS:
            b_y += tl.load(bias + o_nc * s_bn).to(tl.float32)[None, :]

        if NORM > 0:  # 1: rms, 2: layer
            b_y = tl.where(m_n[None, :], b_y, 0.0)
            b_z = tl.reshape(b_y, [BM, BN // DP, DP])
            if NORM == 2:
                b_z -= (tl.sum(b_z, 2) / D)[:, :, None]
                b_z = tl.reshape(tl.where(m_n[None, :], tl.reshape(b_z, [BM, BN]), 0.0), [BM, BN // DP, DP])
            b_z *= (1.0 / tl.sqrt(tl.sum(b_z * b_z, 2) / D + eps))[:, :, None]
            b_y = tl.reshape(b_z, [BM, BN])
            if NORM_WEIGHT:
                b_y *= tl.load(norm_weight + o_nc % D * s_nw).to(tl.float32)[None, :]
            if NORM_BIAS:
                b_y += tl.load(norm_bias + o_nc % D * s_nb).to(tl.float32)[None, :]

        if ROPE > 0:  # 1: interleaved pairs, 2: pairs of halves
            o_p = tl.arange(0, DP // 2)  # [DP / 2]
            m_p = o_p < D // 2
            STEP: tl.constexpr = 3 - ROPE  # from pair to pair, and inside a pair, in a table with an entry per channel
            SECOND: tl.constexpr = 1 if ROPE == 1 else D // 2
            if ROPE == 1:
                b_z = tl.reshape(b_y, [BM, BN // DP, DP // 2, 2])
            else:
                b_z = tl.permute(tl.reshape(b_y, [BM, BN // DP, 2, DP // 2]), [0, 1, 3, 2])
            b_first, b_second = tl.split(b_z)  # [BM, BN / DP, DP / 2]
            o_cos, o_sin = o_p * (STEP if FULL_COS else 1), o_p * (STEP if FULL_SIN else 1)
            b_c, b_c2 = _load_pair(cos, o_b, o_a, o_cos, m_p, s_cosb, s_cosa, s_cosk, SECOND if FULL_COS else 0)
            b_s, b_s2 = _load_pair(sin, o_b, o_a, o_sin, m_p, s_sinb, s_sina, s_sink, SECOND if FULL_SIN else 0)
            b_z = tl.join(b_first * b_c - b_second * b_s, b_second * b_c2 + b_first * b_s2)
            if ROPE == 2:
                b_z = tl.permute(b_z, [0, 1, 3, 2])
            b_y = tl.reshape(b_z, [BM, BN])

        # The splice: row i of sample b belongs at cache[b, rows[b, i]]. A row outside the cache is not written, so
        # that a wrong index cannot reach another tensor's memory.
        b_row = tl.load(rows + o_b * s_rb + o_a * s_ra).to(tl.int64)  # [BM]
        m_m = (o_m < M) & (b_row >= 0) & (b_row < S)
        o_cm = o_b * s_cb + b_row % G0 * s_g0 + b_row // G0 % G1 * s_g1 + b_row // (G0 * G1) * s_g2  # [BM]
        o_cn = (o_n % C0).to(tl.int64) * s_c0  # [BN]
        o_cn += (o_n // C0 % C1).to(tl.int64) * s_c1 + (o_n // (C0 * C1)).to(tl.int64) * s_c2
        tl.store(
            cache + o_cm[:, None] + o_cn[None, :], b_y.to(cache.dtype.element_ty), mask=m_m[:, None] & m_n[None, :]
        )

    @triton.jit
    def _scatter_linear_kernel(
        cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
        M, N, K,  # rows of the GEMM (B * A), output channels, input channels
        A, S,  # active rows per sample, rows of the cache per sample
        G0, G1,  # sizes of the last two dims of the cache's grid, innermost first
        C0, C1,  # sizes of the last two dims of its channels, innermost first
        eps,
        s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,  # strides of cache [B, *grid, *channels]
        s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
        s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        T,  # number of tiles
        HAS_BIAS: tl.constexpr, NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr,
        ROPE: tl.constexpr, FULL_COS: tl.constexpr, FULL_SIN: tl.constexpr,
        D: tl.constexpr, DP: tl.constexpr,  # channels of a head, 0 where heads do not matter; padded to a power of two
        EVEN_K: tl.constexpr, WIDEN: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One tile of the product per program, or all of them in turns (PERSISTENT)."""
        if PERSISTENT:
            for i_p in tl.range(tl.program_id(0), T, tl.num_programs(0), flatten=True):
                _write_tile(
                    i_p, cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
                    M, N, K, A, S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
                    s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
                    s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
                    HAS_BIAS, NORM, NORM_WEIGHT, NORM_BIAS, ROPE, FULL_COS, FULL_SIN, D, DP, EVEN_K, WIDEN, TMA,
                    BM, BN, BK, GROUP,
                )  # fmt: skip
        else:
            _write_tile(
                tl.program_id(0), cache, x, weight, bias, rows, norm_weight, norm_bias, cos, sin,
                M, N, K, A, S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
                s_xb, s_xa, s_xk, s_wn, s_wk, s_bn, s_rb, s_ra, s_nw, s_nb,
                s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
                HAS_BIAS, NORM, NORM_WEIGHT, NORM_BIAS, ROPE, FULL_COS, FULL_SIN, D, DP, EVEN_K, WIDEN, TMA,
                BM, BN, BK, GROUP,
            )  # fmt: skip

    # With TRITON_INTERPRET=1 at import, `triton.jit` makes another class, which runs on the CPU.
    INTERPRETED = not isinstance(_scatter_linear_kernel, triton.JITFunction)


def _runs(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Dims as (size, stride) pairs, outermost first, neighbours that form one run merged."""
    runs: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        elif size != 1:
            runs.append((size, stride))
    return runs


def _cache_runs(cache: Tensor, grid_dims: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The runs of the cache's grid and of its channels."""
    middle = 1 + grid_dims
    return (
        _runs(tuple(cache.shape[1:middle]), cache.stride()[1:middle]),
        _runs(tuple(cache.shape[middle:]), cache.stride()[middle:]),
    )


def _padded(head_dim: int, rope: str) -> int:
    """The columns that a head takes in a tile."""
    if head_dim == 0:
        return 1
    return 2 * _power(head_dim // 2) if rope != "none" else _power(head_dim)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def tiles_for(
    device: torch.device, dtype: torch.dtype, M: int, N: int, padded: int = 1, *, bulk: bool = False
) -> list[Tile]:
    """The tiles that may be fastest: whole heads, and not more than twice as large as the output.

    Args:
        padded: columns of a head in a tile; 1 without an epilogue.
        bulk: the operands can be loaded in bulk, where the device can.
    """
    tiles: tuple[Tile, ...] = TILES_16_BIT
    if dtype is torch.float32:
        tiles = TILES_32_BIT
    elif bulk and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        tiles = TILES_HOPPER if padded == 1 else tuple(tile for tile in TILES_HOPPER if not tile.persistent)
    high, wide = max(2 * M, 64), max(2 * N, 64, padded)
    return [tile for tile in tiles if high >= tile.BM and wide >= tile.BN and tile.BN % padded == 0]


def _can_tma(x: Tensor, weight: Tensor) -> bool:
    """Bulk loads read rows of a matrix: one stride between all rows, channels side by side, addresses in 16 bytes."""
    one_matrix = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    dense = x.stride(2) == 1 and weight.stride(1) == 1
    aligned = all(
        t.data_ptr() % 16 == 0 and t.stride(-2) * t.element_size() % 16 == 0 and t.stride(-2) >= t.shape[-1]
        for t in (x, weight)
    )
    return one_matrix and dense and aligned


class Launch:
    """The Triton kernel on checked, non-empty arguments; `launch(tile)` writes the cache."""

    def __init__(
        self, cache, x, weight, bias, rows, grid_dims, head_dim, norm, norm_weight, norm_bias, eps, rope, cos, sin
    ) -> None:
        (B, A, K), N = x.shape, weight.shape[0]
        self.x, self.weight, self.sizes = x, weight, (B * A, N, K)
        plain = norm == rope == "none"
        self.D = 0 if plain else head_dim
        self.DP = _padded(self.D, rope)
        self.tma = self.D in (0, self.DP) and _can_tma(x, weight)
        grid, channels = ([(1, 0)] * (3 - len(runs)) + runs for runs in _cache_runs(cache, grid_dims))

        def table(given: Tensor | None) -> tuple[int, int, int]:
            if given is None:
                return 0, 0, 0
            return 0 if given.shape[0] == 1 else given.stride(0), given.stride(1), given.stride(2)

        def vector(given: Tensor | None) -> int:
            return 0 if given is None else given.stride(0)

        self.pointers = [weight if t is None else t for t in (bias, rows, norm_weight, norm_bias, cos, sin)]
        self.cache = cache
        self.numbers = (
            B * A, N, K, A, math.prod(cache.shape[1 : 1 + grid_dims]),
            grid[2][0], grid[1][0], channels[2][0], channels[1][0], eps,
            cache.stride(0), grid[2][1], grid[1][1], grid[0][1], channels[2][1], channels[1][1], channels[0][1],
            *x.stride(), *weight.stride(), vector(bias), 0 if rows.shape[0] == 1 else rows.stride(0), rows.stride(1),
            vector(norm_weight), vector(norm_bias), *table(cos), *table(sin),
        )  # fmt: skip
        self.switches = dict(
            HAS_BIAS=bias is not None,
            NORM=NORMS.index(norm),
            NORM_WEIGHT=norm_weight is not None,
            NORM_BIAS=norm_bias is not None,
            ROPE=ROPES.index(rope),
            FULL_COS=cos is not None and cos.shape[-1] == head_dim,
            FULL_SIN=sin is not None and sin.shape[-1] == head_dim,
            D=self.D,
            DP=self.DP,
            WIDEN=INTERPRETED,  # whose dot takes the bits of bf16 for integers
            GROUP=GROUP,
        )

    @property
    def key(self) -> str:
        """What a timing depends on. The active count may change at every step: powers of two keep timings few."""
        M, N, K = self.sizes
        switches = [int(self.switches[name]) for name in ("HAS_BIAS", "NORM", "ROPE", "FULL_COS", "FULL_SIN", "D")]
        return f"scatter_linear {self.x.dtype} {_power(M)} {N} {K} {switches} {'tma' if self.tma else ''}"

    def tiles(self) -> dict[str, Tile]:
        M, N, _ = self.sizes
        return {tile.name: tile for tile in tiles_for(self.x.device, self.x.dtype, M, N, self.DP, bulk=self.tma)}

    def fastest(self) -> Tile | None:
        tiles = self.tiles()
        return tiles.get(fastest(self.x.device, self.key, list(tiles), lambda name: self(tiles[name])) or "")

    def __call__(self, tile: Tile) -> None:
        M, N, K = self.sizes
        per_tile = tile.BN // self.DP * self.D if self.D else tile.BN
        count = triton.cdiv(M, tile.BM) * triton.cdiv(N, per_tile)
        x, weight = self.x, self.weight
        if tile.tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            x = TensorDescriptor(x, [M, K], [x.stride(1), 1], [tile.BM, tile.BK])
            weight = TensorDescriptor(weight, [N, K], [weight.stride(0), 1], [tile.BN, tile.BK])
        programs = min(count, _processors(self.x.device)) if tile.persistent else count
        bias, rows, *others = self.pointers
        _scatter_linear_kernel[(programs,)](
            self.cache, x, weight, bias, rows, *others,
            *self.numbers, count,
            **self.switches,
            EVEN_K=K % tile.BK == 0, TMA=tile.tma, PERSISTENT=tile.persistent,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(
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
    require(rows.dtype in (torch.int64, torch.int32), "rows must be int64 or int32")
    floats = {tensor.dtype for tensor in (cache, x, weight, bias) if tensor is not None}
    require(len(floats) == 1 and floats <= set(DTYPES), f"cache, x, weight and bias must share one dtype of {DTYPES}")
    require(len({t.device for t in tensors.values()}) == 1, "all tensors must be on one device")
    expanded = any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True))
    require(not expanded, "cache must not be expanded (a dim of stride 0), since its elements are written")
    require(
        max(map(len, _cache_runs(cache, grid_dims))) <= 3,
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

    Accumulates in fp32, keeps the epilogue in fp32 and rounds once. Every tensor may have any strides.

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
    _check(*given)
    if cache.numel() == 0 or rows.numel() == 0:
        return
    S = math.prod(cache.shape[1 : 1 + grid_dims])
    if rows.device.type == "cpu" and not (rows.min() >= 0 and rows.max() < S):
        raise IndexError(f"scatter_linear: rows must be in [0, {S}), given {rows.min()} to {rows.max()}")
    if not runs_kernel(x, head_dim, norm, rope):
        scatter_linear_reference(*given)
        return
    # A launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        launch = Launch(*given)
        tile = _interpreted_tile(launch.DP) if INTERPRETED else launch.fastest()
        if tile is None:
            scatter_linear_reference(*given)
        else:
            launch(tile)


def runs_kernel(x: Tensor, head_dim: int = 0, norm: str = "none", rope: str = "none") -> bool:
    """Whether the Triton kernel computes this; otherwise the eager twin does."""
    fits = norm == rope == "none" or (rope == "none" or head_dim >= 2) and _padded(head_dim, rope) <= WIDEST
    return triton is not None and x.dtype in KERNEL_DTYPES and fits and (x.is_cuda or INTERPRETED)


def _interpreted_tile(padded: int) -> Tile:
    tile = INTERPRETER_TILE
    return Tile(tile.BM, max(tile.BN, padded), tile.BK, tile.warps, tile.stages)


@scatter_linear.register_fake
def _(cache, x, weight, bias, rows, *others) -> None:
    _check(cache, x, weight, bias, rows, *others)


@register_flop_formula(torch.ops.ras_compile.scatter_linear)
def _scatter_linear_flops(cache_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B A N K, as for the linear alone: bias and epilogue are not counted, as in torch's own formulas."""
    return 2 * math.prod(x_shape) * weight_shape[0]
