"""Grouping of scatter-GEMMs: it changes no number, takes what is independent, and leaves what is not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from contract import by_model, error, of_zoo
from torch._subclasses.fake_tensor import FakeTensorMode

from ras_compile.kernels.arguments import ScatterArguments
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.fusion.group import Op, join, launches
from ras_compile.passes.fusion.scatter import Fusion, fuse_scatter_linear
from ras_compile.passes.lowering.inplace import write_in_place
from ras_compile.passes.lowering.outline import outline
from ras_compile.passes.programs.program import sparse_program

aten, own = torch.ops.aten, torch.ops.ras_compile
PUTS = (aten.index_put_.default, aten.copy_.default)


def always(sites, linears):
    return True


def programs(case, active, pays=None, grouped=always):
    """The sparse program as it is, and with its scatter-GEMMs in groups."""
    plain = sparse_program(case.plan.analysis, active, case.plan.sparse)
    program = sparse_program(case.plan.analysis, active, case.plan.sparse)
    probe = sparse_program(case.plan.analysis, active + 2, case.plan.sparse)
    fusion = Fusion(case.frame.tokens, probe.graph, pays, (torch.float64,), grouped=grouped)
    fuse_scatter_linear(program.graph, fusion)
    program.graph.lint()
    program.recompile()
    return plain, program


def gap(case, active, plain, program):
    """How far the outputs and caches of two programs are apart, on inputs other than those of the dense step."""
    rows = case.rows(active)
    tensors = case.plan.tensors(case.with_latent(case.other_latent()))
    _, caches = case.dense(case.values)
    results = []
    for module in (plain, program):
        kept = [cache.clone() for cache in caches]
        with torch.no_grad():
            outputs = module(*tensors, rows, *kept)
        results.append([*kept, *outputs])
    assert error(results[0][: len(caches)], caches) > 1e-3
    return error(*results)


def sizes(program) -> list[int]:
    """How many members each group has."""
    return [
        len(node.args[0])
        for node in program.graph.find_nodes(op="call_function", target=own.grouped_scatter_linear.default)
    ]


def left(program) -> Counter:
    counts = Counter(node.target for node in program.graph.nodes)
    return Counter(
        scatter=counts[own.scatter_linear.default],
        put=sum(counts[put] for put in PUTS),
        linear=counts[aten.linear.default],
    )


# Members of each launch: text and picture of a joint attention, of one stream, and beside keys normed over all heads (Wan).
MODELS = {
    "SD3": [6, 6],
    "SD3.5": [6, 3, 6, 3, 6],
    "Flux": [6, 4, 4],
    "CogView4Transformer2DModel": [3, 3],
    "PixArt": [3, 3],
    "Wan": [3, 3],
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", by_model(MODELS))
def test_groups_of_known_models(name):
    case = of_zoo(name)
    plain, program = programs(case, 5)
    assert sizes(program) == MODELS[name]
    assert gap(case, 5, plain, program) < 1e-11
    if name == "SD3":
        assert launches(program.graph) == 9  # keys and values of text and picture in two blocks, and the noise
    # every member was a linear, and one scatter-GEMM stays alone: that of the output
    assert left(program)["linear"] == left(plain)["linear"] - sum(MODELS[name]) - left(program)["scatter"]


@pytest.mark.xdist_group("PixArt")
def test_a_group_reads_no_stale_rows():
    """The oracle of the test above would not see a launch that does nothing, were its caches those of the same inputs."""
    case = of_zoo("PixArt")
    plain, program = programs(case, 5)
    for node in program.graph.find_nodes(op="call_function", target=own.grouped_scatter_linear.default)[:1]:
        program.graph.erase_node(node)
    program.recompile()
    assert not gap(case, 5, plain, program) < 1e-3


@pytest.mark.xdist_group("SD3")
def test_what_does_not_pay_alone_may_pay_in_a_group():
    case = of_zoo("SD3")
    plain, program = programs(case, 5, pays=lambda ops: False)
    assert sizes(program) == [6, 6] and left(program)["scatter"] == 0 and left(program)["put"] == 1
    assert gap(case, 5, plain, program) < 1e-11


@pytest.mark.xdist_group("SD3")
def test_what_does_not_pay_in_a_group_is_as_it_was():
    case = of_zoo("SD3")
    asked = []
    plain, program = programs(case, 5, pays=lambda ops: False, grouped=lambda *given: asked.append(given))
    assert left(program) == left(plain) and gap(case, 5, plain, program) == 0
    # Once for all layers of one size. The text's splices would have to pass the picture's, into the same cache.
    assert [len(sites) + len(linears) for sites, linears in asked] == [6, 3]
    _, program = programs(case, 5, grouped=lambda *given: False)
    assert left(program)["scatter"] == 9 and gap(case, 5, plain, program) < 1e-11


@pytest.mark.xdist_group("SD3")
def test_streams_may_pay_by_themselves():
    case = of_zoo("SD3")
    plain, program = programs(case, 5, grouped=lambda sites, linears: len(sites) + len(linears) == 3)
    assert sizes(program) == [3, 3, 3, 3]
    assert gap(case, 5, plain, program) < 1e-11


@pytest.mark.xdist_group("SD3.5")
def test_blocks_of_groups_are_outlined():
    case = of_zoo("SD3.5")
    plain, program = programs(case, 5)
    write_in_place(program.graph)
    outline(program)
    subgraphs = [module for name, module in program.named_children() if name.startswith("repeated_block")]
    targets = [node.target for module in subgraphs for node in module.graph.nodes]
    assert own.grouped_scatter_linear.default in targets
    assert gap(case, 5, plain, program) < 1e-11


A, N, K, S = 3, 8, 6, 9


def scatters(graph: torch.fx.Graph) -> list[Op]:
    """The scatter-GEMMs of a program; of one that is marked as a half, the other half of its splice is no member."""
    found = []
    for node in graph.find_nodes(op="call_function", target=own.scatter_linear.default):
        op = Op(ScatterArguments(*node.args), node, written=True)
        op.site += [op, Op(op.arguments, node)][: 1 + ("half" in node.meta)]
        found.append(op)
    return found


class Hand:
    """A graph written by hand: caches [B, S, N], `x` [B, A, K], weights [N, K], and what was emitted so far."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.emit = Emitter(self.mode)
        self.inputs = [torch.randn(2, S, N), torch.randn(2, S, N), torch.randn(2, A, K), *torch.randn(3, N, K)]
        self.inputs += [torch.randn(N, N), torch.stack([torch.randperm(S)[:A] for _ in range(2)])]
        names = ("keys", "values", "x", "wq", "wk", "wv", "wo", "rows")
        self.nodes = {
            name: self.emit.placeholder(name, self.mode.from_tensor(tensor))
            for name, tensor in zip(names, self.inputs, strict=True)
        }

    def __getattr__(self, name: str):
        return self.nodes[name]

    def linear(self, x, weight):
        return self.emit(aten.linear.default, x, weight)

    def scatter(self, cache, x, weight):
        self.emit(own.scatter_linear.default, cache, x, weight, None, self.rows)

    def grouped(self, *results) -> list[int]:
        """Groups the graph, checks that it gives what it gave, and returns the sizes of the groups."""
        self.emit.graph.output(results)
        program = torch.fx.GraphModule(torch.nn.Module(), self.emit.graph)
        outcomes = []
        for grouping in (False, True):
            if grouping:
                join(program.graph, scatters(program.graph), always)
            program.graph.lint()
            program.recompile()
            given = [tensor.clone() for tensor in self.inputs]
            outcomes.append([*program(*given), *given[:2]])
        for before, after in zip(*outcomes, strict=True):
            torch.testing.assert_close(after, before)
        assert not torch.equal(outcomes[0][-1], self.inputs[1])
        return sizes(program)


