"""The registry of the zoo: a case is a class of the library, a small configuration, and a maker of random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        kind: name of the class in `diffusers.models.transformers`.
        config: keyword arguments of its constructor.
        inputs: makes keyword inputs for a call.
        latent: name of the argument that carries the region; None where the compiler has to find it.
        refused: pattern of the sentence with which the compiler refuses the model; None where it must be supported.
        region: name of the argument that the compiler must take for the latent.
    """

    kind: str
    config: dict[str, Any]
    inputs: Callable[[], dict]
    latent: str | None = None
    refused: str | None = None
    region: str = "hidden_states"

    def build(self) -> nn.Module:
        """The module, weights as the class initialises them."""
        import diffusers.models.transformers as transformers

        return getattr(transformers, self.kind)(**self.config)


ZOO: dict[str, Case] = {}


def case(
    name: str,
    kind: str | None = None,
    *,
    latent: str | None = None,
    refused: str | None = None,
    region: str = "hidden_states",
    **config: Any,
) -> Callable[[Callable[[], dict]], Callable[[], dict]]:
    """Registers a maker of inputs under ``name``, for the class ``kind`` (by default ``name``) built with ``config``."""

    def register(inputs: Callable[[], dict]) -> Callable[[], dict]:
        assert name not in ZOO, name
        ZOO[name] = Case(kind or name, config, inputs, latent, refused, region)
        return inputs

    return register


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Re-draws every parameter so that errors show: matrices at 1.5/sqrt(fan_in), vectors around one or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.5 / fan_in**0.5))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return module


def random(*shape: int, seed: int | None = None) -> Tensor:
    """Standard normal values; the dtype is the default one."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def padded(batch: int, length: int, pad: int = 2) -> Tensor:
    """A mask of ones [batch, length] whose first sample ends in ``pad`` zeros."""
    mask = torch.ones(batch, length)
    mask[0, length - pad :] = 0
    return mask


def grid_ids(*sizes: int, axes: int = 3) -> Tensor:
    """Positions of a grid's tokens [N, axes]: the last ``len(sizes)`` axes count the grid, the others are zero."""
    ids = torch.zeros(*sizes, axes)
    for index, size in enumerate(sizes):
        shape = [-1 if k == index else 1 for k in range(len(sizes))]
        ids[..., axes - len(sizes) + index] += torch.arange(size).reshape(shape)
    return ids.reshape(-1, axes)
