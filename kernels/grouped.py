"""The grouped scatter-GEMM: several `scatter_linear`s that do not depend on each other, in one launch.

    scatter_linear(cache_0, x_0, weight_0, ...)    # keys
    scatter_linear(cache_1, x_0, weight_1, ...)    # values
    scatter_linear(cache_2, x_1, weight_2, ...)    # keys of the text

becomes

    ras_compile::grouped_scatter_linear([cache_0, cache_1, cache_2], [x_0, x_0, x_1], [weight_0, weight_1, weight_2], ...)

because a product of few rows has fewer tiles than a GPU has processors: one after the other, each leaves some of them idle.
The tiles of all members are numbered through, and a tile looks up which member it belongs to. Weights are read where they
are, so that a changed weight is seen at once. A member whose result is to be compact (the queries) writes into a fresh
tensor, row by row.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import ScatterArguments, check, writes
from .gemm import INTERPRETED, tl, triton
from .launch import GROUP, TILES_HOPPER_GROUPED, Launch, Tile, interpreted_tile, processors, runs_kernel, tiles_for
from .scatter_linear import splice
from .tiles import Timed

MOST = 8  # members of one launch: each has arguments of its own

if triton is not None:
    from .gemm import columns, finish, place, product

    @triton.jit
    def pick(values, i_g):
        """values[i_g]; of one value, that one."""
        picked = values[0]
        for g in tl.static_range(1, len(values)):
            picked = tl.where(i_g == g, values[g], picked)
        return picked

    @triton.jit
    def pick_each(columns, i_g):
        """What member i_g has of each column."""
        picked = ()
        for c in tl.static_range(len(columns)):
            picked += (pick(columns[c], i_g),)  # type: ignore[assignment]  # Triton's tuples are of any length
        return picked

    @triton.jit
    def write_grouped_tile(
        i_p, xs, weights, pointers, numbers, firsts, K,
        KINDS: tl.constexpr, EPILOGUES: tl.constexpr,
        EVEN_K: tl.constexpr, WIDEN: tl.constexpr, TMA: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Tile number i_p of all members together."""
        i_g = 0  # the member
        for g in tl.static_range(1, len(firsts)):
            i_g = tl.where(i_p >= firsts[g], g, i_g)
        x, weight = xs[0], weights[0]
        for g in tl.static_range(1, len(firsts)):
            if i_g == g:
                x, weight = xs[g], weights[g]
        (
            M, N, _, A, S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2, s_xb, s_xa, s_xk, s_wn, s_wk,
            s_bn, s_rb, s_ra, s_nw, s_nb, s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        ) = numbers  # fmt: skip
        M, N, A = pick(M, i_g), pick(N, i_g), pick(A, i_g)

        i_m, i_n = place(i_p - pick(firsts, i_g), M, N, BM, BN, 0, 1, GROUP)
        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        o_n, m_n = columns(i_n, N, BN, 0, 0, 1)
        o_mc = tl.minimum(o_m, M - 1)
        o_b = (o_mc // A).to(tl.int64)  # [BM]
        o_a = (o_mc % A).to(tl.int64)  # [BM]
        b_y = product(
            i_m, i_n, o_b, o_a, o_n, x, weight, N, K, *pick_each((s_xb, s_xa, s_xk, s_wn, s_wk), i_g),
            EVEN_K, WIDEN, TMA, BM, BN, BK,
        )  # fmt: skip
        places = (
            S, G0, G1, C0, C1, eps, s_cb, s_g0, s_g1, s_g2, s_c0, s_c1, s_c2,
            s_bn, s_rb, s_ra, s_nw, s_nb, s_cosb, s_cosa, s_cosk, s_sinb, s_sina, s_sink,
        )  # fmt: skip
        i_e = pick(KINDS, i_g)
        for e in tl.static_range(len(EPILOGUES)):  # members of one kind share its code
            if i_e == e:
                finish(
                    b_y, o_m, o_b, o_a, o_n, m_n, *pick_each(pointers, i_g), M, N, *pick_each(places, i_g),
                    *EPILOGUES[e], BM, BN,
                )  # fmt: skip

    @triton.jit
    def grouped_scatter_linear_kernel(
        # Tensors or tensor descriptors, which Triton takes as arguments of their own only.
        x0, x1, x2, x3, x4, x5, x6, x7,
        weight0, weight1, weight2, weight3, weight4, weight5, weight6, weight7,
        pointers,  # cache, bias, rows, norm_weight, norm_bias, cos, sin: each a tuple with one of each member, or of all
        numbers,  # those of `scatter_linear_kernel` from M on, likewise
        firsts,  # number of each member's first tile
        K, T,
        KINDS: tl.constexpr,  # which of the epilogues each member has
        EPILOGUES: tl.constexpr,  # switches of `finish` from HAS_BIAS to DP
        EVEN_K: tl.constexpr, WIDEN: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One tile of one member per program, or all of them in turns (PERSISTENT)."""
        xs = (x0, x1, x2, x3, x4, x5, x6, x7)
        weights = (weight0, weight1, weight2, weight3, weight4, weight5, weight6, weight7)
        if PERSISTENT:
            for i_p in tl.range(tl.program_id(0), T, tl.num_programs(0), flatten=True):
                write_grouped_tile(
                    i_p, xs, weights, pointers, numbers, firsts, K, KINDS, EPILOGUES,
                    EVEN_K, WIDEN, TMA, BM, BN, BK, GROUP,
                )  # fmt: skip
        else:
            write_grouped_tile(
                tl.program_id(0), xs, weights, pointers, numbers, firsts, K, KINDS, EPILOGUES,
                EVEN_K, WIDEN, TMA, BM, BN, BK, GROUP,
            )  # fmt: skip


SWITCHES = ("HAS_BIAS", "NORM", "NORM_WEIGHT", "NORM_BIAS", "ROPE", "FULL_COS", "FULL_SIN", "D", "DP")


class GroupedLaunch(Timed[Tile]):
    """The Triton kernel on the checked, non-empty arguments of several `scatter_linear`s; `launch(tile)` writes the caches."""

    def __init__(self, members: Sequence[ScatterArguments[Tensor]]) -> None:
        self.members = [Launch(member) for member in members]
        self.x = self.members[0].x
        self.tma = all(member.tma for member in self.members)
        weights = [member.weight for member in self.members]
        self.pointers = [
            filled(column, weights)
            for column in zip(*((member.cache, *member.pointers) for member in self.members), strict=True)
        ]
        self.numbers = tuple(shared(column) for column in zip(*(m.numbers for m in self.members), strict=True))
        epilogues = [tuple(int(member.switches[name]) for name in SWITCHES) for member in self.members]
        self.epilogues = tuple(dict.fromkeys(epilogues))
        self.kinds = tuple(self.epilogues.index(epilogue) for epilogue in epilogues)

    @property
    def fits(self) -> bool:
        """Whether one kernel can run these members: whole tiles of heads, and vectors and tables of one dtype."""
        whole = all(member.D in (0, member.DP) for member in self.members)
        return whole and all(len({pointer.dtype for pointer in column}) == 1 for column in self.pointers)

    @property
    def padded(self) -> int:
        return max(member.DP for member in self.members)

    @property
    def key(self) -> str:
        """What a timing depends on."""
        return f"grouped {[member.key for member in self.members]}"

    def tiles(self) -> dict[str, Tile]:
        M, N = (max(member.sizes[index] for member in self.members) for index in (0, 1))
        tiles = tiles_for(self.x.device, self.x.dtype, M, N, self.padded, bulk=self.tma, hopper=TILES_HOPPER_GROUPED)
        tiles = tiles or tiles_for(self.x.device, self.x.dtype, M, N, self.padded, bulk=self.tma)  # small members
        return {t.name: t for t in tiles if not t.persistent or self.firsts(t)[-1] > processors(self.x.device)}

    def firsts(self, tile: Tile) -> list[int]:
        """The number of each member's first tile, and of all tiles."""
        return list(itertools.accumulate((member.count(tile) for member in self.members), initial=0))

    def __call__(self, tile: Tile) -> None:
        *firsts, count = self.firsts(tile)
        programs = min(count, processors(self.x.device)) if tile.persistent else count
        xs, weights = zip(*(member.operands(tile) for member in self.members), strict=True)
        none = (None,) * (MOST - len(xs))
        K = self.members[0].sizes[2]
        grouped_scatter_linear_kernel[(programs,)](
            *xs, *none, *weights, *none, tuple(self.pointers), self.numbers, tuple(firsts), K, count,
            KINDS=self.kinds, EPILOGUES=self.epilogues,
            EVEN_K=K % tile.BK == 0, WIDEN=INTERPRETED, TMA=tile.tma, PERSISTENT=tile.persistent,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def filled(column: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One tensor of each member, or one for all; a member that has none is given another's, which it does not read."""
    known = next((tensor for tensor in column if tensor is not None), weights[0])
    tensors = tuple(known if tensor is None else tensor for tensor in column)
    return tensors[:1] if all(tensor.data_ptr() == known.data_ptr() for tensor in tensors) else tensors


def shared(column: Sequence[Any]) -> tuple[Any, ...]:
    """One number of each member, or one for all."""
    return tuple(column[:1]) if len(set(column)) == 1 else tuple(column)


@torch.library.custom_op(
    "ras_compile::grouped_scatter_linear",
    mutates_args={"caches"},
    schema="(Tensor(a!)[] caches, Tensor[] xs, Tensor[] weights, Tensor?[] biases, Tensor[] rows, int[] grid_dims,"
    " int[] head_dims, str[] norms, Tensor?[] norm_weights, Tensor?[] norm_biases, float[] eps, str[] ropes,"
    " Tensor?[] cos, Tensor?[] sin) -> ()",
)
def grouped_scatter_linear(*lists: Sequence[Any]) -> None:
    """`scatter_linear` of 1 to 8 members, each with its own arguments, in one launch.

    Args:
        caches, xs, weights, ..: for each argument of `scatter_linear`, in its order, one entry per member. Members share K,
            dtype and device; N, heads, epilogues, rows and strides may differ. What two members write must not overlap,
            and no member's operands may overlap what is written: members have no order.

    Where the kernel cannot take the members together (float64, heads that are no power of two, vectors or tables of several
    dtypes, no tile that was timed), they run one after the other.

    Raises:
        ValueError: lists of different lengths, more members, or one that `scatter_linear` refuses.
        IndexError: a row outside of its cache, on the CPU.
    """
    members = [member for member in checked(lists) if writes(member)]
    if not members:
        return
    x, launch, tile = members[0].x, None, None
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if all(map(runs_kernel, members)) and (launch := GroupedLaunch(members)).fits:
            tile = interpreted_tile(launch.padded) if INTERPRETED else launch.fastest()
        if launch is None or tile is None:
            one_by_one(members)
        else:
            launch(tile)


def one_by_one(members: Sequence[ScatterArguments[Tensor]]) -> None:
    for member in members:
        splice(member)


def checked(lists: Sequence[Sequence[Any]]) -> list[ScatterArguments[Tensor]]:
    """The members' arguments, out of one list for each argument. Raises ValueError where `grouped_scatter_linear` says so."""
    lengths = [len(entries) for entries in lists]
    if len(set(lengths)) != 1 or not 1 <= lengths[0] <= MOST:
        raise ValueError(
            f"grouped_scatter_linear: every list must have one entry per member, 1 to {MOST}; given lengths {lengths}"
        )
    members = [ScatterArguments(*member) for member in zip(*lists, strict=True)]
    for member in members:
        check(member)
    first, *others = xs = [member.x for member in members]
    if any(x.shape[2] != first.shape[2] or x.dtype != first.dtype or x.device != first.device for x in others):
        given = [f"x {x.dtype} {list(x.shape)} on {x.device}" for x in xs]
        raise ValueError(f"grouped_scatter_linear: members must share K, dtype and device; given {given}")
    return members


@grouped_scatter_linear.register_fake
def _(*lists) -> None:
    checked(lists)


@register_flop_formula(torch.ops.ras_compile.grouped_scatter_linear)
def _grouped_scatter_linear_flops(cache_shapes, x_shapes, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    """As for the linears alone."""
    return sum(2 * math.prod(x) * N for x, (N, _) in zip(x_shapes, weight_shapes, strict=True))
