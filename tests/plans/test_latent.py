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
