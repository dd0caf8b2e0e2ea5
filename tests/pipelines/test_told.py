"""What an attached pipeline tells of its last generation."""

from __future__ import annotations

import pytest
import torch
from pipelines import EAGER, draw_sd3, normal, sd3, seeded, vae

import ras_compile
from ras_compile.report.pictures import from_uri
from ras_compile.report.run import load, masks_of


def draw(pipe, steps=6):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**inputs(num_inference_steps=steps, generator=seeded(), output_type="latent")).images


def test_the_summary_is_of_the_last_generation_and_stays():
    pipe = sd3()
    handle = ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 0.25})
    assert "no picture yet" in str(handle)
    draw(pipe)
    draw(pipe, steps=5)
    told = handle.summary()
    assert [step.kind for step in told.steps] == ["dense"] * 2 + ["sparse"] * 3
    assert [step.active for step in told.steps] == [16] * 2 + [4] * 3 and told.grid == (4, 4)
    assert all(step.seconds > 0 for step in told.steps) and told.speedup is not None
    cost = ras_compile.explain(
        pipe.transformer,
        hidden_states=torch.randn(2, 4, 8, 8),
        timestep=torch.ones(2),
        encoder_hidden_states=torch.randn(2, 3, 16),
        pooled_projections=torch.randn(2, 8),
    ).cost
    assert told.flop_speedup == 5 / (2 + 3 * cost.flop_ratio(4))
    assert told.cache_bytes == cost.cache_bytes and len(told.splices) > 1
    assert told.steps[1].change > 0 and told.steps[3].rows.shape == (4,)
    assert str(handle).startswith("5 steps in ") and "sparse at 25 % of 16 tokens" in str(handle)
    assert handle._repr_html_().count("<span") == 5
    assert repr(handle) == f"<Handle of StableDiffusion3Pipeline: {handle}>"
    ras_compile.release(handle)
    assert [step.like for step in handle.summary().steps] == [step.like for step in told.steps]
    assert handle.summary().cache_bytes == 0
    text = str(handle)
    handle.detach()
    handle.detach()
    assert str(handle) == text


def test_a_refused_model_says_why_it_ran_dense():
    pipe = sd3()
    with ras_compile.attach(pipe, **{**EAGER, "unsupported": "dense"}) as handle:
        with pytest.warns(ras_compile.RASWarning, match="gradients"):  # a call that records gradients
            pipe.transformer(
                hidden_states=normal(1, 4, 8, 8), timestep=torch.ones(1), encoder_hidden_states=normal(1, 3, 16),
                pooled_projections=normal(1, 8),
            )  # fmt: skip
        assert str(handle).startswith("1 step: all dense")
        assert "not as planned: step 0 dense: gradients are being recorded" in str(handle)


def inputs(**more):
    return dict(
        prompt_embeds=normal(1, 3, 16), pooled_prompt_embeds=normal(1, 8), negative_prompt_embeds=normal(1, 3, 16, seed=1),
        negative_pooled_prompt_embeds=normal(1, 8, seed=1), height=64, width=64, **more,
    )  # fmt: skip


def test_a_pipeline_is_explained_by_one_call():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *given: calls.append(given))
    told = ras_compile.explain(
        pipe, options={"sample_ratio": 0.25, "warmup_steps": 2}, **inputs(num_inference_steps=10)
    )
    handle.remove()
    assert told.supported and told.tokens == 16 and told.num_steps == 10 and not calls
    end = str(told).splitlines()[-1]
    assert end == told.words
    assert end.startswith(
        "In a run of 10 steps, 5 compute the whole picture, and 5 compute 25 % of its 16 tokens on average"
    )
    assert f"{told.speedup(num_steps=10):.2f} times less" in end and "MiB of memory" in end


def test_an_attached_pipeline_is_explained_and_stays_attached():
    pipe = sd3()
    with ras_compile.attach(pipe, **EAGER) as handle:
        assert ras_compile.explain(pipe, **inputs()).num_steps == 28
        draw(pipe)
        assert [step.kind for step in handle.summary().steps] == ["dense"] * 2 + ["sparse"] * 4


def test_nothing_is_skipped_and_that_is_said():
    told = ras_compile.explain(sd3(), **inputs(num_inference_steps=3))
    assert told.words.startswith("Nothing is skipped: none of the 3 steps can be sparse with warmup_steps=4")


def test_what_cannot_be_explained_is_said_in_a_sentence():
    with pytest.raises(TypeError, match="or a pipeline that has a transformer, not dict"):
        ras_compile.explain({}, prompt="a red apple")


def test_a_report_shows_what_the_pipeline_returned(tmp_path):
    pipe = sd3(vae=vae())
    handle = ras_compile.attach(pipe, **EAGER)
    with pytest.raises(ras_compile.ConfigError, match="no run to report"):
        handle.report(tmp_path / "out.html")
    pipe.set_progress_bar_config(disable=True)
    given = {**inputs(num_inference_steps=4, generator=seeded()), "height": 32, "width": 32}
    drawn = pipe(**given).images[0]
    assert handle.report(tmp_path / "run.json", prompt="a red apple") == tmp_path / "run.json"
    data = load(tmp_path / "run.json")
    assert from_uri(data["picture"][0]).tobytes() == drawn.tobytes() and data["prompt"] == "a red apple"
    for place, step in enumerate(handle.summary().steps[2:], 2):
        assert masks_of(data)[place].nonzero().flatten().tolist() == step.rows.tolist()
    pipe(**given, output_type="latent")  # no picture, and not that of the run before
    handle.report(tmp_path / "run.json")
    assert load(tmp_path / "run.json")["picture"] == []
    handle.report(tmp_path / "run.json", image=drawn, dense=drawn)
    handle.detach()
    assert "postprocess" not in vars(pipe.image_processor)
    handle.report(tmp_path / "out.html", image=drawn)
    with pytest.raises(ras_compile.ConfigError, match="is no picture"):
        handle.report(tmp_path / "out.html", image=torch.zeros(1, 16, 8, 8))


def test_an_error_within_a_call_leaves_nothing_behind():
    """A hook that refuses a size, as diffusers' context parallel does: good sizes run sparse before and after it."""
    pipe, plain = sd3(), sd3()

    def refuse(block, args, given):
        assert given["hidden_states"].shape[1] % 16 == 0, "sixteen does not divide the tokens"

    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(refuse, with_kwargs=True)
    with ras_compile.attach(pipe, inner_backend="eager", sample_ratio=1.0) as handle:
        for width in (64, 48, 64, 128):
            if width == 48:
                with pytest.raises(AssertionError, match="sixteen"):
                    draw_sd3(pipe, width=width)
            else:
                assert torch.allclose(draw_sd3(pipe, width=width), draw_sd3(plain, width=width), atol=1e-5)
                assert "sparse" in [record.kind for record in ras_compile.trace(handle)], width
