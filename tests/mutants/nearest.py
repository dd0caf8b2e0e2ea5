"""Which tests are nearest to a function: those of the file that mirrors its own, then all that call it, the quick ones first.

Which call it is found by running each file of tests once, and kept in `build/mutants` until the file or PyTorch changes. (What
the library calls changes little; without the folder all is looked at anew.) Tests that fail as they are are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from pathlib import Path

from forked import ROOT, Part, Short, Watched, run_tests

# Unit tests of what is mutated: which of them call a function is looked at once.
TESTS = (
    "tests/passes/rules", "tests/passes/algebra", "tests/passes/analysis", "tests/passes/programs", "tests/passes/spec",
    "tests/capture", "tests/plans", "tests/sampling", "tests/dispatch", "tests/test_backend.py",
)  # fmt: skip
# What runs whole: the short contract, the first of the fuzz's fixed seeds, faults, and one of the pipelines.
FURTHER = (
    "tests/contract/test_handwritten.py", "tests/fuzz/test_fuzz.py", "tests/test_faults.py",
    "tests/pipelines/test_noise_adding.py",
)  # fmt: skip
SEEDS = 60
MOST_SECONDS = 30.0  # of the nearest tests of one mutant
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
        pool: processes that look at parts of files, where this has not been done.
        parts: of each file.
    """

    def __init__(self, pool: Executor, parts: int) -> None:
        self.seconds: dict[str, float] = {}
        self.reached: dict[str, set[tuple[str, str]]] = {}
        self.left_out: list[str] = []
        missing: dict[Future[dict], Path] = {}
        found: dict[Path, list[dict]] = {}
        for path in _files():
            if not (kept := _kept(path)).exists():
                missing |= {pool.submit(look, path, part, parts): kept for part in range(parts)}
            found[kept] = []
        for number, done in enumerate(as_completed(missing), 1):
            kept = missing[done]
            found[kept].append(done.result())
            print(f"which functions tests call: {number} of {len(missing)}", flush=True)
            if len(found[kept]) == parts:
                _write(
                    kept, {key: _joined(part[key] for part in found[kept]) for key in ("seconds", "reached", "failed")}
                )
        for kept in found:
            of_file = json.loads(kept.read_text())
            self.seconds |= of_file["seconds"]
            self.reached |= {name: set(map(tuple, reached)) for name, reached in of_file["reached"].items()}
            self.left_out += of_file["failed"]

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
        return near, self._first([name for name in calling if name not in near.seconds], further, ())

    def _first(self, names: list[str], most: float, without: tuple[str, ...]) -> Chosen:
        """As many as fit into the time, and one where none does."""
        chosen: dict[str, float] = {}
        for name in names:
            if name.startswith(without) or (chosen and sum(chosen.values()) + self.seconds[name] > most):
                continue
            chosen[name] = self.seconds[name]
        return Chosen(chosen)


def look(path: Path, part: int, parts: int) -> dict:
    """What one part of a file of tests calls, how long its tests take, and which fail as they are."""
    name = path.relative_to(ROOT).as_posix()
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen.json"
        found = run_tests([name], [Short(SEEDS), Part(part, parts), _Kept(seen)], limit=1200, each=120)
        if not seen.exists():
            raise RuntimeError(f"the tests of {name} could not be run: {found.said}")
        return json.loads(seen.read_text())


class _Kept(Watched):
    """Writes down what it has seen, in the child's process."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.failed = path, set[str]()

    def pytest_runtest_logreport(self, report) -> None:
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        good = [name for name in self.reached if name not in self.failed]
        found = {
            "seconds": {name: self.seconds[name] for name in good},
            "reached": {name: sorted(self.reached[name]) for name in good},
            "failed": dict.fromkeys(sorted(self.failed), True),
        }
        self.path.write_text(json.dumps(found))


def _kept(path: Path) -> Path:
    """Where what was seen of a file of tests is kept."""
    import torch  # not before the process is made ready for it

    key = f"{path.relative_to(ROOT)} {torch.__version__} {platform.python_version()}".encode() + path.read_bytes()
    return PLACE / f"{path.stem}-{hashlib.sha256(key).hexdigest()[:16]}.json"


def _joined(parts: Iterator[dict]) -> dict:
    return {name: value for part in parts for name, value in part.items()}


def _write(path: Path, found: dict) -> None:
    """At once, so that another run sees all of it or nothing."""
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=PLACE, delete=False) as file:
        json.dump(found, file)
    os.replace(file.name, path)


def _files() -> Iterator[Path]:
    for name in TESTS + FURTHER:
        place = ROOT / name
        yield from sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
