"""The one alias analysis: what it says of memory is what memory says when the ops are run."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.programs import aliases

aten = torch.ops.aten
SHAPE = (2, 3, 4)

# Ops, their arguments behind one tensor [2, 3, 4], and whether a view comes out: surely, maybe (the schema does not say), never.
OPS = [
    (aten.permute.default, ([2, 0, 1],), "surely"),
    (aten.slice.Tensor, (1, 0, 2), "surely"),
    (aten.view.default, ([6, 4],), "surely"),
    (aten.expand.default, ([5, 2, 3, 4],), "surely"),
    (aten.split.Tensor, (1, 1), "surely"),
    (aten.unbind.int, (1,), "surely"),
    (aten.copy_.default, (1.0,), "surely"),
    (aten.reshape.default, ([24],), "maybe"),
    (aten.flatten.using_ints, (0, 1), "maybe"),
    (aten.contiguous.default, (), "maybe"),
    (aten.to.dtype, (torch.float32,), "maybe"),
    (aten.dropout.default, (0.5, False), "maybe"),
    (aten._unsafe_view.default, ([24],), "maybe"),
    (aten.atleast_1d.default, (), "maybe"),
    (aten.conj_physical.default, (), "maybe"),
    (aten.sum_to_size.default, (SHAPE,), "maybe"),
    (aten.clone.default, (), "never"),
    (aten.add.Tensor, (1.0,), "never"),
    (aten.index.Tensor, ([torch.tensor([0, 1])],), "never"),
    (aten.relu.default, (), "never"),
]


def emitted() -> tuple[Emitter, fx.Node]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    emit = Emitter(mode)
    return emit, emit.placeholder("x", mode.from_tensor(torch.zeros(SHAPE)))


@pytest.mark.parametrize(("target", "args", "says"), OPS, ids=lambda value: str(value) if callable(value) else "")
def test_it_says_what_memory_says(target, args, says):
    emit, x = emitted()
    if target is aten.copy_.default:
        args = (emit.placeholder("other", x.meta["val"].new_empty(SHAPE)),)
    node = emit(target, x, *args)
    item = emit(operator.getitem, node, 0) if isinstance(node.meta["val"], (tuple, list)) else node
    shared = not aliases.apart([item.meta["val"]], [x.meta["val"]])
    assert shared == (says != "never")
    assert (aliases.roots(item) == {x}) == shared, "what shares memory is known to"
    if says == "surely":
        assert aliases.root(item) is x
    if aliases.root(item) is x and says != "surely":
        assert target._schema.returns[0].alias_info is not None, "it only says what the schema says"
    assert aliases.is_input(item) == shared


def test_ops_of_several_operands_may_show_each_of_them():
    emit, x = emitted()
    y = emit.placeholder("y", x.meta["val"].new_empty(3, 4))
    both = emit(aten.broadcast_tensors.default, [x, y])
    assert aliases.roots(emit(operator.getitem, both, 1)) == {x, y}
    made = emit(aten.neg.default, y)
    item = emit(operator.getitem, emit(aten.broadcast_tensors.default, [x, made]), 1)
    assert aliases.is_input(item) and not aliases.is_input(made), "which one it shows is not told: it may be an input"
    product = emit(aten.einsum.default, "abc,bc->abc", [x, y])
    assert aliases.roots(product) == {product}
    assert aliases.roots(emit(aten.einsum.default, "abc->bac", [x])) == {x}


def test_what_is_written_is_seen_through_views_and_is_not_moved():
    emit, x = emitted()
    turned = emit(aten.permute.default, x, [1, 0, 2])
    read = emit(aten.sum.default, x)
    assert aliases.movable(read) and not aliases.written(x)
    put = emit(aten.copy_.default, emit(aten.slice.Tensor, turned, 0, 0, 1), emit(aten.zeros.default, [1, 2, 4]))
    assert aliases.root(put) is x and aliases.written(x)
    assert not aliases.movable(read) and not aliases.movable(put) and aliases.movable(turned)
    assert not aliases.movable(emit(aten.bernoulli.default, turned)), "each draws anew"
    assert not aliases.movable(emit(aten.add.Tensor, x, emit(aten.zeros.default, [1]))), "one of two is written"


def test_what_is_no_op_of_pytorch_is_not_moved():
    """Nothing is known of what a repeated block draws or reads."""
    emit, x = emitted()
    assert not aliases.movable(x) and not aliases.movable(emit.graph.call_function(aliases.INVOKE, (None, "block", x)))
    pair = emit(aten.split.Tensor, x, 1)
    assert aliases.movable(emit(operator.getitem, pair, 1))


def test_lists_that_are_written_count_one_by_one():
    emit, x = emitted()
    y = emit.placeholder("y", x.meta["val"].new_empty(SHAPE))
    node = emit(aten._foreach_add_.Scalar, [x, y], 1.0)
    assert aliases.writes(node) == [x, y] and aliases.written(x) and aliases.written(y)


def test_a_call_writes_what_its_block_writes():
    inner, _ = emitted()
    (x,) = inner.graph.find_nodes(op="placeholder")
    y = inner.placeholder("y", x.meta["val"].new_empty(SHAPE))
    inner(aten.copy_.default, inner(aten.view.default, y, [6, 4]), inner(aten.view.default, x, [6, 4]))
    inner.graph.output(())
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in "ab"]
    call = graph.call_function(aliases.INVOKE, (graph.get_attr("block"), "block", *given))
    graph.output(())
    program = fx.GraphModule({"block": fx.GraphModule({}, inner.graph)}, graph)
    (call,) = program.graph.find_nodes(op="call_function", target=aliases.INVOKE)
    a, b = program.graph.find_nodes(op="placeholder")
    assert aliases.writes(call) == [b] and aliases.written(b) and not aliases.written(a)
    assert aliases.subgraph(call) is program.block and aliases.subgraph(a) is None


def test_memory_that_was_run():
    x = torch.zeros(SHAPE)
    assert aliases.apart([x.clone(), x.clone()], [x]) and not aliases.apart([x[0]], [x])
    assert not aliases.apart([x, x.view(-1)], [])
    assert aliases.fills(x) and not aliases.fills(x[0])
    assert aliases.overlaps_itself(x[:1].expand(4, 3, 4)) and not aliases.overlaps_itself(x)


def test_a_graph_is_run_on_fakes_beside_tensors_that_it_holds():
    graph = fx.Graph()
    held = graph.get_attr("held")
    graph.output(graph.call_function(aten.add.Tensor, (graph.placeholder("x"), held)))
    module = fx.GraphModule({"held": torch.ones(4)}, graph)
    given, found = aliases.run_on_fakes(module, [torch.ones(3, 4).t().contiguous().t()])
    assert (found.shape, given[0].stride()) == ((3, 4), (1, 3)) and type(found) is not torch.Tensor


def test_an_op_of_which_one_result_is_a_view_shows_its_operand():
    """No schema of PyTorch's own that captures meet is of that kind; a library's may be."""
    library = torch.library.Library("ras_compile_tests", "DEF")  # goes with this variable
    library.define("both(Tensor(a) x, Tensor y) -> (Tensor(a), Tensor)")
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert aliases.shows(graph.call_function(torch.ops.ras_compile_tests.both.default, (x, y))) == [x]


def test_a_graph_that_takes_a_number_is_run_with_it():
    graph = fx.Graph()
    x, number = graph.placeholder("x"), graph.placeholder("number")
    graph.output(graph.call_function(aten.repeat.default, (x, [number])))
    given, found = aliases.run_on_fakes(fx.GraphModule(torch.nn.Module(), graph), [torch.ones(3), 2])
    assert given[1] == 2 and found.shape == (6,)


def test_what_shows_a_value_twice_is_told_once():
    emit, x = emitted()
    parts = [emit.graph.call_function(aten.select.int, (x, 0, place)) for place in range(2)]
    both = emit.graph.call_function(aten.max.dim_max, (x, 0), {"max": parts[0], "max_values": parts[1]})
    assert aliases.shows(both) == aliases.writes(both) == parts
    assert sorted(node.name for node in aliases.viewers(x)) == sorted(node.name for node in (x, *parts, both))


def test_a_dimension_of_one_entry_overlaps_nothing():
    assert not aliases.overlaps_itself(torch.empty_strided((1, 3), (0, 1)))
    assert aliases.overlaps_itself(torch.empty_strided((2, 3), (0, 1)))


def test_operands_may_be_given_by_name():
    emit, x = emitted()
    node = emit.graph.call_function(aten.relu_.default, (), {"self": x})
    assert aliases.writes(node) == aliases.shows(node) == [x] and aliases.root(node) is x
