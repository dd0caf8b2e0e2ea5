"""Code as users write it, for the type checker alone (`make check`): what is right passes, what is misspelt does not.

Each expected error is a `type: ignore` of its own; one that the checker would not need is an error itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import ras_compile


def loudest(noise: Tensor, info: Any) -> Tensor:
    return noise.float().abs().amax(-1)


def right(pipe: Any) -> ras_compile.Handle:
    handle = ras_compile.attach(pipe, sample_ratio=0.25, metric=loudest, context="frozen")
    handle.configure(preset="fast", warmup_steps=3)
    return ras_compile.attach(pipe, ras_compile.RASConfig(sample_ratio=0.25))


def misspelt(pipe: Any) -> None:
    handle = ras_compile.attach(pipe, sampel_ratio=0.25)  # type: ignore[call-arg]  # no such option
    handle.configure(kv_cache=False)  # type: ignore[call-arg]  # changes what is compiled
    handle.sumary()  # type: ignore[attr-defined]  # no such method
    ras_compile.attach(pipe, context="cold")  # type: ignore[arg-type]  # no such value
    records: list[ras_compile.Record] = ras_compile.trace(handle)
    print(records[0].kind, ras_compile.__version__)
