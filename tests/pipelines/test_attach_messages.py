"""What a new user tries with `attach`: each mistake is answered by one sentence that says what to do."""

import copy
import pickle
import warnings

import diffusers
import pytest
import torch
from PIL import Image
from pipelines import EAGER, draw_sd3, kinds, sd3
from tiny import LATENT, TEXT, model

import ras_compile
from ras_compile import RASConfig, notices


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    notices.reset()


class Unet:
    unet, scheduler = torch.nn.Linear(1, 1), None


@pytest.mark.parametrize(
    ("pipe", "given", "text"),
    [
        (sd3, {"options": {"sample_ratio": 0.5}}, r"options by name: attach\(pipe, sample_ratio=0.5\)"),
        (sd3, {"config": {"sample_ratio": 0.5}}, r"RASConfig as its second argument, not dict"),
        (
            lambda: "sd3",
            {},
            r"loaded diffusers pipeline, not str; load it with DiffusionPipeline.from_pretrained\('sd3'\)",
        ),
        (lambda: None, {}, "loaded diffusers pipeline, not None"),
        (lambda: torch.nn.Linear(1, 1), {}, r"not Linear; a model alone is compiled by torch.compile"),
        (Unet, {}, "denoises with a UNet"),
        (lambda: diffusers.FluxPipeline, {}, r"FluxPipeline is a class: give FluxPipeline.from_pretrained\(...\)"),
        (sd3, {"config": "fast"}, r"not str; options are given by name: attach\(pipe, preset='fast'\)"),
        (
            sd3,
            {"steps": 28},
            r"steps is no option, but an argument of the pipeline: pipe\(..., num_inference_steps=...\)",
        ),
        (sd3, {"height": 64}, r"height is no option, but an argument of the pipeline: pipe\(..., height=...\)"),
        (sd3, {"preset": "Fast"}, r"not allowed \(did you mean 'fast'\?\)"),
        (sd3, {"metric": "STD"}, r"not allowed \(did you mean 'std'\?\)"),
        (sd3, {"sample_ratio": 25}, "such as 0.25 for a quarter"),
        (sd3, {"cache_budget": "2GB"}, r"a whole number of bytes, such as 2 \* 2\*\*30"),
    ],
)
def test_what_is_no_pipeline_or_no_option(pipe, given, text):
    with pytest.raises(ras_compile.ConfigError, match=text) as error:
        ras_compile.attach(pipe(), **given)
    assert "\n" not in str(error.value)


def test_a_config_is_taken_whole():
    config = RASConfig(sample_ratio=0.25, warmup_steps=2)
    for handle in (
        ras_compile.attach(sd3(), config),
        ras_compile.attach(sd3(), config=pickle.loads(pickle.dumps(config))),
    ):
        assert handle.config == config
        handle.detach()
    with ras_compile.attach(sd3(), config, warmup_steps=3) as handle:
        assert handle.config == RASConfig(sample_ratio=0.25, warmup_steps=3)


@pytest.mark.parametrize("how", ["more", "fewer"])
def test_a_config_of_another_version(how):
    config = RASConfig()
    if how == "more":
        object.__setattr__(config, "future_option", 1)
    else:
        object.__delattr__(config, "kv_cache")
    with pytest.raises(ras_compile.ConfigError, match=r"another version of ras_compile \((future_option|kv_cache)\)"):
        ras_compile.attach(sd3(), config)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(copied):
    """Its copy would say that a plain pipeline is attached; a copy of the pipeline alone is a plain one, and may be made."""
    pipe = sd3()
    with ras_compile.attach(pipe, **EAGER) as handle:
        with pytest.raises(
            TypeError, match="cannot be copied or pickled; copy the pipeline and attach to the copy"
        ) as error:
            copied(handle)
        assert "\n" not in str(error.value)
        with ras_compile.attach(copy.deepcopy(pipe), **EAGER) as other:
            assert other.transformers[0] is not handle.transformers[0]


def test_a_config_in_the_place_of_the_options():
    for given in (RASConfig(sample_ratio=0.25), [("sample_ratio", 0.25)]):
        with pytest.raises(
            ras_compile.ConfigError, match="takes options as a dict, not (RASConfig|list): options="
        ) as error:
            torch.compile(model(), backend="ras", options=given)(LATENT, torch.ones(2), TEXT)
        assert "\n" not in str(error.value)


def test_a_trace_of_the_pipeline_itself():
    with pytest.raises(TypeError, match=r"not StableDiffusion3Pipeline itself; keep what attach\(pipe\) returns"):
        ras_compile.trace(sd3())


def test_a_module_that_is_compiled_once_more():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    with ras_compile.attach(pipe, **EAGER):
        pipe.transformer = torch.compile(pipe.transformer, backend="ras", options=EAGER)
        with pytest.warns(ras_compile.RASWarning, match="was compiled once more after attach"):
            draw_sd3(pipe)


def test_a_module_that_is_compiled_in_place_once_more():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    with ras_compile.attach(pipe, **EAGER):
        pipe.transformer.compile(backend="eager")
        with pytest.warns(ras_compile.RASWarning, match="was compiled once more after attach"):
            draw_sd3(pipe)


