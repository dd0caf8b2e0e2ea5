"""A captured call that another process can use: Dynamo's graph of it, and all that must be so for the graph to be right.

To capture a model is the longest part of a start that compiles nothing. PyTorch can write a capture's guards to disk (its
ahead-of-time compilation), but not those of functions, classes, modules and what global code holds. In their place stand
*held values*: Dynamo's expressions of them, whose values are compared with the saved ones by name and source code when the
capture is read, and by identity at each call.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from ras_compile import _torch
from ras_compile.capture.numbers import capture_numbers, keep_captured
from ras_compile.capture.on_disk import Unkeepable, pickled, read, unpickled, written
from ras_compile.errors import UnsupportedGraph

# Expressions of what belongs to a function or a class: their values are not written with the guards.
_OF_CODE = re.compile(r"__(?:defaults|kwdefaults|code|closure)__|__dict__\)\[")
_PLAIN = (type(None), type(Ellipsis), bool, int, float, complex, str, bytes)
# What is read of Dynamo's notes on a node.
_META = ("example_value", "stack_trace", "nn_module_stack")


def keep(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bytes:
    """Captures a call of a model for another process.

    Args:
        model: the model; the forward of its class is all that runs.
        args: arguments of a call; values of tensors do not count.
        kwargs: as above, by name.

    Raises:
        Unkeepable: it cannot be written, or this PyTorch does not write captures.
    """
    if _torch.capture_ahead is None:
        raise Unkeepable("this PyTorch does not capture ahead of time")
    refuse_hooks(model)
    graphs: list[dict[str, Any]] = []
    held: set[str] = set()

    def chosen(guards: Sequence[Any]) -> list[bool]:
        unwritable, written = _torch.unwritable_guards(), []
        for guard in guards:
            name = guard.orig_guard.name
            kinds = {guard.guard_type, *guard.derived_guard_types}
            written.append(not (guard.is_global or kinds & unwritable or _OF_CODE.search(name)))
            if not written[-1] and name:
                held.add(name)
        return written

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        told = {"graph": written(graph, _META)}
        with suppress(Unkeepable, UnsupportedGraph):
            told["captured"] = _captured(graph, inputs)
        graphs.append(told)
        return _Uncalled()

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        hooks = _torch.Hooks(guard_filter_fn=chosen)
        found = _torch.capture_ahead(model.forward, (args, kwargs), hooks=hooks, backend=backend)
    artifacts, function = found._artifacts, _forward_of(model)
    code = artifacts.runtime_env
    held |= {f"G[{name!r}]" for name in _globals_of(code, artifacts.backend_id)}
    scope, names = _Scope(function, code.import_sources), sorted(held)
    values = scope.values(names, model, args, kwargs)
    modules = {each.module for each in artifacts.source_info.inlined_sources}
    content = {
        "guards": artifacts.guards_state,
        "code": _torch.SerializedCode.from_code_object(code.bytecode),
        "backend": artifacts.backend_id,
        "imports": dict(code.import_sources),
        "held": {name: fingerprint(value) for name, value in zip(names, values, strict=True)},
        "files": {name: file_hash(name) for name in sorted(modules) if name.partition(".")[0] != "torch"},
        "function": fingerprint(function),
        "classes": classes_of(model),
        "sizes": dict(_torch.sizes_seen(function.__code__)),
        **graphs[-1],
    }
    return pickled(content)


def _globals_of(code: Any, backend: str) -> set[str]:
    """The globals that Dynamo's code reads of the function's own.

    Raises:
        Unkeepable: it writes some, or reads what it has made itself.
    """
    steps = list(dis.get_instructions(code.bytecode))
    if any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in steps):
        raise Unkeepable("the model writes global variables")
    read = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"} - {backend, *code.import_sources}
    own = {name for name in read if name not in vars(builtins)}
    if any(name.startswith("__") for name in own):
        raise Unkeepable(f"its code uses {', '.join(sorted(own))}")
    return own


def _captured(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[tuple]:
    """What is captured of Dynamo's graph, as values that can be pickled.

    Raises:
        UnsupportedGraph: it cannot be captured.
        Unkeepable: it holds tensors.
    """
    captured = capture_numbers(graph, inputs)
    if captured.meta["constants"]:
        raise Unkeepable("a graph holds tensors")
    return written(captured, ("val", "role", *_META[1:]))


class Kept:
    """A capture that was kept, of a model in this process.

    Args:
        model: the model.
        content: what :func:`keep` returned.
        args: arguments of the first call.
        kwargs: as above, by name.
        backend: makes of the graph what runs in its place.

    Raises:
        Unkeepable: something of what must be as it was is not.
    """

    def __init__(
        self,
        model: nn.Module,
        content: bytes,
        args: tuple,
        kwargs: dict[str, Any],
        backend: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    ) -> None:
        told = unpickled(content)
        function = _forward_of(model)
        refuse_hooks(model)
        if fingerprint(function) != told["function"]:
            raise Unkeepable("the model's forward is another one")
        if classes_of(model) != told["classes"]:
            raise Unkeepable("classes of the model's parts have other methods or attributes")
        for name, digest in told["files"].items():
            if file_hash(name) != digest:
                raise Unkeepable(f"the file of {name} is another one")
        self._scope, names = _Scope(function, told["imports"]), sorted(told["held"])
        values = self._scope.values(names, model, args, kwargs)
        for name, value in zip(names, values, strict=True):
            if fingerprint(value) != told["held"][name]:
                raise Unkeepable(f"{name} is another one")
        self._held, self._read = [_sight(value) for value in values], self._scope.compiled(names)
        self._function = function
        self._parts = function.__code__, function.__defaults__, function.__kwdefaults__
        state = _torch.guards_on_disk(told["guards"])
        scope = self._scope.globals()
        own = state.output_graph.name_of_builtins_dict_key_in_fglobals
        if own:
            scope[own] = _torch.builtins_of(scope)
        self._guards = _torch.load_guard_manager(state, function.__code__, scope)
        graph = read(told["graph"])
        if "captured" in told:
            keep_captured(graph, read(told["captured"]))
        made: list[Callable[..., Any]] = []

        def run(*values: Any) -> Any:
            if not made:
                made.append(backend(graph, values))
            return made[0](*values)

        code = _torch.SerializedCode.to_code_object(told["code"])
        scope[told["backend"]] = run
        self._call = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
        self._call.__kwdefaults__ = function.__kwdefaults__
        seen = _torch.sizes_seen(function.__code__)  # what comes past this capture is captured as it was there
        for name, entry in told["sizes"].items():
            seen.setdefault(name, entry)

    def fits(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call is one that this capture is for."""
        function = self._function
        if type(model).forward is not function:
            return False
        parts = function.__code__, function.__defaults__, function.__kwdefaults__
        if any(now is not before for now, before in zip(parts, self._parts, strict=True)):
            return False
        try:
            known = self._scope.locals(model, args, kwargs)
            if not self._guards.check(known):
                return False
            now = self._read(known)
        except Exception:  # a call that cannot be bound, or a value that is not there any more
            return False
        return all(_sight(value) == before for value, before in zip(now, self._held, strict=True))

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's result; only behind :meth:`fits`."""
        return self._call(model, *args, **kwargs)


