"""Linears on matrices: `b n c -> (b n) c` before each linear of more dimensions, and back behind it.

    y = linear(x, w, b)      becomes      y = reshape(linear(reshape(x, [2 * 77, 64]), w, b), [2, 77, 128])

It is what the inner compiler makes of a linear anyway. In a repeated block that writes into caches (`outline.py`) PyTorch
2.13 asks for the plain sizes of a linear's operand where it has more than two dimensions, which fixes a symbolic one.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ras_compile.passes.analysis.emit import Emitter

aten = torch.ops.aten


def flatten_linears(graph: fx.Graph) -> int:
    """Rewrites every linear of more than two dimensions; returns how many there were."""
    emit, count = Emitter.of(graph), 0
    for node in list(graph.find_nodes(op="call_function", target=aten.linear.default)):
        x, *others = node.args
        value = x.meta["val"]
        if value.ndim < 3:
            continue
        rows = math.prod(value.shape[:-1])
        with graph.inserting_before(node):
            flat = emit.like(node, aten.reshape.default, x, [rows, value.shape[-1]])
            product = emit.like(node, aten.linear.default, flat, *others, **node.kwargs)
        emit.instead(node, aten.reshape.default, product, list(node.meta["val"].shape))
        count += 1
    return count
