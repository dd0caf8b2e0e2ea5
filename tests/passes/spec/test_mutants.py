"""Mutants: programs that a broken pass would leave, each of which the spec refuses.

Each is made from a legal program, behind the pass that could have made it, by one small change:

    after              mutant                                        what sees it
    -----------------  --------------------------------------------  -------------------------------------------
    that built it      a write is dropped                            memory: a cache that is never written
    that built it      two caches of one shape are swapped           stages (test_stages.py): another value
    that built it      the rows of a write are shifted by one        memory: rows outside, or two tokens' entry
    that built it      a write stands behind its reader              memory: read before it is written
    that built it      the program returns a cache                   memory: returns memory of a cache
    that built it      the program returns a view of a cache         memory: returns memory of a cache
    that built it      rows are called an argument                   roles, memory
    that built it      a cache is called a constant                  memory: writes into no cache
    that built it      an input without a role                       roles
    that built it      a wrong shape in a node's meta                values
    that built it      wrong strides in a node's meta                values
    that built it      a read of a cache that nobody uses            dead code
    scatter            a scatter-GEMM beside the splice it replaces  memory: written already
    scatter            rows of a scatter-GEMM count from one         memory: rows outside
    gather             rows of a gather-GEMM are shifted             memory: rows outside
    attention          attention says the shape of its keys          values
    activation         a product is left behind                      dead code
    scatter in groups  two members write one cache                   memory: written twice
    few rows           results of a launch are taken crosswise       values
    in place           a splice stays on a view                      splices on caches
    in place           the start of a slice is lost                  memory: written for no token, or twice
    hosted             a cache is not sent back                      memory: not sent back
    hosted             one cache is sent back into another           memory: sends another value back
    functional         a custom op still writes by itself            functional
    functional         the copy goes into another cache              memory: copies into another cache
    functional         the copy is dropped                           memory, dead code
    matrices           a linear of three dimensions                  matrices
    share              the shared table has other sizes              values
    outline            two operands of a call are exchanged          blocks
    outline            a call takes one cache for another            memory: written already
    outline            a call's result has another shape             blocks
    outline            a block hands on a part of its operand        blocks
    outline            a block that nobody calls                     blocks
    interpolate        a length is another one                       values
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import cache

import pytest
import torch
from joint import analysed, layers
from torch import fx

from ras_compile._torch import auto_functionalized_v2
from ras_compile.errors import SpecViolation
from ras_compile.passes import pipeline
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.analysis.roles import Role, of_role, rows_of
from ras_compile.passes.fusion.activation import fuse_linear_gelu
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.lowering.interpolate import interpolate
from ras_compile.passes.lowering.matrices import flatten_linears
from ras_compile.passes.programs.aliases import INVOKE, root, writes
from ras_compile.passes.programs.program import sparse_program
from ras_compile.passes.spec.legal import check_program
from ras_compile.passes.spec.sources import check_sources, sources_of

aten, own = torch.ops.aten, torch.ops.ras_compile
ACTIVE = 3  # of six tokens


def yes(*given) -> bool:
    return True


@cache
def behind(name: str) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A legal program behind a pass, and the passes that it has been through."""
    analysis, splices = (
        layers() if name in ("functional", "share", "outline", "scatter in groups", "few rows") else analysed()
    )
    program = sparse_program(analysis, ACTIVE, splices)
    if name == "activation":
        return with_gelu(program), ("activation",)
    if name == "matrices":
        flatten_linears(program.graph)
        return program, ("matrices",)
    if name == "interpolate":
        return interpolate([sparse_program(analysis, ACTIVE, splices) for _ in range(3)], [(4,), (5,), (6,)]), ()
    fusion = Fusion(
        analysis.frame.tokens, dtypes=(torch.float32, torch.float64), grouped=yes if name != "scatter" else None
    )
    if name in ("in place", "hosted", "that built it"):
        fusion = None
    hosted = (0, 1) if name == "hosted" else ()
    few = yes if name == "few rows" else None
    passes = [*pipeline.fused(fusion, few, False, hosted), pipeline.SPELLED, *pipeline.OUTLINED]
    done: list[str] = []
    for step in passes:
        if name == "that built it":
            break
        if step.applies:
            step.run(program)
            done.append(step.name)
        if step.name == name.removesuffix(" in groups"):
            break
    return program, tuple(done)


def with_gelu(program: fx.GraphModule) -> fx.GraphModule:
    emit, linear = Emitter.of(program.graph), find(program, aten.linear.default)
    with program.graph.inserting_after(linear):
        gelu = emit(aten.gelu.default, linear, approximate="tanh")
    linear.replace_all_uses_with(gelu, delete_user_cb=lambda user: user is not gelu)
    assert fuse_linear_gelu(program.graph, (torch.float32, torch.float64))
    return program


