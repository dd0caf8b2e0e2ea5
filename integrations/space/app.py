"""The page of `examples/app.py` as a Hugging Face Space; README.md beside this file says how to publish it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CLONE = HERE.parent.parent / "examples"


def page() -> ModuleType:
    """The page's module: a copy beside this file in a Space, the example itself in a clone."""
    path = HERE / "page.py" if (HERE / "page.py").is_file() else CLONE / "app.py"
    sys.path.insert(0, str(path.parent))  # where studio.py stands
    spec = importlib.util.spec_from_file_location("page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments() -> list[str]:
    """Those of the page, from the Space's variables."""
    model, backend = os.environ.get("MODEL"), os.environ.get("INNER_BACKEND")
    return [*(["--pipeline", model] if model else []), *(["--inner-backend", backend] if backend else [])]


if __name__ == "__main__":
    page().main(arguments())
