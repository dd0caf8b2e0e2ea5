"""The options by name, for type checkers: a misspelt `sampel_ratio=` is found before anything runs.

What each option means stands in :class:`ras_compile.RASConfig`, which also checks values when they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor

Metric = Callable[[Tensor, Any], Tensor]  # (noise [B, N, P * C], info) -> [B, N]
Selector = Callable[[Tensor, Tensor, int, Any], Tensor]  # (metric [B, N], drops [B, N], k, info) -> rows [B, k]


class RuntimeOptions(TypedDict, total=False):
    """Options that no compiled program depends on: each generation may have others."""

    preset: Literal["paper", "fast", "balanced", "quality"] | None
    sample_ratio: float | None
    speedup: float | None
    warmup_steps: int
    reset_interval: int | None
    reset_from: Literal["start", "end"]
    reset_steps: Sequence[int] | None
    ratio_schedule: Literal["constant", "ends", "linear", "sigmas"]
    tolerance: float | None
    metric: Literal["drift", "std", "l2norm", "random"] | Metric
    focus: Literal["low", "high"] | float
    starvation_scale: float | None
    max_absence: int | None
    selector: Selector | None
    noise_reuse: Literal["hold", "linear", "forecast", "x0"]
    cache_reuse: Literal["hold", "forecast"]


class Options(RuntimeOptions, total=False):
    """Every option of `ras_compile.attach` and of ``torch.compile(..., backend="ras", options={...})``."""

    region: slice | tuple[int | None, int | None] | None
    context: Literal["fresh", "frozen"]
    kv_cache: bool
    inner_backend: str
    inner_options: Mapping[str, Any]
    cuda_graphs: bool
    cache_budget: int | None
    cache_dtype: Literal["float8", "int8"] | None
    cache_device: Literal["cpu"] | None
    unsupported: Literal["dense", "error"]
    latent: str | None
    timestep: str | None
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
