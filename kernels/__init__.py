"""Fused kernels over the two primitives of a row-sparse program, `gather` and `splice`.

Importing this package registers the operators `torch.ops.ras_compile.*`; Triton is optional and CUDA is not needed.

- `scatter_linear`: `linear -> splice` as one scatter-GEMM that writes the active rows straight into the cache.
"""

from .scatter_linear import scatter_linear, scatter_linear_reference

__all__ = ["scatter_linear", "scatter_linear_reference"]
