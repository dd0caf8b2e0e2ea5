"""A captured call that another process can use: Dynamo's graph of it, and all that must be so for the graph to be right.

To capture a model is the longest part of a start that compiles nothing. PyTorch can write a capture's guards to disk (its
ahead-of-time compilation), but not those of functions, classes, modules and what global code holds. In their place stand
*held values*: Dynamo's expressions of them, whose values are compared with the saved ones by name and source code when the
capture is read, and by identity at each call.
"""

from __future__ import annotations

import builtins
import dis
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any

from torch import fx, nn

from ras_compile import _torch
from ras_compile.capture.numbers import capture_numbers, keep_captured
from ras_compile.capture.on_disk import Unkeepable, pickled, read, unpickled, written
from ras_compile.capture.words import PLAIN, classes_of, file_hash, fingerprint
from ras_compile.errors import UnsupportedGraph

# Expressions of what belongs to a function or a class: their values are not written with the guards.
_OF_CODE = re.compile(r"__(?:defaults|kwdefaults|code|closure)__|__dict__\)\[")
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
    if not _torch.CAPTURES_AHEAD:
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

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        told = {"graph": written(graph, _META)}
        with suppress(Unkeepable, UnsupportedGraph):
            told["captured"] = _captured(graph, inputs)
        graphs.append(told)

    found, function = _torch.capture_ahead(model.forward, args, kwargs, chosen, backend), _forward_of(model)
    read, modules = _globals_of(found, function)
    imports = {**found.imports, **modules}
    held |= {f"G[{name!r}]" for name in read}
    scope, names = _Scope(function, imports), sorted(held)
    values = scope.values(names, model, args, kwargs)
    content = {
        "guards": found.guards,
        "code": _torch.SerializedCode.from_code_object(found.code),
        "backend": found.backend,
        "imports": imports,
        "held": _words(names, values),
        "files": {name: file_hash(name) for name in sorted(found.modules) if name.partition(".")[0] != "torch"},
        "function": fingerprint(function),
        "classes": classes_of(model),
        "sizes": dict(_torch.sizes_seen(function.__code__)),
        **graphs[-1],
    }
    return pickled(content)


def _globals_of(found: _torch.CapturedAhead, function: FunctionType) -> tuple[set[str], dict[str, str]]:
    """The globals that Dynamo's code reads of the function's own, and what modules are called that Dynamo has put among them.

    Raises:
        Unkeepable: it writes some, or reads what else Dynamo has made.
    """
    steps = list(dis.get_instructions(found.code))
    if any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in steps):
        raise Unkeepable("the model writes global variables")
    read = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}
    read -= {found.backend, *found.imports, *vars(builtins)}
    put = {name: function.__globals__.get(name) for name in read if name.startswith("__")}
    modules = {name: value.__name__ for name, value in put.items() if isinstance(value, ModuleType)}
    if put.keys() - modules.keys():
        raise Unkeepable(f"its code uses {', '.join(sorted(put.keys() - modules.keys()))}")
    return read - modules.keys(), modules


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
        for name, words in _words(names, values).items():
            if words != told["held"][name]:
                raise Unkeepable(f"{name} is another one")
        self._held, self._read = [_sight(value) for value in values], self._scope.compiled(names)
        self._function = function
        self._parts = function.__code__, function.__defaults__, function.__kwdefaults__
        scope = self._scope.globals()
        self._guards = _torch.guards_on_disk(told["guards"], function.__code__, scope)
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
        return {**found, **self._imported}

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


def _words(names: Sequence[str], values: Sequence[Any]) -> dict[str, str]:
    """Words for the values of expressions, by the expressions.

    Raises:
        Unkeepable: there are none for one of them.
    """
    found, marks = {}, dict[int, int]()
    for name, value in zip(names, values, strict=True):
        try:
            found[name] = fingerprint(value, marks=marks)
        except Unkeepable as error:
            raise Unkeepable(f"of {name}: {error}") from error
    return found


def _sight(value: Any) -> Any:
    """What tells in this process whether an expression has another value: equal for the same one."""
    if isinstance(value, PLAIN):
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
