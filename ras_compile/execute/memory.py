"""What generations leave behind for the next one, and who has to give it up.

A plan's caches and CUDA graphs stay when a generation ends, so that the next one of the same shapes starts at once. They go

- when the model is dropped: with its weights. (The plan goes with what Dynamo compiled, which belongs to the class of the model
  and stays until Dynamo's reset.)
- at `release`, and when a pipeline is detached;
- when the plans of all models keep more than their budget: those of the plan that was used longest ago go first. What a
  running generation holds is never taken.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ras_compile.execute.homes import homes, listed
from ras_compile.execute.slopes import SLOPES

_clock = itertools.count()
keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


class Keeper:
    """Knows what the branches of one plan keep.

    Args:
        plan: the plan, which holds this object, has ``graph_slots`` and can ``release_graphs()``.
        branch_bytes: bytes of the caches of one guidance branch.
        budget: bytes that all plans on the device may keep for later, or None for no limit.
    """

    def __init__(self, plan: Any, branch_bytes: int, budget: int | None) -> None:
        self._plan, self.branch_bytes, self._budget = weakref.ref(plan), branch_bytes, budget
        self._kept: dict[int, weakref.ref] = {}
        self._used = next(_clock)
        keepers.add(self)
        weakref.finalize(plan, self._drop, self._kept)

    @staticmethod
    def _drop(kept: dict[int, weakref.ref]) -> None:
        for ref in list(kept.values()):
            slots = ref()
            if slots is not None:
                slots.clear()

    def use(self, slots: Any) -> None:
        """A branch that keeps its caches in ``slots`` runs a dense step: make room for it, if need be."""
        self._used = next(_clock)
        key = id(slots)
        if key not in self._kept:
            self._kept[key] = weakref.ref(slots, lambda _: self._kept.pop(key, None))
        if self._budget is not None:
            self._trim(self._budget)

    @property
    def bytes(self) -> int:
        """Bytes of caches, and of their slopes, that are kept, in use or not."""
        plan = self._plan()
        graphs = plan.graph_slots if plan is not None else 0
        held = self.held
        slopes = sum(slots[SLOPES].bytes for slots in held if SLOPES in slots)
        return self.branch_bytes * max(graphs, sum(map(bool, held))) + slopes

    @property
    def held(self) -> list[Any]:
        """The slots of the branches that are alive; empty ones where they were released."""
        found = [ref() for ref in list(self._kept.values())]
        return [slots for slots in found if slots is not None]

    def _trim(self, budget: int) -> None:
        others = sorted((keeper for keeper in listed(keepers) if keeper is not self), key=lambda keeper: keeper._used)
        total = self.bytes + sum(keeper.bytes for keeper in others)
        for keeper in others:
            if total <= budget:
                return
            total -= keeper.give_up()

    def give_up(self) -> int:
        """Drops what no running generation holds; returns how many bytes that frees."""
        before = self.bytes
        for spare in [spare for home in homes() for spare in listed(home.spare.values())]:
            for kept in list(spare.values()):
                for slots in [slots for slots in kept if self.holds(slots)]:
                    kept[:] = [other for other in kept if other is not slots]
                    slots.clear()
                    self._kept.pop(id(slots), None)
        plan = self._plan()
        if plan is not None:
            plan.release_graphs()
        return before - self.bytes

    def holds(self, slots: Any) -> bool:
        ref = self._kept.get(id(slots))
        return ref is not None and ref() is slots


def default_budget(device: torch.device) -> int | None:
    """A quarter of a CUDA device's memory, in bytes; no limit elsewhere."""
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else None


def free_memory() -> None:
    """Gives up all that no running generation holds, of every plan, and hands the memory back to the device."""
    for keeper in listed(keepers):
        keeper.give_up()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def keepers_of(held: Sequence[Any]) -> list[Keeper]:
    """The keepers of the plans whose caches stand in any of the slots ``held``."""
    return [keeper for keeper in listed(keepers) if any(keeper.holds(slots) for slots in held)]
