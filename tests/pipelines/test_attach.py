"""attach: diffusers' own pipelines, with tiny random models and a backend that only notes what it is asked to do."""

import copy
import dataclasses
import gc
import inspect
import warnings

import diffusers
import pytest
import torch
from spy import spy

import ras_compile
from ras_compile import attach as attach_function
from ras_compile.config import RUNTIME_OPTIONS
from ras_compile.errors import RASWarning
from ras_compile.sampling.state import TransformerState

# most tests tell what the warm-up does from what an error reset does
EIGHT = {"reset_interval": 8, "reset_from": "start", "sample_ratio": 0.5, "ratio_schedule": "constant"}
DEFAULT = "dddd" + "ssssssss" + "d" + "sssssss" + "d" + "sssssss"  # 28 steps


@pytest.fixture(autouse=True)
def spied(monkeypatch):
    monkeypatch.setattr(inspect.getmodule(attach_function), "ras", spy)


def sd3(**scheduler):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


EMBEDS = {
    "prompt_embeds": torch.randn(1, 3, 16),
    "pooled_prompt_embeds": torch.randn(1, 8),
    "negative_prompt_embeds": torch.randn(1, 3, 16),
    "negative_pooled_prompt_embeds": torch.randn(1, 8),
}


def draw(pipe, steps=28, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {**EMBEDS, "height": 64, "width": 64, "output_type": "latent", "generator": generator, **options}
    return pipe(num_inference_steps=steps, **options).images


@torch.no_grad()
def by_hand(pipe, time):
    pipe.transformer(
        hidden_states=torch.randn(1, 4, 8, 8),
        timestep=time.expand(1),
        encoder_hidden_states=EMBEDS["prompt_embeds"],
        pooled_projections=EMBEDS["pooled_prompt_embeds"],
    )


def kinds(handle, transformer=None):
    records = ras_compile.trace(handle)
    return "".join(record.kind[0] for record in records if transformer in (None, record.transformer))


def test_a_pipeline_is_followed():
    pipe = sd3()
    expected = draw(pipe)
    with ras_compile.attach(pipe, **EIGHT) as handle:
        pictures = draw(pipe)
        assert kinds(handle) == DEFAULT
        records = ras_compile.trace(handle)
        assert [record.step for record in records] == list(range(28))
        assert {record.transformer for record in records} == {"transformer"}
        draw(pipe, steps=6)
        assert kinds(handle) == "ddddss"
    torch.testing.assert_close(pictures, expected)


def test_no_garbage_is_collected_while_the_first_call_is_captured(monkeypatch):
    collects = []

    def noting(*given, **options):
        collects.append(gc.isenabled())
        run = spy(*given, **options)
        return lambda *values: (collects.append(gc.isenabled()), run(*values))[1]

    monkeypatch.setattr(inspect.getmodule(attach_function), "ras", noting)
    pipe = sd3()
    with ras_compile.attach(pipe, **EIGHT):
        draw(pipe, steps=3)
    assert collects == [False, False, True, True] and gc.isenabled()


def test_steps_are_told_without_reading_the_timestep(monkeypatch):
    def refuse(*call):
        raise AssertionError("read a timestep")

    monkeypatch.setattr(inspect.getmodule(TransformerState), "read_call", refuse)
    pipe = sd3()
    with ras_compile.attach(pipe, **EIGHT) as handle:
        draw(pipe, steps=6)
        assert kinds(handle) == "ddddss"


def test_interrupt_and_exceptions():
    pipe = sd3()

    def stop(pipe, step, time, tensors):
        pipe._interrupt = step >= 8
        return {}

    def fail(pipe, step, time, tensors):
        if step == 8:
            raise KeyboardInterrupt
        return {}

    with ras_compile.attach(pipe, **EIGHT) as handle:
        draw(pipe, callback_on_step_end=stop)
        assert kinds(handle) == DEFAULT[:9]
        draw(pipe, steps=6)
        assert kinds(handle) == "ddddss"
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=fail)
        draw(pipe, steps=7)
        assert kinds(handle) == "ddddsss"


