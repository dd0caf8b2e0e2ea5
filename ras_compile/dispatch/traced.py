"""A model that Dynamo cannot capture as one graph, captured by tracing it: see `capture/tracing.py`.

Dynamo breaks such a model's graph and hands a backend its parts. The first part that runs finds out which model the user
compiled, and from then on the compiled object calls a :class:`TracedModel` instead of Dynamo's parts.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile import _torch
from ras_compile._torch import OptimizedModule, call_uncompiled, pytree
from ras_compile.capture.inputs import GraphInput, describe_arguments, find_timestep, varies
from ras_compile.capture.python_state import PythonState
from ras_compile.capture.tracing import Trace, parts_uncompiled, trace
from ras_compile.config import RASConfig
from ras_compile.dispatch.callers import compiled_call, compiled_modules
from ras_compile.dispatch.dispatcher import (
    Dispatcher,
    Entry,
    Refusal,
    entries_at,
    key_of,
    packed,
    places_given,
    without_traceback,
)
from ras_compile.dispatch.fixed import Fixed, same_objects
from ras_compile.dispatch.hooks import Hooked, has_hooks, refuse_hooks
from ras_compile.dispatch.kinds import gradients_recorded, records_gradients
from ras_compile.errors import SpecViolation, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.execute.cudagraphs import plain_mode
from ras_compile.notices import fell_back
from ras_compile.plans.plan import Plan
from ras_compile.sampling.branches import versions_of
from ras_compile.sampling.locate import note_reached
from ras_compile.sampling.state import TransformerState

# So many sets of values (lengths of prompts, say) are compiled for one set of sizes; further ones run dense.
_SPECIALISATIONS = 16
_LEAVES = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, slice)


class TracedEntry(Entry):
    """An entry for calls that find the same Python state in the model, and the same values where its code reads some."""

    def __init__(
        self, trace: Trace, state: PythonState, plan: Plan, inputs: Sequence[GraphInput], values: Sequence[Any],
        config: RASConfig,
    ) -> None:  # fmt: skip
        arguments = len(inputs) - len(trace.closed)
        super().__init__(plan, inputs, values, range(arguments), config)
        self.trace, self.state = trace, state
        # tables that the model keeps may be made anew, and do not tell which model it is
        self.weights_of = entries_at(
            [arguments + place for place, closed in enumerate(trace.closed) if closed.owner is not None]
        )
        # inputs that were seen to give the same facts, by identity and version
        self._seen: deque[tuple[list[weakref.ref], list[int | None]]] = deque(maxlen=8)
        self.fixed = Fixed(inputs, values)

    def fitting(self, given: Sequence[Any]) -> list[Any] | None:
        """The plan's inputs for a call with these arguments; None where the plan is not one for it.

        Facts are computed again only when an input that they depend on is another object, or was written to.
        """
        if not self.state.holds():
            return None
        values = inputs_of(self.trace, given)
        if self.fixed.places and self.fixed.token(values):
            return None
        tensors = [value for value in values if isinstance(value, Tensor)]
        read = [tensors[index] for index in self.trace.guard.reads]
        versions = versions_of(read)
        if None not in versions and any(versions == old and same_objects(read, seen) for seen, old in self._seen):
            return values
        if not self.trace.guard.holds(tensors):
            return None
        if None not in versions:
            self._seen.append(([weakref.ref(value) for value in read], versions))
        return values


def inputs_of(trace: Trace, given: Sequence[Any]) -> list[Any]:
    """The inputs of a traced graph for a call: the leaves of its arguments, then the tensors that are no arguments."""
    return [*given, *[c.tensor if c.owner is None else c.owner[c.name] for c in trace.closed]]


class _Here(threading.local):
    """What this thread is in the middle of.

    Attributes:
        falling_back: a model that was refused runs by Dynamo's parts: none of them is the whole.
        capturing: a model was captured, in a call that may not have returned yet.
    """

    falling_back = False
    capturing = False


here = _Here()


def captured_in_this_call() -> bool:
    """Whether the present call is the one in which its model was captured. Looks only if there was such a call of late."""
    if not here.capturing:
        return False
    here.capturing = any(isinstance(callee(owner), TracedModel) for owner in compiled_modules())
    return here.capturing


def specialise(root: nn.Module, args: tuple, kwargs: dict, leaves: Sequence[Any], config: RASConfig) -> TracedEntry:
    """Traces one call and makes its plan.

    Args:
        leaves: those of the arguments, as :func:`lifted` gives them.

    Raises:
        UnsupportedGraph: the call cannot be traced, or its graph cannot be proved right.
    """
    strange = next((leaf for leaf in leaves if not isinstance(leaf, _LEAVES)), None)
    if strange is not None:
        raise UnsupportedGraph(
            f"an argument is or holds a {type(strange).__name__}; tensors, numbers and words are supported"
        )
    refuse_hooks(root)
    own, structure = pytree.tree_flatten((args, kwargs))
    given = args, kwargs
    args, kwargs = pytree.tree_unflatten(list(leaves), structure)
    changed = any(isinstance(mine, int | float) and mine is not leaf for mine, leaf in zip(own, leaves, strict=True))
    if changed and not same_noise(root, given, (args, kwargs)):
        raise UnsupportedGraph(
            "the timestep is a Python number, and Dynamo broke the model's graph, which is traced instead; with a tensor in "
            "place of the number the model computes something else: give it a tensor that it can take"
        )
    try:
        return _specialise(root, args, kwargs, config, runs=False)
    except UnsupportedGraph:
        if not places_given(leaves):
            raise
    return _specialise(root, args, kwargs, config, runs=True)


def same_noise(root: nn.Module, one: tuple[tuple, dict], other: tuple[tuple, dict]) -> bool:
    """Whether a model returns the same, up to rounding, for two spellings of its arguments and keyword arguments."""
    with torch.no_grad(), parts_uncompiled(root):
        wanted = pytree.tree_leaves(call_uncompiled(root, *one[0], **one[1]))
        try:
            found = pytree.tree_leaves(call_uncompiled(root, *other[0], **other[1]))
        except Exception as error:  # of any kind: the model has just run
            fell_back("a number that could not be a tensor", error)
            return False
    kinds = [[(type(v), getattr(v, "shape", None), getattr(v, "dtype", None)) for v in one] for one in (found, wanted)]
    if kinds[0] != kinds[1]:
        return False
    tensors = [(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, wanted, strict=True) if isinstance(a, Tensor)]
    return all(
        bool((a - b).abs().max() <= 0.01 * b.abs().max()) for a, b in tensors if a.numel() and a.is_floating_point()
    )


def lifted(leaves: Sequence[Any], described: Sequence[GraphInput], config: RASConfig) -> list[Any]:
    """The leaves of a call's arguments as one trace serves them all: times as tensors, and what may be a latent packed."""

    def lift(leaf: Any, given: GraphInput) -> Any:
        if isinstance(leaf, Tensor):  # what is repeated, as a mask for all heads is, stays small
            return packed(leaf) if leaf.ndim > 2 and leaf.is_floating_point() and 0 not in leaf.stride() else leaf
        if not varies(given, leaf, config.timestep):
            return leaf
        return torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else torch.int64)

    return list(map(lift, leaves, described))


