"""Whole numbers among the weights, such as an order of tokens: a plan may rest on their values, and is then for these alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ras_compile.capture.inputs import GraphInput
from ras_compile.plans.latent import is_fixed
from ras_compile.sampling.branches import versions_of


def same_objects(tensors: Sequence[Tensor], seen: Sequence[weakref.ref]) -> bool:
    return all(value is other() for value, other in zip(tensors, seen, strict=True))


class Fixed:
    """Tells by a number which values they have: 0 for the first ones, and another one for each that differ."""

    def __init__(self, inputs: Sequence[GraphInput], values: Sequence[Any]) -> None:
        self.places = [
            index for index, (given, value) in enumerate(zip(inputs, values, strict=True)) if is_fixed(given, value)
        ]
        self._known: list[list[Tensor]] = []
        self._seen: tuple[list[weakref.ref], list[int | None], int] = [], [], -1
        if self.places:
            self.token(values)

    def token(self, values: Sequence[Any]) -> int:
        """The number of these values. They are read where one is another object, or was written to, and only then."""
        tensors = [values[index] for index in self.places]
        seen, versions, token = self._seen
        now = versions_of(tensors)
        if None not in now and now == versions and same_objects(tensors, seen):
            return token
        found = [tensor.detach().cpu() for tensor in tensors]
        equal = [all(map(torch.equal, known, found)) for known in self._known]
        if not any(equal):
            self._known.append([tensor.clone() for tensor in found])
        token = equal.index(True) if any(equal) else len(self._known) - 1
        self._seen = [weakref.ref(tensor) for tensor in tensors], now, token
        return token
