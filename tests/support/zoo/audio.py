"""Models of sound and of other one-dimensional signals (a chain of amino acids)."""

from __future__ import annotations

import torch

from .registry import case, padded, random


@case(
    "AceStepTransformer1DModel", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=3,
)  # fmt: skip
def _ace_step():
    return dict(
        hidden_states=random(2, 24, 8), timestep=torch.tensor([0.5, 0.5]), timestep_r=torch.tensor([0.4, 0.4]),
        encoder_hidden_states=random(2, 6, 32), context_latents=random(2, 24, 16),
    )  # fmt: skip


@case(
    "StableAudioDiTModel", sample_size=24, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
    global_states_input_dim=12, cross_attention_input_dim=10,
)  # fmt: skip
def _stable_audio():
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return dict(
        hidden_states=random(2, 4, 24), timestep=torch.tensor([0.5, 0.5]), encoder_hidden_states=random(2, 6, 10),
        global_hidden_states=random(2, 1, 12),
        rotary_embedding=get_1d_rotary_pos_embed(4, 25, use_real=True, repeat_interleave_real=False),
        return_dict=False,
    )  # fmt: skip


@case(
    "StableAudio3DiTModel", io_channels=8, patch_size=1, embed_dim=32, depth=2, num_heads=4, cond_token_dim=16,
    global_cond_dim=12, local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3,
    use_differential_attention=True,
)  # fmt: skip
def _stable_audio3():
    return dict(
        hidden_states=random(2, 8, 24), timestep=torch.tensor([0.5, 0.5]), encoder_hidden_states=random(2, 6, 16),
        global_hidden_states=random(2, 12), encoder_attention_mask=padded(2, 6).bool(),
        local_add_cond=random(2, 5, 24),
    )  # fmt: skip


@case(
    "LongCatAudioDiTTransformer",
    latent="hidden_states",
    dit_dim=64,
    dit_depth=2,
    dit_heads=4,
    dit_text_dim=32,
    latent_dim=8,
)
def _longcat_audio():
    return dict(
        hidden_states=random(2, 24, 8), encoder_hidden_states=random(2, 6, 32),
        encoder_attention_mask=padded(2, 6).bool(), attention_mask=padded(2, 24, 4).bool(),
        timestep=torch.tensor([0.5, 0.5]), latent_cond=random(2, 24, 8),
    )  # fmt: skip


@case(
    "MiniMaxMusic3Transformer1DModel", in_channels=8, condition_dim=16, num_layers=2, num_attention_heads=2,
    attention_head_dim=8, ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8,
)  # fmt: skip
def _minimax_music():
    return dict(
        hidden_states=random(2, 8, 24), encoder_hidden_states=random(2, 24, 16), timestep=torch.tensor([0.5, 0.5])
    )


@case(
    "T5FilmDecoder",
    region="decoder_input_tokens",
    input_dims=6,
    targets_length=24,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_kv=8,
    d_ff=32,
)
def _t5_film():
    return dict(
        encodings_and_masks=[(random(2, 7, 16), padded(2, 7)), (random(2, 5, 16), padded(2, 5))],
        decoder_input_tokens=random(2, 24, 6), decoder_noise_time=torch.tensor([0.5, 0.5]),
    )  # fmt: skip


@case(
    "PriorTransformer", num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=7,
    additional_embeddings=4, refused="no token grid",
)  # fmt: skip
def _prior():
    return dict(
        hidden_states=random(2, 8), timestep=torch.tensor([2, 2]), proj_embedding=random(2, 8),
        encoder_hidden_states=random(2, 7, 8), attention_mask=padded(2, 7).bool(),
    )  # fmt: skip


@case(
    "RFD4ProteinaTransformer", latent="local_latents", region="local_latents", nlayers=2, token_dim=16, nheads=2,
    dim_cond=8, pair_repr_dim=8, latent_dim=8, token_type_emb_dim=4, cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=4,
    xt_pair_dist_dim=6, update_pair_repr_every_n=2, tri_mult_c=8, feats_pair_repr=("xt_bb_ca_pair_dists",),
    feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"), feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
    feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"),
)  # fmt: skip
def _proteina():
    length = 24
    return dict(
        bb_ca=random(2, length, 3), local_latents=random(2, length, 8), bb_ca_time=torch.tensor([0.5, 0.5]),
        local_latents_time=torch.tensor([0.5, 0.5]), padding_mask=padded(2, length, 1).bool(),
        token_type=torch.ones(2, length, dtype=torch.int64),
        conditioning=dict(
            is_in_context_conditioning=torch.zeros(2, length, dtype=torch.bool),
            supports_local_latent=torch.ones(2, length, dtype=torch.bool),
        ),
    )  # fmt: skip
