"""Ops that only regroup, reorder or repeat dimensions: `b (h w) c -> b h w c` and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ras_compile.passes.algebra.layout import Axis, Layout, Sizes, ViewError, atoms_of, opaque
from ras_compile.passes.rules.contraction import grid_atoms
from ras_compile.passes.rules.registry import Call, Step, Use, rule_for

aten = torch.ops.aten

VIEWS: tuple[Any, ...] = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


def only_layout(call: Call, name: str = "self") -> Layout:
    """Layout of the operand ``name``, the only one that may carry the region."""
    layout = call.layout(call.args[name])
    if layout is None or sum(call.layouts.get(operand) is not None for operand in call.operands) > 1:
        raise call.unsupported(f"an operand other than `{name}` that depends on the tokens of the picture")
    return layout


def along(call: Call) -> tuple[Layout, int]:
    """The only operand's layout, and the dimension along which the op works."""
    layout = only_layout(call)
    return layout, call.args["dim"] % len(layout.dims)


@rule_for(*VIEWS)
@rule_for(aten.unflatten.int, aten.view_as.default, aten.reshape_as.default)
def reshape(call: Call) -> Step:
    """`b (h w) c -> b h w c`: factors are regrouped; in the sparse world the same grouping has other sizes."""
    layout = call.layout(call.operands[0])
    if layout is None:
        return same_shape(call, aten.reshape.default)
    try:
        return call.as_view(layout.reshape(call.shape))
    except ViewError:
        return call.whole(of_everyone(call, layout))


def of_everyone(call: Call, layout: Layout) -> Layout | None:
    """The layout of a view of the tokens of all processes as those of the whole latent, which is made of whole values."""
    factors = [factor for dim in layout.dims for factor in dim]
    whole = Layout((call.frame.gathered(factors),), layout.raw)
    try:
        return None if whole.ranked or not layout.ranked else whole.reshape(call.shape)
    except ViewError:
        return None


def same_shape(call: Call, target: Callable) -> Step:
    """A dense first operand takes the shape of one with the region: the whole shape, in the sparse program too."""
    return Step(None, (Use.SAME,), rewrite=lambda sizes: (target, (call.operands[0], list(call.shape)), {}))


@rule_for(aten.unsqueeze.default)
def unsqueeze(call: Call) -> Step:
    """`a b -> a 1 b`"""
    dims = list(only_layout(call).dims)
    dims.insert(call.args["dim"] % (len(dims) + 1), ())
    return Step(Layout(tuple(dims), only_layout(call).raw), call.uses())


@rule_for(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(call: Call) -> Step:
    """`a 1 b -> a b`: the dimensions are named, since another one may have a single entry only in the sparse world."""
    layout = only_layout(call)
    wanted = call.args.get("dim")
    wanted = range(len(layout.dims)) if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    gone = {index % len(layout.dims) for index in wanted if layout.shape[index] == 1}
    out = Layout(tuple(dim for index, dim in enumerate(layout.dims) if index not in gone), layout.raw)
    return call.as_view(out)


@rule_for(aten.permute.default, aten.transpose.int, aten.t.default)
def permute(call: Call) -> Step:
    """`a b c -> a c b`"""
    layout = only_layout(call)
    order = call.args.get("dims")
    if order is None:  # of two dimensions; `t` names none
        order = list(range(len(layout.dims)))
        first, second = call.args.get("dim0", 0), call.args.get("dim1", -1)
        order[first], order[second] = order[second], order[first]
    return Step(layout.permute(order), call.uses())


@rule_for(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def expand(call: Call) -> Step:
    """`1 b -> n b`"""
    layout = call.layout(call.operands[0])
    if layout is None:
        return same_shape(call, aten.expand.default)
    dims = [opaque(size) for size in call.shape]
    offset = len(dims) - len(layout.dims)
    for index, dim in enumerate(layout.dims):
        if layout.shape[index] != 1:
            dims[index + offset] = dim
    out = Layout(tuple(dims), layout.raw)
    operand = call.operands[0]

    def rewrite(sizes: Sizes) -> tuple:
        return aten.expand.default, (operand, list(sizes.shape(out))), {}

    return Step(out, call.uses()[:1], rewrite=rewrite)


@rule_for(aten.repeat.default, aten.tile.default)
def repeat(call: Call) -> Step:
    """`a b -> (r a) b`"""
    layout = only_layout(call)
    times = list(call.args["repeats" if "repeats" in call.args else "dims"])
    times = [1] * (len(layout.dims) - len(times)) + times
    dims = [()] * (len(times) - len(layout.dims)) + list(layout.dims)
    out = Layout.of([(Axis(count), *dim) for count, dim in zip(times, dims, strict=True)], layout.raw)
    return Step(out, call.uses())


@rule_for(aten.repeat_interleave.self_int)
def repeat_interleave(call: Call) -> Step:
    """`a b -> (a r) b`"""
    layout, dim, count = only_layout(call), call.args["dim"], call.args["repeats"]
    if dim is None:
        return call.whole()
    dim %= len(layout.dims)
    out = layout.replace(dim, (*layout.dims[dim], Axis(count)))
    return Step(out, call.uses(), rewrite=lambda sizes: call.with_args(output_size=None))


@rule_for(aten.view_as_complex.default)
def view_as_complex(call: Call) -> Step:
    """`... 2 -> ...`"""
    layout = only_layout(call)
    if grid_atoms(call, layout.dims[-1:]):
        return call.whole()
    return Step(Layout(layout.dims[:-1], layout.raw), call.uses())


@rule_for(aten.view_as_real.default)
def view_as_real(call: Call) -> Step:
    """`... -> ... 2`"""
    layout = only_layout(call)
    return Step(Layout((*layout.dims, opaque(2)), layout.raw), call.uses())


@rule_for(aten.pixel_shuffle.default)
def pixel_shuffle(call: Call) -> Step:
    """`b (c r s) h w -> b c (h r) (w s)`"""
    layout, factor = only_layout(call), call.args["upscale_factor"]
    *lead, channels, height, width = layout.dims
    if any(atoms_of(channels)):
        return call.whole()
    dims = [*lead, opaque(call.shape[-3]), (*height, Axis(factor)), (*width, Axis(factor))]
    return Step(Layout.of(dims, layout.raw), call.uses())
