"""A program that is compiled once for all lengths of the context, and what of its inputs depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ras_compile.execute.inner import Compiled
from ras_compile.passes.lowering.interpolate import Form, NotAffine, Point, fit
from ras_compile.plans.symbolic import Symbols


@dataclass(frozen=True)
class Sized:
    """Sizes and strides of a tensor as functions of the lengths."""

    sizes: tuple[Form, ...]
    strides: tuple[Form | int, ...]  # a function, or the dimension whose extent it is

    @classmethod
    def of(cls, points: Sequence[Point], tensors: Sequence[Tensor]) -> Sized:
        """From what it is at these points.

        Raises:
            NotAffine: it has no such form.
        """
        sizes = [fit(points, values) for values in zip(*(tuple(t.shape) for t in tensors), strict=True)]
        strides: list[Form | int | None] = []
        for values in zip(*(t.stride() for t in tensors), strict=True):
            whole = [(t, v) for t, v in zip(tensors, values, strict=True)]
            inner = (
                d for d in range(len(sizes)) if all(t.shape[d] > 1 and t.stride(d) * t.shape[d] == v for t, v in whole)
            )
            strides.append(fit(points, values) or next(inner, None))
        known_sizes, known_strides = [s for s in sizes if s is not None], [s for s in strides if s is not None]
        if len(known_sizes) < len(sizes) or len(known_strides) < len(strides):
            raise NotAffine(f"a tensor of shape {tuple(tensors[0].shape)} and strides {tensors[0].stride()}")
        return cls(tuple(known_sizes), tuple(known_strides))

    @property
    def varies(self) -> bool:
        """Whether it depends on the lengths."""
        return any(isinstance(one, int) or one.varies for one in (*self.sizes, *self.strides))

    def at(self, lengths: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Sizes and strides for these lengths, which may be symbols."""
        sizes = [size(lengths) for size in self.sizes]

        def stride(dim: int) -> Any:
            found = self.strides[dim]
            return found(lengths) if isinstance(found, Form) else stride(found) * sizes[found]

        return sizes, [stride(dim) for dim in range(len(sizes))]

    def fits(self, tensor: Tensor, point: Point) -> bool:
        sizes, strides = self.at(point)
        return list(tensor.shape) == sizes and all(
            size == 1 or a == b for size, a, b in zip(sizes, tensor.stride(), strides, strict=True)
        )


@dataclass(frozen=True)
class Shared:
    """A program for all lengths: takes the lengths, then its inputs."""

    compiled: Compiled  # the program
    symbols: Symbols  # what compiling it has assumed of the lengths
    sized: list[Sized]  # its inputs

    def fits(self, point: Point, inputs: Sequence[Tensor]) -> bool:
        """Whether it is right for these inputs."""
        return self.symbols.holds(point) and all_fit(self.sized, point, inputs)


def all_fit(sized: Sequence[Sized], point: Point, inputs: Sequence[Tensor]) -> bool:
    """Whether inputs have the sizes and strides that are expected of them at these lengths."""
    return all(one.fits(tensor, point) for one, tensor in zip(sized, inputs, strict=True))
