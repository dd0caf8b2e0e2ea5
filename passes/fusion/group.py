"""Groups: scatter-GEMMs that do not depend on each other become one launch, with the plain linears of what they read.

    q = linear(x, wq)                        # stays compact
    scatter_linear(keys, x, wk, rows)
    scatter_linear(values, x, wv, rows)

becomes

    q = empty(B, A, N)
    grouped_scatter_linear([q, keys, values], [x, x, x], [wq, wk, wv], [0 .. A - 1, rows, rows], ...)

because each of them alone is too small for the device. What reads one `x` is a stream; streams that write into the same
caches (text and picture of a joint attention) are one group. A group is made where the members can move to one place and a
measurement says that it pays. A splice whose scatter-GEMMs do not pay alone is a member like those that are written already: it
stays as it is unless a launch takes it in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile.kernels.arguments import ScatterArguments
from ras_compile.kernels.grouped import MOST
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.fusion.choices import Asked
from ras_compile.passes.programs.aliases import is_view, movable, root, written
from ras_compile.passes.rules.registry import nodes_in

aten = torch.ops.aten
own = torch.ops.ras_compile

# Asked with the arguments of the scatter-GEMMs, site by site, and with those that plain linears would have as members.
GroupChoice = Callable[[list[list[Sequence]], list[Sequence]], bool]


@dataclass(eq=False)
class Op:
    """A scatter-GEMM of a program, or one that may take the place of a splice there."""

    arguments: ScatterArguments[fx.Node]  # those of `scatter_linear`
    at: fx.Node  # the op, or the splice in whose place it would stand
    site: list[Op] = field(default_factory=list)  # all ops that write one splice, this one among them; they go together
    linear: fx.Node | None = None  # of one that is not written: the linear that it replaces
    written: bool = False  # whether the program has it, alone or in a launch

    @property
    def meta(self) -> dict:
        """What is known of the op's origin."""
        return {**(self.linear or self.at).meta, "val": None}

    def write(self, graph: fx.Graph) -> None:
        """Writes the op in front of its splice."""
        with graph.inserting_before(self.at):
            node = graph.call_function(own.scatter_linear.default, tuple(self.arguments))
        node.meta = self.meta
        self.at, self.written = node, True


@dataclass
class Group:
    """Members that may become one launch."""

    scatters: list[Op]
    linears: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # each with what it reads, as [B, A, K]

    @property
    def nodes(self) -> list[fx.Node]:
        """Where the members stand."""
        return [*(op.at for op in self.scatters), *(linear for linear, _ in self.linears)]

    @property
    def sites(self) -> list[list[Op]]:
        """The scatter-GEMMs by the splice that they make."""
        found: dict[int, list[Op]] = {}
        for op in self.scatters:
            found.setdefault(id(op.site or op), []).append(op)
        return list(found.values())

    @property
    def fits(self) -> bool:
        """Whether one launch can have these members: not too many, of one K, and splices that several linears feed as a whole."""
        whole = all(other in self.scatters for op in self.scatters for other in op.site)
        inputs = [*(op.arguments.x for op in self.scatters), *(x for _, x in self.linears)]
        kinds = {(x.meta["val"].shape[-1], x.meta["val"].dtype) for x in inputs}
        return whole and len(kinds) == 1 and 2 <= len(self.scatters) + len(self.linears) <= MOST


def join(graph: fx.Graph, ops: Sequence[Op], pays: GroupChoice) -> int:
    """Joins a program's scatter-GEMMs, in their order; returns how many launches there are of several.

    Args:
        ops: those that are written, and those that may be.
        pays: says of a group whether it is faster than its members in their best forms.
    """
    asked = Asked(pays)
    numbers: dict[int, fx.Node] = {}
    count = 0
    for alternatives in candidates(ops):
        done: set[fx.Node] = set()  # members of a launch
        refused: list[list[Op]] = []  # scatter-GEMMs that do not pay together
        for group in alternatives:
            if done.intersection(group.nodes) or group.scatters in refused or not group.fits:
                continue
            before = place(graph, group)
            if before is None:
                continue
            scatters = [[op.arguments for op in site] for site in group.sites]
            if asked(scatters, [member(linear, x) for linear, x in group.linears]):
                done.update(group.nodes)
                merge(graph, group, before, numbers)
                count += 1
            else:
                refused.append(group.scatters)
    return count


def candidates(ops: Sequence[Op]) -> Iterator[list[Group]]:
    """For each set of streams that write into the same caches, the groups that may be made of it, the best first."""
    streams: dict[fx.Node, list[Op]] = {}
    replaced = {op.linear for op in ops}  # no plain linears
    for op in ops:
        streams.setdefault(source(op.arguments.x), []).append(op)
    joint: list[tuple[set[fx.Node], list[fx.Node]]] = []  # (caches, streams)
    for x, scatters in streams.items():
        caches, together = {root(op.arguments.cache) for op in scatters}, [x]
        for other in [entry for entry in joint if entry[0] & caches]:
            joint.remove(other)
            caches, together = caches | other[0], [*other[1], *together]
        joint.append((caches, together))
    for _, together in joint:
        alternatives = []
        for chosen in [together, *([x] for x in together if len(together) > 1)]:
            scatters = [op for x in chosen for op in streams[x]]
            found = [pair for x in chosen for pair in linears_of(x, streams[x][0]) if pair[0] not in replaced]
            alternatives += [Group(scatters, found), Group(scatters)] if found else [Group(scatters)]
        yield alternatives


