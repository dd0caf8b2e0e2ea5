"""The kernels' share of what PyTorch does not promise to keep (`ras_compile/_torch.py` has the rest)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx


def cache_folder() -> Path:
    """Where Inductor keeps what it has compiled; without it our timings have no folder beside it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # loaded when timings are first read

    return Path(cache_dir())


def inductor(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A graph compiled by Inductor alone. Not `torch.compile`: this runs while Dynamo compiles, which cannot be nested.

    Without it a fused kernel is compared with PyTorch's own ops instead of Inductor's, which are faster.
    """
    from torch._inductor.compile_fx import compile_fx  # loaded when a fused kernel is first timed

    compiled: Any = compile_fx(graph, inputs)
    return compiled


def linear_gelu_tanh(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(linear(rows, weight, bias), approximate="tanh")` [M, N] in one product on CUDA: cuBLAS applies the activation.

    Without it the two run one after the other. Rows [M, K], weight [N, K], bias [N].
    """
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
