"""Caches in the host's memory: what is copied there and back is the same, beside a program and without one."""

from __future__ import annotations

import pytest
import torch

from ras_compile import kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("beside", [True, False])
def test_there_and_back(place: str, beside: bool):
    """More caches than are on their way at a time, of two sizes, asked for in order or not; each is written back."""
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device(place)
    values = [torch.randn(3, 64, 40 + 8 * (n % 2), device=device).transpose(0, 1) for n in range(12)]
    with kernels.carrying(device, []):
        caches = [kernels.to_host(value) for value in values]
    assert all(
        cache.device.type == "cpu" and cache.stride() == v.stride() for cache, v in zip(caches, values, strict=True)
    )
    for order in (range(12), [5, 0, 11, *range(1, 5), *range(6, 11)]):
        for number in (1, 2):
            opened = kernels.carrying(device, caches) if beside else kernels.carrying(torch.device("cpu"), [])
            with opened:
                for place_of in order:
                    here = kernels.from_host(caches[place_of], device)
                    assert torch.equal(here, values[place_of]) and here.data_ptr() != caches[place_of].data_ptr()
                    values[place_of] = here + number
                    kernels.write_host(caches[place_of], values[place_of])
    if place == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(cache, value.cpu()) for cache, value in zip(caches, values, strict=True))
