"""Which tests are nearest to a function: those of the file that mirrors its own, then all that call it, the quick ones first.
Behind them come models that run whole, then what else calls it.

Which call it is found by running each test once, and kept in `build/mutants`, a line for each test, until its file or PyTorch
changes: what was interrupted goes on there. (What the library calls changes little; without the folder all is looked at anew.)
Tests that fail as they are are left out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import ROOT, Part, Short, Watched, run_tests

# Unit tests of what is mutated: which of them call a function is looked at once.
TESTS = (
    "tests/passes/rules", "tests/passes/algebra", "tests/passes/analysis", "tests/passes/programs", "tests/passes/spec",
    "tests/capture", "tests/plans", "tests/sampling", "tests/dispatch", "tests/test_backend.py",
)  # fmt: skip
# What runs whole: the short contract, the golden programs, the first of the fuzz's fixed seeds, faults, and two of the
# pipelines. They come first in the second stage: other unit tests of a function see mostly what the nearest have seen.
FURTHER = (
    "tests/contract/test_handwritten.py", "tests/golden/test_golden.py", "tests/fuzz/test_fuzz.py", "tests/test_faults.py",
    "tests/pipelines/test_noise_adding.py", "tests/pipelines/test_velocity_attached.py",
)  # fmt: skip
SEEDS = 60
MOST_SECONDS = 30.0  # of the nearest tests of one mutant
LANES = ("slow", "compiles", "pipelines", "zoo")
PLACE = ROOT / "build" / "mutants"


@dataclass(frozen=True)
class Chosen:
    """Tests for one mutant, in the order to run them, and the seconds that each took while it was watched."""

    seconds: dict[str, float]

    @property
    def files(self) -> Sequence[str]:
        return list(dict.fromkeys(name.split("::")[0] for name in self.seconds))

    @property
    def limit(self) -> float:
        """Seconds after which something never ends, also where each core has another process to run."""
        return 60 + 3 * sum(self.seconds.values())


class Nearest:
    """Which tests call which function.

    Args:
        pool: processes that run the tests that have not been looked at.
        jobs: how many of them.
        names: files and folders of tests.
        seconds: after which what has been seen must do.
    """

    def __init__(self, pool: Executor, jobs: int, names: Sequence[str] = TESTS + FURTHER, seconds: float = 1e6) -> None:
        self.seconds: dict[str, float] = {}
        self.reached: dict[str, set[tuple[str, str]]] = {}
        self.left_out: list[str] = []
        PLACE.mkdir(parents=True, exist_ok=True)
        kept = {path: _kept(path) for path in _files(names)}
        missing = [path for path, place in kept.items() if not any("whole" in line for line in _lines(place))]
        begun = time.monotonic()
        running = {pool.submit(look, missing, part, jobs, seconds) for part in range(jobs if missing else 0)}
        waiting = running
        while waiting:
            _, waiting = wait(waiting, timeout=10)
            number = sum(len(list(_lines(kept[path]))) for path in missing)
            print(f"which functions tests call: {number} tests in {time.monotonic() - begun:.0f} s", flush=True)
        for said in filter(None, (part.result() for part in running)):
            print(f"not every test was looked at: {said}", flush=True)
        if not any(part.result() for part in running):
            for path in missing:
                _write(kept[path], {"whole": True})
        for line in (line for place in kept.values() for line in _lines(place) if "test" in line):
            if "reached" in line:
                self.seconds[line["test"]] = line["seconds"]
                self.reached[line["test"]] = set(map(tuple, line["reached"]))
            else:
                self.left_out.append(line["test"])

    def to(self, path: str, function: str, further: float) -> tuple[Chosen, Chosen]:
        """The nearest tests, and the others that call the function; in the whole file where nothing calls the function.

        Args:
            path: a file of the library.
            function: of it; empty for the module's own lines.
            further: seconds of the others, as they ran by themselves.
        """
        mirror = f"test_{Path(path).stem}.py"
        calling = [name for name, reached in self.reached.items() if (path, function) in reached]
        if not calling:  # a table, a class's own lines
            calling = [name for name, reached in self.reached.items() if any(file == path for file, _ in reached)]

        def order(name: str) -> tuple[bool, float]:
            return not name.split("::")[0].endswith(f"/{mirror}"), self.seconds[name]

        calling.sort(key=order)
        near = self._first(calling, MOST_SECONDS, FURTHER)
        others = [name for name in calling if name not in near.seconds]
        return near, self._first(sorted(others, key=lambda name: not name.startswith(FURTHER)), further, ())

    def _first(self, names: list[str], most: float, without: tuple[str, ...]) -> Chosen:
        """As many as fit into the time, and one where none does."""
        chosen: dict[str, float] = {}
        for name in names:
            if name.startswith(without) or (chosen and sum(chosen.values()) + self.seconds[name] > most):
                continue
            chosen[name] = self.seconds[name]
        return Chosen(chosen)


def look(paths: Sequence[Path], part: int, parts: int, seconds: float) -> str:
    """Looks at one part of the tests, the quick ones first: what each calls, how long it takes, whether it fails as it is.

    Returns: what stopped it before the end; empty where nothing did.
    """
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    done = {line["test"] for path in paths for line in _lines(_kept(path)) if "test" in line}
    plugins = [Short(SEEDS), Unseen(done), QuickFirst(), Part(part, parts), Noting()]
    found = run_tests(names, plugins, limit=seconds, each=120)
    return "" if found.ended in ("passed", "nothing") or found.code == pytest.ExitCode.TESTS_FAILED else found.said


@dataclass(eq=False)
class Unseen:
    """A plugin of pytest: leaves out the named tests."""

    seen: set[str]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.seen]


class QuickFirst:
    """A plugin of pytest: tests of the fast lane, which take some milliseconds, come before all others."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: any(mark.name in LANES for mark in item.iter_markers()))


class Noting(Watched):
    """Writes down what it has seen of a test as soon as that has ended, in the child's process."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            _write(_kept(ROOT / report.nodeid), {"test": report.nodeid})

    def ended(self, name: str, seconds: float, reached: set[tuple[str, str]]) -> None:
        line: dict[str, object] = {"test": name}
        if name not in self.failed:
            line |= {"seconds": round(seconds, 4), "reached": sorted(reached)}
        _write(_kept(ROOT / name.split("::")[0]), line)


@functools.cache
def _kept(path: Path) -> Path:
    """Where what was seen of a file of tests is kept."""
    import torch  # not before the process is made ready for it

    key = f"{path.relative_to(ROOT)} {torch.__version__} {platform.python_version()}".encode() + path.read_bytes()
    return PLACE / f"{path.stem}-{hashlib.sha256(key).hexdigest()[:16]}.jsonl"


def _lines(path: Path) -> Iterator[dict]:
    """What was written there; a line that was cut off when a process ended is none."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _write(path: Path, line: dict) -> None:
    """At once, as other processes write there, too."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(line)}\n".encode())


def _files(names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        place = ROOT / name
        yield from sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
