"""Convolutions over the grid: patches (stride = kernel) and 1x1 kernels are token-wise, all others mix tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ras_compile.passes.algebra.layout import (
    Axis,
    Dim,
    Exclude,
    Factor,
    Layout,
    Refine,
    Unbatch,
    clip_of,
    dim_size,
    normal,
    opaque,
)
from ras_compile.passes.rules.contraction import counts_samples, region_atoms
from ras_compile.passes.rules.registry import Call, Step, rule_for

aten = torch.ops.aten


def per_dim(value: int | list[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def cut_patch(dim: Dim, patch: int, call: Call) -> tuple[Dim, Dim]:
    """Cuts the innermost ``patch`` entries off a dimension.

    Raises:
        Refine: the cut goes through an atom.
        Clip: a side of the latent is padded to whole patches.
        UnsupportedGraph: the patch does not divide the dimension.
    """
    rest, left = list(dim), patch
    inner: list[Factor] = []
    while left > 1:
        factor = rest.pop() if rest else Axis(1)
        if left % factor.size == 0 and factor.size > 1:
            inner.insert(0, factor)
            left //= factor.size
        elif factor.size % left == 0 and isinstance(factor, Axis):
            if factor.atom is not None:
                raise Refine(factor.atom, factor.size // left)
            rest.append(Axis(factor.size // left))
            inner.insert(0, Axis(left))
            left = 1
        elif (clip := clip_of(factor, left)) is not None and not rest and left == patch:
            raise clip
        elif not isinstance(factor, Axis):
            raise call.unsupported("patches of a grid that is padded, or joined with something else")
        else:
            raise call.unsupported(f"a grid side of {dim_size(dim)} that the patch size {patch} does not divide")
    return normal(rest), normal(inner)


def convolved(call: Call) -> tuple[Layout, tuple[int, ...]] | None:
    """The layout of what is convolved, and the sizes of the kernel; None where a kernel or a bias holds tokens.

    Raises:
        Unbatch: samples are convolved with each other.
    """
    layout, kernel = call.layout(call.args["input"]), call.shape_of(call.args["weight"])[2:]
    if layout is None or any(call.layout(call.args[name]) is not None for name in ("weight", "bias")):
        return None
    if counts_samples(call, layout.dims[-len(kernel) - 1 :]):
        raise Unbatch
    return layout, kernel


@rule_for(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
@rule_for(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution(call: Call) -> Step:
    """`b c (h p) (w q), d c p q -> b d h w`"""
    found = convolved(call)
    if found is None:
        return call.whole()
    layout, kernels = found
    rank = len(kernels)
    channels = region_atoms(call, [layout.dims[-rank - 1]])
    if channels:
        raise Exclude(channels)
    stride, dilation = per_dim(call.args["stride"], rank), per_dim(call.args["dilation"], rank)
    padding = call.args["padding"]
    padding = [0 if padding == "valid" else -1] * rank if isinstance(padding, str) else per_dim(padding, rank)
    dims: list[Dim] = [*layout.dims[: -rank - 1], opaque(call.shape[-rank - 1])]
    mixes, dropped, coarse = False, set(), layout.raw or call.frame.coarse
    for index in range(rank):
        dim, kernel, size = layout.dims[index - rank], kernels[index], call.shape[index - rank]
        if not region_atoms(call, [dim]):
            dims.append(opaque(size))
        elif (
            kernel == stride[index]
            and dilation[index] == 1
            and (padding[index] == 0 or kernel == 1 and padding[index] <= 0)
        ):
            outer, inner = cut_patch(dim, kernel, call)
            dropped |= region_atoms(call, [inner])
            dims.append(outer)
        elif coarse and stride[index] * size == dim_size(dim):  # patches that overlap
            mixes = True
            outer, inner = cut_patch(dim, stride[index], call)
            dropped |= region_atoms(call, [inner])
            dims.append(outer)
        else:
            mixes = True
            dims.append(dim if size == dim_size(dim) and stride[index] == 1 else opaque(size))
    if mixes and not (dropped and coarse):
        out = Layout.of(dims)
        kept = {*call.frame.tokens_in(out.dims)} >= {atom for atom, _ in call.frame.region}
        return call.whole(out if kept and not dropped else None)
    if dropped:
        raise Exclude(dropped)
    return Step(Layout.of(dims), call.uses())


@rule_for(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(call: Call) -> Step:
    """`b c h w, c d p q -> b d (h p) (w q)` where stride = kernel; kernels that overlap mix tokens."""
    found = convolved(call)
    if found is None:
        return call.whole()
    layout, kernel = found
    rank = len(kernel)
    stride, dilation = per_dim(call.args["stride"], rank), per_dim(call.args["dilation"], rank)
    padding, extra = per_dim(call.args["padding"], rank), per_dim(call.args["output_padding"], rank)
    if region_atoms(call, [layout.dims[-rank - 1]]):
        return call.whole()
    plain = all(
        s == k and d == 1 and p == 0 and e == 0
        for s, k, d, p, e in zip(stride, kernel, dilation, padding, extra, strict=True)
    )
    fits = all(size * s == out for size, s, out in zip(layout.shape[-rank:], stride, call.shape[-rank:], strict=True))
    if not fits:
        return call.whole()
    out = enlarged([*layout.dims[: -rank - 1], opaque(call.shape[-rank - 1])], layout.dims[-rank:], stride)
    return Step(out, call.uses()) if plain else call.whole(out)


def enlarged(lead: Sequence[Dim], grid: Sequence[Dim], factors: Sequence[int]) -> Layout:
    """`... h w -> ... (h r) (w s)`: each token has ``factors`` entries of its own in the result."""
    return Layout.of([*lead, *((*dim, Axis(factor)) for dim, factor in zip(grid, factors, strict=True))])
