"""Prompts of other lengths, and packed pictures of other sizes: from the second one on they share one capture and one compilation
of each program."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import diffusers
import pytest
import sympy
import torch
from contract import Subject, error, widen, widest
from pipelines import draw_flux, flux, normal, qwen
from tiny import EAGER, TinyDiT, kinds
from torch import fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils import _pytree as pytree
from zoo import ZOO, redraw

import ras_compile
import ras_compile.execute.inner
import ras_compile.plans.family
import ras_compile.plans.plan
from ras_compile.capture.inputs import GraphInput, describe_inputs
from ras_compile.capture.numbers import capture_numbers
from ras_compile.config import RASConfig
from ras_compile.execute.memory import keepers
from ras_compile.passes.analysis.emit import described
from ras_compile.plans import shared
from ras_compile.plans.family import KEPT, Family
from ras_compile.plans.lengths import Lengths, Region
from ras_compile.plans.plan import Plan
from ras_compile.plans.symbolic import SymbolicGraph, takes_all

# cross attention with a mask; a joint sequence; a joint sequence with rotary ids; cross attention with a mask, rotary
MODELS = {"PixArt": 6, "SD3": 5, "Flux": 5, "Lumina-Next": 6}
TWENTY = [9, 4, 12, 7, 30, 3, 5, 17, 2, 24, 8, 25, 11, 40, 6, 13, 22, 10, 48, 16]


@pytest.fixture
def compiled_programs(monkeypatch) -> Counter:
    """How often each program was compiled, by its active rows; "captured": how often a graph was."""
    count: Counter = Counter()

    def counting(module, inputs, config, compile_inner=ras_compile.plans.plan.compile_inner):
        rows = next((node.meta["val"] for node in module.graph.nodes if node.name == "rows"), None)
        count["dense" if rows is None else rows.shape[1]] += 1
        return compile_inner(module, inputs, config)

    def capturing(*args, **options):
        count["captured"] += 1
        return capture_numbers(*args, **options)

    for module in (ras_compile.execute.inner, ras_compile.plans.plan, ras_compile.plans.family):
        monkeypatch.setattr(module, "compile_inner", counting)
    monkeypatch.setattr(ras_compile.plans.plan, "capture_numbers", capturing)
    monkeypatch.setattr(ras_compile.plans.symbolic, "capture_numbers", capturing)
    return count


def lengthened(inputs: dict, old: int, new: int, region: str = "hidden_states") -> dict:
    """Inputs of a model with a context of another length: entries along a dimension of the old length are repeated."""

    def one(value):
        dims = [dim for dim, size in enumerate(getattr(value, "shape", ())) if size == old]
        for dim in dims:
            value = value.index_select(dim, torch.arange(new) % old)
        return value

    return {key: value if key == region else pytree.tree_map(one, value) for key, value in inputs.items()}


def sampled(compiled, inputs: dict, steps: int = 4, region: str = "hidden_states") -> torch.Tensor:
    """The last output of a generation of one dense step and then sparse ones."""
    with torch.no_grad(), ras_compile.generation(num_steps=steps) as gen:
        for step in range(steps):
            gen.step()
            output = compiled(**{**inputs, region: inputs[region] * (1 - step / 10)})
    return output if isinstance(output, torch.Tensor) else output[0]


OPTIONS = {**EAGER, "warmup_steps": 1, "unsupported": "error"}


@pytest.mark.parametrize("name", ["Flux", "Lumina-Next"])  # a joint sequence and cross attention, each with rotary ids
def test_all_lengths_cost_two_compilations_of_each_program(name, compiled_programs):
    module, given = redraw(ZOO[name].build()).eval(), ZOO[name].inputs()
    compiled = torch.compile(module, backend="ras", options=OPTIONS)
    found = [sampled(compiled, lengthened(given, MODELS[name], length)) for length in TWENTY[:7]]
    assert kinds(compiled) == "dsss"
    assert len(compiled_programs) == 3 and set(compiled_programs.values()) == {2}
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options=OPTIONS)
    assert torch.equal(sampled(alone, lengthened(given, MODELS[name], TWENTY[6])), found[6])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_twenty_lengths_cost_two_compilations_on_a_gpu_too(name, compiled_programs):
    """With Inductor, kernels that are chosen by measurement, and CUDA graphs."""
    module, given = redraw(ZOO[name].build()).eval().cuda(), ZOO[name].inputs()
    # two compilations round differently: rows must not hang on that
    options = {"sample_ratio": 0.5, "warmup_steps": 1, "unsupported": "error", "metric": "random"}
    compiled = torch.compile(module, backend="ras", options=options)
    on_gpu = [
        pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, lengthened(given, MODELS[name], length))
        for length in TWENTY
    ]
    found = [sampled(compiled, inputs) for inputs in on_gpu]
    assert kinds(compiled) == "dsss"
    assert len(compiled_programs) == 3 and set(compiled_programs.values()) == {2}
    for at in (3, 13):
        torch._dynamo.reset()
        alone = torch.compile(module, backend="ras", dynamic=False, options=options)
        assert error([sampled(alone, on_gpu[at])], [found[at]]) < 1e-4


def test_joined_linears_are_shared_by_all_lengths(compiled_programs, monkeypatch):
    monkeypatch.setattr(ras_compile.kernels, "many_pays", lambda x, weights, biases: x.ndim == 2)
    joined = []

    def counting(module, inputs, config, compile_inner=ras_compile.plans.family.compile_inner):
        op = torch.ops.ras_compile.many_linears.default
        joined.append([len(n.args[1]) for n in module.graph.find_nodes(op="call_function", target=op)])
        return compile_inner(module, inputs, config)

    monkeypatch.setattr(ras_compile.plans.family, "compile_inner", counting)
    module, given = redraw(ZOO["SD3"].build()).eval(), ZOO["SD3"].inputs()
    compiled = torch.compile(module, backend="ras", options=OPTIONS)
    found = [sampled(compiled, lengthened(given, 5, length)) for length in TWENTY[:4]]
    assert set(compiled_programs.values()) == {2} and joined == [[5], [5]]
    torch._dynamo.reset()
    monkeypatch.setattr(ras_compile.kernels, "many_pays", lambda *given: False)
    alone = torch.compile(module, backend="ras", dynamic=False, options=OPTIONS)
    assert torch.equal(sampled(alone, lengthened(given, 5, TWENTY[3])), found[3])


def test_a_frozen_context_and_a_new_ratio(compiled_programs):
    options = {**OPTIONS, "context": "frozen", "ratio_schedule": "linear"}
    module, given = redraw(ZOO["SD3"].build()).eval(), ZOO["SD3"].inputs()
    compiled = torch.compile(module, backend="ras", options=options)
    found = [sampled(compiled, lengthened(given, 5, length)) for length in TWENTY[:4]]
    assert len(compiled_programs) > 3 and set(compiled_programs.values()) == {2}
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options=options)
    assert torch.equal(sampled(alone, lengthened(given, 5, TWENTY[3])), found[3])


def test_lengths_of_a_call():
    """A text [2, s, 3], a number that is its length, and a latent; found true of the text: it is no longer than 90."""
    s, two, three = sympy.Symbol("s", integer=True), sympy.Integer(2), sympy.Integer(3)
    lengths = Lengths([s], {1: [two, s, three], 2: [s]}, {1: [3 * s, three, sympy.Integer(1)]}, [s <= 90])
    latent, text = torch.empty(2, 4), torch.empty(2, 7, 3)
    assert lengths.at([latent, text, 7]) == (7,)
    assert lengths.described(1, (5,)) == ((2, 5, 3), (15, 3, 1)) and lengths.number(2, (5,)) == 5
    assert lengths.fits([latent, text, 7], (7,))
    for other in (
        [latent, text, 8],
        [latent, torch.empty(3, 7, 3), 7],
        [latent, torch.empty(7, 2, 3).transpose(0, 1), 7],
    ):
        assert not lengths.fits(other, (7,))
    assert [length for length in (1, 2, 90, 91) if lengths.allows((length,))] == [2, 90], "one token is another graph"


def test_calls_that_differ_in_their_lengths_alone_have_one_key():
    s, two = sympy.Symbol("s", integer=True), sympy.Integer(2)
    lengths = Lengths([s], {1: [two, s], 2: [s]}, {1: [s, sympy.Integer(1)]}, [])
    latent, text = torch.empty(2, 4), torch.empty(2, 7)

    def key(*given) -> tuple:
        return lengths.key_without_lengths(given, range(4))

    first = key(latent, text, 7, "mode")
    assert first == key(torch.ones(2, 4), torch.empty(2, 9), 9, "mode")
    others = [
        (torch.empty(2, 5), text, 7, "mode"), (torch.empty(3, 4), text, 7, "mode"), (torch.empty(4, 2).t(), text, 7, "mode"),
        (latent.double(), text, 7, "mode"),
        (latent.to("meta"), text, 7, "mode"), (latent, torch.empty(3, 7), 7, "mode"), (latent, text.double(), 7, "mode"),
        (latent, text.to("meta"), 7, "mode"), (latent, text, 7, "other"),
    ]  # fmt: skip
    assert first not in [key(*other) for other in others]


def dynamo_graphs(module: Callable, calls: Sequence[dict], dynamic: bool | None = None) -> list:
    """The graph of each call, and its inputs."""
    found = []

    def backend(graph, example_inputs):
        def run(*values):
            found.append((graph, values))
            return graph(*values)

        return run

    compiled = torch.compile(module, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for given in calls:
            compiled(**given)
    return found


@cache
def in_double(name: str, *lengths: int) -> tuple[fx.GraphModule, SymbolicGraph, list[GraphInput], list[list]]:
    """A model in double precision, captured once for all lengths, and the graph's inputs for each from the second on."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module, given = redraw(ZOO[name].build()).eval().double(), ZOO[name].inputs()
        given = pytree.tree_map(widest, given)
        graphs = dynamo_graphs(module, [lengthened(given, MODELS[name], length) for length in lengths])[1:]
        graph, inputs = graphs[0][0], describe_inputs(graphs[0][0].graph)
        assert all(other is graph for other, _ in graphs)
        widen(graph)
        values = [[widest(value) for value in found] for _, found in graphs]
        found = Lengths.of(graph, inputs, values[0], [])
        assert found is not None
        return graph, SymbolicGraph(graph, found, values[0]), inputs, values
    finally:
        torch.set_default_dtype(default)


