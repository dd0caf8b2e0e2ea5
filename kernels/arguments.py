"""What the scatter-GEMM takes: one record of named arguments, and the checks that it must pass."""

import math
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

# float64 is for proofs, not for speed: it always runs the eager twin.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)
NORMS = ("none", "rms", "layer")
ROPES = ("none", "interleaved", "half")
MOST_RUNS = 3  # strides that the kernels have for a grid, and for channels

Operand = TypeVar("Operand")  # a tensor, or the node of a graph that stands for one


class ScatterArguments(NamedTuple, Generic[Operand]):
    """The arguments of `scatter_linear`, which says what they mean, in the order of its schema.

    Operators of PyTorch take arguments one by one: `ScatterArguments(*arguments)` packs them, and `*packed` unpacks them.

    Attributes:
        norm, norm_weight, norm_bias, eps: a norm of each head, its vectors [D] or None.
        rope, cos, sin: a rotary embedding of each head, its tables [B or 1, A, D or D / 2].
    """

    cache: Operand  # [B, *grid, *channels]; the grid has S rows, the channels multiply to N
    x: Operand  # [B, A, K]
    weight: Operand  # [N, K]
    bias: Operand | None  # [N] or None
    rows: Operand  # integers [B or 1, A], each in [0, S)
    grid_dims: int = 1  # how many dimensions the grid has
    head_dim: int = 0  # D, the channels of a head
    norm: str = "none"
    norm_weight: Operand | None = None
    norm_bias: Operand | None = None
    eps: float = 0.0
    rope: str = "none"
    cos: Operand | None = None
    sin: Operand | None = None


def check(given: ScatterArguments[Tensor]) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are those that `scatter_linear` documents."""
    cache, x, weight, bias, rows, grid_dims, head_dim, norm, norm_weight, norm_bias, _, rope, cos, sin = given
    tensors = {name: value for name, value in given._asdict().items() if isinstance(value, Tensor)}

    def require(condition: bool, allowed: str) -> None:
        if not condition:
            words = ", ".join(f"{name} {t.dtype} {list(t.shape)} on {t.device}" for name, t in tensors.items())
            options = f"grid_dims={grid_dims}, head_dim={head_dim}, norm={norm!r}, rope={rope!r}"
            raise ValueError(f"scatter_linear: {allowed}; given: {words}, {options}")

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
        max(len(runs(cache, 1, middle)), len(runs(cache, middle))) <= MOST_RUNS,
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


def writes(given: ScatterArguments[Tensor]) -> bool:
    """Whether there is anything to write. Raises IndexError for a row outside of the cache, on the CPU."""
    cache, rows = given.cache, given.rows
    if cache.numel() == 0 or rows.numel() == 0:
        return False
    S = math.prod(cache.shape[1 : 1 + given.grid_dims])
    if rows.device.type == "cpu" and not (rows.min() >= 0 and rows.max() < S):
        raise IndexError(f"scatter_linear: rows must be in [0, {S}), given {rows.min()} to {rows.max()}")
    return True


def runs(tensor: Tensor, first: int, last: int | None = None) -> list[tuple[int, int]]:
    """Dims [first, last) as (size, stride), outermost first; neighbours that are one run in memory are merged."""
    return joined(zip(tensor.shape[first:last], tensor.stride()[first:last], strict=True))


def joined(dims: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same (size, stride) with as few of them as possible."""
    found: list[tuple[int, int]] = []
    for size, stride in dims:
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        elif size != 1:
            found.append((size, stride))
    return found


def three_runs(tensor: Tensor, first: int, last: int | None = None) -> list[tuple[int, int]]:
    """The runs innermost first, as many as the kernels have: those that are missing have one entry."""
    found = runs(tensor, first, last)[::-1]
    return found + [(1, 0)] * (MOST_RUNS - len(found))
