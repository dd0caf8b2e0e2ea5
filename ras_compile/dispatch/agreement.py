"""Processes that share a model agree, before their first step, that they are about to do the same.

Collectives wait for each other: a process that decides otherwise than the rest would hang them all. What decides is the same
everywhere by construction, if the options, the model and its weights are. So that is compared once for each plan, through the
store by which the processes found each other: no device takes part, and a process that does not come is named in time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ras_compile._torch import process_group, process_store
from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.errors import RASError, first_line
from ras_compile.passes.algebra.layout import Group
from ras_compile.plans.plan import Plan

SAMPLED = 64  # entries of each weight that are compared

_counts: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def agree(plan: Plan, inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig) -> None:
    """Compares what decides about steps with the other processes of a plan's group; nothing where it has none.

    Raises:
        RASError: options, model, weights or whole latents differ, or a process did not come within the time-out that
            `torch.distributed.init_process_group` was given; the same sentence in every process that came.
    """
    frame = plan.analysis.frame
    group = frame.group
    if group is None:
        return
    weights = [v for given, v in zip(inputs, values, strict=True) if given.weight and isinstance(v, Tensor)]
    nodes = [(str(node.target), str(_shape(node.meta.get("val")))) for node in plan.captured.graph.nodes]
    own = {
        "options": _digest([(one.name, _named(getattr(config, one.name))) for one in fields(config)]),
        "model": _digest([target for target, _ in nodes if not target.startswith("arg")]),
        "sizes": _digest([shape for _, shape in nodes]),
        # where only features are added up, each process has its own part of the weights
        "weights": _digest([_sample(weight) for weight in weights]) if frame.shards else "",
    }
    # a scheduler steps the whole latent in each process; an encoder may have rounded a part of it otherwise
    whole = frame.stretch is not None or frame.shards is None
    noise = _sample(values[plan.latent])[1] if whole else []
    found = _exchanged(group, json.dumps([own, noise]))
    (first, begun), *_ = found
    for what in (*own, "noise to start from"):
        for rank, (other, latent) in enumerate(found):
            if other[what] != first[what] if what in own else _apart(begun, latent):
                raise RASError(
                    f"the processes of this model disagree: process {rank} of {group.size} has other {what} than process 0; "
                    "give all of them the same options, weights, sizes and seeds."
                )


def _exchanged(group: Group, own: str) -> list[Any]:
    """What each process of a group wrote, in order."""
    store, (members, _) = process_store(), process_group(group.name)
    name = f"ras_compile/{'-'.join(map(str, members))}"
    place = f"{name}/{next(_counts[name])}"
    store.set(f"{place}/{group.rank}", own)
    found = []
    for rank in range(group.size):
        try:
            found.append(json.loads(store.get(f"{place}/{rank}")))
        except RuntimeError as error:
            raise RASError(
                f"process {rank} of {group.size} did not come to its first step in time: it has failed or was interrupted, and "
                "says why itself; start all processes again."
            ) from error
    return found


def disconnected(error: RuntimeError, group: Group) -> RASError:
    """The error of a step that other processes take part in."""
    return RASError(
        f"a step that {group.size} processes share has failed in process {group.rank} ({first_line(error)}): if another one "
        "was interrupted or failed, it says why itself; start all processes again."
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _named(option: Any) -> Any:
    """An option's value; of a callable its name, as its address differs from process to process."""
    return getattr(option, "__qualname__", type(option).__qualname__) if callable(option) else option


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _apart(one: list[float], other: list[float]) -> bool:
    """Whether two latents, some entries of each, differ by more than rounding: by a tenth of what they are together."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1 * sum(map(abs, [*one, *other]))


def _sample(weight: Tensor) -> tuple:
    """Some entries of a tensor, evenly spread, and its shape."""
    flat = weight.detach().reshape(-1)
    taken = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED]
    numbers = taken.to(torch.float64) if taken.is_floating_point() else taken
    return tuple(weight.shape), numbers.tolist()
