"""What processes that each have a part of the tokens tell each other: here the active rows."""

from __future__ import annotations

import torch

from ras_compile.passes.algebra.layout import Frame, Group
from ras_compile.passes.algebra.tokens import token_view
from ras_compile.plans.spread import Spread

SIZE, TOKENS = 3, 4
FRAME = Frame.of((2, SIZE * TOKENS, 1))


def spread(rank: int, monkeypatch, everyones: torch.Tensor) -> Spread:
    """That of one process, to which the others have sent theirs: ``everyones`` is of each process, in their order."""
    frame = FRAME.across(Group("all", SIZE, rank), None).sharded(rank * TOKENS, (rank + 1) * TOKENS)
    view = token_view(frame.layout(), frame)
    monkeypatch.setattr(Spread, "gathered", lambda self, mine: everyones)
    return Spread(frame, view, view)


def test_rows_of_all_processes_stand_among_all_tokens(monkeypatch):
    rows = torch.tensor([[[0, 2], [1, 3]], [[1, 2], [0, 1]], [[0, 3], [2, 3]]])  # by process and sample
    wanted = [[0, 2, 5, 6, 8, 11], [1, 3, 4, 5, 10, 11]]
    assert spread(1, monkeypatch, rows).rows(rows[1]).tolist() == wanted
