"""Switches of diffusers: the page says of each what happens, and it is tried here."""

from pathlib import Path

import pytest
import torch
from features import BEGIN, END, FEATURES, OPTIONS, casting, first_block_cache, hooked, put, sequential, tried
from pipelines import draw_flux, flux, kinds
from torch import nn

import ras_compile
from ras_compile.dispatch.hooks import has_hooks
from ras_compile.pipelines.casting import cast_by_hooks, cast_in_graph

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_the_page_says_what_happens(feature):
    how, said = tried(feature)
    assert f"| {feature.name} | {how} | {said} |\n" in PAGE, "python tests/support/features.py docs/compatibility.md"
    assert said or how == "sparse", "nothing runs dense in silence"


def test_the_page_has_nothing_else():
    rows = PAGE.partition(BEGIN)[2].partition(END)[0]
    assert rows.strip().count("\n") == len(FEATURES) + 1 and put(PAGE, rows.strip("\n") + "\n") == PAGE


def test_each_step_is_told_though_weights_are_made_anew_at_each_call():
    pipe = flux()
    sequential(pipe)
    with pytest.warns(ras_compile.RASWarning, match="runs dense"), ras_compile.attach(pipe, **OPTIONS) as handle:
        draw_flux(pipe)
        assert kinds(ras_compile.trace(handle)) == "dddddd"
        assert str(handle.summary()).startswith("6 steps")


def test_what_breaks_one_model_is_nothing_to_another_of_its_class():
    """Dynamo passes over the code of a function that it could not capture, whatever module it belonged to."""
    torch._dynamo.reset()
    broken, pipe, plain = flux(), flux(), flux()
    first_block_cache(broken)
    with pytest.warns(ras_compile.RASWarning, match="runs dense"), ras_compile.attach(broken, **OPTIONS):
        draw_flux(broken)
    hooked(pipe)
    with ras_compile.attach(pipe, **OPTIONS) as handle:
        picture = draw_flux(pipe)
        assert "s" in kinds(ras_compile.trace(handle))
    assert torch.allclose(picture, draw_flux(plain), atol=1e-4)


def test_weights_stay_small_and_hooks_come_back():
    pipe = flux()
    casting(pipe)
    layers = [layer for layer in pipe.transformer.modules() if hasattr(layer, "_diffusers_hook")]
    before = [layer.forward for layer in layers if "forward" in vars(layer)]
    assert len(before) > 5
    with ras_compile.attach(pipe, **OPTIONS):
        draw_flux(pipe)
        small = [layer.weight.dtype for layer in layers if isinstance(layer, nn.Linear)]
        assert set(small) == {torch.float8_e4m3fn}
    assert [layer.forward for layer in layers if "forward" in vars(layer)] == before


def test_a_layer_that_casts_its_weights_may_be_traced():
    pipe = flux()
    casting(pipe)
    hooked = [layer for layer in pipe.transformer.modules() if has_hooks(layer)]
    kept = cast_in_graph(pipe.transformer)
    assert {layer for layer, _ in kept} == set(hooked) and not any(map(has_hooks, hooked))
    cast_by_hooks(kept)
    assert all(map(has_hooks, hooked))
