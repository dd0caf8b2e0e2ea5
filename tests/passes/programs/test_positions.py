"""Where the active rows stand when the context beside them is not computed: the region's places stay those of the whole."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Axis, Concat, Dim, Frame, Group, Layout, Sizes
from ras_compile.passes.algebra.order import RANKS, Atom, Order
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.programs.positions import PositionBuilder

FRAME = Frame((2, 5, 3), ((2,), (5,), (3,)), excluded=frozenset([Atom(2, 1)]))  # [B, N, C]
BATCH, TOKENS = FRAME.atoms(0)[0], FRAME.atoms(1)[0]
ROWS = torch.tensor([[0, 3], [1, 4]])


def places(before: list[int], after: list[int], *, context: bool, region: tuple[Axis, ...] = (TOKENS,)) -> torch.Tensor:
    """Where the sparse entries of a joint sequence stand in the whole one: [B, S']."""
    emit = Emitter(contextlib.nullcontext())  # type: ignore[arg-type]  # tensors here have values
    rows = emit.placeholder("rows", ROWS)
    builder = PositionBuilder(FRAME, Sizes(FRAME, 2, context=context), rows, emit, emit)  # no order: no table
    segments = [(Axis(size),) for size in before] + [region] + [(Axis(size),) for size in after]
    positions = builder.of(Layout(((BATCH,), (Concat(tuple(segments)),), (Axis(3),))))
    assert positions.dims == (0, 1)
    return positions.indices[1].meta["val"].expand(2, -1)


@pytest.mark.parametrize(("before", "after"), [([], [4]), ([7], []), ([7], [4]), ([7, 6], [4, 2])], ids=str)
def test_a_frozen_context_moves_no_row(before, after):
    assert torch.equal(places(before, after, context=False), ROWS + sum(before))


def test_a_context_that_is_computed_stands_beside_them():
    found = places([7, 6], [4], context=True)
    wanted = [[*range(13), *(13 + row for row in rows.tolist()), *range(18, 22)] for rows in ROWS]
    assert found.tolist() == wanted


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("context", [True, False])
def test_tokens_beside_another_factor_in_one_segment(tokens_first, context):
    """Such as frames whose tokens each stand twice."""
    region = (TOKENS, Axis(2)) if tokens_first else (Axis(2), TOKENS)
    found = places([7], [], context=context, region=region)
    text = [*range(7)] if context else []
    wanted = [
        text
        + [7 + (2 * row + copy if tokens_first else 5 * copy + row) for row, copy in order(rows.tolist(), tokens_first)]
        for rows in ROWS
    ]
    assert found.tolist() == wanted


def order(rows: list[int], tokens_first: bool) -> list[tuple[int, int]]:
    """Rows and copies in the order in which the sparse entries stand."""
    return (
        [(row, copy) for row in rows for copy in (0, 1)]
        if tokens_first
        else [(row, copy) for copy in (0, 1) for row in rows]
    )


def test_rows_that_count_the_tokens_of_one_dimension_are_taken_as_they_are():
    """No op is spent on an index where a division or a remainder would change nothing."""
    emit = Emitter(contextlib.nullcontext())  # type: ignore[arg-type]  # tensors here have values
    rows = emit.placeholder("rows", ROWS)
    PositionBuilder(FRAME, Sizes(FRAME, 2), rows, emit, emit).of(FRAME.layout())
    called = {node.target for node in emit.graph.nodes if node.op == "call_function"}
    assert not called & {torch.ops.aten.div.Tensor_mode, torch.ops.aten.remainder.Scalar}


def test_the_patch_that_is_not_full_reads_its_last_entry_again():
    """Two patches of two, of a side of three entries: the second one's fourth entry is not there."""
    frame = Frame.of((1, 3, 1))
    frame = frame.clipped(Atom(1, 1), 2, 2).without(frozenset([Atom(1, 1), Atom(2, 1)]))
    emit = Emitter(contextlib.nullcontext())  # type: ignore[arg-type]  # tensors here have values
    rows = emit.placeholder("rows", torch.tensor([[0, 1]]))
    positions = PositionBuilder(frame, Sizes(frame, 2), rows, emit, emit).of(frame.layout())
    assert [index.meta["val"].flatten().tolist() for index in positions.indices] == [[0, 1, 2, 2]]


# By definition: each entry of a tensor is named by what its factors count, and the names of active rows are looked up.

GRID = Frame((2, 3, 4, 6), ((2,), (3,), (2, 2), (6,)), excluded=frozenset([Atom(1, 1)]))  # [B, C, H, W], H in two parts
ALONE = Frame((1, 3, 4, 6), GRID.parts, excluded=GRID.excluded)
B, C, (H, h), (W,) = (*GRID.atoms(0), *GRID.atoms(1)), Axis(3), GRID.atoms(2), GRID.atoms(3)
PICTURE = B[0]
SHUFFLED = torch.randperm(24, generator=torch.Generator().manual_seed(0))
BY_ROWS = Order.of(((H.atom, 2), (h.atom, 2), (W.atom, 6)), SHUFFLED)
OF_LINES = Order.of(((H.atom, 2), (h.atom, 2)), torch.tensor([2, 0, 3, 1]))
OF_COLUMNS = Order.of(((W.atom, 6),), torch.tensor([5, 3, 1, 0, 2, 4]))
SEVERAL = Order.of(((H.atom, 2), (W.atom, 6)), SHUFFLED[SHUFFLED < 12])


def whole(order: Order) -> Axis:
    return Axis(order.size, Atom(-1, 1, order))


def parts(order: Order, *sizes: int) -> list[Axis]:
    return [Axis(size, Atom(-1, math.prod(sizes[place + 1 :]), order)) for place, size in enumerate(sizes)]


LAYOUTS: dict[str, list[list]] = {
    "as it is": [[PICTURE], [C], [H, h], [W]],
    "packed": [[PICTURE], [H, h, W], [C]],
    "by columns": [[PICTURE], [W, H, h], [C]],
    "each apart": [[H], [PICTURE], [W], [C], [h]],
    "turned": [[W], [h], [H], [PICTURE, C]],
    "lines are samples": [[PICTURE, H, h], [W, C]],
    "lines apart": [[h, PICTURE], [W, H, Axis(5)]],
    "patches": [[PICTURE], [H, W], [h, C]],
    "halves change places": [[PICTURE], [h, H, W], [C]],
    "columns before lines": [[PICTURE], [W, h], [H, C]],
    "beside a text": [[PICTURE], [Concat(((Axis(7),), (H, h, W), (Axis(2),)))], [C]],
    "by columns beside a text": [[PICTURE], [C], [Concat(((W, H, h), (Axis(2),)))]],
    "in pieces beside a text": [[PICTURE, C], [Concat(((Axis(7),), (h, W, H), (Axis(2),)))]],
    "twice beside a text": [[PICTURE], [Concat(((Axis(7),), (H, Axis(2), h, W)))]],
    "a text for each": [[PICTURE], [H, h], [W, Concat(((Axis(2),), (Axis(3),)))]],
    "in an order": [[PICTURE], [whole(BY_ROWS)], [C]],
    "cut in an order": [[PICTURE, parts(BY_ROWS, 4, 6)[0]], [parts(BY_ROWS, 4, 6)[1], C]],
    "turned in an order": [[parts(BY_ROWS, 3, 8)[1]], [PICTURE, parts(BY_ROWS, 3, 8)[0], C]],
    "lines in an order": [[PICTURE], [whole(OF_LINES), W]],
    "columns in an order": [[PICTURE], [H, h, whole(OF_COLUMNS)]],
    "both in orders": [[whole(OF_COLUMNS)], [PICTURE], [*parts(OF_LINES, 2, 2), C]],
    "an order of what does not follow": [[PICTURE], [h, whole(SEVERAL)], [C]],
    "in an order beside a text": [[PICTURE], [Concat(((Axis(7),), (whole(BY_ROWS),), (Axis(2),)))]],
    "in parts of an order beside a text": [[PICTURE], [Concat(((Axis(7),), tuple(parts(BY_ROWS, 4, 6)[::-1])))]],
}  # fmt: skip
Name = tuple[tuple[object, int], ...]


def named(dim: Dim, sizes: Sizes | None = None, where: tuple = ()) -> list[Name]:
    """What each entry of a dimension is: the index in each of its factors; in the sparse form where sizes are given."""
    found: list[Name] = [()]
    for place, factor in enumerate(dim):
        if isinstance(factor, Concat):
            names = [
                ((*where, place, "segment"), number, *name)
                for number, segment in enumerate(factor.segments)
                for name in named(segment, sizes, (*where, place, number))
            ]
            mine: list[Name] = [((place_, number), *rest) for place_, number, *rest in names]
        else:
            assert isinstance(factor, Axis)
            size = factor.size if sizes is None else sizes.axis(factor)
            mine = [((factor.atom or (*where, place), index),) for index in range(size)]
        found = [(*before, *after) for before in found for after in mine]
    return found


def digits(frame: Frame, row: int) -> dict[Atom, int]:
    found = {}
    for atom, size in reversed(frame.region):
        row, found[atom] = divmod(row, size)
    return found


def of_row(frame: Frame, atom: Atom, row: int) -> int:
    """Where a row stands in an atom of the region, or in a part of an order."""
    index = digits(frame, row)
    if atom.order is None:
        return index[atom]
    place = 0
    for base, size in atom.order.base:
        place = place * size + index[base]
    return atom.order.places.tolist().index(place)


def stand(frame: Frame, layout: Layout, dims: tuple[int, ...], rows: torch.Tensor) -> Iterator[list[int]]:
    """For each sparse entry of the addressed dimensions, where it stands in the whole ones."""
    sizes = Sizes(frame, rows.shape[-1])
    everything = [{name: place for place, name in enumerate(named(layout.dims[dim]))} for dim in dims]

    def entry(key: object, at: int, row: int) -> tuple[object, int]:
        if not isinstance(key, Atom) or not frame.counts_tokens(key):
            return key, at
        place = of_row(frame, key, row)
        return key, place if key.order is None else place // key.stride % size_of(layout, key)

    for names in itertools.product(*(named(layout.dims[dim], sizes) for dim in dims)):
        index = dict(pair for name in names for pair in name)
        leads = [key for key in index if isinstance(key, Atom) and sizes.leads(Axis(size_of(layout, key), key))]
        row = int(rows[index.get(frame.batch, 0), index[leads[0]] if leads else 0])
        yield [known[tuple(entry(*pair, row) for pair in name)] for known, name in zip(everything, names, strict=True)]


def size_of(layout: Layout, atom: Atom) -> int:
    def axes(dim: Dim) -> Iterator[Axis]:
        for factor in dim:
            if isinstance(factor, Axis):
                yield factor
            elif isinstance(factor, Concat):
                for segment in factor.segments:
                    yield from axes(segment)

    return next(axis.size for dim in layout.dims for axis in axes(dim) if axis.atom == atom)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("frame", [GRID, ALONE], ids=["two samples", "one sample"])
def test_active_rows_stand_where_their_factors_count_them(name, frame):
    dims = [[factor for factor in dim if frame is GRID or factor is not PICTURE] for dim in LAYOUTS[name]]
    layout = Layout(tuple(map(tuple, dims)))
    check(frame, layout)


SMALL = Frame((1, 3, 4, 2), ((1,), (3,), (2, 2), (2,)))  # all of it is tokens
DEPTH, (OUTER, INNER), (COLUMN,) = SMALL.atoms(1)[0], SMALL.atoms(2), SMALL.atoms(3)
APART = Order.of(((DEPTH.atom, 3), (COLUMN.atom, 2)), torch.tensor([4, 1, 5, 0, 3, 2]))


@pytest.mark.parametrize(
    "dims",
    [[[OUTER, COLUMN], [INNER], [DEPTH]], [[OUTER, INNER], [whole(APART)]], [[COLUMN, DEPTH], [INNER, OUTER]]],
    ids=["apart", "in an order", "turned"],
)
def test_neighbours_of_one_size_that_do_not_follow_each_other(dims):
    check(SMALL, Layout(tuple(map(tuple, dims))))


def check(frame: Frame, layout: Layout) -> None:
    """The positions of some rows are those that the definition says."""
    dims = layout.dims
    emit = Emitter(contextlib.nullcontext())  # type: ignore[arg-type]  # tensors here have values
    chosen = torch.stack([SHUFFLED[:7].sort().values, SHUFFLED[7:14].sort().values])[: frame.samples]
    tables = []

    def table(name, value):
        tables.append(name)
        return emit.placeholder(name, value)

    builder = PositionBuilder(frame, Sizes(frame, 7), emit.placeholder("rows", chosen), emit, table)
    positions = builder.of(layout)
    sizes = [Sizes(frame, 7).dim(layout.dims[dim]) for dim in positions.dims]
    found = [index.meta["val"].expand(sizes).flatten().tolist() for index in positions.indices]
    assert list(map(list, zip(*found, strict=True))) == list(stand(frame, layout, positions.dims, chosen))
    rest = [dim for dim in range(len(dims)) if dim not in positions.dims]
    assert not any(frame.counts_tokens(f.atom) for d in rest for f in dims[d] if isinstance(f, Axis))
    assert positions.order == (*positions.dims, *rest)
    assert [positions.order[place] for place in positions.inverse] == list(range(len(dims)))
    assert builder.of(layout) is positions and len(tables) == len(set(tables)), "made once"


def collected(ranked: torch.Tensor, frame: Frame) -> tuple[PositionBuilder, list[str]]:
    """A builder among processes whose exchanges are written down; they give the rows of all processes."""
    emit, exchanges = Emitter(contextlib.nullcontext()), []  # type: ignore[arg-type]  # tensors here have values

    def exchanged(target, *args, **more):
        if "c10d" not in str(target):
            return emit(target, *args, **more)
        exchanges.append(str(target).split(".")[1])
        if "gather" in str(target):
            return emit.placeholder(f"gathered_{len(exchanges)}", ranked.flatten(0, 1))
        return args[0]

    rows = emit.placeholder("rows", ranked[0])
    return PositionBuilder(frame, Sizes(frame, ranked.shape[-1]), rows, exchanged, emit), exchanges


EACH = torch.tensor([[[0, 3], [1, 4]], [[1, 2], [0, 2]], [[2, 4], [3, 4]]])  # [R, B, A]


def test_behind_an_exchange_the_rows_of_each_process_stand_in_its_part():
    frame = FRAME.across(Group("all", 3, 0), None)
    builder, exchanges = collected(EACH, frame)
    ranks = Axis(3, RANKS)
    positions = builder.of(Layout(((BATCH,), (ranks, TOKENS), (Axis(3),))))
    assert positions.dims == (0, 1) and exchanges == ["all_gather_into_tensor", "wait_tensor"]
    first, second = (index.meta["val"].expand(2, 6).tolist() for index in positions.indices)
    assert first == [[0] * 6, [1] * 6]
    assert second == [[5 * rank + row for rank in range(3) for row in EACH[rank, n].tolist()] for n in range(2)]
    own = builder.of(Layout(((BATCH,), (TOKENS,), (Axis(3),)))).indices[1].meta["val"]
    assert own.expand(2, 2).tolist() == EACH[0].tolist() and len(exchanges) == 2
    builder.of(Layout(((ranks,), (BATCH,), (TOKENS,))))
    assert len(exchanges) == 2, "they are gathered once"
    one = Frame((1, 5, 3), ((1,), (5,), (3,)), excluded=FRAME.excluded, shards=Group("all", 3, 0))
    alone, _ = collected(EACH[:, :1], one)
    (index,) = alone.of(Layout(((ranks, TOKENS), (Axis(3),)))).indices
    assert index.meta["val"].tolist() == [5 * rank + row for rank in range(3) for row in EACH[rank, 0].tolist()]


def test_processes_that_add_up_features_take_the_rows_of_the_first():
    builder, exchanges = collected(EACH, FRAME.across(None, Group("features", 3, 1)))
    assert exchanges == ["broadcast", "wait_tensor"] and builder.of(FRAME.layout()).dims == (0, 1)
    assert collected(EACH, FRAME)[1] == []


def test_what_has_no_place_for_each_sample_or_token_is_refused():
    emit = Emitter(contextlib.nullcontext())  # type: ignore[arg-type]  # tensors here have values
    builder = PositionBuilder(GRID, Sizes(GRID, 2), emit.placeholder("rows", ROWS), emit, emit)
    with pytest.raises(UnsupportedGraph, match="tokens of different samples stand in one dimension"):
        builder.of(Layout(((H, h, W), (C,))))
    with pytest.raises(UnsupportedGraph, match="a part of the token grid beside values with all of it"):
        builder.of(Layout(((PICTURE,), (H, h))))
    with pytest.raises(UnsupportedGraph, match="segments inside a product of segments"):
        builder.of(Layout(((PICTURE,), (Concat(((Axis(2),), (Axis(3), Concat(((H, h, W), (Axis(2),)))))),))))
