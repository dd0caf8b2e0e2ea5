"""A model that Dynamo cannot capture as one graph, captured by tracing it: see `tracing.py`.

Dynamo breaks such a model's graph and hands a backend its fragments. The first fragment that runs finds out which model
the user compiled, and from then on the compiled object calls a :class:`TracedModel` instead of Dynamo's fragments.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile import _torch
from ras_compile._torch import OptimizedModule, pytree, version_of
from ras_compile.capture.inputs import GraphInput, argument_names, find_timestep, key_of
from ras_compile.capture.python_state import PythonState
from ras_compile.capture.tracing import Trace, trace
from ras_compile.config import RASConfig
from ras_compile.dispatch.callers import compiled_call
from ras_compile.errors import SpecViolation, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.notices import warn_once
from ras_compile.plans.plan import Plan
from ras_compile.sampling.locate import note_reached
from ras_compile.sampling.steps import count_step, run_step

# So many sets of values (lengths of prompts, say) are compiled for one set of sizes; further ones run dense.
_SPECIALISATIONS = 16
_LEAVES = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, slice)


@dataclass
class Specialisation:
    """A plan for calls of one kind: the same sizes, numbers, Python state and facts.

    Attributes:
        trace: what tracing gave.
        state: the model's Python objects when it was traced.
        inputs: description of the plan's inputs: leaves of the arguments, then closed tensors.
        plan: the plan.
        timestep: position of the timestep among the inputs, or None.
        known: inputs that were seen to give the same facts, by identity and version.
    """

    trace: Trace
    state: PythonState
    inputs: list[GraphInput]
    plan: Plan
    timestep: int | None
    known: deque = field(default_factory=lambda: deque(maxlen=8))

    def values(self, leaves: Sequence[Any]) -> list[Any]:
        """The plan's inputs for a call with these leaves."""
        return [*leaves, *(closed.now() for closed in self.trace.closed)]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether the call is one that was traced: the model's state and what Python code read are as they were.

        Facts are computed again only when an input that they depend on is another object, or was written to.
        """
        if not self.state.holds():
            return False
        tensors = [value for value in self.values(leaves) if isinstance(value, Tensor)]
        read = [tensors[index] for index in self.trace.guard.reads]
        versions = versions_of(read)
        if any(versions == old and same_objects(read, seen) for seen, old in self.known):
            return True
        if not self.trace.guard.holds(tensors):
            return False
        if versions is not None:
            self.known.append(([weakref.ref(value) for value in read], versions))
        return True


def same_objects(tensors: Sequence[Tensor], seen: Sequence[weakref.ref]) -> bool:
    return all(value is other() for value, other in zip(tensors, seen, strict=True))


def versions_of(tensors: Sequence[Tensor]) -> list[int] | None:
    """How often each tensor was written to; None where that is not counted (tensors made under inference_mode)."""
    if any(value.is_inference() for value in tensors):
        return None
    return [version_of(value) for value in tensors]


_fragments = threading.local()


def falling_back() -> bool:
    """Whether a model that was refused runs in this thread, by Dynamo's fragments: none of them is the whole."""
    return getattr(_fragments, "running", False)


