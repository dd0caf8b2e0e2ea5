"""Attention of few queries: in a sparse program, attention without a mask becomes our op for it where that is faster.

    y = scaled_dot_product_attention(q, k, v)      # q [B, H, A, D] of the active tokens, k and v [B, H, N, D] whole

becomes

    y = ras_compile::attention(q, k, v, scale)
"""

from __future__ import annotations

import torch
from torch import fx

from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.fusion.choices import Asked
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.rules.registry import named_arguments

aten = torch.ops.aten


def fuse_attention(graph: fx.Graph, fusion: Fusion) -> int:
    """Replaces what the choice accepts of a sparse program; returns how many there were.

    It does not fire with a mask, causally, with dropout, where heads share keys, outside of four dimensions, with a scale of
    zero or less, or where dtypes differ or are not the fused ones.
    """
    pays = Asked(fusion.attention_pays)
    emit, count = Emitter.of(graph), 0
    for node in list(graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)):
        given = named_arguments(node)
        operands = [given[name] for name in ("query", "key", "value")]
        q, k, v = (operand.meta["val"] for operand in operands)
        plain = given["attn_mask"] is None and not given["is_causal"] and not given["dropout_p"]
        shapes = q.dim() == 4 and k.shape == v.shape and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])
        kinds = {q.dtype, k.dtype, v.dtype}
        if not plain or not shapes or len(kinds) != 1 or not kinds <= set(fusion.dtypes):
            continue
        scale = given["scale"] if given["scale"] is not None else q.shape[3] ** -0.5
        if not scale > 0:
            continue
        args = (*operands, float(scale))
        if not pays(args):
            continue
        emit.instead(node, torch.ops.ras_compile.attention.default, *args)
        count += 1
    return count
