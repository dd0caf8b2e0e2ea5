"""Where tokens stand that are in an order, against the order itself, entry by entry."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ras_compile.passes.algebra.layout import Axis, Frame
from ras_compile.passes.algebra.order import Atom, Order
from ras_compile.passes.rules.ordering import addresses, rolled

FRAME = Frame.of((1, 2, 3, 4))
BASE = [FRAME.atoms(dim)[0] for dim in (1, 2, 3)]  # 2 x 3 x 4 tokens
PAIRS = [(axis.atom, axis.size) for axis in BASE if axis.atom is not None]


def shuffled(places: list[int], seed: int) -> tuple[Order, tuple[Axis, ...]]:
    """An order of some of the dimensions, and the factors that stand in it, cut in two."""
    base = tuple(PAIRS[place] for place in places)
    size = torch.tensor([count for _, count in base]).prod().item()
    order = Order.of(base, torch.randperm(int(size), generator=torch.Generator().manual_seed(seed)))
    whole = FRAME.ordered(order)
    (axis,) = whole
    assert axis.atom is not None
    cut = axis.size // 2
    return order, (Axis(cut, Atom(-1, 2, order)), Axis(2, axis.atom))


@pytest.mark.parametrize("places", [[0], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_addresses_are_those_of_the_tokens(places, turned):
    """A product of an order's two factors and of the dimensions that are in no order, forwards and backwards."""
    order, factors = shuffled(places, seed=len(places))
    others = tuple(axis for index, axis in enumerate(BASE) if index not in places)
    part = (*others, *factors)[:: -1 if turned else 1]
    found, wanted = addresses(part, PAIRS), []
    for digits in product(*(range(axis.size) for axis in part)):
        at = dict(zip(part, digits, strict=True))
        token = int(order.places[2 * at[factors[0]] + at[factors[1]]])
        by_atom = {axis.atom: digit for axis, digit in at.items() if axis in others}
        for atom, size in reversed(order.base):
            by_atom[atom], token = token % size, token // size
        place = 0
        for atom, size in PAIRS:
            place = place * size + by_atom[atom]
        wanted.append(place)
    assert found.tolist() == wanted and sorted(wanted) == list(range(24))


@pytest.mark.parametrize("shift", [-3, 0, 1, 7])
def test_a_roll_is_the_order_that_pytorch_makes(shift):
    assert torch.equal(rolled(5, shift), torch.arange(5).roll(shift))
