"""Where the active rows stand when the context beside them is not computed: the region's places stay those of the whole."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ras_compile.passes.algebra.layout import Axis, Concat, Frame, Layout, Sizes
from ras_compile.passes.algebra.order import Atom
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
