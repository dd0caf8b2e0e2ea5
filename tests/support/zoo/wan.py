"""Video models of the Wan family: patches of a grid [B, C, F, H, W], text in cross-attention."""

from __future__ import annotations

import torch

from .registry import case, random

_WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
)  # fmt: skip


def _wan_inputs(frames=2, **more):
    return (
        dict(
            hidden_states=random(2, 4, frames, 4, 6),
            encoder_hidden_states=random(2, 7, 16),
            timestep=torch.tensor([500, 500]),
        )
        | more
    )


@case("Wan", "WanTransformer3DModel", qk_norm="rms_norm_across_heads", **_WAN)
def _wan():
    return _wan_inputs(3, hidden_states=random(2, 4, 3, 8, 12))


@case("WanTransformer3DModel with a timestep per token", "WanTransformer3DModel", **_WAN)
def _wan_timesteps():
    return _wan_inputs(timestep=torch.cat([torch.zeros(2, 6), torch.full((2, 6), 500.0)], 1))


@case(
    "WanTransformer3DModel from an image",
    "WanTransformer3DModel",
    **_WAN | dict(image_dim=8, added_kv_proj_dim=24, in_channels=8),
)
def _wan_image():
    return _wan_inputs(hidden_states=random(2, 8, 2, 4, 6), encoder_hidden_states_image=random(2, 5, 8))


@case("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=12, **_WAN)
def _wan_vace():
    return _wan_inputs(control_hidden_states=random(2, 12, 2, 4, 6), control_hidden_states_scale=torch.ones(1))


@case(
    "WanAnimateTransformer3DModel", latent_channels=4, image_dim=16,
    motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
    motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    **_WAN | dict(in_channels=12),
)  # fmt: skip
def _wan_animate():
    return dict(
        hidden_states=random(1, 12, 3, 8, 12), timestep=torch.tensor([500]), encoder_hidden_states=random(1, 7, 16),
        encoder_hidden_states_image=random(1, 5, 16), pose_hidden_states=random(1, 4, 2, 8, 12),
        face_pixel_values=random(1, 3, 5, 16, 16),
    )  # fmt: skip


@case("SkyReelsV2Transformer3DModel", inject_sample_info=True, **_WAN)
def _skyreels():
    return _wan_inputs(fps=torch.tensor([0, 1]))


@case("SkyReelsV2Transformer3DModel with diffusion forcing", "SkyReelsV2Transformer3DModel", **_WAN)
def _skyreels_forcing():
    return _wan_inputs(timestep=torch.tensor([[100, 500], [100, 500]]), enable_diffusion_forcing=True)


@case("ChronoEditTransformer3DModel", image_dim=8, added_kv_proj_dim=24, **_WAN)
def _chronoedit():
    return _wan_inputs(encoder_hidden_states_image=random(2, 5, 8))


@case("AnyFlowTransformer3DModel", **_WAN)
def _anyflow():
    return _wan_inputs(
        hidden_states=random(2, 2, 4, 4, 6), timestep=torch.full((2, 2), 500.0), r_timestep=torch.full((2, 2), 250.0)
    )


@case("AnyFlowFARTransformer3DModel", compressed_patch_size=(1, 4, 4), full_chunk_limit=3, **_WAN)
def _anyflow_far():
    return _wan_inputs(
        hidden_states=random(2, 2, 4, 4, 8), timestep=torch.full((2, 2), 500.0), r_timestep=torch.full((2, 2), 250.0),
        chunk_partition=[1, 1],
    )  # fmt: skip


@case("HeliosTransformer3DModel", rope_dim=(4, 4, 4), **{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"})
def _helios():
    return _wan_inputs(
        hidden_states=random(1, 4, 2, 8, 8), encoder_hidden_states=random(1, 7, 16), timestep=torch.tensor([500]),
        indices_hidden_states=torch.arange(2)[None] + 10.0, indices_latents_history_short=torch.full((1, 1), 9.0),
        indices_latents_history_mid=torch.tensor([[7.0, 8.0]]), indices_latents_history_long=torch.arange(4.0)[None],
        latents_history_short=random(1, 4, 1, 8, 8), latents_history_mid=random(1, 4, 2, 8, 8),
        latents_history_long=random(1, 4, 4, 8, 8),
    )  # fmt: skip
