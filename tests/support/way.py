"""The way of a call through our source files, counted with `sys.setprofile`.

    python tests/support/way.py

prints it for a warm sparse call of a small model.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ras_compile
from ras_compile import kernels, passes

HOMES = {  # where our files stand, by what they are called here; `passes` and `kernels` may be installed beside the package
    folder: name
    for name, package in (("passes/", passes), ("kernels/", kernels), ("", ras_compile))
    for path in package.__path__
    for folder in (f"{path}/", f"{Path(path).resolve()}/")
}


@dataclass
class Way:
    """The functions that a call has passed.

    Attributes:
        calls: for each of our files, in the order in which they are met, the names of the functions called there.
    """

    calls: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        total = sum(map(len, self.calls.values()))
        lines = [f"{len(self.calls)} files, {total} calls"]
        for file, names in self.calls.items():
            counted = Counter(names).items()
            lines.append(f"{len(names):4d}  {file}: {', '.join(n if c == 1 else f'{n} x{c}' for n, c in counted)}")
        return "\n".join(lines)


def way(call: Callable[[], Any]) -> Way:
    """Makes a call, and notes which functions of ours it passes."""
    found, known = Way(), {}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            name = frame.f_code.co_filename
            if name not in known:
                inside = (label + name.removeprefix(home) for home, label in HOMES.items() if name.startswith(home))
                known[name] = next(inside, None)
            if known[name] is not None:
                found.calls.setdefault(known[name], []).append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def main() -> None:
    """Prints the way of a warm sparse call."""
    import torch
    from tiny import EAGER, LATENT, TEXT, model

    compiled = torch.compile(model(), backend="ras", options=EAGER)
    for _ in range(2):
        with torch.no_grad(), ras_compile.generation(num_steps=8) as gen:
            for step in range(8):
                gen.step()
                given = LATENT, torch.full((2,), 1 - step / 8), TEXT
                found = way(lambda given=given: compiled(*given))
    print(found)


if __name__ == "__main__":
    main()
