"""The gather-GEMM: `gather -> linear -> (add a gathered table)` as one kernel, at the input of a sparse program.

    t = x[batch, rows].flatten(2)            # [B, A, K], the active patches, written to memory and read again
    y = linear(t, weight, bias)              # [B, A, N]
    y = y + table[batch, rows]               # optional: position embeddings

becomes

    y = ras_compile::gather_linear(x, weight, bias, rows, ...)

because a GEMM may load its operand's rows from anywhere: only the addresses of its tiles look at `rows`. The pixels of a
patch are channels of `x` with strides of their own, so that a patch embedding (a convolution whose kernel is its stride)
reads the latent itself.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import DTYPES, MOST_RUNS, runs, three_runs
from .gemm import INTERPRETED, triton
from .launch import INTERPRETER_TILE, Tile, runs_triton
from .tiles import Timed

if triton is not None:
    import triton.language as tl

    from .gemm import address


def gather_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    grid_dims: int = 1,
    table: Tensor | None = None,
    table_dims: int = 1,
) -> Tensor:
    """The eager twin: `linear(x[b, rows[b]].flatten(), weight, bias) + table[b, rows[b]]`. Shapes as for `gather_linear`."""
    y = F.linear(_taken(x, rows, grid_dims).flatten(2), weight, bias)
    return y if table is None else y + _taken(table, rows, table_dims)


def _taken(source: Tensor, rows: Tensor, grid_dims: int) -> Tensor:
    """`gather(source, rows)`: [B, *grid, ...] at the rows, [B, A, ...]."""
    samples = max(source.shape[0], rows.shape[0])
    batch = torch.arange(samples, device=source.device)[:, None]
    grid = source.shape[1 : 1 + grid_dims]
    places = torch.unravel_index(rows.long(), grid)
    return source.expand(samples, *source.shape[1:])[(batch, *places)]


# A patch has few channels: one to three steps along K, and the time goes into writing the result. All add up K in one
# order, so that a result does not depend on which one was fastest.
TILES_16_BIT = (Tile(128, 128, 64, 8, 2), Tile(64, 128, 64, 4, 2), Tile(128, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2))
TILES_32_BIT = (Tile(64, 64, 16, 4, 3), Tile(32, 64, 32, 4, 3))

if triton is not None:

    @triton.jit
    def _gather_linear_kernel(
        y, x, weight, bias, rows, table,
        M, N, K,  # rows of the GEMM (B * A), output channels, input channels
        A, S,  # active rows and all rows of a sample
        G0, G1, C0, C1,  # sizes of the last two dims of x's grid and of its channels, innermost first
        T0, T1,  # the same of the table's grid
        s_xb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,  # strides of x [B, *grid, *channels]
        s_wn, s_wk, s_bn, s_rb, s_ra,
        s_tb, s_t0, s_t1, s_t2, s_tn,  # strides of the table [B, *grid, N]
        HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, WIDEN: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """One tile. Prefixes: i_ an index, o_ offsets, m_ masks, p_ pointers, b_ blocks of values, s_ strides."""
        # Neighbours in time share the rows of x, which lie apart; the weight is small.
        T_N = tl.cdiv(N, BN)
        o_m = tl.program_id(0) // T_N * BM + tl.arange(0, BM)  # [BM]
        o_n = tl.program_id(0) % T_N * BN + tl.arange(0, BN)  # [BN]
        # Rows and columns past the end repeat the last one and are not stored.
        o_mc, o_nc = tl.minimum(o_m, M - 1), tl.minimum(o_n, N - 1).to(tl.int64)
        o_b, o_a = (o_mc // A).to(tl.int64), (o_mc % A).to(tl.int64)  # [BM]
        b_row = tl.load(rows + o_b * s_rb + o_a * s_ra)  # [BM]
        m_row = (b_row >= 0) & (b_row < S)  # a row that x does not have is not read
        o_xm = o_b * s_xb + address(b_row, G0, G1, s_g0, s_g1, s_g2)

        b_y = tl.zeros([BM, BN], dtype=tl.float32)
        for i_k in range(0, tl.cdiv(K, BK)):
            o_k = i_k * BK + tl.arange(0, BK)  # [BK]
            m_k = o_k < K
            o_xk = address(o_k, C0, C1, s_c0, s_c1, s_c2)
            b_x = tl.load(x + o_xm[:, None] + o_xk[None, :], mask=m_row[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
            b_w = tl.load(weight + o_k[:, None] * s_wk + o_nc[None, :] * s_wn, mask=m_k[:, None], other=0.0)  # [BK, BN]
            if WIDEN:
                b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
            # "ieee" matters for fp32 only: TF32, the default, keeps 10 bits of mantissa and misses 1e-4.
            b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")

        if HAS_BIAS:
            b_y += tl.load(bias + o_nc * s_bn).to(tl.float32)[None, :]
        if HAS_TABLE:
            o_t = o_b * s_tb + address(b_row, T0, T1, s_t0, s_t1, s_t2)  # [BM]
            b_t = tl.load(table + o_t[:, None] + (o_nc * s_tn)[None, :], mask=m_row[:, None], other=0.0)
            b_y += b_t.to(tl.float32)
        p_y = y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


class Launch(Timed[Tile]):
    """The Triton kernel on checked, non-empty arguments; `launch(tile)` gives the result."""

    def __init__(self, x, weight, bias, rows, grid_dims=1, table=None, table_dims=1) -> None:
        (N, K), A = weight.shape, rows.shape[1]
        B, S = max(x.shape[0], rows.shape[0]), math.prod(x.shape[1 : 1 + grid_dims])
        self.x, self.lead, self.sizes = x, (B, A), (B * A, N, K)
        grid, channels = three_runs(x, 1, 1 + grid_dims), three_runs(x, 1 + grid_dims)
        places = [(1, 0)] * MOST_RUNS if table is None else three_runs(table, 1, 1 + table_dims)

        def sample(given: Tensor | None) -> int:
            return 0 if given is None or given.shape[0] == 1 else given.stride(0)

        self.pointers = [x, weight, weight if bias is None else bias, rows, weight if table is None else table]
        self.numbers = (
            B * A, N, K, A, S,
            grid[0][0], grid[1][0], channels[0][0], channels[1][0], places[0][0], places[1][0],
            sample(x), *(stride for _, stride in grid), *(stride for _, stride in channels),
            *weight.stride(), 0 if bias is None else bias.stride(0), sample(rows), rows.stride(1),
            sample(table), *(stride for _, stride in places), 0 if table is None else table.stride(-1),
        )  # fmt: skip
        self.switches = dict(
            HAS_BIAS=bias is not None,
            HAS_TABLE=table is not None,
            WIDEN=INTERPRETED,  # whose dot takes the bits of bf16 for integers
        )

    @property
    def key(self) -> str:
        """What a timing depends on. The active count may change at every step: powers of two keep timings few."""
        M, N, K = self.sizes
        flags = [int(self.switches["HAS_BIAS"]), int(self.switches["HAS_TABLE"])]
        return f"gather_linear {self.x.dtype} {1 << (M - 1).bit_length()} {N} {K} {flags}"

    def tiles(self) -> dict[str, Tile]:
        """Those that are not more than twice as large as the output; the smallest always."""
        M, N, _ = self.sizes
        tiles = TILES_32_BIT if self.x.dtype is torch.float32 else TILES_16_BIT
        fit = [tile for tile in tiles if 2 * M >= tile.BM and 2 * N >= tile.BN]
        return {tile.name: tile for tile in fit or tiles[-1:]}

    def __call__(self, tile: Tile) -> Tensor:
        M, N, _ = self.sizes
        y = self.x.new_empty(*self.lead, N)
        _gather_linear_kernel[(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)](
            y, *self.pointers, *self.numbers, **self.switches,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, grid_dims: int, table: Tensor | None, table_dims: int
) -> None:
    """Raise ValueError unless shapes, dtypes, devices and strides are those that `gather_linear` documents."""
    named = dict(x=x, weight=weight, bias=bias, rows=rows, table=table)
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}

    def require(condition: bool, allowed: str) -> None:
        if not condition:
            given = ", ".join(f"{name} {t.dtype} {list(t.shape)} on {t.device}" for name, t in tensors.items())
            raise ValueError(
                f"gather_linear: {allowed}; given: {given}, grid_dims={grid_dims}, table_dims={table_dims}"
            )

    require(weight.dim() == 2, "weight must be [N, K]")
    N, K = weight.shape
    require(grid_dims >= 1 and x.dim() > 1 + grid_dims, "x must be [B, *grid, *channels] with grid_dims dims of a grid")
    require(math.prod(x.shape[1 + grid_dims :]) == K, "the channels of x must multiply to the K of weight [N, K]")
    require(bias is None or tuple(bias.shape) == (N,), "bias must be None or [N] with the N of weight [N, K]")
    require(rows.dim() == 2, "rows must be [B, A] or [1, A]")
    samples = [t.shape[0] for t in (x, rows, table) if t is not None and t.dim()]
    require(all(n in (1, max(samples)) for n in samples), "x, rows and table must have B samples, or one for all")
    require(max(samples) == max(samples[:2]), "table must not have more samples than x and rows")
    require(math.prod(x.shape[1 : 1 + grid_dims]) < 2**31, "x must have fewer than 2**31 rows for each sample")
    require(rows.dtype in (torch.int64, torch.int32), "rows must be int64 or int32")
    places = math.prod(x.shape[1 : 1 + grid_dims])
    if table is not None:
        fits = table_dims >= 1 and table.dim() == 2 + table_dims and table.shape[-1] == N
        require(
            fits and math.prod(table.shape[1:-1]) == places,
            "table must be [B or 1, *grid, N] with table_dims dims of a grid, which has as many places as that of x",
        )
        require(len(runs(table, 1, 1 + table_dims)) <= MOST_RUNS, "the table's grid must be viewable as three dims")
    kinds = {tensor.dtype for tensor in (x, weight, bias, table) if tensor is not None}
    require(len(kinds) == 1 and kinds <= set(DTYPES), f"x, weight, bias and table must share one dtype of {DTYPES}")
    require(len({tensor.device for tensor in tensors.values()}) == 1, "all tensors must be on one device")
    most = max(len(runs(x, 1, 1 + grid_dims)), len(runs(x, 1 + grid_dims)))
    require(most <= MOST_RUNS, "the grid and the channels of x must each be viewable as three dims")


@torch.library.custom_op("ras_compile::gather_linear", mutates_args=())
def gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    grid_dims: int = 1,
    table: Tensor | None = None,
    table_dims: int = 1,
) -> Tensor:
    """`y[b, i] = weight @ x[b, rows[b, i]] + bias + table[b, rows[b, i]]` for every sample b and active row i.

    Accumulates in fp32 and rounds once. Every tensor may have any strides.

    Args:
        x: [B, *grid, *channels], or one sample for all; `grid_dims` says how many dims the rows count. An image of patches
            [B, C, h * p, w * p] is [B, h, w, C, p, p].
        weight: [N, K], K the product of the channels: a patch embedding's `weight.flatten(1)`.
        bias: [N] or None.
        rows: [B, A], or [1, A] for all samples; int64 or int32, each in [0, S), S the product of the grid.
        grid_dims: how many dims of x after the first are the grid.
        table: [B or 1, *grid, N] or None: position embeddings, of which the same rows are added.
        table_dims: how many dims of the table after the first are the grid.

    x, weight, bias and table share one dtype: bf16, fp16, fp32, or float64 (which always runs the eager twin). Returns
    [B, A, N], contiguous. The Triton kernel runs on CUDA, and on a CPU where TRITON_INTERPRET=1 was set before Triton's
    import; otherwise the eager twin does. The first call for a size times a few tile shapes, once per device: the timings are
    kept on disk. Make it before a CUDA graph is captured, since a capture takes the eager twin for a size that was not timed.

    Raises:
        ValueError: shapes, dtypes, devices or strides other than these, with what is allowed.
        IndexError: a row outside [0, S), on the CPU. On CUDA such a row counts as zeros: reading the rows there would wait
            for the device.
    """
    given = (x, weight, bias, rows, grid_dims, table, table_dims)
    _check(*given)
    places = math.prod(x.shape[1 : 1 + grid_dims])
    if rows.device.type == "cpu" and rows.numel() and not (rows.min() >= 0 and rows.max() < places):
        raise IndexError(f"gather_linear: rows must be in [0, {places}), given {rows.min()} to {rows.max()}")
    empty = 0 in (x.shape[0], rows.numel(), weight.numel())
    if empty or not runs_triton(x):
        return gather_linear_reference(*given)
    # A launch goes to the current device, which need not be the tensors'.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        launch = Launch(*given)
        tile = INTERPRETER_TILE if INTERPRETED else launch.fastest()
        return gather_linear_reference(*given) if tile is None else launch(tile)


@gather_linear.register_fake
def _(x, weight, bias, rows, grid_dims=1, table=None, table_dims=1) -> Tensor:
    _check(x, weight, bias, rows, grid_dims, table, table_dims)
    return x.new_empty(max(x.shape[0], rows.shape[0]), rows.shape[1], weight.shape[0])


@register_flop_formula(torch.ops.ras_compile.gather_linear)
def _gather_linear_flops(x_shape, weight_shape, bias_shape, rows_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B A N K, as for the linear alone."""
    return 2 * max(x_shape[0], rows_shape[0]) * rows_shape[1] * math.prod(weight_shape)
