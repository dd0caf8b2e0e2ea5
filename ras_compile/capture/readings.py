"""What Python code reads from tensors: noted while a model runs, and played back while it is traced."""

from __future__ import annotations

import copy
import linecache
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ras_compile._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FunctionalTensor,
    GuardOnDataDependentSymNode,
    pytree,
)
from ras_compile.capture.export import filled
from ras_compile.capture.facts import Fact
from ras_compile.capture.readers import (
    ANSWERED,
    FACTORIES,
    INDEXING,
    MASKING,
    REPEATING,
    SIZED,
    VALUES,
    index_of,
    parts,
    pick_run,
    readers,
    run_of,
)
from ras_compile.errors import UnsupportedGraph

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
_DATA: Any = Tensor.data


@dataclass
class Reading:
    """One reading of tensors by Python code."""

    function: str  # name of what read them
    read: list[Tensor]  # their values
    result: Any  # what it returned: Python values, or tensors
    source: str  # the user's source line


@dataclass
class Closed:
    """A tensor that a model reads and that is no argument: a weight, or a table that it keeps.

    Attributes:
        owner, name: the module's dictionary that it is looked up in at each call; None for a table.
    """

    tensor: Tensor  # the tensor, as it was when the graph was made
    owner: dict[str, Any] | None = None
    name: str = ""