def find(program: fx.GraphModule, target: Callable, index: int = 0) -> fx.Node:
    return program.graph.find_nodes(op="call_function", target=target)[index]


def puts(program: fx.GraphModule) -> list[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=aten.index_put_.default)


def caches(program: fx.GraphModule) -> list[fx.Node]:
    return of_role(program.graph, Role.CACHE)


def output(program: fx.GraphModule) -> fx.Node:
    return program.graph.output_node()


def returns(program: fx.GraphModule, node: fx.Node) -> None:
    last = output(program)
    last.args = ((*last.args[0], node),)


def before(program: fx.GraphModule, node: fx.Node, target: Callable, *args) -> fx.Node:
    with program.graph.inserting_before(node):
        return Emitter.of(program.graph)(target, *args)


def replaced(node: fx.Node, place: int, value: object) -> None:
    node.args = (*node.args[:place], value, *node.args[place + 1 :])


def shift(program: fx.GraphModule, node: fx.Node, place: int, by: int = 1) -> None:
    """The rows of a node are others."""
    rows = node.args[place]
    if isinstance(rows, (list, tuple)):
        last = before(program, node, aten.add.Tensor, rows[-1], by)
        replaced(node, place, [*rows[:-1], last])
    else:
        replaced(node, place, before(program, node, aten.add.Tensor, rows, by))


def drop_write(program):
    program.graph.erase_node(puts(program)[0])
    program.graph.eliminate_dead_code()


def write_behind_reader(program):
    find(program, aten.scaled_dot_product_attention.default).append(puts(program)[0])


def return_a_view(program):
    cached = caches(program)[-1]
    returns(program, before(program, output(program), aten.reshape.default, cached, list(cached.meta["val"].shape)))


def scatter_and_splice(program):
    op = find(program, own.scatter_linear.default)
    value = before(program, op, aten.zeros.default, list(op.args[0].meta["val"].shape))
    before(program, op, aten.copy_.default, op.args[0], value)


def one_cache_twice(program):
    op = find(program, own.grouped_scatter_linear.default)
    views = list(op.args[0])
    same = [index for index, view in enumerate(views) if view.meta["val"].shape == views[-1].meta["val"].shape]
    views[same[0]] = views[-1]
    replaced(op, 0, views)
    program.graph.eliminate_dead_code()


def take_crosswise(program):
    launch = find(program, own.many_linears.default)
    items = {node.args[1]: node for node in launch.users}
    sizes = {index: node.meta["val"].shape for index, node in items.items()}
    other = next(index for index in sizes if sizes[index] != sizes[0])
    replaced(items[0], 1, other)


def splice_on_a_view(program):
    put = puts(program)[0]
    shown = before(program, put, aten.slice.Tensor, put.args[0], 0, 0, 2)
    replaced(put, 0, shown)


def lose_a_start(program):
    """The indices of the first cut cache forget where its segment begins."""
    for put in puts(program):
        for index in put.args[1]:
            if index is not None and index.target is aten.arange.start:
                replaced(index, 0, index.args[0] + 1)
                replaced(index, 1, index.args[1] + 1)
                return
    raise AssertionError("no cache is written in segments")


def blocks(program: fx.GraphModule) -> list[fx.GraphModule]:
    return [block for block in program.children() if isinstance(block, fx.GraphModule)]


def copies(program: fx.GraphModule) -> list[tuple[fx.Graph, fx.Node]]:
    """The copies behind ops that are spelled without writing."""
    return [
        (graph, node)
        for graph in (program.graph, *(block.graph for block in blocks(program)))
        for node in graph.find_nodes(op="call_function", target=aten.copy_.default)
        if node.args[1].target is operator.getitem and node.args[1].args[0].target is auto_functionalized_v2
    ]


def copy_elsewhere(program):
    given = caches(program)
    first = next(node for _, node in copies(program) if node.args[0] in given)
    same = [cache for cache in given if cache.meta["val"].shape == first.args[0].meta["val"].shape]
    replaced(first, 0, next(cache for cache in same if cache is not first.args[0]))


def drop_copy(program):
    graph, node = copies(program)[0]
    graph.erase_node(node)


def write_by_itself(program):
    return copy.deepcopy(behind("scatter in groups")[0])  # as if the pass had done nothing


def calls(program: fx.GraphModule) -> list[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=INVOKE)


def exchange_operands(program):
    call = calls(program)[0]
    kinds = [operand.meta["val"].shape for operand in call.args[2:]]
    place = next(index for index in range(1, len(kinds)) if kinds[index] != kinds[0])
    args = list(call.args)
    args[2], args[2 + place] = args[2 + place], args[2]
    call.args = tuple(args)


