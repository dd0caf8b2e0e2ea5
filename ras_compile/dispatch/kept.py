"""Captures that travel: which calls of a model another process may use, and the model's calls that use those of another one."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile._torch import (
    OptimizedModule,
    backend_of,
    globally_hooked,
    has_forward_hooks,
    original,
    pytree,
    runs_plain,
)
from ras_compile.capture.kept import Kept, keep
from ras_compile.dispatch.callers import compiled_call, kept_calls
from ras_compile.dispatch.traced import Exchangeable
from ras_compile.execute.compiling import compiling
from ras_compile.notices import fell_back, warn_once

log = logging.getLogger(__name__)

_ANEW = "a start that captures a model anew"
CALLS = 8  # of one model that are remembered
# No floats: a timestep may be one, and Dynamo takes it for a constant where it sees a single call.
_LEAVES = (type(None), bool, int, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Like:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    inference: bool

    def made(self) -> Tensor:
        with torch.inference_mode(self.inference):
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device).zero_()


@dataclass(frozen=True)
class Call:
    """The arguments of a call, without values of tensors.

    Attributes:
        spec: how they are nested.
        leaves: what they are made of.
        inference: whether it was in inference mode.
    """

    spec: Any
    leaves: tuple[Any, ...]
    inference: bool

    @staticmethod
    def of(args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """None for arguments that are not described so."""
        found, spec = pytree.tree_flatten((args, kwargs))
        leaves: list[Any] = []
        for leaf in found:
            if type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.requires_grad:
                leaves.append(_Like(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.is_inference()))
            elif type(leaf) in _LEAVES:
                leaves.append(leaf)
            else:
                return None
        return Call(spec, tuple(leaves), torch.is_inference_mode_enabled())

    def name(self) -> str:
        """One for all processes."""
        return hashlib.sha256(f"{self.spec} {self.leaves} {self.inference}".encode()).hexdigest()[:16]

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        leaves = [leaf.made() if isinstance(leaf, _Like) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


# By classes and weights: two models that are alike share what Dynamo captured.
called: weakref.WeakKeyDictionary[type[nn.Module], dict[str, list[Call]]] = weakref.WeakKeyDictionary()
_loaded: weakref.WeakKeyDictionary[nn.Module, dict[str, bytes]] = weakref.WeakKeyDictionary()


def remember() -> None:
    """Notes that the call that is running now was captured whole, for :func:`captures`."""
    found = compiled_call()
    if (
        found is None
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    ):
        return
    owner, args, kwargs = found
    model = original(owner)
    call, known = Call.of(args, kwargs), called.setdefault(type(model), {}).setdefault(weights_hash(model), [])
    if call is not None and call not in known and len(known) < CALLS:
        known.append(call)


def weights_hash(model: nn.Module) -> str:
    """Of the names, types and shapes of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {type(tensor).__name__} {tensor.dtype} {list(tensor.shape)}\n".encode())
    return digest.hexdigest()


def captures(model: nn.Module) -> dict[str, bytes]:
    """The calls of a model that were captured whole in this process, for :func:`give` in another one; captures them once more."""
    found: dict[str, bytes] = {}
    for call in called.get(type(model), {}).get(weights_hash(model), ()):
        try:
            with torch.inference_mode(call.inference), torch.no_grad(), compiling(announced=False):
                found[call.name()] = keep(model, *call.arguments())
        except Exception as error:  # of whatever kind: a start without it is a slower one
            fell_back(_ANEW, error)
            warn_once(
                f"a call of {type(model).__name__} cannot be written, so that each process that loads this captures it anew, "
                f"which takes seconds: {str(error).partition(chr(10))[0]}"
            )
    return found


def give(model: nn.Module, kept: Mapping[str, bytes]) -> None:
    """Lets a model use captures of another process from its first call on."""
    _loaded[model] = dict(kept)


def runs_its_class(model: nn.Module) -> bool:
    """Whether the forward of a model's class is all that its call runs."""
    return "forward" not in vars(model) and not has_forward_hooks(model) and not globally_hooked()


class KeptCalls(Exchangeable):
    """Calls a capture of another process, where one fits, and else what Dynamo compiles.

    Args:
        compiled: what Dynamo compiles.
        model: the module that is called.
        kept: captures, by the names of their calls.
        backend: makes of a graph and its inputs what runs in its place.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        model: nn.Module,
        kept: Mapping[str, bytes],
        backend: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    ) -> None:
        self.compiled, self._model, self._backend = compiled, weakref.ref(model), backend
        self._waiting, self._known = dict(kept), list[Kept]()
        self._told: set[str | None] = set()  # calls, by their names, of which it was said that they are captured anew

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is not None and runs_its_class(model) and not runs_plain():
            kept = next((one for one in self._known if one.fits(model, args, kwargs)), None)
            if kept is None and (self._waiting or not self._told):
                kept = self._made(model, args, kwargs)
            if kept is not None:
                return self._run(kept, model, model.forward, args, kwargs)
        return self.compiled(*args, **kwargs)

    def _made(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Kept | None:
        """The capture for a call that is the first one of its kind; None where there is none, or it is not right here."""
        call = Call.of(args, kwargs)
        name = None if call is None else call.name()
        if name not in self._waiting:
            # another thread may have made it meanwhile
            kept = next((one for one in self._known if one.fits(model, args, kwargs)), None)
            if kept is None and name not in self._told:
                self._told.add(name)
                log.info("a call of %s is captured anew: nothing that was loaded is of its kind", type(model).__name__)
            return kept
        with compiling(announced=False):
            for known in self._known:  # another thread has made it
                if known.fits(model, args, kwargs):
                    return known
            content = self._waiting.pop(name, None)
            if content is None:
                return None
            self._told.add(name)
            try:
                kept = Kept(model, content, args, kwargs, self._backend)
            except Exception as error:  # of whatever kind: Dynamo captures the call
                fell_back(_ANEW, error)
                log.info("%s is captured anew: %s", type(model).__name__, error)
                return None
            self._known.append(kept)
            if kept.fits(model, args, kwargs):
                return kept
            log.info("%s is captured anew: its guards say that this call is another one", type(model).__name__)
            return None

    def _run(self, kept: Kept, model: nn.Module, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Its arguments have the names by which `dispatch/callers.py` finds what is called."""
        return kept(model, args, kwargs)


kept_calls.append(KeptCalls._run.__code__)


def with_loaded(
    compiled: Callable[..., Any],
    model: nn.Module,
    backend: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """What is compiled of a model, with the captures in front of it that it was given."""
    kept = _loaded.get(model)
    there = isinstance(compiled, KeptCalls)  # since a call before that raised an error
    return compiled if kept is None or there else KeptCalls(compiled, model, kept, backend)


def use_loaded(compiled: OptimizedModule) -> None:
    """Puts the captures that a model was given in front of what `torch.compile` returned for it."""
    backend = backend_of(compiled)
    if getattr(backend, "dynamic", None) is not True:  # captures are of fixed sizes
        compiled.forward = with_loaded(compiled.forward, original(compiled), backend)
