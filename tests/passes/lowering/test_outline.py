"""Outlining keeps every number and every cache, makes the graph short, and leaves alone what only looks like a repeat."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ras_compile.capture.export import capture
from ras_compile.passes.algebra.layout import Frame
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.analysis.propagate import propagate
from ras_compile.passes.analysis.roles import Role, role_of
from ras_compile.passes.analysis.splices import plan
from ras_compile.passes.lowering.outline import outline
from ras_compile.passes.programs.program import dense_program, sparse_program

outlining = importlib.import_module("ras_compile.passes.lowering.outline")
invoke = torch.ops.higher_order.invoke_subgraph
WIDTH = 8


class Block(nn.Module):
    """Attention and a gated linear, with a constant of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.qkv, self.out, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.gate(x).tanh() * context * self.scale


class Model(nn.Module):
    """Blocks behind one another; ``skip`` says whose output a block adds to its own: (block, earlier block)."""

    def __init__(self, scales: tuple[float, ...] = (1.0,) * 4, skip: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block(scale) for scale in scales)
        self.skip = dict(skip)

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        x = self.embed(latent.flatten(2).transpose(1, 2))
        seen = []
        for index, block in enumerate(self.blocks):
            x = block(x + seen[self.skip[index]] if index in self.skip else x, context)
            seen.append(x)
        return self.head(x).transpose(1, 2).reshape(latent.shape)


def inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 4, 2, 3, dtype=torch.float64), torch.randn(2, 1, WIDTH, dtype=torch.float64)]


def programs(model: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule, list[Tensor]]:
    """``(dense, sparse for two rows, inputs)``; the parameters are constants of the graph."""
    torch.manual_seed(0)
    values = inputs()
    traced = capture(torch.export.export(model.double(), tuple(values)).module(), values)
    graph = traced.graph
    latent = next(n for n in graph.find_nodes(op="placeholder") if n.meta["val"].shape == values[0].shape)
    analysis = propagate(graph, latent, Frame.of(values[0].shape))
    splices = plan(analysis)
    return (
        dense_program(analysis, splices),
        sparse_program(analysis, 2, splices),
        [*values, *traced.meta["constants"]],
    )


