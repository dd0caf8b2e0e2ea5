"""Which transformer is it? Two instances of one class share a compiled graph; their weights tell them apart."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ras_compile.config import RASConfig
from ras_compile.sampling.state import TransformerState

__all__ = ["Part", "state_for", "states_of"]


class Part(Sequence[Any]):
    """Entries of a sequence, looked up when they are asked for: a call has hundreds of weights, and three are looked at.

    Args:
        whole: the sequence.
        places: where its entries stand there.
    """

    def __init__(self, whole: Sequence[Any], places: Sequence[int]) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._whole[self._places[index]]

    def __iter__(self) -> Iterator[Any]:
        return map(self._whole.__getitem__, self._places)  # no Python for each of them


class _Instance:
    """One transformer: a state for each config that it was compiled with."""

    def __init__(self) -> None:
        self.states: dict[RASConfig, TransformerState] = {}


class _Recent(threading.local):
    """The last call's transformer in this thread: a weight never changes its owner, and most calls are of one transformer."""

    def __init__(self) -> None:
        self._known: tuple[list[weakref.ref], RASConfig, weakref.ref] | None = None

    def of(self, some: Sequence[Tensor], config: RASConfig) -> TransformerState | None:
        """Its state, if these are three of its weights; None if not."""
        if self._known is None:
            return None
        refs, asked, state = self._known
        (first, second, third), (one, two, three) = refs, some
        same = asked is config and first() is one and second() is two and third() is three
        return state() if same else None

    def keep(self, some: Sequence[Tensor], config: RASConfig, state: TransformerState) -> None:
        self._known = [weakref.ref(weight) for weight in some], config, weakref.ref(state)


# Tensors are held weakly and compared by identity; an instance lives as long as any of its weights.
instances = WeakTensorKeyDictionary()
_recent = _Recent()
_lock = threading.Lock()


def state_for(weights: Sequence[Tensor], config: RASConfig) -> TransformerState:
    """The state of the transformer that owns `weights` (parameters and buffers among a graph's inputs).

    All graphs of one transformer share a state, also where some of its weights are missing from a graph or have been
    added since (LoRA). Without any weight nothing can be recognised: the state is new at each call, which runs dense.
    """
    count = len(weights)
    if not count:
        return TransformerState(config)
    # three weights of a graph at hand are enough to know the instance again
    some = weights[0], weights[count // 2], weights[count - 1]
    state = _recent.of(some, config)
    if state is None:
        state = _state_for(weights, some, config)
        _recent.keep(some, config, state)
    return state


def _state_for(weights: Sequence[Tensor], some: Sequence[Tensor], config: RASConfig) -> TransformerState:
    with _lock:
        probes = {id(found): found for found in map(instances.get, some)}
        instance = next(iter(probes.values())) if len(probes) == 1 else None
        if instance is None:
            instance = _instance_of(weights)
        state = instance.states.get(config)
        if state is None:
            state = instance.states[config] = TransformerState(config)
        return state


def states_of(weights: Iterable[Tensor]) -> list[TransformerState]:
    """The states of the transformer that owns `weights`, one for each config."""
    with _lock:
        found = Counter(id(instance) for weight in weights if (instance := instances.get(weight)) is not None)
        by_id = {id(instance): instance for instance in instances.values()}
    return list(by_id[found.most_common(1)[0][0]].states.values()) if found else []


def _instance_of(weights: Sequence[Tensor]) -> _Instance:
    """The instance that most weights belong to, if that is half of them (two models may share an embedding)."""
    owners = [instances.get(weight) for weight in weights]
    counts = Counter(id(instance) for instance in owners if instance is not None)
    instance = _Instance()
    if counts:
        best, count = counts.most_common(1)[0]
        if 2 * count >= len(weights):
            instance = next(found for found in owners if id(found) == best)
    for weight, known in zip(weights, owners, strict=True):
        if known is None:
            instances[weight] = instance
    return instance
