"""CUDA graphs without CUDA, for tests."""

from __future__ import annotations

import torch


class Recorded:
    """Stands in for a captured graph: reads the memory that its inputs had when it was captured, holds no values before
    its first replay, and always the same tensors."""

    def __init__(self, compiled, inputs, pool) -> None:
        held = [value.detach() for value in inputs]
        self.run = lambda: compiled(*held)
        self.results = [torch.full_like(r, torch.nan if r.is_floating_point() else 1) for r in self.run()]

    def replay(self) -> None:
        for kept, result in zip(self.results, self.run(), strict=True):
            kept.copy_(result)