def run(program: Callable, values: list[Tensor], caches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the caches afterwards."""
    held = [cache.clone() for cache in caches]
    with torch.no_grad():
        return list(program(*values, *held)), held[1:]


def outlined(program: fx.GraphModule) -> fx.GraphModule:
    return outline(copy.deepcopy(program))


def calls(program: fx.GraphModule) -> list[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=invoke)


def subgraphs(program: fx.GraphModule) -> set[str]:
    return {str(call.args[0].target) for call in calls(program)}


def size(program: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def test_numbers_and_caches_are_the_same_bit_for_bit():
    dense, sparse, values = programs(Model())
    with torch.no_grad():
        noise, *caches = (result.clone() for result in dense(*values))
        for found, wanted in zip(outlined(dense)(*values), dense(*values), strict=True):
            assert torch.equal(found, wanted)
    rows = torch.tensor([[1, 4], [0, 5]])
    values = [torch.randn_like(values[0]), *values[1:]]
    wanted, after = run(sparse, values, [rows, *caches, noise])
    found, changed = run(outlined(sparse), values, [rows, *caches, noise])
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, changed, after))
    assert not any(map(torch.equal, changed, [*caches, noise])), "every cache is written"


def test_four_blocks_become_four_calls_of_one_subgraph():
    for program in programs(Model())[:2]:
        short = outlined(program)
        assert len(calls(short)) == 4
        assert len(subgraphs(short)) == 1
        assert size(short) < 0.6 * size(program)


def test_every_block_is_given_every_length():
    """Without them Inductor does not know the symbol in a size such as s + 4, and refuses the whole program."""
    dense, *_ = programs(Model())
    with dense.graph.inserting_before(next(iter(dense.graph.nodes))):
        length = dense.graph.placeholder("length_0")
    length.meta.update(val=6, role=Role.LENGTH)
    short = outlined(dense)
    assert len(calls(short)) == 4
    for call in calls(short):
        assert [operand.name for operand in call.args[2:]].count("length_0") == 1
    block = getattr(short, subgraphs(short).pop())
    assert [role_of(node) for node in block.graph.find_nodes(op="placeholder")].count(Role.LENGTH) == 1


@pytest.mark.compiles
def test_through_inductor_caches_are_written_in_place():
    dense, sparse, values = programs(Model())
    with torch.no_grad():
        noise, *caches = (result.clone() for result in dense(*values))
        rows = torch.tensor([[1, 4], [0, 5]])
        wanted, after = run(sparse, values, [rows, *caches, noise])
        short = outlined(sparse)
        assert calls(short)
        found, changed = run(compile_fx(short, [*values, rows, *caches, noise]), values, [rows, *caches, noise])
    for a, b in zip([*found, *changed], [*wanted, *after], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Rotated(Model):
    """The blocks turn their input by a complex table."""

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        x = self.embed(latent.flatten(2).transpose(1, 2))
        angles = torch.arange(x.shape[1] * WIDTH // 2, dtype=torch.float64).view(x.shape[1], -1)
        table = torch.polar(torch.ones_like(angles), angles)
        for block in self.blocks:
            pairs = torch.view_as_complex(block(x, context).unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * table).flatten(-2)
        return self.head(x).transpose(1, 2).reshape(latent.shape)


@pytest.mark.compiles
def test_through_inductor_complex_numbers_are_handed_over_as_pairs():
    """Inductor stops at a call that takes complex numbers and writes into a cache."""
    dense, sparse, values = programs(Rotated())
    with torch.no_grad():
        noise, *caches = (result.clone() for result in dense(*values))
        state = [torch.tensor([[1, 4], [0, 5]]), *caches, noise]
        wanted, after = run(sparse, values, state)
        short = outlined(sparse)
        assert len(calls(short)) >= 3
        for call in calls(short):
            assert not any(
                value.is_complex() for value in (*(arg.meta["val"] for arg in call.args[2:]), *call.meta["val"])
            )
        found, changed = run(compile_fx(short, [*values, *state]), values, state)
    for a, b in zip([*found, *changed], [*wanted, *after], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_block_with_another_constant_is_left_alone():
    """Three blocks alike and one with another scale: only the three share a subgraph."""
    dense, _, values = programs(Model(scales=(1.5, 1.5, 1.5, 2.5)))
    short = outlined(dense)
    assert len(calls(short)) == 3
    assert all(map(torch.equal, short(*values), dense(*values)))
    assert not calls(outlined(programs(Model(scales=(1.5, 2.5)))[0])), "two blocks that differ are no repeat"


def test_blocks_wired_in_another_pattern_are_left_alone():
    """Both blocks are the same ops, but the second reads another value than the first does in its place."""
    graph = fx.Graph()
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    value = mode.from_tensor(torch.zeros(3))
    first, second = (graph.placeholder(name) for name in ("first", "second"))
    x = first
    for block in range(2):
        inner = x
        for step in range(7):
            inner = graph.call_function(torch.ops.aten.mul.Tensor, (inner, inner if block and step == 3 else second))
            inner = graph.call_function(torch.ops.aten.sin.default, (inner,))
        x = inner
    graph.output((x,))
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = value
    program = fx.GraphModule({}, graph)
    short = outlined(program)
    given = [torch.randn(3), torch.randn(3)]
    assert torch.equal(short(*given)[0], program(*given)[0])
    for call in calls(short):
        body = getattr(short, str(call.args[0].target)).graph
        assert sum(node.op == "call_function" for node in body.nodes) < 14, "whole blocks differ in their wiring"


@pytest.mark.parametrize("skip", [((2, 0), (3, 1)), ((1, 0), (3, 0))])
def test_long_skips_keep_their_ends(skip: tuple):
    dense, sparse, values = programs(Model(skip=skip))
    short = outlined(dense)
    with torch.no_grad():
        assert all(map(torch.equal, short(*values), dense(*values)))
        noise, *caches = (result.clone() for result in dense(*values))
    state = [torch.tensor([[1, 4], [0, 5]]), *caches, noise]
    for found, wanted in zip(run(outlined(sparse), values, state), run(sparse, values, state), strict=True):
        assert all(map(torch.equal, found, wanted))


def test_short_or_single_stretches_are_left_alone():
    assert not calls(outlined(programs(Model(scales=(1.0,)))[0]))


class Twin(nn.Module):
    """One layer of two streams: what repeats are the streams, and each hands slices of its modulation on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.mods = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in "ab")
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in "ab")
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "ab")

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        x = self.embed(latent.flatten(2).transpose(1, 2))
        streams, kept = [x, x.tanh()], []
        for index in (0, 1):
            shift, scale, gate, again = self.mods[index](F.silu(context)).chunk(4, dim=-1)
            normed = F.layer_norm(streams[index], (WIDTH,)) * (1 + scale) + shift
            q, k, v = self.qkv[index](normed).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            kept.append((q, k, v, gate, again))
        q, k, v = (torch.cat([one, two], 2) for one, two in zip(kept[0][:3], kept[1][:3], strict=True))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).chunk(2, dim=1)
        for index in (0, 1):
            streams[index] = streams[index] + kept[index][3] * self.out[index](mixed[index]) * kept[index][4]
        return self.head(streams[0] + streams[1]).transpose(1, 2).reshape(latent.shape)


