"""Pipelines whose transformer is compiled and nothing more: the step, the branch and the generation are inferred."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from contract import error
from pipelines import (
    EAGER,
    draw_flux,
    draw_qwen,
    draw_sd3,
    flux,
    flux_transformer,
    kinds,
    normal,
    qwen,
    sd3,
    seeded,
    vae,
)

import ras_compile

TRUE = {
    "true_cfg_scale": 2.0,
    "negative_prompt_embeds": normal(1, 3, 16, seed=3),
    "negative_pooled_prompt_embeds": normal(1, 8, seed=4),
}
SKIP = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.9}


@pytest.mark.parametrize(
    ("make", "draw", "expected"),
    [
        (flux, lambda pipe: draw_flux(pipe, steps=5, **TRUE), "dd" * 2 + "ss" * 3),
        (qwen, lambda pipe: draw_qwen(pipe, steps=5, negative=5), "dd" * 2 + "ss" * 3),
        # two evaluations at one time, of which nobody says that they are two steps
        (
            lambda: sd3(scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
            lambda pipe: draw_sd3(pipe, steps=5),
            "ddd" + "s" * 6,
        ),
    ],
    ids=["two calls", "two lengths", "Heun"],
)
def test_a_compiled_transformer_in_a_pipeline(make, draw, expected):
    """All tokens give the dense picture, half of them the one that `attach` gives too where the steps are the same."""
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    module, half = pipe.transformer, None
    for ratio in (1.0, 0.5):
        torch._dynamo.reset()
        pipe.transformer = torch.compile(module, backend="ras", options={**EAGER, "sample_ratio": ratio})
        draw(pipe)
        half = draw(pipe)  # the second picture: by now nothing is new to it
        assert kinds(ras_compile.trace(pipe.transformer)) == expected
        if ratio == 1.0:
            assert error([half], [plain]) < 1e-4
    assert error([half], [plain]) > 1e-4
    if "Heun" in type(pipe.scheduler).__name__:  # a dense step more than `attach` makes of it
        return
    pipe.transformer = module
    torch._dynamo.reset()
    with ras_compile.attach(pipe, **EAGER, sample_ratio=0.5):
        draw(pipe)
        assert error([draw(pipe)], [half]) < 1e-4


def test_a_branch_that_reads_another_latent_runs_dense_and_says_so():
    """Skip-layer guidance calls with half of the batch, a latent of its own: only `attach` knows that it is one step."""
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    plain = draw_sd3(pipe, steps=6, **SKIP)
    pipe.transformer = torch.compile(pipe.transformer, backend="ras", options={**EAGER, "sample_ratio": 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert error([draw_sd3(pipe, steps=6, **SKIP)], [plain]) < 1e-4
    (told,) = [str(item.message) for item in caught if issubclass(item.category, ras_compile.RASWarning)]
    assert "all run dense" in told and "attach" in told


def own(pipe, kind=None):
    """A pipeline with the same parts and a scheduler of its own."""
    parts = {**pipe.components, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return (kind or type(pipe))(**parts)


OTHER = {"latents": normal(1, 24, 16, seed=77), "prompt_embeds": normal(1, 3, 16, seed=55)}


def test_a_scheduler_of_its_own_beside_a_pipeline_that_never_ran():
    """An attached scheduler has timesteps before any run: those of its training."""
    pipe = flux()
    with ras_compile.attach(pipe, **EAGER) as handle:
        draw_flux(own(pipe), steps=7)
        assert kinds(ras_compile.trace(handle)) == "dd" + "s" * 5


@pytest.mark.parametrize(("make", "draw", "calls"), [(flux, draw_flux, 1), (qwen, draw_qwen, 2)], ids=["Flux", "Qwen"])
def test_after_an_interrupted_picture(make, draw, calls):
    """The scheduler that was left stands at a sparse step, whose branches have the names of the present one's."""
    pipe = make()
    other = own(pipe)
    dense = draw(other, steps=4, **OTHER)

    def stop(pipe, step, time, tensors):
        pipe._interrupt = step == 5
        return {}

    with ras_compile.attach(pipe, **{**EAGER, "warmup_steps": 4}) as handle:
        left = draw(pipe, steps=10, callback_on_step_end=stop)
        assert kinds(ras_compile.trace(handle)) == "d" * 4 * calls + "ss" * calls
        assert error([draw(other, steps=4, **OTHER)], [dense]) < 1e-5
        assert [record.step for record in ras_compile.trace(handle)] == sorted([*range(4)] * calls)
        draw(pipe, steps=6)  # the attached one goes on as ever
        assert kinds(ras_compile.trace(handle)) == "d" * 4 * calls + "ss" * calls
    assert left is not None


def test_reference_tokens_are_those_of_the_attached_pipeline():
    """Kontext's picture is the first half of its tokens; that of another pipeline is all of as many tokens."""
    parts = {"transformer": flux_transformer(guidance_embeds=True), "vae": vae()}
    pipe, other = flux("FluxKontextPipeline", **parts), flux("FluxPipeline", **parts)
    image = torch.rand(1, 3, 8, 12, generator=seeded())
    with ras_compile.attach(pipe, **EAGER, sample_ratio=0.5) as handle:
        draw_flux(pipe, image=image, _auto_resize=False, max_area=96)
        assert ras_compile.trace(handle)[-1].active == 12
        draw_flux(other, steps=8, height=16, width=12)
        assert ras_compile.trace(handle)[-1].active == 24 and len(ras_compile.trace(handle)) == 8
