"""Image models whose latent is a sequence of packed tokens [B, N, C]."""

from __future__ import annotations

import torch

from .registry import case, grid_ids, padded, random


def _flux_inputs(**more):
    return dict(
        hidden_states=random(2, 24, 8), encoder_hidden_states=random(2, 5, 32), timestep=torch.tensor([0.5, 0.5]),
        img_ids=grid_ids(6, 4), txt_ids=torch.zeros(5, 3), **more,
    )  # fmt: skip


_FLUX = dict(
    patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
)  # fmt: skip


@case("Flux", "FluxTransformer2DModel", pooled_projection_dim=24, guidance_embeds=True, **_FLUX)
def _flux():
    return _flux_inputs(pooled_projections=random(2, 24), guidance=torch.tensor([3.5, 3.5]))


@case("BriaTransformer2DModel", **_FLUX)
def _bria():
    return _flux_inputs()


@case("BriaFiboTransformer2DModel", text_encoder_dim=16, **_FLUX)
def _bria_fibo():
    return _flux_inputs(text_encoder_layers=[random(2, 5, 16), random(2, 5, 16), random(2, 5, 16)])


@case(
    "ChromaTransformer2DModel", approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **_FLUX
)
def _chroma():
    mask = torch.cat([padded(2, 5), torch.ones(2, 24)], 1)
    return _flux_inputs(attention_mask=mask)


@case("LongCatImageTransformer2DModel", pooled_projection_dim=32, **_FLUX)
def _longcat_image():
    return _flux_inputs()


@case("OvisImageTransformer2DModel", out_channels=8, **_FLUX)
def _ovis():
    return _flux_inputs()


@case(
    "Flux2Transformer2DModel", patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32, mlp_ratio=2.0,
    axes_dims_rope=(4, 4, 4, 4),
)  # fmt: skip
def _flux2():
    return dict(
        hidden_states=random(2, 24, 8), encoder_hidden_states=random(2, 5, 32), timestep=torch.tensor([0.5, 0.5]),
        img_ids=grid_ids(6, 4, axes=4), txt_ids=torch.zeros(5, 4), guidance=torch.tensor([3.5, 3.5]),
    )  # fmt: skip


@case(
    "Flux3Transformer2DModel", in_channels=8, cond_in_channels=8, num_layers=1, num_single_layers=1,
    attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, timestep_channels=32, mlp_ratio=2.0,
    axes_dims_rope=(4, 4, 4, 4),
)  # fmt: skip
def _flux3():
    return dict(
        hidden_states=random(2, 24, 8), encoder_hidden_states=random(2, 5, 32), timestep=torch.tensor([0.5, 0.5]),
        img_ids=grid_ids(6, 4, axes=4), txt_ids=torch.zeros(5, 4),
        image_cond_hidden_states=random(2, 12, 8), image_cond_ids=grid_ids(4, 3, axes=4),
    )  # fmt: skip


_QWEN = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
)  # fmt: skip


def _qwen_inputs(**more):
    return dict(
        hidden_states=random(2, 24, 16), encoder_hidden_states=random(2, 7, 16),
        encoder_hidden_states_mask=padded(2, 7).long(), timestep=torch.tensor([0.5, 0.5]),
        img_shapes=[[(1, 4, 6)]] * 2, **more,
    )  # fmt: skip


@case("QwenImageTransformer2DModel", **_QWEN)
def _qwen_image():
    return _qwen_inputs()


@case(
    "QwenImage21Transformer2DModel", patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=2, context_in_dim=8, mlp_ratio=2, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
def _qwen_image21():
    text, height, width = 4, 4, 6
    mask = torch.zeros(1, text + height * width // 4, dtype=torch.bool)
    mask[:, text:] = True
    return dict(
        hidden_states=random(1, height * width, 4), encoder_hidden_states=random(1, text, 8),
        encoder_hidden_states_mask=torch.ones(1, text, dtype=torch.int64), timestep=torch.tensor([0.5]),
        img_shapes=[[(1, height, width)]], img_mask=mask,
    )  # fmt: skip


@case(
    "NucleusMoEImageTransformer2DModel",
    moe_enabled=False,
    **_QWEN | dict(attention_head_dim=32, axes_dims_rope=(16, 8, 8)),
)
def _nucleus():
    return _qwen_inputs() | dict(img_shapes=[(1, 4, 6)] * 2)


@case(
    "NucleusMoEImageTransformer2DModel with experts", "NucleusMoEImageTransformer2DModel", moe_enabled=True,
    num_experts=4, moe_intermediate_dim=16, dense_moe_strategy="all_moe", capacity_factors=2.0, **_QWEN,
)  # fmt: skip
def _nucleus_experts():
    return _qwen_inputs() | dict(img_shapes=[(1, 4, 6)] * 2)


@case(
    "Krea2Transformer2DModel", in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
    text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
)  # fmt: skip
def _krea2():
    return dict(
        hidden_states=random(2, 24, 8), encoder_hidden_states=random(2, 6, 3, 16), timestep=torch.tensor([0.5, 0.5]),
        position_ids=torch.cat([torch.zeros(6, 3), grid_ids(4, 6)]), encoder_attention_mask=padded(2, 6).bool(),
    )  # fmt: skip


@case(
    "Ideogram4Transformer2DModel", in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    intermediate_size=32, adaln_dim=16, llm_features_dim=24, rope_theta=10_000, mrope_section=(2, 1, 1),
)  # fmt: skip
def _ideogram4():
    text, image = 4, 24
    padding = torch.arange(text + image) < text
    hidden, features = random(2, text + image, 8), random(2, text + image, 24)
    return dict(
        hidden_states=hidden * ~padding[:, None], encoder_hidden_states=features * padding[:, None],
        timestep=torch.tensor([0.5, 0.5]),
        position_ids=torch.cat([torch.arange(text)[:, None].repeat(1, 3), grid_ids(4, 6).long() + 65536]).repeat(2, 1, 1),
        segment_ids=torch.ones(2, text + image, dtype=torch.int64), indicator=torch.where(padding, 3, 2).repeat(2, 1),
    )  # fmt: skip


_JOY = dict(
    patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
    rope_dim_list=[4, 6, 6], theta=256,
)  # fmt: skip


@case("JoyImageEditTransformer3DModel", **_JOY)
def _joyimage():
    return dict(
        hidden_states=random(2, 4, 1, 8, 12), encoder_hidden_states=random(2, 6, 16), timestep=torch.tensor([500.0] * 2)
    )


@case("JoyImageEditTransformer3DModel with a reference", "JoyImageEditTransformer3DModel", **_JOY)
def _joyimage_reference():
    return dict(
        hidden_states=random(2, 2, 4, 1, 4, 6),
        encoder_hidden_states=random(2, 6, 16),
        timestep=torch.tensor([500.0] * 2),
    )


@case("JoyImageEditPlusTransformer3DModel", **_JOY)
def _joyimage_plus():
    return dict(
        hidden_states=random(2, 18, 4, 1, 2, 2), encoder_hidden_states=random(2, 6, 16),
        timestep=torch.tensor([500.0] * 2), encoder_hidden_states_mask=padded(2, 6),
        shape_list=[[(1, 3, 4), (1, 2, 3)], [(1, 4, 3), (1, 2, 2)]],
    )  # fmt: skip
