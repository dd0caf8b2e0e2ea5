"""Video models other than the Wan family: grids [B, C, F, H, W], [B, F, H, W, C] and packed tokens."""

from __future__ import annotations

import torch

from .registry import case, grid_ids, padded, random


@case(
    "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
    time_embed_dim=2, text_embed_dim=8, num_layers=2, sample_width=12, sample_height=8, sample_frames=8, patch_size=2,
    temporal_compression_ratio=4, max_text_seq_length=8,
)  # fmt: skip
def _cogvideox():
    return dict(
        hidden_states=random(2, 2, 4, 8, 12), encoder_hidden_states=random(2, 8, 8), timestep=torch.tensor([500, 500])
    )


@case(
    "CogVideoXTransformer3DModel 1.5", "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16,
    in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8, num_layers=2, sample_width=12, sample_height=8,
    sample_frames=8, patch_size=2, patch_size_t=2, temporal_compression_ratio=4, max_text_seq_length=8,
    use_rotary_positional_embeddings=True, ofs_embed_dim=2, patch_bias=False,
)  # fmt: skip
def _cogvideox15():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rotary = get_3d_rotary_pos_embed(16, None, (4, 6), 1, grid_type="slice", max_size=(4, 6))
    return dict(
        hidden_states=random(2, 2, 4, 8, 12), encoder_hidden_states=random(2, 8, 8), timestep=torch.tensor([500, 500]),
        image_rotary_emb=rotary, ofs=torch.tensor([2.0, 2.0]),
    )  # fmt: skip


@case(
    "ConsisIDTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
    time_embed_dim=2, text_embed_dim=8, num_layers=2, sample_width=12, sample_height=8, sample_frames=8, patch_size=2,
    temporal_compression_ratio=4, max_text_seq_length=8, cross_attn_interval=1, is_train_face=True,
    cross_attn_dim_head=4, cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8,
    LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=3, LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1,
)  # fmt: skip
def _consisid():
    return dict(
        hidden_states=random(2, 2, 4, 8, 12), encoder_hidden_states=random(2, 8, 8), timestep=torch.tensor([500, 500]),
        id_cond=random(2, 2), id_vit_hidden=[random(2, 2, 2)],
    )  # fmt: skip


@case(
    "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
    num_layers=2, cross_attention_dim=24, sample_width=12, sample_height=8, sample_frames=2, caption_channels=16,
)  # fmt: skip
def _allegro():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frequencies = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 6)), (4, 6), temporal_size=2)[:3]
    rotary = (frequencies, tuple(axis.long()[None] for axis in grid_ids(2, 4, 6).T))
    return dict(
        hidden_states=random(2, 4, 2, 8, 12), encoder_hidden_states=random(2, 6, 16), timestep=torch.tensor([500, 500]),
        attention_mask=torch.ones(2, 2, 8, 12), encoder_attention_mask=padded(2, 6), image_rotary_emb=rotary,
    )  # fmt: skip


@case(
    "LatteTransformer3DModel", sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
    caption_channels=8, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
    activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
    norm_elementwise_affine=False, norm_eps=1e-6, video_length=3,
)  # fmt: skip
def _latte():
    return dict(
        hidden_states=random(2, 4, 3, 8, 8), encoder_hidden_states=random(2, 6, 8), timestep=torch.tensor([500, 500])
    )


_COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
    text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
    concat_padding_mask=False, extra_pos_embed_type=None,
)  # fmt: skip


@case("CosmosTransformer3DModel", **_COSMOS)
def _cosmos():
    return dict(
        hidden_states=random(2, 4, 2, 4, 6), timestep=torch.tensor([500, 500]), encoder_hidden_states=random(2, 6, 16),
        fps=30,
    )  # fmt: skip


@case("CosmosTransformer3DModel from a video", "CosmosTransformer3DModel", **_COSMOS | dict(in_channels=5))
def _cosmos_video():
    return dict(
        hidden_states=random(2, 4, 2, 4, 6), timestep=torch.full((2, 1, 2, 1, 1), 0.5),
        encoder_hidden_states=random(2, 6, 16), fps=30, condition_mask=torch.ones(2, 1, 2, 4, 6),
    )  # fmt: skip


@case(
    "EasyAnimateTransformer3DModel", attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=2,
    num_layers=2, out_channels=4, patch_size=2, sample_height=60, sample_width=90, text_embed_dim=16, time_embed_dim=8,
    time_position_encoding_type="3d_rope",
)  # fmt: skip
def _easyanimate():
    return dict(
        hidden_states=random(2, 4, 2, 4, 6), timestep=torch.tensor([500, 500]), encoder_hidden_states=random(2, 6, 16)
    )


_HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, text_embed_dim=16, rope_axes_dim=(2, 4, 4),
)  # fmt: skip


def _hunyuan_inputs(**more):
    return dict(
        hidden_states=random(2, 4, 2, 4, 6), timestep=torch.tensor([500.0, 500.0]),
        encoder_hidden_states=random(2, 6, 16), pooled_projections=random(2, 8), encoder_attention_mask=padded(2, 6),
        guidance=torch.tensor([6000.0, 6000.0]),
    ) | more  # fmt: skip


