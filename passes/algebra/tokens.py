"""The token view of a value that carries the region: `b c (h p) (w q) -> b (h w) (p q) c`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import (
    Atom,
    Axis,
    Concat,
    Dim,
    Frame,
    Layout,
    atoms_of,
    axes_of,
    dim_size,
    normal,
    opened,
)
from ras_compile.passes.algebra.order import RANKS


@dataclass(frozen=True)
class TokenView:
    """A function from a tensor to ``[B, N, P, C]``: samples, tokens, pixels of a patch, channels; see :func:`token_view`."""

    # ``(dim, start, length)`` of the region's segment, where it stands beside others
    cuts: tuple[tuple[int, int, int], ...]
    token_dims: frozenset[int]  # the tensor's dimensions that hold tokens
    exploded: tuple[int, ...]  # the sizes of the tensor's factors
    order: tuple[int, ...]  # the order in which the view takes them
    shape: tuple[int, int, int]  # ``(B, N, P)``
    channels: int | None  # how many channels are viewed; None for all
    # ``(dim, size)`` of dimensions whose last patch is not full, and their size if it were
    filled: tuple[tuple[int, int], ...] = ()
    # ``(start, total)`` where only a stretch of all the tensor's tokens is viewed, N from ``start`` on
    stretch: tuple[int, int] | None = None

    def __call__(self, value: Tensor) -> Tensor:
        tokens = self._every(self._exploded(self._filled(self.cut(value))))
        own = tokens if self.stretch is None else tokens.narrow(1, self.stretch[0], self.shape[1])
        return own[..., : self.channels]

    def _every(self, exploded: Tensor) -> Tensor:
        """[B, N, P, C] of all tokens, those beside the stretch included."""
        samples, tokens, pixels = self.shape
        return exploded.reshape(samples, tokens if self.stretch is None else self.stretch[1], pixels, -1)

    @cached_property
    def everyone(self) -> TokenView:
        """The view of all tokens, where this one is of a stretch of them."""
        if self.stretch is None:
            return self
        return replace(self, stretch=None, shape=(self.shape[0], self.stretch[1], self.shape[2]))

    def cut(self, value: Tensor) -> Tensor:
        """The region's segment alone, as :attr:`uncut` views it."""
        for dim, start, length in self.cuts:
            value = value.narrow(dim, start, length)
        return value

    @cached_property
    def uncut(self) -> TokenView:
        """The view of the region's segment alone: where it stands beside others may differ from prompt to prompt."""
        return replace(self, cuts=()) if self.cuts else self

    def write(self, value: Tensor, tokens: Tensor) -> None:
        """Writes ``tokens`` [B, N, P, C] into ``value``: what was left out of the view stays as it is."""
        place = self.cut(value)
        whole = self._filled(place)
        exploded = self._exploded(whole)
        every, tokens = self._every(exploded), tokens.to(value.dtype)
        if self.stretch is not None:
            stop = self.stretch[0] + tokens.shape[1]
            beside = every[..., : tokens.shape[-1]]
            tokens = torch.cat([beside[:, : self.stretch[0]], tokens, beside[:, stop:]], 1)
        exploded.copy_(torch.cat([tokens, every[..., tokens.shape[-1] :]], -1).view(exploded.shape))
        if self.filled:
            place.copy_(whole[tuple(slice(size) for size in place.shape)])

    def _exploded(self, value: Tensor) -> Tensor:
        """A segment of whole patches with one dimension for each factor: samples, tokens, pixels, channels."""
        return value.view(self.exploded).permute(self.order)

    def _filled(self, value: Tensor) -> Tensor:
        """The value with whole patches: what is missing repeats the last entry."""
        for dim, size in self.filled:
            places = torch.arange(size, device=value.device).clamp_(max=value.shape[dim] - 1)
            value = value.index_select(dim, places)
        return value


def token_view(layout: Layout, frame: Frame, channels: int | None = None) -> TokenView:
    """Makes a function from a tensor with ``layout`` to ``[B, N, P, C]``: samples, tokens, pixels of a patch, channels.

    Factors beside the region in its own dimensions are the pixels, all others are channels; a packed token has one pixel.

    Args:
        channels: only the first so many channels are viewed (a learned variance behind the noise is left out).
    """
    region = [atom for atom, _ in frame.everyone.region]
    dims, cuts = [], []
    filled = tuple((k, dim_size(opened(dim))) for k, dim in enumerate(layout.dims) if opened(dim) != dim)
    layout = Layout(tuple(map(frame.gathered, layout.dims)))
    for index, dim in enumerate(map(opened, layout.dims)):
        inside, cut = _segment(dim, region)
        dims.append(inside)
        if cut is not None:
            cuts.append((index, *cut))
    samples: list[int] = []
    tokens: dict[Atom, int] = {}
    pixels: list[int] = []
    rest: list[int] = []
    exploded: list[int] = []
    for dim in dims:
        beside = any(atom in region for atom in atoms_of(dim))
        for axis in dim:
            assert isinstance(axis, Axis)
            place = len(exploded)
            exploded.append(axis.size)
            if axis.atom is not None and axis.atom == frame.batch:
                samples.append(place)
            elif axis.atom is not None and axis.atom in region:
                tokens[axis.atom] = place
            else:
                (pixels if beside else rest).append(place)
    if any(axis.atom == RANKS for axis in axes_of(f for dim in dims for f in dim)):
        raise UnsupportedGraph("an output with the tokens of all processes, in which theirs stand between each other")
    if any(axis.atom is not None and axis.atom.order is not None for axis in axes_of(f for dim in dims for f in dim)):
        raise UnsupportedGraph("the noise's tokens stand in another order than the latent's; undo the order at the end")
    if len(tokens) != len(region):
        raise UnsupportedGraph(f"an output, {layout}, that has only a part of the token grid")
    order = [*samples, *(tokens[atom] for atom in region), *pixels, *rest]
    patch = math.prod(exploded[place] for place in pixels)

    holding = frozenset(index for index, dim in enumerate(layout.dims) if set(region) & set(atoms_of(dim)))
    stretch = None if frame.stretch is None else (frame.stretch[0], frame.everyone.tokens)
    shape = frame.samples, frame.tokens, patch
    return TokenView(tuple(cuts), holding, tuple(exploded), tuple(order), shape, channels, filled, stretch)


def _segment(dim: Dim, region: list) -> tuple[Dim, tuple[int, int] | None]:
    """The segment of a dimension that holds the region, and where it stands; the dimension itself if it has none."""
    if len(dim) == 1 and isinstance(dim[0], Concat):
        start = 0
        for segment in dim[0].segments:
            size = math.prod(factor.size for factor in segment)
            if any(atom in region for atom in atoms_of(segment)):
                return normal(segment), (start, size)
            start += size
    if any(isinstance(factor, Concat) for factor in dim):
        raise UnsupportedGraph("an output whose tokens stand in segments that are repeated or split")
    return dim, None


def channel_count(layout: Layout, frame: Frame) -> int:
    """C of the token view of a value with ``layout``."""
    region = {atom for atom, _ in (*frame.region, *frame.everyone.region)}
    beside = [dim for dim in layout.dims if not region & set(atoms_of(dim))]
    return math.prod(
        dim_size(f for f in dim if not (isinstance(f, Axis) and f.atom and f.atom == frame.batch)) for dim in beside
    )
