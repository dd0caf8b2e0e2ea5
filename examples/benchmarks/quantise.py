"""Models with quantised linear layers, as torchao makes them: what `run.py --quantise` measures beside the plain ones.

    float8-row      weights and activations in e4m3; a scale for each row of a weight and for each token
    float8-tensor   likewise, with one scale for a whole weight and one for all tokens of an activation
    float8-weight   weights alone; products are of the model's own type
    int8            weights and activations in int8; a scale for each row and each token
    int8-weight     weights alone

The first two need a GPU of compute capability 8.9 or later. Layers whose sizes are no multiples of 16 stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sizes import Workload
from torch import nn
from ways import NotAvailable

__all__ = ["KINDS", "quantised"]

KINDS = ("float8-row", "float8-tensor", "float8-weight", "int8", "int8-weight")


def quantised(work: Workload, kind: str) -> Workload:
    """The workload with a transformer whose linear layers are quantised; the transformer is changed in place.

    Args:
        work: the workload.
        kind: one of `KINDS`.

    Raises:
        NotAvailable: there is no torchao, or it does not take this device.
    """
    try:
        from torchao.quantization import quantize_

        kept = getattr(work.transformer, "_keep_in_fp32_modules", None) or ()
        quantize_(work.transformer, _config(kind), lambda module, name: _is_taken(module, name, kept))
    except (ImportError, AssertionError) as error:
        raise NotAvailable(f"torchao: {error}") from None
    return replace(work, name=f"{work.name}, {kind}")


def _config(kind: str) -> Any:
    from torchao import quantization as ao

    # settings of Inductor are left alone: the plain model would be compiled with others
    if kind in ("float8-row", "float8-tensor"):
        granularity = ao.PerRow() if kind == "float8-row" else ao.PerTensor()
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity, set_inductor_config=False)
    configs = {
        "float8-weight": ao.Float8WeightOnlyConfig,
        "int8": ao.Int8DynamicActivationInt8WeightConfig,
        "int8-weight": ao.Int8WeightOnlyConfig,
    }
    return configs[kind](set_inductor_config=False)


def _is_taken(module: nn.Module, name: str, kept: Any) -> bool:
    if not isinstance(module, nn.Linear) or any(part in name.split(".") for part in kept):
        return False
    return module.in_features % 16 == 0 == module.out_features % 16
