"""A part is not the whole: block-wise compilation hands a backend one block's graph, which looks like a small DiT.

What gives it away:

    no time         a module's code calls the compiled one and holds more weights than that, and no argument is a timestep;
                    or what is named so is a vector of features (`timestep [B, 6 C]`), and there are more of its class
    a chain         the output of one instance is the latent of the next one: a transformer's goes to a scheduler first
    what it feeds   an output of it goes into what is known to be a block

A graph without weights, that of a hook, is none of this.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import Tensor, nn

from ras_compile.notices import warn_once
from ras_compile.sampling.locate import owner

_OUTPUTS = 64  # so many of the last calls' are remembered
known_blocks: set[Hashable] = set()  # graphs that have shown themselves to be blocks
_TEXT = (
    "the compiled graph is one block of a transformer ({why}), as block-wise compilation makes it; compile "
    "the whole transformer instead"
)


def leave_output(state: object, graph: Hashable, output: Any) -> None:
    """Remember what `state` has just returned from `graph` in this thread."""
    left = owner().outputs
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(value, Tensor):
            left.pop(id(value), None)
            left[id(value)] = weakref.ref(value), weakref.ref(state), graph
    while len(left) > _OUTPUTS:
        del left[next(iter(left))]


def is_block(state: object, graph: Hashable, latent: Tensor, context: Iterable[Any] = ()) -> bool:
    """Whether `graph` is known to be a block, or shows it with this call; says so once."""
    before = _who_returned(latent)
    if before is not None and before[0] is not state:
        _add("the output of one instance is the input of the next", before[1], graph)
    if graph in known_blocks:
        feeds_a_block(context)
    return graph in known_blocks


def feeds_a_block(values: Iterable[Any]) -> None:
    """A block is called with `values`: whoever returned one of them is a block, too."""
    for value in values:
        before = _who_returned(value) if isinstance(value, Tensor) else None
        if before is not None:
            _add("its output is the input of a block", before[1])


def _who_returned(value: Tensor) -> tuple[object, Hashable] | None:
    """The state and the graph that returned this very tensor in this thread; None if none did."""
    found = owner().outputs.get(id(value))
    if found is None or found[0]() is not value or (state := found[1]()) is None:
        return None
    return state, found[2]


def _add(why: str, *graphs: Hashable) -> None:
    if not known_blocks.issuperset(graphs):
        known_blocks.update(graphs)
        warn_once(f"ras_compile: a model runs dense: {_TEXT.format(why=why)}")


def why_block(holder: Callable[[], tuple[nn.Module, nn.Module] | None], time: Any) -> str:
    """Why a compiled module is one block of a transformer; empty where it may be a whole one.

    Args:
        holder: finds the module whose code calls the compiled one and holds more weights than that, and the latter; if any.
        time: the call's timestep; None where no argument is one.
    """
    features = is_features(time)
    if time is not None and not features:
        return ""
    found = holder()
    if found is None:
        return ""
    module, compiled = found
    own = set(compiled.modules())
    if features and not any(type(part) is type(compiled) for part in module.modules() if part not in own):
        return ""
    return _TEXT.format(why=f"{type(module).__name__} calls it, and its arguments hold no time")


def is_features(time: Any) -> bool:
    """Whether what is named like a time is a vector of features for each sample instead, `[B, C]`."""
    return isinstance(time, Tensor) and time.ndim >= 2 and time.numel() > len(time)
