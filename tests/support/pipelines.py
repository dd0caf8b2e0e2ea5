"""Tiny pipelines of diffusers' own classes, with random weights drawn large, and what is asked of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from contract import error
from torch import Tensor, nn

import ras_compile

# as many tokens in each sparse step, and no dense step behind the warm-up
EAGER = {
    "inner_backend": "eager", "warmup_steps": 2, "reset_interval": None, "ratio_schedule": "constant",
    "unsupported": "error",
}  # fmt: skip


def redrawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with its weights drawn large enough for errors to show; matrices at 1 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return module.eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kinds(records: list, transformer: str | None = None, branch: str | None = None) -> str:
    """One letter for each call: d(ense) or s(parse)."""
    return "".join(r.kind[0] for r in records if transformer in (None, r.transformer) and branch in (None, r.branch))


def sampled(pipe: Any, draw: Callable[[], Tensor], expected: str, bound: float = 0.7, **options: Any) -> list:
    """A picture drawn densely, with all tokens and with half of them, through one attached pipeline.

    With all tokens active in sparse steps it is the dense picture, up to rounding; with half of them it differs, by at
    most `bound` (Euclidean norms; the weights are random and large, so this only says that it is no other picture), and
    the calls have the `expected` kinds. Returns the records of the last one.
    """
    pipe.set_progress_bar_config(disable=True)
    torch._dynamo.reset()
    plain = draw()
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0, **options}) as handle:
        found = draw()
        assert kinds(ras_compile.trace(handle)) == expected
        assert error([found], [plain]) < 1e-4
        handle.configure(sample_ratio=0.5)
        half = draw()
        records = ras_compile.trace(handle)
        assert kinds(records) == expected
        gap = float((half - plain).norm() / plain.norm())
        assert 1e-5 < gap < bound, gap
    return records


_NOTHING = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")


def sd3_transformer(channels: int = 4, **more: Any) -> nn.Module:
    return redrawn(
        diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
            pos_embed_max_size=16, **more,
        )
    )  # fmt: skip


def vae(channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=channels, shift_factor=0.0, scaling_factor=1.0
    ).eval()


def sd3(kind: str = "StableDiffusion3Pipeline", scheduler: Any = None, **parts: Any) -> Any:
    return getattr(diffusers, kind)(
        **{
            **dict.fromkeys(_NOTHING),
            "transformer": sd3_transformer(),
            "scheduler": scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": None,
            **parts,
        }
    )


def sd3_prompt(batch: int = 1) -> dict[str, Tensor]:
    return {
        "prompt_embeds": normal(batch, 3, 16, seed=1),
        "pooled_prompt_embeds": normal(batch, 8, seed=2),
        "negative_prompt_embeds": normal(batch, 3, 16, seed=3),
        "negative_pooled_prompt_embeds": normal(batch, 8, seed=4),
    }


def draw_sd3(pipe: Any, steps: int = 6, **more: Any) -> Tensor:
    """[B, 4, 8, 8]: sixteen tokens."""
    given = {**sd3_prompt(), "height": 64, "width": 64, "output_type": "latent", "guidance_scale": 4.0, **more}
    return pipe(num_inference_steps=steps, generator=seeded(), **given).images


def flux_transformer(**more: Any) -> nn.Module:
    return redrawn(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), **more,
        )
    )  # fmt: skip


def flux(kind: str = "FluxPipeline", **parts: Any) -> Any:
    return getattr(diffusers, kind)(
        **{
            **dict.fromkeys(_NOTHING[:4]),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": vae(),
            "transformer": flux_transformer(guidance_embeds=True),
            **parts,
        }
    )


def draw_flux(pipe: Any, steps: int = 6, **more: Any) -> Tensor:
    """[B, 24, 16]."""
    given = {"prompt_embeds": normal(1, 3, 16, seed=1), "pooled_prompt_embeds": normal(1, 8, seed=2), **more}
    given = {"height": 8, "width": 12, "output_type": "latent", "guidance_scale": 2.5, **given}
    return pipe(num_inference_steps=steps, generator=seeded(), **given).images


def qwen(kind: str = "QwenImagePipeline", **parts: Any) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    return getattr(diffusers, kind)(
        **{
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            "vae": encoder.eval(),
            "text_encoder": None,
            "tokenizer": None,
            "transformer": redrawn(transformer),
            **parts,
        }
    )


def draw_qwen(pipe: Any, steps: int = 6, negative: int = 3, **more: Any) -> Tensor:
    """[B, 24, 16]; prompts of three and `negative` tokens, two calls a step."""
    given = {
        "prompt_embeds": normal(1, 3, 16, seed=1),
        "prompt_embeds_mask": torch.ones(1, 3, dtype=torch.int64),
        "negative_prompt_embeds": normal(1, negative, 16, seed=2),
        "negative_prompt_embeds_mask": torch.ones(1, negative, dtype=torch.int64),
        "true_cfg_scale": 3.0,
        "height": 16,
        "width": 24,
        "output_type": "latent",
        **more,
    }
    return pipe(num_inference_steps=steps, generator=seeded(), **given).images


def pixart(scheduler: Any) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae(), transformer=redrawn(transformer), scheduler=scheduler
    )


def draw_pixart(pipe: Any, steps: int = 6, **more: Any) -> Tensor:
    """[B, 4, 8, 8]: sixteen tokens; guidance in one batch, a learned variance that the pipeline drops."""
    given = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": normal(1, 6, 24, seed=1),
        "prompt_attention_mask": torch.ones(1, 6),
        "negative_prompt_embeds": normal(1, 6, 24, seed=2),
        "negative_prompt_attention_mask": torch.tensor([[1.0, 1, 1, 1, 0, 0]]),
        "height": 8,
        "width": 8,
        "use_resolution_binning": False,
        "output_type": "latent",
        **more,
    }
    return pipe(num_inference_steps=steps, generator=seeded(), **given).images


def wan(**parts: Any) -> Any:
    def transformer(seed: int) -> nn.Module:
        return redrawn(
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1,
            ),
            seed,
        )  # fmt: skip

    return diffusers.WanPipeline(
        **{
            "tokenizer": None,
            "text_encoder": None,
            "vae": None,
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            "transformer": transformer(0),
            "transformer_2": transformer(1),
            "boundary_ratio": 0.5,
            **parts,
        }
    )


def draw_wan(pipe: Any, steps: int = 6, **more: Any) -> Tensor:
    """[1, 4, 2, 4, 4]: eight tokens."""
    return pipe(
        prompt_embeds=normal(1, 3, 16, seed=1),
        negative_prompt_embeds=normal(1, 3, 16, seed=2),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        output_type="latent",
        guidance_scale=3.0,
        generator=seeded(),
        **more,
    ).frames
