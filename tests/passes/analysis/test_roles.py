"""Inputs of programs say what they are for, whatever they are called."""

from __future__ import annotations

import copy

import torch
from joint import analysed, captured
from torch import fx

from ras_compile.passes.analysis.roles import Role, of_role, role_of, rows_of
from ras_compile.passes.fusion.scatter import Fusion, fuse_scatter_linear
from ras_compile.passes.lowering.interpolate import interpolate
from ras_compile.passes.programs.program import dense_program, sparse_program


def roles(graph: fx.Graph) -> list[Role | None]:
    return [role_of(node) for node in graph.find_nodes(op="placeholder")]


def test_every_input_has_one():
    given = len(captured().meta["constants"])
    inputs = [Role.INPUT] * 3 + [Role.CONSTANT] * given
    assert roles(captured().graph) == inputs
    analysis, splices = analysed()
    assert roles(dense_program(analysis, splices).graph) == inputs
    sparse = sparse_program(analysis, 3, splices)
    assert roles(sparse.graph) == [*inputs, Role.ROWS, *[Role.CACHE] * len(splices.splices)]
    assert rows_of(sparse.graph).meta["val"].dtype is torch.int64
    assert roles(copy.deepcopy(sparse).graph) == roles(sparse.graph), "copies keep them"
    many = interpolate([sparse, sparse, sparse], [(4,), (5,), (6,)])
    assert roles(many.graph) == [Role.LENGTH, *roles(sparse.graph)]


def test_names_say_nothing():
    """PyTorch renames placeholders as it likes: passes find the rows and the caches all the same."""

    def found(rename: bool) -> tuple[int, int]:
        analysis, splices = analysed()
        program = sparse_program(analysis, 3, splices)
        if rename:
            for index, node in enumerate(program.graph.find_nodes(op="placeholder")):
                node._rename(f"arg{index}_1")
        count = fuse_scatter_linear(program.graph, Fusion(6, dtypes=(torch.float32,)))
        return count, len(of_role(program.graph, Role.CACHE))

    assert found(rename=True) == found(rename=False) == (1, 3)
