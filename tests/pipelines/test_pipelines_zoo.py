"""Pipelines and schedulers of diffusers, tiny: the right steps, the dense picture with all tokens, another one with half.

What each loop does is diffusers' own code; `pipelines.sampled` says what is asked of all of them.
"""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from contract import error
from pipelines import (
    EAGER,
    draw_flux,
    draw_pixart,
    draw_qwen,
    draw_sd3,
    draw_wan,
    flux,
    kinds,
    normal,
    pixart,
    qwen,
    redrawn,
    sampled,
    sd3,
    sd3_prompt,
    sd3_transformer,
    seeded,
    vae,
    wan,
)

import ras_compile

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SPARSE_FROM_2 = "ddsss"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "dd" + "s" * 7),
        ("UniPCMultistepScheduler", FLOW, SPARSE_FROM_2),
        ("DPMSolverMultistepScheduler", FLOW, SPARSE_FROM_2),
        ("DPMSolverSinglestepScheduler", {**FLOW, "lower_order_final": True}, SPARSE_FROM_2),
    ],
)
def test_flow_schedulers(name, options, expected):
    pipe = sd3(scheduler=getattr(diffusers, name)(**options))
    sampled(pipe, lambda: draw_sd3(pipe, steps=5), expected)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("DDIMScheduler", {"clip_sample": False}, SPARSE_FROM_2),
        ("PNDMScheduler", {"skip_prk_steps": True}, SPARSE_FROM_2 + "s"),
        ("EulerDiscreteScheduler", {}, SPARSE_FROM_2),
        ("DPMSolverMultistepScheduler", {}, SPARSE_FROM_2),
        ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, SPARSE_FROM_2),
        ("UniPCMultistepScheduler", {}, SPARSE_FROM_2),
        ("HeunDiscreteScheduler", {}, "dd" + "s" * 7),
    ],
)
def test_noise_predicting_pipelines(name, options, expected):
    """PixArt: cross-attention with a mask, guidance in one batch, a learned variance."""
    pipe = pixart(getattr(diffusers, name)(**options))
    sampled(pipe, lambda: draw_pixart(pipe, steps=5), expected, bound=1.5)


def test_class_labels():
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer=redrawn(model), vae=vae(), scheduler=diffusers.DDIMScheduler())

    def draw():
        given = {"class_labels": [3, 7], "num_inference_steps": 5, "output_type": "np", "generator": seeded()}
        return torch.from_numpy(pipe(**given).images)

    sampled(pipe, draw, SPARSE_FROM_2)


def test_image_to_image_starts_late():
    pipe = sd3(vae=vae())
    second = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    second.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 8, 8, generator=seeded())
    sampled(pipe, lambda: draw_sd3(second, steps=8, image=image, strength=0.75, height=8, width=8), SPARSE_FROM_2 + "s")


def test_inpainting_spends_nothing_on_what_is_known():
    pipe = sd3("StableDiffusion3InpaintPipeline", vae=vae(16), transformer=sd3_transformer(16))
    mask = torch.ones(1, 1, 8, 8)
    mask[..., :4, :] = 0  # the upper half is known: tokens 0 to 7

    def draw():
        return draw_sd3(
            pipe, steps=6, image=torch.rand(1, 3, 8, 8, generator=seeded()), mask_image=mask, strength=1.0, height=8,
            width=8,
        )  # fmt: skip

    records = sampled(pipe, draw, "ddssss")
    for record in records[2:]:
        assert record.rows.min() >= 8


def test_inpainting_of_packed_tokens():
    """Late, too: what is known has no active token, as long as there is enough of the rest."""
    pipe = flux("FluxInpaintPipeline")
    mask = torch.ones(1, 1, 8, 12)
    mask[..., :4, :] = 0  # tokens 0 to 11 of 24
    given = {"image": torch.rand(1, 3, 8, 12, generator=seeded()), "mask_image": mask, "strength": 0.75}
    records = sampled(pipe, lambda: draw_flux(pipe, steps=8, **given), "ddssss")
    assert all(record.rows.min() >= 12 for record in records[2:])