def another_cache(program):
    first, second = calls(program)[:2]
    place = next(index for index, operand in enumerate(first.args) if operand in caches(program))
    replaced(second, place, first.args[place])


def another_shape(program):
    call = calls(program)[0]
    call.meta["val"] = (call.meta["val"][0].new_empty(7), *call.meta["val"][1:])


def hand_on_an_operand(program):
    block, call = blocks(program)[0], calls(program)[0]
    inner = block.graph.find_nodes(op="placeholder")
    same = next(node for node in inner if node.meta["val"].shape == call.meta["val"][0].shape)
    last = block.graph.output_node()
    last.args = ((same, *last.args[0][1:]),)
    block.graph.eliminate_dead_code()
    block.recompile()


def call_nobody(program):
    graph = fx.Graph()
    graph.output(())
    program.add_submodule("repeated_block_7", fx.GraphModule({}, graph))


def another_length(program):
    (length,) = of_role(program.graph, Role.LENGTH)
    node = find(program, aten.linear.default)
    size = program.graph.call_function
    with program.graph.inserting_after(node):
        number = size(operator.add, (length, 1))
    number.meta["val"] = length.meta["val"]
    returns(program, number)


def other_table(program):
    index = next(
        node for node in program.graph.nodes if node.op == "call_function" and not isinstance(node.meta["val"], tuple)
    )
    index.meta["val"] = index.meta["val"].new_empty(*index.meta["val"].shape, 2)


MUTANTS: dict[tuple[str, str], tuple[Callable[[fx.GraphModule], object], str]] = {
    ("that built it", "a write is dropped"): (drop_write, "never written"),
    ("that built it", "the rows of a write are shifted by one"): (
        lambda p: shift(p, puts(p)[0], 1),
        "indices|several tokens|written already",
    ),
    ("that built it", "a write stands behind its reader"): (write_behind_reader, "have been read before"),
    ("that built it", "the program returns a cache"): (lambda p: returns(p, caches(p)[0]), "returns memory"),
    ("that built it", "the program returns a view of a cache"): (return_a_view, "returns memory"),
    ("that built it", "rows are called an argument"): (
        lambda p: rows_of(p.graph).meta.update(role=Role.INPUT),
        "without active rows",
    ),
    ("that built it", "a cache is called a constant"): (
        lambda p: caches(p)[0].meta.update(role=Role.CONSTANT),
        "is no cache",
    ),
    ("that built it", "an input without a role"): (lambda p: caches(p)[0].meta.pop("role"), "without a role"),
    ("that built it", "a wrong shape in a node's meta"): (
        lambda p: find(p, aten.linear.default).meta.update(val=torch.empty(1)),
        "says .* gives|cannot run",
    ),
    ("that built it", "wrong strides in a node's meta"): (
        lambda p: find(p, aten.linear.default).meta.update(
            val=find(p, aten.linear.default).meta["val"].transpose(0, 1).contiguous().transpose(0, 1)
        ),
        "says .* gives",
    ),
    ("that built it", "a read of a cache that nobody uses"): (
        lambda p: before(p, output(p), aten.sum.default, caches(p)[0]),
        "nobody uses",
    ),
    ("scatter", "a scatter-GEMM beside the splice it replaces"): (scatter_and_splice, "written already"),
    ("scatter", "rows of a scatter-GEMM count from one"): (
        lambda p: shift(p, find(p, own.scatter_linear.default), 4),
        "rows 1 to 6 of 6",
    ),
    ("gather", "rows of a gather-GEMM are shifted"): (
        lambda p: shift(p, find(p, own.gather_linear.default), 3, -1),
        "rows -1 to",
    ),
    ("attention", "attention says the shape of its keys"): (
        lambda p: find(p, own.attention.default).meta.update(val=find(p, own.attention.default).args[1].meta["val"]),
        "says .* gives",
    ),
    ("activation", "a product is left behind"): (
        lambda p: before(
            p, find(p, own.linear_gelu.default), aten.linear.default, *find(p, own.linear_gelu.default).args
        ),
        "nobody uses",
    ),
    ("scatter in groups", "two members write one cache"): (one_cache_twice, "written already|nobody uses"),
    ("few rows", "results of a launch are taken crosswise"): (take_crosswise, "says .* gives"),
    ("in place", "a splice stays on a view"): (splice_on_a_view, "a view of a cache|indices"),
    ("hosted", "a cache is not sent back"): (
        lambda p: p.graph.erase_node(find(p, own.write_host.default)),
        "not sent back",
    ),
    ("hosted", "one cache is sent back into another"): (
        lambda p: replaced(find(p, own.write_host.default), 0, caches(p)[1]),
        "sends another value back",
    ),
    ("functional", "a custom op still writes by itself"): (write_by_itself, "a custom op that writes"),
    ("functional", "the copy goes into another cache"): (copy_elsewhere, "another cache"),
    ("functional", "the copy is dropped"): (drop_copy, "nobody uses|never written"),
    ("matrices", "a linear of three dimensions"): (
        lambda p: replaced(
            find(p, aten.linear.default),
            0,
            before(p, find(p, aten.linear.default), aten.unsqueeze.default, find(p, aten.linear.default).args[0], 0),
        ),
        "says .* gives|more than two dimensions",
    ),
    ("share", "the shared table has other sizes"): (other_table, "says .* gives"),
    ("outline", "two operands of a call are exchanged"): (exchange_operands, "its block takes"),
    ("outline", "a call takes one cache for another"): (another_cache, "written already|others use"),
    ("outline", "a call's result has another shape"): (another_shape, "its block returns|says"),
    ("outline", "a block hands on a part of its operand"): (hand_on_an_operand, "something else uses|its block"),
    ("outline", "a block that nobody calls"): (call_nobody, "called 0 times"),
    ("interpolate", "a length is another one"): (another_length, "says .* gives"),
}