@case("HunyuanVideoTransformer3DModel", pooled_projection_dim=8, guidance_embeds=True, **_HUNYUAN)
def _hunyuan_video():
    return _hunyuan_inputs()


@case(
    "HunyuanVideoTransformer3DModel with its first frame given", "HunyuanVideoTransformer3DModel",
    pooled_projection_dim=8, guidance_embeds=True, image_condition_type="token_replace", **_HUNYUAN,
)  # fmt: skip
def _hunyuan_video_replace():
    return _hunyuan_inputs()


@case(
    "HunyuanVideoFramepackTransformer3DModel", pooled_projection_dim=8, guidance_embeds=True, has_image_proj=True,
    image_proj_dim=16, has_clean_x_embedder=True, **_HUNYUAN,
)  # fmt: skip
def _framepack():
    return _hunyuan_inputs(
        image_embeds=random(2, 5, 16), indices_latents=torch.arange(6, 8), latents_clean=random(2, 4, 2, 4, 6),
        indices_latents_clean=torch.tensor([0, 5]), latents_history_2x=random(2, 4, 2, 4, 6),
        indices_latents_history_2x=torch.tensor([3, 4]), latents_history_4x=random(2, 4, 4, 4, 6),
        indices_latents_history_4x=torch.arange(4),
    )  # fmt: skip


@case(
    "HunyuanVideo15Transformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
    num_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12,
    image_embed_dim=10, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
)  # fmt: skip
def _hunyuan_video15():
    return dict(
        hidden_states=random(1, 4, 1, 4, 6), timestep=torch.tensor([500.0]), encoder_hidden_states=random(1, 6, 16),
        encoder_attention_mask=padded(1, 6), encoder_hidden_states_2=random(1, 4, 12),
        encoder_attention_mask_2=padded(1, 4), image_embeds=torch.zeros(1, 3, 10),
    )  # fmt: skip


@case(
    "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4,
    patch_size=(1, 2, 2), model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4),
)  # fmt: skip
def _kandinsky5():
    return dict(
        hidden_states=random(2, 2, 4, 6, 4), encoder_hidden_states=random(2, 6, 16), timestep=torch.tensor([500.0] * 2),
        pooled_projections=random(2, 8), visual_rope_pos=[torch.arange(2), torch.arange(2), torch.arange(3)],
        text_rope_pos=torch.arange(6),
    )  # fmt: skip


@case(
    "Kandinsky6Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16,
    patch_size=(1, 2, 2), model_dim=48, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4),
    visual_cond=True, in_audio_dim=4, out_audio_dim=4,
)  # fmt: skip
def _kandinsky6():
    return dict(
        hidden_states=random(2, 2, 4, 6, 9), encoder_hidden_states=random(2, 6, 8), pooled_projections=random(2, 8),
        timestep=torch.tensor([500.0, 500.0]), audio_hidden_states=random(2, 5, 4),
        encoder_attention_mask=padded(2, 6).bool(),
    )  # fmt: skip


@case(
    "Kandinsky6SRTransformer3DModel", refused="mask depends on the values",
    in_visual_dim=4, out_visual_dim=8, time_dim=16, patch_size=(1, 1, 1),
    model_dim=24, ff_dim=32, num_visual_blocks=2, axes_dims=(4, 4, 4),
)  # fmt: skip
def _kandinsky6_sr():
    return dict(hidden_states=random(1, 2, 8, 16, 9), timestep=torch.tensor([500.0]))


@case(
    "LTXVideoTransformer3DModel", in_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
    num_layers=2, caption_channels=16, out_channels=4,
)  # fmt: skip
def _ltx():
    return dict(
        hidden_states=random(2, 24, 4), encoder_hidden_states=random(2, 6, 16), timestep=torch.tensor([500.0, 500.0]),
        encoder_attention_mask=padded(2, 6), num_frames=2, height=3, width=4,
    )  # fmt: skip


_LTX2 = dict(
    in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
    cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
    audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=16,
    rope_double_precision=False,
)  # fmt: skip


@case("LTX2VideoTransformer3DModel", **_LTX2)
def _ltx2():
    return dict(
        hidden_states=random(2, 24, 4), audio_hidden_states=random(2, 5, 4), encoder_hidden_states=random(2, 6, 16),
        audio_encoder_hidden_states=random(2, 6, 16), timestep=torch.tensor([500.0, 500.0]),
        encoder_attention_mask=padded(2, 6), audio_encoder_attention_mask=padded(2, 6), num_frames=2, height=3, width=4,
        audio_num_frames=5, fps=25.0,
    )  # fmt: skip


