"""Ops written with others that mean the same: PyTorch's fused layers, which its modules call where no gradients are recorded,
and views by strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """`b n c -> b n c`: `nn.TransformerEncoderLayer`.

    Args:
        mask: its entries other than zero hide keys; [N, N] (``mask_type`` 0), [B, N] (1) or [B, H, N, N] (2).
    """
    if mask is not None:
        mask = ~(mask[:, None, None] if mask_type == 1 else mask).to(torch.bool)

    def attend(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(first(src))
        return src + feed(second(src))
    src = first(src + attend(src))
    return second(src + feed(src))


def strided(self: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """`as_strided` of a value whose entries fill its memory, where the strides walk it without overlapping: views and slices.

    Raises:
        NotImplementedError: they overlap, or reach beyond the value.
    """
    order = sorted(range(self.ndim), key=self.stride, reverse=True)
    packed = self.permute(order)
    offset = (self.storage_offset() if storage_offset is None else storage_offset) - self.storage_offset()
    walked = sorted((dim for dim in range(len(size)) if size[dim] > 1 and stride[dim]), key=lambda dim: -stride[dim])
    if not packed.is_contiguous() or offset < 0 or not self.numel() or 0 in size:
        raise NotImplementedError("the value leaves out a part of its memory")
    steps = [stride[dim] for dim in walked]
    pairs = [*zip([self.numel(), *steps], [*steps, 1], strict=True)]
    if any(above % below for above, below in pairs) or offset >= self.numel():
        raise NotImplementedError("strides that do not divide each other")
    radices = [above // below for above, below in pairs]
    result = packed.reshape(radices)
    for place, (dim, step) in enumerate(zip([*walked, None], [*steps, 1], strict=True)):
        start, length = offset // step % radices[place], 1 if dim is None else size[dim]
        if start + length > radices[place]:
            raise NotImplementedError("rows of strides that overlap")
        result = result.narrow(place, start, length)
    result = result.squeeze(-1).permute([walked.index(dim) for dim in sorted(walked)])
    shape = [length if stride[dim] else 1 for dim, length in enumerate(size)]
    return result.reshape(shape).expand(list(size))


def likeness(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """`a b, a b -> a`: `F.cosine_similarity`, whose own parts write into each other."""
    first, second = torch.broadcast_tensors(*(x.to(torch.promote_types(x1.dtype, x2.dtype)) for x in (x1, x2)))
    units = [x / torch.linalg.vector_norm(x, 2, dim, keepdim=True).clamp_min(eps) for x in (first, second)]
    return (units[0] * units[1]).sum(dim)


LAYERS: dict[Any, Callable[..., Any]] = {
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
    aten.as_strided.default: strided,
    aten.cosine_similarity.default: likeness,
}
