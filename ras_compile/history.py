"""What happened: `ras_compile.trace` tells one record per model call of the last generation."""

from __future__ import annotations

from typing import Any

from ras_compile.sampling.models import modules_of
from ras_compile.sampling.records import Record
from ras_compile.sampling.registry import states_of

__all__ = ["Record", "trace"]


def trace(compiled: Any) -> list[Record]:
    """The records of the last generation that began, in the order of the calls.

    Args:
        compiled: what `torch.compile` returned, the transformer itself, or the handle of `ras_compile.attach`, whose
            transformers are told together.

    Raises:
        TypeError: `compiled` is none of these.
    """
    records: list[Record] = []
    for module in modules_of(compiled):
        found = [state.records for state in states_of([*module.parameters(), *module.buffers()]) if state.records]
        found.sort(key=lambda told: told[-1].serial)
        records += found[-1] if found else []
    return sorted(records, key=lambda record: record.serial)