def specialise(root: nn.Module, args: tuple, kwargs: dict, config: RASConfig) -> Specialisation:
    """Traces one call and makes its plan.

    Raises:
        UnsupportedGraph: the call cannot be traced, or its graph cannot be proved right.
    """
    leaves, _ = pytree.tree_flatten((args, kwargs))
    strange = next((leaf for leaf in leaves if not isinstance(leaf, _LEAVES)), None)
    if strange is not None:
        raise UnsupportedGraph(
            f"an argument is or holds a {type(strange).__name__}; tensors, numbers and words are supported"
        )
    hooked = next(((name, module) for name, module in root.named_modules() if has_hooks(module)), None)
    if hooked is not None:
        raise Hooked(*hooked)
    try:
        return _specialise(root, args, kwargs, config, runs=False)
    except UnsupportedGraph:
        if not places_given(leaves):
            raise
    return _specialise(root, args, kwargs, config, runs=True)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: what that is must happen at each call, and not be traced."""
    forward = vars(module).get("forward")  # hooks that have been taken away may leave the class's own there
    own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return _torch.has_forward_hooks(module) or (forward is not None and not own)


class Hooked(UnsupportedGraph):
    """A model that cannot be traced while ``module``, the part of it called ``name``, has hooks."""

    def __init__(self, name: str, module: nn.Module) -> None:
        place = f"its part {name!r}" if name else "the model"
        super().__init__(
            f"Dynamo broke the model's graph, and it cannot be traced instead: {place} has hooks, or a forward that was put in "
            "place of its class's (as offloading and diffusers' caches do)"
        )
        self.module = weakref.ref(module)


def places_given(values: Sequence[Any]) -> bool:
    """Whether an argument may say where tokens stand: a vector of whole numbers."""
    return any(
        isinstance(v, Tensor) and v.ndim == 1 and len(v) > 1 and v.dtype in (torch.int64, torch.int32) for v in values
    )


def _specialise(root: nn.Module, args: tuple, kwargs: dict, config: RASConfig, *, runs: bool) -> Specialisation:
    leaves, _ = pytree.tree_flatten((args, kwargs))
    traced = trace(root, args, kwargs, runs=runs)
    state = PythonState(root)
    inputs = [*describe(root, args, kwargs), *(GraphInput(None, entry.name, weight=True) for entry in traced.closed)]
    values = [*leaves, *(entry.now() for entry in traced.closed)]
    shapes = {tuple(node.meta["val"].shape) for node in output_nodes(traced.graph)}
    try:
        plan = Plan(traced.graph, inputs, values, config)
    except UnsupportedGraph:
        for index, value in enumerate(leaves):
            if isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) in shapes:
                refuse_readings(traced, values, index, "latent")  # the deeper reason
        raise
    refuse_readings(traced, values, plan.latent, "latent")
    timestep = find_timestep(inputs, values, config.timestep)
    if timestep is not None and isinstance(values[timestep], Tensor):
        refuse_readings(traced, values, timestep, "timestep")
    return Specialisation(traced, state, inputs, plan, timestep)


def output_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph's outputs that are tensors."""
    return [
        node
        for node in next(iter(reversed(graph.graph.nodes))).all_input_nodes
        if isinstance(node.meta.get("val"), Tensor)
    ]


def refuse_readings(traced: Trace, values: Sequence[Any], changing: int, what: str) -> None:
    """Refuses a graph that was specialised on a value that depends on an input which changes at each step.

    Tests of the timestep are allowed (`if t > 500`): they have few outcomes.

    Args:
        changing: its position among the values.
        what: "latent" or "timestep".

    Raises:
        UnsupportedGraph: there is such a value.
    """
    place = sum(isinstance(value, Tensor) for value in values[:changing])
    facts = [fact for fact in traced.guard.hanging_on(place) if what == "latent" or fact.value.dtype != torch.bool]
    if facts:
        raise UnsupportedGraph(f"Python code reads a value that depends on the {what}'s values", source=facts[0].source)


def describe(root: nn.Module, args: tuple, kwargs: dict) -> list[GraphInput]:
    """The leaves of a call's arguments, by the names of the forward's parameters."""
    names = argument_names(type(root).forward)
    found = []
    for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]:
        keys: list[Any] = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", ""))) for key in path[1:]]
        positional = path[0].idx == 0  # type: ignore[attr-defined]
        head = names[keys[0]] if positional and keys[0] < len(names) else str(keys[0])
        found.append(GraphInput(head, head + "".join(f"[{str(key)!r}]" for key in keys[1:])))
    return found