@cache
def captured_alone(name: str, at: int) -> fx.GraphModule:
    """The same graph, captured for one of those lengths."""
    graph, _, _, values = in_double(name, 9, 4, 13)
    return capture_numbers(graph, values[at])


@pytest.mark.parametrize("context", ["fresh", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_the_contract_holds_at_a_third_length(name, context):
    """Identity, consistency and semantics of the shared programs, beside an oracle of that length alone."""
    _, symbolic, inputs, (second, third) = in_double(name, 9, 4, 13)
    config = RASConfig.from_options({"inner_backend": "eager", "context": context})
    alone = Subject(Plan(captured_alone(name, 1), inputs, third, config), third)
    plan = Family(symbolic, inputs, second, config).member(third)
    shared = Subject(plan, alone.values)
    assert "exact" not in vars(plan)
    dense, caches = shared.dense(alone.values)
    assert error(dense, alone.reference(alone.values)) < 1e-9
    assert sum(cache.numel() * cache.element_size() for cache in caches) == plan.kept.branch_bytes
    values, rows = alone.with_latent(alone.other_latent()), alone.rows(alone.frame.tokens // 4)
    same, after = shared.sparse(alone.values, rows, caches)
    assert error(same, dense) < 1e-9 and error(after, caches) < 1e-9
    assert error(shared.sparse(values, rows, caches)[0], alone.oracle(values, rows, caches)) < 1e-9
    everything = torch.arange(alone.frame.tokens).repeat(alone.frame.samples, 1)
    outputs = shared.sparse(values, everything, caches)[0]
    assert error(outputs, alone.oracle(values, everything, caches)) < 1e-9
    if context == "fresh":
        assert error(outputs, alone.reference(values)) < 1e-9
    assert str(plan.cost.sparse_flops) == str(alone.plan.cost.sparse_flops)


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_captured_once_is_what_each_length_gives(name):
    _, symbolic, _, given = in_double(name, 9, 4, 13)
    for at, values in enumerate(given):
        wanted, found = captured_alone(name, at), symbolic.at(symbolic.lengths.at(values))
        assert spelled(found.graph) == spelled(wanted.graph)


def test_the_captured_sizes_decide_and_not_a_few_samples():
    """A text that is filled up to 2048 tokens looks, at short lengths, as if its length did not matter."""
    module, given = ZOO["LongCatAudioDiTTransformer"].build().eval(), ZOO["LongCatAudioDiTTransformer"].inputs()
    old = given["encoder_hidden_states"].shape[1]
    (graph, values), *_ = dynamo_graphs(module, [lengthened(given, old, length) for length in (old, old + 2)])[1:]
    lengths = Lengths.of(graph, describe_inputs(graph.graph), values, [])
    with pytest.raises(ras_compile.UnsupportedGraph, match=r"Max\(2048, .*\.shape\[1\]\), no constant"):
        SymbolicGraph(graph, lengths, values)


def spelled(graph) -> list:
    """A graph's ops, arguments, and the sizes, strides and beginnings of all values, without names."""
    numbers: dict = {}
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if takes_all(node):
            numbers[node] = numbers[node.args[0]]
            continue
        numbers[node] = len(lines)
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda operand: f"%{numbers[operand]}")
        sizes = described(value) if isinstance(value, (torch.Tensor, list, tuple)) else None
        lines.append((node.op, str(node.target) if node.op == "call_function" else "", str(args), sizes))
    return lines


LATENT = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, 6, generator=torch.Generator().manual_seed(seed + length))


def tiny(compiled, *texts: torch.Tensor, steps: int = 4) -> torch.Tensor:
    with torch.no_grad(), ras_compile.generation(num_steps=steps) as gen:
        for step in range(steps):
            gen.step()
            output = compiled(LATENT * (1 - step / 10), torch.full((2,), 1 - step / 10), *texts)
    return output


def both(module: nn.Module, calls: Sequence[tuple], **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a compiled module samples for each call, and what it does where each length has programs of its own."""
    results = []
    for dynamic in (None, False):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="ras", dynamic=dynamic, options={**OPTIONS, **options})
        results.append([tiny(compiled, *call) for call in calls])
    return list(zip(*results, strict=True))


class PaddedText(TinyDiT):
    """Pads its text to a multiple of four: sizes are no affine functions of the length."""

    def forward(self, hidden_states, timestep, text):
        return super().forward(hidden_states, timestep, nn.functional.pad(text, (0, 0, 0, -text.shape[1] % 4)))


class AtLeast(TinyDiT):
    """Fills its text up to twenty tokens: any few short lengths look as if it did not matter."""

    def forward(self, hidden_states, timestep, text):
        filled = text.new_zeros(text.shape[0], torch.sym_max(text.shape[1], 20), text.shape[2])
        filled[:, : text.shape[1]] = text
        return super().forward(hidden_states, timestep, filled)


class LongText(TinyDiT):
    """Goes another way where the text is long."""

    def forward(self, hidden_states, timestep, text):
        if text.shape[1] > 10:
            text = text[:, :10] * 0.5
        return super().forward(hidden_states, timestep, text)


class MeanText(TinyDiT):
    """Divides by the length."""

    def forward(self, hidden_states, timestep, text):
        return super().forward(hidden_states, timestep, text / text.shape[1])


class NearText(TinyDiT):
    """Lets text tokens see others that are at most eight away: where the text is short the mask hides nothing."""

    def forward(self, hidden_states, timestep, text):
        place = torch.arange(text.shape[1])
        near = (place[:, None] - place).abs() <= 8
        text = nn.functional.scaled_dot_product_attention(text, text, text * 3, attn_mask=near)
        return super().forward(hidden_states, timestep, text)


class NearByBlocks(TinyDiT):
    """The same as a block mask, which is made inside of the model."""

    def forward(self, hidden_states, timestep, text):
        length, heads = text.shape[1], text[:, None]
        near = create_block_mask(lambda b, h, q, k: (q - k).abs() <= 8, None, None, length, length, device="cpu")
        text = flex_attention(heads, heads, heads * 3, block_mask=near)[:, 0]
        return super().forward(hidden_states, timestep, text)


class TwoTexts(TinyDiT):
    """Reads two texts, whose lengths have nothing to do with each other."""

    def forward(self, hidden_states, timestep, text, more):
        return super().forward(hidden_states, timestep, torch.cat([text, more * 2], 1))


@pytest.mark.parametrize("kind", [PaddedText, AtLeast, LongText, MeanText, NearText, NearByBlocks])
def test_a_model_that_reads_the_length_comes_out_right(kind):
    """Lengths on both sides of each model's limit, with every remainder of four, and after the second one."""
    for found, wanted in both(kind(layers=1).eval(), [(text(length),) for length in (5, 7, 32, 6)]):
        assert torch.equal(found, wanted)


def test_sizes_that_are_not_affine_have_plans_of_their_own(compiled_programs):
    compiled = torch.compile(PaddedText(layers=1).eval(), backend="ras", options=OPTIONS)
    for length in (5, 7, 9, 6):
        tiny(compiled, text(length))
    assert compiled_programs["dense"] == 4


def test_two_lengths_that_change_apart(compiled_programs):
    calls = [(text(a), text(b, 1)) for a, b in ((5, 9), (7, 4), (3, 14), (12, 12), (8, 2), (6, 31))]
    module = TwoTexts().eval()
    compiled = torch.compile(module, backend="ras", options=OPTIONS)
    found = [tiny(compiled, *call) for call in calls]
    assert set(compiled_programs.values()) == {2}
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options=OPTIONS)
    for call, picture in zip(calls, found, strict=True):
        assert torch.equal(picture, tiny(alone, *call))


def test_what_the_inner_compiler_assumes_is_checked(monkeypatch, compiled_programs):
    """A program that is right for even lengths alone is compiled apart for odd ones, and the picture is right."""
    counting = ras_compile.plans.family.compile_inner

    def assuming(module, inputs, config):
        even = bool(inputs[0] % 2 == 0)  # an assumption, written down by PyTorch

        def run(length, *tensors):
            assert (length % 2 == 0) == even
            return module(length, *tensors)

        counting(module, inputs, config)
        return run

    monkeypatch.setattr(ras_compile.plans.family, "compile_inner", assuming)
    for found, wanted in both(TinyDiT(layers=1).eval(), [(text(length),) for length in (5, 8, 6, 9, 4, 11)]):
        assert torch.equal(found, wanted)
    # with shared programs: the first length, the shared ones, and 9 and 11 apart; then six lengths, each alone
    assert compiled_programs["dense"] == 4 + 6 and compiled_programs["captured"] == 2 + 6


def test_strides_that_are_not_the_expected_ones_are_compiled_apart(monkeypatch):
    """The caches of the dense program decide; what was expected of them is checked before a program runs."""
    monkeypatch.setattr(shared.Sized, "fits", lambda self, tensor, point: False)
    for found, wanted in both(TinyDiT(layers=1).eval(), [(text(length),) for length in (5, 8, 6)]):
        assert torch.equal(found, wanted)


def test_branches_of_other_lengths_share_a_family(compiled_programs):
    """Sequential guidance: each branch keeps caches of its own length."""

    def guided(compiled, first, second):
        latent = LATENT
        with torch.no_grad(), ras_compile.generation(num_steps=4) as gen:
            for step in range(4):
                gen.step()
                time = torch.full((2,), 1 - step / 10)
                with gen.branch("cond"):
                    a = compiled(latent, time, first)
                with gen.branch("uncond"):
                    b = compiled(latent, time, second)
                latent = latent - (2 * a - b) / 4
        return latent

    pairs = [(text(a), text(b)) for a, b in ((5, 7), (6, 9), (4, 8), (10, 3))]
    module = TinyDiT(layers=1).eval()
    compiled = torch.compile(module, backend="ras", options=OPTIONS)
    found = [guided(compiled, *pair) for pair in pairs]
    assert kinds(compiled) == "ddssssss"
    assert max(compiled_programs.values()) == 2
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options=OPTIONS)
    for one, pair in zip(found, pairs, strict=True):
        assert torch.equal(one, guided(alone, *pair))