def test_queries_keys_values():
    g = Hand()
    q = g.emit(aten.relu.default, g.linear(g.x, g.wq))
    g.scatter(g.keys, g.x, g.wk)
    g.scatter(g.values, g.x, g.wv)
    assert g.grouped(q, g.emit(aten.add.Tensor, g.keys, g.values)) == [3]


def test_what_a_member_needs_moves_in_front_of_the_launch():
    """The queries are read before the table that the keys read is made."""
    g = Hand()
    q = g.emit(aten.relu.default, g.linear(g.x, g.wq))
    weight = g.emit(aten.mul.Tensor, g.wk, 2.0)
    g.scatter(g.keys, g.x, weight)
    g.scatter(g.values, g.x, g.wv)
    assert g.grouped(q) == [3]


def test_a_member_that_depends_on_another_is_left():
    g = Hand()
    q = g.linear(g.x, g.wq)
    weight = g.emit(aten.mm.default, g.wo, g.wk)
    g.scatter(g.values, g.x, g.wv)
    g.scatter(g.keys, g.x, g.emit(aten.mul.Tensor, weight, g.emit(aten.mean.default, q)))
    assert g.grouped(q) == [2]  # without the queries


def test_a_member_that_depends_on_the_cache_of_another_is_left():
    g = Hand()
    g.scatter(g.values, g.x, g.wv)
    g.scatter(g.keys, g.x, g.emit(aten.mul.Tensor, g.wk, g.emit(aten.mean.default, g.values)))
    assert g.grouped() == []


