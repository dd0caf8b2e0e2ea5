"""One file per op family; importing this package fills the registry."""

# ruff: noqa: F401  (each module registers its rules when it is imported)

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
    writing,
)