@pytest.mark.parametrize("context", ["fresh", "frozen"])
def test_a_callback_that_replaces_the_prompt(context):
    pipe = sd3()
    other = torch.randn(2, 3, 16)

    def replace(pipe, step, time, tensors):
        return {"prompt_embeds": other} if step == 5 else {}

    with ras_compile.attach(pipe, context=context, **EIGHT) as handle:
        draw(pipe, steps=9, callback_on_step_end=replace)
        assert kinds(handle) == "ddddss" + "d" + "ss"


@pytest.mark.parametrize(("how", "expected"), [("another", "sd"), ("written", "ds"), ("always", "ss")])
def test_a_callback_that_replaces_the_latent(how, expected):
    """What inactive tokens hold is another latent's: a dense step, at once or, where the old one lives on, a step late."""
    pipe = sd3()

    def replace(pipe, step, time, tensors):
        if how == "always":
            return {"latents": tensors["latents"] + 1}
        if step == 5 and how == "written":
            tensors["latents"].add_(1)
        return {"latents": tensors["latents"] + 1} if step == 5 and how == "another" else {}

    with ras_compile.attach(pipe, **EIGHT) as handle:
        draw(pipe, steps=10, callback_on_step_end=replace)
        assert kinds(handle) == "ddddss" + expected + "ss"


def test_a_pipeline_with_a_scheduler_of_its_own_is_not_taken_for_this_one():
    pipe = sd3()
    second = diffusers.StableDiffusion3Pipeline(**{**pipe.components, "scheduler": sd3().scheduler})
    with ras_compile.attach(pipe, **EIGHT) as handle:
        draw(pipe, steps=8)
        draw(second, steps=7)
        assert kinds(handle) == "ddddsss"


def test_skip_layer_guidance_is_a_branch_of_its_own():
    pipe = sd3()
    options = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.9}
    with ras_compile.attach(pipe, **EIGHT) as handle:
        draw(pipe, steps=10, **options)
        records = ras_compile.trace(handle)
    main = "".join(record.kind[0] for record in records if record.branch == "0")
    skip = "".join(record.kind[0] for record in records if record.branch == "1")
    assert main == "dddd" + "s" * 6 and skip == "d" + "s" * (len(skip) - 1) and len(skip) == 5


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_swapped_scheduler(scheduler):
    pipe = sd3()
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "UniPC" in scheduler else {}
    with ras_compile.attach(pipe, reset_interval=None) as handle:
        draw(pipe, steps=6)
        pipe.scheduler = getattr(diffusers, scheduler)(**options)
        draw(pipe, steps=6)
        calls = len(pipe.scheduler.timesteps)
        assert kinds(handle) == "dddd" + "s" * (calls - 4)


def test_image_to_image_starts_late():
    pipe = sd3()
    with ras_compile.attach(pipe, **EIGHT) as handle:
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, shift_factor=0.0)
        second = diffusers.StableDiffusion3Img2ImgPipeline(**{**pipe.components, "vae": vae})
        image = torch.rand(1, 3, 8, 8)
        second.set_progress_bar_config(disable=True)
        second(image=image, height=8, width=8, strength=0.5, num_inference_steps=20, output_type="latent", **EMBEDS)
        assert kinds(handle) == "dddd" + "s" * 6


def wan(boundary=0.5):
    torch.manual_seed(0)
    shape = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 1,
    }
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=diffusers.WanTransformer3DModel(**shape),
        transformer_2=diffusers.WanTransformer3DModel(**shape),
        boundary_ratio=boundary,
    )


def draw_video(pipe, steps):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=torch.randn(1, 3, 16),
        negative_prompt_embeds=torch.randn(1, 3, 16),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        output_type="latent",
        guidance_scale=3.0,
        guidance_scale_2=3.0,
    ).frames


def test_two_transformers_warm_up_apart_and_name_their_branches():
    pipe = wan()
    with ras_compile.attach(pipe, **EIGHT) as handle:
        assert len(handle.transformers) == 2
        draw_video(pipe, 20)
        records = ras_compile.trace(handle)
    assert {record.branch for record in records} == {"cond", "uncond"}
    for name in ("transformer", "transformer_2"):
        for branch in ("cond", "uncond"):
            told = "".join(r.kind[0] for r in records if r.transformer == name and r.branch == branch)
            assert told.startswith("dddds") and told.count("d") <= 5, (name, told)
    steps = [record.step for record in records if record.branch == "cond"]
    assert steps == list(range(20))