class TracedModel:
    """Called in place of a model: finds the specialisation that fits the call, or makes one, and runs its step.

    Args:
        root: the model.
        compiled: what Dynamo made of it, for calls that cannot be proved right.
        config: the options.
    """

    def __init__(self, root: nn.Module, compiled: Callable[..., Any], config: RASConfig) -> None:
        self.root, self.compiled, self.config = weakref.ref(root), compiled, config
        self.found: dict[tuple, list[Specialisation]] = {}
        self.dense: dict[tuple, weakref.ref | None] = {}  # refused calls, and the part that has hooks, if that is why

    def prepare(self, args: tuple, kwargs: dict) -> bool:
        """Whether a call can be made; makes its specialisation. See :meth:`make`. The present one counts as a step."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        with compiling(told=False):
            made = self.make(self.key(leaves, spec), args, kwargs)
        if made is not None:
            count_step(made.plan, **self.call(made, leaves))
        return made is not None

    def fall_back(self, args: tuple, kwargs: dict) -> Any:
        before, _fragments.running = falling_back(), True
        try:
            return self.compiled(*args, **kwargs)
        finally:
            _fragments.running = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note_reached()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if torch.is_grad_enabled():
            return self.fall_back(args, kwargs)  # whose fragments refuse what records gradients
        key = self.key(leaves, spec)
        fitting = self.fitting(key, leaves)
        if fitting is None and not self.refused(key):
            with compiling(told=False):  # the model's own code runs
                fitting = self.fitting(key, leaves) or self.make(key, args, kwargs)
        if fitting is None:
            return self.fall_back(args, kwargs)
        return self.run(fitting, key, leaves)

    def key(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> tuple:
        """Sizes, strides and types of tensors, other arguments themselves, and the ambient state that code may read."""
        kinds = {v.device.type for v in leaves if isinstance(v, Tensor)}
        ambient = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)
        )
        return key_of(leaves), str(spec), ambient, torch.get_default_dtype()

    def fitting(self, key: tuple, leaves: Sequence[Any]) -> Specialisation | None:
        return next((entry for entry in self.found.get(key, ()) if entry.fits(leaves)), None)

    def refused(self, key: tuple) -> bool:
        """Whether such a call was refused for a reason that still holds."""
        if key not in self.dense:
            return False
        hooked = self.dense[key]
        return hooked is None or ((module := hooked()) is not None and has_hooks(module))

    def make(self, key: tuple, args: tuple, kwargs: dict) -> Specialisation | None:
        """Makes the specialisation of a call; None (with a warning) where it runs dense.

        Raises:
            UnsupportedGraph: it cannot be made, and the option ``unsupported`` is "error".
        """
        root, known = self.root(), self.found.setdefault(key, [])
        known[:] = [entry for entry in known if entry.state.holds()]
        assert root is not None
        try:
            if len(known) >= _SPECIALISATIONS:
                raise UnsupportedGraph(f"values that Python code reads differ in more than {_SPECIALISATIONS} ways")
            if self.counts_time(key):
                raise UnsupportedGraph(
                    "the timestep is a Python number, and Dynamo broke the model's graph, which is traced instead: for one "
                    "value of each number; a tensor is supported"
                )
            made = specialise(root, args, kwargs, self.config)
        except (UnsupportedGraph, SpecViolation) as error:
            if self.config.unsupported == "error":
                raise
            self.dense[key] = error.module if isinstance(error, Hooked) else None
            warn_once(f"ras_compile: {type(root).__name__} runs dense: {error}")
            return None
        known.append(made)
        return made

    def counts_time(self, key: tuple) -> bool:
        """Whether a call differs from one that was traced in its timestep alone, a Python number."""
        leaves, *others = key
        for (known, *rest), entries in self.found.items():
            for place in {entry.timestep for entry in entries} & set(range(len(known))):
                if len(known) != len(leaves) or rest != others or known[place][0] not in (int, float):
                    continue
                if [a == b for a, b in zip(known, leaves, strict=True)].count(False) == 1 and known[place] != leaves[
                    place
                ]:
                    return True
        return False

    def call(self, entry: Specialisation, leaves: Sequence[Any]) -> dict[str, Any]:
        """What a step must know of a call."""
        plan, values, time = entry.plan, entry.values(leaves), entry.timestep
        return dict(
            graph=plan.identity,
            latent=values[plan.latent],
            context=tuple(v for index, v in enumerate(leaves) if index not in (plan.latent, time)),
            timestep=None if time is None else values[time],
            weights=[closed.now() for closed in entry.trace.closed if closed.owner is not None],
            config=self.config,
        )

    def run(self, entry: Specialisation, key: tuple, leaves: Sequence[Any]) -> Any:
        given = iter(run_step(entry.plan, entry.values(leaves), **self.call(entry, leaves)))
        flat = [
            next(given) if tensor else other
            for tensor, other in zip(entry.trace.is_tensor, entry.trace.others, strict=True)
        ]
        return pytree.tree_unflatten(flat, entry.trace.output_spec)


@torch.compiler.disable
def take_over(config: RASConfig) -> bool | None:
    """Called by a fragment of a model: lets the model be called as a :class:`TracedModel` from now on.

    Returns:
        True where the present call can be traced, so that its fragments need no compiling; False where it was refused
        and that was told; None where nobody is to be found who calls the model, and nothing was told.

    Raises:
        UnsupportedGraph: it cannot be traced, and the option ``unsupported`` is "error".
    """
    found = compiled_call()
    if found is None:
        return None
    owner, args, kwargs = found
    present = callee(owner)
    if isinstance(present, TracedModel):
        return not falling_back()
    root = _torch.original(owner)
    model = TracedModel(root, present, config)
    if isinstance(owner, OptimizedModule):
        owner.forward = model
    elif isinstance(held := _torch.compiled_call(owner), Exchangeable):
        held.compiled = model
    else:
        _torch.set_compiled_call(owner, model)
    return model.prepare(args, kwargs)


class Exchangeable:
    """A callable that calls another one, ``compiled``, which may be exchanged."""

    compiled: Callable[..., Any]


def callee(owner: nn.Module) -> Callable[..., Any]:
    """What is called when the user calls a compiled module."""
    if isinstance(owner, OptimizedModule):
        return owner.forward
    held = _torch.compiled_call(owner)
    assert held is not None
    return held.compiled if isinstance(held, Exchangeable) else held
