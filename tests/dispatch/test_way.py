"""The way of a warm sparse call: how many of our files it passes, and how many functions."""

from __future__ import annotations

import pytest
import torch
from reading import Length
from reading import inputs as text_of
from tiny import EAGER, LATENT, TEXT, model
from way import way

import ras_compile


def last_call(compiled, latent, context):
    """The way of the last call of a second generation, in which nothing is compiled any more."""
    for _ in range(2):
        with torch.no_grad(), ras_compile.generation(num_steps=8) as gen:
            for step in range(8):
                gen.step()
                given = latent, torch.full((len(latent),), 1 - step / 8), *context
                found = way(lambda given=given: compiled(*given))
    assert ras_compile.trace(compiled)[-1].kind == "sparse"
    return found


PAPER = {**EAGER, "metric": "std", "noise_reuse": "hold"}


@pytest.mark.parametrize(("options", "files", "calls"), [(PAPER, 9, 70), (EAGER, 9, 95)], ids=["paper", "defaults"])
@pytest.mark.parametrize("kind", ["captured whole", "traced"])
def test_a_warm_sparse_call_passes_few_files(kind, options, files, calls):
    """Both ways of capture share all but what guards them. On CUDA the selection is replayed: its files are passed once."""
    if kind == "traced":
        compiled = torch.compile(Length().eval(), backend="ras", options=options)
        found = last_call(compiled, torch.randn(1, 4, 4, 6), tuple(text_of(4).values()))
    else:
        found = last_call(torch.compile(model(), backend="ras", options=options), LATENT, (TEXT,))
    print(found)
    own = {"dispatch/traced.py", "dispatch/fixed.py", "capture/python_state.py"} if kind == "traced" else {"backend.py"}
    assert own <= set(found.calls) and "dispatch/dispatcher.py" in found.calls
    assert len(set(found.calls) - own) <= files
    if kind == "captured whole":
        assert sum(map(len, found.calls.values())) <= calls