@pytest.mark.parametrize("make", [sd3, lambda: wan()])
def test_detach_restores_everything(make):
    pipe = make()
    transformer, scheduler = pipe.transformer, type(pipe.scheduler)
    state = set(vars(transformer)) - {"_compiled_call_impl"}
    handle = ras_compile.attach(pipe, sample_ratio=0.25)
    assert handle.config == ras_compile.RASConfig(sample_ratio=0.25)
    assert pipe.transformer is transformer and isinstance(pipe.scheduler, scheduler)
    handle.detach()
    handle.detach()
    assert transformer._compiled_call_impl is None and type(pipe.scheduler) is scheduler
    assert set(vars(transformer)) - {"_compiled_call_impl"} == state and handle.transformers == []
    ras_compile.attach(pipe).detach()


def test_runtime_options_change_from_the_next_generation_on(monkeypatch):
    graphs = []

    def counting(graph, *args, **kwargs):
        graphs.append(graph)
        return spy(graph, *args, **kwargs)

    monkeypatch.setattr(inspect.getmodule(attach_function), "ras", counting)
    pipe = sd3()

    def configure(pipe, step, time, tensors):
        if step == 4:
            handle.configure(sample_ratio=0.25, warmup_steps=2, reset_steps=[5], metric="l2norm")
        return {}

    with ras_compile.attach(pipe, **EIGHT) as handle:
        draw(pipe, steps=7, callback_on_step_end=configure)
        assert kinds(handle) == "ddddsss" and ras_compile.trace(handle)[-1].active == 32
        draw(pipe, steps=7)
        assert kinds(handle) == "ddsssds" and ras_compile.trace(handle)[-1].active == 16
        handle.configure(warmup_steps=3)
        assert handle.config == ras_compile.RASConfig(
            sample_ratio=0.25, warmup_steps=3, reset_steps=[5], metric="l2norm"
        )
        draw(pipe, steps=7)
        assert kinds(handle) == "dddssds"
    assert len(graphs) == 1


def test_an_option_of_the_programs_cannot_be_configured():
    with ras_compile.attach(sd3()) as handle:
        runtime = {"sample_ratio", "warmup_steps", "focus", "selector"}
        for name in {option.name for option in dataclasses.fields(handle.config)} - set(RUNTIME_OPTIONS):
            with pytest.raises(ValueError, match=rf"option {name} changes what is compiled.*sample_ratio") as error:
                handle.configure(warmup_steps=1, **{name: getattr(handle.config, name)})
            assert all(option in str(error.value) for option in runtime)
        with pytest.raises(ValueError, match="Did you mean 'warmup_steps'"):
            handle.configure(warm_up_steps=1)
        with pytest.raises(ValueError, match="sample_ratio=2"):
            handle.configure(sample_ratio=2)
        assert handle.config == ras_compile.RASConfig()


def test_what_cannot_be_attached_is_refused():
    pipe = sd3()
    with pytest.raises(ValueError, match="sample_ratio"):
        ras_compile.attach(pipe, sampleratio=0.5)
    with pytest.raises(ValueError, match="Did you mean 'sample_ratio'"):  # a part of the name is near enough
        ras_compile.attach(pipe, ratio=0.5)
    with ras_compile.attach(pipe) as handle, pytest.raises(ValueError, match="attached already.*configure"):
        ras_compile.attach(pipe)
    with pytest.raises(ValueError, match="detached"):
        handle.configure(sample_ratio=0.5)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="compiled already; leave torch.compile out"):
        ras_compile.attach(pipe)

    class Nothing:
        scheduler = None

    with pytest.raises(ValueError, match="no transformer"):
        ras_compile.attach(Nothing())


def test_a_call_past_the_backend_is_told_once():
    pipe = sd3()
    with ras_compile.attach(pipe), torch.compiler.set_stance("force_eager"):
        with pytest.warns(RASWarning, match="SD3Transformer2DModel ran uncompiled"):
            draw(pipe, steps=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RASWarning)
            draw(pipe, steps=2)


