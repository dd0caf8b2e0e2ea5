"""Which input is the latent, and which numbers a plan may rest on: the decisions, apart from whole models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import fx

from ras_compile._torch import FakeTensorMode
from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.errors import ConfigError, UnsupportedGraph
from ras_compile.passes.rules.constants import FIXED
from ras_compile.passes.rules.ordering import KNOWN
from ras_compile.plans import latent
from ras_compile.plans.latent import is_fixed, likeness

WEIGHT, ARGUMENT = GraphInput(None, "order", weight=True), GraphInput("order", "order")


def test_few_whole_numbers_among_the_weights_may_be_rested_on(monkeypatch):
    assert is_fixed(WEIGHT, torch.arange(2)) and is_fixed(WEIGHT, torch.arange(2, dtype=torch.int32))
    assert not is_fixed(ARGUMENT, torch.arange(2)), "an argument is another one at the next call"
    assert not is_fixed(WEIGHT, torch.ones(2)), "no whole numbers"
    assert not is_fixed(WEIGHT, torch.ones(1, dtype=torch.int64)), "one number orders nothing"
    assert not is_fixed(WEIGHT, 2) and not is_fixed(WEIGHT, FakeTensorMode().from_tensor(torch.arange(2)))
    monkeypatch.setattr(latent, "LARGEST_FIXED", 3)
    assert is_fixed(WEIGHT, torch.arange(3)) and not is_fixed(WEIGHT, torch.arange(4)), "the most that are read"


def test_the_noise_looks_like_its_latent():
    value = torch.empty(2, 4, 8)
    same, channels, other, matrix = (torch.empty(shape) for shape in ((2, 4, 8), (2, 4, 9), (2, 5, 9), (4, 8)))
    assert likeness(value, [same]) == 0 and likeness(value, [channels]) == 1
    assert likeness(value, [other]) == likeness(value, [matrix]) == likeness(value, []) == likeness(value, [3]) == 2
    assert likeness(value, [other, same, channels]) == 0, "the output that is most alike decides"


def found(tokens: int, *outputs: int) -> SimpleNamespace:
    """An analysis of a latent of so many tokens, which these outputs have."""
    return SimpleNamespace(outputs=outputs, frame=SimpleNamespace(tokens=tokens))


def test_an_output_without_a_known_latent_may_have_another_one():
    picture, vector = torch.empty(1, 4, 8), torch.empty(4)
    assert latent.unreached([picture, picture], [found(8, 0)])
    assert not latent.unreached([picture, picture], [found(8, 0), found(4, 1)])
    assert not latent.unreached([picture, vector, 3, None], [found(8, 0)]), "a vector holds no tokens"


@pytest.mark.parametrize(
    ("analyses", "wanted"),
    [
        ([found(8, 0), found(4, 1)], True),
        ([found(4, 0), found(8, 1)], True),
        ([found(8, 0)], False),  # one alone needs no choice
        ([found(8, 0), found(4, 0, 1)], False),  # one output has tokens of both
        ([found(8, 0), found(8, 1)], False),  # neither is the larger one
        ([found(4, 0), found(8, 1), found(8, 2)], False),
    ],
)
def test_the_largest_of_several_latents_with_outputs_of_their_own(analyses, wanted):
    assert latent.of_their_own(analyses) == wanted


def test_a_region_is_of_packed_tokens_and_not_empty():
    packed = torch.empty(1, 10, 4)
    window = latent.frame_of(packed, RASConfig.from_options({"region": slice(-4, None)}))
    assert window.window == (6, 10) and latent.frame_of(packed, RASConfig.from_options({})).window is None
    with pytest.raises(ConfigError, match="holds none of the latent's 10 tokens"):
        latent.frame_of(packed, RASConfig.from_options({"region": slice(7, 7)}))
    with pytest.raises(ConfigError, match="ends behind the latent's 10 tokens"):
        latent.frame_of(packed, RASConfig.from_options({"region": (0, 11)}))
    with pytest.raises(ConfigError, match="packed tokens"):
        latent.frame_of(packed[0], RASConfig.from_options({"region": slice(0, 4)}))


def test_why_there_is_no_region_is_told_of_the_likeliest_latent(monkeypatch):
    def propagate(graph, node, frame, **options):
        raise UnsupportedGraph(f"{node.name} has no tokens at the end")

    monkeypatch.setattr(latent, "propagate", propagate)
    packed, pooled = torch.zeros(1, 4, 8), torch.zeros(1, 8)
    graph, _ = graph_of(packed, pooled)
    inputs = [GraphInput("x", "x"), GraphInput("pooled", "pooled")]
    config = RASConfig.from_options({"region": (0, 1)})
    with pytest.raises(UnsupportedGraph, match="x0 has no tokens at the end"):
        latent.analyse(graph, inputs, [packed, pooled], config)
    graph, _ = graph_of(pooled)
    with pytest.raises(ConfigError, match="packed tokens"):
        latent.analyse(graph, inputs[1:], [pooled], config)


@pytest.mark.parametrize("refused", [True, False])
def test_a_model_without_a_latent_is_told_why(monkeypatch, refused):
    """The reason is that of the input that looks most like a latent, where there is one."""

    def propagate(graph, node, frame, **options):
        raise UnsupportedGraph(f"{node.name} has no tokens at the end")

    monkeypatch.setattr(latent, "propagate", propagate)
    graph, value = fx.Graph(), torch.zeros(1, 4, 8, 8) if refused else torch.arange(3)
    x = graph.placeholder("x")
    x.meta["val"] = value
    graph.output((x,))
    with pytest.raises(UnsupportedGraph, match="x has no tokens at the end" if refused else "no floating-point tensor"):
        latent.analyse(graph, [GraphInput("x", "x")], [value], RASConfig())


PICTURE, LARGER, NUMBERS = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 9, 8), torch.arange(3)


def graph_of(*values) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph that returns what it is given."""
    graph, nodes = fx.Graph(), []
    for index, value in enumerate(values):
        nodes.append(graph.placeholder(f"x{index}"))
        nodes[-1].meta["val"] = value
    graph.output(tuple(nodes[:1]))
    return graph, nodes


