"""The axis algebra against brute force: a tensor that holds its own flat index is followed through views."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from brute import OUTSIDE, atom_digits, random_rows, rows_of, spliced
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import (  # fmt: skip
    Atom,
    Axis,
    Concat,
    Frame,
    Layout,
    Refine,
    Sizes,
    ViewError,
    atoms_of,
    concat,
    dim_size,
    normal,
    opaque,
)
from ras_compile.passes.algebra.tokens import channel_count, token_view
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.programs.positions import PositionBuilder

TEXT = -7  # what a text segment holds instead of an index into the latent
quick = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


@st.composite
def frames(draw) -> Frame:
    """A latent of 1 to 4 dimensions, a batch or none, atoms cut and left out at random."""
    rank = draw(st.integers(1, 4))
    shape = [draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in range(rank)]
    batch_dim = draw(st.sampled_from([None, 0, rank - 1])) if rank > 1 else None
    frame = Frame.of(shape, batch_dim=batch_dim)
    for _ in range(draw(st.integers(0, 3))):
        atoms = [(axis.atom, axis.size) for dim in range(rank) if dim != batch_dim for axis in frame.atoms(dim)]
        atom, size = draw(st.sampled_from([(atom, size) for atom, size in atoms if atom is not None] or [(None, 1)]))
        if size > 1:
            outer = draw(st.sampled_from(divisors(size)[1:-1] or [None]))
            frame = frame if outer is None else frame.refined(atom, outer)
    region = [atom for atom, _ in frame.region]
    frame = frame.without(frozenset(draw(st.sets(st.sampled_from(region), max_size=len(region) - 1)) if region else ()))
    assume(frame.region)
    return frame


@dataclass
class Walk:
    """A latent that holds its own flat index, and the layout that should describe it."""

    frame: Frame
    value: Tensor
    layout: Layout

    @staticmethod
    def start(frame: Frame) -> Walk:
        return Walk(frame, torch.arange(math.prod(frame.shape)).reshape(frame.shape), frame.layout())

    def view(self, kind: str, seed: int) -> None:
        """Takes one random view; a view that no layout describes leaves everything as it is.

        Raises:
            Refine: the view cuts an atom.
        """
        rng = np.random.default_rng(seed)
        shape = list(self.value.shape)
        if kind == "permute":
            order = rng.permutation(len(shape)).tolist()
            self.value, self.layout = self.value.permute(order), self.layout.permute(order)
        elif kind == "concat":
            self._concat(rng)
        else:
            target = {"merge": merged, "split": split, "shuffle": shuffled}[kind](shape, rng)
            with contextlib.suppress(ViewError):
                self.layout = self.layout.reshape(target)
                self.value = self.value.reshape(target)

    def _concat(self, rng: np.random.Generator) -> None:
        region = {atom for atom, _ in self.frame.region}
        at = [index for index, dim in enumerate(self.layout.dims) if region <= set(atoms_of(dim))]
        if not at or self.frame.batch in atoms_of(self.layout.dims[at[0]]):
            return
        before, after = (int(rng.integers(0, 4)) for _ in range(2))
        parts = [
            torch.full([n if d == at[0] else s for d, s in enumerate(self.value.shape)], TEXT) for n in (before, after)
        ]
        self.value = torch.cat([parts[0], self.value, parts[1]], at[0])
        self.layout = self.layout.replace(at[0], concat([(Axis(before),), self.layout.dims[at[0]], (Axis(after),)]))


def merged(shape: list[int], rng: np.random.Generator) -> list[int]:
    if len(shape) < 2:
        return shape
    at = int(rng.integers(0, len(shape) - 1))
    return [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]


def split(shape: list[int], rng: np.random.Generator) -> list[int]:
    at = int(rng.integers(0, len(shape)))
    outer = int(rng.choice(divisors(shape[at])))
    return [*shape[:at], outer, shape[at] // outer, *shape[at + 1 :]]


def shuffled(shape: list[int], rng: np.random.Generator) -> list[int]:
    left, target = math.prod(shape), []
    while left > 1:
        target.append(int(rng.choice(divisors(left))))
        left //= target[-1]
    return [*target, 1]


@st.composite
def walks(draw) -> Walk:
    """Random views of a latent; a cut atom is refined and the walk starts over, as in the propagation."""
    frame = draw(frames())
    kinds = st.sampled_from(["permute", "merge", "split", "shuffle", "concat"])
    views = draw(st.lists(st.tuples(kinds, st.integers(0, 2**16)), max_size=7))
    while True:
        walk = Walk.start(frame)
        try:
            for kind, seed in views:
                walk.view(kind, seed)
            return walk
        except Refine as fact:
            assume(fact.atom != frame.batch)  # refused by the propagation
            frame = fact.apply(frame)


@quick
@given(walks())
def test_a_layout_says_where_each_entry_comes_from(walk: Walk):
    assert walk.layout.shape == tuple(walk.value.shape)
    frame, value = walk.frame, walk.value.numpy()
    places = np.unravel_index(np.maximum(value, 0), frame.shape)
    for dim, parts in enumerate(frame.parts):
        for axis in frame.atoms(dim):
            if axis.atom is not None and axis.size > 1:
                wanted = np.where(value == TEXT, OUTSIDE, places[dim] // axis.atom.stride % axis.size)
                found = atom_digits(frame, walk.layout, axis.atom)
                # a sample has an entry in text segments too: there the layout may say which
                at = value != TEXT if axis.atom == frame.batch else ...
                assert np.array_equal(found[at], wanted[at]), (walk.layout, parts, axis)


def addressable(layout: Layout, frame: Frame) -> bool:
    """Whether the samples stand in a dimension of their own factors, as gathers and splices ask for."""
    plain = [axis.atom for dim in layout.dims for axis in dim if isinstance(axis, Axis)]
    nested = any(
        isinstance(inner, Concat)
        for dim in layout.dims
        for f in dim
        if isinstance(f, Concat)
        for s in f.segments
        for inner in s
    )
    return (frame.batch is None or frame.batch in plain) and not nested


@quick
@given(walks(), st.data())
def test_gather_and_splice_against_brute_force(walk: Walk, data):
    frame, layout, value = walk.frame, walk.layout, walk.value
    active = data.draw(st.integers(1, frame.tokens))
    rows = random_rows(frame, active, data.draw(st.integers(0, 99)))
    emit = Emitter(contextlib.nullcontext())  # type: ignore[arg-type]
    builder = PositionBuilder(frame, Sizes(frame, active), emit.placeholder("rows", rows), emit, emit)
    if not addressable(layout, frame):
        with pytest.raises(UnsupportedGraph):
            builder.of(layout)
        return
    positions = builder.of(layout)
    indices = [index.meta["val"] for index in positions.indices]
    found = value.permute(positions.order)[tuple(indices)].permute(positions.inverse)
    assert tuple(found.shape) == Sizes(frame, active).shape(layout)
    assert torch.equal(found, rows_of(value, layout, frame, rows))
    fresh = torch.arange(found.numel()).reshape(found.shape) + 10_000
    cache = torch.full(value.shape, -1)
    cache.permute(positions.order).index_put_(indices, fresh.permute(positions.order))
    assert torch.equal(cache, spliced(torch.full(value.shape, -1), fresh, layout, frame, rows))
    assert (cache >= 0).sum() == found.numel(), "every active entry is written once"
    assert builder.of(layout) is positions


@quick
@given(walks())
def test_token_view_against_brute_force(walk: Walk):
    frame, layout, value = walk.frame, walk.layout, walk.value
    if not addressable(layout, frame) or any(
        isinstance(f, Concat) and len(dim) > 1 for dim in layout.dims for f in dim
    ):
        with contextlib.suppress(UnsupportedGraph):
            token_view(layout, frame)
        return
    view = token_view(layout, frame)
    found = view(value)
    assert found.shape[:2] == (frame.samples, frame.tokens)
    assert found.shape[3] == channel_count(layout, frame)
    places = np.unravel_index(found.numpy(), frame.shape)
    token = np.zeros_like(found.numpy())
    for atom, size in frame.region:
        token = token * size + places[atom.dim] // atom.stride % size
    assert np.array_equal(token, np.broadcast_to(np.arange(frame.tokens)[None, :, None, None], token.shape))
    if frame.batch_dim is not None:
        sample = places[frame.batch_dim]
        assert np.array_equal(sample, np.broadcast_to(np.arange(frame.samples)[:, None, None, None], sample.shape))
    assert len(np.unique(found.numpy())) == found.numel() == math.prod(frame.shape), "every entry of the latent once"
    written, few = value.clone(), max(1, found.shape[3] - 1)
    view.write(written, -1 - found[..., :few])
    assert torch.equal(view(written)[..., :few], -1 - found[..., :few])
    assert torch.equal(view(written)[..., few:], found[..., few:]), "the channels behind stay"


@quick
@given(frames(), st.data())
def test_a_refined_atom_is_the_same_dimension_in_finer_digits(frame: Frame, data):
    dim = data.draw(st.integers(0, len(frame.shape) - 1))
    axis = data.draw(st.sampled_from(frame.atoms(dim)))
    assume(axis.atom is not None and axis.size > 1)
    outer = data.draw(st.sampled_from(divisors(axis.size)[1:-1] or [None]))
    assume(outer is not None)
    finer = frame.refined(axis.atom, outer)
    assert [math.prod(parts) for parts in finer.parts] == [math.prod(parts) for parts in frame.parts]
    places = np.arange(frame.shape[dim])
    old = places // axis.atom.stride % axis.size
    inner = axis.size // outer
    assert np.array_equal(old // inner, places // (axis.atom.stride * inner) % outer)
    assert Axis(inner, Atom(dim, axis.atom.stride)) in finer.atoms(dim)
    assert Axis(outer, Atom(dim, axis.atom.stride * inner)) in finer.atoms(dim)
    if dim != frame.batch_dim:
        assert finer.tokens == frame.tokens
        assert math.prod(finer.grid) == finer.tokens


plain = st.builds(Axis, st.sampled_from([1, 2, 3]), st.none() | st.builds(Atom, st.integers(0, 2), st.just(1)))
products = st.recursive(
    plain.map(lambda axis: (axis,)),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda dims: tuple(f for dim in dims for f in dim))
        | st.lists(inner).map(concat)
    ),
    max_leaves=5,
)


@quick
@given(products)
def test_normal_is_idempotent_and_keeps_size_and_atoms(dim: tuple):
    once = normal(dim)
    assert normal(once) == once
    assert dim_size(once) == dim_size(dim)
    assert list(atoms_of(once)) == [
        atom for f in dim for atom in atoms_of((f,)) if not (isinstance(f, Axis) and f.size == 1)
    ]
    assert all(isinstance(f, Concat) or f.size != 1 for f in once)
    plain = [isinstance(factor, Axis) and factor.atom is None for factor in once]
    assert not any(a and b for a, b in itertools.pairwise(plain)), "neighbours without an atom are one factor"


@quick
@given(st.lists(products, min_size=1, max_size=4))
def test_concat_is_canonical_whatever_the_grouping(segments: list):
    whole = concat(segments)
    assert normal(whole) == whole
    assert dim_size(whole) == sum(dim_size(segment) for segment in segments)
    for border in range(1, len(segments)):
        assert concat([concat(segments[:border]), concat(segments[border:])]) == whole


@pytest.mark.parametrize(
    ("dims", "shape", "wanted"),
    [
        (((Axis(4, Atom(1, 1)), Axis(6, Atom(2, 1))),), (4, 6), "[d1:4, d2:6]"),
        (((Axis(4, Atom(1, 1)),), (Axis(6, Atom(2, 1)),)), (24,), "[(d1:4 d2:6)]"),
        (((Axis(4, Atom(1, 1)),),), (2, 2), Refine),
        (((Axis(4, Atom(1, 1)), Axis(6, Atom(2, 1))),), (6, 4), ViewError),
        ((concat([opaque(3), (Axis(4, Atom(1, 1)),)]), opaque(8)), (7, 2, 4), "[3 | d1:4, 2, 4]"),
        ((concat([opaque(4), (Axis(4, Atom(1, 1)),)]), opaque(8)), (2, 4, 8), ViewError),
        ((opaque(8),), (2, 4), "[2, 4]"),
        ((opaque(1), (Axis(4, Atom(1, 1)),)), (1, 4, 1), "[(), d1:4, ()]"),
    ],
)
def test_reshape_by_hand(dims, shape, wanted):
    if isinstance(wanted, str):
        assert str(Layout.of(dims).reshape(shape)) == wanted
    else:
        with pytest.raises(wanted):
            Layout.of(dims).reshape(shape)


def test_a_window_is_a_region_with_context_around_it():
    frame = Frame.of((2, 9, 4), window=(2, 7)).without(frozenset([Atom(2, 1)]))
    assert str(frame.layout()) == "[d0:2, 2 | d1:5 | 2, 4]"
    assert frame.tokens == 5
    value = torch.arange(2 * 9 * 4).reshape(2, 9, 4)
    view = token_view(frame.layout(), frame)(value)
    assert torch.equal(view, value[:, 2:7, None])
    assert Frame.of((2, 9, 4), window=(0, 9)).layout().dims[1] == (Axis(9, Atom(1, 1)),)


def test_a_side_that_its_patches_do_not_fill():
    """5 rows in 3 patches of 2: the view repeats the last row, and what is written there is not kept."""
    frame = Frame.of((2, 5, 4)).clipped(Atom(1, 1), 3, 2).without(frozenset([Atom(1, 1), Atom(2, 1)]))
    assert str(frame.layout()) == "[d0:2, 5 of (d1/2:3 2), 4]"
    assert frame.layout().shape == (2, 5, 4) and frame.tokens == 3
    value = torch.arange(2 * 5 * 4).reshape(2, 5, 4)
    view = token_view(frame.layout(), frame)
    assert torch.equal(view(value), value[:, [0, 1, 2, 3, 4, 4]].unflatten(1, (3, 2)))
    view.write(value, 100 + torch.arange(2 * 6 * 4).reshape(2, 3, 2, 4))
    assert torch.equal(value, (100 + torch.arange(2 * 6 * 4)).reshape(2, 6, 4)[:, :5])
    assert str(frame.without(frozenset([Atom(1, 2)])).layout()) == "[d0:2, 5, 4]"
