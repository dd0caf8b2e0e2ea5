"""One file per op family; importing this package fills the registry."""

from ras_compile.passes.rules import (
    attention,
    collectives,
    concatenation,
    contraction,
    convolution,
    indexing,
    pointwise,
    reduction,
    resampling,
    token_wise,
    views,
)

__all__ = [
    "attention",
    "collectives",
    "concatenation",
    "contraction",
    "convolution",
    "indexing",
    "pointwise",
    "reduction",
    "resampling",
    "token_wise",
    "views",
]
