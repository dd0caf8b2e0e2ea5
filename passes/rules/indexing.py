"""Ops that move entries along dimensions, by index tensors or in a fixed order: token-wise where these hold no tokens."""

from __future__ import annotations

import torch

from ras_compile.passes.algebra.layout import Layout, opaque
from ras_compile.passes.rules.contraction import grid_atoms
from ras_compile.passes.rules.ordering import order_of, reordered, rolled
from ras_compile.passes.rules.pointwise import rows_or_gather
from ras_compile.passes.rules.registry import Call, Step, rule_for
from ras_compile.passes.rules.resampling import exclude
from ras_compile.passes.rules.views import only_layout

aten = torch.ops.aten


@rule_for(aten.embedding.default)
def embedding(call: Call) -> Step:
    """`v c, ... -> ... c`"""
    layout = call.layout(call.args["indices"])
    if layout is None or call.layout(call.args["weight"]) is not None:
        return call.whole()
    return Step(Layout((*layout.dims, opaque(call.shape[-1])), layout.raw), call.uses())


@rule_for(aten.index.Tensor)
def index(call: Call) -> Step:
    """`a n b, k -> a k b`: tokens stand in the source, or in the index, as in a table of experts."""
    base = call.layout(call.args["self"])
    given = [position for position, node in enumerate(call.args["indices"]) if node is not None]
    node = call.args["indices"][given[0]]
    places = call.layout(node)
    if len(given) != 1 or node.meta["val"].dtype in (torch.bool, torch.uint8):
        return call.whole()
    if base is not None and places is None and (order := order_of(node)) is not None:
        return reordered(call, base, {given[0]: order}) or call.whole()
    if (base is None) == (places is None) or base is not None and grid_atoms(call, [base.dims[given[0]]]):
        return call.whole()
    dims = [opaque(size) for size in call.shape_of(call.args["self"])] if base is None else list(base.dims)
    dims[given[0] : given[0] + 1] = [opaque(k) for k in call.shape_of(node)] if places is None else places.dims
    return Step(Layout(tuple(dims), base is not None and base.raw), call.uses())


@rule_for(aten.index_select.default)
def index_select(call: Call) -> Step:
    """`a n b, k -> a k b`"""
    layout = call.layout(call.args["self"])
    if layout is None or call.layout(call.args["index"]) is not None:
        return call.whole()
    dim = call.args["dim"] % len(layout.dims)
    if grid_atoms(call, [layout.dims[dim]]):
        order = order_of(call.args["index"])
        return (None if order is None else reordered(call, layout, {dim: order})) or call.whole()
    return Step(layout.replace(dim, opaque(call.shape[dim])), call.uses())


@rule_for(aten.gather.default)
def gather(call: Call) -> Step:
    """`a n b, a k b -> a k b`: along a dimension without tokens."""
    base, node = call.layout(call.args["self"]), call.args["index"]
    if base is not None and node not in call.layouts:
        dim = call.args["dim"] % len(call.shape)
        same = call.shape == base.shape and grid_atoms(call, [base.dims[dim]])
        order = order_of(node, dim) if same else None
        if order is not None:
            return reordered(call, base, {dim: order}) or call.whole()
    return along(call, call.shape) or call.whole()


def along(call: Call, shape: tuple[int, ...]) -> Step | None:
    """An op that moves entries along a dimension without tokens, and whose result has ``shape``; None for any other."""
    dim = call.args["dim"] % len(shape)
    layouts = [layout for layout in map(call.layout, call.operands) if layout is not None]
    if any(grid_atoms(call, [layout.dims[dim]]) for layout in layouts):
        return None
    out = layouts[0].replace(dim, opaque(shape[dim]))
    same = Layout(out.dims)
    if any(Layout(layout.replace(dim, out.dims[dim]).dims) != same for layout in layouts):
        return None
    sizes = {(*shape[:dim], *shape[dim + 1 :]) for shape in map(call.shape_of, call.operands)}
    if len(sizes) > 1:  # an index smaller than its source reads or writes a corner of it
        return None
    return Step(out, rows_or_gather(call, out.replace(dim, ())))


@rule_for(aten.flip.default)
def flip(call: Call) -> Step:
    """`a b -> a b`, reversed along dimensions without tokens."""
    layout = only_layout(call)
    dims = [dim % len(layout.dims) for dim in call.args["dims"]]
    if grid_atoms(call, [layout.dims[dim] for dim in dims]):  # tokens, or the samples of a batch, change places
        return reordered(call, layout, {dim: torch.arange(call.shape[dim]).flip(0) for dim in dims}) or call.whole()
    return Step(Layout(layout.dims, layout.raw), call.uses())


@rule_for(aten.roll.default)
def roll(call: Call) -> Step:
    """`a b -> a b`, shifted along dimensions without tokens."""
    layout = only_layout(call)
    dims = [dim % len(layout.dims) for dim in call.args["dims"]] or list(range(len(layout.dims)))
    if not grid_atoms(call, [layout.dims[dim] for dim in dims]):
        return Step(layout, call.uses())
    if not call.args["dims"]:
        return call.whole()
    shifts = dict.fromkeys(dims, 0)
    for dim, shift in zip(dims, call.args["shifts"], strict=True):
        shifts[dim] += shift
    return (
        reordered(call, layout, {dim: rolled(call.shape[dim], shift) for dim, shift in shifts.items()}) or call.whole()
    )


@rule_for(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(call: Call) -> Step:
    """`b (g n) ... -> b (n g) ...`: dimension 1 in another order, where it holds no tokens; the latent's own are channels."""
    layout = only_layout(call)
    if layout.raw:
        exclude(call, [layout.dims[1]])
    return call.whole() if grid_atoms(call, [layout.dims[1]]) else Step(layout, call.uses())


@rule_for(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(call: Call) -> Step:
    """`a n b, a k b -> a n b`: along a dimension without tokens."""
    return along(call, call.shape) or written(call)


@rule_for(aten.index_put.default, aten.index_add.default, aten.index_copy.default, aten.masked_scatter.default)
@rule_for(aten.index_fill.int_Scalar)
def written(call: Call) -> Step:
    """Writes to computed places: mixes whatever it touches; entry t of the result is still about entry t of the base."""
    base = call.layout(call.args["self"])
    return call.whole(None if base is None else Layout(base.dims))
