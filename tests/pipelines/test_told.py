"""What an attached pipeline tells of its last generation."""

from __future__ import annotations

import pytest
import torch
from pipelines import EAGER, normal, sd3, seeded

import ras_compile


def draw(pipe, steps=6, **more):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=normal(1, 3, 16), pooled_prompt_embeds=normal(1, 8), negative_prompt_embeds=normal(1, 3, 16, seed=1),
        negative_pooled_prompt_embeds=normal(1, 8, seed=1), height=64, width=64, num_inference_steps=steps,
        generator=seeded(), output_type="latent", **more,
    ).images  # fmt: skip


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
