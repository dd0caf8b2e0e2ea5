"""The products of one attention, which `kernel_sites.py` times: one grouped launch beside one launch for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ras_compile.kernels import grouped_scatter_linear, scatter_linear

__all__ = ["Attention", "Result"]

Result = tuple[Tensor, ...]  # the cache, and the queries of each stream
REST = (1, 0, "none", None, None, 0.0, "none", None, None)  # of the op's arguments, behind the rows: no epilogue


@dataclass
class Attention:
    """Queries, keys and values of the active rows and of the text that stands before the region in a joint cache.

    Attributes:
        streams: for each stream (picture, text): x [B, A, K], the rows of the joint cache that it writes [B or 1, A], and
            three (weight [N, K], bias [N]).
        heads: heads of a key.
        length: rows of the joint cache.
    """

    streams: list[tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]]
    heads: int
    length: int

    @staticmethod
    def drawn(site: Any, rows: Tensor, draw: Any, dtype: torch.dtype) -> Attention:
        """Random values for a `Site`, at these active rows [B, A]; `draw(*shape)` gives normal numbers."""
        streams = []
        text = torch.arange(site.context, device=rows.device)[None]
        for count, places in ((rows.shape[1], rows + site.context), (site.context, text)):
            if count:
                weights = [(draw(site.outputs, site.inputs) / site.inputs**0.5, draw(site.outputs)) for _ in range(3)]
                halves = [(weight.to(dtype), bias.to(dtype)) for weight, bias in weights]
                streams.append((draw(site.batch, count, site.inputs).to(dtype), places, halves))
        return Attention(streams, site.outputs // site.head_dim, site.context + site.tokens)

    def cache(self, dtype: torch.dtype) -> Tensor:
        """Zeros for keys and values: [2, B, heads, context + S, D]."""
        x, _, ((weight, _), *_) = self.streams[0]
        head_dim = weight.shape[0] // self.heads
        return torch.zeros(2, x.shape[0], self.heads, self.length, head_dim, dtype=dtype, device=x.device)

    def members(self, cache: Tensor) -> tuple[list[tuple], Result]:
        """The arguments of each `scatter_linear`, and what they write."""
        found, results = [], [cache]
        for x, rows, ((query, shift), *others) in self.streams:
            results.append(x.new_empty(*x.shape[:2], query.shape[0]))
            count = torch.arange(x.shape[1], device=x.device)[None]
            found.append((results[-1], x, query, shift, count, *REST))
            for part, (weight, bias) in zip(cache, others, strict=True):
                found.append((part.permute(0, 2, 1, 3), x, weight, bias, rows, *REST))
        return found, tuple(results)

    def fused(self, cache: Tensor) -> Result:
        """One launch."""
        members, results = self.members(cache)
        grouped_scatter_linear(*map(list, zip(*members, strict=True)))
        return results

    def apart(self, cache: Tensor) -> Result:
        """One scatter-GEMM for each key and value, and linears for the queries."""
        members, _ = self.members(cache)
        for member in members:
            if member[0].dim() == 4:
                scatter_linear(*member)
        return cache, *(F.linear(x, *weights[0]) for x, _, weights in self.streams)

    def unfused(self, cache: Tensor) -> Result:
        """Linears, and index_put_ into the cache."""
        batch = torch.arange(cache.shape[1], device=cache.device)[:, None]
        for x, rows, (_, *others) in self.streams:
            for part, (weight, bias) in zip(cache, others, strict=True):
                values = F.linear(x, weight, bias).unflatten(-1, (self.heads, -1))
                torch.ops.aten.index_put_(part, [batch, None, rows], values)
        return cache, *(F.linear(x, *weights[0]) for x, _, weights in self.streams)

    def linear(self, cache: Tensor) -> Result:
        """The linears alone."""
        return tuple(F.linear(x, weight, bias) for x, _, weights in self.streams for weight, bias in weights)

    def wide(self) -> Attention:
        """The same in fp32."""
        streams = [
            (x.float(), rows, [(weight.float(), bias.float()) for weight, bias in weights])
            for x, rows, weights in self.streams
        ]
        return Attention(streams, self.heads, self.length)
