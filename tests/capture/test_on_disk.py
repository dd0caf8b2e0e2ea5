"""Graphs that are written and read again compute what they did, and say what cannot be written."""

from __future__ import annotations

import operator
import pickle

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext
from torch.nn import functional as F

from ras_compile._torch import DimDynamic, FakeTensor, FakeTensorMode, ShapeEnv, memory_key, source_of
from ras_compile.capture import on_disk
from ras_compile.capture.on_disk import Unkeepable, pickled, read, text, values_of, written


def captured(call, *args):
    """Dynamo's graph of a function or module, and the inputs that it takes."""
    found = []

    def backend(graph, inputs):
        def run(*given):
            found.append((graph, given))
            return graph(*given)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, backend=backend)(*args)
    (one,) = found
    return one


def again(graph, metas=("example_value", "stack_trace", "nn_module_stack")):
    return read(pickle.loads(pickled(written(graph, metas))))


def test_a_graph_is_read_as_it_was_written():
    def call(x, y):
        a, b = torch.chunk(x.view(torch.int32).view(torch.float32), 2, dim=-1)
        z = F.scaled_dot_product_attention(y[:, None], y[:, None], a[:, None].contiguous(), is_causal=True)
        z = z.to(torch.float64).sin_().mul(math) + b.flatten(1)[:, None, None, :4]
        return (z[..., 1:3], [z.amax(-1), {"mean": z.mean(dim=(-1, -2))}])

    math = 0.5
    graph, inputs = captured(call, torch.randn(2, 3, 8), torch.randn(2, 3, 4))
    other = again(graph)
    for ours, theirs in zip(other(*inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for new, old in zip(other.graph.nodes, graph.graph.nodes, strict=True):
        assert (new.op, new.name, new.target) == (old.op, old.name, old.target)
        assert new.meta.get("stack_trace") == old.meta.get("stack_trace")
        assert source_of(new) == source_of(old) or new.op != "placeholder"
        mine, theirs = new.meta.get("example_value"), old.meta.get("example_value")
        if isinstance(theirs, torch.Tensor):
            assert isinstance(mine, FakeTensor) and mine.shape == theirs.shape and mine.stride() == theirs.stride()
            assert mine.dtype == theirs.dtype and mine.device == theirs.device


def test_views_share_their_memory_again():
    def call(x):
        return x[:, 1:].transpose(0, 1), torch.view_as_complex(x.view(2, 3, 2)) * 1j

    graph, _ = captured(call, torch.randn(2, 6))
    old, new = (
        {n.name: n.meta["example_value"] for n in g.graph.nodes if n.op != "output"} for g in (graph, again(graph))
    )
    shared = [[memory_key(a) == memory_key(b) for a in seen.values() for b in seen.values()] for seen in (old, new)]
    assert shared[0] == shared[1] and any(shared[0])
    assert [value.storage_offset() for value in old.values()] == [value.storage_offset() for value in new.values()]


def test_weights_are_weights_again():
    graph, _ = captured(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    places = again(graph).graph.find_nodes(op="placeholder")
    assert [isinstance(node.meta["example_value"], nn.Parameter) for node in places].count(True) == 2


def test_graphs_that_are_held_are_written_once():
    part = fx.symbolic_trace(lambda x: (x + 1,))
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(2):
        held = graph.get_attr("part")
        x = graph.call_function(torch.ops.higher_order.invoke_subgraph, (held, "part", x))
        x = graph.call_function(operator.getitem, (x, 0))
    graph.output((x,))
    module = fx.GraphModule(nn.ModuleDict({"part": part}), graph)
    nodes = written(module)
    assert sum(node[-1] is not None for node in nodes if node[0] == "get_attr") == 1
    other = read(pickle.loads(pickled(nodes)))
    assert len(list(other.children())) == 1 and isinstance(other.part, fx.GraphModule)


@pytest.mark.parametrize("kind", ["a size", "a tensor", "a module", "a function"])
def test_what_cannot_be_written(kind):
    graph = fx.Graph()
    x = graph.placeholder("x")
    held = nn.Module()
    if kind == "a tensor":
        held.t = torch.ones(2)
        x = graph.get_attr("t")
    elif kind == "a module":
        held.m = nn.Identity()
        x = graph.call_module("m", (x,))
    elif kind == "a function":
        x = graph.call_function(lambda y: y, (x,))
    else:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        x.meta["example_value"] = mode.from_tensor(torch.ones(3), symbolic_context=context)
    graph.output(x)
    with pytest.raises(Unkeepable):
        written(fx.GraphModule(held, graph), ("example_value",))


def test_what_cannot_be_pickled():
    with pytest.raises(Unkeepable):
        pickled(lambda: None)


def test_text_tells_sizes_and_ops():
    def of(call, *args):
        return text(make_fx(call, tracing_mode="fake")(*args))

    x = torch.ones(2, 3)
    same = of(lambda x: x + 1, x)
    assert same == of(lambda x: x + 1, x * 2)
    others = [
        of(lambda x: x + 2, x),
        of(lambda x: x - 1, x),
        of(lambda x: x + 1, x.double()),
        of(lambda x: x + 1, x.mT),
    ]
    assert len({same, *others}) == 5
    three, four = lambda x: x + torch.tensor([1.0, 2.0, 3.0]), lambda x: x + torch.tensor([1.0, 2.0, 4.0])
    constants = [text(make_fx(call)(x)) for call in (three, four)]
    assert constants[0] != constants[1] and same not in constants


def test_large_tensors_are_not_hashed(monkeypatch):
    monkeypatch.setattr(on_disk, "HASHED", 8)
    assert values_of([torch.ones(1), torch.ones(1)]) != values_of([torch.ones(2)])
    with pytest.raises(Unkeepable):
        values_of([torch.ones(2), torch.ones(1)])
    with pytest.raises(Unkeepable):
        values_of([FakeTensorMode().from_tensor(torch.ones(1))])