def test_few_lengths_keep_caches_and_graphs(monkeypatch):
    """The others give them up, those that were used longest ago first."""
    released = []
    monkeypatch.setattr(Plan, "release_graphs", lambda plan: released.append(plan.point[0]))
    compiled = torch.compile(TinyDiT(layers=1).eval(), backend="ras", options=OPTIONS)
    before = {id(keeper) for keeper in keepers}
    for length in (2, 3, 4, 5, 6, 3, 7, 8):  # the first one has programs and a plan of its own
        tiny(compiled, text(length))
    assert KEPT == 4 and released == [4, 5]
    kept = [keeper for keeper in list(keepers) if id(keeper) not in before and keeper.bytes]
    assert 0 < len(kept) <= KEPT + 1


def test_a_speedup_is_solved_for_at_each_length(compiled_programs):
    options = {key: value for key, value in OPTIONS.items() if key != "sample_ratio"}
    compiled = torch.compile(TinyDiT(layers=1).eval(), backend="ras", options={**options, "speedup": 1.2})
    alone = torch.compile(TinyDiT(layers=1).eval(), backend="ras", dynamic=False, options={**options, "speedup": 1.2})
    for length in (5, 7, 40):
        tiny(compiled, text(length), steps=6)
        shared = [record.active for record in ras_compile.trace(compiled)]
        tiny(alone, text(length), steps=6)
        assert shared == [record.active for record in ras_compile.trace(alone)]