def _specialise(root: nn.Module, args: tuple, kwargs: dict, config: RASConfig, *, runs: bool) -> TracedEntry:
    leaves, _ = flattened(args, kwargs)
    traced = trace(root, args, kwargs, runs=runs)
    state, values = PythonState(root), inputs_of(traced, leaves)
    closed = [GraphInput(None, entry.name, weight=True) for entry in traced.closed]
    inputs = [*describe_arguments(type(root).forward, args, kwargs), *closed]
    entry = TracedEntry(traced, state, traced_plan(traced, inputs, values, config), inputs, values, config)
    if entry.timestep is not None and isinstance(values[entry.timestep], Tensor):
        refuse_readings(traced, values, entry.timestep, "timestep")
    return entry


def traced_plan(traced: Trace, inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig) -> Plan:
    """The plan of a traced graph.

    Raises:
        UnsupportedGraph: the graph cannot be proved right, or it was specialised on the latent's values.
    """
    shapes = {tuple(node.meta["val"].shape) for node in output_nodes(traced.graph)}
    try:
        plan = Plan(traced.graph, inputs, values, config)
    except UnsupportedGraph:
        for index, (given, value) in enumerate(zip(inputs, values, strict=True)):
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if floating and not given.weight and tuple(value.shape) in shapes:
                refuse_readings(traced, values, index, "latent")  # the deeper reason
        raise
    refuse_readings(traced, values, plan.latent, "latent")
    return plan


