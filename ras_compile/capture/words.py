"""Words for functions, classes, modules and plain values that are the same in every process whose code is the same."""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, DynamicClassAttribute, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ras_compile.capture.on_disk import Unkeepable

PLAIN = (type(None), type(Ellipsis), bool, int, float, complex, str, bytes)


def classes_of(model: nn.Module) -> str:
    """A hash of the methods and attributes of classes, which Dynamo does not guard either: of a model's parts, of the objects
    that parts hold, and of tensors."""
    parts = [*model.modules()]
    held = {type(value) for part in parts for value in vars(part).values()}
    outside = {kind for kind in held if kind.__module__.partition(".")[0] not in ("builtins", "torch")}
    kinds = {kind for one in {*map(type, parts), *outside, Tensor} for kind in one.__mro__ if kind is not object}
    words = []
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        for name, value in sorted(vars(kind).items()):
            if name not in _NOTED:
                words.append(f"{kind.__module__}.{kind.__qualname__}.{name} {_lenient(value)}")
    return _hash("classes", *words)


# What Python notes in a class by itself, as when an object is copied; and the methods that make objects, which Dynamo exchanges
# in the classes of modules once it compiles.
_NOTED = {
    "__init__", "__setstate__", "___needs_generation_tag_patch",
    "__abstractmethods__", "__annotations__", "__dict__", "__doc__", "__module__", "__slotnames__", "__weakref__",
    "_abc_impl",
}  # fmt: skip


def _lenient(value: Any) -> str:
    """The words for a value; where there are none, those for its class."""
    try:
        return fingerprint(value)
    except Unkeepable:
        return f"a {type(value).__module__}.{type(value).__qualname__}"


def fingerprint(value: Any, within: tuple[int, ...] = (), marks: dict[int, int] | None = None) -> str:
    """Words for a value that another process has, too, if its code is the same.

    Args:
        within: the functions whose words these are a part of, by their identity.
        marks: numbers of the sentinels so far, by their identity; one for all values of which it counts which are the same
            sentinel. The values have to live as long.

    Raises:
        Unkeepable: there are none: nothing but its class tells such a value from another one.
    """
    inner = partial(fingerprint, within=within, marks=marks)
    if isinstance(value, Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if isinstance(value, (*PLAIN, torch.dtype, torch.device, torch.layout, torch.memory_format, slice)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, CodeType):
        words = [value.co_code.hex(), *map(str, (value.co_names, value.co_varnames, value.co_freevars))]
        return _hash("code", *words, *map(inner, value.co_consts))
    if isinstance(value, FunctionType):
        name = f"function {value.__module__}.{value.__qualname__}"
        if id(value) in within:
            return name
        inside = (*within, id(value))
        around = [_around(cell, inside, marks) for cell in value.__closure__ or ()]
        given = [
            fingerprint(each, inside, marks) for each in (value.__code__, value.__defaults__, value.__kwdefaults__)
        ]
        return _hash(name, *given, *around)
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    if isinstance(value, (staticmethod, classmethod)):
        return _hash(type(value).__name__, inner(value.__func__))
    if isinstance(value, (property, DynamicClassAttribute)):  # the other one is what enumerations have
        return _hash("property", *map(inner, (value.fget, value.fset, value.fdel)))
    if isinstance(value, partial):
        return _hash("partial", *map(inner, (value.func, value.args, value.keywords)))
    if isinstance(value, (tuple, list)):
        return _hash(type(value).__name__, *map(inner, value))
    if isinstance(value, (set, frozenset)):
        return _hash(type(value).__name__, *sorted(map(inner, value)))
    if isinstance(value, Mapping):
        return _hash(type(value).__name__, *sorted(map(str, value)))
    if isinstance(value, logging.Logger):
        return f"logger {value.name}"
    if type(value) is object:  # a sentinel: all that tells one from another is which it is
        return "object" if marks is None else f"object {marks.setdefault(id(value), len(marks))}"
    named = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(named, str):
        raise Unkeepable(f"it rests on a {type(value).__name__}, of which nothing but its class can be told")
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"{kind} {getattr(value, '__module__', '')}.{named}"


def _around(cell: Any, within: tuple[int, ...], marks: dict[int, int] | None) -> str:
    """Words for what a function finds around it; of objects that have none the class alone."""
    try:
        return fingerprint(cell.cell_contents, within, marks)
    except ValueError:
        return "nothing yet"
    except Unkeepable:
        return f"a {type(cell.cell_contents).__qualname__}"


def _hash(kind: str, *words: str) -> str:
    return f"{kind} {hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:32]}"


def file_hash(module: str) -> str:
    """Of a module's source.

    Raises:
        Unkeepable: it has none.
    """
    path = getattr(sys.modules.get(module) or importlib.import_module(module), "__file__", None)
    if path is None or not Path(path).exists():
        raise Unkeepable(f"{module} has no file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