def test_control_residuals():
    net = diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = sd3("StableDiffusion3ControlNetPipeline", controlnet=redrawn(net), vae=vae())
    picture = torch.rand(1, 3, 8, 8, generator=seeded())

    def draw():
        torch.manual_seed(0)  # the encoding of the control picture is drawn from the global generator
        return draw_sd3(pipe, steps=5, height=8, width=8, control_image=picture)

    sampled(pipe, draw, SPARSE_FROM_2)


def test_skip_layer_guidance():
    pipe = sd3()
    options = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.9}
    records = sampled(pipe, lambda: draw_sd3(pipe, steps=5, **options), "d" + "dd" + "ss" * 3)
    assert kinds(records, branch="1") == "dsss"


def test_perturbed_attention_is_three_branches_in_a_batch():
    pipe = sd3("StableDiffusion3PAGPipeline", pag_applied_layers=["blocks.1"])
    records = sampled(pipe, lambda: draw_sd3(pipe, steps=5, pag_scale=2.0), SPARSE_FROM_2)
    assert records[-1].rows.shape == (1, 8)  # its attention takes the batch apart: all three share one choice of rows


def test_guidance_that_is_turned_off_part_way():
    """Half of the batch from then on: another graph, which begins dense and then goes on sparse."""
    pipe = sd3()
    names = ["prompt_embeds", "pooled_prompt_embeds"]

    def turn_off(pipe, step, time, tensors):
        if step != 3:
            return {}
        pipe._guidance_scale = 1.0
        return {name: tensors[name].chunk(2)[1] for name in names}

    options = {"callback_on_step_end": turn_off, "callback_on_step_end_tensor_inputs": names}
    sampled(pipe, lambda: draw_sd3(pipe, steps=7, **options), "ddss" + "dss")


