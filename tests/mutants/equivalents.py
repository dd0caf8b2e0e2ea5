"""Mutants that change nothing that a picture depends on, each with the reason: by file, function and change."""

from __future__ import annotations

_STATE, _JOINED = "ras_compile/sampling/state.py", "passes/rules/concatenation.py"

EQUIVALENT: dict[str, str] = {
    f"{_STATE}:TransformerState.fail:1 -> 2": "any count below the present one says that the generation is over; counts only rise",
    "ras_compile/sampling/branches.py:Branch:False -> True": "read only behind a branch's first call, which has written it",
    "ras_compile/plans/grid.py:Grid.find_points:5 -> 6": "any lengths at which the graph is right serve as made up ones",
    f"{_JOINED}:sparse_offset:offset < size -> offset <= size": "a border between segments ends one and begins the next: one place",
    "ras_compile/sampling/schedule.py:Schedule._by_error:1 -> 2 #7": "a bisection that begins higher halves once more",
    "passes/analysis/propagate.py::200 -> 201": "an end for what would never end; no model needs more than a few dozen rounds",
}
