"""Calls that are no sampling, on an attached pipeline: callbacks, losses between pictures, other loops on the same model."""

import copy
from functools import partial

import diffusers
import pytest
import torch
from contract import error
from pipelines import EAGER, draw_sd3, draw_wan, kinds, normal, sd3, wan

import ras_compile
from ras_compile import notices

pytestmark = pytest.mark.filterwarnings("ignore:ras_compile. every transformer call:ras_compile.RASWarning")
OPTIONS = {**EAGER, "sample_ratio": 0.5}
TEXT = {"encoder_hidden_states": normal(1, 3, 16, seed=1), "pooled_projections": normal(1, 8, seed=2)}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    notices.reset()


def look(pipe, twin, seed, time, text=TEXT, latent=None):
    """The answer for one latent at one time is the model's own."""
    given = {
        "hidden_states": normal(1, 4, 8, 8, seed=seed) if latent is None else latent,
        "timestep": torch.tensor([time]),
    }
    with torch.no_grad():
        found, wanted = (model(**given, **text, return_dict=False)[0] for model in (pipe.transformer, twin.transformer))
    assert error([found], [wanted]) < 1e-5


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_callback_that_asks_the_model(guidance, name):
    """Its answers are the model's, and the picture stays what it is without the callback, bit for bit."""
    pipe, twin = quiet(sd3(scheduler=getattr(diffusers, name)(shift=3.0))), sd3()
    text = {"encoder_hidden_states": normal(2, 3, 16, seed=1), "pooled_projections": normal(2, 8, seed=2)}

    def ask(looks, pipe, step, time, tensors):
        for n in range(looks):
            look(pipe, twin, 10 * step + n, float(time))
        if guidance > 1:  # the very prompts and batch of the pipeline's own calls
            both = {"encoder_hidden_states": pipe_text[0], "pooled_projections": pipe_text[1]}
            look(pipe, twin, 0, float(time), both, normal(2, 4, 8, 8, seed=step))
        look(pipe, twin, 0, float(time), latent=tensors["latents"])
        return {}

    pipe_text = (text["encoder_hidden_states"], text["pooled_projections"])
    with ras_compile.attach(pipe, **OPTIONS) as handle:
        alone = draw_sd3(pipe, steps=7, guidance_scale=guidance)
        expected = kinds(ras_compile.trace(handle))
        assert expected.count("s") >= 5
        for looks in (1, 3):
            asked = draw_sd3(pipe, steps=7, guidance_scale=guidance, callback_on_step_end=partial(ask, looks))
            assert torch.equal(asked, alone)
            draw_sd3(pipe, steps=7, guidance_scale=guidance)
            assert kinds(ras_compile.trace(handle)) == expected


def test_a_callback_with_the_branches_of_the_pipeline():
    """Wan names its branches, so that nothing is known of them but the name."""
    pipe, twin = quiet(wan(transformer_2=None, boundary_ratio=None)), wan(transformer_2=None, boundary_ratio=None)

    def ask(pipe, step, time, tensors):
        given = {
            "hidden_states": normal(1, 4, 2, 4, 4, seed=step),
            "timestep": time.expand(1),
            "encoder_hidden_states": normal(1, 3, 16, seed=1),
            "return_dict": False,
        }
        with torch.no_grad(), pipe.transformer.cache_context("cond"):
            found = pipe.transformer(**given)[0]
        with torch.no_grad():
            assert error([found], [twin.transformer(**given)[0]]) < 1e-5
        return {}

    with ras_compile.attach(pipe, **OPTIONS) as handle:
        alone = draw_wan(pipe)
        assert torch.equal(draw_wan(pipe, callback_on_step_end=ask), alone)
        draw_wan(pipe)
        assert kinds(ras_compile.trace(handle)) == "dd" * 2 + "ss" * 4


@pytest.mark.parametrize("stopped", [False, True])
def test_losses_and_tables_between_two_pictures(stopped):
    pipe, twin = quiet(sd3()), sd3()

    def stop(pipe, step, time, tensors):
        pipe._interrupt = stopped and step == 4
        return {}

    with ras_compile.attach(pipe, **OPTIONS) as handle:
        alone = draw_sd3(pipe)
        draw_sd3(pipe, callback_on_step_end=stop)
        clean, noise = normal(1, 4, 8, 8, seed=30), normal(1, 4, 8, 8, seed=31)
        for n, time in enumerate((900.0, 800.0, 700.0, 600.0, 500.0, 400.0)):
            look(pipe, twin, 500 + n, time)
        for time in (900.0, 750.0, 600.0, 450.0, 300.0, 150.0):
            look(pipe, twin, 0, time, latent=clean + (noise - clean) * time / 1000)
        for time in (900.0, 800.0, 700.0):
            look(pipe, twin, 0, time, latent=clean)
        assert torch.equal(draw_sd3(pipe), alone)
        assert kinds(ras_compile.trace(handle)) == "dd" + "ssss"


