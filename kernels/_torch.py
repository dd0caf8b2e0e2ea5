"""The kernels' share of what PyTorch and Triton do not promise to keep (`ras_compile/_torch.py` has the rest)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx


def cache_folder() -> Path:
    """Where Inductor keeps what it has compiled; without it our timings have no folder beside it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # loaded when timings are first read

    return Path(cache_dir())


def compiled_by_triton() -> list[Path]:
    """Triton's files, each in a folder of its variant, of what it has compiled of this package's kernels in this process.

    Without it `save` leaves them out, and another process compiles them. Code that is no binary is left out: nothing runs it.
    """
    from .gemm import triton  # None where there is none

    if triton is None:
        return []
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{__package__}.")]
    held = {id(value): value for module in modules for value in vars(module).values()}
    functions = [value for value in held.values() if isinstance(value, triton.JITFunction)]
    variants = [each for one in functions for known, *_ in one.device_caches.values() for each in known.values()]
    found = [Path(path) for variant in variants for path in variant.metadata_group.values()]
    return [path for path in found if path.suffix in (".json", ".cubin", ".hsaco")]


def launched_by_inductor() -> list[Path]:
    """Triton's files of the variants that Inductor launches in this process: what it compiled beyond those that its own cache
    holds, such as one with smaller blocks. Without it another process compiles these."""
    from .gemm import triton  # None where there is none

    if triton is None:
        return []
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime.cache import FileCacheManager

    held = [value for module in PyCodeCache.modules for value in vars(module).values()]
    launchers = [each for one in held if isinstance(one, CachingAutotuner) for each in one.launchers]
    names = {name for each in launchers if (name := getattr(each, "cache_hash", None))}
    folders = [Path(FileCacheManager(name).cache_dir) for name in sorted(names)]
    found = [path for folder in folders for path in folder.glob("*") if path.suffix in (".json", ".cubin", ".hsaco")]
    return [path for path in found if not path.name.startswith("__grp__")]  # Triton's own lists of files


def give_to_triton(folder: str, files: Mapping[str, bytes], device: int) -> None:
    """Puts the files of one folder where Triton will look for them; without it `load` leaves them out, as above.

    Inductor names the folder of all for this process when it makes its first kernel, if nobody has; so it is named now.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from triton.runtime.cache import FileCacheManager

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))
    manager = FileCacheManager(folder)
    group = {name: manager.put(content, name) for name, content in files.items()}
    for name in files:
        if name.endswith(".json"):  # it says what a variant is; files without are libraries, found by their names
            manager.put_group(name, group)


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
