"""What every layer computes again from inputs alone is computed once; nothing else is."""

from __future__ import annotations

import torch
from contract import subject
from torch import fx
from zoo import ZOO, redraw

from ras_compile.passes.analysis.roles import Role
from ras_compile.passes.fusion.scatter import Fusion, fuse_scatter_linear
from ras_compile.passes.lowering.interpolate import interpolate, sample_points
from ras_compile.passes.lowering.share import share_tables
from ras_compile.passes.programs.program import sparse_program

aten = torch.ops.aten
POINTS = sample_points((4,), [-1], (2,))


def test_layers_share_the_tables_that_they_gather():
    torch.manual_seed(0)
    case = subject(redraw(ZOO["Flux"].build()).eval().bfloat16(), as_bf16(ZOO["Flux"].inputs()), exact=False)
    program = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    gathers = len(program.graph.find_nodes(op="call_function", target=aten.index.Tensor))
    fuse_scatter_linear(program.graph, Fusion(case.frame.tokens))
    assert share_tables(program.graph)
    fewer = len(program.graph.find_nodes(op="call_function", target=aten.index.Tensor))
    assert fewer < gathers / 2


def as_bf16(inputs: dict) -> dict:
    wide = {"img_ids", "txt_ids", "timestep"}
    return {
        name: value.bfloat16() if name not in wide and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def shared(length: int, ops) -> fx.GraphModule:
    """`ops(graph, x, length)` gives what a program of `x` [2, length] returns."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, length, device="meta")
    graph.output(tuple(ops(graph, x, length)))
    return fx.GraphModule({}, graph)


def test_lengths_are_shared_by_how_they_are_computed():
    """Two numbers of one value at one length only are two tables, and equal ones one, wherever their sizes are spelled."""

    def tables(graph, x, length):
        sizes = (2, length, 2, length, length + 4, length + 4)
        return [graph.call_function(aten.arange.default, (size,)) for size in sizes]

    module = interpolate([shared(point[0], tables) for point in POINTS], POINTS)
    assert share_tables(module.graph) == 3
    module.recompile()
    for length in (2, 5, 9):
        found = module(length, torch.zeros(2, length))
        assert [len(table) for table in found] == [2, length, 2, length, length + 4, length + 4]


def test_what_is_written_is_not_shared():
    """Two results that ops write into are two, however alike their memory was when it was fresh."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    fresh = [graph.call_function(aten.empty.memory_format, ([2, 3],)) for _ in range(2)]
    for node, target in zip(fresh, (aten.neg.default, aten.abs.default), strict=True):
        made, view = graph.call_function(target, (x,)), graph.call_function(aten.view.default, (node, [2, 3]))
        graph.call_function(aten.copy_.default, (view, made))
    graph.output(tuple(fresh))
    assert share_tables(graph) == 0
    given = torch.randn(2, 3)
    negative, positive = fx.GraphModule({}, graph)(given)
    assert torch.equal(negative, -given) and torch.equal(positive, given.abs())


def test_what_a_linear_or_a_cache_has_made_is_not_shared():
    graph = fx.Graph()
    x, weight, cache = (graph.placeholder(name) for name in ("x", "weight", "kept"))
    cache.meta["role"] = Role.CACHE  # and not its name

    def twice(target, *args):
        return [graph.call_function(target, args) for _ in range(2)]

    read = twice(aten.view.default, cache, [-1])  # before and after it is written, maybe
    after = [graph.call_function(aten.neg.default, (node,)) for node in read]
    drawn = twice(aten.bernoulli.default, x)
    made = graph.call_function(aten.linear.default, (x, weight))
    behind = twice(aten.neg.default, made)
    plain = twice(aten.neg.default, x)
    graph.output((*after, *drawn, *behind, *plain))
    assert share_tables(graph) == 1
    left = list(graph.nodes)
    assert plain[0] in left and plain[1] not in left
    assert all(node in left for node in (*read, *after, *drawn, *behind))
