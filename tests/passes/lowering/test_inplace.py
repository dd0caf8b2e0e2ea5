"""Splices into views become splices into the cache: the same entries are written, and no view is left."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.lowering.inplace import write_in_place

aten = torch.ops.aten
B, H, S, D, A = 3, 4, 11, 5, 6
SHAPE = (B, H, S, D)


def traced(build, *tensors: torch.Tensor) -> fx.GraphModule:
    """A graph of ``build(emit, *placeholders)``; the first input is the cache."""
    mode = FakeTensorMode()
    emit = Emitter(mode)
    nodes = [emit.placeholder(f"arg_{index}", mode.from_tensor(tensor)) for index, tensor in enumerate(tensors)]
    build(emit, *nodes)
    emit.graph.output(())
    return fx.GraphModule(torch.nn.Module(), emit.graph)


def same(build, *tensors: torch.Tensor, count: int = 1) -> fx.Graph:
    """Runs a graph before and after the pass on copies of the cache."""
    program = traced(build, *tensors)
    before, after = tensors[0].clone(), tensors[0].clone()
    program(before, *tensors[1:])
    assert write_in_place(program.graph) == count
    program.graph.lint()
    program.recompile()
    program(after, *tensors[1:])
    assert torch.equal(before, after) and not torch.equal(before, tensors[0])
    return program.graph


def puts(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=aten.index_put_.default)


@pytest.mark.parametrize("cut", [None, *range(4)])
@pytest.mark.parametrize("addressed", [pair for size in (1, 2) for pair in itertools.combinations(range(4), size)])
def test_any_dimensions_in_any_order(addressed: tuple[int, ...], cut: int | None):
    """`index_put_(permute(slice(cache)), indices, values)` with every choice of addressed and cut dimensions."""
    start = 1 if cut is not None else 0
    view = [size - start if dim == cut else size for dim, size in enumerate(SHAPE)]
    order = [*addressed, *(dim for dim in range(4) if dim not in addressed)]
    indices = [torch.randperm(view[dim])[:2].reshape(2, 1) if n == 0 else torch.randperm(view[dim])[:2].expand(2, 2)
               for n, dim in enumerate(addressed)]  # fmt: skip
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    values = torch.randn(*shape, *(view[dim] for dim in order[len(addressed) :]))

    def build(emit, cache, value, *given):
        part = cache if cut is None else emit(aten.slice.Tensor, cache, cut, start, SHAPE[cut])
        part = emit(aten.permute.default, part, order)
        emit(aten.index_put_.default, part, list(given), value)

    fires = cut is None or cut in addressed
    program = traced(build, torch.randn(SHAPE), values, *indices)
    if not fires:
        assert write_in_place(program.graph) == 0
        return
    graph = same(build, torch.randn(SHAPE), values, *indices)
    assert all(put.args[0].op == "placeholder" for put in puts(graph))


def test_a_copy_into_a_slice():
    text = torch.randn(B, H, 4, D)
    graph = same(
        lambda emit, cache, value: emit(aten.copy_.default, emit(aten.slice.Tensor, cache, 2, 3, 7), value),
        torch.randn(SHAPE), text,
    )  # fmt: skip
    assert len(puts(graph)) == 1 and puts(graph)[0].args[0].op == "placeholder"


def test_a_copy_that_broadcasts():
    same(
        lambda emit, cache, value: emit(aten.copy_.default, emit(aten.slice.Tensor, cache, 2, 3, 7), value),
        torch.randn(SHAPE), torch.randn(1, H, 1, D),
    )  # fmt: skip


def test_what_it_leaves():
    """A copy of the whole cache, a splice on the cache itself, and views that are no slices or permutations."""
    rows = torch.randperm(S)[:A]

    def build(emit, cache, value, index):
        emit(aten.index_put_.default, cache, [None, None, index], value)
        flat = emit(aten.view.default, cache, [B * H, S, D])
        emit(aten.index_put_.default, flat, [None, index], emit(aten.view.default, value, [B * H, A, D]))

    program = traced(build, torch.randn(SHAPE), torch.randn(B, H, A, D), rows)
    assert write_in_place(program.graph) == 0
    program = traced(lambda emit, cache, value: emit(aten.copy_.default, cache, value), torch.randn(3), torch.randn(3))
    assert write_in_place(program.graph) == 0
