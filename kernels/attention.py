"""Attention of few queries to many keys, with equal work for all processors.

    y[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, h, j]) v[b, h, j]

because in a sparse step few active tokens attend to the whole cache. Large tiles of queries are then too few: 192 of them
on 132 processors take as long as 264 would. Here tiles are small, and several share a processor. Or else the blocks of keys
of all tiles are numbered through, and each program takes an equal share of them, whole tiles and parts of tiles; who
finishes the last part of a tile puts its parts together (as "stream-K" does for products).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .gemm import INTERPRETED, triton
from .launch import processors
from .tiles import Timed

if triton is not None:
    import triton.language as tl

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Channels of a head. At 128, cuDNN's kernel is faster: 24 heads, 1024 queries, 4608 keys take it 118 us on an H200, this one 137.
WIDEST = 64


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The eager twin. Shapes as for `attention`."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


if triton is not None:

    @triton.jit
    def soften(b_s, b_m, b_l, b_y, scale):
        """One step of the online softmax: what block of scores b_s [BM, BN] does to maximum, sum and result so far."""
        b_n = tl.maximum(b_m, tl.max(b_s, 1) * scale)  # [BM]
        b_p = tl.exp2(b_s * scale - b_n[:, None])  # [BM, BN]
        b_a = tl.exp2(b_m - b_n)  # [BM]
        return b_p, b_n, b_l * b_a + tl.sum(b_p, 1), b_y * b_a[:, None]

    @triton.jit
    def block(x, i_b, i_h, i_n, BN: tl.constexpr, DP: tl.constexpr, WIDEN: tl.constexpr):
        """Block i_n of keys or values, [BN, DP]; zeros past the end."""
        b_x = x.load([i_b, i_h, i_n * BN, 0]).reshape(BN, DP)
        return b_x.to(tl.float32) if WIDEN else b_x

    @triton.jit
    def write(y, b_y, i_b, i_h, o_i, NQ, s_yb, s_yh, s_yn, D: tl.constexpr, DP: tl.constexpr):
        """Stores rows o_i of the result."""
        o_d = tl.arange(0, DP)  # [DP]
        p_y = y + i_b.to(tl.int64) * s_yb + i_h.to(tl.int64) * s_yh + o_i.to(tl.int64)[:, None] * s_yn + o_d[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_i < NQ)[:, None] & (o_d < D)[None, :])

    @triton.jit
    def attention_kernel(
        q, k, v,  # tensor descriptors of [B, H, N, D]
        y, parts, edges, arrived,
        scale,  # times log2(e)
        H, NQ, NK, T_M, T_N, total,
        s_yb, s_yh, s_yn,
        D: tl.constexpr, DP: tl.constexpr, WIDEN: tl.constexpr, SPLIT: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """One program's share of all blocks. Prefixes: i_ an index, o_ offsets, p_ pointers, b_ blocks of values, s_ strides."""
        i_w = tl.program_id(0).to(tl.int64)
        W = tl.num_programs(0)
        i_x = (i_w * total // W).to(tl.int32)
        end = ((i_w + 1) * total // W).to(tl.int32)
        o_m = tl.arange(0, BM)  # [BM]
        o_d = tl.arange(0, DP)  # [DP]
        while i_x < end:
            i_t = i_x // T_N
            first = i_x - i_t * T_N
            last = tl.minimum(T_N, first + end - i_x)
            i_bh = i_t // T_M
            i_m = i_t % T_M
            i_b = i_bh // H
            i_h = i_bh % H
            b_q = block(q, i_b, i_h, i_m, BM, DP, WIDEN)
            b_m = tl.full([BM], -float("inf"), tl.float32)
            b_l = tl.zeros([BM], tl.float32)
            b_y = tl.zeros([BM, DP], tl.float32)
            whole = tl.minimum(last, NK // BN)  # blocks behind this one are cut off by the end
            for i_n in tl.range(first, whole):
                b_s = tl.dot(b_q, block(k, i_b, i_h, i_n, BN, DP, WIDEN).T)
                b_p, b_m, b_l, b_y = soften(b_s, b_m, b_l, b_y, scale)
                b_v = block(v, i_b, i_h, i_n, BN, DP, WIDEN)
                b_y = tl.dot(b_p.to(b_v.dtype), b_v, b_y)
            if whole < last:
                b_s = tl.dot(b_q, block(k, i_b, i_h, whole, BN, DP, WIDEN).T)
                b_s = tl.where((whole * BN + tl.arange(0, BN) < NK)[None, :], b_s, -float("inf"))
                b_p, b_m, b_l, b_y = soften(b_s, b_m, b_l, b_y, scale)
                b_v = block(v, i_b, i_h, whole, BN, DP, WIDEN)
                b_y = tl.dot(b_p.to(b_v.dtype), b_v, b_y)

            if last - first == T_N:
                write(y, b_y / b_l[:, None], i_b, i_h, i_m * BM + o_m, NQ, s_yb, s_yh, s_yn, D, DP)
            elif SPLIT:
                # Parts of this tile are at 2w + 1 of the program that begins it, and at 2w of those that go on.
                x_0 = i_t.to(tl.int64) * T_N
                w_0 = ((x_0 + 1) * W - 1) // total
                w_1 = ((x_0 + T_N) * W - 1) // total
                slot = 2 * i_w + (first == 0)
                tl.store(parts + (slot * BM + o_m)[:, None] * DP + o_d[None, :], b_y, cache_modifier=".cg")
                tl.store(edges + slot * 2 * BM + o_m, b_m, cache_modifier=".cg")
                tl.store(edges + (slot * 2 + 1) * BM + o_m, b_l, cache_modifier=".cg")
                tl.debug_barrier()
                if tl.atomic_add(arrived + i_t, 1) == w_1 - w_0:  # the last one
                    b_m = tl.full([BM], -float("inf"), tl.float32)
                    b_l = tl.zeros([BM], tl.float32)
                    b_y = tl.zeros([BM, DP], tl.float32)
                    for i_o in range(w_0, w_1 + 1):
                        slot = 2 * i_o + (i_o == w_0)
                        b_n = tl.load(edges + slot * 2 * BM + o_m, cache_modifier=".cg")
                        b_k = tl.load(edges + (slot * 2 + 1) * BM + o_m, cache_modifier=".cg")
                        b_z = tl.load(parts + (slot * BM + o_m)[:, None] * DP + o_d[None, :], cache_modifier=".cg")
                        b_o = tl.maximum(b_m, b_n)
                        b_m = tl.exp2(b_m - b_o)
                        b_n = tl.exp2(b_n - b_o)
                        b_l = b_l * b_m + b_k * b_n
                        b_y = b_y * b_m[:, None] + b_z * b_n[:, None]
                        b_m = b_o
                    write(y, b_y / b_l[:, None], i_b, i_h, i_m * BM + o_m, NQ, s_yb, s_yh, s_yn, D, DP)
            i_x += last - first


@dataclass(frozen=True)
class Cut:
    """BM queries and BN keys at a time."""

    BM: int
    BN: int
    warps: int
    stages: int
    # how many programs a processor runs together, each with an equal share of all blocks; 0: one program per tile
    shares: int = 0

    @property
    def name(self) -> str:
        return f"{self.BM}x{self.BN}-w{self.warps}-s{self.stages}" + f"-shares{self.shares}" * bool(self.shares)


# Four warps own all rows of a tile, and several programs share a processor: one computes its softmax while another
# multiplies. With eight warps an H200 needs 1.3 to 1.7 times as long at heads of 64. Each of these is the fastest somewhere,
# for 2 x 24 or 2 x 38 heads, 512 to 2381 queries and 4429 keys.
CUTS = (Cut(64, 128, 4, 2), Cut(64, 128, 4, 3), Cut(64, 64, 4, 3), Cut(64, 128, 4, 3, shares=2))
INTERPRETER_CUT = Cut(16, 16, 4, 1, shares=2)


class Launch(Timed[Cut]):
    """The Triton kernel on checked, non-empty arguments; `launch(cut)` gives the result."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.x = self.q = q
        self.k, self.v, self.scale = k, v, scale

    @property
    def fits(self) -> bool:
        """Whether the kernel takes these: operands that can be loaded in bulk."""
        return all(
            (x.stride(3) == 1 or x.shape[3] == 1)
            and x.data_ptr() % 16 == 0
            and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides(x)[:3])
            for x in (self.q, self.k, self.v)
        )

    @property
    def key(self) -> str:
        """What a timing depends on: how many blocks there are, not the last one's length."""
        (B, H, NQ, D), NK = self.q.shape, self.k.shape[2]
        return f"attention {self.q.dtype} {B * H} {triton.cdiv(NQ, 64)} {triton.cdiv(NK, 64)} {D}"

    def tiles(self) -> dict[str, Cut]:
        return {cut.name: cut for cut in CUTS}

    def __call__(self, cut: Cut) -> Tensor:
        from triton.tools.tensor_descriptor import TensorDescriptor

        (B, H, NQ, D), NK = self.q.shape, self.k.shape[2]
        DP = max(16, triton.next_power_of_2(D))
        T_M, T_N = triton.cdiv(NQ, cut.BM), triton.cdiv(NK, cut.BN)
        tiles = B * H * T_M
        programs = min(processors(self.q.device) * cut.shares, tiles * T_N) if cut.shares else tiles
        split = tiles % programs != 0
        y = result(self.q)
        parts = y.new_empty(2 * programs * cut.BM * DP if split else 1, dtype=torch.float32)
        edges = y.new_empty(4 * programs * cut.BM if split else 1, dtype=torch.float32)
        arrived = torch.zeros(tiles if split else 1, dtype=torch.int32, device=y.device)
        operands = [
            TensorDescriptor(x, list(x.shape), strides(x), [1, 1, rows, DP])
            for x, rows in ((self.q, cut.BM), (self.k, cut.BN), (self.v, cut.BN))
        ]
        attention_kernel[(programs,)](
            *operands, y, parts, edges, arrived, self.scale * math.log2(math.e),
            H, NQ, NK, T_M, T_N, tiles * T_N, *y.stride()[:3],
            D=D, DP=DP, WIDEN=INTERPRETED, SPLIT=split, BM=cut.BM, BN=cut.BN,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        return y


def strides(x: Tensor) -> list[int]:
    """The strides of [B, H, N, D]; that of a dimension of one entry says nothing, and bulk loads are given a multiple of 16."""
    return [stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride(), strict=False)] + [1]


def result(q: Tensor) -> Tensor:
    """Memory for the result, [B, H, Q, D]: tokens outside of heads, so that merging the heads copies nothing."""
    B, H, Q, D = q.shape
    return q.new_empty(B, Q, H, D).transpose(1, 2)


def runs_kernel(q: Tensor) -> bool:
    """Whether the kernel is made for such queries and their device; otherwise the eager twin runs."""
    bulk = INTERPRETED or q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    return triton is not None and q.dtype in KERNEL_DTYPES and q.shape[3] <= WIDEST and bulk


@torch.library.custom_op("ras_compile::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`softmax(scale * q @ k.T) @ v` for each head, without a mask.

    Args:
        q: [B, H, Q, D], any strides.
        k, v: [B, H, N, D], any strides.
        scale: positive factor of the scores, 1 / sqrt(D) as a rule.

    All three share one floating-point dtype and device. Returns [B, H, Q, D] with the strides of a contiguous [B, Q, H, D].
    The Triton kernel runs on GPUs with bulk loads (Hopper and later), in 16 bits, at heads of up to 64 channels that lie side
    by side; elsewhere the eager twin runs (`scaled_dot_product_attention`).

    Raises:
        ValueError: other shapes, different dtypes or devices, or a scale of zero or less.
    """
    check(q, k, v, scale)
    if q.numel() == 0 or k.numel() == 0 or not runs_kernel(q):
        return twin(q, k, v, scale)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        launch = Launch(q, k, v, scale)
        cut = None
        if launch.fits:
            cut = INTERPRETER_CUT if INTERPRETED else launch.fastest()
        return twin(q, k, v, scale) if cut is None else launch(cut)


def twin(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return result(q).copy_(attention_reference(q, k, v, scale))


def check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raises ValueError where `attention` says so."""
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])
    if not fits:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"attention: q must be [B, H, Q, D], k and v [B, H, N, D]; given: {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"attention: q, k and v must share one dtype and device; given: {kinds}")
    if not scale > 0:  # the largest score would not stay the largest
        raise ValueError(f"attention: scale must be positive; given: {scale}")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    check(q, k, v, scale)
    return result(q)


@register_flop_formula(torch.ops.ras_compile.attention)
def _attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """As PyTorch counts attention: two products."""
    return 4 * math.prod(q_shape) * k_shape[2]
