"""Mutants that change nothing that a picture depends on, each with the reason: by file, function and change."""

from __future__ import annotations

_STATE, _JOINED = "ras_compile/sampling/state.py", "passes/rules/concatenation.py"

EQUIVALENT: dict[str, str] = {
    f"{_STATE}:TransformerState.fail:1 -> 2": "any count below the present one says that the generation is over; counts only rise",
    "ras_compile/sampling/branches.py:Branch:False -> True": "read only behind a branch's first call, which has written it",
    "ras_compile/plans/grid.py:Grid.find_points:5 -> 6": "any lengths at which the graph is right serve as made up ones",
    f"{_JOINED}:sparse_offset:offset < size -> offset <= size": "a border between segments ends one and begins the next: one place",
    "ras_compile/sampling/registry.py:states_of:1 -> 2": "the first of the two most common is that of the one",
    "ras_compile/sampling/branches.py::1 -> 2": "how many elements are weighed by their places",
    "ras_compile/sampling/branches.py::20 -> 21": "how many elements are weighed by their places",
    "ras_compile/sampling/branches.py:fingerprint:2 -> 3": "any weights that rise tell places apart",
    "ras_compile/sampling/branches.py:Contents.__init__:0 -> 1 #2": "counts are compared with one another",
    "passes/rules/pointwise.py:dense_use:any(frame.counts_pictures(a) or frame.counts_tokens(a) for a in atoms_of(full)) -> "
    "all((frame.counts_pictures(a) or frame.counts_tokens(a) for a in atoms_of(full)))": "dimensions without the grid are "
    "taken as they are, whatever size is noted for them",
    "passes/analysis/propagate.py:_round:node.target in CONVOLUTIONS and steps[node].whole -> node.target in CONVOLUTIONS or "
    "steps[node].whole": "without a convolution that mixes tokens the second round ends as the first does",
    "passes/analysis/propagate.py:one_step:any(holds_region(result, call.frame) for result in call.layouts.values()) -> "
    "all((holds_region(result, call.frame) for result in call.layouts.values()))": "all of the known layouts do, or none",
    f"{_STATE}:TransformerState._infer:0 -> 1 #2": "a run that has just begun has no branch that an order could tell",
    f"{_STATE}:TransformerState._infer:True -> False #3": "a run that has just begun has no branch to be found",
    f"{_STATE}:TransformerState.__init__:0 -> 1": "counts are compared with one another, and may begin anywhere",
    f"{_STATE}:TransformerState.reset:1 -> 2": "any other count than the one before says that generations are over",
    "ras_compile/sampling/schedule.py:Schedule.__init__:64 -> 65": "how many counts are remembered",
    "ras_compile/sampling/schedule.py:Schedule._ends:1 -> 2 #2": "one sparse step is one level, wherever it stands",
    "ras_compile/sampling/schedule.py:Schedule._by_error:sum(shares(middle).values()) < mean * len(sparse) -> "
    "sum(shares(middle).values()) <= mean * len(sparse)": "a bisection that meets its aim exactly may go either way",
    "ras_compile/sampling/schedule.py:Schedule._by_error:1 -> 2 #7": "a bisection that begins higher halves once more",
    "passes/analysis/propagate.py::200 -> 201": "an end for what would never end; no model needs more than a few dozen rounds",
}
