"""Guidance as pipelines do it: calls with and without names, calls that stop part-way, residuals that come and go."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch
from contract import error
from pipelines import (
    EAGER,
    draw_flux,
    draw_sd3,
    flux,
    kinds,
    normal,
    redrawn,
    sampled,
    sd3,
    seeded,
    vae,
)

import ras_compile
import ras_compile.pipelines.attach as attaching


@pytest.mark.parametrize(
    ("kind", "given", "branches"),
    [
        ("FluxPipeline", {"num_images_per_prompt": 2}, ["cond", "uncond"]),
        # names no cache context, and its latent holds a reference picture
        ("FluxKontextPipeline", {"image": normal(1, 4, 10, 6, seed=7), "max_area": 96}, ["0", "1"]),
    ],
)
def test_two_calls_a_step(kind, given, branches, monkeypatch):
    """True guidance with a negative prompt: caches of their own, and one selection."""
    pipe = flux(kind)
    given = {
        **given,
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": normal(1, 3, 16, seed=3),
        "negative_pooled_prompt_embeds": normal(1, 8, seed=4),
    }

    def draw():
        return draw_flux(pipe, steps=5, **given)

    records = sampled(pipe, draw, "dddd" + "ss" * 3)
    assert [record.branch for record in records] == branches * 5
    assert [record.active for record in records] == [24] * 4 + [12] * 6 and records[-1].rows is records[-2].rows
    torch._dynamo.reset()
    with ras_compile.attach(pipe, **EAGER, sample_ratio=0.5) as handle:
        draw()
        found = draw()
        calls = itertools.count()  # who counts the calls knows their branches: two a step
        monkeypatch.setattr(attaching, "present_branch", lambda: "ab"[next(calls) % 2])
        assert torch.equal(draw(), found)
        assert [record.branch for record in ras_compile.trace(handle)] == ["a", "b"] * 5


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16),
        cap_feat_dim=8,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=redrawn(transformer), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def test_a_branch_that_is_called_no_more():
    """Lumina 2 guides up to a share of the steps: from then on one call a step, which goes on sparse. Its time rises."""
    pipe = lumina2()
    pipe.set_progress_bar_config(disable=True)
    torch._dynamo.reset()

    def draw():
        return pipe(
            prompt_embeds=normal(1, 5, 8, seed=1), prompt_attention_mask=torch.ones(1, 5, dtype=torch.bool),
            negative_prompt_embeds=normal(1, 5, 8, seed=2), cfg_trunc_ratio=0.6, cfg_normalization=False,
            negative_prompt_attention_mask=torch.ones(1, 5, dtype=torch.bool), height=64, width=96,
            num_inference_steps=7, generator=seeded(), output_type="latent", guidance_scale=3.0,
        ).images  # fmt: skip

    plain = draw()
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0}) as handle:
        draw()  # its first call is traced, and so is on no record
        assert error([draw()], [plain]) < 1e-4
        records = ras_compile.trace(handle)
        assert kinds(records) == "dd" * 2 + "ss" * 2 + "s" * 3
        assert kinds(records, branch="0") == "dd" + "s" * 5
        handle.configure(sample_ratio=0.5)
        half = draw()
        assert [record.active for record in ras_compile.trace(handle)] == [24] * 4 + [12] * 7
    assert 1e-5 < float((half - plain).norm() / plain.norm()) < 0.7


def test_control_that_begins_and_ends_part_way():
    """Zeros while it is off: other residuals each time, on one branch. A dense step too many, never a wrong picture."""
    net = diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = sd3("StableDiffusion3ControlNetPipeline", controlnet=redrawn(net), vae=vae())
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 8, 8, generator=seeded())

    def draw():
        torch.manual_seed(0)
        window = {"control_guidance_start": 0.2, "control_guidance_end": 0.7}
        return draw_sd3(pipe, steps=12, height=8, width=8, control_image=picture, **window)

    torch._dynamo.reset()
    plain = draw()
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0}) as handle:
        assert error([draw()], [plain]) < 1e-4
        told = kinds(ras_compile.trace(handle))
        handle.configure(sample_ratio=0.5)
        half = draw()
        assert kinds(ras_compile.trace(handle)) == told
    assert told.count("s") >= 6 and told.endswith("ss"), told
    assert 1e-5 < float((half - plain).norm() / plain.norm()) < 0.7


def test_control_of_packed_tokens():
    net = diffusers.FluxControlNetModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = flux("FluxControlNetPipeline", controlnet=redrawn(net))
    picture = torch.rand(1, 3, 8, 12, generator=seeded())

    def draw():
        torch.manual_seed(0)
        return draw_flux(pipe, steps=5, control_image=picture)

    sampled(pipe, draw, "ddsss")
