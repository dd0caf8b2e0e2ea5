"""Which transformer is it? Two instances of one class share a compiled graph; their weights tell them apart."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ras_compile.config import RASConfig
from ras_compile.sampling.state import TransformerState


class _Instance:
    """One transformer: a state for each config that it was compiled with."""

    def __init__(self) -> None:
        self.states: dict[RASConfig, TransformerState] = {}


# Tensors are held weakly and compared by identity; an instance lives as long as any of its weights.
instances = WeakTensorKeyDictionary()
_lock = threading.Lock()


def probes_of(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Three of a graph's weights, which are enough to know a transformer again."""
    return weights[0], weights[len(weights) // 2], weights[-1]


def state_for(weights: Sequence[Tensor], config: RASConfig, known: TransformerState | None = None) -> TransformerState:
    """The state of the transformer that owns `weights` (parameters and buffers among a graph's inputs).

    All graphs of one transformer share a state, also where some of its weights are missing from a graph or have been
    added since (LoRA). Without any weight nothing can be recognised: the state is new at each call, which runs dense.

    Args:
        known: the state of the same transformer at an earlier call. It stays where nobody knows the weights, as with offloading
            that makes them anew at each call.
    """
    if not weights:
        return TransformerState(config)
    with _lock:
        probes = {id(found): found for found in map(instances.get, probes_of(weights))}
        instance = next(iter(probes.values())) if len(probes) == 1 else None
        if instance is None:
            instance = _instance_of(weights)
        state = instance.states.get(config)
        if state is None:
            state = instance.states[config] = TransformerState(config) if known is None else known
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
