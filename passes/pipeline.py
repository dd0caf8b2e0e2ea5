"""The order of the passes, from a program to what the inner compiler gets: the one place that says it.

Behind each pass stand the same two hooks: with ``RAS_DEBUG=folder`` the graph before and after it is written down
(`debug.py`), and with ``RAS_SPEC=1``, as always in our tests, the program is checked (`spec/legal.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import fx

from ras_compile.errors import SpecViolation
from ras_compile.passes.debug import Journal
from ras_compile.passes.fusion.activation import fuse_linear_gelu
from ras_compile.passes.fusion.attention import fuse_attention
from ras_compile.passes.fusion.few_rows import FewRowsChoice, join_linears
from ras_compile.passes.fusion.gather import fuse_gather_linear
from ras_compile.passes.fusion.scatter import Fusion, fuse_scatter_linear
from ras_compile.passes.lowering.functional import spell_writes
from ras_compile.passes.lowering.hosted import bring_from_host
from ras_compile.passes.lowering.inplace import write_in_place
from ras_compile.passes.lowering.interpolate import Point, interpolate
from ras_compile.passes.lowering.matrices import flatten_linears
from ras_compile.passes.lowering.outline import outline
from ras_compile.passes.lowering.share import share_tables
from ras_compile.passes.spec import legal
from ras_compile.passes.spec.demand import AMBIENT
from ras_compile.passes.spec.sources import Sources, check_sources, sources_of
from ras_compile.passes.spec.values import graphs


@dataclass(frozen=True)
class Pass:
    """A pass: it rewrites a program in place, and leaves a legal one."""

    name: str  # what the spec and the journal of ``RAS_DEBUG`` call it
    run: Callable[[fx.GraphModule], object]  # the pass
    applies: bool = True  # whether this program goes through it


def fused(
    fusion: Fusion | None, few_rows: FewRowsChoice | None, cuda: bool, hosted: Collection[int] = ()
) -> list[Pass]:
    """What makes one kernel of several ops; then where the caches are."""
    kernels = {"scatter": fuse_scatter_linear, "gather": fuse_gather_linear, "attention": fuse_attention}
    return [
        # What feeds a GELU is no plain linear any more, and joins no launch of several.
        Pass("activation", lambda program: fuse_linear_gelu(program.graph), cuda),
        *(Pass(name, partial(_fuse, run, fusion)) for name, run in kernels.items() if fusion is not None),
        Pass("few rows", lambda program: join_linears(program.graph, few_rows), few_rows is not None),
        Pass("in place", lambda program: write_in_place(program.graph)),
        Pass("hosted", lambda program: bring_from_host(program.graph, hosted), bool(hosted)),
    ]


def _fuse(run: Callable[[fx.Graph, Fusion], int], fusion: Fusion, program: fx.GraphModule) -> int:
    return run(program.graph, fusion)


# What a repeated block may hold, then the blocks.
SPELLED = Pass("functional", lambda program: spell_writes(program.graph))
OUTLINED = [Pass("share", lambda program: share_tables(program.graph)), Pass("outline", outline)]


def prepare(
    program: fx.GraphModule,
    *,
    fusion: Fusion | None,
    few_rows: FewRowsChoice | None,
    outline_blocks: bool,
    hosted: Collection[int] = (),
) -> fx.GraphModule:
    """Runs the passes on a sparse or dense program, in place. On CUDA, `linear -> gelu` becomes one product.

    Args:
        fusion: replace `linear -> ... -> splice` by the scatter-GEMM, `gather -> linear` by the gather-GEMM and
            attention of few queries by its own op (where kernels run: on CUDA).
        few_rows: says of linears of a few rows whether they become one launch; None: none do.
        outline_blocks: compile repeated blocks once (where the inner compiler knows subgraphs: Inductor); ops of ours that write
            are spelled so that it can.
        hosted: which of a sparse program's caches are in the host's memory, by their places.
    """
    cuda = any(value.is_cuda for value in (node.meta["val"] for node in program.graph.find_nodes(op="placeholder")))
    lowered = [SPELLED, *OUTLINED] if outline_blocks else []
    return run(program, [*fused(fusion, few_rows, cuda, hosted), *lowered])


def for_all_lengths(
    programs: Sequence[fx.GraphModule], points: Sequence[Point], *, outline_blocks: bool
) -> fx.GraphModule:
    """One program from those that :func:`prepare` has made for several lengths of the context, without outlined blocks.

    Raises:
        NotAffine: there is no such program.
    """
    before = [Pass("matrices", lambda program: flatten_linears(program.graph)), SPELLED] if outline_blocks else []
    done = ["in place"]  # and what came before
    for program in programs:
        run(program, before, done)
    joined = interpolate(programs, points)
    return run(joined, OUTLINED if outline_blocks else [], [*done, *(step.name for step in before)])


def run(program: fx.GraphModule, passes: Sequence[Pass], done: Sequence[str] = ()) -> fx.GraphModule:
    """Runs passes one after the other. ``done`` names those that the program has been through."""
    journal, names = Journal.of(program), list(done)
    before = sources_of(program) if legal.EVERY_PASS else {}
    checked: list[tuple] = program.meta.pop(LEGAL, [])
    _check(program, names, before, checked)
    for step in passes:
        if not step.applies:
            continue
        step.run(program)
        names.append(step.name)
        journal.after(step.name)  # first: what is illegal is written down, too
        _check(program, names, before, checked)
    program.graph.lint()
    program.recompile()
    return program


LEGAL = "legal"  # in the meta of a program that has been checked before its first pass: what was read


def check_built(program: fx.GraphModule) -> None:
    """:func:`legal.check_program` of a program that no pass has been through; what it is then given to looks only at changes.

    Raises:
        SpecViolation: it is not legal.
    """
    legal.check_program(program)
    program.meta[LEGAL] = _written(program)


def _written(program: fx.GraphModule) -> list[tuple]:
    """What the spec reads of a program: it need not look again at one that a pass has left as it was."""
    nodes = [node for graph in graphs(program) for node in graph.nodes]
    # The values of `meta` are compared by their addresses, and kept, so that no new one gets the address of an old one.
    metas = [(list(node.meta), [*map(id, node.meta.values())], list(node.meta.values())) for node in nodes]
    return [(node, node.target, node.args, node.kwargs, *meta) for node, meta in zip(nodes, metas, strict=True)]


def _unchanged(before: list[tuple], now: list[tuple]) -> set[fx.Node]:
    """The nodes that a pass has left as they were; none where code stands in regions of autocast, which may have moved."""
    if any(one[1] in AMBIENT for one in (*before, *now)):
        return set()
    known = {one[0]: one for one in before}
    return {one[0] for one in now if known.get(one[0]) == one}


def _check(program: fx.GraphModule, done: Sequence[str], before: Sources, checked: list[tuple]) -> None:
    """The spec, if it is asked for. ``checked`` is the program as the last check found it, and then as it is now."""
    if not legal.EVERY_PASS:
        return
    now = _written(program)
    try:
        legal.check_program(program, done, now != checked, _unchanged(checked, now))
        check_sources(program, before)
    except SpecViolation as error:
        raise SpecViolation(f"after the pass {done[-1] if done else 'that built it'}: {error}") from error
    checked[:] = now
