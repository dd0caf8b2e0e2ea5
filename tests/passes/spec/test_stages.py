"""The executable spec: each check passes on a real graph, and fails on a graph that is broken in that one respect."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from joint import analysed, captured
from torch import Tensor, fx, nn

from ras_compile.capture.export import capture
from ras_compile.errors import SpecViolation
from ras_compile.passes.algebra.layout import Axis, Frame, Layout
from ras_compile.passes.analysis.propagate import Analysis, propagate
from ras_compile.passes.analysis.splices import SparsePlan, plan
from ras_compile.passes.programs.program import dense_program, sparse_program
from ras_compile.passes.rules.registry import Gather, Use
from ras_compile.passes.spec.stages import check_analysis, check_captured, check_dense, check_sparse

aten = torch.ops.aten
ACTIVE = 3


def find(graph: fx.Graph, target: Callable) -> fx.Node:
    return graph.find_nodes(op="call_function", target=target)[0]


def programs() -> tuple[fx.GraphModule, fx.GraphModule, Analysis, SparsePlan]:
    analysis, splices = analysed()
    return dense_program(analysis, splices), sparse_program(analysis, ACTIVE, splices), analysis, splices


def test_a_real_graph_is_legal_at_every_stage():
    analysis, splices = analysed()
    check_captured(captured().graph, captured().graph)
    check_analysis(analysis)
    assert len(splices.splices) == 3  # keys, values and the noise
    check_dense(dense_program(analysis, splices), analysis, splices)
    for active in (1, ACTIVE, 6):
        check_sparse(sparse_program(analysis, active, splices), analysis, splices)


CAPTURED = {
    "a node of kind call_method": lambda g: add(g, lambda x: g.call_method("relu", (x,))),
    "not an overload": lambda g: add(g, lambda x: g.call_function(torch.relu, (x,))),
    "writes into its arguments": lambda g: add(g, lambda x: g.call_function(aten.relu_.default, (x,))),
    "no value": lambda g: find(g, aten.linear.default).meta.pop("val"),
    "symbolic": lambda g: find(g, aten.linear.default).meta.update(val=symbolic()),
    "stack traces were lost": lambda g: [node.meta.pop("stack_trace", None) for node in g.nodes],
}


def add(graph: fx.Graph, make: Callable[[fx.Node], fx.Node]) -> None:
    last = find(graph, aten.linear.default)
    with graph.inserting_after(last):
        make(last).meta["val"] = last.meta["val"]


def symbolic() -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(5, 3), symbolic_context=context)


@pytest.mark.parametrize("reason", CAPTURED)
def test_a_broken_capture_is_seen(reason: str):
    graph = copy.deepcopy(captured()).graph
    CAPTURED[reason](graph)
    with pytest.raises(SpecViolation, match=reason):
        check_captured(graph, captured().graph)


def set_step(analysis: Analysis, target: Callable, **changes) -> None:
    node = find(analysis.graph, target)
    analysis.steps[node] = dataclasses.replace(analysis.steps[node], **changes)


def set_layout(analysis: Analysis, target: Callable, change: Callable[[Layout], Layout]) -> None:
    node = next(n for n in analysis.graph.find_nodes(op="call_function", target=target) if n in analysis.layouts)
    analysis.layouts[node] = change(analysis.layouts[node])  # type: ignore[arg-type]


def forget_tokens(layout: Layout) -> Layout:
    return Layout.of([(Axis(size),) for size in layout.shape])


def a_part_of_the_grid(analysis: Analysis) -> None:
    node = find(analysis.graph, aten.add.Tensor)
    first, dense = analysis.steps[node].uses
    assert isinstance(dense, Gather)
    part = dense.layout.replace(1, (dense.layout.dims[1][0], Axis(3)))
    set_step(analysis, aten.add.Tensor, uses=(first, Gather(part)))


sdpa = aten.scaled_dot_product_attention.default
ANALYSIS = {
    "no step says": lambda a: a.steps.pop(find(a.graph, sdpa)),
    "for a value of shape": lambda a: set_layout(a, aten.cat.default, lambda layout: layout.replace(2, (Axis(9),))),
    "exactly once": lambda a: set_layout(a, aten.cat.default, forget_tokens),
    "uses for 3 operands": lambda a: set_step(a, sdpa, uses=(Use.ROWS, Use.WHOLE)),
    "has tokens": lambda a: set_step(a, sdpa, uses=(Use.SAME, Use.WHOLE, Use.WHOLE)),
    "has no tokens": lambda a: set_step(a, aten.add.Tensor, uses=(Use.ROWS, Use.ROWS)),
    "runs whole takes": lambda a: set_step(a, sdpa, whole=True),
    "a part of the grid": a_part_of_the_grid,
}


@pytest.mark.parametrize("reason", ANALYSIS)
def test_a_broken_analysis_is_seen(reason: str):
    analysis, _ = analysed()
    ANALYSIS[reason](analysis)
    with pytest.raises(SpecViolation, match=reason):
        check_analysis(analysis)


def results(graph: fx.Graph, change: Callable[[list], list]) -> None:
    last = graph.output_node()
    last.args = (tuple(change(list(last.args[0]))),)  # type: ignore[arg-type]


def first_input(graph: fx.Graph) -> fx.Node:
    return graph.find_nodes(op="placeholder")[0]


def reshaped(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """A value under another name, which may be the same memory."""
    with graph.inserting_after(value):
        node = graph.call_function(aten.reshape.default, (value, list(value.meta["val"].shape)))
    node.meta["val"] = value.meta["val"]
    return node


def without_clones(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.clone.default):
        node.replace_all_uses_with(node.args[0])


def cache_of_an_input(program: fx.GraphModule, analysis: Analysis, splices: SparsePlan) -> None:
    without_clones(program.graph)
    node = next(s.node for s in splices.splices if not s.is_output)
    there = next(n for n in program.graph.nodes if n.name == node.name)
    there.target, there.args = aten.view.default, (first_input(program.graph), [1])


DENSE = {
    "writes into its arguments": lambda p, a, s: add(
        p.graph, lambda x: p.graph.call_function(aten.relu_.default, (x,))
    ),
    "4 results": lambda p, a, s: results(p.graph, lambda found: [*found, found[0]]),
    "in place of output": lambda p, a, s: results(p.graph, lambda found: [found[1], found[0], *found[2:]]),
    "is another value": lambda p, a, s: results(p.graph, lambda found: [*found[:-1], found[0]]),
    "the input": cache_of_an_input,
    "share memory": lambda p, a, s: without_clones(p.graph),
}


@pytest.mark.parametrize("reason", DENSE)
def test_a_broken_dense_program_is_seen(reason: str):
    dense, _, analysis, splices = programs()
    DENSE[reason](dense, analysis, splices)
    reason = reason.replace("4 results", r"\d results")
    with pytest.raises(SpecViolation, match=reason):
        check_dense(dense, analysis, splices)


def puts(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=aten.index_put_.default)


def again(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_after(node):
        copied = graph.node_copy(node, lambda operand: operand)
    copied.meta = dict(node.meta)
    return copied


def swap_caches(graph: fx.Graph) -> None:
    """Keys go where values belong, and values where keys do."""
    first, second = [put for put in puts(graph) if put.args[0].meta["val"].ndim == 4][:2]
    one, two = first.args[0], second.args[0]
    assert one.meta["val"].shape == two.meta["val"].shape
    first.args, second.args = (two, *first.args[1:]), (one, *second.args[1:])


def last_put_elsewhere(graph: fx.Graph) -> None:
    put = puts(graph)[-1]
    put.args = (find(graph, aten.linear.default), *put.args[1:])


def read_early(graph: fx.Graph) -> None:
    put, attention = puts(graph)[0], find(graph, sdpa)
    attention.append(put)
    written = {node for node in graph.nodes if node.op == "placeholder" and node.name.startswith("cache")}
    assert set(attention.args) & written or any(
        set(arg.args) & written for arg in attention.args if isinstance(arg, fx.Node)
    )


def latent_of(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.find_nodes(op="placeholder") if tuple(n.meta["val"].shape) == (2, 4, 2, 3))


def read_all(graph: fx.Graph) -> None:
    with graph.inserting_before(puts(graph)[0]):
        graph.call_function(aten.sum.default, (latent_of(graph),)).meta["val"] = torch.zeros(())


def cast_rows(graph: fx.Graph) -> None:
    rows = next(n for n in graph.find_nodes(op="placeholder") if n.name == "rows")
    rows.meta["val"] = rows.meta["val"].int()


def grow(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.meta.get("dense", "").startswith("scaled_dot_product"):
            node.meta["val"] = node.meta["val"].new_empty(1)


def write_in_place(graph: fx.Graph) -> None:
    add(graph, lambda x: graph.call_function(aten.relu_.default, (x,)))


SPARSE = {
    "one cache per splice": lambda p: p.graph.erase_node(unused_cache(p.graph)),
    "int64": lambda p: cast_rows(p.graph),
    "of another shape": lambda p: p.graph.find_nodes(op="placeholder")[-1].meta.update(val=torch.zeros(3)),
    "without being a splice": lambda p: write_in_place(p.graph),
    "which is no cache": lambda p: last_put_elsewhere(p.graph),
    "written 2 times": lambda p: again(p.graph, puts(p.graph)[-1]),
    "into the cache of": lambda p: swap_caches(p.graph),
    "never written": lambda p: p.graph.erase_node(puts(p.graph)[-1]),
    "before it is spliced": lambda p: read_early(p.graph),
    "other than by its active rows": lambda p: read_all(p.graph),
    "of the sparse sizes": lambda p: grow(p.graph),
    "may be a cache": lambda p: results(
        p.graph, lambda found: [reshaped(p.graph, p.graph.find_nodes(op="placeholder")[-1])]
    ),
}


def unused_cache(graph: fx.Graph) -> fx.Node:
    cache = graph.find_nodes(op="placeholder")[-1]
    cache.replace_all_uses_with(graph.find_nodes(op="placeholder")[-2])
    return cache


@pytest.mark.parametrize("reason", SPARSE)
def test_a_broken_sparse_program_is_seen(reason: str):
    _, sparse, analysis, splices = programs()
    SPARSE[reason](sparse)
    with pytest.raises(SpecViolation, match=reason):
        check_sparse(sparse, analysis, splices)


def test_a_violation_names_the_node_and_the_users_line():
    graph = copy.deepcopy(captured()).graph
    node = find(graph, aten.linear.default)
    node.target = aten.relu_.default
    node.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    x = self.embed(x)\n'
    with pytest.raises(SpecViolation, match=rf"{node.name}.*model.py:7") as caught:
        check_captured(graph)
    assert "relu_" in str(caught.value)


def test_slices_of_one_cache_must_cover_it():
    """A joint cache is written segment by segment: a gap between the segments is seen."""
    analysis, splices = analysed()
    joint = find(analysis.graph, aten.cat.default)
    splices.splices.insert(
        0, dataclasses.replace(splices.splices[0], node=joint, layout=analysis.layouts[joint], is_output=True)
    )
    program = sparse_program(analysis, ACTIVE, splices)
    assert program.graph.find_nodes(op="call_function", target=aten.copy_.default), "the text is written as it is"
    check_sparse(program, analysis, splices)
    cut = next(n for n in program.graph.find_nodes(op="call_function", target=aten.slice.Tensor) if n.args[2] == 0)
    cut.args = (*cut.args[:3], cut.args[3] - 1)
    with pytest.raises(SpecViolation, match="written twice or never"):
        check_sparse(program, analysis, splices)


class Unprojected(nn.Module):
    """Keys and values are views of the latent itself, by an op that does not say that it returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, latent: Tensor) -> Tensor:
        x = torch.einsum("bcn->bnc", latent.flatten(2))
        y = torch.nn.functional.scaled_dot_product_attention(self.query(x), x, x)
        return y.transpose(1, 2).reshape(latent.shape)


def test_a_cache_of_the_latents_own_memory_is_a_copy():
    inputs = [torch.randn(2, 4, 2, 3)]
    graph = capture(torch.export.export(Unprojected(), tuple(inputs)).module(), inputs)
    latent = next(n for n in graph.graph.find_nodes(op="placeholder") if n.meta["val"].shape == inputs[0].shape)
    analysis = propagate(graph.graph, latent, Frame.of(inputs[0].shape))
    splices = plan(analysis)
    dense = dense_program(analysis, splices)
    check_analysis(analysis)
    check_dense(dense, analysis, splices)
    values = [*inputs, *graph.meta["constants"]]
    with torch.no_grad():
        held = [result.untyped_storage().data_ptr() for result in dense(*values)]
    assert inputs[0].untyped_storage().data_ptr() not in held
    check_sparse(sparse_program(analysis, ACTIVE, splices), analysis, splices)
