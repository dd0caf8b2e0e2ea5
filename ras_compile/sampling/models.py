"""The transformers behind what users hold, and freeing what their generations keep."""

from __future__ import annotations

from typing import Any

from torch import nn

from ras_compile._torch import original
from ras_compile.execute.homes import homes
from ras_compile.execute.memory import keepers_of
from ras_compile.sampling.registry import states_of

__all__ = ["modules_of", "release"]


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
    held: list[Any] = []
    for state in states:
        state.reset()
        for home in homes():
            run = home.runs.pop(state, None)
            held += [branch.slots for branch in run.branches.known] if run is not None else []
            held += [slots for kept in home.spare.pop(state, {}).values() for slots in kept]
    keepers = keepers_of(held)
    for slots in held:
        slots.clear()
    for keeper in keepers:
        keeper.give_up()