def linears_of(x: fx.Node, op: Op) -> list[tuple[fx.Node, fx.Node]]:
    """The plain linears of a stream, in the dtype of its scatter-GEMMs."""
    given: Tensor = op.arguments.x.meta["val"]
    kind, found = given.dtype, []
    if x.meta["val"].shape[-1] != given.shape[-1]:  # they read rows of another length
        return []
    for user in x.users:
        if user.target is aten.linear.default and user.args[0] is x:
            values = [operand.meta["val"] for operand in (user, *user.all_input_nodes)]
            if all(value.dtype is kind for value in values):
                found.append((user, op.arguments.x))
    return found


def source(x: fx.Node) -> fx.Node:
    """What a scatter-GEMM reads, before it is made [B, A, K]."""
    return x.all_input_nodes[0] if x.target is aten.reshape.default else x


def place(graph: fx.Graph, group: Group) -> fx.Node | None:
    """The node before which the launch can stand, with what its members read moved there; None where there is none.

    That is the first scatter-GEMM of the group, or the first node that reads one of its linears. What the members need and
    what comes later is moved in front of it, unless that reads a cache, writes, or depends on a member. A scatter-GEMM
    moves up to there, unless its cache is read or written in between.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    members = set(group.nodes)
    readers = (user for linear, _ in group.linears for user in linear.users)
    first = min([*(op.at for op in group.scatters), *readers], key=order.__getitem__)
    stack = [operand for linear, x in group.linears for operand in (x, *linear.all_input_nodes)]
    stack += nodes_in([tuple(op.arguments) for op in group.scatters])
    caches = {op.arguments.cache for op in group.scatters}
    if any(written(root(operand)) for operand in stack if operand not in caches):
        return None
    needed: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in members:
            return None
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    late = [node for node in graph.nodes if node in needed and order[node] >= order[first]]
    if not all(map(movable, late)):
        return None
    nodes = list(graph.nodes)
    for op in group.scatters:
        cache = root(op.arguments.cache)
        for node in nodes[order[first] : order[op.at]]:
            touches = not is_view(node) and any(root(operand) is cache for operand in node.all_input_nodes)
            if touches and node not in members:
                return None
    for node in late:
        first.prepend(node)
    return first


def member(linear: fx.Node, x: fx.Node, cache: Any = None, rows: Any = None) -> ScatterArguments[fx.Node]:
    """A plain linear as a member: into a cache [B, A, N] of its own, row by row. Without nodes for these, their values."""
    _, weight, bias = (*linear.args, None)[:3]
    given: Tensor = x.meta["val"]
    if cache is None:
        cache = linear.meta["val"].new_empty(*given.shape[:2], linear.meta["val"].shape[-1])
        rows = given.new_empty(1, given.shape[1], dtype=torch.int64)
    return ScatterArguments(cache, x, weight, bias, rows)


def merge(graph: fx.Graph, group: Group, before: fx.Node, numbers: dict[int, fx.Node]) -> None:
    """Writes the launch in front of a node, and takes its members away."""
    emit, listed = Emitter.of(graph), []
    with graph.inserting_before(before):
        for linear, x in group.linears:
            value: Tensor = linear.meta["val"]
            samples, length, _ = x.meta["val"].shape
            shape = [samples, length, value.shape[-1]]
            made = {"dtype": value.dtype, "device": value.device}
            cache = emit.like(linear, aten.empty.memory_format, shape, **made)
            listed.append((linear, cache, member(linear, x, cache, counted(emit, length, value, numbers))))
        members = [arguments for _, _, arguments in listed] + [op.arguments for op in group.scatters]
        columns = map(list, zip(*members, strict=True))
        fused = graph.call_function(own.grouped_scatter_linear.default, tuple(columns))
        fused.meta = group.scatters[0].meta
        for linear, cache, _ in listed:
            shape = linear.meta["val"].shape
            same = shape == cache.meta["val"].shape
            emit.replace(linear, cache if same else emit.like(linear, aten.view.default, cache, list(shape)))
    for node in {op.at: None for op in group.scatters}:
        graph.erase_node(node)
    for op in group.scatters:
        op.written = True


def counted(emit: Emitter, length: int, like: Tensor, known: dict[int, fx.Node]) -> fx.Node:
    """`[[0, 1, .., length - 1]]`, one node for all groups."""
    if length not in known:
        graph = emit.graph
        with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
            row = emit(aten.arange.start, 0, length, dtype=torch.int64, device=like.device)
            known[length] = emit(aten.unsqueeze.default, row, 0)
    return known[length]


def launches(graph: fx.Graph) -> int:
    """How many linears of a program write straight into a cache, alone or in a group."""
    grouped = graph.find_nodes(op="call_function", target=own.grouped_scatter_linear.default)
    caches = [cache for node in grouped for cache in node.args[0]]
    return len(graph.find_nodes(op="call_function", target=own.scatter_linear.default)) + sum(
        root(cache).op == "placeholder" for cache in caches
    )
