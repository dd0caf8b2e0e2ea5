"""Models over several processes, and how tests run them: forked processes of this one, joined by gloo on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

PATIENCE = 180.0  # seconds until a process that has not answered is ended; a busy machine captures slowly


def on_ranks(count: int, work: Callable[[int], Any], *, timeout: float = PATIENCE) -> list[Any]:
    """What ``work(rank)`` returns in each of ``count`` processes of one group; an exception is returned as such.

    A process that does not answer in time is ended, and its answer is a `TimeoutError`; that of one which ended by itself
    is an `EOFError`.

    Args:
        timeout: seconds that processes wait for each other.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(count)]
        started = [
            context.Process(target=_serve, args=(rank, count, Path(folder) / "store", timeout, send, work))
            for rank, (_, send) in enumerate(ends)
        ]
        for process, (_, send) in zip(started, ends, strict=True):
            process.start()
            send.close()
        last, answers = time.monotonic() + PATIENCE, []
        for receive, _ in ends:
            try:
                waited = receive.poll(max(0.0, last - time.monotonic()))
                answers.append(receive.recv() if waited else TimeoutError("no answer in time"))
            except EOFError as error:
                answers.append(error)
        for process in started:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
    return answers


def _serve(rank: int, count: int, store: Path, timeout: float, send: Connection, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
        )
        answer = work(rank)
    except BaseException as error:
        traceback.print_exc()
        answer = error
    try:
        send.send(answer)
    except Exception:  # an error that cannot be sent as it is
        send.send(RuntimeError(repr(answer)))
    send.close()
    os._exit(0)  # no more of the parent's exit handlers


def launched(rank: int, count: int, port: int) -> None:
    """Tells this process what `torchrun` tells one of its processes; it leaves the group that it is in.

    Args:
        port: a free one of this machine, for each group that is made another one.
    """
    dist.destroy_process_group()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in told.items()}}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def on_a_cpu() -> None:
    """diffusers takes this process's CPU for the accelerator that it asks for, and finds its attention kernels on it."""
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda: torch.device("cpu")
    _KERNELS.impl("_scaled_dot_product_flash_attention", _flash, "CPU")


_KERNELS = torch.library.Library("aten", "IMPL")


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False, **scale
):
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, **scale)
    none = torch.empty(0)
    return out, total, none, none, query.shape[2], key.shape[2], none, none, none


def exchange(x: Tensor, group: Any) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(x, None, None, group))


class Ulysses(nn.Module):
    """Attention whose tokens are sharded over processes, and whose heads are while it attends (DeepSpeed Ulysses).

    Args:
        group: the processes; None attends in this one.
    """

    def __init__(self, width: int, heads: int, group: Any = None, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.group, self.fused = heads, group, fused
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def parts(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, `b s h d`."""
        return [layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v)]

    def scatter(self, x: Tensor) -> Tensor:
        """`b s h d -> b (r s) h/r d`"""
        if self.group is None:
            return x
        b, s, h, d = x.shape
        n = dist.get_world_size(self.group)
        x = x.reshape(b, s, n, h // n, d).permute(2, 1, 0, 3, 4).contiguous()
        return exchange(x, self.group).flatten(0, 1).permute(1, 0, 2, 3)

    def collect(self, x: Tensor) -> Tensor:
        """`b (r s) h/r d -> b s h d`"""
        if self.group is None:
            return x
        b, s, h, d = x.shape
        n = dist.get_world_size(self.group)
        x = x.reshape(b, n, s // n, h, d).permute(1, 3, 2, 0, 4).contiguous()
        return exchange(x, self.group).flatten(0, 1).permute(2, 1, 0, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.scatter(part).transpose(1, 2) for part in self.parts(x))
        return self.out(self.collect(F.scaled_dot_product_attention(q, k, v).transpose(1, 2)).flatten(2))


class Gathered(Ulysses):
    """Attention of this process's queries to the keys and values of all processes, which are gathered."""

    def everyone(self, x: Tensor) -> Tensor:
        if self.group is None:
            return x
        x = funcol.all_gather_tensor(x.transpose(0, 1).contiguous(), 0, self.group)
        return funcol.wait_tensor(x).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        q, k, v = (part.transpose(1, 2) for part in (q, self.everyone(k), self.everyone(v)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Ring(Gathered):
    """Attention to one process's keys after another's, put together by the log-sum-exp of the scores (arXiv 2310.01889).

    Keys and values are sent together, as one stretch of numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.group is None:
            return super().forward(x)
        n, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        sent = torch.cat([k.flatten(), v.flatten()])
        every = funcol.wait_tensor(funcol.all_gather_tensor(sent, 0, self.group)).chunk(n)
        out, total = self.attended(q, k, v)
        for step in range(1, n):
            other = every[(rank + step) % n]
            k, v = other[: k.numel()].reshape_as(k), other[k.numel() :].reshape_as(v)
            more, added = self.attended(q, k, v)
            out = out - torch.sigmoid(added - total) * (out - more)
            total = total - F.logsigmoid(total - added)
        return self.out(out.transpose(1, 2).flatten(2))

    def attended(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """`b h s d`, and the log-sum-exp of the scores, `b h s 1`."""
        q, k, v = (part.transpose(1, 2) for part in parts)
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, total[..., None]


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, feed: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed = attention, feed
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, gate = self.modulation(time)[:, None].chunk(2, -1)
        x = x + gate * self.attention(self.first(x) + shift)
        return x + self.feed(self.second(x))


class Transformer(nn.Module):
    """A Diffusion Transformer on packed tokens: `latent` [B, N, 4], `places` [N, width], `time` [B]."""

    def __init__(
        self, attention: Callable[[], nn.Module], width: int = 16, feed: Callable[[], nn.Module] | None = None
    ):
        super().__init__()
        feed = feed or (lambda: nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)))
        self.embed, self.head, self.clock = nn.Linear(4, width), nn.Linear(width, 4), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width, attention(), feed()) for _ in range(2))

    def forward(self, latent: Tensor, places: Tensor, time: Tensor) -> Tensor:
        x, time = self.embed(latent) + places, self.clock(time[:, None])
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


class Columns(nn.Module):
    """A feed-forward layer whose hidden features are sharded over processes, that add up what each of them makes of its own.

    Args:
        group: the processes; None computes all features in this one.
    """

    def __init__(self, width: int, group: Any = None) -> None:
        super().__init__()
        self.up, self.down, self.group = nn.Linear(width, 32), nn.Linear(32, width, bias=False), group

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return self.down(F.gelu(self.up(x)))
        n, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        part = slice(rank * 32 // n, (rank + 1) * 32 // n)
        hidden = F.gelu(F.linear(x, self.up.weight[part], self.up.bias[part]))
        return funcol.wait_tensor(funcol.all_reduce(F.linear(hidden, self.down.weight[:, part]), "sum", self.group))


class Own(nn.Module):
    """Attention in this process alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Split(nn.Module):
    """A transformer that is called with the whole latent by every process, takes its shard, and gathers the noise.

    Args:
        group: the processes; None computes all tokens in this one.
        first: a layer in front of the split.
    """

    def __init__(self, inner: nn.Module, group: Any = None, first: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.group, self.first = inner, group, first or nn.Identity()

    def forward(self, latent: Tensor, places: Tensor, time: Tensor) -> Tensor:
        latent = self.first(latent)
        if self.group is None:
            return self.inner(latent, places, time)
        n, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        noise = self.inner(latent.chunk(n, dim=1)[rank], places.chunk(n, dim=0)[rank], time)
        return funcol.wait_tensor(funcol.all_gather_tensor(noise.contiguous(), 1, self.group))
