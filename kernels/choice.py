"""Whether a fused op is faster than what it replaces: measured once for a size on a device, and kept on disk."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def measured(args: Sequence[Any]) -> tuple[float, float] | None:
    """Milliseconds of the op and of what it replaces; None where they cannot be had now."""
    x = args[1]
    key = f"pays {[_words(value) for value in args]}"
    store = timings(x.device)
    with store.lock:
        known = store.known.get(key)
        if isinstance(known, list) and len(known) == 2:
            return known[0], known[1]
        if torch.cuda.is_current_stream_capturing():
            return None
        try:
            with torch.cuda.device(x.device), torch.no_grad(), torch.inference_mode(False):
                pair = _measure(args)
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


def _real(value: Tensor) -> Tensor:
    """A tensor of the same sizes and strides, filled with numbers of a usual size."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.normal_() if made.is_floating_point() else made.zero_()
