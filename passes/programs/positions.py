"""Where the active rows stand in a tensor: index tensors for gathers and splices, built from `rows` [B, A]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import (
    Atom,
    Axis,
    Clipped,
    Concat,
    Dim,
    Frame,
    Layout,
    Sizes,
    atoms_of,
    axes_of,
    dim_size,
    opened,
)
from ras_compile.passes.algebra.order import RANKS, Order

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
Emit = Callable[..., fx.Node]


@dataclass(frozen=True)
class Positions:
    """How to address the sparse form of a tensor inside its whole form."""

    dims: tuple[int, ...]  # the dimensions that are addressed by an index; the others are taken in full
    # one index tensor per entry of ``dims``; together they broadcast to the sparse sizes of ``dims``
    indices: tuple[fx.Node, ...]
    rank: int  # number of dimensions of the tensor

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that brings the addressed dimensions to the front."""
        return self.dims + tuple(dim for dim in range(self.rank) if dim not in self.dims)

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(dim) for dim in range(self.rank))


class PositionBuilder:
    """Builds :class:`Positions` for layouts, each distinct one once.

    Args:
        rows: node of the active rows, int64 [B, A]; for layouts that count processes, of all of them: [R, B, A].
        emit: ``emit(target, *args, **kwargs)`` appends a node to the sparse graph.
        table: ``table(name, tensor)`` is the node of a constant of the sparse graph.
        ranked: whether the rows are those of all processes.
    """

    def __init__(
        self,
        frame: Frame,
        sizes: Sizes,
        rows: fx.Node,
        emit: Emit,
        table: Callable[..., fx.Node],
        ranked: bool = False,
    ) -> None:
        self.frame, self.sizes, self.emit, self.table = frame, sizes, emit, table
        self.orders: dict[Order, fx.Node] = {}
        self.region = [atom for atom, _ in frame.region]
        self.weights = {
            atom: math.prod(size for _, size in frame.region[index + 1 :])
            for index, (atom, _) in enumerate(frame.region)
        }
        self.device = rows.meta["val"].device
        if frame.replicas is not None and not ranked:
            sent = emit(c10d.broadcast.default, rows, 0, frame.replicas.name)
            rows = emit(c10d.wait_tensor.default, sent)
        self.given = rows
        self.rows = rows if frame.batch is not None else emit(aten.select.int, rows, int(ranked), 0)
        # what counts the dimensions of `self.rows` in front of the active ones: [R, B, A], [B, A], [R, A] or [A]
        self.pictures = [*([RANKS] if ranked else []), *([frame.batch] if frame.batch is not None else [])]
        self.ranked = ranked
        self.known: dict[tuple[Dim | None, ...], Positions] = {}

    def of(self, layout: Layout) -> Positions:
        """Positions of the active rows of a tensor with this layout.

        Raises:
            UnsupportedGraph: the tensor has lost the dimension that counts the samples.
        """
        if layout.ranked and not self.ranked:
            return self._everyone.of(layout)
        marked = [index for index, dim in enumerate(layout.dims) if self._addressed(dim)]
        key = tuple(dim if index in marked else None for index, dim in enumerate(layout.dims))
        if key not in self.known:
            self.known[key] = Positions(
                tuple(marked), self._indices([layout.dims[m] for m in marked]), len(layout.dims)
            )
        return self.known[key]

    @cached_property
    def _everyone(self) -> PositionBuilder:
        """The builder for layouts that count processes: the active rows of all of them are gathered."""
        group = self.frame.shards
        assert group is not None
        sent = self.emit(c10d.all_gather_into_tensor.default, self.given, group.size, group.name)
        rows = self.emit(c10d.wait_tensor.default, sent)
        rows = self.emit(aten.reshape.default, rows, [group.size, *self.given.meta["val"].shape])
        return PositionBuilder(self.frame, self.sizes, rows, self.emit, self.table, ranked=True)

    def _addressed(self, dim: Dim) -> bool:
        return any(self.frame.counts_tokens(atom) or self.frame.counts_pictures(atom) for atom in atoms_of(dim))

    def _indices(self, clipped: list[Dim]) -> tuple[fx.Node, ...]:
        dims = [opened(dim) for dim in clipped]
        if any(isinstance(factor, Clipped) for dim in dims for factor in dim):
            raise UnsupportedGraph("a side that its patches do not fill, in one dimension with others")
        axes = [(place, axis) for place, dim in enumerate(dims) for axis in dim]  # every factor of every dimension
        found = {axis.atom: k for k, (_, axis) in enumerate(axes) if isinstance(axis, Axis) and axis.atom is not None}
        if not found.keys() >= set(self.pictures):
            raise UnsupportedGraph("tokens of different samples stand in one dimension; a batch of one is supported")
        pictures = [found[atom] for atom in self.pictures]
        if not set(self.frame.tokens_in(dims)) >= set(self.region):
            raise UnsupportedGraph("a value with a part of the token grid beside values with all of it")
        lead = next(k for k, (_, axis) in enumerate(axes) if any(map(self.sizes.leads, axes_of((axis,)))))
        extents = [self.sizes.dim((axis,)) for _, axis in axes]
        indices = [self._index(place, dims, axes, extents, pictures, lead) for place in range(len(dims))]
        for place, (dim, whole) in enumerate(zip(clipped, dims, strict=True)):
            if dim != whole:  # what is missing of the last patch is its last entry, once more
                indices[place] = self.emit(aten.clamp.default, indices[place], None, dim_size(dim) - 1)
        return tuple(indices)

    def _index(
        self, place: int, dims: list[Dim], axes: list, extents: list[int], pictures: list[int], lead: int
    ) -> fx.Node:
        """The index along one dimension, of a shape that broadcasts to the sparse sizes of all addressed dimensions."""
        terms: list[fx.Node] = []
        needed = {place}
        stride = math.prod(axis.size for axis in dims[place])
        mine = [k for k, (where, _) in enumerate(axes) if where == place]
        for run in self._runs([axes[k][1] for k in mine]):
            group = [mine[k] for k in run]
            count = math.prod(axes[k][1].size for k in group)
            stride //= count
            axis = axes[group[0]][1]
            if isinstance(axis, Concat):
                term = self._on(self._concat(axis), [*pictures, group[0]], axes)
                needed |= {axes[k][0] for k in pictures}
            elif self.frame.counts_tokens(axis.atom):
                digit = self._digit(axes[group[-1]][1].atom, count)
                term = self._on(digit, [*pictures, lead], axes)
                needed |= {axes[k][0] for k in (*pictures, lead)}
            else:
                term = self._on(self._arange(axis.size), [group[0]], axes)
            terms.append(term if stride == 1 else self.emit(aten.mul.Tensor, term, stride))
        total = terms[0]
        for term in terms[1:]:
            total = self.emit(aten.add.Tensor, total, term)
        full = [extent if where in needed else 1 for extent, (where, _) in zip(extents, axes, strict=True)]
        shape = [math.prod(e for e, (where, _) in zip(full, axes, strict=True) if where == d) for d in range(len(dims))]
        if list(total.meta["val"].shape) != full:
            total = self.emit(aten.expand.default, total, full)
        return total if full == shape else self.emit(aten.reshape.default, total, shape)

    def _runs(self, factors: list) -> list[list[int]]:
        """Groups neighbouring region atoms that follow each other in the region's order: one digit serves them all."""
        runs: list[list[int]] = []
        for index, factor in enumerate(factors):
            last = factors[index - 1] if index else None
            if (
                isinstance(factor, Axis)
                and isinstance(last, Axis)
                and self._follows(last.atom, factor.atom, factor.size)
            ):
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs

    def _follows(self, last: Atom | None, atom: Atom | None, size: int) -> bool:
        if atom is None or last is None or atom.order != last.order or not self.frame.counts_tokens(last):
            return False
        if atom.order is not None:
            return last.stride == atom.stride * size
        return atom in self.region and self.region.index(atom) == self.region.index(last) + 1

    def _digit(self, last: Atom, count: int) -> fx.Node:
        """Index of every active row in a run of region atoms that ends with ``last``, of the shape of ``self.rows``."""
        order = last.order
        value = self.rows if order is None else self._ordered(order)
        weight, total = (self.weights[last], self.frame.tokens) if order is None else (last.stride, order.size)
        if weight > 1:
            value = self.emit(aten.div.Tensor_mode, value, weight, rounding_mode="floor")
        if weight * count < total:
            value = self.emit(aten.remainder.Scalar, value, count)
        return value

    def _ordered(self, order: Order) -> fx.Node:
        """Where every active row stands in an order, of the shape of ``self.rows``."""
        if order not in self.orders:
            value, weight = None, order.size
            for run in self._runs([Axis(size, atom) for atom, size in order.base]):
                atoms = [order.base[k] for k in run]
                count = math.prod(size for _, size in atoms)
                weight //= count
                digit = self._digit(atoms[-1][0], count)
                digit = digit if weight == 1 else self.emit(aten.mul.Tensor, digit, weight)
                value = digit if value is None else self.emit(aten.add.Tensor, value, digit)
            table = self.table(f"order_{order.digest}", order.inverse)
            self.orders[order] = self.emit(aten.index.Tensor, table, [value])
        return self.orders[order]

    def _arange(self, size: int) -> fx.Node:
        return self.emit(aten.arange.default, size, dtype=torch.int64, device=self.device)

    def _on(self, value: fx.Node, places: list, axes: list) -> fx.Node:
        """Puts the dimensions of ``value`` at ``places`` among all axes; the others have one entry."""
        if list(places) != sorted(places):
            order = sorted(range(len(places)), key=places.__getitem__)
            value, places = self.emit(aten.permute.default, value, order), sorted(places)
        shape = [1] * len(axes)
        for place, size in zip(places, value.meta["val"].shape, strict=True):
            shape[place] = size
        return value if len(shape) == len(places) else self.emit(aten.reshape.default, value, shape)

    def _concat(self, axis: Concat) -> fx.Node:
        """Positions of the sparse entries of a concatenated dimension: [B, S'] or [S']."""
        parts, offset = [], 0
        lead_shape = list(self.rows.meta["val"].shape[:-1])
        for segment in axis.segments:
            size = math.prod(factor.size for factor in segment)
            inside = any(map(self.frame.counts_tokens, atoms_of(segment)))
            if any(isinstance(factor, Concat) for factor in segment):
                raise UnsupportedGraph("segments inside a product of segments")
            if not self.sizes.segment(segment):
                offset += size
                continue
            if not inside:
                part = self._arange(size)
                if lead_shape:
                    part = self.emit(aten.expand.default, part, [*lead_shape, size])
            else:
                part = self._segment(segment)
            parts.append(part if offset == 0 else self.emit(aten.add.Tensor, part, offset))
            offset += size
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, parts, -1)

    def _segment(self, segment: Dim) -> fx.Node:
        """Positions of the sparse entries of one segment that holds the region: [B, S'] or [S']."""
        if len(self._runs(list(segment))) == 1:
            return self._digit(segment[-1].atom, dim_size(segment))
        dims: list[Dim] = [
            *((Axis(size, atom),) for atom, size in zip(self.pictures, self.rows.meta["val"].shape, strict=False)), segment
        ]  # fmt: skip
        return self._indices(dims)[-1]
