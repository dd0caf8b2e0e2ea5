"""How programs are put together: values of emitted nodes."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ras_compile.passes.analysis.emit import Emitter

aten = torch.ops.aten


def test_an_op_is_run_once_for_equal_operands_only():
    emit = Emitter(FakeTensorMode())
    with emit.mode:
        values = {
            "a": torch.empty(2, 3, dtype=torch.int64),
            "b": torch.empty(2, 3, dtype=torch.int64),
            "turned": torch.empty(3, 2, dtype=torch.int64).t(),
            "cut": torch.empty(3, 3, dtype=torch.int64)[1:],
            "real": torch.empty(2, 3),
            "wide": torch.empty(2, 4, dtype=torch.int64),
        }
    nodes = {name: emit.placeholder(name, value) for name, value in values.items()}
    first = emit(aten.clone.default, nodes["a"])
    assert emit(aten.clone.default, nodes["b"]).meta["val"] is first.meta["val"]
    for name, value in values.items():
        for args in [(1,), (1.0,), (True,)]:
            made = emit(aten.add.Tensor, nodes[name], *args).meta["val"]
            wanted = torch.add(value, *args)
            assert (made.shape, made.dtype, made.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        view = emit(aten.select.int, nodes[name], 0, 1).meta["val"]
        assert (view.shape, view.stride(), view.storage_offset()) == (
            value[1].shape, value[1].stride(), value[1].storage_offset(),
        )  # fmt: skip
    for name in ("a", "b"):  # what is written is the operand itself
        assert emit(aten.copy_.default, nodes[name], nodes["a"]).meta["val"] is values[name]
    assert [part.meta["val"].shape for part in _halves(emit, nodes["wide"])] == [(2, 2), (2, 2)]
    assert [part.meta["val"].shape for part in _halves(emit, nodes["a"])] == [(2, 2), (2, 1)]


def _halves(emit: Emitter, node: torch.fx.Node) -> list[torch.fx.Node]:
    parts = emit(aten.split.Tensor, node, 2, 1)
    return [emit(lambda given, index: given[index], parts, index) for index in (0, 1)]


def test_it_adds_to_a_graph_where_that_inserts():
    emit = Emitter(FakeTensorMode())
    with emit.mode:
        x = emit.placeholder("x", torch.empty(2, 3))
    last = emit(aten.neg.default, x)
    emit.graph.output((last,))
    again = Emitter.of(emit.graph)
    with emit.graph.inserting_before(last):
        made = again(aten.permute.default, x, [1, 0])
    assert made.next is last and made.meta["val"].shape == (3, 2) and again.mode is emit.mode
    plain = torch.fx.Graph()  # real tensors have no mode
    y = plain.placeholder("y")
    y.meta["val"] = torch.ones(2)
    assert torch.equal(Emitter.of(plain)(aten.neg.default, y).meta["val"], -torch.ones(2))