@pytest.mark.parametrize("told", [True, False], ids=["views known", "views not known"])
@pytest.mark.parametrize("model", [Model, Twin])
def test_what_a_block_hands_on_owns_its_memory(model, told, monkeypatch):
    """Inductor reuses the memory of a call's result as if nothing else lived in it."""
    if not told:  # an op may return its operand without saying so: blocks are run to see
        monkeypatch.setattr(outlining, "is_view", lambda node: False)
    blocks = 0
    for program in programs(model())[:2]:
        outline(program)
        for name, block in program.named_children():
            blocks += 1
            call = next(n for n in program.graph.find_nodes(op="call_function", target=invoke) if n.args[1] == name)
            metas = [operand.meta["val"] for operand in call.args[2:]]
            given = [torch.empty_strided(m.shape, m.stride(), dtype=m.dtype).fill_(0) for m in metas]
            returned = block(*given)
            memories = [value.untyped_storage().data_ptr() for value in (*given, *returned)]
            assert len(set(memories)) == len(memories)
            assert all(value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in returned)
    assert blocks or model is Twin or not told


@pytest.mark.compiles
@pytest.mark.parametrize("where", ["outside", "in the next block", "inside"])
def test_a_cache_that_a_block_writes_is_not_read_outside_of_it(where):
    """Inductor would give what reads the cache behind the call what it held before."""
    emit = Emitter(FakeTensorMode())
    given = [torch.randn(2, 3, 8), torch.tensor([0, 2, 4]), *torch.randn(4, 2, 5, 8)]
    with emit.mode:
        metas = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in given]
    x, rows, *caches = (emit.placeholder(f"input_{index}", meta) for index, meta in enumerate(metas))
    aten = torch.ops.aten
    sums, before = [], None
    for cache in caches:
        for _ in range(7):
            x = emit(aten.mul.Tensor, emit(aten.cos.default, x), 1.5)
        read = before if where == "in the next block" else cache if where == "inside" else None
        emit(aten.index_put_.default, cache, [None, rows], x)
        if read is not None:
            x = emit(aten.add.Tensor, x, emit(aten.mean.dim, emit(aten.permute.default, read, [0, 1, 2]), [1], True))
        before = cache
    if where == "outside":
        sums = [emit(aten.sum.default, emit(aten.permute.default, cache, [0, 2, 1])) for cache in caches]
    emit.graph.output((x, *sums))
    program = fx.GraphModule({}, emit.graph)
    short = outlined(program)
    assert bool(calls(short)) == (where == "inside")
    wanted, kept = [[tensor.clone() for tensor in given] for _ in "ab"]
    with torch.no_grad():
        found = compile_fx(short, given)(*kept)
        for a, b in zip([*found, *kept], [*program(*wanted), *wanted], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
