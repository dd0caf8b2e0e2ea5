"""Small configurations of real transformers, each with a maker of random inputs: the contract runs on every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        build: makes the module (weights as the class initialises them).
        inputs: makes keyword inputs for a call; ``latent`` names the one that carries the region.
        latent: name of the latent argument.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    latent: str = "hidden_states"


ZOO: dict[str, Case] = {}


def case(name: str, latent: str = "hidden_states") -> Callable[[Callable[[], tuple]], Callable[[], tuple]]:
    """Registers a function that returns ``(build, inputs)`` under ``name``."""

    def register(make: Callable[[], tuple]) -> Callable[[], tuple]:
        build, inputs = make()
        ZOO[name] = Case(build, inputs, latent)
        return make

    return register


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Re-draws every parameter so that errors show: matrices at 1.5/sqrt(fan_in), vectors around one or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.5 / fan_in**0.5))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return module


def random(*shape: int, seed: int | None = None) -> Tensor:
    """Standard normal values; the dtype is the default one."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


@case("SD3")
def _sd3():
    def build():
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=16,
        )  # fmt: skip

    def inputs():
        return dict(
            hidden_states=random(2, 4, 12, 8), encoder_hidden_states=random(2, 5, 32),
            pooled_projections=random(2, 64), timestep=torch.tensor([500.0, 500.0]),
        )  # fmt: skip

    return build, inputs


@case("SD3.5")
def _sd35():
    def build():
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0, 1),
        )  # fmt: skip

    def inputs():
        return dict(
            hidden_states=random(1, 4, 8, 12), encoder_hidden_states=random(1, 7, 32),
            pooled_projections=random(1, 64), timestep=torch.tensor([500.0]),
        )  # fmt: skip

    return build, inputs


@case("DiT")
def _dit():
    def build():
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
        )  # fmt: skip

    def inputs():
        return dict(
            hidden_states=random(2, 4, 8, 8), timestep=torch.tensor([500, 500]), class_labels=torch.tensor([3, 1000])
        )

    return build, inputs


@case("PixArt")
def _pixart():
    def build():
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
        )  # fmt: skip

    def inputs():
        mask = torch.ones(2, 6)
        mask[0, 4:] = 0
        return dict(
            hidden_states=random(2, 4, 8, 8), encoder_hidden_states=random(2, 6, 24), encoder_attention_mask=mask,
            timestep=torch.tensor([500, 500]), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )  # fmt: skip

    return build, inputs


@case("Lumina-Next")
def _lumina():
    def build():
        from diffusers import LuminaNextDiT2DModel

        return LuminaNextDiT2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4,
            num_kv_heads=2, multiple_of=16, ffn_dim_multiplier=1.0, cross_attention_dim=24, learn_sigma=True,
        )  # fmt: skip

    def inputs():
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        mask = torch.ones(2, 6)
        mask[1, 5:] = 0
        return dict(
            hidden_states=random(2, 4, 12, 8), encoder_hidden_states=random(2, 6, 24), encoder_mask=mask,
            timestep=torch.tensor([0.3, 0.3]), image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 384, 384),
            cross_attention_kwargs={},
        )  # fmt: skip

    return build, inputs


@case("Flux")
def _flux():
    def build():
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )  # fmt: skip

    def inputs():
        height, width = 6, 4
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)[None]
        return dict(
            hidden_states=random(2, height * width, 8), encoder_hidden_states=random(2, 5, 32),
            pooled_projections=random(2, 24), timestep=torch.tensor([0.5, 0.5]), img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(5, 3), guidance=torch.tensor([3.5, 3.5]),
        )  # fmt: skip

    return build, inputs


@case("AuraFlow")
def _auraflow():
    def build():
        from diffusers import AuraFlowTransformer2DModel

        return AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2,
            num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
            caption_projection_dim=32, pos_embed_max_size=64,
        )  # fmt: skip

    def inputs():
        return dict(
            hidden_states=random(2, 4, 8, 12), encoder_hidden_states=random(2, 5, 32), timestep=torch.tensor([0.5, 0.5])
        )

    return build, inputs


@case("Wan")
def _wan():
    def build():
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip

    def inputs():
        return dict(
            hidden_states=random(2, 4, 3, 8, 12), encoder_hidden_states=random(2, 7, 16), timestep=torch.tensor([500, 500])
        )

    return build, inputs
