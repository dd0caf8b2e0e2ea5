"""Linears of a few rows that read the same input: joined wherever they stand, and no number changes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from contract import Subject, by_model, error, of_zoo, subject
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from zoo import redraw

import ras_compile
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.fusion.few_rows import join_linears
from ras_compile.passes.lowering.outline import outline
from ras_compile.passes.programs.program import dense_program, sparse_program

aten, own = torch.ops.aten, torch.ops.ras_compile
invoke = torch.ops.higher_order.invoke_subgraph
DOUBLE = (torch.float64,)


def always(x, weights, biases) -> bool:
    return True


def launches(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=own.many_linears.default)


def joined(program: fx.GraphModule, pays=always) -> fx.GraphModule:
    program = copy.deepcopy(program)
    count = join_linears(program.graph, pays, DOUBLE)
    program.graph.lint()
    program.recompile()
    assert count == len(launches(program.graph))
    return program


def modulations(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> bool:
    """What reads one row for each sample, and not the few tokens of a small model."""
    return x.ndim == 2


# Members of the launch: all blocks' modulations and that of the output. Where one serves all blocks there is none.
MODELS = {"SD3": [5], "SD3.5": [7], "Flux": [5], "Lumina-Next": [3]}


@pytest.mark.zoo
@pytest.mark.parametrize("name", by_model(MODELS))
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_modulations_of_known_models(name, kind):
    case = of_zoo(name)
    analysis, splices = case.plan.analysis, case.plan.sparse
    program = dense_program(analysis, splices) if kind == "dense" else sparse_program(analysis, 5, splices)
    short = joined(program, modulations)
    assert [len(node.args[1]) for node in launches(short.graph)] == MODELS[name]
    state = [] if kind == "dense" else [case.rows(5), *case.dense(case.values)[1]]
    values = case.plan.tensors(case.with_latent(case.other_latent()))
    outcomes = []
    for one in (short, program):
        held = [tensor.clone() for tensor in state]
        with torch.no_grad():
            outcomes.append([*one(*values, *held), *held])
    assert all(map(torch.equal, *outcomes))


class Block(nn.Module):
    """Attention and a gated linear, modulated by shift, scale and gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod, self.qkv, self.out = (nn.Linear(width, size * width) for size in (3, 3, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale, gate = self.mod(F.silu(t))[:, None].chunk(3, -1)
        normed = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.qkv(normed).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AdaLN(nn.Module):
    """A small DiT of five blocks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head, self.time = nn.Linear(4, width), nn.Linear(width, 4), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(5))
        self.last = nn.Linear(width, 2 * width)

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        x, t = self.embed(latent.flatten(2).transpose(1, 2)), self.time(timestep[:, None])
        for block in self.blocks:
            x = block(x, t)
        shift, scale = self.last(F.silu(t))[:, None].chunk(2, -1)
        return self.head(x * (1 + scale) + shift).transpose(1, 2).reshape(latent.shape)


def adaln(dtype: torch.dtype = torch.float64, **options) -> Subject:
    torch.manual_seed(0)
    given = {"latent": torch.randn(2, 4, 4, 6, dtype=dtype), "timestep": torch.rand(2, dtype=dtype)}
    return subject(redraw(AdaLN()).eval().to(dtype), given, latent="latent", **options)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_blocks_are_outlined_as_before(kind):
    """The launch stands in front of them, and each is handed its own result."""
    case = adaln()
    analysis, splices = case.plan.analysis, case.plan.sparse
    program = dense_program(analysis, splices) if kind == "dense" else sparse_program(analysis, 7, splices)
    short = joined(program)
    (launch,) = launches(short.graph)
    assert len(launch.args[1]) == 6
    targets = Counter(node.target for node in short.graph.nodes)
    assert targets[aten.silu.default] == 1, "what each block computes again is computed once"
    whole = outline(copy.deepcopy(program))
    outline(short)
    calls, before = (one.graph.find_nodes(op="call_function", target=invoke) for one in (short, whole))
    assert len(calls) == len(before) == 5 and len({call.args[1] for call in calls}) == 1
    block = getattr(short, str(calls[0].args[1]))
    assert not launches(block.graph) and len(launches(short.graph)) == 1
    state = [] if kind == "dense" else [case.rows(7), *case.dense(case.values)[1]]
    values = case.plan.tensors(case.with_latent(case.other_latent()))
    wanted, held = [[tensor.clone() for tensor in state] for _ in "ab"]
    with torch.no_grad():
        results = program(*values, *wanted)
        found = compile_fx(short, [*values, *state])(*values, *held)
    assert error([*found, *held], [*results, *wanted]) < 1e-12


def test_plans_ask_whether_it_pays(monkeypatch):
    case = adaln(torch.float32, exact=False)
    for kind in ("dense", 7):
        assert not launches(case.plan.build(kind, outline_blocks=False).graph), "the kernel does not run on a CPU"
    asked = []
    monkeypatch.setattr(ras_compile.kernels, "many_pays", lambda *given: asked.append(given) or True)
    for kind in ("dense", 7):
        assert len(launches(case.plan.build(kind, outline_blocks=False).graph)) == 1
    assert [(tuple(x.shape), len(weights), len(biases)) for x, weights, biases in asked] == [((2, 8), 6, 6)] * 2


M, K, N = 2, 6, 8  # K // 2 is 3


class Hand:
    """A graph written by hand: `x` [M, K], `rows` [17, K], weights [N, K], biases [N], and what was emitted so far."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.emit = Emitter(self.mode)
        shapes = dict(
            x=(M, K), other=(M, K), rows=(17, K), w0=(N, K), w1=(N + 1, K), w2=(K, K), b0=(N,), b1=(N + 1,), w3=(N, 3)
        )
        self.inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes.values()]
        self.nodes = {
            name: self.emit.placeholder(name, self.mode.from_tensor(tensor))
            for name, tensor in zip(shapes, self.inputs, strict=True)
        }

    def __getattr__(self, name: str):
        return self.nodes[name]

    def linear(self, *args):
        return self.emit(aten.linear.default, *args)

    def silu(self, x):
        return self.emit(aten.silu.default, x)

    def joined(self, *results, pays=always, dtypes=DOUBLE) -> list[int]:
        """Joins the graph's linears, checks that it gives what it gave, and returns the numbers of members."""
        self.emit.graph.output(results)
        program = fx.GraphModule(nn.Module(), self.emit.graph)
        outcomes = []
        for joining in (False, True):
            if joining:
                join_linears(program.graph, pays, dtypes)
            program.graph.lint()
            program.recompile()
            given = [tensor.clone() for tensor in self.inputs]
            torch.manual_seed(3)  # of what is drawn
            outcomes.append([*program(*given), *given])
        for before, after in zip(*outcomes, strict=True):
            assert before.shape == after.shape and before.stride() == after.stride() and torch.equal(before, after)
        return [len(node.args[1]) for node in launches(program.graph)]


def test_biases_are_kept_apart():
    g = Hand()
    assert g.joined(g.linear(g.x, g.w0), g.linear(g.x, g.w1, g.b1), g.linear(g.x, g.w0, g.b0)) == [3]


def test_equal_chains_are_one_input():
    g = Hand()

    def chain():
        return g.silu(g.emit(aten.mul.Tensor, g.x, 2.0))

    assert g.joined(g.linear(chain(), g.w0), g.emit(aten.cos.default, g.linear(chain(), g.w1, g.b1))) == [2]


def test_a_linear_that_is_computed_twice_is_one_member():
    g = Hand()
    first = g.linear(g.x, g.w0, g.b0)
    assert g.joined(first, g.linear(g.x, g.w1), g.linear(g.x, g.w0, g.b0)) == [2]
    g = Hand()
    assert g.joined(g.linear(g.x, g.w0, g.b0), g.linear(g.x, g.w0, g.b0)) == []


def test_rows_in_other_dimensions_are_the_same_rows():
    g = Hand()
    token = g.emit(aten.unsqueeze.default, g.x, 1)
    pair = g.emit(aten.view.default, g.x, [1, M, K])
    assert g.joined(g.linear(token, g.w0), g.linear(g.x, g.w1), g.linear(pair, g.w2)) == [3]
    g = Hand()
    token = g.emit(aten.unsqueeze.default, g.x, 1)
    assert g.joined(g.linear(g.silu(token), g.w0), g.linear(g.silu(token), g.w1)) == [2]


def test_rows_of_another_length_are_not():
    g = Hand()
    halves = g.emit(aten.view.default, g.x, [2 * M, K // 2])
    assert g.joined(g.linear(halves, g.w3), g.linear(g.x, g.w1)) == []


def test_what_reads_a_member_may_be_joined_too():
    """The second launch reads a result of the first."""
    g = Hand()
    y = g.linear(g.x, g.w2)
    assert g.joined(y, g.linear(g.x, g.w0), g.linear(y, g.w0), g.linear(y, g.w1)) == [2, 2]
    g = Hand()
    y, again = g.linear(g.x, g.w2), g.linear(g.x, g.w2)
    assert g.joined(g.linear(g.x, g.w0), g.linear(again, g.w0), g.linear(y, g.w1)) == [2, 2]


def noise(g):
    return g.emit(aten.rand_like.default, g.x)


LEFT = {
    "more than sixteen rows": lambda g: [g.linear(g.rows, g.w0), g.linear(g.rows, g.w1)],
    "other inputs": lambda g: [g.linear(g.x, g.w0), g.linear(g.other, g.w1)],
    "other functions of one input": lambda g: [
        g.linear(g.emit(aten.mul.Tensor, g.x, scale), weight) for scale, weight in ((2.0, g.w0), (3.0, g.w1))
    ],
    "a computed weight": lambda g: [g.linear(g.x, g.emit(aten.mul.Tensor, g.w0, 2.0)), g.linear(g.x, g.w1)],
    "a computed bias": lambda g: [g.linear(g.x, g.w0, g.silu(g.b0)), g.linear(g.x, g.w1)],
    "a draw": lambda g: [g.linear(noise(g), g.w0), g.linear(noise(g), g.w1)],
    "one alone": lambda g: [g.linear(g.x, g.w0)],
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_leaves_alone(case):
    g = Hand()
    assert g.joined(*LEFT[case](g)) == []


def test_leaves_alone_what_is_written_in_between():
    g = Hand()
    first = g.linear(g.silu(g.x), g.w0)
    g.emit(aten.copy_.default, g.emit(aten.slice.Tensor, g.x, 0, 0, 1), g.emit(aten.slice.Tensor, g.other, 0, 0, 1))
    assert g.joined(first, g.linear(g.silu(g.x), g.w1)) == []
    g = Hand()
    first = g.linear(g.x, g.w2)
    g.emit(aten.copy_.default, g.w2, g.emit(aten.mul.Tensor, g.w2, 2.0))
    assert g.joined(first, g.linear(g.x, g.w0), g.linear(g.x, g.w2)) == []


def test_leaves_other_dtypes_alone():
    g = Hand()
    assert g.joined(g.linear(g.x, g.w0), g.linear(g.x, g.w1), dtypes=(torch.bfloat16,)) == []


def test_what_does_not_pay_is_as_it_was():
    g, asked = Hand(), []
    results = g.linear(g.silu(g.x), g.w0), g.linear(g.silu(g.x), g.w1, g.b1)
    before = [(node, node.args) for node in g.emit.graph.nodes]
    assert g.joined(*results, pays=lambda *given: asked.append(given)) == []
    assert [(node, node.args) for node in g.emit.graph.nodes][:-1] == before
    ((x, weights, biases),) = asked
    assert x.shape == (M, K) and [w.shape[0] for w in weights] == [N, N + 1] and biases[0] is None