def _forward_of(model: nn.Module) -> FunctionType:
    """The function that a model's class calls its forward.

    Raises:
        Unkeepable: it is none.
    """
    function: Any = type(model).forward
    if not isinstance(function, FunctionType):
        raise Unkeepable("the model's forward is no function")
    return function


class _Uncalled(_torch.SerializableCallable if _torch.capture_ahead else object):  # type: ignore[misc]
    """What capture ahead of time is given for a compiled graph: nobody calls it."""

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        return b""

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        return cls()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Scope:
    """What Dynamo's expressions of a call speak of: L, its arguments, and G, the globals of its function."""

    def __init__(self, function: FunctionType, imports: Mapping[str, str]) -> None:
        self._function, self._signature = function, inspect.signature(function, follow_wrapped=False)
        self._imported = {name: importlib.import_module(path) for name, path in imports.items()}

    def locals(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """L: the arguments, and what the function finds around it."""
        cells = zip(self._function.__code__.co_freevars, self._function.__closure__ or (), strict=True)
        bound = self._signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        return {**{name: cell.cell_contents for name, cell in cells}, **bound.arguments}

    def globals(self) -> dict[str, Any]:
        """G as it is now."""
        numbered = "__builtins_dict__"  # by Dynamo, in each process in its own way
        found = {name: value for name, value in self._function.__globals__.items() if not name.startswith(numbered)}
        return {**self._imported, **found}

    def compiled(self, names: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple]:
        """What gives the values of some expressions, for a call's arguments."""
        spelled = [_IMPORTED.sub("I['__import_", _BUILTINS.sub("B", name)) for name in names]
        made = compile(f"({''.join(f'{name}, ' for name in spelled)})", "<held values>", "eval")
        own = {"G": self._function.__globals__, "I": self._imported, "B": vars(builtins)}
        scope = {**_torch.names_in_guards(), **own}
        return lambda known: eval(made, scope, {"L": known})

    def values(self, names: Sequence[str], model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The values of some expressions for a call.

        Raises:
            Unkeepable: there is none.
        """
        try:
            return self.compiled(names)(self.locals(model, args, kwargs))
        except Exception as error:  # of whatever kind: what the expression says is not there
            raise Unkeepable(f"a value is not there ({type(error).__name__}: {error})") from error


_IMPORTED = re.compile(r"G\['__import_")
_BUILTINS = re.compile(r"G\['__builtins_dict__[^']*'\]")


def refuse_hooks(model: nn.Module) -> None:
    """Dynamo follows hooks, and a forward of an object's own, and guards none of them.

    Raises:
        Unkeepable: a part of the model has such.
    """
    for name, part in model.named_modules():
        if _torch.has_forward_hooks(part) or "forward" in vars(part):
            raise Unkeepable(f"hooks run around the forward of its part {name!r}")


def classes_of(model: nn.Module) -> str:
    """A hash of the methods and attributes of the classes of a model's parts, which Dynamo does not guard either."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__ if kind is not object}
    words = []
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        for name, value in sorted(vars(kind).items()):
            if name not in _NOTED:
                words.append(f"{kind.__module__}.{kind.__qualname__}.{name} {_lenient(value)}")
    return _hash("classes", *words)


# What Python itself notes in a class, and what makes objects: Dynamo exchanges that of modules once it compiles.
_NOTED = {
    "__init__", "__setstate__", "___needs_generation_tag_patch",
    "__abstractmethods__", "__annotations__", "__dict__", "__doc__", "__module__", "__weakref__", "_abc_impl",
}  # fmt: skip


def _lenient(value: Any) -> str:
    """The words for a value; where there are none, those for its class."""
    try:
        return fingerprint(value)
    except Unkeepable:
        return f"a {type(value).__module__}.{type(value).__qualname__}"


def fingerprint(value: Any, within: tuple[int, ...] = ()) -> str:
    """Words for a value that another process has, too, if its code is the same.

    Args:
        within: the functions whose words these are a part of, by their identity.

    Raises:
        Unkeepable: there are none: nothing but its class tells such a value from another one.
    """
    if isinstance(value, Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if isinstance(value, (*_PLAIN, torch.dtype, torch.device, torch.layout, torch.memory_format, slice)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, CodeType):
        words = [value.co_code.hex(), *map(str, (value.co_names, value.co_varnames, value.co_freevars))]
        return _hash("code", *words, *[fingerprint(constant, within) for constant in value.co_consts])
    if isinstance(value, FunctionType):
        name = f"function {value.__module__}.{value.__qualname__}"
        if id(value) in within:
            return name
        inside = (*within, id(value))
        around = [_around(cell, inside) for cell in value.__closure__ or ()]
        given = [fingerprint(each, inside) for each in (value.__code__, value.__defaults__, value.__kwdefaults__)]
        return _hash(name, *given, *around)
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    if isinstance(value, (staticmethod, classmethod)):
        return _hash(type(value).__name__, fingerprint(value.__func__, within))
    if isinstance(value, property):
        return _hash("property", *[fingerprint(each, within) for each in (value.fget, value.fset, value.fdel)])
    if isinstance(value, partial):
        return _hash("partial", *[fingerprint(each, within) for each in (value.func, value.args, value.keywords)])
    if isinstance(value, (tuple, list)):
        return _hash(type(value).__name__, *[fingerprint(each, within) for each in value])
    if isinstance(value, (set, frozenset)):
        return _hash(type(value).__name__, *sorted(fingerprint(each, within) for each in value))
    if isinstance(value, Mapping):
        return _hash(type(value).__name__, *sorted(map(str, value)))
    if isinstance(value, logging.Logger):
        return f"logger {value.name}"
    named = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(named, str):
        raise Unkeepable(f"it rests on a {type(value).__name__}, of which nothing but its class can be told")
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"{kind} {getattr(value, '__module__', '')}.{named}"


def _around(cell: Any, within: tuple[int, ...]) -> str:
    """Words for what a function finds around it; of objects that have none the class alone."""
    try:
        return fingerprint(cell.cell_contents, within)
    except ValueError:
        return "nothing yet"
    except Unkeepable:
        return f"a {type(cell.cell_contents).__qualname__}"


def _sight(value: Any) -> Any:
    """What tells in this process whether an expression has another value: equal for the same one."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Mapping):
        return tuple(value)
    if isinstance(value, (list, set)):
        return tuple(map(id, value))
    if isinstance(value, tuple):
        return tuple(map(_sight, value))
    return _Same(value)


class _Same:
    """Equal for one object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


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