@pytest.mark.parametrize("warmup", [1, 2])
def test_two_schedulers_that_take_turns_on_one_model(warmup):
    """The loop of the attached one is followed; the other one's calls are not taken for it."""
    pipe, twin = quiet(sd3()), sd3()
    other, latents = copy.deepcopy(pipe.scheduler), [normal(1, 4, 8, 8, seed=n) for n in range(2)]

    with torch.no_grad(), ras_compile.attach(pipe, **{**OPTIONS, "warmup_steps": warmup}) as handle:
        pipe.scheduler.set_timesteps(8)
        other.set_timesteps(8)
        for step, time in enumerate(pipe.scheduler.timesteps):
            given = {"timestep": time.expand(1), **TEXT, "return_dict": False}
            noise = pipe.transformer(latents[0], **given)[0]
            if step < warmup:
                assert error([noise], [twin.transformer(latents[0], **given)[0]]) < 1e-5
            first = ras_compile.trace(handle)[-1]
            assert first.kind == ("dense" if step < warmup else "sparse")
            latents[0] = pipe.scheduler.step(noise, time, latents[0], return_dict=False)[0]
            found = pipe.transformer(latents[1], **given)[0]
            wanted = twin.transformer(latents[1], **given)[0]
            if step < 2:
                assert error([found], [wanted]) < 1e-5
            latents[1] = other.step(found, time, latents[1], return_dict=False)[0]


def test_pairs_of_latents_in_one_loop_keep_their_own_rows():
    """Preferences: two latents with one prompt, advanced side by side, are two branches."""
    pipe = quiet(sd3())
    with torch.no_grad(), ras_compile.attach(pipe, **{**OPTIONS, "sample_ratio": 1.0}) as handle:
        twin = sd3()
        pipe.scheduler.set_timesteps(6)
        pair = torch.cat([normal(1, 4, 8, 8, seed=n) for n in range(2)])
        for time in pipe.scheduler.timesteps:
            given = {"timestep": time.expand(1), **TEXT, "return_dict": False}
            noise = torch.cat([pipe.transformer(latent[None], **given)[0] for latent in pair])
            wanted = torch.cat([twin.transformer(latent[None], **given)[0] for latent in pair])
            assert error([noise], [wanted]) < 1e-5
            pair = pipe.scheduler.step(noise, time, pair, return_dict=False)[0]
        assert kinds(ras_compile.trace(handle)) == "dd" * 2 + "ss" * 4


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_whole_run_within_a_callback(at):
    """A preview by a pipeline of the same class and model, with a scheduler of its own: the same lines, but another loop."""
    pipe = quiet(sd3())
    other = quiet(sd3(transformer=pipe.transformer))
    drawn = []

    def preview(pipe, step, time, tensors):
        if step == at:
            drawn.append(draw_sd3(other, steps=5, prompt_embeds=normal(1, 3, 16, seed=20)))
        return {}

    with ras_compile.attach(pipe, **OPTIONS) as handle:
        previewed = draw_sd3(other, steps=5, prompt_embeds=normal(1, 3, 16, seed=20))
        alone = draw_sd3(pipe)
        for _ in range(2):
            assert torch.equal(draw_sd3(pipe, callback_on_step_end=preview), alone)
            assert torch.equal(drawn[-1], previewed)
        assert torch.equal(draw_sd3(pipe), alone)
        assert kinds(ras_compile.trace(handle)) == "dd" + "ssss"


def test_a_run_within_the_callback_of_another_pipeline():
    """The attached loop is the inner one of two that run the same lines, and then the only one."""
    pipe, outer = quiet(sd3()), quiet(sd3())

    with ras_compile.attach(pipe, **OPTIONS) as handle:
        alone = draw_sd3(pipe)

        def draw(pipe_, step, time, tensors):
            if step in (1, 2):
                assert torch.equal(draw_sd3(pipe), alone)
                assert kinds(ras_compile.trace(handle)) == "dd" + "ssss"
            return {}

        draw_sd3(outer, callback_on_step_end=draw)
        assert torch.equal(draw_sd3(pipe), alone)
        assert kinds(ras_compile.trace(handle)) == "dd" + "ssss"
