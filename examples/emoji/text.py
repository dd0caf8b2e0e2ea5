"""Words for the smaller models: a tokenizer with one token a word, and a T5 encoder that learns with the transformer.

T5 knows only distances between words, so that a prompt may be padded to any length: the pipelines' defaults work.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

TEXT_LENGTH = 32  # tokens; the longest caption has 27
TEXT_WIDTH = 128


def word_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Every word of the captions is a token, digits stand alone, any other word is `<unk>`; `</s>` ends a text."""
    learner = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}\s-]"), " ")]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    words = {word for caption in captions for word, _ in learner.pre_tokenizer.pre_tokenize_str(caption.lower())}
    vocabulary = ["<pad>", "</s>", "<unk>", *"0123456789", *sorted(words - set("0123456789"))]
    learner.model = models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")
    learner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def t5(
    tokens: PreTrainedTokenizerFast, layers: int = 2, config: type = T5Config, model: type = T5EncoderModel
) -> T5EncoderModel | UMT5EncoderModel:
    """Token ids and their mask `b t` -> hidden states `b t 128`."""
    return model(
        config(
            vocab_size=-(-len(tokens) // 64) * 64,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=layers,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def umt5(tokens: PreTrainedTokenizerFast, layers: int = 2) -> UMT5EncoderModel:
    """The same with distances learned by each layer, which is what Wan's pipeline expects."""
    return t5(tokens, layers, UMT5Config, UMT5EncoderModel)


def ids_of(tokens: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Captions -> ids `b t`, padded as the pipelines pad them; where an id is 0 there is no word."""
    return tokens(
        captions, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