def test_a_pipeline_that_is_compiled_whole():
    """One sentence, for all the parts that Dynamo makes of it."""
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    compiled = torch.compile(pipe, backend="ras", options={"inner_backend": "eager"})
    with pytest.warns(ras_compile.RASWarning, match="a whole StableDiffusion3Pipeline") as told:
        draw_sd3(compiled, steps=2)
    assert len([item for item in told if issubclass(item.category, ras_compile.RASWarning)]) == 1


@pytest.mark.parametrize(
    ("mistake", "kind", "text"),
    [
        (lambda handle: handle("a cat"), TypeError, r"is not the pipeline, .* call pipe\(...\)"),
        (lambda handle: handle.to("cpu"), AttributeError, "it is the pipeline's, .*: pipe.to"),
        (lambda handle: handle.trace(), AttributeError, r"it is a function: ras_compile.trace\(handle\)"),
        (lambda handle: handle.explain(), AttributeError, r"it is a function: ras_compile.explain\(pipe, ...\)"),
        (lambda handle: ras_compile.summary(handle), TypeError, r"write handle.summary\(...\), not"),
        (lambda handle: ras_compile.report(handle, "run.html"), TypeError, r"write handle.report\(...\), not"),
        (lambda handle: handle.warmup_steps, AttributeError, "it is an option: handle.config.warmup_steps"),
        (lambda handle: handle.sumary(), AttributeError, "no attribute 'sumary'$"),  # Python names the nearest
        (lambda handle: setattr(handle, "sample_ratio", 0.3), AttributeError, r"handle.configure\(sample_ratio=0.3\)"),
        (lambda handle: setattr(handle, "config", None), AttributeError, r"handle.configure\(sample_ratio=0.25\)"),
        (
            lambda handle: setattr(handle.config, "sample_ratio", 0.3),
            AttributeError,
            r"handle.configure\(sample_ratio=0.3\)",
        ),
        (lambda handle: handle.report(Image.new("RGB", (8, 8))), ras_compile.ConfigError, "a path, such as 'run.html'"),
        (lambda handle: ras_compile.detach(handle), AttributeError, r"method of what .* returns: handle.detach\(\)"),
        (lambda handle: ras_compile.compile(handle), AttributeError, "no attribute 'compile'$"),
    ],
)
def test_what_is_looked_for_in_a_handle(mistake, kind, text):
    with ras_compile.attach(sd3(), **EAGER) as handle, pytest.raises(kind, match=text) as error:
        mistake(handle)
    assert "\n" not in str(error.value)


def test_a_speedup_without_sparse_steps():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    text = "none of the 4 steps can be sparse with warmup_steps=4"
    with ras_compile.attach(pipe, speedup=2, inner_backend="eager"), pytest.raises(ras_compile.ConfigError, match=text):
        draw_sd3(pipe, steps=4)


def test_dynamic_is_no_option_and_a_boolean():
    pipe = sd3()
    with pytest.raises(ras_compile.ConfigError, match="dynamic takes None, True or False, not 'yes'"):
        ras_compile.attach(pipe, dynamic="yes")
    with (
        ras_compile.attach(pipe, **EAGER) as handle,
        pytest.raises(ras_compile.ConfigError, match="dynamic is no option.*detach"),
    ):
        handle.configure(dynamic=True)


def test_a_warning_points_to_the_users_line():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    with ras_compile.attach(pipe, **{**EAGER, "unsupported": "dense", "warmup_steps": 6}) as handle:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw_sd3(pipe)
        assert kinds(ras_compile.trace(handle)) == "d" * 6
    (told,) = [item for item in caught if issubclass(item.category, ras_compile.RASWarning)]
    assert told.filename.endswith(("pipelines.py", "test_attach_messages.py"))


def test_a_compilation_is_told(caplog):
    compiled = torch.compile(model(), backend="ras", options={**EAGER, "inner_backend": "aot_eager"})
    with torch.no_grad(), caplog.at_level("INFO", "ras_compile"):
        compiled(LATENT, torch.full((2,), 1.0), TEXT)
    told = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("compiling a program of") for text in told)
    assert any(text.startswith("compiled it in") and text.endswith(" s") for text in told)


def test_a_solver_of_second_order_is_advised_once_and_never_taken(caplog):
    notices.reset()
    for scheduler, told in (
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 1),  # diffusers names no other, and one may be taken
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            1,
        ),  # pipelines give it noise levels of theirs
        (diffusers.DPMSolverMultistepScheduler(), 1),
        (diffusers.DDIMScheduler(), 2),
        (diffusers.DDIMScheduler(), 2),
    ):
        pipe = sd3()
        pipe.scheduler, kind = scheduler, type(scheduler)
        with caplog.at_level("INFO", logger="ras_compile"), ras_compile.attach(pipe, **EAGER):
            assert isinstance(pipe.scheduler, kind)
        advice = [record.getMessage() for record in caplog.records if "needs fewer steps" in record.getMessage()]
        assert len(advice) == told
    assert "pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)" in advice[1]
    pipe = sd3()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    exec(advice[0].partition("here: ")[2], {"pipe": pipe, "diffusers": diffusers})
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler and pipe.scheduler.config.flow_shift == 3.0
    assert draw_sd3(pipe, 4).isfinite().all()
