"""What a layout means, entry by entry from its definition: the oracle of the tests of passes/.

Nothing here calls the compiler's own index computation; the sparse form of a tensor is enumerated entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ras_compile.passes.algebra.layout import Axis, Clipped, Concat, Factor, Frame, Layout
from ras_compile.passes.algebra.order import Atom, Order

OUTSIDE = -1  # the digit of a factor at an entry that lies in another segment


def extent(frame: Frame, factors: Sequence[Factor], active: int | None) -> int:
    """Entries of a product of factors: the dense ones, or the sparse ones at ``active`` rows."""
    lead = frame.region[0][0]
    total = 1
    for factor in factors:
        if isinstance(factor, Concat):
            total *= sum(extent(frame, segment, active) for segment in factor.segments)
        elif isinstance(factor, Clipped):
            total *= factor.size if active is None else extent(frame, factor.inner, active)
        elif active is None or not frame.counts_tokens(factor.atom):
            total *= factor.size
        else:
            total *= active if leading(factor, lead) else 1
    return total


def leading(axis: Axis, lead: Atom) -> bool:
    """Whether a factor counts the active rows: the latent's first atom, or the first part of an order that has it."""
    order = axis.atom.order
    if order is None:
        return axis.atom == lead
    return lead in dict(order.base) and axis.atom.stride * axis.size == order.size


def factors_at(
    frame: Frame, factors: Sequence[Factor], place: Any, active: int | None, stride: int = 1
) -> Iterator[tuple[Axis, Any, int]]:
    """``(factor, its digits at these places, its dense stride)`` for every plain factor of a dimension.

    A segment's own offset in the dense dimension comes as a factor without an atom: its digit is the offset.
    """
    for factor in reversed(factors):
        size = extent(frame, (factor,), active)
        digit, place = np.where(place < 0, OUTSIDE, place % size), np.where(place < 0, OUTSIDE, place // size)
        if isinstance(factor, Axis):
            yield factor, digit, stride
        elif isinstance(factor, Clipped):
            yield from factors_at(frame, factor.inner, digit, active, stride)
        else:
            start, dense_start = 0, 0
            for segment in factor.segments:
                length = extent(frame, segment, active)
                inside = (digit >= start) & (digit < start + length)
                yield Axis(factor.size), np.where(inside, dense_start, OUTSIDE), stride
                yield from factors_at(frame, segment, np.where(inside, digit - start, OUTSIDE), active, stride)
                start, dense_start = start + length, dense_start + extent(frame, segment, None)
        stride *= factor.size


def atom_digits(frame: Frame, layout: Layout, atom: Atom, active: int | None = None) -> Any:
    """Digit of ``atom`` at every entry of a tensor; OUTSIDE where the entry has none."""
    shape = tuple(extent(frame, dim, active) for dim in layout.dims)
    found = np.full(shape, OUTSIDE)
    for dim, place in zip(layout.dims, np.indices(shape), strict=True):
        for axis, digit, _ in factors_at(frame, dim, place, active):
            if axis.atom == atom or atom == frame.region[0][0] and axis.atom and leading(axis, atom):
                found = np.where(digit != OUTSIDE, digit, found)
    return found


def sparse_places(frame: Frame, layout: Layout, rows: Tensor) -> Any:
    """Flat dense index of every entry of the sparse form of a tensor with this layout: an array of the sparse shape."""
    active = rows.shape[1]
    region = frame.region
    lead = atom_digits(frame, layout, region[0][0], active)
    sample = np.zeros_like(lead) if frame.batch is None else atom_digits(frame, layout, frame.batch, active)
    token = rows.numpy()[np.maximum(sample, 0), np.maximum(lead, 0)]
    digits, weight = {}, 1
    for atom, size in reversed(region):
        digits[atom], weight = token // weight % size, weight * size
    flat = np.zeros_like(lead)
    for dim, place in zip(layout.dims, np.indices(lead.shape), strict=True):
        dense = np.zeros_like(lead)
        for axis, digit, stride in factors_at(frame, dim, place, active):
            own = digits.get(axis.atom, digit) if axis.atom is not None else digit
            if axis.atom is not None and axis.atom.order is not None:
                own = entry_of(axis.atom.order, digits) // axis.atom.stride % axis.size
            dense += np.where(digit != OUTSIDE, own, 0) * stride
        flat = flat * extent(frame, dim, None) + np.minimum(dense, extent(frame, dim, None) - 1)
    return flat


def entry_of(order: Order, digits: dict[Atom, Any]) -> Any:
    """Where in an order each token stands."""
    token = 0
    for atom, size in order.base:
        token = token * size + digits[atom]
    return np.array([order.places.tolist().index(place) for place in np.ravel(token)]).reshape(np.shape(token))


def held(frame: Frame, atom: Atom | None) -> bool:
    """Whether an atom is one of tokens, or counts the samples."""
    return frame.counts_tokens(atom) or atom is not None and atom == frame.batch


def without_sizes(layout: Layout, frame: Frame, shape: Sequence[int]) -> Layout:
    """``layout`` with the sizes of ``shape`` where a dimension has neither a token nor a sample in it."""
    dims = []
    for dim, size in zip(layout.dims, shape, strict=True):
        plain = all(isinstance(factor, Axis) and not held(frame, factor.atom) for factor in dim if factor != Axis(1))
        dims.append((Axis(size),) if plain and not any(isinstance(factor, Concat) for factor in dim) else dim)
    return Layout.of(dims)


def rows_of(value: Tensor, layout: Layout, frame: Frame, rows: Tensor) -> Tensor:
    """The sparse form of a value: brute-force picking of the active rows. A lower rank and size one are broadcast."""
    missing = len(layout.dims) - value.ndim
    value = value.reshape([1] * missing + list(value.shape))
    layout = without_sizes(layout, frame, value.shape)
    places = sparse_places(frame, layout, rows)
    return value.expand(layout.shape).reshape(-1)[torch.from_numpy(places)]


def spliced(cache: Tensor, active: Tensor, layout: Layout, frame: Frame, rows: Tensor) -> Tensor:
    """The cache with the sparse form ``active`` of a value written into it."""
    result = cache.clone(memory_format=torch.contiguous_format).reshape(-1)
    result[torch.from_numpy(sparse_places(frame, layout, rows)).reshape(-1)] = active.reshape(-1)
    return result.reshape(cache.shape)


def random_rows(frame: Frame, active: int, seed: int = 0) -> Tensor:
    """Random active rows in ascending order, others for each sample: int64 [B, active]."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(frame.tokens, generator=generator)[:active] for _ in range(frame.samples)]
    return torch.stack([pick.sort().values for pick in picks])
