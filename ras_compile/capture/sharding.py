"""diffusers' hooks of context parallelism: what breaks Dynamo's graph in their first calls is done before these."""

from __future__ import annotations

import inspect

from torch import nn

from ras_compile._torch import ignore_warning_once
from ras_compile.errors import ConfigError


def settle_sharding_hooks(model: nn.Module) -> None:
    """Lets Dynamo trace a model's hooks that take a process's part of a tensor; nothing where it has none.

    Such a hook looks its module's arguments up when it is first called, by `inspect`, and says in a log at every call which
    tensors it leaves alone. Neither can be traced.

    Raises:
        ConfigError: the processes cannot have equally many heads; Dynamo's error of that names no heads.
    """
    shared = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    degree = getattr(shared, "ulysses_degree", 1)
    heads = getattr(getattr(model, "config", None), "num_attention_heads", 0)
    if isinstance(heads, int) and heads % degree:
        raise ConfigError(
            f"ulysses_degree={degree} does not divide the {heads} heads of {type(model).__name__}; take a degree that does."
        )
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