@pytest.mark.parametrize("view", [True, False], ids=["a view", "the cache"])
def test_a_cache_that_is_read_in_between_is_left(view):
    """Keys are read as they were before they are written, though the launch would stand earlier."""
    g = Hand()
    shown = g.emit(aten.slice.Tensor, g.keys, 1, 0, 4) if view else g.keys
    q = g.emit(aten.relu.default, g.linear(g.x, g.wq))
    old = g.emit(aten.sum.default, shown)
    g.scatter(g.keys, g.x, g.wk)
    g.scatter(g.values, g.x, g.wv)
    assert g.grouped(q, old) == [2]  # without the queries


def test_a_cache_that_is_read_before_the_launch_is_no_obstacle():
    g = Hand()
    old = g.emit(aten.sum.default, g.keys)
    g.scatter(g.keys, g.x, g.wk)
    g.scatter(g.values, g.x, g.wv)
    assert g.grouped(old) == [2]


def test_a_cache_that_is_written_in_between_is_left():
    g = Hand()
    g.scatter(g.values, g.x, g.wv)
    g.emit(aten.copy_.default, g.keys, g.emit(aten.mul.Tensor, g.keys, 0.5))
    g.scatter(g.keys, g.x, g.wk)
    assert g.grouped() == []


def test_what_is_read_from_a_cache_is_no_member():
    """The rows that a launch reads are not those that it writes."""
    g = Hand()
    part = g.emit(aten.slice.Tensor, g.emit(aten.slice.Tensor, g.values, 1, 0, A), 2, 0, N)
    g.scatter(g.keys, part, g.wo)
    g.scatter(g.values, part, g.wo)
    assert g.grouped() == []


def test_a_splice_that_two_linears_feed_is_taken_as_a_whole():
    g = Hand()
    for cache, weight in ((g.keys, g.wk), (g.values, g.wv)):
        g.scatter(cache, g.x, weight)
    for node in g.emit.graph.find_nodes(op="call_function", target=own.scatter_linear.default):
        node.meta["half"] = True  # the other one reads something else
    assert g.grouped() == []


def test_linears_of_other_rows_of_the_same_values_are_left():
    """The queries are made of each half of a row."""
    g = Hand()
    halves = g.emit(aten.unflatten.int, g.emit(aten.relu.default, g.x), -1, [2, K // 2])
    halves = g.emit(aten.clone.default, halves)
    q = g.emit(aten.relu.default, g.linear(halves, g.emit(aten.slice.Tensor, g.wq, 1, 0, K // 2)))
    x = g.emit(aten.reshape.default, halves, [2, A, K])
    g.scatter(g.keys, x, g.wk)
    g.scatter(g.values, x, g.wv)
    assert g.grouped(q) == [2]  # without the queries
