"""Tiny pipelines of diffusers' own classes with random weights, for what the shipped model cannot do: edit, film, sing.

They draw nothing that one could look at, and take seconds on a CPU: what they show is that the same lines run on real weights.
A text becomes random numbers that are always the same for it, so that no text encoder is needed, and each has one size, whatever
size it is asked for.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from torch import Tensor, nn

__all__ = ["audio", "editing", "text_to_image", "video"]


def text_to_image(kind: str = "StableDiffusion3Pipeline") -> Any:
    """Pictures of 32 x 32 pixels, 8 x 8 = 64 tokens."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        **dict.fromkeys(
            ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
        ),
        transformer=_drawn(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(down=2, channels=16),
    )

    def encode(prompt: Any, *, negative_prompt: Any = None, num_images_per_prompt: int = 1, **given: Any) -> tuple:
        said = _listed(prompt)
        unsaid = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(said)
        parts = _embedded(said, 3, 16), _embedded(unsaid, 3, 16), _embedded(said, 8), _embedded(unsaid, 8)
        return tuple(part.repeat_interleave(num_images_per_prompt, 0) for part in parts)

    return _speaking(pipe, encode, height=32, width=32)


def editing() -> Any:
    """A picture and a wish make another picture; the tokens of the first one stand behind those of the second."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    pipe = diffusers.FluxKontextPipeline(
        **dict.fromkeys(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")),
        transformer=_drawn(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(down=1, channels=4),
    )

    def encode(prompt: Any, **given: Any) -> tuple:
        return _embedded(prompt, 3, 16), _embedded(prompt, 8), torch.zeros(3, 3)

    return _speaking(pipe, encode, height=16, width=16, max_area=256, _auto_resize=False)


def video() -> Any:
    """Two transformers: one for the first part of the steps, one for the rest."""

    def transformer(seed: int) -> nn.Module:
        model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=16, num_layers=2,
        )  # fmt: skip
        return _drawn(model, seed)

    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(0), transformer_2=transformer(1), boundary_ratio=0.5,
    )  # fmt: skip

    def encode(prompt: Any, negative_prompt: Any = None, **given: Any) -> tuple:
        return _embedded(prompt, 3, 16), _embedded(negative_prompt or "", 3, 16)

    return _speaking(pipe, encode, height=32, width=32, num_frames=5, output_type="latent")


def audio() -> Any:
    """Sound of 24 tokens."""
    transformer = diffusers.StableAudioDiTModel(
        sample_size=24, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=20, cross_attention_input_dim=10,
    )  # fmt: skip
    torch.manual_seed(0)
    pipe = diffusers.StableAudioPipeline(
        tokenizer=None, text_encoder=None, transformer=_drawn(transformer),
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
            decoder_input_channels=4, audio_channels=1, sampling_rate=80,
        ).eval(),
        projection_model=StableAudioProjectionModel(10, 10, 0, 4).eval(),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
    )  # fmt: skip

    def encode(prompt: Any, device: Any, guided: bool, negative_prompt: Any = None, *given: Any) -> Tensor:
        text = _embedded(prompt, 3, 10)
        return torch.cat([_embedded(negative_prompt, 3, 10), text]) if guided and negative_prompt else text

    return _speaking(pipe, encode)


def _drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random weights; matrices at 1 / sqrt(fan-in), so that values keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return module.eval()


def _vae(down: int, channels: int) -> nn.Module:
    """An autoencoder that halves the sides `down - 1` times."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * down, "up_block_types": ("UpDecoderBlock2D",) * down}
    sizes = {"block_out_channels": (4,) * down, "norm_num_groups": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**kinds, **sizes, shift_factor=0.0, scaling_factor=1.0).eval()


def _listed(prompt: Any) -> list[str]:
    return prompt if isinstance(prompt, list) else [prompt]


def _embedded(prompt: Any, *shape: int) -> Tensor:
    """Random numbers [B, *shape], always the same for a text."""
    seeds = [zlib.crc32(text.encode()) for text in _listed(prompt)]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _speaking(pipe: Any, encode: Callable[..., Any], **size: Any) -> Any:
    """The pipeline with `encode` in the place of its text encoders, and of one size."""
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **given: Any) -> Any:
        return kind.__call__(self, *args, **{**given, **size})

    pipe.__class__ = type(kind.__name__, (kind,), {"encode_prompt": staticmethod(encode), "__call__": call})
    pipe.set_progress_bar_config(disable=True)
    return pipe
