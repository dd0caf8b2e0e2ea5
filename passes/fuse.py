"""The scatter-GEMM peephole: a linear that only feeds a splice writes straight into the cache.

    y = linear(x, w, b)                       # [B, A, N]
    v = permute(transpose(view(y)))           # views that leave the entries in order: [B, A, H, D]
    index_put_(permute(cache), (batch, rows), v)

becomes

    ras_compile::scatter_linear(permute(cache), x, w, b, rows)

because a GEMM may put its output tiles anywhere, so the product need not go through memory twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

VIEWS = (aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
         aten.unsqueeze.default, aten.squeeze.dim, aten.dropout.default, aten.alias.default)  # fmt: skip


@dataclass(frozen=True)
class Match:
    """A splice whose values are a linear's result, row by row."""

    linear: fx.Node
    cache: fx.Node  # the addressed view of the cache: [B, S, ...], or [S, B = 1, ...]
    samples_first: bool


def fuse_scatter_linear(graph: fx.Graph, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)) -> int:
    """Replaces every `linear -> splice` of these dtypes; returns how many there were.

    It does not fire where the linear's result has another use, where the splice addresses more than samples and rows
    (pixels of a patch), or where dtypes differ (a custom op is not under autocast).
    """
    rows = next(node for node in graph.nodes if node.op == "placeholder" and node.name == "rows")
    count = 0
    for put in list(graph.find_nodes(op="call_function", target=aten.index_put_.default)):
        match = find(put, rows)
        if match is None:
            continue
        x, weight, bias = (*match.linear.args, None)[:3]
        operands = [match.cache, x, weight, *([bias] if bias is not None else [])]
        if len({operand.meta["val"].dtype for operand in operands}) != 1 or x.meta["val"].dtype not in dtypes:
            continue
        with graph.inserting_before(put):
            view, given = match.cache, x
            if not match.samples_first:
                view = made(graph, aten.transpose.int, match.cache, 0, 1)
            if x.meta["val"].ndim == 2:
                given = made(graph, aten.unsqueeze.default, x, 0)
            fused = graph.call_function(torch.ops.ras_compile.scatter_linear.default, (view, given, weight, bias, rows))
            fused.meta = {**match.linear.meta, "val": None}
        graph.erase_node(put)
        count += 1
    graph.eliminate_dead_code()
    return count


def made(graph: fx.Graph, target, operand: fx.Node, *args: int) -> fx.Node:
    node = graph.call_function(target, (operand, *args))
    node.meta["val"] = target(operand.meta["val"], *args)
    return node


def find(put: fx.Node, rows: fx.Node) -> Match | None:
    """The match of one `index_put_`, or None."""
    cache, indices, values = put.args[:3]
    samples_first = len(indices) == 2
    if not (
        counts_rows(indices[-1], rows) if samples_first else len(indices) == 1 and counts_only_sample(indices[0], rows)
    ):
        return None
    node: Any = values
    while node.target in VIEWS:
        if len(node.users) != 1 or not same_memory(node, node.args[0]):
            return None
        node = node.args[0]
    if node.target is not aten.linear.default or len(node.users) != 1:
        return None
    product, value = node.meta["val"], values.meta["val"]
    lead = tuple(rows.meta["val"].shape) if samples_first else (rows.meta["val"].shape[1], 1)
    in_order = value.is_contiguous() and product.is_contiguous() and tuple(value.shape[: len(lead)]) == lead
    if not in_order or (samples_first and not is_sample_index(indices[0])):
        return None
    if product.numel() != rows.meta["val"].numel() * product.shape[-1] or product.ndim > 3:
        return None
    return Match(node, cache, samples_first)


def same_memory(first: fx.Node, second: fx.Node) -> bool:
    """Whether a node is a view of its operand (a reshape may be a copy, which has the entries in another order)."""
    a, b = first.meta["val"], second.meta["val"]
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def unshaped(index: fx.Node) -> fx.Node:
    """The value behind reshapes: they leave its entries in order."""
    base: Any = index
    while base.target is aten.reshape.default:
        base = base.args[0]
    return base


def counts_rows(index: fx.Node, rows: fx.Node) -> bool:
    """The rows themselves, [B, A]."""
    return unshaped(index) is rows and index.meta["val"].shape == rows.meta["val"].shape


def counts_only_sample(index: fx.Node, rows: fx.Node) -> bool:
    """The rows of a batch of one: `select(rows, 0, 0)`."""
    base = unshaped(index)
    return base.target is aten.select.int and base.args[0] is rows and index.meta["val"].ndim == 1


def is_sample_index(index: fx.Node) -> bool:
    """`arange(B)[:, None]`"""
    return unshaped(index).target is aten.arange.default and tuple(index.meta["val"].shape)[1:] == (1,)
