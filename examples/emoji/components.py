"""The architecture: a Stable-Diffusion-3 pipeline in small, 128 x 128 pixels, 32 x 32 x 8 latents, 1024 image tokens.

    python examples/emoji/components.py --out /tmp/untrained   # a pipeline folder with random weights, for tests

Text: two CLIP encoders of 128 channels, joined on channels (256); the transformer attends to 48 text tokens.
T5 is an empty chair: `null_t5` answers zeros, exactly what the pipeline puts there itself when it is given no T5. It is
there because `from_pretrained` insists on it; `max_sequence_length` says how many of these zero tokens are appended.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from objects import BACKGROUND_NAMES, COLOUR_NAMES, FILLS, OBJECTS
from recipe import save
from scenes import SceneSampler
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

TEXT_LENGTH = 48
TEXT_WIDTH = 128
VOCABULARY = 2048
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


def tokenizer(captions: int = 20_000) -> CLIPTokenizer:
    """A byte-pair encoding learned from captions: every word of theirs is one token, any other text is spelled."""
    sampler = SceneSampler(seed=7, held_out=None)
    text = [sampler.scene().caption for _ in range(captions)]
    text += [" ".join((*OBJECTS, *COLOUR_NAMES, *BACKGROUND_NAMES, *FILLS))] * 50
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # An unknown character would otherwise become the end-of-text token in the middle of a prompt.
    tokens = [*SPECIAL.values(), *alphabet, *(letter + "</w>" for letter in alphabet)]
    learner.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(alphabet),
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    merges = json.loads(learner.to_str())["model"]["merges"]
    for left, right in merges:
        if (joined := left + right) not in tokens:
            tokens.append(joined)
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in merges],
        unk_token=SPECIAL["eos_token"],
        model_max_length=TEXT_LENGTH,
        **SPECIAL,
    )


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """`b t` token ids -> hidden states `b t 128` (the pipeline takes the last but one) and a pooled `b 128`."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=-(-len(tokens) // 64) * 64,
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,  # the default, 49407, pools the same position whatever the prompt
            pad_token_id=tokens.pad_token_id,
        )
    )


def null_t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 that says nothing: its tokenizer deletes all text, its last norm has weight zero, so it answers zeros."""
    learner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=learner, pad_token="<pad>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )
    model = T5EncoderModel(T5Config(vocab_size=8, d_model=2 * TEXT_WIDTH, d_kv=4, d_ff=4, num_layers=0, num_heads=1))
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model, tokens


def autoencoder() -> AutoencoderKL:
    """`b 3 128 128 <-> b 8 32 32`; scale and shift are set after training, from the latents' statistics."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def transformer(layers: int = 6, heads: int = 4, head_dim: int = 64) -> SD3Transformer2DModel:
    """The MMDiT. Modulations and the last projection start at zero, so that every block starts as the identity."""
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            zero = "norm" in name.rpartition(".")[0] or name == "proj_out"
            torch.nn.init.zeros_(layer.weight) if zero else torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow, Euler steps."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def pipeline() -> StableDiffusion3Pipeline:
    """All components, untrained."""
    tokens = tokenizer()
    t5, t5_tokens = null_t5()
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=scheduler(),
        vae=autoencoder(),
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
        text_encoder_2=text_encoder(tokens),
        tokenizer_2=tokens,
        text_encoder_3=t5,
        tokenizer_3=t5_tokens,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    save(pipeline(), parser.parse_args().out)
