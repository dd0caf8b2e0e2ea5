"""Where the rows of a value stand in memory, found by experiment: index tensors are evaluated for every token.

The addresses that they give are read as digits of a mixed radix, one digit per stride, with which a kernel finds any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import pytree
from ras_compile.passes.fusion.walks import Digits
from ras_compile.passes.rules.collectives import COLLECTIVES

WIDER = {
    torch.bfloat16: torch.float64, torch.float16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Where one product goes, in entries of the spliced view's memory."""

    offset: int
    sample: int  # stride between samples
    rows: Digits  # of a row's number
    channels: Digits
    tokens: bool  # some rows are the active tokens, numbered behind the ``before`` rows of a context
    before: int = 0
    after: int = 0  # rows of a context behind the tokens


def runs_here(node: fx.Node) -> bool:
    """Whether a node can be run in an experiment: a collective would wait for processes that have none on this site."""
    return node.op == "call_function" and node.target not in COLLECTIVES


def evaluate(nodes: Sequence[fx.Node], known: dict[fx.Node, Any]) -> None:
    """Runs nodes on the CPU in double precision; their values are put into ``known``."""

    def real(entry: Any) -> Any:
        if isinstance(entry, torch.device):
            return torch.device("cpu")
        return WIDER.get(entry, entry) if isinstance(entry, torch.dtype) else entry

    for node in nodes:
        if node not in known:
            run: Any = node.target
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: known[operand])
            known[node] = run(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs))


def draws_of(samples: int, active: int, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Active rows [B, A], drawn several times, which together name every token of every sample.

    The last draw has another token than the first one in every place: it tells tokens from a context.
    """
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(samples)])
    order = torch.cat([order, order], 1)
    return [order[:, start : start + active].contiguous() for start in (*range(0, tokens, active), 1)]


def target_of(bases: Tensor, channels: Tensor, draws: Sequence[Tensor], tokens: int, before: int = 0) -> Target | None:
    """Addresses as digits; None where they are no sum of one stride per digit.

    Args:
        bases: addresses of the first channel of each row, [draws, B, rows].
        channels: addresses of a row's channels.
        draws: the active rows of each draw, [B or 1, A]; none where no row is an active token.
        tokens: how many tokens the region has.
        before: how many rows of a context stand before the active tokens.
    """
    samples, table, after = bases.shape[1], bases[0], 0
    if draws:
        end = before + draws[0].shape[1]
        after = bases.shape[-1] - end
        pairs = [(rows.expand(samples, -1), base[:, before:end]) for rows, base in zip(draws, bases, strict=True)]
        table = torch.empty(samples, tokens, dtype=torch.int64)
        for rows, base in pairs:
            table.scatter_(1, rows, base)
        if any(not torch.equal(table.gather(1, rows), base) for rows, base in pairs):
            return None  # not the token alone says where
        table = torch.cat([bases[0, :, :before], table, bases[0, :, end:]], 1)
    sample = int(table[1, 0] - table[0, 0]) if samples > 1 else 0
    if sample < 0 or not torch.equal(table, table[:1] + sample * torch.arange(samples)[:, None]):
        return None
    rows_at, channels_at = digits_of(table[0] - table[0, 0]), digits_of(channels - channels[0])
    if rows_at is None or channels_at is None:
        return None
    return Target(int(table[0, 0]), sample, rows_at, channels_at, bool(draws), before, after)


def ancestors(nodes: Sequence[fx.Node], rows: fx.Node) -> list[fx.Node] | None:
    """What computes the nodes from the active rows, in order; None where something else enters."""
    wanted: dict[fx.Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node is rows or node in wanted:
            continue
        if not runs_here(node):
            return None
        wanted[node] = None
        stack += node.all_input_nodes
    return [node for node in rows.graph.nodes if node in wanted]


def digits_of(numbers: Tensor) -> Digits | None:
    """`numbers[i] = sum of digit * stride` over the digits of i in a mixed radix: the fewest (size, stride), or None.

    `[0, 1, 8, 9, 16, 17]` is ((3, 8), (2, 1)).
    """
    result: list[tuple[int, int]] = []
    while numbers.numel() > 1:
        stride, count = int(numbers[1]), numbers.numel()
        if stride <= 0:
            return None
        run = numbers == torch.arange(count) * stride
        size = count if bool(run.all()) else int((~run).nonzero()[0])
        if count % size:
            return None
        table = numbers.view(-1, size)
        if not torch.equal(table, table[:, :1] + torch.arange(size) * stride):
            return None
        result.append((size, stride))
        numbers = table[:, 0].contiguous()
    return tuple(reversed(result))
