"""What happened: `ras_compile.trace` tells one record per model call of the last generation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ras_compile.execute.memory import keepers_of
from ras_compile.plans.plan import Plan
from ras_compile.sampling.models import held_by, modules_of
from ras_compile.sampling.records import Record
from ras_compile.sampling.registry import states_of
from ras_compile.sampling.state import TransformerState


def trace(compiled: Any) -> list[Record]:
    """The records of the last generation that began, in the order of the calls.

    Args:
        compiled: what `torch.compile` returned, the transformer itself, or the handle of `ras_compile.attach`, whose
            transformers are told together.

    Raises:
        TypeError: `compiled` is none of these.
    """
    return [record for record, _ in past_of(modules_of(compiled)).calls]


@dataclass(frozen=True)
class Past:
    """What is known of the last generation of some transformers."""

    # each model call with the plan that answered it; None where there was none, or it is gone
    calls: list[tuple[Record, Plan | None]]
    cache_bytes: int  # what the transformers keep, caches of finished generations included


def past_of(modules: Iterable[nn.Module], released: bool = False) -> Past:
    """The last generation of each of the modules; with ``released`` also one whose caches are released since."""
    calls: list[tuple[Record, Plan | None]] = []
    states: list[TransformerState] = []
    for module in modules:
        found = states_of([*module.parameters(), *module.buffers()])
        states += found
        known = [(state.records, state.graphs) for state in found] + [state.released for state in found if released]
        records, graphs = max((run for run in known if run[0]), key=lambda run: run[0][-1].serial, default=([], {}))
        plans = _plans(graphs)
        calls += [(record, plans.get(record.branch, plans.get(""))) for record in records]
    held = [slots for state in states for slots in held_by(state)]
    return Past(sorted(calls, key=lambda call: call[0].serial), sum(keeper.bytes for keeper in keepers_of(held)))


def _plans(graphs: Mapping[str, object]) -> dict[str, Plan]:
    """The plans of a generation by their branches' labels; by "" any one of them."""
    found: dict[str, Plan] = {}
    for label, graph in graphs.items():
        plan = graph() if isinstance(graph, weakref.ref) else None
        if isinstance(plan, Plan):
            found[label] = found[""] = plan
    return found
