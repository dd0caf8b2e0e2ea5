"""Layerwise casting (diffusers' `enable_layerwise_casting`): weights are kept in a small type and cast when they are used.

Its hooks change a layer's weights in place before and after each call, at which Dynamo breaks the graph. While a pipeline is
attached, layers cast their weights as values instead, which is the same computation: the cast becomes a part of the program,
and the inner compiler puts it where the weights are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HOOK = "layerwise_casting"
Kept = list[tuple[nn.Module, Any]]


def cast_in_graph(model: nn.Module) -> Kept:
    """Lets the layers of a model that are cast by hooks cast their weights in their forward.

    Layers of other classes than linears and convolutions, and those with other hooks beside, keep theirs.

    Returns:
        The layers and the forwards they had, for :func:`cast_by_hooks`.
    """
    kept: Kept = []
    for layer in model.modules():
        hooks = getattr(getattr(layer, "_diffusers_hook", None), "hooks", {})
        product = _product(layer)
        if list(hooks) == [_HOOK] and product is not None and "forward" in vars(layer):
            kept.append((layer, vars(layer)["forward"]))
            layer.forward = _Casting(layer, product, hooks[_HOOK].compute_dtype)
    return kept


def cast_by_hooks(kept: Kept) -> None:
    """Gives layers back what :func:`cast_in_graph` took from them."""
    for layer, forward in kept:
        layer.forward = forward


def _product(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """A layer's forward as a function of its input and its weights; None for another class."""
    if type(layer).forward is nn.Linear.forward:
        return F.linear
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return layer._conv_forward
    return None


class _Casting:
    """A layer's forward on weights that are cast as values."""

    # what `dispatch.hooks.has_hooks` asks: it computes what the layer's class does, and changes nothing
    traceable = True

    def __init__(self, layer: nn.Module, product: Callable[..., Tensor], dtype: torch.dtype) -> None:
        self.layer, self.product, self.dtype = layer, product, dtype

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        return self.product(x, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))
