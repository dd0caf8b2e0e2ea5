"""Fused kernels over the two primitives of a row-sparse program, `gather` and `splice`.

Importing this package registers the operators `torch.ops.ras_compile.*`; Triton is optional and CUDA is not needed.

- `scatter_linear`: `linear -> (norm) -> (rotary embedding) -> splice` as one scatter-GEMM that writes the active rows
  straight into the cache. `epilogue_reference` is the part between the linear and the splice.
- `grouped_scatter_linear`: several scatter-GEMMs that do not depend on each other, in one launch.
- `gather_linear`: `gather -> linear (-> add a gathered table)` as one gather-GEMM that reads the active rows itself.
- `row_numbers`: where the rows of a joint sequence go.
- `linear_gelu`: `linear -> gelu` as one product.
- `attention`: attention of few queries to many keys, with equal work for all processors.
- `to_host`, `from_host`, `write_host`: caches in the host's memory, copied beside a program that is `carrying` them.
- `many_linears`: linears of a few rows that read the same input, in one launch.
- `pays`, `pays_grouped`, `gather_pays`, `attention_pays`, `many_pays`: whether they are faster than what they replace, measured
  once per device.
"""

# ruff: noqa: F401  (what is imported is for others)

# Libraries look for Hugging Face's package `kernels`, and in a process that runs from the root of the repository they find
# and import this folder. Registering the operators again would pull the first ones from under those who hold them.
if __name__ != "kernels":
    from .attention import attention, attention_reference
    from .choice import attention_pays, gather_pays, many_pays, pays, pays_grouped
    from .gather_linear import gather_linear, gather_linear_reference
    from .grouped import grouped_scatter_linear
    from .host import carrying, from_host, to_host, write_host
    from .linear_gelu import linear_gelu, linear_gelu_reference
    from .many_linears import many_linears, many_linears_reference
    from .reference import epilogue_reference, scatter_linear_reference
    from .row_numbers import row_numbers
    from .scatter_linear import scatter_linear
else:
    __path__ = []  # and no module of it is found by that name