class Readings(TorchFunctionMode):
    """Sees every PyTorch function that Python code calls, and handles those that read values.

    Args:
        runs: read the places of index tensors, too.
    """

    def __init__(self, runs: bool) -> None:
        super().__init__()
        self.runs = runs

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = self.enter(args, kwargs or {})
        made = filled(function, args, kwargs)
        if made is not None:
            return self.leave(made)
        args, kwargs = self.numbers(function, args, kwargs)
        if function == _DATA.__get__:  # PyTorch 2.11 cannot trace it; without gradients it is a view
            return self.leave(args[0].view_as(args[0]))
        read = readers(function, args, kwargs)
        if read is not None:
            return self.leave(self.read(function, args, kwargs, read))
        index = index_of(function, args, kwargs) if self.runs else None
        if index is not None:
            return self.leave(self.pick(function, args, kwargs, index))
        return self.leave(function(*args, **kwargs))

    def numbers(self, function: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments, with tensors that stand for sizes and borders read as numbers."""

        def number(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point():
                return self.read(Tensor.__index__, (value,), {}, [value])
            return value

        if function in INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(bound, Tensor) for place in index if isinstance(place, slice) for bound in parts(place)):
                index = tuple(
                    slice(*map(number, parts(place))) if isinstance(place, slice) else place for place in index
                )
                args = (args[0], index, *args[2:])
        elif function in SIZED:
            first = () if function in FACTORIES else args[:1]
            rest, kwargs = pytree.tree_map(number, (args[len(first) :], kwargs))
            args = (*first, *rest)
        return args, kwargs

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs

    def leave(self, result: Any) -> Any:
        return result

    def read(self, function: Callable, args: tuple, kwargs: dict, read: list[Tensor]) -> Any:
        """Does what ``function`` does with values of the tensors in ``read``."""
        raise NotImplementedError

    def pick(self, function: Callable, args: tuple, kwargs: dict, index: Tensor) -> Any:
        """Does what ``function`` does with the places in ``index``."""
        raise NotImplementedError


class Noted(Readings):
    """Runs the model as it is: notes each reading, and each tensor that comes from neither arguments nor functions."""

    def __init__(self, given: Sequence[Tensor], weights: dict[int, Closed], runs: bool) -> None:
        super().__init__(runs)
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary(dict.fromkeys(given, True))
        self.weights = weights
        self.closed: dict[int, Closed] = {}
        self.readings: list[Reading] = []

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for value in tensors_of((args, kwargs)):
            if value not in self.known and id(value) not in self.closed:
                self.closed[id(value)] = self.weights.get(id(value)) or Closed(value)
        return args, kwargs

    def leave(self, result: Any) -> Any:
        for value in tensors_of(result):
            self.known[value] = True
        return result

    def read(self, function: Callable, args: tuple, kwargs: dict, read: list[Tensor]) -> Any:
        values = [value.detach().clone() for value in read]
        places: Any = None  # what is noted in place of the result; before the call, which may write into a mask
        if function in INDEXING:
            places = [whereabouts(value) for value in read]
        elif function in MASKING:
            places = whereabouts(read[0].broadcast_to(broadcast_shape(args[0], read[0])))
        elif function in REPEATING:
            places = torch.repeat_interleave(read[0])
        found = function(*args, **kwargs)
        noted = copy.deepcopy(found if places is None else places)
        self.readings.append(Reading(function.__name__, values, noted, user_line()[0]))
        return found

    def pick(self, function: Callable, args: tuple, kwargs: dict, index: Tensor) -> Any:
        run = run_of(index)
        self.readings.append(Reading(function.__name__, [index.detach().clone()], run, user_line()[0]))
        return function(*args, **kwargs)


def broadcast_shape(*tensors: Tensor) -> torch.Size:
    return torch.broadcast_shapes(*(tensor.shape for tensor in tensors))


def whereabouts(mask: Tensor) -> tuple[Tensor, ...] | slice:
    """The places of a boolean mask's true entries: index tensors, or a slice where a vector's stand together."""
    found = mask.nonzero(as_tuple=True)
    if mask.ndim == 1 and len(found[0]):
        start, stop = int(found[0][0]), int(found[0][-1]) + 1
        if stop - start == len(found[0]):
            return slice(start, stop)
    return found


class Replayed(Readings):
    """Traces the model: plays the readings back, and gives an input's placeholder for each closed tensor."""

    def __init__(
        self, readings: Sequence[Reading], inputs: dict[int, Tensor], constants: dict[int, Tensor], runs: bool
    ) -> None:
        super().__init__(runs)
        self.readings, self.inputs, self.constants = iter(readings), inputs, constants
        self.facts: list[Tensor] = []
        self.found: list[Fact] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        line, stack = user_line()
        fx_traceback.set_stack_trace([stack])
        if function == _DATA.__set__:  # no op of PyTorch says it, so no trace would have it
            raise UnsupportedGraph(
                "the model assigns to the `data` of a tensor; write into it with `copy_`", source=line
            )
        try:
            return super().__torch_function__(function, types, args, kwargs)
        except _DATA_DEPENDENT as error:
            name = getattr(function, "__name__", str(function))
            raise UnsupportedGraph(
                f"the sizes of a tensor depend on values in a way that cannot be traced, in {name}", source=line
            ) from error

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def swap(value: Any) -> Any:
            return self.inputs.get(id(value), value) if isinstance(value, Tensor) else value

        return pytree.tree_map(swap, (args, kwargs))

    def read(self, function: Callable, args: tuple, kwargs: dict, read: list[Tensor]) -> Any:
        noted = self.noted(function, read)
        self.specialise(read, noted)
        if function in VALUES:
            return copy.deepcopy(noted.result)
        if function in INDEXING:
            results = iter(noted.result)
            index: list[Any] = []
            for place in args[1] if isinstance(args[1], tuple) else (args[1],):
                boolean = isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8)
                told = self.constant(next(results)) if boolean else place
                index += told if boolean and isinstance(told, tuple) else [told]
            return function(args[0], tuple(index), *args[2:], **kwargs)
        if function in MASKING:
            found = self.constant(noted.result)
            return args[0].broadcast_to(broadcast_shape(args[0], read[0]))[found]
        if function in REPEATING:
            found = self.constant(noted.result)
            if len(args) + len(kwargs) == 1:
                return found
            dim = args[2] if len(args) > 2 else kwargs.get("dim")
            value = args[0] if dim is not None else args[0].flatten()
            return torch.index_select(value, 0 if dim is None else dim, found)
        return self.constant(noted.result)

    def pick(self, function: Callable, args: tuple, kwargs: dict, index: Tensor) -> Any:
        noted = self.noted(function, [index])
        if noted.result is None:
            return function(*args, **kwargs)
        self.specialise([index], noted)
        return pick_run(function, args, kwargs, noted.result)

    def noted(self, function: Callable, read: list[Tensor]) -> Reading:
        """What the next reading gave while the model ran as it is."""
        noted = next(self.readings, None)
        same = noted is not None and [v.shape for v in noted.read] == [v.shape for v in read]
        if noted is None or not same or noted.function != function.__name__:
            raise UnsupportedGraph("the model reads other values each time it runs", source=user_line()[0])
        return noted

    def specialise(self, read: list[Tensor], noted: Reading) -> None:
        """From now on the graph is one for these values alone."""
        for value, known in zip(read, noted.read, strict=True):
            self.facts.append(value.clone())
            self.found.append(Fact(known, noted.source))

    def constant(self, value: Any) -> Any:
        return pytree.tree_map(lambda leaf: self.constants[id(leaf)] if isinstance(leaf, Tensor) else leaf, value)


_plain_lock = threading.RLock()


@contextmanager
def plain_readings() -> Iterator[None]:
    """Tensors under functionalisation answer some readings (`tolist`, `repr`) themselves, past function modes; not in here."""
    with _plain_lock:
        own = {name: vars(FunctionalTensor)[name] for name in ANSWERED if name in vars(FunctionalTensor)}
        for name in own:
            delattr(FunctionalTensor, name)
        try:
            yield
        finally:
            for name, method in own.items():
                setattr(FunctionalTensor, name, method)


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def user_line() -> tuple[str, str]:
    """Where the user's code stands now: ``(file:line in function, as a stack trace)``."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _OURS)):
        frame = frame.f_back
    code = frame.f_code
    text = linecache.getline(code.co_filename, frame.f_lineno).strip()
    where = f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
    return where, f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n    {text}\n'
