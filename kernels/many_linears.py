"""Linears of a few rows in one launch: what every block computes from the same small vector.

    m_0 = linear(x, weight_0, bias_0)      # x [M, K], M the samples of a batch; weight_0 [N_0, K]
    m_1 = linear(x, weight_1, bias_1)

becomes

    m_0, m_1 = ras_compile::many_linears(x, [weight_0, weight_1], [bias_0, bias_1])

because such a product does nothing but read its weight, and one after the other they neither keep the memory busy between
launches nor at the ends of each. Weights are read where they are, so that a changed weight is seen at once.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .gemm import INTERPRETED, tl, triton
from .launch import INTERPRETER_TILE, Tile, runs_triton
from .tiles import Timed

ROWS = 16  # rows of x, at most: those of the smallest matrix that tensor cores multiply
MOST = 64  # members of one launch: each has arguments of its own
# What counts is the bytes in flight. BN channels of a weight stand where a GEMM has its rows: 64 for Hopper's instruction.
# 48 weights [9216, 1536] take two rows 312 us on an H200 (4.35 TB/s; torch 2.11, Triton 3.6), and cuBLAS 482 us; of 23 other
# tiles none was faster by more than 1 %. One tile also means that no number depends on timings.
TILES_16_BIT = (Tile(16, 64, 128, 4, 4),)
TILES_32_BIT = (Tile(16, 32, 64, 4, 3),)

if triton is not None:
    from .grouped import pick

    @triton.jit
    def _many_linears_kernel(
        x,
        weights, biases, results,  # tuples with one of each member
        Ns, firsts,  # output channels of each member or of all; number of each member's first tile
        M, K,
        HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """BN channels of one member, for all rows. Names as in `gemm.py`."""
        i_p = tl.program_id(0)
        i_g = 0  # the member
        for g in tl.static_range(1, len(firsts)):
            i_g = tl.where(i_p >= firsts[g], g, i_g)
        weight, N = pick(weights, i_g), pick(Ns, i_g)
        o_n = (i_p - pick(firsts, i_g)) * BN + tl.arange(0, BN)  # [BN]
        o_nc = tl.minimum(o_n, N - 1).to(tl.int64)  # past the end: another channel, which is not stored
        o_m, o_k = tl.arange(0, BM), tl.arange(0, BK)
        p_x = x + o_m[None, :] * K + o_k[:, None]  # [BK, BM]
        p_w = weight + o_nc[:, None] * K + o_k[None, :]  # [BN, BK]
        b_y = tl.zeros([BN, BM], dtype=tl.float32)
        for i_k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
            m_k = o_k < K - i_k * BK  # [BK]
            if EVEN_K:
                b_w = tl.load(p_w)
            else:
                b_w = tl.load(p_w, mask=m_k[None, :], other=0.0)
            b_x = tl.load(p_x, mask=(o_m < M)[None, :] & m_k[:, None], other=0.0)  # [BK, BM]
            if WIDEN:
                b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
            b_y = tl.dot(b_w, b_x, b_y, input_precision="ieee")  # weights on the side that has the rows of a tile
            p_x += BK
            p_w += BK
        if HAS_BIAS:
            b_y += tl.load(pick(biases, i_g) + o_nc).to(tl.float32)[:, None]
        result = pick(results, i_g)
        p_y = result + o_m[None, :] * N + o_n[:, None]
        tl.store(p_y, b_y.to(result.dtype.element_ty), mask=(o_m < M)[None, :] & (o_n < N)[:, None])


Member = tuple[Tensor, Tensor | None, Tensor]  # weight, bias, result


class ManyLaunch(Timed[Tile]):
    """The Triton kernel on checked arguments of `many_linears`, in as few launches as there can be; fills `results`."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self.x = x.reshape(-1, x.shape[-1]).contiguous()  # [M, K]
        self.results = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
        self.members: list[Member] = list(zip(weights, biases, self.results, strict=True))

    @property
    def key(self) -> str:
        """What the choice of a tile depends on."""
        sizes = sorted({(weight.shape[0], bias is not None) for weight, bias, _ in self.members})
        return f"many_linears {self.x.dtype} {list(self.x.shape)} {sizes}"

    def tiles(self) -> dict[str, Tile]:
        return {tile.name: tile for tile in (TILES_32_BIT if self.x.dtype is torch.float32 else TILES_16_BIT)}

    def __call__(self, tile: Tile) -> None:
        kinds = [[member for member in self.members if (member[1] is None) is none] for none in (False, True)]
        for kind in kinds:
            for start in range(0, len(kind), MOST):
                self.launch(kind[start : start + MOST], tile)

    def launch(self, members: Sequence[Member], tile: Tile) -> None:
        """One launch; all have a bias, or none has one."""
        M, K = self.x.shape
        weights, biases, results = zip(*members, strict=True)
        Ns = [weight.shape[0] for weight in weights]
        *firsts, count = itertools.accumulate((triton.cdiv(N, tile.BN) for N in Ns), initial=0)
        _many_linears_kernel[(count,)](
            self.x, weights, weights[:1] if biases[0] is None else biases, results,
            tuple(Ns[:1] if len(set(Ns)) == 1 else Ns), tuple(firsts), M, K,
            HAS_BIAS=biases[0] is not None, EVEN_K=K % tile.BK == 0, WIDEN=INTERPRETED,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip


def many_linears_reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The eager twin: `x @ weight.T + bias` of each member. Shapes and dtypes as for `many_linears`."""
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@torch.library.custom_op(
    "ras_compile::many_linears",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
)
def many_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`x @ weight.T + bias` for each weight and bias, in one launch.

    Args:
        x: [..., K], any strides.
        weights: each [N, K], of any N.
        biases: for each weight [N], or None.

    All share one floating-point dtype and device. Returns one [..., N] for each weight, contiguous. Where the kernel does not
    run (on a CPU, in float64, on more than 16 rows, on weights or biases that are not contiguous) the linears run one after
    the other. More than 64 weights, or some with a bias and some without, are more than one launch.

    Raises:
        ValueError: lists of different lengths, other shapes, or different dtypes or devices.
    """
    _check(x, weights, biases)
    if runs_many(x, weights, biases):
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            launch = ManyLaunch(x, weights, biases)
            tile = INTERPRETER_TILE if INTERPRETED else launch.fastest()
            if tile is not None:
                launch(tile)
                return launch.results
    return [result.contiguous() for result in many_linears_reference(x, weights, biases)]


def runs_many(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the Triton kernel computes this; otherwise the eager twin does."""
    operands = [*weights, *(bias for bias in biases if bias is not None)]
    contiguous = all(operand.is_contiguous() and operand.numel() > 0 for operand in operands)
    return runs_triton(x) and bool(weights) and contiguous and 0 < x.numel() <= ROWS * x.shape[-1]


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if len(weights) != len(biases):
        raise ValueError(f"many_linears: a bias or None for each weight; given {len(weights)} and {len(biases)}")
    for weight, bias in zip(weights, biases, strict=True):
        fits = x.ndim >= 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = (
                f"x {list(x.shape)}, weight {list(weight.shape)}, bias {None if bias is None else list(bias.shape)}"
            )
            raise ValueError(f"many_linears: x must be [..., K], each weight [N, K], its bias [N]; given: {shapes}")
        operands = [x, weight] if bias is None else [x, weight, bias]
        if len({(operand.dtype, operand.device) for operand in operands}) > 1:
            kinds = ", ".join(f"{operand.dtype} on {operand.device}" for operand in operands)
            raise ValueError(f"many_linears: x, weights and biases must share one dtype and device; given: {kinds}")


@many_linears.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    _check(x, weights, biases)
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@register_flop_formula(torch.ops.ras_compile.many_linears)
def _many_linears_flops(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    """As for the linears alone."""
    return sum(2 * math.prod(x_shape) * N for N, _ in weight_shapes)
