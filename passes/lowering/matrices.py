"""Linears on matrices: `b n c -> (b n) c` before each linear of more dimensions, and back behind it.

    y = linear(x, w, b)      becomes      y = reshape(linear(reshape(x, [2 * 77, 64]), w, b), [2, 77, 128])

It is what the inner compiler makes of a linear anyway. In a repeated block that writes into caches (`outline.py`) PyTorch
2.13 asks for the plain sizes of a linear's operand where it has more than two dimensions, which fixes a symbolic one.
"""

from __future__ import annotations

import math

import torch
from torch import fx

aten = torch.ops.aten


def flatten_linears(graph: fx.Graph) -> int:
    """Rewrites every linear of more than two dimensions; returns how many there were."""
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.linear.default)):
        x, *others = node.args
        value, result = x.meta["val"], node.meta["val"]
        if value.ndim < 3:
            continue
        rows = math.prod(value.shape[:-1])
        with graph.inserting_before(node):
            flat = graph.call_function(aten.reshape.default, (x, [rows, value.shape[-1]]))
            product = graph.call_function(aten.linear.default, (flat, *others), node.kwargs)
            whole = graph.call_function(aten.reshape.default, (product, list(result.shape)))
        flat.meta = {**node.meta, "val": value.new_empty(rows, value.shape[-1])}
        product.meta = {**node.meta, "val": result.new_empty(rows, result.shape[-1])}
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
        count += 1
    return count
