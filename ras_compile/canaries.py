"""On a PyTorch that was not tested: one warning, and an error in place of a wrong program.

What `_torch.py` holds may be renamed or changed in any release. Here stands what is used of each of its names: arguments
that are given, attributes that are read. On an untested version this is compared before the first graph is compiled, which
takes milliseconds. Whether the names still do what they did is for `tests/test_torch_canaries.py`: see `docs/versions.md`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ras_compile import _torch
from ras_compile.notices import warn_once
from ras_compile.versions import TESTED, cannot_run, is_tested

# What is used of each name of `_torch`; those that only have to exist are not listed.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "ConstantSource": ("source_name",),
    "FakeTensorMode": ("shape_env", "static_shapes", "allow_non_fake_inputs"),
    "FunctionalTensorMode": ("pre_dispatch", "export", "_allow_token_discovery"),
    "TracingContext": ("fake_mode",),
    "compile_fx": ("config_patches",),
    "list_mode_options": ("mode",),
}
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "FakeTensorMode": ("from_tensor",),
    "FunctionalTensor": ("to_functional", "from_functional"),
    "OpOverload": ("has_kernel_for_dispatch_key", "tags", "namespace"),
    "ShapeEnv": ("create_symbol", "create_symintnode"),
    "DimDynamic": ("DYNAMIC",),
    "inductor_config": ("get_config_copy",),
    "pytree": (
        "tree_map", "tree_map_only", "tree_flatten", "tree_unflatten", "tree_leaves", "tree_flatten_with_path", "keystr",
        "TreeSpec",
    ),
}  # fmt: skip
# What is looked up on objects: done once, on small ones.
_LOOKUPS: dict[str, Callable[[], Any]] = {
    "COMPILED_CALL": lambda: _torch.compiled_call(torch.nn.Identity()),
    "call_uncompiled": lambda: _torch.call_uncompiled(torch.nn.Identity(), 1),
    "has_forward_hooks": lambda: _torch.has_forward_hooks(torch.nn.Identity()),
    "is_composite": lambda: _torch.is_composite(torch.ops.aten.tensordot.default),
    "memory_key": lambda: _torch.memory_key(torch.empty(0)),
    "schema_of": lambda: [
        (argument.name, argument.default_value, argument.kwarg_only, argument.alias_info)
        for argument in _torch.schema_of(torch.ops.aten.add.Tensor).arguments
    ],
    "tables_of": lambda: _torch.tables_of(torch.nn.Identity()),
    "version_of": lambda: _torch.version_of(torch.empty(0)),
}
checked = False  # whether this process has looked; what is not right is looked at again


def changed() -> dict[str, str]:
    """What is not as it was: names of `_torch`, each with what is missing."""
    found: dict[str, str] = {}
    for name, arguments in _ARGUMENTS.items():
        taken = inspect.signature(getattr(_torch, name)).parameters
        missing = [argument for argument in arguments if argument not in taken]
        if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            found[name] = f"takes no {', '.join(missing)}"
    for name, attributes in _ATTRIBUTES.items():
        missing = [attribute for attribute in attributes if not hasattr(getattr(_torch, name), attribute)]
        if missing:
            found[name] = f"has no {', '.join(missing)}"
    for name, look in _LOOKUPS.items():
        try:
            look()
        except (AttributeError, TypeError) as error:
            found[name] = str(error)
    return found


def check() -> None:
    """On a PyTorch that was not tested: warns, once.

    Raises:
        RASError: what is needed is not as it was; the text names it.
    """
    global checked
    if checked:
        return
    if not is_tested():
        found = changed()
        if found:
            raise cannot_run("; ".join(f"{name} {what}" for name, what in found.items()))
        missing = _torch.MISSING
        warn_once(
            f"ras_compile: PyTorch {torch.__version__} is not among the versions that were tested ({TESTED}); of what is "
            f"used of it {', '.join(missing) or 'nothing'} is missing{', which makes it slower' if missing else ''}. "
            "tests/test_torch_canaries.py says whether the rest does what it did."
        )
    checked = True
