"""Hooks on a model or its parts: what they do must happen at each call, so that a model that has some cannot be traced."""

from __future__ import annotations

import weakref

from torch import nn

from ras_compile._torch import OptimizedModule, has_forward_hooks
from ras_compile.errors import UnsupportedGraph


class Hooked(UnsupportedGraph):
    """A model that cannot be traced while ``module``, the part of it called ``name``, has hooks."""

    def __init__(self, name: str, module: nn.Module) -> None:
        place = f"its part {name!r}" if name else "the model"
        super().__init__(
            f"Dynamo broke the model's graph, and it cannot be traced instead: {place} {_hooked_by(module)}"
        )
        self.module = weakref.ref(module)


def refuse_hooks(root: nn.Module) -> None:
    """Refuses a model of which some part has hooks.

    Raises:
        Hooked: it says what they are for.
    """
    for name, module in root.named_modules():
        if has_hooks(module):
            raise Hooked(name, module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: what that is must happen at each call, and not be traced."""
    if isinstance(module, OptimizedModule):  # a part that is compiled by itself; its own module is asked, too
        return False
    forward = vars(module).get("forward")  # hooks that have been taken away may leave the class's own there
    own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    own = own or getattr(forward, "traceable", False)  # one of ours, which computes what the class does
    return has_forward_hooks(module) or (forward is not None and not own)


def _hooked_by(module: nn.Module) -> str:
    """What the hooks of a module are for, as far as their names say, and what to do instead."""
    names = list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))
    offload = (
        "so that its weights come and go within a call; use enable_model_cpu_offload(), which moves them once a picture"
    )
    if any("group_offloading" in name for name in names):
        return f"is offloaded in groups, {offload}"
    if type(getattr(module, "_hf_hook", None)).__name__ in ("AlignDevicesHook", "SequentialHook"):
        return f"is offloaded part by part or split by a device_map, {offload}"
    if names == ["layerwise_casting"]:
        return "casts its weights by hooks that came behind attach; attach after enable_layerwise_casting()"
    if names and names[0].startswith("cp_"):
        return (
            f"shares tokens with other processes by a hook ({names[0]}), which Dynamo traces only where their number divides the "
            "tokens of the picture and of the text"
        )
    if names:
        return (
            f"has a hook of diffusers ({names[0]}) that decides at each call what is computed; disable_cache() takes a "
            "cache away"
        )
    return "has hooks, or a forward that was put in place of its class's; take them away before the first call"