def test_inductor_compiles_once_for_all_lengths(compiled_programs, monkeypatch):
    """Repeated blocks, too: they are compiled once for all layers and all lengths."""
    blocks = []

    def counting(module, inputs, config, compile_inner=ras_compile.plans.family.compile_inner):
        repeated = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        blocks.append(len(repeated))
        return compile_inner(module, inputs, config)

    monkeypatch.setattr(ras_compile.plans.family, "compile_inner", counting)
    module = TinyDiT(layers=3).eval()
    options = {**OPTIONS, "inner_backend": "inductor"}
    compiled = torch.compile(module, backend="ras", options=options)
    found = {length: tiny(compiled, text(length)) for length in (5, 7, 11, 4)}
    assert set(compiled_programs.values()) == {2} and len(blocks) == 2 and min(blocks) > 1
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options=OPTIONS)
    for length, picture in found.items():
        assert error([picture], [tiny(alone, text(length))]) < 1e-4


class Rows(nn.Module):
    """Tokens attend within their row of the picture, then to all: which side leaves the region is that of the smaller rows."""

    def __init__(self):
        super().__init__()
        self.patch, self.head, self.time = nn.Conv2d(4, 16, 2, 2), nn.Linear(16, 16), nn.Linear(1, 16)
        self.mix = nn.Linear(16, 48)

    def attend(self, y):
        query, key, value = (part[:, None] for part in self.mix(y).chunk(3, -1))
        return y + nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]

    def between(self, y, height, width):
        return self.attend(y.unflatten(1, (height, width)).flatten(0, 1)).unflatten(0, (-1, height)).flatten(1, 2)

    def forward(self, hidden_states, timestep):
        height, width = hidden_states.shape[-2] // 2, hidden_states.shape[-1] // 2
        y = self.patch(hidden_states).flatten(2).transpose(1, 2) + self.time(timestep[:, None])[:, None]
        y = self.head(self.attend(self.between(y, height, width)))
        return (
            y.unflatten(1, (height, width)).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        )


