"""Atoms of the latent, and orders in which its tokens may stand. Both are plain data, compared by value.

Tokens stand in another order in windows that are rolled, along a Hilbert curve, or in a picture that is flipped.

Entry ``i`` of a dimension that stands in an order is entry ``places[i]`` of the product of the latent's own atoms, ``base``.
In the sparse world nothing moves: the active rows have the order of `rows` in every tensor, and only where they stand in the
whole one is looked up through the order. So an order that is undone by another one is no order at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Atom(NamedTuple):
    """A part of one latent dimension: entry ``i`` of the dimension has the index ``(i // stride) % size`` in the atom.

    With an ``order`` it is a part of tokens that stand in that order, in place of those of a dimension (``dim`` is then -1).
    """

    dim: int
    stride: int
    order: Order | None = None


# A dimension that counts the processes of a group, behind an exchange of tokens: entry r holds the tokens of process r.
RANKS = Atom(-2, 1)
# The tokens that this process takes out of those of the whole latent, which all processes have: one stretch of them.
OWN = Atom(-3, 1)


@dataclass(frozen=True, order=True)
class Order:
    """Tokens in an order that is known before any call."""

    # the latent's atoms whose tokens are reordered, with their sizes, in the region's order
    base: tuple[tuple[Atom, int], ...]
    digest: str  # what tells one order of them from another
    places: Tensor = field(compare=False, repr=False)  # int64 [n], of each entry its place in the product of ``base``

    @staticmethod
    def of(base: tuple[tuple[Atom, int], ...], places: Tensor) -> Order:
        digest = hashlib.sha256(places.contiguous().numpy().tobytes()).hexdigest()
        return Order(base, digest[:32], places)

    @property
    def size(self) -> int:
        return len(self.places)

    @property
    def inverse(self) -> Tensor:
        """int64 [n], of each entry of the product of ``base`` its place in the order."""
        return self.places.argsort()

    def __str__(self) -> str:
        return f"order {self.digest[:4]} of {' '.join(f'd{atom.dim}:{size}' for atom, size in self.base)}"


def is_order(places: Tensor) -> bool:
    """Whether each entry stands somewhere, once."""
    return places.ndim == 1 and torch.equal(places.sort().values, torch.arange(len(places)))


def factors(places: Tensor, inner: int) -> bool:
    """Whether an order of `(outer inner)` reorders the outer entries, and all their inner ones alike."""
    pairs = places.reshape(-1, inner)
    outer, within = pairs // inner, pairs % inner
    return bool((outer == outer[:, :1]).all() and (within == within[:1]).all())


def factored(places: Tensor, sizes: list[int]) -> list[tuple[list[int], Tensor]]:
    """The finest product of orders that an order of a product with these sizes is: positions of the sizes, and their order."""
    found: list[tuple[list[int], Tensor]] = []
    start = 0
    for stop in range(1, len(sizes) + 1):
        inner = len(places)
        for size in sizes[start:stop]:
            inner //= size
        if factors(places, inner):
            found.append((list(range(start, stop)), places.reshape(-1, inner)[:, 0] // inner))
            start, places = stop, places[:inner] % inner
    return found
