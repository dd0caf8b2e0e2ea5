"""Versions of PyTorch and diffusers, one after the other: is it to be had here, do the canaries pass, and the core of the tests?

    make versions                                    # all of them
    make versions VERSIONS="2.13 diffusers-0.38"     # some of them
    python tests/support/matrix.py --here            # the one of this environment, without another one

A PyTorch gets an environment of its own below build/versions, of the Python that runs this: run it with each interpreter
whose rows are wanted, it needs nothing but pip. A diffusers gets a folder there, in front of this environment's packages. The
table goes into docs/versions.md. pip takes its own settings (an index of CPU builds, a proxy) from its own variables.
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
PYTHON = ".".join(platform.python_version_tuple()[:2])
PAGE, BEGIN, END = ROOT / "docs" / "versions.md", "<!-- matrix -->\n", "<!-- /matrix -->\n"
DIFFUSERS = "diffusers-"
VERSIONS = ("2.11", "2.12", "2.13", "2.14", "2.15", *(f"{DIFFUSERS}0.{minor}" for minor in range(38, 43)))
CANARIES = ["tests/test_torch_canaries.py", "tests/pipelines/test_diffusers_canaries.py"]
CORE = ["-m", "not (zoo or pipelines or compiles or slow or gpu)", "--timeout", "300"]
PIPELINES = ["tests/pipelines", "-m", "not (zoo or compiles or slow or gpu)", "--timeout", "300"]


@dataclass(frozen=True)
class Row:
    """What came of one version.

    Attributes:
        torch, triton, diffusers: what was installed; what was asked for where nothing could be.
        canaries, core: pytest's last line; why there is none.
    """

    torch: str
    triton: str
    diffusers: str
    canaries: str
    core: str

    def __str__(self) -> str:
        return f"| {self.torch} | {self.triton} | {self.diffusers} | {PYTHON} | {self.canaries} | {self.core} |"


def last_line(text: str) -> str:
    """The last line that says something, without pytest's seconds and what would break a table."""
    line = next((line.strip(" =") for line in reversed(text.splitlines()) if line.strip(" =")), "nothing was said")
    return re.sub(r" in [\d.]+s.*", "", line).replace("|", "/")[:160]


def tested(python: Path | str, core: list[str] | None, folder: str = "") -> Row:
    """The row of an environment.

    Args:
        python: its interpreter.
        core: pytest's arguments for the core; None: only the canaries run, as they do if one of them fails.
        folder: its packages rule over those of the environment.
    """

    def asked(*command: str) -> subprocess.CompletedProcess[str]:
        before = filter(None, [folder, os.environ.get("PYTHONPATH")])
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(before)}
        return subprocess.run([str(python), *command], cwd=ROOT, env=surroundings, capture_output=True, text=True)

    words = "import torch, diffusers\ntry: import triton\nexcept ImportError: triton = None\n"
    words += "print(torch.__version__, getattr(triton, '__version__', 'none'), diffusers.__version__)"
    found = asked("-c", words)
    if found.returncode:
        return Row("?", "", "", f"it cannot be imported: {last_line(found.stderr)}", "not run")
    canaries = asked("-m", "pytest", "-q", *CANARIES)
    said = "not run"
    if not canaries.returncode and core is not None:
        said = last_line(asked("-m", "pytest", "-q", "-p", "no:randomly", *core).stdout)
    return Row(*found.stdout.split()[-3:], last_line(canaries.stdout or canaries.stderr), said)


def installed(version: str) -> Path | str:
    """The interpreter of an environment with this version; in words why there is none."""
    place = ROOT / "build" / "versions" / PYTHON / version
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    command = [python, "-m", "pip", "install", "--quiet", f"torch=={version}.*", "-e", ".[test]"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    return python if not done.returncode else last_line(done.stderr)


def beside(version: str) -> str | None:
    """The folder with this diffusers, and what older ones need beside; None where pip finds none, as it says."""
    folder = ROOT / "build" / "versions" / PYTHON / version
    wanted = [f"diffusers=={version.removeprefix(DIFFUSERS)}.*", "httpx", "httpcore"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    return str(folder) if folder.exists() or not subprocess.run(command, cwd=ROOT).returncode else None


def row(version: str) -> Row:
    """The row of a version."""
    if version.startswith(DIFFUSERS):
        folder = beside(version)
        asked = version.removeprefix(DIFFUSERS)
        return tested(sys.executable, PIPELINES, folder) if folder else Row("", "", asked, "not installed", "not run")
    python = installed(version)
    if isinstance(python, str):
        return Row(version, "", "", f"not installed: {python}", "not run")
    return tested(python, CORE)


def put(page: str, rows: list[str]) -> str:
    """The page with these rows; those of other versions stay."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {versions_of(line): line for line in [*table.splitlines()[2:], *rows]}
    head = ["| PyTorch | Triton | diffusers | Python | canaries | core |", "| --- | --- | --- | --- | --- | --- |"]
    lines = [*head, *(known[each] for each in sorted(known))]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def versions_of(line: str) -> tuple[tuple[int, ...], ...]:
    """What a row is of, as ((2, 13), (0, 42), (3, 11)): PyTorch, diffusers and Python."""
    cells = [cell.strip() for cell in line.split("|")]
    return tuple(tuple(map(int, re.findall(r"\d+", cells[place])[:2])) for place in (1, 3, 4))


def main() -> None:
    """Runs the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--here", action="store_true", help="this environment's version, its canaries alone")
    args = parser.parse_args()
    rows = []
    for found in [tested(sys.executable, None)] if args.here else map(row, args.versions):
        print(found, flush=True)
        rows.append(str(found))
    if not args.here:
        PAGE.write_text(put(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
