"""Ops that cut a grid into patches, put it together again, pool it, repeat it or look at its frequencies."""

from __future__ import annotations

import re

import torch

from ras_compile._torch import schema_of
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Axis, Dim, Exclude, Layout, ViewError, dim_size, opaque
from ras_compile.passes.rules.contraction import counts_samples, grid_atoms, region_atoms
from ras_compile.passes.rules.convolution import cut_patch, enlarged, per_dim
from ras_compile.passes.rules.registry import Call, Step, rule_for
from ras_compile.passes.rules.views import only_layout

aten = torch.ops.aten

MAX_REPEAT = 8  # nearest neighbours are found in single precision: by such factors they are exact


def patches(call: Call, dim: Dim, size: int) -> tuple[Dim, Dim] | None:
    """``(outer, inner)`` of a dimension cut into patches of ``size``; None where the patches do not fit its factors."""
    try:
        return cut_patch(dim, size, call)
    except UnsupportedGraph:
        return None


def same_or_lost(call: Call, layout: Layout) -> Step:
    """The op mixes tokens: its result still has an entry for each where its shape is the same."""
    return call.whole(Layout(layout.dims) if layout.shape == call.shape else None)


@rule_for(aten.unfold.default)
def unfold(call: Call) -> Step:
    """`a (n k) -> a n k`: windows that follow each other; those that overlap, or leave entries out, mix tokens."""
    layout, size = only_layout(call), call.args["size"]
    dim = call.args["dimension"] % len(layout.dims)
    if not grid_atoms(call, [layout.dims[dim]]):
        outer, inner = opaque(call.shape[dim]), opaque(size)
        return Step(Layout((*layout.replace(dim, outer).dims, inner), layout.raw), call.uses())
    cut = patches(call, layout.dims[dim], size)
    if size != call.args["step"] or cut is None:
        return call.whole()
    out = Layout((*layout.replace(dim, cut[0]).dims, cut[1]), layout.raw)

    def rewrite(sizes):
        count = sizes.dim(cut[1])
        return call.with_args(size=count, step=count)

    return Step(out, call.uses(), rewrite=rewrite)


@rule_for(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Call) -> Step:
    """`b c (h r) (w s) -> b (c r s) h w`"""
    layout, factor = only_layout(call), call.args["downscale_factor"]
    *lead, channels, height, width = layout.dims
    high_cut, wide_cut = (patches(call, dim, factor) for dim in (height, width))
    if layout.raw:
        exclude(call, [channels])
    if grid_atoms(call, [channels]) or high_cut is None or wide_cut is None:
        return call.whole()
    (high, pixel_rows), (wide, pixel_columns) = high_cut, wide_cut
    exclude(call, [pixel_rows, pixel_columns])
    return Step(Layout.of([*lead, opaque(call.shape[-3]), high, wide], layout.raw), call.uses())


def exclude(call: Call, dims: list[Dim]) -> None:
    """Tokens that an op makes channels of are pixels of a patch.

    Raises:
        Exclude: there are some.
    """
    pixels = region_atoms(call, dims)
    if pixels:
        raise Exclude(pixels)


def windows(call: Call) -> tuple[list[int], ...]:
    """Kernel, stride, dilation and padding of windows over a picture, each for both of its sides."""
    return tuple(per_dim(call.args[name], 2) for name in ("kernel_size", "stride", "dilation", "padding"))