def exchanged(node: fx.Node, first: fx.Node, second: fx.Node) -> None:
    other = {first: second, second: first}
    node.args = fx.node.map_arg(node.args, lambda operand: other.get(operand, operand))
    node.kwargs = fx.node.map_arg(node.kwargs, lambda operand: other.get(operand, operand))


def exchange_caches(program):
    """Two caches of one shape take each other's place in all that writes or reads them."""
    shapes = [cache.meta["val"].shape for cache in caches(program)]
    first, second = caches(program)[0], caches(program)[shapes.index(shapes[0], 1)]
    for node in list(program.graph.nodes):
        if any(root(operand) in (first, second) for operand in writes(node)):
            exchanged(node, first, second)
            for view in node.all_input_nodes:
                if view.op == "call_function" and root(view) in (first, second):
                    exchanged(view, first, second)


def exchange_results(program):
    launch = find(program, own.many_linears.default)
    items = {node.args[1]: node for node in launch.users}
    first, second = next(
        (a, b) for a in items for b in items if a < b and items[a].meta["val"].shape == items[b].meta["val"].shape
    )
    replaced(items[first], 1, second)
    replaced(items[second], 1, first)


def exchange_weights(program):
    op = find(program, own.grouped_scatter_linear.default)
    weights = list(op.args[2])
    first, second = next(
        (a, b)
        for a in range(len(weights))
        for b in range(a)
        if weights[a].meta["val"].shape == weights[b].meta["val"].shape
    )
    weights[first], weights[second] = weights[second], weights[first]
    replaced(op, 2, weights)


# All sizes agree, each entry is written once: what is wrong is where it comes from.
EXCHANGES: dict[tuple[str, str], Callable[[fx.GraphModule], object]] = {
    ("that built it", "two caches are exchanged"): exchange_caches,
    ("scatter in groups", "two caches are exchanged"): exchange_caches,
    ("functional", "two caches are exchanged"): exchange_caches,
    ("outline", "two caches are exchanged"): exchange_caches,
    ("few rows", "two results of a launch are exchanged"): exchange_results,
    ("scatter in groups", "two weights are exchanged"): exchange_weights,
}


@pytest.mark.parametrize(("after", "mutant"), EXCHANGES, ids=[f"{a}: {m}" for a, m in EXCHANGES])
def test_an_exchange_is_refused(after: str, mutant: str):
    program, done = behind(after)
    before = sources_of(program)
    assert any(name.startswith("cache") and len(found) > 2 for name, found in before.items())
    program = copy.deepcopy(program)
    check_sources(program, before)
    EXCHANGES[after, mutant](program)
    program.graph.lint()
    with pytest.raises(SpecViolation, match="now comes from"):
        check_sources(program, before)


@pytest.mark.parametrize("name", dict.fromkeys(after for after, _ in MUTANTS))
def test_the_program_itself_is_legal(name: str):
    check_program(*behind(name))


@pytest.mark.parametrize(("after", "mutant"), MUTANTS, ids=[f"{a}: {m}" for a, m in MUTANTS])
def test_a_mutant_is_refused(after: str, mutant: str):
    program, done = behind(after)
    program = copy.deepcopy(program)
    change, reason = MUTANTS[after, mutant]
    found = change(program)
    program = found if isinstance(found, fx.GraphModule) else program
    program.graph.lint()
    with pytest.raises(SpecViolation, match=reason):
        check_program(program, done)


def test_every_pass_has_a_mutant():
    passes = [*pipeline.fused(Fusion(6), yes, cuda=True), pipeline.SPELLED, *pipeline.OUTLINED]
    assert {step.name for step in passes} <= {after for after, _ in MUTANTS}
    listed = __doc__ or ""
    assert all(mutant in listed for _, mutant in MUTANTS)