class Windows(Rows):
    """Tokens are put in order by windows of 8 x 8: in a picture of one row of windows or fewer they are in order already."""

    def between(self, y, height, width):
        windows = torch.arange(height)[:, None] // 8 * 1000 + torch.arange(width)[None] // 8
        order = torch.argsort(windows.flatten(), stable=True)
        return self.attend(y[:, order] + torch.arange(height * width)[:, None] / 100)[:, torch.argsort(order)]


@pytest.mark.parametrize("kind", [Rows, Windows])
def test_a_size_at_which_rules_decide_otherwise_has_programs_of_its_own(kind):
    """What is smaller, and which order tokens are in, may be otherwise at the sizes that a family was made from."""
    torch.manual_seed(0)
    module = kind().eval()

    def drawn(model, *sides: int) -> torch.Tensor:
        latent = torch.randn(1, 4, *sides, generator=torch.Generator().manual_seed(sides[0] + 100 * sides[1]))
        return sampled(model, dict(hidden_states=latent, timestep=torch.ones(1)))

    torch._dynamo.reset()
    compiled = torch.compile(module, backend="ras", options={**OPTIONS, "sample_ratio": 0.5})
    sizes = [(8, 12), (12, 8), (16, 16), (20, 28)]
    found = [drawn(compiled, *sides) for sides in sizes]
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options={**OPTIONS, "sample_ratio": 0.5})
    for sides, picture in zip(sizes, found, strict=True):
        torch.testing.assert_close(picture, drawn(alone, *sides), msg=str(sides))


class Prompted(Rows):
    """The order of tokens turns round where the prompt has more than 40 words, whatever the size of the picture."""

    def forward(self, hidden_states, timestep, text):
        self.text = text
        return super().forward(hidden_states + text.mean(1)[:, :4, None, None], timestep)

    def between(self, y, height, width):
        order = torch.argsort(torch.arange(height * width) * (40 - self.text.shape[1]), stable=True)
        return self.attend(y[:, order] + torch.arange(height * width)[:, None] / 100)[:, torch.argsort(order)]


def test_an_order_that_depends_on_the_prompts_length_is_looked_at_too():
    """Neither its shape nor that of the tokens has a length in it."""
    torch.manual_seed(0)
    module = Prompted().eval()

    def drawn(model, words: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(words)
        latent, text = torch.randn(1, 4, 8, 12, generator=random), torch.randn(1, words, 6, generator=random)
        return sampled(model, dict(hidden_states=latent, timestep=torch.ones(1), text=text))

    torch._dynamo.reset()
    compiled = torch.compile(module, backend="ras", options={**OPTIONS, "sample_ratio": 0.5})
    found = {words: drawn(compiled, words) for words in (5, 9, 12, 60)}
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options={**OPTIONS, "sample_ratio": 0.5})
    for words, picture in found.items():
        torch.testing.assert_close(picture, drawn(alone, words), msg=str(words))


def test_a_model_that_keeps_a_length_is_refused_in_words():
    """From the second length on it is a symbol, which the graph returns."""

    class Keeps(TinyDiT):
        def forward(self, hidden_states, timestep, text):
            self.words = text.shape[1]
            return super().forward(hidden_states, timestep, text)

    torch._dynamo.reset()
    compiled = torch.compile(Keeps().eval(), backend="ras", options=OPTIONS)
    given = dict(hidden_states=torch.randn(1, 4, 8, 12), timestep=torch.ones(1))
    with (
        torch.no_grad(),
        pytest.raises(ras_compile.UnsupportedGraph, match="keeps as an attribute, a number that depends on"),
    ):
        for words in (3, 5):
            compiled(**given, text=torch.randn(1, words, 6))


class Placed(TinyDiT):
    """Adds places as SD3 does, cut out of a table about its middle, and as PixArt does, of numbers divided by the size."""

    def __init__(self, layers: int = 2):
        super().__init__(layers=layers)
        self.table = nn.Parameter(torch.randn(1, 32, 32, 4))

    def forward(self, hidden_states, timestep, text):
        height, width = hidden_states.shape[-2] // 2, hidden_states.shape[-1] // 2
        top, left = (32 - height) // 2, (32 - width) // 2
        places = self.table[:, top : top + height, left : left + width]
        places = places + (torch.arange(height) / (height / 4))[:, None, None]
        places = nn.functional.pixel_shuffle(places.permute(0, 3, 1, 2), 2)
        return super().forward(hidden_states + places, timestep, text)


