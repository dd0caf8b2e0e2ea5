"""Tests in a process that is forked off one which has PyTorch loaded: a mutant then costs seconds.

The parent must not have imported the library: the child does, and gets one file of it in another form. Each child has a folder of
its own for what tests write, so that many can run at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--timeout-method=signal"]
FAILED = "FAILED "


@dataclass
class Outcome:
    """How the tests ended: "passed", "failed", "slow" (they took too long) or "nothing" (no test ran).

    Attributes:
        said: the failed test, or the end of what was printed.
        seconds: how long they took.
        code: the exit status.
    """

    ended: str
    said: str
    seconds: float
    code: int = 0


@dataclass(eq=False)
class Part:
    """A plugin of pytest: runs one of several equal parts of the tests."""

    number: int
    of: int

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.number :: self.of]


@dataclass(eq=False)
class Picked:
    """A plugin of pytest: runs the named tests alone, in this order."""

    names: Sequence[str]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        place = {name: index for index, name in enumerate(self.names)}
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])


@dataclass(eq=False)
class Short:
    """A plugin of pytest: of random models the first ones alone."""

    seeds: int

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not (item.path.name == "test_fuzz.py" and _first(item) >= self.seeds)]


def _first(item: pytest.Item) -> int:
    return item.callspec.params.get("first", 0) if hasattr(item, "callspec") else 0


class Watched:
    """A plugin of pytest: which functions of the repository's library each test calls, and how long it takes."""

    def ended(self, name: str, seconds: float, reached: set[tuple[str, str]]) -> None:
        """Called behind each test."""
        raise NotImplementedError

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        codes: set[CodeType] = set()
        begun = time.perf_counter()

        def called(frame: Any, event: str, given: Any) -> None:
            if (
                event == "call" and frame.f_code.co_flags & CO_OPTIMIZED
            ):  # a module and a class run when they are imported
                codes.add(frame.f_code)

        sys.setprofile(called)
        threading.setprofile(called)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]  # it takes None, too
            places = ((repository_path(code.co_filename), _plain(code.co_qualname)) for code in codes)
            self.ended(item.nodeid, time.perf_counter() - begun, {(path, name) for path, name in places if path})


def _plain(name: str) -> str:
    """A function's name with its class; that of the outer one for functions, lambdas and comprehensions inside of others."""
    return name.split(".<")[0]


@functools.cache
def _package() -> str:
    """The folder of the library that tests import, which need not be the repository's: it may be a copy on ``PYTHONPATH``."""
    spec = importlib.util.find_spec("ras_compile")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "No package ras_compile is on the path: install it, or set PYTHONPATH to where it is."
        )
    return os.path.realpath(next(iter(spec.submodule_search_locations)))


@functools.cache
def repository_path(file: str) -> str:
    """A file of the library as it stands in the repository; empty for others."""
    if not file.startswith("/"):
        return ""
    real = os.path.realpath(file)
    path = os.path.relpath(real, ROOT)
    if path.startswith(("ras_compile/", "passes/", "kernels/")):
        return path
    copied = os.path.relpath(real, _package())  # there `passes` and `kernels` stand inside
    if copied.startswith("../"):
        return ""
    return copied if copied.startswith(("passes/", "kernels/")) else f"ras_compile/{copied}"


replaced: list[str] = []  # files of which another form was imported


def replace(path: str, source: str) -> None:
    """From now on an import of that file of the repository gives this source."""
    real = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        found = self.get_filename(name)
        if found.endswith(path.removeprefix("ras_compile/")) and repository_path(found) == path:
            replaced.append(path)
            return compile(source, found, "exec", dont_inherit=True)
        return real(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]  # in this process alone


def preload() -> None:
    """What takes long to import and is not ours. No test uses a GPU: a process that was forked could not."""
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1", CUDA_VISIBLE_DEVICES="")
    import hypothesis  # noqa: F401
    import scipy  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx

    with contextlib.suppress(ImportError):  # tests that need it then fail as they are, and are left out
        import diffusers.models.transformers  # noqa: F401

    torch.set_num_threads(1)
    assert not any(name.split(".")[0] == "ras_compile" for name in sys.modules)


def run_tests(
    files: Iterable[str],
    plugins: list[object],
    *,
    change: tuple[str, str] | None = None,
    limit: float,
    each: float = 60,
) -> Outcome:
    """Runs tests in a child, up to the first failure where something is changed.

    Args:
        files: of tests.
        plugins: of pytest.
        change: a file of the library and its source.
        limit: seconds for all, and ``each`` for a test.
    """
    begun = time.monotonic()
    sys.stdout.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryDirectory() as scratch:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setpgrp()
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                os.chdir(ROOT)
                if change:
                    replace(*change)
                os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = scratch
                options = [*OPTIONS, f"--timeout={each:.0f}", f"--basetemp={scratch}/tests"]
                options += ["-x", "--no-header", "--tb=line"] if change else ["--continue-on-collection-errors"]
                code = int(pytest.main([*options, *files], plugins=plugins))
                code = 5 if change and not code and not replaced else code  # another copy of the library was tested
                sys.stdout.flush()
            finally:
                os._exit(code)
        status = _wait(child, begun + limit)
        out.seek(0)
        text = out.read().decode(errors="replace")
    seconds = time.monotonic() - begun
    if status is None:
        return Outcome("slow", f"more than {limit:.0f} s", seconds)
    failed = [line.removeprefix(FAILED).split(" - ")[0] for line in text.splitlines() if line.startswith(FAILED)]
    code = os.waitstatus_to_exitcode(status)
    ended = {0: "passed", 5: "nothing"}.get(code, "failed")
    return Outcome(ended, failed[0] if failed else f"exit {code}: {text[-1500:]}" if code else "", seconds, code)


def _wait(child: int, end: float) -> int | None:
    """The child's status; None where it had to be stopped, with all that it started."""
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
