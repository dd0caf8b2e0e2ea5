"""Image models whose latent is a grid [B, C, H, W]."""

from __future__ import annotations

import torch

from .registry import case, padded, random

_SD3 = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=4,
    joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
)  # fmt: skip


@case("SD3", "SD3Transformer2DModel", num_layers=2, **_SD3)
def _sd3():
    return dict(
        hidden_states=random(2, 4, 12, 8), encoder_hidden_states=random(2, 5, 32), pooled_projections=random(2, 64),
        timestep=torch.tensor([500.0, 500.0]),
    )  # fmt: skip


@case("SD3.5", "SD3Transformer2DModel", num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0, 1), **_SD3)
def _sd35():
    return dict(
        hidden_states=random(1, 4, 8, 12), encoder_hidden_states=random(1, 7, 32), pooled_projections=random(1, 64),
        timestep=torch.tensor([500.0]),
    )  # fmt: skip


@case(
    "DiT", "DiTTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2,
    attention_head_dim=8, num_attention_heads=4, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
)  # fmt: skip
def _dit():
    return dict(
        hidden_states=random(2, 4, 8, 8), timestep=torch.tensor([500, 500]), class_labels=torch.tensor([3, 1000])
    )


@case(
    "PixArt", "PixArtTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2,
    attention_head_dim=8, num_attention_heads=4, cross_attention_dim=32, caption_channels=24,
    use_additional_conditions=False,
)  # fmt: skip
def _pixart():
    return dict(
        hidden_states=random(2, 4, 8, 8), encoder_hidden_states=random(2, 6, 24), encoder_attention_mask=padded(2, 6),
        timestep=torch.tensor([500, 500]), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip


@case(
    "Lumina-Next", "LuminaNextDiT2DModel", sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
    num_attention_heads=4, num_kv_heads=2, multiple_of=16, ffn_dim_multiplier=1.0, cross_attention_dim=24,
    learn_sigma=True,
)  # fmt: skip
def _lumina_next():
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return dict(
        hidden_states=random(2, 4, 12, 8), encoder_hidden_states=random(2, 6, 24), encoder_mask=padded(2, 6, 1),
        timestep=torch.tensor([0.3, 0.3]), image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 384, 384),
        cross_attention_kwargs={},
    )  # fmt: skip


@case(
    "AuraFlow", "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4,
    num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
    caption_projection_dim=32, pos_embed_max_size=64,
)  # fmt: skip
def _auraflow():
    return dict(
        hidden_states=random(2, 4, 8, 12), encoder_hidden_states=random(2, 5, 32), timestep=torch.tensor([0.5, 0.5])
    )


@case(
    "CogView3PlusTransformer2DModel", patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8,
    sample_size=8,
)  # fmt: skip
def _cogview3():
    return dict(
        hidden_states=random(2, 4, 8, 12), encoder_hidden_states=random(2, 6, 8), timestep=torch.tensor([500, 500]),
        original_size=torch.tensor([[64, 96]] * 2), target_size=torch.tensor([[64, 96]] * 2),
        crop_coords=torch.tensor([[0, 0]] * 2),
    )  # fmt: skip


_COGVIEW4 = dict(
    patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
    text_embed_dim=8, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(256, 256),
)  # fmt: skip


@case("CogView4Transformer2DModel", **_COGVIEW4)
def _cogview4():
    return dict(
        hidden_states=random(2, 4, 8, 12), encoder_hidden_states=random(2, 6, 8), timestep=torch.tensor([500, 500]),
        original_size=torch.tensor([[64, 96]] * 2), target_size=torch.tensor([[64, 96]] * 2),
        crop_coords=torch.tensor([[0, 0]] * 2),
    )  # fmt: skip


@case(
    "GlmImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=2, text_embed_dim=32, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=64,
)  # fmt: skip
def _glm_image():
    return dict(
        hidden_states=random(2, 4, 8, 12), encoder_hidden_states=random(2, 6, 32),
        prior_token_id=torch.randint(0, 64, (2, 24)), prior_token_drop=torch.zeros(2, 24, dtype=torch.bool),
        timestep=torch.tensor([500, 500]), target_size=torch.tensor([[64.0, 96.0]] * 2),
        crop_coords=torch.zeros(2, 2),
    )  # fmt: skip


@case(
    "HunyuanDiT2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8,
    num_attention_heads=2, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16,
    text_len=4, text_len_t5=6, activation_fn="gelu-approximate",
)  # fmt: skip
def _hunyuan_dit():
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rotary = get_2d_rotary_pos_embed(8, ((0, 0), (4, 6)), (4, 6), output_type="pt")
    return dict(
        hidden_states=random(2, 4, 8, 12), timestep=torch.tensor([500.0, 500.0]),
        encoder_hidden_states=random(2, 4, 8), text_embedding_mask=padded(2, 4),
        encoder_hidden_states_t5=random(2, 6, 8), text_embedding_mask_t5=padded(2, 6),
        image_meta_size=torch.tensor([[64.0, 96.0, 64.0, 96.0, 0.0, 0.0]] * 2), style=torch.zeros(2, dtype=torch.int64),
        image_rotary_emb=rotary,
    )  # fmt: skip


@case(
    "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
    num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=16, text_embed_2_dim=12,
    rope_axes_dim=(4, 4), guidance_embeds=False,
)  # fmt: skip
def _hunyuan_image():
    return dict(
        hidden_states=random(2, 4, 4, 6), timestep=torch.tensor([500.0, 500.0]), encoder_hidden_states=random(2, 7, 16),
        encoder_attention_mask=padded(2, 7), encoder_hidden_states_2=random(2, 5, 12),
        encoder_attention_mask_2=padded(2, 5),
    )  # fmt: skip


