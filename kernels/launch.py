"""Launching a scatter-GEMM: the tiles into which it may be cut, and the numbers that the kernel takes for given tensors."""

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm
from .arguments import KERNEL_DTYPES, NORMS, ROPES, ScatterArguments, three_runs
from .gemm import INTERPRETED, triton
from .tiles import Timed


@dataclass(frozen=True)
class Tile:
    """One way to cut the product: tiles of BM x BN, BK channels at a time; `tma`: Hopper's bulk loads; `persistent`:
    one program per processor walks over the tiles, and a tile's stores overlap the next one's loads; `two_launches`:
    cuBLAS computes the product, and a second launch finishes it, in such tiles."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    tma: bool = False
    persistent: bool = False
    two_launches: bool = False

    @property
    def name(self) -> str:
        flags = "-tma" * self.tma + "-persistent" * self.persistent + "-two-launches" * self.two_launches
        return f"{self.BM}x{self.BN}x{self.BK}-w{self.warps}-s{self.stages}{flags}"


# Tensor-core tiles for Ampere and Hopper, large to small; those that need more shared memory than the device has drop
# out when they are timed. All have at least the 64 rows of Hopper's instruction and add up K in one order, so that a
# result does not depend on which one was fastest (beyond a rounding of the product, where it is computed in a launch of its own).
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
# which takes minutes where it has a norm or a rotary embedding: it is offered without them only. Without them ptxas takes
# 20 s for 128x256 persistent, 5 s for 128x128 persistent, 3 s and 1 s for the plain ones: the slowest decides a cold start.
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
# A grouped launch fills the device whatever the tile. Three products of 1024 x 1536 x 1536 take 44 us with this one on an
# H200 (torch 2.11, Triton 3.6), 58 us with 128x256 and 75 us with a persistent 128x128.
TILES_HOPPER_GROUPED = (Tile(128, 128, 64, 4, 3, tma=True),)
# Where there is a norm or a rotary embedding, cuBLAS and one pass over its result may be faster than one launch: no power of
# two cuts every product into as many tiles as there are processors. FLUX's key of 1024 rows takes 34 us so on an H200, 45 us
# in one launch, and 43 us as Inductor makes it (torch 2.11, Triton 3.6).
TILES_TWO_LAUNCHES = (
    Tile(16, 256, 0, 4, 1, two_launches=True),
    Tile(32, 128, 0, 4, 1, two_launches=True),
    Tile(8, 256, 0, 4, 1, two_launches=True),
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
GROUP = 8  # tile rows whose tiles are neighbours in time
WIDEST = 256  # columns of a tile, and so the largest head that has an epilogue in the kernel


def tiles_for(
    device: torch.device,
    dtype: torch.dtype,
    M: int,
    N: int,
    padded: int = 1,
    *,
    bulk: bool = False,
    hopper: tuple[Tile, ...] = TILES_HOPPER,
) -> list[Tile]:
    """The tiles that may be fastest: whole heads, and not more than twice as large as the output.

    Args:
        padded: columns of a head in a tile; 1 without an epilogue.
        bulk: the operands can be loaded in bulk, where the device can.
        hopper: the tiles where it can.
    """
    tiles: tuple[Tile, ...] = TILES_16_BIT
    if dtype is torch.float32:
        tiles = TILES_32_BIT
    elif bulk and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        tiles = hopper if padded == 1 else tuple(tile for tile in hopper if not tile.persistent)
    high, wide = max(2 * M, 64), max(2 * N, 64, padded)
    return [tile for tile in tiles if high >= tile.BM and wide >= tile.BN and tile.BN % padded == 0]


def padded_head(head_dim: int, rope: str) -> int:
    """The columns that a head takes in a tile."""
    if head_dim == 0:
        return 1
    return 2 * _power(head_dim // 2) if rope != "none" else _power(head_dim)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def can_tma(x: Tensor, weight: Tensor) -> bool:
    """Bulk loads read rows of a matrix: one stride between all rows, channels side by side, addresses in 16 bytes."""
    one_matrix = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    dense = x.stride(2) == 1 and weight.stride(1) == 1
    aligned = all(
        t.data_ptr() % 16 == 0 and t.stride(-2) * t.element_size() % 16 == 0 and t.stride(-2) >= t.shape[-1]
        for t in (x, weight)
    )
    return one_matrix and dense and aligned


class Numbers(
    namedtuple(
        "Numbers",
        "M N K A S G0 G1 C0 C1 eps s_cb s_g0 s_g1 s_g2 s_c0 s_c1 s_c2 s_xb s_xa s_xk s_wn s_wk s_bn s_rb s_ra s_nw s_nb "
        "s_cosb s_cosa s_cosk s_sinb s_sina s_sink",
    )
):
    """The numbers that `scatter_linear_kernel` takes behind its tensors, in the order and under the names of its parameters.

    Its comments say what each of them is. Strides (s_) of what is absent, or shared by all samples, are zero.
    """

    @staticmethod
    def of(given: ScatterArguments[Tensor]) -> "Numbers":
        """The numbers of checked arguments."""
        cache, x, weight, rows, middle = given.cache, given.x, given.weight, given.rows, 1 + given.grid_dims
        (B, A, K), N = x.shape, weight.shape[0]
        grid, channels = three_runs(cache, 1, middle), three_runs(cache, middle)

        def sample(tensor: Tensor) -> int:
            return 0 if tensor.shape[0] == 1 else tensor.stride(0)

        def vector(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.stride(0)

        def table(tensor: Tensor | None) -> tuple[int, int, int]:
            return (0, 0, 0) if tensor is None else (sample(tensor), tensor.stride(1), tensor.stride(2))

        return Numbers._make([
            B * A, N, K, A, math.prod(cache.shape[1:middle]),
            grid[0][0], grid[1][0], channels[0][0], channels[1][0], given.eps,
            cache.stride(0), *(stride for _, stride in grid), *(stride for _, stride in channels),
            *x.stride(), *weight.stride(), vector(given.bias), sample(rows), rows.stride(1),
            vector(given.norm_weight), vector(given.norm_bias), *table(given.cos), *table(given.sin),
        ])  # fmt: skip


# What `splice_kernel` does without: it is given the product, row by row.
OF_THE_PRODUCT = {"K", "s_xb", "s_xa", "s_xk", "s_wn", "s_wk", "s_bn"}
OF_THE_SPLICE = [name for name in Numbers._fields if name not in OF_THE_PRODUCT]


class Launch(Timed[Tile]):
    """The Triton kernel on checked, non-empty arguments; `launch(tile)` writes the cache."""

    def __init__(self, given: ScatterArguments[Tensor]) -> None:
        self.cache, self.x, self.weight, self.numbers = given.cache, given.x, given.weight, Numbers.of(given)
        self.sizes = self.numbers.M, self.numbers.N, self.numbers.K
        self.D = 0 if given.norm == given.rope == "none" else given.head_dim
        self.DP = padded_head(self.D, given.rope)
        self.tma = self.D in (0, self.DP) and can_tma(given.x, given.weight)
        self.pointers = (given.bias, given.rows, given.norm_weight, given.norm_bias, given.cos, given.sin)
        self.switches = dict(
            HAS_BIAS=given.bias is not None,
            NORM=NORMS.index(given.norm),
            NORM_WEIGHT=given.norm_weight is not None,
            NORM_BIAS=given.norm_bias is not None,
            ROPE=ROPES.index(given.rope),
            FULL_COS=given.cos is not None and given.cos.shape[-1] == given.head_dim,
            FULL_SIN=given.sin is not None and given.sin.shape[-1] == given.head_dim,
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
        """The tiles to time, each of which costs seconds to build.

        None that leaves more than half of the processors idle, if a smaller one does not; a persistent one, which takes
        ptxas several times as long, only where it has more than one tile to walk over.
        """
        M, N, _ = self.sizes
        offered = tiles_for(self.x.device, self.x.dtype, M, N, self.DP, bulk=self.tma)
        fewest = processors(self.x.device) / 2
        enough = [tile for tile in offered if self.count(tile) >= fewest]
        if not enough:
            most = max(map(self.count, offered), default=0)
            enough = [tile for tile in offered if self.count(tile) == most]
        enough = [tile for tile in enough if not tile.persistent or self.count(tile) > 2 * fewest]
        if self.D and self.x.element_size() == 2:
            enough += [tile for tile in TILES_TWO_LAUNCHES if tile.BN % self.DP == 0]
        return {tile.name: tile for tile in enough}

    def count(self, tile: Tile) -> int:
        """How many tiles there are."""
        M, N, _ = self.sizes
        per_tile = tile.BN // self.DP * self.D if self.D else tile.BN
        return triton.cdiv(M, tile.BM) * triton.cdiv(N, per_tile)

    def operands(self, tile: Tile) -> tuple[Any, Any]:
        """x and weight as the kernel loads them."""
        x, weight = self.x, self.weight
        if tile.tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            M, N, K = self.sizes
            x = TensorDescriptor(x, [M, K], [x.stride(1), 1], [tile.BM, tile.BK])
            weight = TensorDescriptor(weight, [N, K], [weight.stride(0), 1], [tile.BN, tile.BK])
        return x, weight

    def __call__(self, tile: Tile) -> None:
        if tile.two_launches:
            self._two_launches(tile)
            return
        count = self.count(tile)
        programs = min(count, processors(self.x.device)) if tile.persistent else count
        pointers = [self.weight if pointer is None else pointer for pointer in self.pointers]
        gemm.scatter_linear_kernel[(programs,)](
            self.cache, *self.operands(tile), *pointers, *self.numbers, count,
            **self.switches,
            EVEN_K=self.sizes[2] % tile.BK == 0, TMA=tile.tma, PERSISTENT=tile.persistent,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _two_launches(self, tile: Tile) -> None:
        """The product by cuBLAS, then one pass over it."""
        bias, *others = self.pointers
        y = F.linear(self.x, self.weight, bias).contiguous()
        pointers = [y if pointer is None else pointer for pointer in others]
        numbers = [getattr(self.numbers, name) for name in OF_THE_SPLICE]
        switches = {name: value for name, value in self.switches.items() if name not in ("HAS_BIAS", "WIDEN", "GROUP")}
        gemm.splice_kernel[(self.count(tile),)](
            self.cache, y, *pointers, *numbers,
            **switches, BM=tile.BM, BN=tile.BN, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def runs_triton(x: Tensor) -> bool:
    """Whether Triton kernels of this package run on such a tensor; otherwise the eager twin of an op does."""
    return triton is not None and x.dtype in KERNEL_DTYPES and (x.is_cuda or INTERPRETED)


def runs_kernel(given: ScatterArguments[Tensor]) -> bool:
    """Whether the scatter-GEMM's kernel computes this: its tiles hold whole heads."""
    D, rope = given.head_dim, given.rope
    fits = given.norm == rope == "none" or (rope == "none" or D >= 2) and padded_head(D, rope) <= WIDEST
    return fits and runs_triton(given.x)


def interpreted_tile(padded: int) -> Tile:
    tile = INTERPRETER_TILE
    return Tile(tile.BM, max(tile.BN, padded), tile.BK, tile.warps, tile.stages)
