"""Processes that share a model agree before their first step, and end with one sentence where they cannot go on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from across import Split, Transformer, Ulysses, on_ranks

import ras_compile
from ras_compile.errors import RASError

OPTIONS = {"inner_backend": "eager", "unsupported": "error", "metric": "std", "warmup_steps": 1}
STEPS = 4


def generation(rank: int, *, seed: int = 7, ends: int | None = None, **options: Any) -> list[str]:
    """Steps of a transformer over two processes; what kinds they were. One process may end in the middle."""
    torch.manual_seed(seed)
    model = Transformer(lambda: Ulysses(16, 4, dist.group.WORLD)).eval()
    model.compile(backend="ras", options={**OPTIONS, **options})
    latent = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(rank))
    places = torch.randn(24, 16, generator=torch.Generator().manual_seed(10 + rank))
    with torch.no_grad():
        for step in range(STEPS):
            if step == ends:
                os._exit(1)
            latent = latent - 0.1 * model(latent=latent, places=places, time=torch.full((1,), 1 - step / STEPS))
    return [record.kind for record in ras_compile.trace(model)]


def active(
    rank: int, *, tokens: int = 24, replaced: int | None = None, scale: float = 1.0, **options: Any
) -> list[int]:
    """How many tokens each step computes in a process, which may exchange its tokens for others before a step.

    Args:
        scale: of what is added to each token. The larger it is, the less a token's noise changes beside what it is.
    """
    torch.manual_seed(7)
    model = Transformer(lambda: Ulysses(16, 4, dist.group.WORLD)).eval()
    model.compile(backend="ras", options={**OPTIONS, **options})
    latent = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(rank))
    places = scale * torch.randn(tokens, 16, generator=torch.Generator().manual_seed(10 + rank))
    with torch.no_grad():
        for step in range(7):
            latent = torch.randn(latent.shape) if step == replaced else latent
            latent = latent - 0.1 * model(latent=latent, places=places, time=torch.full((1,), 1 - step / 7))
    return [record.active for record in ras_compile.trace(model)]


@pytest.mark.parametrize(
    ("what", "given"),
    [("options", [{}, {"sample_ratio": 0.75}]), ("weights", [{}, {"seed": 8}])],
)
def test_who_differs_is_named_everywhere(what, given):
    for error in on_ranks(2, lambda rank: generation(rank, **given[rank])):
        assert isinstance(error, RASError), error
        assert f"process 1 of 2 has other {what} than process 0; give all of them the same" in str(error)


def test_another_noise_to_start_from_is_named_everywhere():
    """Each process holds the whole latent: with another seed each would draw a picture of both noises."""

    def work(rank: int) -> Any:
        torch.manual_seed(7)
        model = Split(Transformer(lambda: Ulysses(16, 4, dist.group.WORLD)), dist.group.WORLD).eval()
        model.compile(backend="ras", options=OPTIONS)
        latent = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            return model(latent=latent, places=torch.ones(24, 16), time=torch.ones(1))

    for error in on_ranks(2, work):
        assert isinstance(error, RASError) and "process 1 of 2 has other noise to start from than process 0" in str(
            error
        )


def test_one_that_ends_does_not_hang_the_other():
    error, ended = on_ranks(2, lambda rank: generation(rank, ends=2 if rank == 1 else None))
    assert isinstance(ended, EOFError)
    assert isinstance(error, RASError) and "start all processes again" in str(error)


def test_one_that_never_comes_is_named():
    error, _ = on_ranks(2, lambda rank: generation(rank) if rank == 0 else None, timeout=3.0)
    assert isinstance(error, RASError) and "process 1 of 2 did not come to its first step in time" in str(error)


def test_generations_that_are_broken_off_hang_nobody():
    """Each process breaks off the same generations; each step of each of them is of the same kind everywhere."""

    def work(rank: int) -> list[str]:
        chance = torch.Generator().manual_seed(0)
        torch.manual_seed(7)
        model = Transformer(lambda: Ulysses(16, 4, dist.group.WORLD)).eval()
        model.compile(backend="ras", options=OPTIONS)
        kinds = []
        with torch.no_grad():
            for picture in range(40):
                noise = torch.Generator().manual_seed(100 * picture + rank)
                latent, places = torch.randn(1, 24, 4, generator=noise), torch.randn(24, 16, generator=noise)
                last = int(torch.randint(1, 9, (), generator=chance))
                for step in range(last):
                    latent = latent - 0.1 * model(latent=latent, places=places, time=torch.full((1,), 1 - step / 8))
                kinds += [record.kind for record in ras_compile.trace(model)]
        return kinds

    first, second = on_ranks(2, work)
    assert first == second and set(first) == {"dense", "sparse"}


def test_a_tolerance_is_that_of_all():
    """One process's tokens change more than the other's: both compute as many as the error of the first asks for."""

    def work(rank: int) -> list[int]:
        return active(rank, scale=100.0 if rank else 1.0, tolerance=0.04, metric="drift")

    first, second = on_ranks(2, work, timeout=20.0)
    assert first == second and len({*first}) > 2, (first, second)


def test_a_part_that_is_replaced_is_seen_by_all():
    """Nobody tells the steps, and one process's tokens no longer follow from those before: all begin anew."""

    def work(rank: int) -> list[int]:
        return active(rank, tokens=96, replaced=4 if rank else None)

    first, second = on_ranks(2, work, timeout=20.0)
    assert first == second and len(first) == 3 and min(first) < 96, (first, second)  # of the run from there on
