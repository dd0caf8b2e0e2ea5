"""The architecture: a PixArt-Sigma pipeline in small, 128 x 128 pixels, 32 x 32 x 8 latents, 1024 image tokens.

    python examples/pixart/pixart.py --runs runs/pixart --out examples/pixart

The autoencoder is that of `examples/emoji`: the folder holds a link to it, and no copy. This pipeline subtracts no
mean from latents, so that the model learns them as they are, times `scaling_factor`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
EMOJI = HERE.parent / "emoji"
if str(EMOJI) not in sys.path:
    sys.path.append(str(EMOJI))  # the emoji example is a folder of scripts that import each other

import recipe  # noqa: E402  (found through the line above)
from scenes import SceneSampler  # noqa: E402
from text import TEXT_WIDTH, t5, word_tokenizer  # noqa: E402

VAE = EMOJI / "pipeline" / "vae"
SCHEDULE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def tokenizer(captions: int = 20_000) -> PreTrainedTokenizerFast:
    """All words of the captions of `scenes.py`."""
    sampler = SceneSampler(seed=7, held_out=None)
    return word_tokenizer(sampler.scene().caption for _ in range(captions))


def transformer(layers: int = 5, heads: int = 3, head_dim: int = 64) -> PixArtTransformer2DModel:
    """Text in cross-attention, one modulation for all blocks; at the start every block is the identity."""
    model = PixArtTransformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    recipe.start_as_identity(model, "proj_out", "adaln_single.linear", "attn2.to_out.0")
    return model


def scheduler(prediction: str = "v_prediction") -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order, as PixArt has it, over the linear variances of DDPM."""
    return DPMSolverMultistepScheduler(**SCHEDULE, prediction_type=prediction)


class Model(nn.Module):
    """What is trained: ids `b t`, noisy latents `b 8 32 32`, timesteps `b` -> prediction `b 8 32 32`."""

    def __init__(self, tokens: PreTrainedTokenizerFast, **shape: int) -> None:
        super().__init__()
        self.text = t5(tokens)
        self.transformer = transformer(**shape)

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `b t 128` and the mask `b t` of the words that there are."""
        mask = (ids > 0).long()
        return self.text(ids, attention_mask=mask).last_hidden_state, mask


def pipeline(model: Model, tokens: PreTrainedTokenizerFast, prediction: str) -> PixArtSigmaPipeline:
    """All components."""
    return PixArtSigmaPipeline(
        tokenizer=tokens,
        text_encoder=model.text,
        vae=AutoencoderKL.from_pretrained(VAE),
        transformer=model.transformer,
        scheduler=scheduler(prediction),
    )


def save(pipe: PixArtSigmaPipeline, folder: Path) -> None:
    """Write the folder as all recipes do, but the autoencoder as a link."""
    vae = folder / "vae"
    if vae.is_symlink():  # left by an earlier call: the files behind it must not be written over
        vae.unlink()
    recipe.save(pipe, folder)
    shutil.rmtree(vae)
    vae.symlink_to(os.path.relpath(VAE, folder), target_is_directory=True)


def export(runs: Path, out: Path) -> None:
    """What train_pixart.py left in `runs` -> `out/pipeline`, a `PixArtSigmaPipeline`, and `out/results/training.json`."""
    told = json.loads((runs / "pixart.json").read_text())
    tokens = tokenizer()
    model = Model(tokens, **told["shape"])
    model.load_state_dict(load_file(runs / "pixart.safetensors"))
    save(pipeline(model, tokens, told["prediction"]), out / "pipeline")
    recipe.keep_record(runs / "pixart.json", out)


if __name__ == "__main__":
    recipe.export_command(__doc__, "runs/pixart", HERE, export)