def output_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph's outputs that are tensors."""
    return [node for node in graph.graph.output_node().all_input_nodes if isinstance(node.meta.get("val"), Tensor)]


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
    facts = traced.guard.facts_depending_on(place)
    facts = [fact for fact in facts if what == "latent" or fact.value.dtype != torch.bool]
    if facts:
        experts = "; a part of the model that treats each token alone may say so: `part.token_wise = True`"
        raise UnsupportedGraph(
            f"Python code reads a value that depends on the {what}'s values{experts if what == 'latent' else ''}",
            source=facts[0].source,
        )


def flattened(args: tuple, kwargs: dict) -> tuple[list[Any], Hashable]:
    """The leaves of a call's arguments, and what tells their structure from others."""
    leaves = [*args, *kwargs.values()]
    for leaf in leaves:
        if not isinstance(leaf, _LEAVES):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            return leaves, str(spec)
    return leaves, (len(args), *kwargs)


class TracedModel(Dispatcher[TracedEntry]):
    """Called in place of a model: finds the entry that fits the call, or makes one, and runs its step.

    Args:
        compiled: what Dynamo made of it, for calls that cannot be proved right.
    """

    def __init__(self, root: nn.Module, compiled: Callable[..., Any], config: RASConfig) -> None:
        super().__init__(config)
        self._root, self.compiled = weakref.ref(root), compiled
        self._described: dict[Hashable, list[GraphInput]] = {}  # by the structure of the arguments
        self._told: TransformerState | None = None  # to which calls were told that ran dense

    @property
    def root(self) -> nn.Module:
        """The model; it lives for as long as what the user compiled, which calls this."""
        root = self._root()
        assert root is not None
        return root

    def prepare(self, args: tuple, kwargs: dict) -> bool:
        """Whether a call can be made; makes its entry, and makes it.

        What the user gets of the present call is what Dynamo's parts compute: none of our code runs behind the last of them. It is
        made here beside that, so that the generation goes on from it as from any other call.
        """
        own, structure = flattened(args, kwargs)
        with compiling(announced=False):
            leaves = self.lifted(own, structure, args, kwargs)
            key = self.key(leaves, structure)
            found = self.make(key, leaves, args, kwargs)
        if found is None:
            self._tell_dense(self.refused[key], own)
            return False
        entry, values = found
        # the caches are plain tensors, whatever mode the model's own code has entered here: later calls may be in another one
        with plain_mode(values[entry.plan.latent].device), suppress(torch.OutOfMemoryError):
            self.run(entry, values, [*own, *values[len(own) :]], entry.weights_of(values))
        return True

    def lifted(self, leaves: list[Any], structure: Hashable, args: tuple, kwargs: dict) -> list[Any]:
        """The leaves of a call's arguments as the trace takes them; see :func:`lifted`."""
        if structure not in self._described:
            self._described[structure] = describe_arguments(type(self.root).forward, args, kwargs)
        return lifted(leaves, self._described[structure], self.config)

    def fall_back(self, args: tuple, kwargs: dict) -> Any:
        """Runs a call by Dynamo's parts, none of which is the whole model."""
        before, here.falling_back = here.falling_back, True
        try:
            return self.compiled(*args, **kwargs)
        finally:
            here.falling_back = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note_reached()
        own, structure = flattened(args, kwargs)
        if torch.is_grad_enabled() and records_gradients(itertools.chain(own, self.root.parameters())):
            result = self.fall_back(args, kwargs)  # whose parts refuse to record gradients
            self._tell_dense(Refusal(gradients_recorded()), own)
            return result
        leaves = self.lifted(own, structure, args, kwargs)
        key = self.key(leaves, structure)
        found = self.find(key, leaves)
        if found is None and not self._is_refused(key):
            with compiling(announced=False):  # the model's own code runs
                found = self.find(key, leaves) or self.make(key, leaves, args, kwargs)
        if found is None:
            result = self.fall_back(args, kwargs)
            self._tell_dense(self.refused[key], own)
            return result
        entry, values = found
        mine = [*own, *values[len(own) :]]
        outputs, traced = iter(self.run(entry, values, mine, entry.weights_of(values))), entry.trace
        flat = [
            next(outputs) if tensor else other for tensor, other in zip(traced.is_tensor, traced.others, strict=True)
        ]
        return pytree.tree_unflatten(flat, traced.output_spec)

    def key(self, leaves: Sequence[Any], structure: Hashable) -> tuple:
        """The arguments, and the ambient state that code may read."""
        kinds = sorted({v.device.type for v in leaves if isinstance(v, Tensor)})
        ambient = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        return key_of(leaves), structure, tuple(ambient), torch.get_default_dtype()

    def find(self, key: tuple, leaves: Sequence[Any]) -> tuple[TracedEntry, Sequence[Any]] | None:
        """The entry that fits a call, and the inputs of its plan."""
        for entry in self.plans.get(key, ()):
            values = entry.fitting(leaves)
            if values is not None:
                return entry, values
        return None

    def _is_refused(self, key: tuple) -> bool:
        """Whether such a call was refused for a reason that still holds."""
        refusal = self.refused.get(key)
        if refusal is None or refusal.hooked is None:
            return refusal is not None
        module = refusal.hooked()
        return module is not None and has_hooks(module)

    def make(
        self, key: tuple, leaves: Sequence[Any], args: tuple, kwargs: dict
    ) -> tuple[TracedEntry, Sequence[Any]] | None:
        """Makes the entry of a call; None (with a warning) where it runs dense.

        Raises:
            UnsupportedGraph: it cannot be made, and the option ``unsupported`` is "error".
        """
        entries = self.plans.setdefault(key, [])
        entries[:] = [entry for entry in entries if entry.state.holds()]
        try:
            if len(entries) >= _SPECIALISATIONS:
                raise UnsupportedGraph(f"values that Python code reads differ in more than {_SPECIALISATIONS} ways")
            entry = specialise(self.root, args, kwargs, leaves, self.config)
        except (UnsupportedGraph, SpecViolation) as error:
            hooked = error.module if isinstance(error, Hooked) else None
            timestep = find_timestep(
                describe_arguments(type(self.root).forward, args, kwargs), leaves, self.config.timestep
            )
            self.refused[key] = Refusal(without_traceback(error), timestep, hooked)
            self.refuse(error, self.root)
            return None
        self.keep(key, entry)
        return entry, inputs_of(entry.trace, leaves)

    def plan_for(self, entry: TracedEntry, values: Sequence[Any], config: RASConfig) -> Plan:
        return traced_plan(entry.trace, entry.inputs, values, config)

    def _tell_dense(self, refusal: Refusal, leaves: Sequence[Any]) -> None:
        weights = [*self.root.parameters(), *self.root.buffers()]
        self._told = self.tell_dense(weights, refusal, leaves, self._told)


@torch.compiler.disable
def retry_by_tracing(config: RASConfig) -> bool | None:
    """Called by a part of a model: lets the model be called as a :class:`TracedModel` from now on.

    Returns:
        True where the present call can be traced, so that its parts need no compiling; False where it was refused and that was
        told; None where nobody is to be found who calls the model, and nothing was told.

    Raises:
        UnsupportedGraph: it cannot be traced, and the option ``unsupported`` is "error".
    """
    found = compiled_call()
    if found is None:
        return None
    owner, args, kwargs = found
    present = callee(owner)
    if isinstance(present, TracedModel):
        return not here.falling_back
    root = _torch.original(owner)
    model = TracedModel(root, present, config)
    if isinstance(owner, OptimizedModule):
        owner.forward = model
    elif isinstance(held := _torch.compiled_call(owner), Exchangeable):
        held.compiled = model
    else:
        _torch.set_compiled_call(owner, model)
    here.capturing = True
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
