"""A cache backend for vLLM-Omni: `enable(pipeline)` once, `refresh(pipeline, num_inference_steps)` before each request.

vLLM-Omni has no list that a backend can be added to from outside. A worker of your own sets it, once its model is loaded:

    runner.cache_backend = RegionAdaptiveBackend({"preset": "fast"})
    runner.cache_backend.enable(runner.pipeline)

Start the engine with `enforce_eager=True`, since the whole transformer is compiled here, not its blocks one by one; without
`step_execution`, since requests are drawn one after another; and give `num_inference_steps` with each request.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

import ras_compile

__all__ = ["RegionAdaptiveBackend"]


class RegionAdaptiveBackend:
    """Has the methods of vLLM-Omni's `CacheBackend`.

    Args:
        config: options of the backend "ras", as in `torch.compile(model, backend="ras", options={...})`.

    Attributes:
        config: these options.
        enabled: whether `enable` has been called.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self.enabled = False
        self._request = ExitStack()  # holds the generation of the present request

    def enable(self, pipeline: Any) -> None:
        """Compiles the pipeline's transformers in place; to be called once, when the weights are loaded.

        Raises:
            ConfigError: the pipeline has no transformer.
        """
        found = transformers(pipeline)
        if not found:
            raise ras_compile.ConfigError(
                f"{type(pipeline).__name__} has no transformer to compile; choose a model that is a diffusion transformer."
            )
        for module in found:
            module.compile(backend="ras", options=self.config)
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """A request begins: nothing of the one before it, which may have been aborted, is used any more.

        Args:
            pipeline: the pipeline.
            num_inference_steps: of the request; 0 where its pipeline decides.
            verbose: taken, as other backends take it, and not needed.
        """
        self._request.close()
        self._request.enter_context(ras_compile.generation(num_steps=num_inference_steps or None))

    def close(self) -> None:
        """The last request is over: calls of the model that follow belong to no request."""
        self._request.close()

    def is_enabled(self) -> bool:
        """Whether `enable` has been called."""
        return self.enabled

    def trace(self, pipeline: Any) -> list[ras_compile.Record]:
        """What the last request computed, call by call."""
        records = [record for module in transformers(pipeline) for record in ras_compile.trace(module)]
        return sorted(records, key=lambda record: record.serial)


def transformers(pipeline: Any) -> list[nn.Module]:
    """A pipeline's transformers: transformer, transformer_2, ..."""
    named = [
        name
        for name in sorted({*vars(pipeline), *vars(pipeline).get("_modules", {})})
        if name.split("_")[0] == "transformer"
    ]
    return [module for name in named if isinstance(module := getattr(pipeline, name), nn.Module)]
