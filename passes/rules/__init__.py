"""One file per op family; importing this package fills the registry."""

from . import attention, concatenation, contraction, convolution, indexing, pointwise, reduction, views

__all__ = ["attention", "concatenation", "contraction", "convolution", "indexing", "pointwise", "reduction", "views"]
