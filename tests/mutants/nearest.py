"""Which tests are nearest to a function: those of the file that mirrors its own, then all that call it, the quick ones first.

Which call it is found by running each file of tests once, and kept in `build/mutants` until the file changes. (What the library
calls changes little; without the folder all is looked at anew.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from forked import ROOT, Watched, run_tests

# Unit tests of what is mutated: which of them call a function is looked at once.
TESTS = (
    "tests/passes/rules", "tests/passes/algebra", "tests/passes/analysis", "tests/passes/programs", "tests/passes/spec",
    "tests/capture", "tests/plans", "tests/sampling", "tests/dispatch", "tests/test_backend.py",
)  # fmt: skip
# What runs whole where those see nothing, by the beginning of the mutant's file: the short contract and the first of the fuzz's
# fixed seeds; prompts of many lengths; the runtime's own.
FURTHER = {
    "passes": ("tests/contract/test_handwritten.py", "tests/fuzz/test_fuzz.py"),
    "ras_compile/plans": ("tests/plans/test_lengths.py", "tests/contract/test_handwritten.py", "tests/test_faults.py"),
    "ras_compile": ("tests/sampling", "tests/dispatch", "tests/test_faults.py", "tests/pipelines/test_noise_adding.py"),
}
SEEDS = 60
MOST_SECONDS = 30.0  # of the unit tests for one mutant
PLACE = ROOT / "build" / "mutants"


class Nearest:
    """Which tests call which function."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.reached: dict[str, set[tuple[str, str]]] = {}
        for path in _files():
            found = self._of(path)
            self.seconds |= found["seconds"]
            self.reached |= {name: set(map(tuple, reached)) for name, reached in found["reached"].items()}

    def _of(self, path: Path) -> dict:
        """Of one file of tests; a test that fails as it is, is nobody's."""
        name = path.relative_to(ROOT).as_posix()
        key = hashlib.sha256(name.encode() + path.read_bytes()).hexdigest()[:16]
        kept = PLACE / f"{path.stem}-{key}.json"
        if not kept.exists():
            print(f"which functions {name} calls ...", flush=True)
            PLACE.mkdir(parents=True, exist_ok=True)
            watched = _Kept(kept)
            found = run_tests([name], watched, limit=2400, each=60)  # one that takes longer is near nothing
            if not kept.exists():
                raise RuntimeError(f"the tests of {name} could not be run: {found.said}")
        return json.loads(kept.read_text())

    def to(self, path: str, function: str) -> list[str]:
        """Names of tests, those to run first first; all that call something in the file where nothing calls the function.

        Args:
            path: a file of the library.
            function: of it; empty for the module's own lines.
        """
        mirror = f"{Path(path).stem}.py"
        calling = [name for name, reached in self.reached.items() if (path, function) in reached]
        if not calling:  # a table, a class's own lines
            calling = [name for name, reached in self.reached.items() if any(file == path for file, _ in reached)]

        def order(name: str) -> tuple[bool, float]:
            return not name.split("::")[0].endswith(f"test_{mirror}"), self.seconds[name]

        chosen: list[str] = []
        left = MOST_SECONDS
        for name in sorted(calling, key=order):
            if chosen and self.seconds[name] > left:
                continue
            left -= self.seconds[name]
            chosen.append(name)
        return chosen


class _Kept(Watched):
    """Writes down what it has seen, in the child's process."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.failed = path, set[str]()

    def pytest_runtest_logreport(self, report) -> None:
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        good = [name for name in self.reached if name not in self.failed]
        found = {
            "seconds": {name: self.seconds[name] for name in good},
            "reached": {name: sorted(self.reached[name]) for name in good},
        }
        self.path.write_text(json.dumps(found))


def _files() -> Iterator[Path]:
    for name in TESTS:
        place = ROOT / name
        yield from sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
