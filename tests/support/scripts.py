"""The examples' scripts as modules: folders of scripts, of which two may have files of one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(folders: Sequence[str], names: Sequence[str]) -> list[ModuleType]:
    """Imports scripts of folders of `examples/`, which find each other as they do when one is run; leaves no trace.

    Nothing of it stays in `sys.modules`: another test may load another folder's file of the same name.
    """
    path, modules = list(sys.path), dict(sys.modules)
    for name, module in modules.items():
        if name in names or str(getattr(module, "__file__", None) or "").startswith(str(EXAMPLES)):
            del sys.modules[name]
    sys.path[:0] = [str(EXAMPLES / folder) for folder in folders]
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(EXAMPLES)):
                del sys.modules[name]
        sys.modules.update(modules)