def test_numbers_that_a_plan_may_rest_on_are_noted_and_what_was_known_is_not(monkeypatch):
    graph, nodes = graph_of(PICTURE, NUMBERS, NUMBERS + 1)
    nodes[0].meta[KNOWN] = "old"
    monkeypatch.setattr(latent, "propagate", lambda graph, node, frame, **options: found(8, 0))
    inputs = [GraphInput("x", "x"), GraphInput(None, "order", weight=True), GraphInput("ids", "ids")]
    latent.analyse(graph, inputs, [PICTURE, NUMBERS, NUMBERS + 1], RASConfig())
    assert [node.meta.get(FIXED) is not None for node in nodes] == [False, True, False]
    assert nodes[1].meta[FIXED] is NUMBERS and KNOWN not in nodes[0].meta
    assert [node.meta["argument"] for node in nodes] == [given.path for given in inputs]


@pytest.mark.parametrize(
    ("names", "match"), [(("x", "x"), "'x' holds 2 latents"), (("x", "y"), "'x' and 'y' could each be the latent")]
)
def test_two_latents_of_one_output_are_refused(monkeypatch, names, match):
    graph, _ = graph_of(PICTURE, PICTURE + 1)
    monkeypatch.setattr(latent, "propagate", lambda graph, node, frame, **options: found(8, 0))
    with pytest.raises(UnsupportedGraph, match=match):
        latent.analyse(graph, [GraphInput(name, name) for name in names], [PICTURE, PICTURE + 1], RASConfig())


@pytest.mark.parametrize(
    ("outputs", "second", "tried", "wanted"),
    [
        ((PICTURE,), found(4, 0), ["x0"], 8),  # what looks less like the noise is not even tried
        ((PICTURE, PICTURE), found(4, 1), ["x0", "x1"], 8),  # an output is left without tokens
        ((PICTURE, PICTURE), found(9, 1), ["x0", "x1"], 9),
    ],
    ids=["all outputs have tokens", "the first is larger", "the second is larger"],
)
def test_another_input_is_tried_where_an_output_has_no_tokens_yet(monkeypatch, outputs, second, tried, wanted):
    graph, nodes = graph_of(PICTURE, LARGER)
    graph.output_node().args = (tuple(nodes[:1] * len(outputs)),)
    monkeypatch.setattr(latent, "nodes_in", lambda values: nodes[:1] * len(outputs))
    asked, answers = [], {"x0": found(8, 0), "x1": second}
    monkeypatch.setattr(
        latent, "propagate", lambda graph, node, *more, **options: asked.append(node.name) or answers[node.name]
    )
    analysis = latent.analyse(graph, [GraphInput(name, name) for name in "xy"], [PICTURE, LARGER], RASConfig())
    assert asked == tried and analysis.frame.tokens == wanted


def test_an_input_that_is_no_latent_leaves_it_to_the_next(monkeypatch):
    graph, _ = graph_of(PICTURE, LARGER)

    def propagate(graph, node, frame, kv_cache):
        if node.name == "x0":
            raise UnsupportedGraph("no")
        return found(8, 0), frame, kv_cache

    monkeypatch.setattr(latent, "propagate", propagate)
    monkeypatch.setattr(latent, "of_their_own", lambda found: False)
    analysis = latent.analyse(
        graph, [GraphInput(name, name) for name in "xy"], [PICTURE, LARGER], RASConfig(kv_cache=False)
    )
    assert analysis[1].shape == tuple(LARGER.shape) and analysis[2] is False
