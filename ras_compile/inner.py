"""The inner compiler: Inductor by default, eager and aot_eager for debugging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from .config import RASConfig

Compiled = Callable[..., Sequence[Any]]


def compile_inner(module: fx.GraphModule, inputs: Sequence[Any], config: RASConfig) -> Compiled:
    """Compiles one program.

    Args:
        module: the program; its ops are ATen and it may write into its last inputs (the caches).
        inputs: example inputs, real or fake.
        config: names the inner backend and its options.
    """
    if config.inner_backend == "eager":
        return module
    compiled: Any
    if config.inner_backend == "inductor":
        options = dict(config.inner_options)
        mode = options.pop("mode", None)
        if mode is not None:
            options = {**list_mode_options(mode), **options}
        options.pop("triton.cudagraphs", None)  # CUDA graphs of the programs are ours: `cuda_graphs`
        compiled = compile_fx(module, list(inputs), config_patches=options)
        return compiled
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(config.inner_backend)(module, list(inputs), **config.inner_options)
