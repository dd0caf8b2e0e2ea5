"""What Python code keeps in a model: a graph that was traced from the code holds while none of it changes.

Dynamo guards each attribute that a model's code reads. Here every attribute of every module counts, and those of the plain
objects, lists and dictionaries in them: adapters that are loaded or scaled, processors that are exchanged, flags. Weights
may change their values and even their objects, not their sizes and types: they are looked up at each call.
"""

from __future__ import annotations

import operator
import types
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ras_compile._torch import COMPILED_CALL, tables_of

_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_BY_IDENTITY = (
    Tensor, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, weakref.ref,
)  # fmt: skip


class PythonState:
    """The Python objects of a model, as they are when this is made."""

    def __init__(self, root: nn.Module) -> None:
        self.containers: list[tuple[Collection, tuple, tuple]] = []  # a container, its keys, its values
        self.empty: list[Any] = []  # containers, which have a `clear`
        self.weights: list[tuple[Mapping[str, Tensor | None], str, tuple | None]] = []
        seen: set[int] = set()
        pending: list[Any] = [root]
        while pending:
            item = pending.pop()
            if item is None or isinstance(item, (*_VALUES, *_BY_IDENTITY)) or id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, nn.Module):
                held = {k: v for k, v in vars(item).items() if k not in ("_parameters", "_buffers")}
                self.containers.append((vars(item), tuple(vars(item)), tuple(vars(item).values())))
                pending.extend(value for key, value in held.items() if key != COMPILED_CALL)
                for owner in tables_of(item):
                    self._weights(owner)
                continue
            if isinstance(item, (dict, list, tuple, set, frozenset)):
                self._container(item, pending)
            if isinstance(getattr(item, "__dict__", None), dict):
                self._container(vars(item), pending)

    def _weights(self, owner: Mapping[str, Tensor | None]) -> None:
        if not owner:
            self.empty.append(owner)
            return
        self.containers.append((owner.keys(), tuple(owner), tuple(owner)))
        self.weights += [(owner, name, description(weight)) for name, weight in owner.items()]

    def _container(self, item: Collection, pending: list[Any]) -> None:
        if not item:
            self.empty.append(item)
            return
        held = tuple(item.values()) if isinstance(item, Mapping) else tuple(item)
        self.containers.append((item, tuple(item) if isinstance(item, Mapping) else (), held))
        pending.extend(held)

    def restore(self) -> None:
        """Puts everything back as it was."""
        for container in self.empty:
            if container:
                container.clear()
        for container, keys, known in self.containers:
            if isinstance(container, dict) and not unchanged(container, keys, known):
                container.clear()
                container.update(zip(keys, known, strict=True))
            elif isinstance(container, list):
                container[:] = known

    def holds(self) -> bool:
        """Whether everything is as it was."""
        if any(self.empty):
            return False
        for container, keys, known in self.containers:
            if not unchanged(container, keys, known):
                return False
        return all(name in owner and description(owner[name]) == known for owner, name, known in self.weights)


def unchanged(container: Collection, keys: tuple, known: tuple) -> bool:
    """Whether a container has the entries that it had."""
    now = container.values() if isinstance(container, dict) else container
    if len(now) != len(known) or (keys and tuple(container) != keys):
        return False
    return all(map(operator.is_, now, known)) or all(map(same, now, known))


def same(value: Any, known: Any) -> bool:
    """Whether an attribute has its old value: the object itself, an equal number or word, or a list of such."""
    if value is known:
        return True
    if isinstance(value, types.MethodType) and isinstance(known, types.MethodType):
        return value.__func__ is known.__func__ and value.__self__ is known.__self__
    if type(value) is not type(known):
        return False
    if isinstance(value, (list, tuple)):
        return len(value) == len(known) and all(map(same, value, known))
    return isinstance(value, _VALUES) and value == known


def description(weight: Tensor | None) -> tuple | None:
    """What a graph depends on of a weight whose values may change."""
    return None if weight is None else (weight.shape, weight.dtype, weight.device)
