"""A server's step-level batching: one call of the model holds requests that are at different steps, and they come and go."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny import EAGER, TinyDiT
from torch import Tensor

import ras_compile

STEPS = 8


@dataclass
class Request:
    latent: Tensor
    text: Tensor
    step: int = 0


def request(number: int) -> Request:
    generator = torch.Generator().manual_seed(number)
    return Request(torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 6, generator=generator))


@torch.no_grad()
def serve(model, arrivals: dict[int, int], size: int, of) -> tuple[list[Tensor], str]:
    """The requests' last latents, and a letter for each call; at most `size` at a time, each from the tick of its arrival on."""
    waiting = [(tick, request(number)) for number, tick in arrivals.items()]
    running: list[Request] = []
    done, kinds, tick = {}, "", 0
    while waiting or running:
        while waiting and waiting[0][0] <= tick and len(running) < size:
            running.append(waiting.pop(0)[1])
        tick += 1
        if not running:
            continue
        time = torch.tensor([1 - each.step / STEPS for each in running])
        noise = model(torch.cat([each.latent for each in running]), time, torch.cat([each.text for each in running]))
        kinds += ras_compile.trace(of)[-1].kind[0] if of is not None else ""
        for each, own in zip(running, noise.split(1), strict=True):
            each.latent, each.step = each.latent - own / STEPS, each.step + 1
        done |= {id(each): each.latent for each in running if each.step == STEPS}
        running = [each for each in running if each.step < STEPS]
    return list(done.values()), kinds


@pytest.mark.parametrize(
    ("arrivals", "size", "expected"),
    [
        ({1: 0, 2: 0}, 2, "ddssssss"),
        ({1: 0, 2: 3}, 2, "dds" + "ddsss" + "dds"),  # one joins; one leaves
        (
            {1: 0, 2: 3, 3: 3},
            2,
            "dds" + "ddsss" + "dds" + "ddsss",
        ),  # one takes the other's place: a batch of the same size
    ],
)
def test_whoever_comes_or_goes_begins_with_dense_steps(arrivals, size, expected):
    torch.manual_seed(0)
    plain = TinyDiT().eval()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "sample_ratio": 1.0})
    pictures, kinds = serve(compiled, arrivals, size, compiled)
    assert kinds == expected
    torch.testing.assert_close(pictures, serve(plain, arrivals, size, None)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reuse", ["hold", "forecast"])
def test_requests_at_different_steps_are_near_what_each_is_alone(reuse):
    """With half of the tokens each picture stays nearer to its own dense one than the two are to each other."""
    torch.manual_seed(0)
    plain = TinyDiT().eval()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "sample_ratio": 0.5, "noise_reuse": reuse})
    pictures, kinds = serve(compiled, {1: 0, 2: 3}, 2, compiled)
    assert "s" in kinds[3:]
    expected = serve(plain, {1: 0, 2: 3}, 2, None)[0]
    for found, dense in zip(pictures, expected, strict=True):
        assert float((found - dense).norm()) < 0.1 * float((expected[0] - expected[1]).norm())
