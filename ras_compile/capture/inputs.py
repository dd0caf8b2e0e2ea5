"""What the placeholders of a Dynamo graph are: weights of the module, the user's arguments (by name), or sizes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile._torch import pytree, source_of, vary_inputs
from ras_compile.capture.sizes import numbers_beside, sides_that_vary
from ras_compile.errors import ConfigError

_TIMES = (
    r"timesteps?",
    r".*time.*",
    r"t|sigmas?|noise_level",
)  # names of arguments that say the time, the surest first
_STEP = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(-?\d+))\]|\.([A-Za-z_]\w*)")


@dataclass(frozen=True)
class GraphInput:
    """One placeholder."""

    argument: str | None  # name of the forward argument that it is, or belongs to; None for weights and sizes
    path: str  # the user's expression for it, such as ``added_cond_kwargs['resolution']``
    weight: bool = False  # a parameter or buffer of the module
    size: bool = False  # a symbolic integer, no tensor: the size of one, or an integer argument (which has a name)


def source_name(node: fx.Node) -> str:
    """Dynamo's source expression of a placeholder, such as ``L['kwargs']['timestep']``."""
    return source_of(node) or str(node.target)


def describe_inputs(graph: fx.Graph) -> list[GraphInput]:
    """Describes every placeholder of a Dynamo graph."""
    names, extra = _names(graph)
    module = f"L[{own_name(_forward(graph))!r}]"
    found = []
    for node in graph.find_nodes(op="placeholder"):
        value, name = node.meta.get("example_value"), source_name(node)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int)):
            plain = _user_input(name, names, extra) if name.startswith("L[") and "(" not in name else None
            found.append(GraphInput(plain.argument if plain else None, plain.path if plain else name, size=True))
        elif isinstance(value, nn.Parameter) or "_parameters" in name or "_buffers" in name or name.startswith(module):
            found.append(GraphInput(None, _weight(name), weight=True))
        else:
            found.append(_user_input(name, names, extra))
    return found


def _names(graph: fx.Graph) -> tuple[list[str], str]:
    """What the root module's forward calls its arguments, and those that it does not name."""
    forward = _forward(graph)
    return (argument_names(forward), keywords(forward)) if forward is not None else ([], "kwargs")


def _user_input(name: str, names: Sequence[str], extra: str) -> GraphInput:
    """The argument behind a source expression: of a forward that takes ``names`` and ``**extra``, or of a wrapper of it."""
    steps = ["".join(groups) for groups in _STEP.findall(name.removeprefix("L"))] or [name]
    if len(steps) > 1 and steps[0] not in names:
        if steps[0] in ("kwargs", extra):
            steps = steps[1:]
        elif steps[0] == "args" and steps[1].isdigit() and int(steps[1]) < len(names):
            steps = [names[int(steps[1])], *steps[2:]]
    return GraphInput(steps[0], steps[0] + "".join(f"[{step!r}]" for step in steps[1:]))


def _weight(name: str) -> str:
    """``blocks.0.norm.weight``, of its source expression."""
    steps = ["".join(groups) for groups in _STEP.findall(name.removeprefix("L"))]
    return ".".join(step for step in steps[1:] if step not in ("_modules", "_parameters", "_buffers")) or name


def _forward(graph: fx.Graph) -> Callable[..., Any] | None:
    """The forward of the root module's class; None where it is unknown."""
    for node in graph.nodes:
        for kind in (entry[1] for entry in (node.meta.get("nn_module_stack") or {}).values()):
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                return kind.forward
    return None


def describe_arguments(forward: Callable[..., Any], args: tuple, kwargs: dict) -> list[GraphInput]:
    """The leaves of a call's arguments, by the names of the parameters of a module class's forward."""
    names = argument_names(forward)
    found = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        keys: list[Any] = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", ""))) for key in path]
        outer, *keys = keys
        positional = outer == 0  # of the pair of positional and keyword arguments
        head = names[keys[0]] if positional and keys[0] < len(names) else str(keys[0])
        found.append(GraphInput(head, head + "".join(f"[{str(key)!r}]" for key in keys[1:])))
    return found


