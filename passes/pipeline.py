"""The order of the passes, from a program to what the inner compiler gets."""

from __future__ import annotations

from torch import fx

from .fuse import fuse_scatter_linear
from .inplace import write_in_place
from .outline import outline


def prepare(program: fx.GraphModule, *, fuse: bool, outline_blocks: bool) -> fx.GraphModule:
    """Runs the passes on a sparse or dense program, in place.

    Args:
        fuse: replace `linear -> splice` by the scatter-GEMM (where kernels run: on CUDA).
        outline_blocks: compile repeated blocks once (where the inner compiler knows subgraphs: Inductor).
    """
    if fuse:
        fuse_scatter_linear(program.graph)
    write_in_place(program.graph)
    if outline_blocks:
        outline(program)
    program.graph.lint()
    program.recompile()
    return program
