"""Where the rows of a joint sequence go: `before | active tokens | after`, as one tensor that is made once.

Spelled with `arange`, Inductor would make it anew for each op that takes it: two launches for each attention.
"""

import torch
from torch import Tensor


@torch.library.custom_op("ras_compile::row_numbers", mutates_args=())
def row_numbers(rows: Tensor, before: int, tokens: int, after: int) -> Tensor:
    """Rows of a sequence in which the region stands between `before` and `after` other tokens.

    Args:
        rows: active rows of the region, int64 [B, A]; A may be 0.
        before, after: tokens of the sequence in front of the region and behind it, all of which are taken.
        tokens: tokens of the region, N.

    Returns:
        int64 [B, before + A + after]: `0 .. before - 1`, `before + rows`, `before + N .. before + N + after - 1`.
    """
    samples, (end, device) = rows.shape[0], (before + tokens, rows.device)
    head = torch.arange(before, device=device).expand(samples, before)
    tail = torch.arange(end, end + after, device=device).expand(samples, after)
    return torch.cat([head, rows + before, tail], dim=1)


@row_numbers.register_fake
def _(rows: Tensor, before: int, tokens: int, after: int) -> Tensor:
    return rows.new_empty(rows.shape[0], before + rows.shape[1] + after)
