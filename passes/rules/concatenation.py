"""Ops that put segments behind one another or take them apart: `b t c, b (h w) c -> b (t | h w) c` and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ras_compile.passes.algebra.layout import (
    Axis,
    Concat,
    Dim,
    Exclude,
    Layout,
    Sharded,
    Sizes,
    Unbatch,
    atoms_of,
    concat,
    dim_size,
    filled,
    normal,
    opaque,
)
from ras_compile.passes.algebra.order import OWN
from ras_compile.passes.rules.contraction import counts_samples, grid_atoms, region_atoms, smaller
from ras_compile.passes.rules.convolution import cut_patch
from ras_compile.passes.rules.pointwise import broadcast, rows_or_gather
from ras_compile.passes.rules.registry import Call, Step, rule_for
from ras_compile.passes.rules.views import along, only_layout

aten = torch.ops.aten

CONCATENATIONS: tuple[Any, ...] = (aten.cat.default, aten.concat.default, aten.concatenate.default)
SPLITS: tuple[Any, ...] = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.tensor_split.sections
)  # fmt: skip


@rule_for(*CONCATENATIONS)
def cat(call: Call) -> Step:
    """`b t c, b n c -> b (t | n) c`"""
    nodes = call.args["tensors"]
    rank = len(call.shape)
    return joined(call, nodes, call.args["dim"] % rank, [call.shape_of(node) for node in nodes])


def joined(call: Call, nodes: Sequence[fx.Node], dim: int, shapes: Sequence[tuple[int, ...]]) -> Step:
    """Concatenates along ``dim``; the other dimensions are read as in a broadcast."""
    layouts = [call.layout(node) for node in nodes]
    known = [layout for layout in layouts if layout is not None and len(layout.dims) == len(call.shape)]
    others = list(known[0].dims)
    others[dim] = ()
    region = region_atoms(call, others)
    for layout in known:
        rest = Layout(tuple(() if index == dim else part for index, part in enumerate(layout.dims)))
        if rest != Layout(tuple(others)):
            return call.whole()
    along = [layout is not None and bool(region_atoms(call, [layout.dims[dim]])) for layout in layouts]
    again = stacked([layout.dims[dim] if layout is not None else () for layout in layouts])
    if again is None and not any(along) and grid_atoms(call, [layout.dims[dim] for layout in known]):
        return call.whole()
    raw = all(layout.raw for layout in known)
    if not raw and any(along) and region:
        raise Exclude(smaller(call, region_atoms(call, [layout.dims[dim] for layout in known]), region))
    if again is not None:
        others[dim] = again
    elif not raw and sum(along) > 1:
        return call.whole()
    elif any(along):
        segments: list[Dim] = [
            layout.dims[dim] if layout is not None else opaque(shape[dim]) or (Axis(1),)
            for layout, shape in zip(layouts, shapes, strict=True)
        ]
        others[dim] = concat(segments)
        if len(nodes) == 2 and (whole := filled(segments[0], 0, dim_size(segments[1]))) is not None:
            others[dim] = whole
            return call.whole(Layout(tuple(others), raw))
    else:
        others[dim] = opaque(call.shape[dim])
    out = Layout(tuple(others), raw)
    return Step(out, rows_or_gather(call, {node: out.replace(dim, opaque(call.shape_of(node)[dim])) for node in nodes}))


def stacked(dims: Sequence[Dim]) -> Dim | None:
    """`(k h w), (l h w) -> ((k + l) h w)`: products that differ in a leading plain factor alone; None for others."""
    if len(dims) < 2 or not all(any(atoms_of(dim)) for dim in dims):
        return None
    split = [(dim[0].size, dim[1:]) if isinstance(dim[0], Axis) and dim[0].atom is None else (1, dim) for dim in dims]
    if any(rest != split[0][1] or isinstance(rest[0], Concat) for _, rest in split):
        return None
    return (Axis(sum(count for count, _ in split)), *split[0][1])


@rule_for(aten.stack.default)
def stack(call: Call) -> Step:
    """`a b, a b -> a 2 b`"""
    nodes, rank = call.args["tensors"], len(call.shape)
    dim = call.args["dim"] % rank
    shape = [size for index, size in enumerate(call.shape) if index != dim]
    inner = broadcast(call, nodes, shape)
    if inner is None:
        return call.whole()
    dims = list(inner.dims)
    dims.insert(dim, opaque(call.shape[dim]))
    return Step(Layout(tuple(dims), inner.raw), rows_or_gather(call, inner))


def cut(call: Call, dim: Dim, start: int, stop: int) -> Dim | None:
    """Entries ``start`` to ``stop`` of a dimension, or None where a border goes through the tokens.

    Raises:
        Exclude: a border goes between the entries of a minor part of the region, such as the frames of a video.
    """
    if start == 0 and stop == dim_size(dim):
        return dim
    if start == stop or not grid_atoms(call, [dim]):
        return opaque(stop - start)
    if len(dim) != 1 or not isinstance(dim[0], Concat):
        return cut_outermost(call, dim, start, stop)
    taken, offset = [], 0
    for segment in dim[0].segments:
        size = dim_size(segment)
        first, last = max(start - offset, 0), min(stop - offset, size)
        if first < last:
            part = cut(call, segment, first, last)
            if part is None:
                return None
            taken.append(part or (Axis(1),))
        offset += size
    return concat(taken)


def cut_outermost(call: Call, dim: Dim, start: int, stop: int) -> Dim | None:
    """Cuts a product of factors between the entries of its outermost ones, where both borders allow it."""
    for count in range(1, len(dim) + 1):
        outer, inner = dim[:count], dim_size(dim[count:])
        if start % inner == stop % inner == 0:
            if not grid_atoms(call, [outer]):
                return normal([Axis((stop - start) // inner), *dim[count:]])
            exclude_minor(call, [outer])
            return None
    return None


def exclude_minor(call: Call, dims: Sequence[Dim]) -> None:
    """Drops what is taken apart from the grid where it is its minor part: frames beside a frame's tokens, or samples.

    Raises:
        Unbatch: samples are taken apart, one by one in a loop, say; they then share their active rows.
        Exclude: the square of the number of parts is not above the number of tokens that remain; in dimension 1 of a latent
            of four or more, which mostly holds channels, the number itself is not.
    """
    if counts_samples(call, dims) and call.frame.samples**2 <= call.frame.tokens:
        raise Unbatch(apart=True)
    here, sizes = region_atoms(call, dims), dict(call.frame.region)
    if any(atom.order is not None for atom in here):
        return
    count = math.prod(sizes[atom] for atom in here)
    channels = len(call.frame.shape) >= 4 and call.frame.batch_dim == 0 and {atom.dim for atom in here} == {1}
    if here and (count if channels else count**2) <= call.frame.tokens // count:
        raise Exclude(here)


def sparse_offset(dim: Dim, offset: int, sizes: Sizes) -> int:
    """Where a border of a dimension stands in the sparse world; a border through the tokens never gets here."""
    if offset >= dim_size(dim):
        return sizes.dim(dim)
    if len(dim) != 1 or not isinstance(dim[0], Concat):
        inner = dim_size(dim[1:])
        return offset // inner * sizes.dim(dim[1:]) if offset % inner == 0 else offset
    place = 0
    for segment in dim[0].segments:
        size = dim_size(segment)
        if offset < size:
            return place + (sparse_offset(segment, offset, sizes) if sizes.segment(segment) else 0)
        offset -= size
        place += sizes.segment(segment)
    return place


def piece(call: Call, layout: Layout, dim: int, start: int, stop: int) -> tuple[bool, Layout | None]:
    """``(possible, layout)`` of a slice; the layout is None where the piece carries no region."""
    part = cut(call, layout.dims[dim], start, stop)
    if part is None:
        return False, None
    out = layout.replace(dim, part)
    if not call.frame.carries(out):
        return True, None
    return (False, None) if start == stop and region_atoms(call, [layout.dims[dim]]) else (True, out)


@rule_for(aten.slice.Tensor)
def slice_(call: Call) -> Step:
    """`b (t | n) c -> b n c`"""
    (layout, dim), args = along(call), call.args
    size = layout.shape[dim]
    start, stop, step = slice(args["start"], args["end"], args["step"]).indices(size)
    stop = max(start, stop)
    if step != 1:
        if grid_atoms(call, [layout.dims[dim]]):
            return strided(call, layout, dim, start, step)
        return Step(layout.replace(dim, opaque(call.shape[dim])), call.uses())
    clipped = call.frame.clip(layout.dims[dim], stop) if start == 0 else None
    if clipped is not None:
        return call.whole(layout.replace(dim, clipped))
    possible, out = piece(call, layout, dim, start, stop)
    if not possible:
        return call.whole()
    return Step(out, call.uses(), rewrite=lambda sizes: moved(call, layout.dims[dim], start, stop, sizes))


def strided(call: Call, layout: Layout, dim: int, start: int, step: int) -> Step:
    """`b c (h p) -> b c h`: one pixel of every patch, which the latent itself shows to be one; elsewhere it leaves tokens out."""
    size = layout.shape[dim]
    if size % step or start >= step or call.shape[dim] != size // step:
        return call.whole()
    outer = combed(layout.dims[dim], step)
    if outer is None:
        if not layout.raw:
            return call.whole()
        outer, inner = cut_patch(layout.dims[dim], step, call)
        pixels = region_atoms(call, [inner])
        if pixels:
            raise Exclude(pixels)
    return Step(
        layout.replace(dim, outer), call.uses(), rewrite=lambda sizes: call.with_args(end=sizes.dim(layout.dims[dim]))
    )


def combed(dim: Dim, step: int) -> Dim | None:
    """What every ``step``-th entry of a dimension is, where these are plain entries of each token: `(h 4) -> (h 2)`."""
    last = dim[-1] if dim else None
    if not isinstance(last, Axis) or last.atom is not None or last.size % step:
        return None
    return normal([*dim[:-1], Axis(last.size // step)])


def moved(call: Call, dim: Dim, start: int, stop: int, sizes: Sizes):
    return call.with_args(start=sparse_offset(dim, start, sizes), end=sparse_offset(dim, stop, sizes))


@rule_for(*SPLITS)
def split(call: Call) -> Step:
    """`b (t | n) c -> b t c, b n c`"""
    layout, dim = along(call)
    lengths = [value.shape[dim] for value in call.node.meta["val"]]
    own_shard(call, layout, dim, lengths)
    outs, start = [], 0
    borders = [0]
    for length in lengths:
        possible, out = piece(call, layout, dim, start, start + length)
        if not possible:
            return call.whole(call.each(None))
        outs.append(out)
        start += length
        borders.append(start)

    def rewrite(sizes: Sizes):
        places = [sparse_offset(layout.dims[dim], border, sizes) for border in borders]
        parts = [stop - first for first, stop in zip(places, places[1:], strict=False)]
        return aten.split_with_sizes.default, (call.args["self"], parts, dim), {}

    return Step(tuple(outs), call.uses(), rewrite=rewrite)


def own_shard(call: Call, layout: Layout, dim: int, lengths: Sequence[int]) -> None:
    """Finds that this process takes its part of the tokens of the whole latent, and of these parts no other.

    Such a model is called with the whole latent by every process, and takes `latent.chunk(n, dim=1)[rank]`, or does so behind its
    first layers, which are then computed for all tokens.

    Raises:
        Sharded: it does.
    """
    group, frame = call.frame.shards, call.frame
    if group is None or frame.window is not None or set(lengths) != {lengths[0]} or len(lengths) != group.size:
        return
    packed = len(frame.shape) == 3 and layout.raw and layout.dims[dim] == frame.layout().dims[1]
    beside = [atom for atom, _ in frame.region if packed and atom.dim == 2]
    tokens = normal(Axis(size, atom) for atom, size in frame.region if atom not in beside)
    if layout.dims[dim] != tokens or {user.args[1] for user in call.node.users} != {group.rank}:
        return
    own = layout.replace(dim, (Axis(lengths[0], OWN),))
    outs = tuple(own if rank == group.rank else None for rank in range(group.size))
    raise Sharded(group.rank * lengths[0], (group.rank + 1) * lengths[0], beside, outs)


@rule_for(aten.unbind.int)
def unbind(call: Call) -> Step:
    """`a 3 b -> a b, a b, a b`"""
    layout, dim = along(call)
    if grid_atoms(call, [layout.dims[dim]]):
        exclude_minor(call, [layout.dims[dim]])
        return call.whole(call.each(None))
    return Step(call.each(Layout(layout.dims[:dim] + layout.dims[dim + 1 :], layout.raw)), call.uses())


@rule_for(aten.select.int)
def select(call: Call) -> Step:
    """`a 3 b -> a b`"""
    layout, dim = along(call)
    if grid_atoms(call, [layout.dims[dim]]):
        joint, index = layout.dims[dim], call.args["index"] % layout.shape[dim]
        if isinstance(joint[0], Concat) and piece(call, layout, dim, index, index + 1) == (True, None):
            return Step(
                None, call.uses(), rewrite=lambda sizes: call.with_args(index=sparse_offset(joint, index, sizes))
            )
        exclude_minor(call, [joint])
        return call.whole()
    return Step(Layout(layout.dims[:dim] + layout.dims[dim + 1 :], layout.raw), call.uses())


@rule_for(aten.pad_sequence.default)
def pad_sequence(call: Call) -> Step:
    """`n c -> 1 n c`: of a single sequence; several of them are mixed."""
    if len(call.operands) != 1:
        return call.whole()
    layout = call.layout(call.operands[0])
    assert layout is not None
    dims = [(), layout.dims[0]] if call.args["batch_first"] else [layout.dims[0], ()]
    return Step(Layout((*dims, *layout.dims[1:]), layout.raw), call.uses())


@rule_for(aten.constant_pad_nd.default, aten.pad.default)
def pad(call: Call) -> Step:
    """`b n c -> b (0 | n | 0) c`, or `b c h w -> b c (h p) (w q)` where it fills the patches of an odd latent."""
    layout, amounts = only_layout(call), list(call.args["pad"])
    dims, beside, whole = list(layout.dims), list(amounts), False
    region = {atom for atom, _ in call.frame.region}
    constant = call.args.get("mode", "constant") == "constant"
    for index in range(len(amounts) // 2):
        before, after = amounts[2 * index : 2 * index + 2]
        dim = len(dims) - 1 - index
        if before == after == 0:
            continue
        inside = grid_atoms(call, [dims[dim]])
        held = set(call.frame.tokens_in([dims[dim]]))
        patches = filled(dims[dim], before, after)
        if patches is not None:
            dims[dim], whole = patches, True
        elif not inside:
            dims[dim] = opaque(call.shape[dim])
        elif (
            min(before, after) >= 0
            and not counts_samples(call, [dims[dim]])
            and (held == region or layout.raw and held <= region)
            and (constant or call.frame.padded and layout.raw and before == 0)
        ):
            dims[dim] = concat([(Axis(before),), dims[dim], (Axis(after),)])
            beside[2 * index : 2 * index + 2] = [0, 0]  # what is padded on is context
            whole = whole or not constant
        else:
            return call.whole()
    if whole:
        return call.whole(Layout(tuple(dims), layout.raw))
    return Step(
        Layout(tuple(dims), layout.raw),
        call.uses(),
        rewrite=lambda sizes: call.with_args(pad=amounts if sizes.context else beside),
    )
