"""Whether a fused op is faster than what it replaces: measured once for a size on a device, and kept on disk."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather_linear import Launch as GatherLaunch
from .launch import Launch, runs_kernel
from .tiles import milliseconds, timings


def pays(ops: Sequence[Sequence[Any]]) -> bool:
    """Whether these `scatter_linear` ops together are faster than linears (cuBLAS) and one pass over their results.

    The pass reads each result and writes it elsewhere, without an index, a norm or a rotation: no code that Inductor
    writes for the rest of a site is faster. So a site is fused only where that saves time.

    Args:
        ops: arguments of each op, as it takes them; of the tensors only sizes, strides, dtypes and devices count.
    """
    fused = plain = 0.0
    for args in ops:
        x, args = args[1], (*args, *_DEFAULTS[len(args) - 5 :])
        if not runs_kernel(x, args[6], args[7], args[11]):  # head_dim, norm, rope
            return False
        if not x.is_cuda:  # the interpreter: nothing to measure
            continue
        pair = measured(args)
        if pair is None:
            return False
        fused, plain = fused + pair[0], plain + pair[1]
    return fused <= plain


# Of the arguments behind the rows.
_DEFAULTS = (1, 0, "none", None, None, 0.0, "none", None, None)


def gather_pays(ops: Sequence[Sequence[Any]]) -> bool:
    """Whether these `gather_linear` ops together are faster than a copy of the active rows and a linear (cuBLAS).

    No gather that Inductor writes is faster than a copy of rows that lie side by side, no convolution over patches faster
    than the linear, and a table is added in a pass that Inductor makes anyway.

    Args:
        ops: arguments of each op, as it takes them; of the tensors only sizes, strides, dtypes and devices count.
    """
    fused = plain = 0.0
    for args in ops:
        if not runs_kernel(args[0]):
            return False
        if not args[0].is_cuda:  # the interpreter: nothing to measure
            continue
        key = f"gather pays {[_words(value) for value in args]}"
        pair = remembered(key, args[0].device, partial(_measure_gather, args))
        if pair is None:
            return False
        fused, plain = fused + pair[0], plain + pair[1]
    return fused <= plain


def measured(args: Sequence[Any]) -> tuple[float, float] | None:
    """Milliseconds of a `scatter_linear` and of what it replaces; None where they cannot be had now."""
    return remembered(f"pays {[_words(value) for value in args]}", args[1].device, lambda: _measure(args))


def remembered(
    key: str, device: torch.device, measure: Callable[[], tuple[float, float]]
) -> tuple[float, float] | None:
    """What ``measure`` gives, or gave on this device before; None where it cannot be had now."""
    store = timings(device)
    with store.lock:
        known = store.known.get(key)
        if isinstance(known, list) and len(known) == 2:
            return known[0], known[1]
        if torch.cuda.is_current_stream_capturing():
            return None
        try:
            with torch.cuda.device(device), torch.no_grad(), torch.inference_mode(False):
                pair = measure()
        except torch.OutOfMemoryError:
            return None
        if not all(map(math.isfinite, pair)):
            pair = (1.0, 0.0)  # no tile runs here
        store.add(key, list(pair))
        return pair


def _words(value: Any) -> object:
    return (str(value.dtype), tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value


def _measure(args: Sequence[Any]) -> tuple[float, float]:
    cache, x, weight, bias, rows, grid_dims, *rest = (
        _real(value) if isinstance(value, Tensor) else value for value in args
    )
    places = math.prod(cache.shape[1 : 1 + grid_dims])
    for row in rows:
        row.copy_(torch.randperm(places, device=rows.device)[: rows.shape[1]])
    launch = Launch(cache, x, weight, bias, rows, grid_dims, *rest)
    tile = launch.fastest()
    if tile is None:
        return math.inf, 0.0
    result = F.linear(x, weight, bias)
    copy = torch.empty_like(result)
    return (
        milliseconds(lambda: launch(tile)),
        milliseconds(lambda: torch.neg(F.linear(x, weight, bias), out=copy)),
    )


def _measure_gather(args: Sequence[Any]) -> tuple[float, float]:
    x, weight, bias, rows, *rest = (_real(value) if isinstance(value, Tensor) else value for value in args)
    places = math.prod(x.shape[1 : 1 + (rest or [1])[0]])
    for row in rows:
        row.copy_(torch.randperm(places, device=rows.device)[: rows.shape[1]])
    launch = GatherLaunch(x, weight, bias, rows, *rest)
    tile = launch.fastest()
    if tile is None:
        return math.inf, 0.0
    taken = torch.randn(*launch.lead, weight.shape[1], dtype=x.dtype, device=x.device)
    copy = torch.empty_like(taken)
    return (
        milliseconds(lambda: launch(tile)),
        milliseconds(lambda: F.linear(torch.neg(taken, out=copy), weight, bias)),
    )


def _real(value: Tensor) -> Tensor:
    """A tensor of the same sizes and strides, filled with numbers of a usual size."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.normal_() if made.is_floating_point() else made.zero_()
