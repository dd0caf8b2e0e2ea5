"""Muon (Jordan et al., 2024): momentum, orthogonalised by a Newton-Schulz iteration, for the matrices in the blocks.

Matrices of one shape are stacked, so that a step is a few batched products instead of some thousand small ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """`n r c -> n r c`: all singular values pushed toward one by a quintic iteration in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For 2-d parameters. The update's root mean square is 0.2 lr, about that of AdamW, so both take like rates."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        groups: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
        for param in params:
            groups[param.shape].append(param)
        super().__init__(
            [{"params": group} for group in groups.values()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self) -> None:
        """One update of all groups."""
        for group in self.param_groups:
            params = group["params"]
            grad = torch.stack([param.grad for param in params])
            state = self.state[params[0]]
            moment = state.setdefault("moment", torch.zeros_like(grad))
            moment.lerp_(grad, 1 - group["momentum"])
            update = orthogonalise(grad.lerp(moment, group["momentum"]))
            rate = group["lr"] * 0.2 * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-rate)
