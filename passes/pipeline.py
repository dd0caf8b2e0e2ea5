"""The order of the passes, from a program to what the inner compiler gets."""

from __future__ import annotations

from torch import fx

from ras_compile.passes.fusion.activation import fuse_linear_gelu
from ras_compile.passes.fusion.attention import fuse_attention
from ras_compile.passes.fusion.few_rows import FewRowsChoice, join_linears
from ras_compile.passes.fusion.gather import fuse_gather_linear
from ras_compile.passes.fusion.scatter import Fusion, fuse_scatter_linear
from ras_compile.passes.lowering.functional import spell_writes
from ras_compile.passes.lowering.inplace import write_in_place
from ras_compile.passes.lowering.outline import outline


def prepare(
    program: fx.GraphModule, *, fusion: Fusion | None, few_rows: FewRowsChoice | None, outline_blocks: bool
) -> fx.GraphModule:
    """Runs the passes on a sparse or dense program, in place. On CUDA, `linear -> gelu` becomes one product.

    Args:
        fusion: replace `linear -> ... -> splice` by the scatter-GEMM, `gather -> linear` by the gather-GEMM and
            attention of few queries by its own op (where kernels run: on CUDA).
        few_rows: says of linears of a few rows whether they become one launch; None: none do.
        outline_blocks: compile repeated blocks once (where the inner compiler knows subgraphs: Inductor); ops of ours that write
            are spelled so that it can.
    """
    if any(value.is_cuda for value in (node.meta["val"] for node in program.graph.find_nodes(op="placeholder"))):
        fuse_linear_gelu(program.graph)  # first: what feeds a GELU is no plain linear for a launch of several
    if fusion is not None:
        fuse_scatter_linear(program.graph, fusion)
        fuse_gather_linear(program.graph, fusion)
        fuse_attention(program.graph, fusion)
    join_linears(program.graph, few_rows)
    write_in_place(program.graph)
    if outline_blocks:
        spell_writes(program.graph)
        outline(program)
    program.graph.lint()
    program.recompile()
    return program
