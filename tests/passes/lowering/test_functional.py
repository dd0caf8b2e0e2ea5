"""Repeated blocks with ops of ours that write are compiled once, and what they write is written in place."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from contract import by_model, error, of_zoo
from torch._inductor.utils import fresh_cache, run_and_get_code

from ras_compile.config import RASConfig
from ras_compile.execute.inner import compile_inner
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.lowering.functional import spell_writes, writes_by_itself
from ras_compile.passes.pipeline import prepare
from ras_compile.passes.programs.program import sparse_program

ACTIVE = 5
MODELS = ["SD3", "SD3.5", "Flux", "Wan"]


def prepared(case, *, outline_blocks: bool, grouped: bool):
    """The sparse program with all its scatter-GEMMs, alone or in groups."""
    program = sparse_program(case.plan.analysis, ACTIVE, case.plan.sparse)
    fusion = Fusion(
        case.frame.tokens, dtypes=(torch.float64,), gather_pays=lambda args: False, attention_pays=lambda args: False,
        grouped=lambda *given: grouped,
    )  # fmt: skip
    return prepare(program, fusion=fusion, few_rows=None, outline_blocks=outline_blocks)


def given(case):
    rows, (_, caches) = case.rows(ACTIVE), case.dense(case.values)
    return [*case.plan.tensors(case.with_latent(case.other_latent())), rows, *(cache.clone() for cache in caches)]


def ran(program, inputs) -> list[torch.Tensor]:
    """What a program returns and leaves in the caches."""
    own = [value.clone() for value in inputs]
    with torch.no_grad():
        return [*program(*own), *own]


@pytest.mark.parametrize("name", by_model(MODELS))
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in groups"])
def test_a_write_is_a_result_that_is_copied(name, grouped):
    case = of_zoo(name)
    program = prepared(case, outline_blocks=False, grouped=grouped)
    inputs = given(case)
    want = ran(program, inputs)
    ops = [node.target for node in program.graph.nodes if writes_by_itself(node)]
    assert ops and spell_writes(program.graph) == len(ops)
    assert not any(writes_by_itself(node) for node in program.graph.nodes)
    program.graph.lint()
    program.recompile()
    assert error(ran(program, inputs), want) == 0


# Each model once: what is written alone or in groups is the same on all of them (the test above), and Inductor takes long.
@pytest.mark.parametrize(
    ("name", "grouped"),
    [
        pytest.param("SD3.5", True, id="SD3.5-in groups", marks=pytest.mark.xdist_group("SD3.5")),
        pytest.param("Wan", False, id="Wan-alone", marks=pytest.mark.xdist_group("Wan")),
    ],
)
def test_blocks_that_write_are_compiled_once_and_write_in_place(name, grouped):
    case = of_zoo(name)
    inputs = given(case)
    want = ran(prepared(case, outline_blocks=False, grouped=grouped), inputs)
    program = prepared(case, outline_blocks=True, grouped=grouped)
    blocks = [block for at, block in program.named_children() if at.startswith("repeated_block")]
    written = [node for block in blocks for node in block.graph.nodes if "auto_functionalized" in str(node.target)]
    assert written, "no block has an op that writes"
    with fresh_cache(), torch.no_grad():
        compiled, (code,) = run_and_get_code(partial(compile_inner, program, inputs, RASConfig()))
    assert error(ran(compiled, inputs), want) < 1e-9
    caches = [point.meta["val"] for point in case.points if point.meta["val"].ndim == 4]
    for cache in caches:  # keys and values: none is copied out and back
        size = ", ".join(map(str, cache.shape))
        assert not re.search(rf"empty_strided_cpu\(\({size}\)", code)
