"""Values that are known before any call: what is computed from no input, or from whole numbers among the weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import OpOverload, no_modes

LARGEST_CONSTANT = 2**28  # bytes: what is larger is not computed at compile time
FIXED = "fixed"  # in the meta of a placeholder: its value, which every call of the plan has


def constant(node: fx.Node) -> Tensor | None:
    """The value of a node that is computed from no placeholder, not at random, and not from large tensors; else None.

    A placeholder whose value is fixed is as good as no placeholder.
    """
    found: dict[fx.Node, None] = {}
    left = [node]
    while left:
        one = left.pop()
        if one in found:
            continue
        target, value = one.target, one.meta.get("val")
        if one.op != "call_function" or not (isinstance(target, OpOverload) or target is operator.getitem):
            if one.op != "placeholder" or FIXED not in one.meta:
                return None
        elif isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            return None
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() > LARGEST_CONSTANT:
            return None
        found[one] = None
        left += one.all_input_nodes
    known: dict[fx.Node, Any] = {}
    with no_modes(), torch.no_grad():
        for one in node.graph.nodes:
            if one in found and one.op == "placeholder":
                known[one] = one.meta[FIXED]
            elif one in found:
                args, kwargs = fx.node.map_arg((one.args, one.kwargs), known.__getitem__)
                known[one] = one.target(*args, **kwargs)
    return known[node]