@case(
    "SanaTransformer2DModel", patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
    num_attention_heads=4, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
    caption_channels=8, sample_size=8,
)  # fmt: skip
def _sana():
    return dict(
        hidden_states=random(2, 4, 4, 6), encoder_hidden_states=random(2, 6, 8), timestep=torch.tensor([500, 500]),
        encoder_attention_mask=padded(2, 6),
    )  # fmt: skip


@case(
    "OmniGenTransformer2DModel", hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32,
    num_layers=2, pad_token_id=0, vocab_size=100, in_channels=4, time_step_dim=4,
    rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
)  # fmt: skip
def _omnigen():
    text, tokens = 12, 24
    length = text + 1 + tokens
    return dict(
        hidden_states=random(2, 4, 8, 12), timestep=torch.tensor([0.5, 0.5]), input_ids=torch.randint(1, 10, (2, text)),
        input_img_latents=[], input_image_sizes={}, attention_mask=torch.ones(2, length, length),
        position_ids=torch.arange(length).repeat(2, 1),
    )  # fmt: skip


_LUMINA2 = dict(
    sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
    num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, axes_dim_rope=(4, 2, 2),
    axes_lens=(128, 128, 128), cap_feat_dim=32,
)  # fmt: skip


def _lumina2_inputs(mask):
    samples = len(mask)
    return dict(
        hidden_states=random(samples, 4, 8, 12), encoder_hidden_states=random(samples, 6, 32),
        timestep=torch.full([samples], 0.3), encoder_attention_mask=mask.bool(),
    )  # fmt: skip


@case("Lumina2Transformer2DModel", **_LUMINA2)
def _lumina2():
    return _lumina2_inputs(padded(1, 6))


@case("Lumina2Transformer2DModel with two pictures of a prompt", "Lumina2Transformer2DModel", **_LUMINA2)
def _lumina2_pictures():
    return _lumina2_inputs(padded(1, 6).repeat(2, 1))


# its tokens stand behind texts of different lengths, so in other places for each sample
@case(
    "Lumina2Transformer2DModel with prompts of two lengths", "Lumina2Transformer2DModel",
    refused="no output carries", **_LUMINA2,
)  # fmt: skip
def _lumina2_prompts():
    return _lumina2_inputs(padded(2, 6))


# how many tokens each of its experts gets hangs on the latent: they are one op
@case(
    "HiDreamImageTransformer2DModel",
    patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
    attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
    num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    force_inference_output=True,
)  # fmt: skip
def _hidream():
    return dict(
        hidden_states=random(2, 4, 8, 12), timesteps=torch.tensor([500, 500]), pooled_embeds=random(2, 64),
        encoder_hidden_states_t5=random(2, 5, 32), encoder_hidden_states_llama3=random(2, 2, 5, 16),
    )  # fmt: skip


@case(
    "PRXTransformer2DModel", patch_size=2, in_channels=4, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2,
    depth=2, axes_dim=[4, 4],
)  # fmt: skip
def _prx():
    return dict(
        hidden_states=random(2, 4, 8, 12), timestep=torch.tensor([0.5, 0.5]), encoder_hidden_states=random(2, 6, 8),
        attention_mask=padded(2, 6).bool(),
    )  # fmt: skip


@case(
    "ErnieImageTransformer2DModel", hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32,
    in_channels=8, out_channels=8, patch_size=1, text_in_dim=16, rope_axes_dim=(8, 4, 4),
)  # fmt: skip
def _ernie():
    return dict(
        hidden_states=random(2, 8, 4, 6), timestep=torch.tensor([500.0, 500.0]), text_bth=random(2, 6, 16),
        text_lens=torch.tensor([4, 6]),
    )  # fmt: skip


@case(
    "ZImageTransformer2DModel", region="x",
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2,
    n_refiner_layers=1, n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=16, axes_dims=[8, 4, 4],
    axes_lens=[64, 16, 16],
)  # fmt: skip
def _z_image():
    return dict(x=[random(4, 1, 8, 16)], cap_feats=[random(7, 16)], t=torch.tensor([0.4]))


@case(
    "BriaFibo2Transformer2DModel", in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
    cap_feat_dim=24, injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8,
    gist_step=4, gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(16, 16, 16),
)  # fmt: skip
def _bria_fibo2():
    return dict(
        hidden_states=random(2, 4, 8, 12), timestep=torch.tensor([0.5, 0.5]),
        encoder_hidden_states=random(2, 2, 6, 24),
    )  # fmt: skip


@case(
    "Transformer2DModel", sample_size=8, num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
    norm_num_groups=2, cross_attention_dim=8,
)  # fmt: skip
def _transformer_2d():
    return dict(hidden_states=random(2, 4, 4, 6), encoder_hidden_states=random(2, 5, 8), return_dict=False)


@case(
    "DualTransformer2DModel", sample_size=8, num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
    norm_num_groups=2, cross_attention_dim=8,
)  # fmt: skip
def _dual_transformer_2d():
    return dict(hidden_states=random(2, 4, 4, 6), encoder_hidden_states=random(2, 77 + 257, 8))


@case(
    "DreamLiteTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
    norm_num_groups=2, cross_attention_dim=8, use_linear_projection=True,
)  # fmt: skip
def _dreamlite():
    return dict(
        hidden_states=random(2, 4, 4, 6), encoder_hidden_states=random(2, 6, 8),
        encoder_attention_mask=padded(2, 6).bool(), return_dict=False,
    )  # fmt: skip
