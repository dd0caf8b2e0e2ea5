"""Ops that reduce or normalise along dimensions: token-wise where the tokens are not among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ras_compile.passes.algebra.layout import Layout, opaque
from ras_compile.passes.rules.contraction import grid_atoms
from ras_compile.passes.rules.pointwise import rows_or_gather
from ras_compile.passes.rules.registry import Call, Step, rule_for
from ras_compile.passes.rules.views import along, only_layout

aten = torch.ops.aten


def reduced_dims(call: Call, rank: int) -> list[int]:
    dims = call.args.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


def carries(call: Call, layout: Layout, dims: Sequence[int]) -> bool:
    return bool(grid_atoms(call, [layout.dims[dim] for dim in dims]))


@rule_for(
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.amax.default, aten.amin.default,
    aten.max.dim, aten.min.dim, aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim,
    aten.var_mean.correction, aten.prod.dim_int, aten.logsumexp.default, aten.linalg_vector_norm.default,
    aten.argmax.default, aten.argmin.default, aten.any.dim, aten.all.dim, aten.norm.ScalarOpt_dim,
    aten.median.dim, aten.var_mean.dim, aten.std_mean.correction, aten.count_nonzero.default, aten.aminmax.default,
    aten.max.default, aten.min.default, aten.median.default, aten.prod.default, aten.any.default, aten.all.default,
    aten.any.dims, aten.all.dims, aten.nansum.default, aten.count_nonzero.dim_IntList, aten.norm.Scalar,
    aten.mode.default, aten.nanmedian.dim, aten.nanmedian.default, aten.quantile.scalar, aten.nanquantile.scalar,
)  # fmt: skip
def reduction(call: Call) -> Step:
    """`a b -> a`"""
    layout = only_layout(call, "self" if "self" in call.args else "input")
    gone = reduced_dims(call, len(layout.dims))
    if carries(call, layout, gone):
        return call.whole(call.each(None))
    keep = call.args.get("keepdim", False)
    dims = [() if index in gone else dim for index, dim in enumerate(layout.dims) if keep or index not in gone]
    return Step(call.each(Layout(tuple(dims), layout.raw)), call.uses())


@rule_for(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._safe_softmax.default, aten.cumsum.default,
    aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default,
)  # fmt: skip
def along_dim(call: Call) -> Step:
    """`a b -> a b`: every entry depends on all entries along ``dim``."""
    layout, dim = along(call)
    out = call.each(Layout(layout.dims, layout.raw))
    return call.whole(out) if carries(call, layout, [dim]) else Step(out, call.uses())


@rule_for(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(call: Call) -> Step:
    """`... c -> ... c`: normalised over the last dimensions."""
    layout = only_layout(call, "input")
    last = range(len(layout.dims) - len(call.args["normalized_shape"]), len(layout.dims))
    return call.whole(layout) if carries(call, layout, last) else Step(layout, call.uses())


@rule_for(aten.group_norm.default, aten.instance_norm.default)
def group_norm(call: Call) -> Step:
    """`b c ... -> b c ...`: normalised over groups of channels and all that follows."""
    layout = only_layout(call, "input")
    return call.whole(layout) if carries(call, layout, range(1, len(layout.dims))) else Step(layout, call.uses())


@rule_for(aten._native_batch_norm_legit_no_training.default)
def batch_norm(call: Call) -> Step:
    """`b c ... -> b c ...`: scaled and moved, channel by channel."""
    layout = only_layout(call, "input")
    out = (Layout(layout.dims), None, None)
    return call.whole(out) if carries(call, layout, [1]) else Step(out, call.uses())


@rule_for(aten.glu.default, aten.diff.default)
def shortened(call: Call) -> Step:
    """`a b -> a c`: entries along ``dim`` are combined with each other."""
    layout, dim = only_layout(call), call.args["dim"] % len(call.shape)
    if carries(call, layout, [dim]):
        return call.whole()
    return Step(layout.replace(dim, opaque(call.shape[dim])), call.uses())


@rule_for(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Step:
    """`... a b -> ... a b`: keeps entries by their places in the last two dimensions."""
    layout = only_layout(call)
    out = Layout(layout.dims)
    return call.whole(out) if carries(call, layout, [-1, -2]) else Step(out, call.uses())


@rule_for(aten.argsort.default, aten.argsort.stable)
def order(call: Call) -> Step:
    """`a b -> a b`: places of the entries in their order along ``dim``."""
    layout, dim = along(call)
    return call.whole() if carries(call, layout, [dim]) else Step(Layout(layout.dims), call.uses())


@rule_for(aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default)
def order_statistics(call: Call) -> Step:
    """`a b -> a k, a k`"""
    layout, dim = along(call)
    if carries(call, layout, [dim]):
        return call.whole(call.each(None))
    shape = call.node.meta["val"][0].shape
    gone = len(shape) < len(layout.dims)  # kthvalue without keepdim
    out = Layout(layout.dims[:dim] + layout.dims[dim + 1 :]) if gone else layout.replace(dim, opaque(shape[dim]))
    return Step((out, out), call.uses())


@rule_for(aten.searchsorted.Tensor, aten.bucketize.Tensor)
def places_among(call: Call) -> Step:
    """`... m, ... k -> ... k`: the place of each value among borders, which are sorted along their last dimension."""
    value = call.args["self"]
    borders = call.args["boundaries" if "boundaries" in call.args else "sorted_sequence"]
    layout, table = call.layout(value), call.layout(borders)
    if not call.shape:  # one value, among borders that hold tokens
        return call.whole()
    last = opaque(call.shape[-1]) if layout is None else layout.dims[-1]
    own = None if layout is None else Layout(layout.dims)
    if table is None:
        out = own
    elif grid_atoms(call, [table.dims[-1]]) or own is not None and own.dims[:-1] != table.dims[:-1]:
        return call.whole(own)
    else:
        out = Layout((*table.dims[:-1], last))
    return Step(out, rows_or_gather(call, out.replace(len(out.dims) - 1, ())))
