"""Batches without end: scenes and tokens come from worker processes, pictures are composed on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scenes import SceneSampler, collate
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase


class Scenes(IterableDataset):
    """Collated training scenes with `tokens` `b t`; a tenth of the captions are empty, for classifier-free guidance."""

    def __init__(
        self, batch: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None, dropout: float = 0.1
    ) -> None:
        self.batch, self.seed, self.tokenizer, self.dropout = batch, seed, tokenizer, dropout

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        sampler = SceneSampler((self.seed, worker.id if worker else 0))
        while True:
            scenes = [sampler.scene() for _ in range(self.batch)]
            out = collate(scenes)
            if self.tokenizer is not None:
                out["tokens"] = tokens_of(
                    self.tokenizer, [scene.caption if sampler.rng.random() >= self.dropout else "" for scene in scenes]
                )
            yield out


def tokens_of(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> torch.Tensor:
    """Captions -> ids `b t`, padded as the pipeline pads them."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def batches(scenes: Scenes, device: str, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """The same, on the device."""
    loader = DataLoader(
        scenes,
        batch_size=None,
        num_workers=workers,
        pin_memory=device == "cuda",
        prefetch_factor=6 if workers else None,
    )
    for batch in loader:
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}