def test_pictures_of_all_sides_share_programs_from_the_second_one_on(compiled_programs):
    """Height times width is a token count; a table that is cut about its middle wants sides of one rest by four."""
    torch.manual_seed(0)
    module, text = Placed().eval(), torch.randn(1, 3, 6)
    compiled = torch.compile(module, backend="ras", options={**OPTIONS, "sample_ratio": 0.5})

    def drawn(compiled, *sides: int) -> torch.Tensor:
        latent = torch.randn(1, 4, *sides, generator=torch.Generator().manual_seed(sides[0] + 100 * sides[1]))
        return sampled(compiled, dict(hidden_states=latent, timestep=torch.ones(1), text=text))

    found = {sides: drawn(compiled, *sides) for sides in [(8, 12), (12, 16), (16, 24), (20, 36)]}
    assert kinds(compiled) == "dsss"
    assert compiled_programs.pop("captured") == 2 == compiled_programs["dense"] and compiled_programs.total() == 4
    drawn(compiled, 18, 26)
    assert compiled_programs["dense"] == 3, "sides of another rest"
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options={**OPTIONS, "sample_ratio": 0.5})
    assert torch.equal(drawn(alone, 20, 36), found[20, 36])


class Held(nn.Module):
    """A model whose latent is in a list of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyDiT(layers=1)

    def forward(self, inputs, timestep, text):
        return self.model(inputs["x"][0], timestep, text)


def test_sizes_of_a_latent_in_a_dictionary_share_programs(compiled_programs):
    module, text, found = Held().eval(), torch.randn(1, 3, 6), {}
    compiled = torch.compile(module, backend="ras", options={**OPTIONS, "sample_ratio": 0.5})

    def drawn(compiled, *sides: int) -> torch.Tensor:
        latent = torch.randn(1, 4, *sides, generator=torch.Generator().manual_seed(sides[1]))
        given = dict(inputs={"x": [latent]}, timestep=torch.ones(1), text=text)
        with torch.no_grad(), ras_compile.generation(num_steps=4) as gen:
            for _ in range(4):
                gen.step()
                latent = latent + 0.1 * compiled(**given)
                given["inputs"] = {"x": [latent]}
        return latent

    for width in (8, 12, 20):
        found[width] = drawn(compiled, 8, width)
    assert kinds(compiled) == "dsss"
    assert compiled_programs["dense"] == 2, "one for the first size, one for all others"
    torch._dynamo.reset()
    alone = torch.compile(module, backend="ras", dynamic=False, options={**OPTIONS, "sample_ratio": 0.5})
    assert torch.equal(drawn(alone, 8, 20), found[20])


SIZES = [26, 20, 35, 12, 48, 15, 9, 63, 7, 30, 8, 28, 40, 18, 77, 10, 21, 54, 33, 25]  # tokens of packed latents


def waves(ids: torch.Tensor, theta: float = 100.0) -> torch.Tensor:
    return torch.cat([ids, ids / theta], -1).sin()


class Packed(nn.Module):
    """Tokens and a text in one sequence, with rotary-like positions; it has a float that only code holds."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.text, self.time = nn.Linear(6, 16), nn.Linear(3, 16), nn.Linear(1, 16)
        self.qkv, self.out, self.leave = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 6)
        self.where = nn.Linear(4, 16)

    def forward(self, hidden_states, timestep, text, ids):
        x = self.enter(hidden_states) + self.time(timestep.reshape(-1, 1, 1)) + self.where(waves(ids))
        both = torch.cat([self.text(text), x], 1)
        q, k, v = self.qkv(both).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave(torch.nn.functional.gelu(both + self.out(mixed))[:, text.shape[1] :])


def packed() -> Packed:
    torch.manual_seed(0)
    return Packed().eval()