def test_a_picture_past_the_backend_is_not_told_as_the_one_before():
    pipe = sd3()
    with ras_compile.attach(pipe, inner_backend="eager") as handle:
        draw(pipe, steps=3)
        assert len(handle.summary().steps) == 3
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RASWarning)
            draw(pipe, steps=2)
        told = handle.summary()
        assert not told.steps and told.passed == 2 and str(told).startswith("no step of this picture is known")
        assert "2 calls of a transformer ran past the backend" in str(told)
        draw(pipe, steps=3)
        assert len(handle.summary().steps) == 3 and "past the backend" not in str(handle)


def test_an_inner_backend_that_is_none_is_said_by_attach():
    with pytest.raises(ValueError, match=r"inner_backend='inducter' is no backend \(did you mean 'inductor'\?\)"):
        ras_compile.attach(sd3(), inner_backend="inducter")


def test_another_transformer_in_the_place_of_the_attached_one_is_told():
    pipe, other = sd3(), sd3().transformer
    with ras_compile.attach(pipe) as handle:
        pipe.transformer = other
        with pytest.warns(
            RASWarning, match=r"StableDiffusion3Pipeline.transformer is not the module that was attached"
        ):
            draw(pipe, steps=2)
        assert "another module took the place of the attached transformer" in str(handle)


def test_a_loop_that_leaves_the_scheduler_alone_runs_dense():
    pipe = sd3()
    pipe.scheduler.set_timesteps(28)
    with ras_compile.attach(pipe, **EIGHT) as handle, pytest.warns(RASWarning, match="not the attached scheduler's"):
        for time in pipe.scheduler.timesteps:
            by_hand(pipe, time)
        assert "s" not in kinds(handle)


def test_generation_rules_over_the_scheduler():
    pipe = sd3()
    pipe.scheduler.set_timesteps(28)
    with ras_compile.attach(pipe, **EIGHT) as handle, ras_compile.generation() as gen:
        for time in pipe.scheduler.timesteps[:6]:
            gen.step()
            by_hand(pipe, time)
        assert kinds(handle) == "ddddss"


def test_a_deep_copy_of_the_transformer_is_free():
    pipe = wan()
    with ras_compile.attach(pipe):
        twin = copy.deepcopy(pipe.transformer)
        assert twin._compiled_call_impl is None
        with twin.cache_context("cond"):
            pass
        assert twin.cache_context.__self__ is twin


def test_linear_ratio_knows_the_number_of_steps():
    pipe = sd3()
    with ras_compile.attach(pipe, ratio_schedule="linear") as handle:
        draw(pipe, steps=28)
        counts = [record.active for record in ras_compile.trace(handle) if record.kind == "sparse"]
    assert counts == sorted(counts, reverse=True) and 1 < len(set(counts)) <= 4


def test_four_steps_with_four_to_warm_up_is_told():
    pipe = sd3()
    with ras_compile.attach(pipe), pytest.warns(RASWarning, match="none of the 4 steps"):
        draw(pipe, steps=4)


def test_resets_beyond_the_run_are_refused_unless_it_starts_late():
    pipe = sd3()
    with ras_compile.attach(pipe, reset_steps=[5, 9]) as handle:
        with pytest.raises(ValueError, match=r"reset_steps=\[5, 9\]: this run has 8 steps, from 0 to 7"):
            draw(pipe, steps=8)
        draw(pipe, steps=10)
        assert kinds(handle) == "ddddsdsssd"
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, shift_factor=0.0)
        second = diffusers.StableDiffusion3Img2ImgPipeline(**{**pipe.components, "vae": vae})
        second.set_progress_bar_config(disable=True)
        options = {"image": torch.rand(1, 3, 8, 8), "height": 8, "width": 8, "output_type": "latent", **EMBEDS}
        with pytest.warns(RASWarning, match=r"starts late and has 8 steps, so reset_steps \[9\]"):
            second(strength=0.5, num_inference_steps=16, **options)
        assert kinds(handle) == "ddddsdss"
