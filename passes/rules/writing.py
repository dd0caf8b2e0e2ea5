"""Ops that write one value into a slice or an entry of another: `b (t | n) c, b n c -> b (t | n) c`."""

from __future__ import annotations

import torch
from torch import fx

from ras_compile.passes.algebra.layout import Axis, Layout, Sizes, concat, opaque
from ras_compile.passes.rules.concatenation import combed, cut, moved
from ras_compile.passes.rules.contraction import grid_atoms, region_atoms
from ras_compile.passes.rules.pointwise import rows_or_gather
from ras_compile.passes.rules.registry import Call, Step, rule_for

aten = torch.ops.aten


@rule_for(aten.slice_scatter.default)
def slice_scatter(call: Call) -> Step:
    """`b (t | n) c, b n c -> b (t | n) c`: writes ``src`` into a slice of ``self``."""
    base, src, dim = call.args["self"], call.args["src"], call.args["dim"] % len(call.shape)
    whole, part = call.layout(base), call.layout(src)
    if part is None and src in call.mixed:
        return call.whole()  # its tokens may stand elsewhere than those of the base
    start, stop, step = slice(call.args["start"], call.args["end"], call.args["step"]).indices(call.shape[dim])
    if step != 1:
        return strided_scatter(call, base, src, dim, start, step)
    if whole is None:
        assert part is not None
        rest = [*part.dims[:dim], *part.dims[dim + 1 :]]
        along = bool(grid_atoms(call, [part.dims[dim]]))
        # in the latent, they may still turn out to be channels
        tokens = bool(region_atoms(call, rest)) and not part.raw
        if (along and tokens) or (not along and base in call.mixed):
            return call.whole()
        ends = [(Axis(start),), part.dims[dim], (Axis(call.shape[dim] - stop),)]
        whole = part.replace(dim, concat(ends) if along else opaque(call.shape[dim]))
    taken = cut(call, whole.dims[dim], start, stop)
    if taken is None:
        return call.whole()
    inside = whole.replace(dim, taken)
    if part is not None and part.dims != inside.dims:
        return call.whole()
    out = Layout(whole.dims, whole.raw and (part is None or part.raw))

    def rewrite(sizes: Sizes):
        if not sizes.context and not grid_atoms(call, [taken]) and grid_atoms(call, [out.dims[dim]]):
            return aten.alias.default, (base,), {}  # what is written is context, which has no entries here
        return moved(call, out.dims[dim], start, stop, sizes)

    return Step(out, rows_or_gather(call, {base: out, src: inside}), rewrite=rewrite)


@rule_for(aten.select_scatter.default)
def select_scatter(call: Call) -> Step:
    """`a 3 b, a b -> a 3 b`: writes ``src`` into one entry of ``self``."""
    base, src, dim = call.args["self"], call.args["src"], call.args["dim"] % len(call.shape)
    whole, part = call.layout(base), call.layout(src)
    if src in call.mixed or base in call.mixed:
        return call.whole()  # the tokens of the one may stand elsewhere than those of the other
    if whole is not None and grid_atoms(call, [whole.dims[dim]]):
        return call.whole(Layout(whole.dims))
    if whole is None:
        assert part is not None
        whole = Layout((*part.dims[:dim], opaque(call.shape[dim]), *part.dims[dim:]), part.raw)
    inside = Layout((*whole.dims[:dim], *whole.dims[dim + 1 :]))
    if part is not None and part.dims != inside.dims:
        return call.whole()
    out = Layout(whole.dims, whole.raw and (part is None or part.raw))
    return Step(out, rows_or_gather(call, {base: whole, src: inside}))


def strided_scatter(call: Call, base: fx.Node, src: fx.Node, dim: int, start: int, step: int) -> Step:
    """`b c, b c/2 -> b c`: every other entry is written, along a dimension without tokens; `b (h 2), b h -> b (h 2)`."""
    known = [layout for layout in (call.layout(base), call.layout(src)) if layout is not None]
    if any(grid_atoms(call, [layout.dims[dim]]) for layout in known):
        return comb(call, base, src, dim, start, step)
    sizes = {base: call.shape_of(base)[dim], src: call.shape_of(src)[dim]}
    out = known[0].replace(dim, opaque(sizes[base]))
    if any(layout.replace(dim, ()).dims != out.replace(dim, ()).dims for layout in known):
        return call.whole()
    reads = {node: out.replace(dim, opaque(size)) for node, size in sizes.items()}
    return Step(Layout(out.dims, all(layout.raw for layout in known)), rows_or_gather(call, reads))


def comb(call: Call, base: fx.Node, src: fx.Node, dim: int, start: int, step: int) -> Step:
    """`b (h 2), b h -> b (h 2)`: one entry of every patch is written, as where a wavelet is undone."""
    size, (mine, other) = call.shape[dim], (call.layout(base), call.layout(src))
    even = size % step == 0 and start < step and call.shape_of(src)[dim] == size // step
    if not even or any(call.layout(node) is None and node in call.mixed for node in (base, src)):
        return call.whole()
    if mine is None:
        assert other is not None
        out = other.replace(dim, (*other.dims[dim], Axis(step)))
    else:
        out = mine
    written = combed(out.dims[dim], step)
    if written is None or (other is not None and other.dims != out.replace(dim, written).dims):
        return call.whole()
    uses = rows_or_gather(call, {base: out, src: out.replace(dim, written)})
    raw = all(layout.raw for layout in (mine, other) if layout is not None)
    return Step(Layout(out.dims, raw), uses, rewrite=lambda sizes: call.with_args(end=sizes.dim(out.dims[dim])))
