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

# Where each public name is defined. Names are imported when they are first used: the package itself costs no time.
_HOMES = {
    "ConfigError": "errors",
    "Explanation": "explanation",
    "Generation": "sampling.locate",
    "Handle": "pipelines.attach",
    "RASConfig": "config",
    "RASError": "errors",
    "RASWarning": "errors",
    "Record": "sampling.records",
    "SelectionInfo": "sampling.selection",
    "SpecViolation": "errors",
    "UnsupportedGraph": "errors",
    "UnusableInput": "errors",
    "attach": "pipelines.attach",
    "explain": "explanation",
    "generation": "sampling.locate",
    "load": "starts",
    "release": "sampling.models",
    "save": "starts",
    "trace": "history",
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
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("ras_compile")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
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
