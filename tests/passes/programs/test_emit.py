"""How programs are put together: values of emitted nodes."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ras_compile.passes.programs.emit import Emitter

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