def test_several_prompts_and_sizes():
    pipe = sd3()
    many = {"width": 96, **sd3_prompt(2)}
    records = sampled(pipe, lambda: draw_sd3(pipe, steps=5, **many), SPARSE_FROM_2)
    rows = records[-1].rows
    assert rows.shape == (4, 12) and torch.equal(rows[:2], rows[2:])
    assert len({tuple(row.tolist()) for row in rows}) > 1
    sizes = [(64, 64), (64, 96), (96, 64), (64, 64)]  # in one process, and back
    plain = {size: draw_sd3(pipe, steps=4, height=size[0], width=size[1]) for size in sizes}
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0}) as handle:
        for ratio, bound in ((1.0, 1e-4), (0.5, 2.0)):
            handle.configure(sample_ratio=ratio)
            for height, width in sizes:
                found = draw_sd3(pipe, steps=4, height=height, width=width)
                assert found.shape[-2:] == (height // 8, width // 8) and kinds(ras_compile.trace(handle)) == "ddss"
                assert error([found], [plain[height, width]]) < bound


def test_distilled_guidance():
    pipe = flux()
    sampled(pipe, lambda: draw_flux(pipe, steps=5), SPARSE_FROM_2)


def test_prompts_of_two_lengths_in_calls_of_their_own():
    pipe = qwen()
    records = sampled(pipe, lambda: draw_qwen(pipe, steps=4, negative=5, num_images_per_prompt=2), "dd" * 2 + "ss" * 2)
    assert records[-1].rows.shape == (2, 12)
    assert {record.branch for record in records} == {"cond", "uncond"}
    assert all(one.rows is two.rows for one, two in zip(records[4::2], records[5::2], strict=True))


def test_two_transformers_one_after_the_other():
    pipe = wan(boundary_ratio=0.8)
    records = sampled(pipe, lambda: draw_wan(pipe, steps=8), "dd" * 2 + "ss" * 2 + "dd" * 2 + "ss" * 2)
    assert [r.transformer for r in records] == ["transformer"] * 8 + ["transformer_2"] * 8


def test_reference_tokens_are_no_picture():
    """Kontext appends the tokens of a reference picture: after one step it is known which tokens are sampled."""
    pipe = flux("FluxKontextPipeline")
    reference = {"image": normal(1, 4, 10, 6, seed=7), "max_area": 96}
    records = sampled(pipe, lambda: draw_flux(pipe, steps=5, **reference), SPARSE_FROM_2)
    assert [r.active for r in records] == [24, 24, 12, 12, 12]  # known from the picture before


def test_reference_tokens_with_guidance(monkeypatch):
    from PIL import Image

    module = inspect.getmodule(diffusers.QwenImageEditPipeline)
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (16, 16, None))  # else a megapixel
    pipe = qwen("QwenImageEditPipeline", processor=None)
    image = Image.new("RGB", (16, 16), "red")
    records = sampled(pipe, lambda: draw_qwen(pipe, steps=4, image=image), "dd" * 2 + "ss" * 2)
    assert [r.active for r in records] == [24] * 4 + [12] * 4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
        ("UniPCMultistepScheduler", FLOW),
    ],
)
def test_inactive_tokens_hold_their_clean_sample(name, options):
    """What the scheduler gets implies, at inactive tokens, the clean sample of the step before; the others are left."""
    scheduler = getattr(diffusers, name)(**options)
    pipe = sd3(scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    base, seen = type(scheduler).step, []

    class Spy(type(scheduler)):
        def step(self, model_output, timestep, sample, return_dict=True):
            sigma = float(self.sigmas[self.step_index or 0])
            seen.append((model_output, sample - sigma * model_output))
            return base(self, model_output, timestep, sample, return_dict=return_dict)

    Spy.__name__ = name
    scheduler.__class__ = Spy
    with ras_compile.attach(pipe, **EAGER, noise_reuse="hold") as handle:
        torch.manual_seed(0)  # stochastic sampling draws from the global generator
        draw_sd3(pipe, steps=6)
        held = [prediction for prediction, _ in seen]
        seen.clear()
        handle.configure(noise_reuse="x0")
        torch.manual_seed(0)
        draw_sd3(pipe, steps=6)
        records = ras_compile.trace(handle)
    assert kinds(records) == "ddssss" and torch.equal(seen[1][0], held[1])
    for step in range(2, 6):
        active = torch.zeros(16, dtype=torch.bool)
        active[records[step].rows[0]] = True
        mask = active.view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(1, 4, 8, 8)
        (prediction, clean), (_, before) = seen[step], seen[step - 1]
        torch.testing.assert_close(clean[~mask], before[~mask], atol=1e-4, rtol=1e-4)
        assert (clean[mask] - before[mask]).abs().max() > 1e-3
        if step == 2:  # the same latents still, so the same computed tokens
            torch.testing.assert_close(prediction[mask], held[2][mask])
            same = torch.allclose(prediction[~mask], held[2][~mask], atol=1e-4)
            # a step of Euler's method along a held noise keeps x0, and where noise is added x0 is held anyway
            assert same == ("shift" in options)


def test_the_line_of_two_noises_in_a_pipeline():
    pipe = sd3()
    sampled(pipe, lambda: draw_sd3(pipe, steps=6), "ddssss", noise_reuse="linear")


@pytest.mark.parametrize("before", [True, False])
def test_a_lora(before, tmp_path):
    """Loaded before or after compilation, and taken off again: the picture follows, without stale weights."""
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)

    def load():
        pipe.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )

    plain = draw_sd3(pipe, steps=4)
    torch.manual_seed(0)
    if before:
        load()
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0}) as handle:
        if not before:
            torch.testing.assert_close(draw_sd3(pipe, steps=4), plain, atol=1e-4, rtol=1e-4)
            load()
        adapted = draw_sd3(pipe, steps=4)
        assert kinds(ras_compile.trace(handle)) == "ddss"
        pipe.transformer.disable_adapters()
        torch.testing.assert_close(draw_sd3(pipe, steps=4), plain, atol=1e-4, rtol=1e-4)
        assert kinds(ras_compile.trace(handle)) == "ddss"
        pipe.transformer.enable_adapters()
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(adapted, draw_sd3(pipe, steps=4), atol=1e-4, rtol=1e-4)


def test_weights_that_change_in_place():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0}):
        first = draw_sd3(pipe, steps=4)
        pipe.transformer.load_state_dict({name: 1.1 * value for name, value in pipe.transformer.state_dict().items()})
        second = draw_sd3(pipe, steps=4)
    plain = draw_sd3(pipe, steps=4)
    torch.testing.assert_close(second, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, plain, atol=1e-2)
