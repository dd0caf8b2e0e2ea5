"""The architecture: a Wan pipeline in small, nine frames of 64 x 64 pixels, 5 x 16 x 16 x 8 latents, 1280 video tokens.

    python examples/wan/wan.py --runs runs/wan --out examples/wan

Wan appends zeros to the hidden states of a short prompt, and attends to them: `max_sequence_length=32`, as trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from motion import ClipSampler  # puts the emoji scripts on the path
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

import recipe  # isort: skip
from text import TEXT_WIDTH, umt5, word_tokenizer  # isort: skip

HERE = Path(__file__).parent
LATENTS = 8


def tokenizer(captions: int = 20_000) -> PreTrainedTokenizerFast:
    """All words of the captions of `motion.py`."""
    sampler = ClipSampler(seed=7, split=None)
    return word_tokenizer(sampler.clip().caption for _ in range(captions))


def autoencoder(width: int = 12) -> AutoencoderKLWan:
    """`b 3 9 64 64 <-> b 8 5 16 16`; means and deviations are set after training, from the latents' statistics."""
    return AutoencoderKLWan(
        base_dim=width,
        z_dim=LATENTS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def decoded(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents -> videos that no clamp cuts off, which a gradient would stop at; else as `AutoencoderKLWan.decode`."""
    vae.clear_cache()
    hidden, frames = vae.post_quant_conv(latents), []
    for frame in range(latents.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, frame : frame + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=frame == 0,
            )
        )
    vae.clear_cache()
    return torch.cat(frames, 2)


def transformer(layers: int = 4, heads: int = 3, head_dim: int = 64, feed_forward: int = 512) -> WanTransformer3DModel:
    """One token a latent; at the start every block is the identity."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=LATENTS,
        out_channels=LATENTS,
        text_dim=TEXT_WIDTH,
        ffn_dim=feed_forward,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    recipe.start_as_identity(model, "proj_out", "condition_embedder.time_proj", "attn2.to_out.0")
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow, Euler steps."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


class Model(nn.Module):
    """What is trained: ids `b t`, noisy latents `b 8 5 16 16`, noise levels `b` -> velocity `b 8 5 16 16`."""

    def __init__(self, tokens: PreTrainedTokenizerFast, **shape: int) -> None:
        super().__init__()
        self.text = umt5(tokens)
        self.transformer = transformer(**shape)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """As the pipeline does: hidden states `b t 128`, zero where there is no word."""
        mask = (ids > 0).long()
        return self.text(ids, attention_mask=mask).last_hidden_state * mask[..., None]


def export(runs: Path, out: Path) -> None:
    """What train_wan.py left in `runs` -> `out/pipeline`, a `WanPipeline`, `out/judge.safetensors`, `out/results/`."""
    settings = json.loads((runs / "wan.json").read_text())
    tokens = tokenizer()
    model, vae = Model(tokens, **settings["shape"]), autoencoder()
    model.load_state_dict(load_file(runs / "wan.safetensors"))
    vae.load_state_dict(load_file(runs / "wan_vae.safetensors"))
    vae.register_to_config(latents_mean=settings["latents_mean"], latents_std=settings["latents_std"])
    pipe = WanPipeline(
        tokenizer=tokens, text_encoder=model.text, vae=vae, scheduler=scheduler(), transformer=model.transformer
    )
    recipe.save(pipe, out / "pipeline")
    shutil.copyfile(runs / "wan_judge.safetensors", out / "judge.safetensors")
    recipe.keep_record(runs / "wan.json", out)


if __name__ == "__main__":
    recipe.export_command(__doc__, "runs/wan", HERE, export)
