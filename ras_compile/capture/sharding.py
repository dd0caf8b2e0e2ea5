"""diffusers' hooks of context parallelism: what breaks Dynamo's graph in their first calls is done before these."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ras_compile._torch import ignore_warning_once, trace_gathered_parts
from ras_compile.errors import ConfigError


def settle_sharding_hooks(model: nn.Module) -> None:
    """Lets Dynamo trace a model's hooks that take a process's part of a tensor; nothing where it has none.

    Such a hook looks its module's arguments up when it is first called, by `inspect`, and says in a log at every call which
    tensors it leaves alone. Neither can be traced.

    Raises:
        ConfigError: the model cannot be compiled with these degrees.
    """
    shared = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if shared is not None:
        _check_degrees(model, shared)
    found = False
    for part in model.modules():
        for hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).values():
            known = getattr(hook, "module_forward_metadata", None)
            found = found or known is not None
            if known is not None and known.cached_parameter_indices is None and known._cls is not None:
                names = list(inspect.signature(known._cls.forward).parameters)[1:]  # without self
                known.cached_parameter_indices = {name: index for index, name in enumerate(names)}
    if found:
        ignore_warning_once()
        trace_gathered_parts()


def _check_degrees(model: nn.Module, shared: Any) -> None:
    """Says before the first step what Dynamo or diffusers would say in it, of something else."""
    heads = getattr(getattr(model, "config", None), "num_attention_heads", 0)
    if isinstance(heads, int) and heads % shared.ulysses_degree:
        raise ConfigError(
            f"ulysses_degree={shared.ulysses_degree} does not divide the {heads} heads of {type(model).__name__}; take a degree "
            "that does."
        )
    for name in ("ulysses_anything", "ring_anything"):
        if getattr(shared, name, False):
            raise ConfigError(
                f"{name} asks all processes for their sizes in every call, which torch.compile cannot trace; leave it out, and "
                "take a degree that divides the tokens of the picture and of the text."
            )
    layers = [part.processor for part in model.modules() if hasattr(part, "processor")]
    if shared.ring_degree > 1 and any(getattr(layer, "_attention_backend", "") in (None, "native") for layer in layers):
        raise ConfigError(
            f"ring_degree={shared.ring_degree} needs a kernel that returns the log-sum-exp of attention, which diffusers' default "
            'does not: call set_attention_backend("_native_cudnn") or ("_native_flash") of the model, or take ulysses_degree.'
        )
