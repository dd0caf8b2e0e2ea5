"""What treats each token alone and is run as it is: `... c -> ... d`, one op for a whole module, or one of another library.

Experts that are chosen by values cannot be captured: how many tokens an expert gets hangs on the latent. From outside, such
a part is an op like a linear layer, that can be given any tokens: in a sparse step it is given the active ones. So is a product
with a weight that its library has packed, and alone can read.
"""

from __future__ import annotations

import itertools
import threading
import weakref

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ras_compile.passes.algebra.layout import Layout, opaque
from ras_compile.passes.rules.contraction import grid_atoms
from ras_compile.passes.rules.registry import Call, Step, rule_for, rule_for_name
from ras_compile.passes.rules.resampling import exclude
from ras_compile.passes.rules.views import only_layout

# The parts by the numbers that stand in the graphs: an op's arguments are tensors and numbers. Small ones, in the order in
# which models are captured, so that what is compiled for one process is found by the next.
_PARTS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_COUNT = itertools.count()


class _Here(threading.local):
    running = False  # whether this thread runs a part as it is


here = _Here()


def weights_of(part: nn.Module) -> dict[str, Tensor]:
    """The weights of a part by name, in the order in which the op takes them."""
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


def number_of(part: nn.Module) -> int:
    """The number by which :func:`token_wise` knows a part."""
    number = next((number for number, known in _PARTS.items() if known is part), None)
    if number is None:
        number = next(_COUNT)
        _PARTS[number] = part
    return number


@torch.library.custom_op("ras_compile::token_wise", mutates_args=())
def token_wise(x: Tensor, weights: list[Tensor], part: int, width: int) -> Tensor:
    """`... c -> ... d`: a module, called as it is.

    Args:
        x: tokens [..., C].

    Raises:
        TypeError: the module returns something else than a tensor.
    """
    module, before = _PARTS[part], here.running
    x = x.contiguous()  # active rows may stand apart, where code wants a view
    own = weights_of(module)
    here.running = True
    try:
        if all(mine is given for mine, given in zip(own.values(), weights, strict=True)):
            result = module(x)
        else:
            result = functional_call(module, dict(zip(own, weights, strict=True)), (x,))
    finally:
        here.running = before
    if not isinstance(result, Tensor):
        raise TypeError(f"returns a {type(result).__name__}, and no tensor")
    return result.clone() if result is x else result


@token_wise.register_fake
def _shape(x: Tensor, weights: list[Tensor], part: int, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


PACKED = ("bitsandbytes::gemm_4bit", "quanto::qbytes_mm")  # products with a packed weight


@rule_for_name(*PACKED)
def packed(call: Call) -> Step:
    """`... c -> ... d`"""
    return _alone(call, only_layout(call, "A"))


@rule_for(torch.ops.ras_compile.token_wise.default)
def alone(call: Call) -> Step:
    """`... c -> ... d`"""
    return _alone(call, only_layout(call, "x"))


def _alone(call: Call, layout: Layout) -> Step:
    last = len(layout.dims) - 1
    if layout.raw:
        exclude(call, [layout.dims[last]])
    if grid_atoms(call, [layout.dims[last]]):
        return call.whole()
    return Step(layout.replace(last, opaque(call.shape[-1])), call.uses())
