"""The versions of PyTorch, one after the other: is it to be had here, do the canaries pass, does the core of the tests?

    make versions                          # all of them, each in an environment of its own below build/versions
    make versions VERSIONS="2.13 2.15"     # some of them
    python tests/support/matrix.py --here        # the one of this environment, without another one

The table goes into docs/versions.md. pip takes its own settings (an index of CPU builds, a proxy) from its own variables.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, BEGIN, END = ROOT / "docs" / "versions.md", "<!-- matrix -->\n", "<!-- /matrix -->\n"
VERSIONS = ("2.11", "2.12", "2.13", "2.14", "2.15")
CANARIES = ["tests/test_torch_canaries.py"]
CORE = ["-m", "not (zoo or pipelines or compiles or slow or gpu)", "--timeout", "300"]


@dataclass(frozen=True)
class Row:
    """What came of one version.

    Attributes:
        torch, triton: what was installed; what was asked for where nothing could be.
        canaries, core: pytest's last line; why there is none.
    """

    torch: str
    triton: str
    canaries: str
    core: str

    def __str__(self) -> str:
        python = ".".join(platform.python_version_tuple()[:2])
        return f"| {self.torch} | {self.triton} | {python} | {self.canaries} | {self.core} |"


def last_line(text: str) -> str:
    """The last line that says something, without pytest's seconds and what would break a table."""
    line = next((line.strip(" =") for line in reversed(text.splitlines()) if line.strip(" =")), "nothing was said")
    return re.sub(r" in [\d.]+s.*", "", line).replace("|", "/")[:160]


def tested(python: Path | str, quick: bool) -> Row:
    """The row of an environment. Only the canaries run if ``quick``, or if one of them fails."""

    def asked(*command: str) -> subprocess.CompletedProcess[str]:
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([str(python), *command], cwd=ROOT, env=surroundings, capture_output=True, text=True)

    words = "import torch\ntry: import triton\nexcept ImportError: triton = None\n"
    words += "print(torch.__version__, getattr(triton, '__version__', 'none'))"
    found = asked("-c", words)
    if found.returncode:
        return Row("?", "", f"it cannot be imported: {last_line(found.stderr)}", "not run")
    torch, triton = found.stdout.split()[-2:]
    canaries = asked("-m", "pytest", "-q", *CANARIES)
    core = "not run"
    if not canaries.returncode and not quick:
        core = last_line(asked("-m", "pytest", "-q", "-p", "no:randomly", *CORE).stdout)
    return Row(torch, triton, last_line(canaries.stdout or canaries.stderr), core)


def installed(version: str) -> Path | str:
    """The interpreter of an environment with this version; in words why there is none."""
    place = ROOT / "build" / "versions" / version
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    command = [python, "-m", "pip", "install", "--quiet", f"torch=={version}.*", "-e", ".[test]"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    return python if not done.returncode else last_line(done.stderr)


def row(version: str) -> Row:
    """The row of a version."""
    python = installed(version)
    if isinstance(python, str):
        return Row(version, "", f"not installed: {python}", "not run")
    return tested(python, quick=False)


def put(page: str, rows: list[str]) -> str:
    """The page with these rows; those of other versions stay."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {minor(line): line for line in [*table.splitlines()[2:], *rows] if minor(line)}
    head = ["| PyTorch | Triton | Python | canaries | core |", "| --- | --- | --- | --- | --- |"]
    lines = [*head, *(known[version] for version in sorted(known))]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def minor(line: str) -> tuple[int, ...]:
    """The version that a row is of, such as (2, 13); empty for another line."""
    found = re.match(r"\| (\d+)\.(\d+)", line)
    return tuple(map(int, found.groups())) if found else ()


def main() -> None:
    """Runs the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--here", action="store_true", help="this environment's version, its canaries alone")
    args = parser.parse_args()
    rows = []
    for found in [tested(sys.executable, quick=True)] if args.here else map(row, args.versions):
        print(found, flush=True)
        rows.append(str(found))
    if not args.here:
        PAGE.write_text(put(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