@case("SanaWMLTX2RefinerTransformer3DModel", **_LTX2)
def _sana_wm_refiner():
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(
        dim=16, patch_size=1, patch_size_t=1, base_num_frames=20, base_height=2048, base_width=2048,
        scale_factors=(8, 32, 32), modality="video", double_precision=False, num_attention_heads=2,
    )  # fmt: skip
    coords = rope.prepare_video_coords(2, 2, 3, 4, device="cpu", fps=24.0)
    return dict(
        hidden_states=random(2, 24, 4), encoder_hidden_states=random(2, 6, 16), timestep=random(2, 24).abs() * 500,
        video_rotary_emb=rope(coords, device="cpu"), encoder_attention_mask=padded(2, 6),
    )  # fmt: skip


@case(
    "MochiTransformer3DModel", patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
    pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
)  # fmt: skip
def _mochi():
    return dict(
        hidden_states=random(2, 4, 2, 4, 6), encoder_hidden_states=random(2, 6, 16), timestep=torch.tensor([500, 500]),
        encoder_attention_mask=padded(2, 6).bool(),
    )  # fmt: skip


@case(
    "MotifVideoTransformer3DModel", in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12,
    num_layers=1, num_single_layers=1, num_decoder_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=32,
    image_embed_dim=4, rope_axes_dim=(4, 4, 4), enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
)  # fmt: skip
def _motif():
    return dict(
        hidden_states=random(2, 9, 2, 4, 6), encoder_hidden_states=random(2, 6, 32), timestep=torch.tensor([500, 500]),
        encoder_attention_mask=padded(2, 6).bool(), image_embeds=random(2, 5, 4),
    )  # fmt: skip


@case(
    "MiniMaxH3Transformer3DModel", num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2,
    num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=6, patch_size=(1, 2, 2), text_dim=8, freq_dim=8,
    time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=2,
)  # fmt: skip
def _minimax_h3():
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 34)
    tags, times = torch.zeros(34, dtype=torch.int64), torch.zeros(34, dtype=torch.int64)
    tags[text], tags[audio], times[audio] = 1, 2, 1
    positions = torch.arange(34.0)[:, None].repeat(1, 3)
    positions[video] = 10 + grid_ids(2, 3, 4)
    return dict(
        hidden_states=random(2, 24, 16), audio_hidden_states=random(2, 6, 6), encoder_hidden_states=random(2, 4, 8),
        timestep=torch.tensor([0.7, 0.3]), timestep_indices=times, token_tags=tags, position_ids=positions,
        video_indices=video, audio_indices=audio, text_indices=text,
    )  # fmt: skip


@case(
    "SanaVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
    num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
    sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
)  # fmt: skip
def _sana_video():
    return dict(
        hidden_states=random(2, 4, 2, 4, 6), encoder_hidden_states=random(2, 6, 16), timestep=torch.tensor([500, 500]),
        encoder_attention_mask=padded(2, 6),
    )  # fmt: skip


@case(
    "SanaWMTransformer3DModel", in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2,
    patch_size=(1, 1, 1), softmax_every_n=2, linear_head_dim=16, caption_channels=8, mlp_ratio=2.0,
    chunk_plucker_channels=8, chunk_plucker_post_attn_blocks=2,
)  # fmt: skip
def _sana_wm():
    frames, height, width = 2, 4, 6
    poses = torch.eye(4).repeat(1, frames, 1, 1)
    poses[..., 2, 3] = torch.arange(frames) * 0.1
    lens = torch.tensor([float(width), float(height), width / 2, height / 2]).expand(1, frames, 4)
    return dict(
        hidden_states=random(1, 4, frames, height, width), timestep=torch.full((1, 1, frames), 500.0),
        encoder_hidden_states=random(1, 1, 6, 8), encoder_attention_mask=padded(1, 6).long(),
        camera_conditions=torch.cat([poses.flatten(-2), lens], -1), chunk_plucker=random(1, 8, frames, height, width),
    )  # fmt: skip


@case(
    "Cosmos3OmniTransformer", region="vision_tokens", head_dim=6, hidden_size=12, intermediate_size=24,
    latent_channel=2, latent_patch_size=1,
    num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=2, rope_axes_dim=[1, 1, 1],
    vocab_size=32,
)  # fmt: skip
def _cosmos3():
    frames, height, width = 2, 3, 4
    vision = 2 + torch.arange(frames * height * width)
    return dict(
        input_ids=torch.tensor([1, 2]), text_indexes=torch.tensor([0, 1]),
        position_ids=torch.cat([torch.arange(2)[:, None].repeat(1, 3), 2 + grid_ids(frames, height, width).long()]).T,
        und_len=2, sequence_length=2 + len(vision), vision_tokens=[random(1, 2, frames, height, width)],
        vision_token_shapes=[(frames, height, width)], vision_sequence_indexes=vision, vision_mse_loss_indexes=vision,
        vision_timesteps=torch.full((len(vision),), 500.0), vision_noisy_frame_indexes=[torch.arange(frames)],
    )  # fmt: skip


@case(
    "TransformerTemporalModel", num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=1,
    norm_num_groups=2,
)  # fmt: skip
def _temporal():
    return dict(hidden_states=random(4, 8, 4, 6), num_frames=4)
