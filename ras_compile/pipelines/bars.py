"""A pipeline's progress bar stands still while something is compiled: meanwhile it says why."""

from __future__ import annotations

import threading
import weakref
from types import MethodType
from typing import Any

from ras_compile.execute.compiling import told

WORDS = "ras_compile is compiling"


def _no_bar() -> None:
    return None


class _Shown(threading.local):
    """The bar that this thread's pipeline has shown last, as a weak reference."""

    bar: Any = staticmethod(_no_bar)


_shown = _Shown()


def _say(compiles: bool) -> None:
    bar = _shown.bar()
    if bar is not None:
        bar.set_postfix_str(WORDS if compiles else "")


told.append(_say)


def follow_bars(pipe: Any) -> None:
    """Notice the bars that a pipeline makes for its loops."""

    def progress_bar(self, *args, **kwargs):
        bar = type(self).progress_bar(self, *args, **kwargs)
        # a pipeline may have a bar of its own kind, or none
        _shown.bar = weakref.ref(bar) if hasattr(bar, "set_postfix_str") else _no_bar
        return bar

    if callable(getattr(type(pipe), "progress_bar", None)):
        vars(pipe)["progress_bar"] = MethodType(progress_bar, pipe)


def unfollow_bars(pipe: Any) -> None:
    """Undo `follow_bars`, of a pipeline that may be gone."""
    if pipe is not None:
        vars(pipe).pop("progress_bar", None)
