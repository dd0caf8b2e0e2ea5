"""The transformers behind what users hold, and freeing what their generations keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ras_compile._torch import original
from ras_compile.execute.homes import homes
from ras_compile.execute.memory import keepers_of
from ras_compile.sampling.registry import states_of
from ras_compile.sampling.state import TransformerState


def modules_of(compiled: Any) -> list[nn.Module]:
    """The transformers behind what `torch.compile` or `ras_compile.attach` returned.

    Raises:
        TypeError: it is neither of them.
    """
    modules = compiled.transformers if hasattr(compiled, "transformers") else [compiled]
    found = [original(module) for module in modules]
    for module in found:
        if not isinstance(module, nn.Module):
            what = f"{type(module).__name__}{' itself' if hasattr(module, 'transformer') else ''}"
            raise TypeError(
                f"wanted is a compiled transformer or a handle of attach(), not {what}; keep what attach(pipe) returns, or "
                "give pipe.transformer."
            )
    return found


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's transformers by their names there: transformer, transformer_2, ...; empty where it has none."""
    known = getattr(pipe, "config", None)
    names = {*(known if isinstance(known, Mapping) else ()), *getattr(pipe, "__dict__", {}), "transformer"}
    found = {name: getattr(pipe, name, None) for name in sorted(names) if name.split("_")[0] == "transformer"}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def held_by(state: TransformerState) -> list[Any]:
    """The slots of all branches that a transformer's finished and unfinished generations keep."""
    held: list[Any] = []
    for home in homes():
        run = home.runs.get(state)
        held += [branch.slots for branch in run.branches.known] if run is not None else []
        held += [slots for kept in home.spare.get(state, {}).values() for slots in kept]
    return held


def release(compiled: Any) -> None:
    """Frees what the transformer's finished and unfinished generations keep: caches, drop counts and CUDA graphs.

    The compiled programs stay; the next generation allocates its caches anew.

    Args:
        compiled: what `torch.compile` returned, the transformer itself, or the handle of `ras_compile.attach`.

    Raises:
        TypeError: `compiled` is none of these.
    """
    states = [
        state for module in modules_of(compiled) for state in states_of([*module.parameters(), *module.buffers()])
    ]
    held = [slots for state in states for slots in held_by(state)]
    for state in states:
        state.reset()
        for home in homes():
            home.runs.pop(state, None)
            home.spare.pop(state, None)
    keepers = keepers_of(held)
    for slots in held:
        slots.clear()
    for keeper in keepers:
        keeper.give_up()
