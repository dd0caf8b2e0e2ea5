"""The block of a modular pipeline, in diffusers' own Stable Diffusion 3 with the model that this repository ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusion3Pipeline
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks

import ras_compile

ROOT = Path(__file__).parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def block():
    spec = importlib.util.spec_from_file_location("diffusers_modular", ROOT / "integrations" / "diffusers_modular.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RegionAdaptiveStep


@pytest.fixture
def pipe(block):
    """The shipped model in modular form, with the block in front."""
    loaded = StableDiffusion3Pipeline.from_pretrained(ROOT / "examples" / "emoji" / "pipeline", local_files_only=True)
    blocks = StableDiffusion3AutoBlocks()
    blocks.sub_blocks.insert("region_adaptive", block({"inner_backend": "eager"}), 0)
    pipe = blocks.init_pipeline()
    pipe.update_components(**loaded.components, guider=ClassifierFreeGuidance(guidance_scale=4.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **given):
    noise = torch.Generator().manual_seed(0)
    return pipe(
        prompt="a red apple",
        negative_prompt="",
        height=64,
        width=64,
        num_inference_steps=STEPS,
        generator=noise,
        **given,
    )


def kinds(handle):
    by_step = {}
    for record in ras_compile.trace(handle):
        by_step.setdefault(record.step, set()).add(record.kind)
    return ["".join(kinds) for _, kinds in sorted(by_step.items())]


def test_it_samples_region_adaptively(pipe):
    state = draw(pipe, ras_preset="fast")
    handle = state.get("ras_handle")
    assert kinds(handle) == ["dense"] * 4 + ["sparse"] * 4
    assert state.get("images")[0].size == (64, 64)
    again = draw(pipe, ras_options={"warmup_steps": 6})
    assert again.get("ras_handle") is handle and kinds(handle) == ["dense"] * 6 + ["sparse"] * 2
    handle.detach()
    other = draw(pipe).get("ras_handle")  # attaches anew
    assert other is not handle and other.transformers
    other.detach()


def test_what_changes_the_compilation_is_refused_in_a_call(pipe):
    with pytest.raises(ras_compile.ConfigError, match="changes what is compiled"):
        draw(pipe, ras_options={"kv_cache": False})


def test_it_describes_itself(block):
    told = block().doc
    assert "ras_preset" in told and "ras_handle" in told
