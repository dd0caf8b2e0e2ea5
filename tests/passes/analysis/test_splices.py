"""What a sparse step reads of caches, and of which dense values it takes the active rows: on two small models, by name."""

from __future__ import annotations

import torch
from joint import analysed, layers
from torch import fx

from ras_compile.passes.analysis.propagate import Analysis
from ras_compile.passes.analysis.splices import SparsePlan, plan
from ras_compile.passes.spec.demand import AMBIENT


def names(sparse: SparsePlan) -> tuple[list[str], list[str]]:
    """The values that are cached and are no outputs, and those that are."""
    inner = [splice.node.name for splice in sparse.splices if not splice.is_output]
    return inner, [splice.node.name for splice in sparse.splices if splice.is_output]


def arguments(analysis: Analysis, *shapes: tuple[int, ...]) -> list[fx.Node]:
    placeholders = analysis.graph.find_nodes(op="placeholder")
    return [next(node for node in placeholders if tuple(node.meta["val"].shape) == shape) for shape in shapes]


def test_keys_values_and_the_noise_are_cached_and_the_latent_is_read_by_rows():
    analysis, sparse = layers()
    pairs = [name for first in (2, 6, 10) for name in (f"transpose_{first}", f"transpose_{first + 1}")]
    assert names(sparse) == (pairs, ["view_13"])
    assert list(sparse.gathers) == arguments(analysis, (2, 4, 2, 3))
    assert all(len(layouts) == 1 for layouts in sparse.gathers.values())


def test_positions_are_read_by_rows_too_and_a_value_is_cached_once():
    """The queries of the joint block are its values, too; what is no token of the region is read whole."""
    analysis, sparse = analysed()
    assert names(sparse) == (["expand", "transpose_1"], ["view_3"])
    assert list(sparse.gathers) == arguments(analysis, (2, 4, 2, 3), (1, 6, 8))
    assert sparse.frozen == [] and sparse.live is None and not any(map(sparse.skips, analysis.graph.nodes))


def test_a_frozen_context_leaves_out_what_is_its_own_alone():
    analysis, _ = analysed()
    (joined,) = analysis.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    with analysis.graph.inserting_before(joined):
        border = analysis.graph.call_function(AMBIENT[0], ("cpu", torch.bfloat16, True, True))
    sparse = plan(analysis, frozen=True)
    assert not sparse.skips(border), "what is said of all that follows"
    text = arguments(analysis, (2, 2, 8))
    assert [node.name for node in sparse.frozen] == ["getitem"], "the text that is returned"
    assert [node for node in analysis.graph.nodes if node.op != "output" and sparse.skips(node)] == [
        *text,
        *sparse.frozen,
    ]
    assert names(sparse) == (["expand", "transpose_1"], ["view_3"])
    assert list(sparse.gathers) == arguments(analysis, (2, 4, 2, 3), (1, 6, 8))
