"""Tokens in another order that is known before any call: `b n c -> b n' c`, where nothing moves in the sparse world."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from ras_compile.passes.algebra.layout import Axis, Dim, Factor, Layout, Shifted, dim_size, normal
from ras_compile.passes.algebra.order import Order, factored, is_order
from ras_compile.passes.rules.constants import constant
from ras_compile.passes.rules.contraction import grid_atoms, region_atoms
from ras_compile.passes.rules.registry import Call, Step, Use

aten = torch.ops.aten

KNOWN = "places"  # in the meta of a node: what it is as an order, once that was asked


def reordered(call: Call, layout: Layout, orders: dict[int, Tensor]) -> Step | None:
    """The step of an op whose result has entry ``orders[dim][i]`` of its operand at place i along each ``dim``.

    None where tokens and other entries of one dimension change places with each other.

    Raises:
        Shifted: what was taken for a part of a token, a place in a window, moves to another one.
    """
    dims, stays = list(layout.dims), True
    for dim, places in orders.items():
        found = along(call, dims[dim], places)
        if found is None:
            if call.frame.excluded and not call.frame.shifted and not layout.raw and region_atoms(call, [dims[dim]]):
                raise Shifted
            return None
        dims[dim], still = found
        stays = stays and still
    out = Layout(tuple(dims), layout.raw)
    if not stays:
        return call.whole(out)
    operand = call.args["self"]
    return Step(out, (Use.ROWS,), rewrite=lambda sizes: (aten.alias.default, (operand,), {}))


def along(call: Call, dim: Dim, places: Tensor) -> tuple[Dim, bool] | None:
    """``(dimension, whether tokens alone move)`` of a dimension in another order."""
    result: list[Factor] = []
    stays = True
    if dim_size(dim) != len(places):
        return None
    for positions, order in factored(places, [factor.size for factor in dim]):
        part = tuple(dim[position] for position in positions)
        if torch.equal(order, torch.arange(len(order))):
            result += part
        elif not grid_atoms(call, [part]):
            result, stays = [*result, *part], False
        elif all(isinstance(factor, Axis) and call.frame.counts_tokens(factor.atom) for factor in part):
            tokens = in_order(call, part, order)
            if tokens is None:
                return None
            result += tokens
        else:
            return None
    return normal(result), stays


def in_order(call: Call, part: tuple[Factor, ...], places: Tensor) -> list[Axis] | None:
    """The factors of tokens whose entries ``places`` takes from ``part``; the latent's own where nothing is left of an order."""
    held = set(call.frame.tokens_in([part]))
    base = [(atom, size) for atom, size in call.frame.region if atom in held]
    if math.prod(size for _, size in base) != len(places):
        return None  # only a part of what stands in an order
    table = addresses(part, base)[places]
    found: list[Axis] = []
    for positions, order in factored(table, [size for _, size in base]):
        axes = [Axis(size, atom) for atom, size in (base[position] for position in positions)]
        if torch.equal(order, torch.arange(len(order))):
            found += axes
        else:
            found += call.frame.ordered(Order.of(tuple(base[position] for position in positions), order))
    return found


def addresses(part: tuple[Factor, ...], base: list) -> Tensor:
    """Of each entry of a product of tokens its place in the product of the latent's own atoms."""
    weights, weight = {}, 1
    for atom, size in reversed(base):
        weights[atom], weight = (weight, size), weight * size
    entries, stride = torch.arange(dim_size(part)), dim_size(part)
    within: dict[Order, Tensor] = {}
    total = torch.zeros_like(entries)
    for axis in part:
        assert isinstance(axis, Axis) and axis.atom is not None
        stride //= axis.size
        digit = entries // stride % axis.size
        if axis.atom.order is None:
            total += digit * weights[axis.atom][0]
        else:
            order = axis.atom.order
            within[order] = within.get(order, 0) + digit * axis.atom.stride
    for order, place in within.items():
        own = order.places[place]
        for atom, size in reversed(order.base):
            total += own % size * weights[atom][0]
            own = own // size
    return total


def order_of(node: fx.Node, dim: int | None = None) -> Tensor | None:
    """The order that a tensor of indices is, if its values are known: int64 [n]; None where it is none.

    Args:
        dim: the indices are the same along all other dimensions, and an order along this one; None: there is no other one.
    """
    known = node.meta.setdefault(KNOWN, {})
    if dim not in known:
        known[dim] = _order_of(node, dim)
    return known[dim]


def _order_of(node: fx.Node, dim: int | None) -> Tensor | None:
    value = node.meta["val"]
    if value.dtype not in (torch.int64, torch.int32) or (dim is None and value.ndim != 1):
        return None
    found = constant(node)
    if found is None or found.is_meta:
        return None
    places = found.cpu().to(torch.int64)
    if dim is not None:
        places = places.movedim(dim, -1)
        first = places[(0,) * (places.ndim - 1)]
        if not bool((places == first).all()):
            return None
        places = first
    places = torch.where(places < 0, places + len(places), places)
    return places.contiguous() if is_order(places) else None


def rolled(size: int, shift: int) -> Tensor:
    return (torch.arange(size) - shift) % size
