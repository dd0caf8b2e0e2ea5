"""`flex_attention` is attention with a mask: the same numbers as PyTorch's own, and clear words where it is not."""

from __future__ import annotations

import pytest
import torch
from contract import error, subject
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import ras_compile

TOKENS = 24


class Flexible(nn.Module):
    """`[B, 24, 8] -> [B, 24, 8]`, with attention as ``attend(q, k, v, x)`` says."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 3 * 16), nn.Linear(16, 8)
        self.attend = attend

    def forward(self, x):
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v, x).transpose(1, 2).flatten(2))


def masked(function):
    def attend(q, k, v, x):
        mask = create_block_mask(function, None, None, TOKENS, TOKENS, device=x.device)
        return flex_attention(q, k, v, block_mask=mask)

    return attend


def listed(q, k, v, x):
    """Block lists made by hand: of blocks of 8, the first row sees block 0 whole and block 1 in part, the others block 2."""
    counts = torch.tensor([[[1, 0, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[1, 0, 0], [0, 0, 0], [0, 0, 0]]], dtype=torch.int32)[None]
    full = torch.tensor([[[1, 1, 1]]], dtype=torch.int32)
    places = torch.tensor([[[0, 0, 0], [2, 0, 0], [2, 0, 0]]], dtype=torch.int32)[None]
    mask = BlockMask.from_kv_blocks(counts, indices, full, places, BLOCK_SIZE=8, mask_mod=lambda b, h, i, j: i >= j - 8)
    return flex_attention(q, k, v, block_mask=mask)


def frames(q, k, v, x):
    frame = torch.arange(TOKENS, device=x.device) // 8
    mask = create_block_mask(lambda b, h, i, j: frame[i] >= frame[j], None, None, TOKENS, TOKENS, device=x.device)
    return flex_attention(q, k, v, block_mask=mask)


POSITIONS = {
    "window": masked(lambda b, h, i, j: (i - j).abs() < 5),
    "per head": masked(lambda b, h, i, j: i >= j + h),
    "frames": frames,
    "rows that see nothing": masked(lambda b, h, i, j: (i >= j) & (i < 20)),
    "no mask": lambda q, k, v, x: flex_attention(q, k, v),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_mask_of_positions(name: str):
    model = Flexible(POSITIONS[name]).eval()
    x = torch.randn(2, TOKENS, 8)
    case = subject(model, {"x": x}, exact=False)
    dense, caches = case.dense(case.values)
    with torch.no_grad():
        assert error(dense, [model(x)]) < 1e-5
    assert case.frame.tokens == TOKENS
    values, rows = case.with_latent(case.other_latent()), case.rows(6)
    outputs, _ = case.sparse(values, rows, caches)
    assert error(outputs, case.oracle(values, rows, caches)) < 1e-5


def test_block_lists_count():
    """As in the compiled kernel: PyTorch's eager form looks at the function alone."""
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    seen = torch.where(i < 8, (j < 8) | ((j < 16) & (i >= j - 8)), j >= 16)
    x = torch.randn(2, TOKENS, 8)
    model = Flexible(listed).eval()
    case = subject(model, {"x": x}, exact=False)
    dense, _ = case.dense(case.values)
    model.attend = lambda q, k, v, x: nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    with torch.no_grad():
        assert error(dense, [model(x)]) < 1e-5


def of_values(q, k, v, x):
    kept = x[..., 0] > 0
    mask = create_block_mask(lambda b, h, i, j: kept[b, j], len(x), None, TOKENS, TOKENS, device=x.device)
    return flex_attention(q, k, v, block_mask=mask)


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (
            lambda q, k, v, x: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)),
            "function of the scores",
        ),
        (of_values, "depends on the values of `x`"),
        (lambda q, k, v, x: flex_attention(q, k[:, :1], v[:, :1], enable_gqa=True), "fewer heads of keys"),
    ],
    ids=["scores", "values", "heads"],
)
def test_what_is_refused(attend, why: str):
    model = Flexible(attend).eval()
    with pytest.raises(ras_compile.UnsupportedGraph, match=why):
        subject(model, {"x": torch.randn(2, TOKENS, 8)}, exact=False)
    assert torch.func.vmap(torch.sin)(torch.zeros(3)).tolist() == [0, 0, 0]  # no transform was left open
    torch.nn.Linear(2, 2)
