"""Golden files: the emitted programs of six small models, as text. A change of a program is seen in review, line by line.

    pytest tests/golden --renew        writes the files anew; look at the difference before it is committed

Names are made from ops and roles, so that they are the same on every version of PyTorch that captures the same ops.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import handwritten
import pytest
import torch
from contract import by_model, subject
from zoo import redraw

from ras_compile.passes.debug import text
from ras_compile.passes.pipeline import prepare
from ras_compile.passes.programs.program import dense_program, sparse_program

HERE = Path(__file__).parent
MODELS = {  # name of the file: name among the models that people write by hand, and what becomes of the context
    "joint_sequence": ("registers on both sides", "fresh"),
    "cross_attention": ("base", "fresh"),
    "frozen_context": ("base", "frozen"),
    "video_factorised": ("video with attention over space and over time", "fresh"),
    "convolution": ("convolutional head", "fresh"),
    "pooled": ("pooled mean fed back", "fresh"),
}


def emitted(name: str) -> str:
    """The dense program and the sparse one for a quarter of the tokens, as the inner compiler gets them."""
    model, context = MODELS[name]
    case = handwritten.MODELS[model]
    torch.manual_seed(0)
    made = subject(redraw(case.build()).eval(), case.inputs(), exact=False)
    plan = (made.frozen if context == "frozen" else made).plan
    active = made.frame.tokens // 4
    programs = {
        "dense": dense_program(plan.analysis, plan.sparse),
        f"sparse, {active} of {made.frame.tokens} tokens": sparse_program(plan.analysis, active, plan.sparse),
    }
    parts = [f"{model}, context {context}"]
    for title, program in programs.items():
        prepare(program, fusion=None, few_rows=None, outline_blocks=False)
        parts.append(f"{title}\n{'-' * len(title)}\n{text(program, stable=True)}")
    return "\n".join(parts)


@pytest.mark.parametrize("name", by_model(MODELS))
def test_the_program_is_the_golden_one(name: str, request):
    file, found = HERE / f"{name}.txt", emitted(name)
    if request.config.getoption("--renew", default=False):
        file.write_text(found)
    wanted = file.read_text() if file.exists() else ""
    if found != wanted:
        lines = difflib.unified_diff(
            wanted.splitlines(), found.splitlines(), f"golden {file.name}", "emitted", lineterm=""
        )
        pytest.fail("\n".join([*lines, "if this is meant: pytest tests/golden --renew"]), pytrace=False)
