"""Which of PyTorch's functions read values of tensors, and which of their operands they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Functions that give Python values of their first operand.
VALUES = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__complex__, Tensor.__contains__, Tensor.is_nonzero, torch.is_nonzero, Tensor.equal,
    torch.equal, Tensor.allclose, torch.allclose, Tensor.__repr__, Tensor.__format__,
}  # fmt: skip
# The names of those that a subclass of tensors can answer by methods of its own.
ANSWERED = {function.__name__ for function in VALUES if hasattr(Tensor, function.__name__)}
# Functions whose result has a size that depends on the values of their first operand.
SIZES = {
    torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, Tensor.unique, torch.unique,
    Tensor.unique_consecutive, torch.unique_consecutive, torch.bincount, Tensor.bincount,
}  # fmt: skip
# Functions whose arguments are sizes; the first argument of those that are no factories is what they work on.
FACTORIES = {torch.zeros, torch.ones, torch.empty, torch.arange, torch.linspace}
SIZED = FACTORIES | {
    Tensor.reshape, torch.reshape, Tensor.view, Tensor.expand, Tensor.repeat, Tensor.tile, torch.tile, Tensor.unflatten,
    torch.unflatten, Tensor.narrow, torch.narrow, Tensor.split, torch.split, Tensor.chunk, torch.chunk,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, torch.nn.functional.pad,
}  # fmt: skip
# Functions that index, mask or repeat: an operand of theirs decides what the result holds.
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
MASKING = (torch.masked_select, Tensor.masked_select)
REPEATING = (torch.repeat_interleave, Tensor.repeat_interleave)
# Functions that pick or write the places of an index tensor: where those are a run, they become slices (if asked to).
PICKING = {
    *INDEXING, Tensor.index_select, torch.index_select, Tensor.index_copy,
    torch.index_copy, Tensor.index_copy_, Tensor.index_add, torch.index_add, Tensor.index_add_, Tensor.scatter_add,
    torch.scatter_add, Tensor.scatter_add_,
}  # fmt: skip


def readers(function: Callable, args: tuple, kwargs: dict) -> list[Tensor] | None:
    """The tensors whose values decide the result, or its size, of a call; None where there are none."""
    if function in VALUES:
        return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if function in SIZES or (function is torch.where and len(args) + len(kwargs) == 1):
        return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:1]
    if function in INDEXING:
        return [place for place in places(args[1]) if place.dtype in (torch.bool, torch.uint8)] or None
    if function in MASKING:
        return [args[1] if len(args) > 1 else kwargs["mask"]]
    if function in REPEATING:
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
        return [repeats] if isinstance(repeats, Tensor) else None
    return None


def index_of(function: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """The index tensor of a call whose places may be a run; None where there is none."""
    if function not in PICKING:
        return None
    if function in INDEXING:
        found = places(args[1])
        index = found[0] if len(found) == 1 else None
    else:
        index = args[2] if len(args) > 2 else kwargs.get("index")
    rank = 2 if function.__name__.startswith("scatter_add") else 1
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype is torch.bool:
        return None
    return index if index.ndim == rank and len(index) > 1 else None


def run_of(index: Tensor) -> slice | None:
    """The places of an index tensor as a slice, where they follow one another (in each column, for a matrix)."""
    first = int(index.flatten()[0])
    wanted = torch.arange(first, first + len(index), device=index.device).reshape(-1, *[1] * (index.ndim - 1))
    return slice(first, first + len(index)) if first >= 0 and bool((index == wanted).all()) else None


def pick_run(function: Callable, args: tuple, kwargs: dict, run: slice) -> Any:
    """``function`` with a slice in place of its index tensor."""
    if function in INDEXING:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return function(args[0], tuple(run if isinstance(place, Tensor) else place for place in index), *args[2:])
    name = function.__name__
    words = ("dim", "index", "src") if name.startswith("scatter") else ("dim", "index", "source")
    given = {**dict(zip(words, args[1:], strict=False)), **kwargs}
    value, dim, count = args[0], given["dim"], run.stop - run.start
    if name == "index_select":
        return value.narrow(dim, run.start, count)
    result = value if name.endswith("_") else value.clone()
    part = result.narrow(dim, run.start, count)
    if "copy" in name:
        part.copy_(given["source"])
    else:
        part.add_(given[words[2]], alpha=given.get("alpha", 1))
    return result


def parts(place: slice) -> tuple[Any, Any, Any]:
    return place.start, place.stop, place.step


def places(index: Any) -> list[Tensor]:
    """The tensors in an index."""
    return [place for place in (index if isinstance(index, tuple) else (index,)) if isinstance(place, Tensor)]
