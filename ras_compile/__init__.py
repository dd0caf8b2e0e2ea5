"""Region-adaptive sampling for Diffusion Transformers as a torch.compile backend (RAS, arXiv 2502.10389)."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ras_compile.config import RASConfig
    from ras_compile.errors import ConfigError, RASError, RASWarning, SpecViolation, UnsupportedGraph, UnusableInput
    from ras_compile.explanation import Explanation, explain
    from ras_compile.history import trace
    from ras_compile.pipelines.attach import Handle, attach
    from ras_compile.sampling.locate import Generation, generation
    from ras_compile.sampling.models import release
    from ras_compile.sampling.records import Record
    from ras_compile.sampling.selection import SelectionInfo
    from ras_compile.starts import load, save

    __version__: str

# Where the public names are defined. They are imported when they are first used: the package itself costs no time.
_HOMES = {
    "config": ("RASConfig",),
    "errors": ("ConfigError", "RASError", "RASWarning", "SpecViolation", "UnsupportedGraph", "UnusableInput"),
    "explanation": ("Explanation", "explain"),
    "history": ("trace",),
    "pipelines.attach": ("Handle", "attach"),
    "sampling.locate": ("Generation", "generation"),
    "sampling.models": ("release",),
    "sampling.records": ("Record",),
    "sampling.selection": ("SelectionInfo",),
    "starts": ("load", "save"),
}

__all__ = [
    "ConfigError",
    "Explanation",
    "Generation",
    "Handle",
    "RASConfig",
    "RASError",
    "RASWarning",
    "Record",
    "SelectionInfo",
    "SpecViolation",
    "UnsupportedGraph",
    "UnusableInput",
    "__version__",
    "attach",
    "explain",
    "generation",
    "load",
    "release",
    "save",
    "trace",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("ras_compile")
    elif home is not None:
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    else:
        methods = ("configure", "detach", "report", "summary")
        where = f"; it is a method of what ras_compile.attach(pipe) returns: handle.{name}()" if name in methods else ""
        # given the module, Python names what was meant
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{where}", name=name, obj=sys.modules[__name__]
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