@rule_for(aten.im2col.default)
def im2col(call: Call) -> Step:
    """`b c (h p) (w q) -> b (c p q) (h w)`: patches that neither overlap nor leave entries out; others mix tokens."""
    layout, (kernel, stride, dilation, padding) = only_layout(call), windows(call)
    *lead, channels, height, width = layout.dims
    if layout.raw:
        exclude(call, [channels])
    if grid_atoms(call, [channels]):
        return call.whole()
    high_cut, wide_cut = (patches(call, dim, size) for dim, size in zip((height, width), kernel, strict=True))
    plain = kernel == stride and dilation == [1, 1] and padding == [0, 0]
    if plain and high_cut is not None and wide_cut is not None:
        (high, pixel_rows), (wide, pixel_columns) = high_cut, wide_cut
        exclude(call, [pixel_rows, pixel_columns])
        return Step(Layout.of([*lead, opaque(call.shape[-2]), (*high, *wide)], layout.raw), call.uses())
    around = [p * 2 == d * (k - 1) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    if stride == [1, 1] and all(around):  # a window around each token
        return call.whole(Layout.of([*lead, opaque(call.shape[-2]), (*height, *width)]))
    return call.whole()


@rule_for(aten.col2im.default)
def col2im(call: Call) -> Step:
    """`b (c p q) (h w) -> b c (h p) (w q)`: patches that do not overlap; others mix tokens."""
    layout, (kernel, stride, dilation, padding) = only_layout(call), windows(call)
    *lead, channels, tokens = layout.dims
    sides = [size // k for size, k in zip(call.shape[-2:], kernel, strict=True)]
    if grid_atoms(call, [channels]) or kernel != stride or dilation != [1, 1] or padding != [0, 0]:
        return call.whole()
    if sides[0] * sides[1] != dim_size(tokens):
        return call.whole()
    try:
        high, wide = Layout((tokens,)).reshape(sides).dims
    except ViewError:
        return call.whole()
    grid = [(*high, Axis(kernel[0])), (*wide, Axis(kernel[1]))]
    out = Layout.of([*lead, opaque(call.shape[-3]), *grid], layout.raw)
    return Step(out, call.uses(), rewrite=lambda sizes: call.with_args(output_size=list(sizes.shape(out)[-2:])))


def spatial(call: Call) -> int:
    """How many dimensions the op works on: the number in its name."""
    return int(re.findall(r"(\d)d", schema_of(call.node.target).name)[-1])


@rule_for(
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.max_pool1d.default,
    aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
)  # fmt: skip
def pool(call: Call) -> Step:
    """`b c h w -> b c i j`: mixes the tokens of a window."""
    layout, rank = only_layout(call, "self" if "self" in call.args else "input"), spatial(call)
    if grid_atoms(call, layout.dims[-rank:]):
        return same_or_lost(call, layout)
    return Step(Layout((*layout.dims[:-rank], *map(opaque, call.shape[-rank:])), layout.raw), call.uses())


@rule_for(
    aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_trilinear3d.vec
)
@rule_for(aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default)
def between(call: Call) -> Step:
    """`b c h w -> b c (h r) (w s)`: mixes neighbours; by whole factors, each token has entries of its own in the result."""
    layout, rank = only_layout(call, "input" if "input" in call.args else "self"), spatial(call)
    grid, pairs = layout.dims[-rank:], [*zip(layout.shape[-rank:], call.shape[-rank:], strict=True)]
    if not region_atoms(call, grid) or counts_samples(call, grid) or any(after % before for before, after in pairs):
        return pool(call)
    return call.whole(enlarged([*layout.dims[:-rank]], grid, [after // before for before, after in pairs]))


@rule_for(aten.grid_sampler.default)
def sample_grid(call: Call) -> Step:
    """`b c h w, b i j 2 -> b c i j`: reads between entries at computed places, so it mixes whatever it touches."""
    return call.whole()


@rule_for(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
@rule_for(
    aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.default,
)
def nearest(call: Call) -> Step:
    """`b c h w -> b c (h r) (w s)`: every entry is repeated; by other factors than whole ones tokens are mixed."""
    layout, rank = only_layout(call, "input" if "input" in call.args else "self"), spatial(call)
    before, after = layout.shape[-rank:], call.shape[-rank:]
    if any(b % a or b // a > MAX_REPEAT for a, b in zip(before, after, strict=True)):
        return pool(call)
    dims = [(*dim, Axis(b // a)) for dim, a, b in zip(layout.dims[-rank:], before, after, strict=True)]
    out = Layout.of([*layout.dims[:-rank], *dims], layout.raw)

    def rewrite(sizes):
        scales = {name: None for name in call.args if name.startswith("scale")}
        return call.with_args(output_size=list(sizes.shape(out)[-rank:]), **scales)

    return Step(out, call.uses(), rewrite=rewrite)


@rule_for(aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default)
@rule_for(aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default)
@rule_for(aten.fft_fftn.default, aten.fft_ifftn.default, aten.fft_rfftn.default, aten.fft_irfftn.default)
def frequencies(call: Call) -> Step:
    """`a n -> a f`: every frequency depends on all entries along the transformed dimensions."""
    layout, given = only_layout(call), call.args["dim"]
    rank = len(layout.dims)
    dims = [dim % rank for dim in (range(rank) if given is None else [given] if isinstance(given, int) else given)]
    if grid_atoms(call, [layout.dims[dim] for dim in dims]):
        return call.whole()
    out = [opaque(call.shape[index]) if index in dims else dim for index, dim in enumerate(layout.dims)]
    return Step(Layout(tuple(out)), call.uses())


@rule_for(aten.one_hot.default)
def one_hot(call: Call) -> Step:
    """`... -> ... k`"""
    layout = only_layout(call)
    return Step(Layout((*layout.dims, opaque(call.shape[-1]))), call.uses())