def of_size(tokens: int) -> dict:
    latent = torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(tokens))
    ids = torch.stack([torch.arange(tokens) // 3, torch.arange(tokens) % 3], -1).float()
    return {"hidden_states": latent, "timestep": torch.ones(1), "text": torch.ones(1, 5, 3), "ids": ids}


def as_they_are(module: nn.Module, inputs: dict, options: dict) -> torch.Tensor:
    """What is sampled where each size has programs of its own."""
    torch._dynamo.reset()
    return sampled(torch.compile(module, backend="ras", dynamic=False, options=options), inputs)


def test_twenty_sizes_cost_two_compilations_of_each_program(compiled_programs):
    """Two programs for the first size, two for all others, whatever their tokens; and the caches of a few sizes."""
    module, options = packed(), {**OPTIONS, "sample_ratio": 0.5}
    compiled, found, before = torch.compile(module, backend="ras", options=options), [], {id(one) for one in keepers}
    for tokens in SIZES:
        found.append(sampled(compiled, of_size(tokens)))
        assert kinds(compiled) == "dsss"
    assert compiled_programs.pop("captured") == compiled_programs.pop("dense") == 2
    assert sum(compiled_programs.values()) == 2, "all numbers of active tokens share one"
    kept = [one for one in list(keepers) if id(one) not in before and one.bytes]
    assert 0 < len(kept) <= KEPT + 1, "the first size has a plan of its own"
    for at in (4, 19):
        assert torch.equal(as_they_are(module, of_size(SIZES[at]), options), found[at])


def test_with_dynamic_sizes_the_first_one_is_shared_already(compiled_programs):
    """And a float that code holds, such as a default of a function, is a constant, not an argument."""
    module, options = packed(), {**OPTIONS, "sample_ratio": 0.5}
    compiled = torch.compile(module, backend="ras", dynamic=True, options=options)
    for tokens in SIZES[:4]:
        found = sampled(compiled, of_size(tokens))
    assert sorted(compiled_programs.values()) == [1, 1, 1]
    assert torch.equal(as_they_are(module, of_size(SIZES[3]), options), found)


class Told(Packed):
    """Is told the sides of its packed latent in numbers, in latent pixels of so many pixels, and where the larger one ends."""

    pixels = 1

    def forward(self, hidden_states, timestep, text, shapes):
        height, width = (side // self.pixels for side in shapes[0])
        rows, columns = torch.arange(height)[:, None].expand(-1, width), torch.arange(width).expand(height, -1)
        ids = torch.stack([rows, columns - width // 2], -1).flatten(0, 1) + torch.arange(64)[max(height, width) // 2]
        return super().forward(hidden_states, timestep, text, ids.float())


def of_told_sides(height: int, width: int, pixels: int = 1) -> dict:
    given = of_size(height * width) | {"shapes": [(pixels * height, pixels * width)]}
    del given["ids"]
    return given


@pytest.mark.parametrize(("dynamic", "pixels", "programs"), [(True, 16, 1), (None, 1, 2)])
def test_sides_that_are_told_in_numbers_share_programs(dynamic, pixels, programs, compiled_programs):
    """Those of which the height is the larger side; a square is one of them. From the second size on where none is said to vary."""
    torch.manual_seed(0)
    module, options = Told().eval(), {**OPTIONS, "sample_ratio": 0.5}
    module.pixels = pixels
    compiled = torch.compile(module, backend="ras", dynamic=dynamic, options=options)
    for sides in ((8, 6), (12, 6), (12, 8), (8, 8)):
        found = sampled(compiled, of_told_sides(*sides, pixels))
        assert kinds(compiled) == "dsss"
    assert compiled_programs["dense"] == programs and compiled_programs.total() == 3 * programs
    assert torch.equal(as_they_are(module, of_told_sides(*sides, pixels), options), found)
    if dynamic:
        sampled(compiled, of_told_sides(6, 10, pixels))
        assert compiled_programs["dense"] == 3, "as_they_are had one, and the wide picture has another"


class Rooted(Told):
    def forward(self, hidden_states, timestep, text, shapes):
        height, width = shapes[0]
        return super().forward(hidden_states * math.sqrt(height * width), timestep, text, shapes)


class Logarithm(Told):
    def forward(self, hidden_states, timestep, text, shapes):
        return super().forward(hidden_states * math.log(hidden_states.shape[1]), timestep, text, shapes)


ALONE = {  # what is said of a number that is not followed
    Rooted: r"a number in the model is sqrt\(\(shapes\['0'\]\['0'\]\*shapes\['0'\]\['1'\]\)\), no sum of products of lengths",
    Logarithm: r"hidden_states.shape\[1\] stays 48, as code reads it as a number \[at: return .*math.log\(.*test_lengths.py",
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_number_that_is_not_followed_is_told(kind):
    torch.manual_seed(0)
    module, options = kind().eval(), {**OPTIONS, "sample_ratio": 0.5}
    ras_compile.notices.reset()
    found = sampled(torch.compile(module, backend="ras", dynamic=True, options=options), of_told_sides(8, 6))
    (why,) = ras_compile.notices.fallbacks()
    assert re.search(ALONE[kind], why.error), why
    assert torch.equal(as_they_are(module, of_told_sides(8, 6), options), found)


def test_sides_of_qwen_images_share_programs(compiled_programs):
    """`img_shapes`: a list of tuples of Python numbers."""
    torch.manual_seed(0)
    module, options = qwen().transformer, {**OPTIONS, "sample_ratio": 0.5}

    def of_sides(height: int, width: int) -> dict:
        given = {"hidden_states": normal(1, height * width, 16, seed=height), "timestep": torch.ones(1)}
        text = {
            "encoder_hidden_states": normal(1, 5, 16, seed=1),
            "encoder_hidden_states_mask": torch.ones(1, 5).long(),
        }
        return {**given, **text, "img_shapes": [[(1, height, width)]], "return_dict": False}

    compiled = torch.compile(module, backend="ras", dynamic=True, options=options)
    for sides in ((8, 6), (10, 8)):
        found = sampled(compiled, of_sides(*sides))
        assert kinds(compiled) == "dsss"
    assert compiled_programs["dense"] == 1 and compiled_programs.total() == 3 and not ras_compile.notices.fallbacks()
    assert torch.equal(as_they_are(module, of_sides(*sides), options), found)


def test_sizes_of_few_tokens_are_right():
    """A single active row is another program than several, and so few tokens say little about either."""
    module, options = packed(), {**OPTIONS, "sample_ratio": 0.5}
    compiled, sizes = torch.compile(module, backend="ras", options=options), (20, 2, 3)
    found = [sampled(compiled, of_size(tokens)) for tokens in sizes]
    for tokens, one in zip(sizes[1:], found[1:], strict=True):
        assert torch.equal(as_they_are(module, of_size(tokens), options), one)


def test_the_contract_holds_at_a_third_size():
    """Identity, consistency and semantics of the shared programs for any number of rows, beside an oracle of that size."""
    calls = [pytree.tree_map(widest, of_size(tokens)) for tokens in (26, 20, 35)]
    (graph, second), (_, third) = dynamo_graphs(packed().double(), calls)[1:]
    inputs, config = describe_inputs(graph.graph), RASConfig.from_options({"inner_backend": "eager"})
    assert Lengths.of(graph, inputs, second, []) is None, "no length of the context"
    lengths = Lengths.of(graph, inputs, second, [], Region.TOKENS)
    family = Family(SymbolicGraph(graph, lengths, second), inputs, second, config)
    alone, plan = Subject(Plan(graph, inputs, third, config), third), family.member(third)
    shared = Subject(plan, alone.values)
    dense, caches = shared.dense(alone.values)
    assert error(dense, alone.reference(alone.values)) < 1e-9
    assert sum(cache.numel() * cache.element_size() for cache in caches) == plan.kept.branch_bytes
    values = alone.with_latent(alone.other_latent())
    for active in (1, 2, 8, 35):
        rows = alone.rows(active)
        same, after = shared.sparse(alone.values, rows, caches)
        assert error(same, dense) < 1e-9 and error(after, caches) < 1e-9
        assert error(shared.sparse(values, rows, caches)[0], alone.oracle(values, rows, caches)) < 1e-9
    assert str(plan.cost.sparse_flops) == str(alone.plan.cost.sparse_flops)


class Windows(nn.Module):
    """Attention within windows of four tokens: a number of tokens that is cut is no length."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(1, 16)

    def forward(self, hidden_states, timestep):
        x = self.enter(hidden_states) + self.time(timestep.reshape(-1, 1, 1))
        windows = x.unflatten(1, (-1, 4))
        x = x + nn.functional.scaled_dot_product_attention(windows, windows, windows).flatten(1, 2)
        y = x[:, None]
        return self.leave(x + nn.functional.scaled_dot_product_attention(y, y, y)[:, 0])


def test_tokens_that_are_cut_into_windows_are_right_too():
    torch.manual_seed(0)
    module, options, found = Windows().eval(), {**OPTIONS, "sample_ratio": 0.5}, []
    compiled = torch.compile(module, backend="ras", options=options)
    calls = [{"hidden_states": torch.randn(1, tokens, 4), "timestep": torch.ones(1)} for tokens in (24, 16, 40)]
    for call in calls:
        found.append(sampled(compiled, call))
        assert kinds(compiled) == "dsss"
    for call, one in zip(calls, found, strict=True):
        assert torch.equal(as_they_are(module, call, options), one)


class Pipe:
    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler = transformer, diffusers.FlowMatchEulerDiscreteScheduler()


def of_sides(words: int, *sides: int) -> dict:
    latent = torch.randn(1, 4, *sides, generator=torch.Generator().manual_seed(sides[-1]))
    return dict(hidden_states=latent, timestep=torch.ones(1), text=torch.ones(1, words, 6))


FIRST = {  # a module, and calls of which the first one compiles what the others run; the sizes of most are equal by chance
    "packed": (packed, [{**of_size(26), "text": torch.ones(1, 26, 3)}, of_size(20)]),
    "a square": (lambda: Placed(1), [of_sides(16, 16, 16), of_sides(5, 16, 24), of_sides(7, 28, 28)]),
}


@pytest.mark.parametrize("kind", FIRST)
def test_a_pipeline_is_attached_for_all_sizes_at_once(kind, compiled_programs):
    """The first picture compiles what those of other sizes run."""
    module, calls = FIRST[kind][0]().eval(), FIRST[kind][1]
    pipe = Pipe(module)
    with ras_compile.attach(pipe, dynamic=True, **{**OPTIONS, "sample_ratio": 0.5}) as handle:
        for given in calls:
            call = dict(given)
            pipe.scheduler.set_timesteps(4)
            with torch.no_grad():
                for t in pipe.scheduler.timesteps:
                    noise = module(**{**call, "timestep": t.expand(1)})
                    call["hidden_states"] = pipe.scheduler.step(noise, t, call["hidden_states"])[0]
            assert [record.kind[0] for record in ras_compile.trace(handle)] == [*"dsss"]
            assert sorted(compiled_programs.values()) == [1, 1, 1]


def test_places_that_are_a_view_of_a_square_serve_all_sides(compiled_programs):
    """As FLUX has them: a table of rows and columns, of which equal numbers are one only by chance."""
    pipe = flux()
    pipe.set_progress_bar_config(disable=True)
    with ras_compile.attach(pipe, dynamic=True, inner_backend="eager", sample_ratio=0.5) as handle:
        for height, width in ((12, 12), (8, 16), (16, 20)):
            draw_flux(pipe, 6, height=height, width=width)
            assert "sparse" in [record.kind for record in ras_compile.trace(handle)]
            assert set(compiled_programs.values()) == {1}


def test_a_videos_sides_and_its_text_are_lengths_and_what_is_held_is_not():
    """Its channels are none, nor is a side for which code has a case of its own; a second text is taken as it is."""

    def model(hidden_states, one, two):
        known = 2 if hidden_states.shape[-1] // 2 == 12 else 1
        return hidden_states.sin() + known * one.mean() + two.mean()

    for width, point, sides in ((20, (5, 16, 20, 7), (1, 1, 1, 0)), (24, (5, 16, 7, 9), (1, 1, 0, 0))):
        torch._dynamo.reset()
        call = dict(hidden_states=torch.ones(1, 3, 5, 16, width), one=torch.ones(1, 7, 1), two=torch.ones(1, 9, 1))
        graph, values = dynamo_graphs(model, [call], dynamic=True)[0]
        lengths = Lengths.of(graph, describe_inputs(graph.graph), values, [], Region.SIDES)
        assert (lengths.sides, lengths.at(values)) == (sides, point)


def test_a_size_and_a_prompt_that_change_at_once_share_programs():
    """A text and its positions are one length; where the picture's tokens are as many by chance, nothing wrong comes of it."""
    pipe, plain = flux(), flux()
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
    with ras_compile.attach(pipe, inner_backend="eager", sample_ratio=1.0) as handle:
        for height, length in ((8, 5), (12, 24), (16, 9), (20, 7)):
            given = {"height": height, "width": 8, "prompt_embeds": normal(1, length, 16, seed=1)}
            assert torch.allclose(draw_flux(pipe, 6, **given), draw_flux(plain, 6, **given), atol=1e-5)
            assert "sparse" in [record.kind for record in ras_compile.trace(handle)]
    assert not ras_compile.notices.fallbacks(), "a plan for each length is counted there"