def argument_names(forward: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a module class's forward, without ``*args``, ``**kwargs`` and the module itself."""
    own = own_name(forward)
    return [p.name for p in _parameters(forward) if p.name != own and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def own_name(forward: Callable[..., Any] | None) -> str:
    """What a module class's forward calls the module: its first parameter, unless that holds all positional arguments."""
    first = next(iter(_parameters(forward)), None) if forward else None
    plain = first is not None and first.kind not in (first.VAR_POSITIONAL, first.VAR_KEYWORD)
    return first.name if first is not None and plain else "self"


def keywords(forward: Callable[..., Any]) -> str:
    """What a forward calls those of its keyword arguments that it does not name."""
    return next((p.name for p in _parameters(forward) if p.kind is p.VAR_KEYWORD), "kwargs")


def _parameters(forward: Callable[..., Any]) -> Iterable[inspect.Parameter]:
    return inspect.signature(inspect.unwrap(forward)).parameters.values()


def check_timestep(name: str | None, kind: type[nn.Module]) -> None:
    """Refuses a name that a model's forward does not know. What it takes as ``**kwargs`` may have any name.

    Raises:
        ConfigError: there is no such argument.
    """
    if name is None or any(p.kind is p.VAR_KEYWORD for p in _parameters(kind.forward)):
        return
    known = argument_names(kind.forward)
    if name not in known:
        raise ConfigError(
            f"option timestep={name!r} names no argument of {kind.__name__}.forward; there are {', '.join(map(repr, known))}."
        )


def latent_candidates(inputs: Sequence[GraphInput], values: Sequence[Any], name: str | None) -> list[int]:
    """Positions of the inputs that may be the latent: the named one, or every floating tensor of two or more dimensions.

    Raises:
        KeyError: ``name`` is no tensor argument; the error's argument lists those there are.
    """
    tensors = [
        index
        for index, (given, value) in enumerate(zip(inputs, values, strict=True))
        if not given.weight and isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
    ]
    if name is None:
        return tensors
    named = [index for index in tensors if name in (inputs[index].argument, inputs[index].path)]
    if not named:
        raise KeyError(", ".join(repr(inputs[index].path) for index in tensors))
    return named


def vary_time_and_sides(graph: fx.Graph, name: str | None) -> None:
    """Restarts Dynamo's capture where it took the timestep, a Python number or some in a list, for a constant, or sides wrongly.

    Dynamo itself would find out at a later call, with another graph: a timestep's step would be dense in the first picture
    alone, and a picture of another shape would be compiled anew. Of sides that are told in numbers all vary where one does.
    """
    names, extra = _names(graph)
    pairs = zip(graph.find_nodes(op="placeholder"), describe_inputs(graph), strict=True)
    sides = sides_that_vary(graph, {node for node, given in pairs if given.weight})
    beside, module = numbers_beside(graph), f"L[{own_name(_forward(graph))!r}]"

    def number(source: str, value: Any) -> bool:
        side = type(value) is int and value > 1 and not beside % value and not source.startswith((module, "G["))
        return side or varies(_user_input(source, names, extra), value, name)

    vary_inputs(number, sides)


def varies(given: GraphInput, value: Any, name: str | None) -> bool:
    """Whether an argument is a Python number, or one of a list, that says the time, and so is another one at each step.

    Args:
        name: the option `timestep`; None: by the argument's name. A whole number called `t` may as well count frames.
    """
    if type(value) not in (int, float):
        return False
    if name is not None:
        return name in (given.argument, given.path)
    patterns = _TIMES if isinstance(value, float) else _TIMES[:2]
    return any(re.fullmatch(pattern, given.argument or "") for pattern in patterns)


def find_timestep(inputs: Sequence[GraphInput], values: Sequence[Any], name: str | None) -> int | None:
    """Position of the timestep: the named argument, else one whose name says time, else None."""
    users = [index for index, given in enumerate(inputs) if given.argument is not None]
    if name is not None:
        return next((index for index in users if name in (inputs[index].argument, inputs[index].path)), None)
    for pattern in _TIMES:
        for index in users:
            if re.fullmatch(pattern, inputs[index].argument or "") and isinstance(values[index], (Tensor, int, float)):
                return index
    return None
