"""What a sparse step reads of caches, and of which dense values it takes the active rows: on two small models, by name."""

from __future__ import annotations

import torch
from joint import analysed, layers
from torch import Tensor, fx, nn

from ras_compile.capture.export import capture
from ras_compile.passes.algebra.layout import Frame
from ras_compile.passes.analysis.propagate import Analysis, propagate
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


class Cross(nn.Module):
    """The picture attends to a text, which is projected in this block."""

    def forward(self, latent: Tensor, text: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(latent @ weight, text @ weight, text.sin() @ weight) + latent


def test_keys_and_values_of_a_frozen_text_are_taken_from_the_dense_step():
    inputs = [torch.randn(1, 6, 4), torch.randn(1, 3, 4), torch.randn(4, 4)]
    graph = capture(torch.export.export(Cross(), tuple(inputs)).module(), inputs).graph
    latent = graph.find_nodes(op="placeholder")[0]
    analysis = propagate(graph, latent, Frame.of(latent.meta["val"].shape))
    (attention,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    sparse = plan(analysis, frozen=True)
    assert sparse.frozen == list(attention.args[1:3])
    skipped = [str(node.target) for node in graph.nodes if node.op == "call_function" and sparse.skips(node)]
    assert skipped == ["aten.matmul.default", "aten.sin.default", "aten.matmul.default"], "the text's own"


class Twice(nn.Module):
    """Two convolutions that mix tokens, one on what the other gives; the result's rows change places."""

    def forward(self, latent: Tensor, kernel: Tensor) -> Tensor:
        once = nn.functional.conv2d(latent, kernel, padding=1)
        first, second = nn.functional.conv2d(once, kernel, padding=1).split([1, 2], 2)
        return torch.cat([second, first], 2) + latent


def test_what_is_whole_already_is_neither_cached_nor_read_by_rows():
    inputs = [torch.randn(1, 4, 3, 2), torch.randn(4, 4, 3, 3)]
    graph = capture(torch.export.export(Twice(), tuple(inputs)).module(), inputs).graph
    latent = graph.find_nodes(op="placeholder")[0]
    analysis = propagate(graph, latent, Frame.of(latent.meta["val"].shape))
    sparse = plan(analysis)
    (joined,) = graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert names(sparse) == ([latent.name], ["add"])
    assert list(sparse.gathers) == [latent, joined]


def of(model: nn.Module, *inputs: Tensor) -> Analysis:
    graph = capture(torch.export.export(model, inputs).module(), list(inputs)).graph
    latent = graph.find_nodes(op="placeholder")[0]
    return propagate(graph, latent, Frame.of(latent.meta["val"].shape))


class Alike(nn.Module):
    """Keys are the values, too; then the picture attends to a text, twice."""

    def forward(self, latent: Tensor, text: Tensor) -> Tensor:
        keys = latent.sin()
        mixed = nn.functional.scaled_dot_product_attention(latent, keys, keys)
        once = nn.functional.scaled_dot_product_attention(mixed, text.sin(), text.cos())
        return nn.functional.scaled_dot_product_attention(once, text.tan(), text.exp()) + latent


def test_a_value_that_is_needed_whole_twice_is_cached_once():
    sparse = plan(of(Alike(), torch.randn(1, 6, 4), torch.randn(1, 3, 4)))
    assert names(sparse) == (["sin"], ["add"])


def test_what_is_taken_of_a_frozen_context_stands_in_the_order_of_the_graph():
    analysis = of(Alike(), torch.randn(1, 6, 4), torch.randn(1, 3, 4))
    attention = torch.ops.aten.scaled_dot_product_attention.default
    _, first, second = analysis.graph.find_nodes(op="call_function", target=attention)
    assert plan(analysis, frozen=True).frozen == [*first.args[1:3], *second.args[1:3]]


class Sliced(nn.Module):
    """A joint sequence, of which the text is taken by a slice and returned."""

    def forward(self, latent: Tensor, text: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([text.sin(), latent], 1)
        joint = nn.functional.scaled_dot_product_attention(joint @ weight, joint, joint)
        return joint[:, 3:] + latent, joint[:, :3].exp()


def test_the_text_of_a_joint_sequence_is_taken_from_the_dense_step():
    analysis = of(Sliced(), torch.randn(1, 6, 4), torch.randn(1, 3, 4), torch.randn(4, 4))
    sparse = plan(analysis, frozen=True)
    (text,) = sparse.frozen
    assert text.target is torch.ops.aten.slice.Tensor and tuple(text.meta["val"].shape) == (1, 3, 4)
    skipped = [str(node.target) for node in analysis.graph.nodes if node.op == "call_function" and sparse.skips(node)]
    assert skipped == ["aten.sin.default", "aten.slice.Tensor"], "what is returned of it is computed"
    assert not any(plan(analysis).skips(node) for node in analysis.graph.nodes)


class Shown(nn.Module):
    """What is mixed is returned, too."""

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        shown = latent.sin()
        return nn.functional.scaled_dot_product_attention(latent.cos(), shown, shown) + latent, shown


def test_what_is_needed_whole_and_returned_is_cached_once_as_an_output():
    inner, outputs = names(plan(of(Shown(), torch.randn(1, 6, 4))))
    assert (inner, sorted(outputs)) == ([], ["add", "sin"])
