"""Small rewrites that leave one spelling for one thing, before layouts are propagated."""

from __future__ import annotations

import torch
from torch import fx

from .registry import Call

aten = torch.ops.aten


def normalize(graph: fx.Graph) -> None:
    """Drops assertions and dead code, and spells causal attention as a mask (the queries will not be all there)."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten._assert_tensor_metadata.default, aten._assert_async.msg):
            graph.erase_node(node)
        elif node.target is aten.scaled_dot_product_attention.default:
            spell_causal_mask(graph, node)
    graph.eliminate_dead_code()


def spell_causal_mask(graph: fx.Graph, node: fx.Node) -> None:
    """`sdpa(q, k, v, is_causal=True)  ->  sdpa(q, k, v, tril(ones(l, s)))`"""
    call = Call(node, {}, None)  # type: ignore[arg-type]
    if not call.args["is_causal"]:
        return
    query, key = (call.args[name].meta["val"] for name in ("query", "key"))
    with graph.inserting_before(node), query.fake_mode:
        shape = [query.shape[-2], key.shape[-2]]
        ones = graph.call_function(aten.ones.default, (shape,), {"dtype": torch.bool, "device": query.device})
        mask = graph.call_function(aten.tril.default, (ones,))
        for made in (ones, mask):
            made.meta["val"] = torch.empty(shape, dtype=torch.bool, device=query.device)
    _, node.args, node.kwargs = call.with_args(attn_mask=mask, is_causal=False)
