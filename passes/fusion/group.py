"""Grouping: scatter-GEMMs that do not depend on each other become one launch, with the plain linears of what they read.

    q = linear(x, wq)                        # stays compact
    scatter_linear(keys, x, wk, rows)
    scatter_linear(values, x, wv, rows)

becomes

    q = empty(B, A, N)
    grouped_scatter_linear([q, keys, values], [x, x, x], [wq, wk, wv], [0 .. A - 1, rows, rows], ...)

because each of them alone is too small for the device. What reads one `x` is a stream; streams that write into the same
caches (text and picture of a joint attention) are one group. A group is made where the members can move to one place and a
measurement says that it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ras_compile._torch import pytree
from ras_compile.passes.programs.aliases import is_view, movable, root, written

aten = torch.ops.aten
own = torch.ops.ras_compile
REST = (1, 0, "none", None, None, 0.0, "none", None, None)  # what the op takes behind the rows, by default
MOST = 8  # members of one launch

# Asked with the arguments of the scatter-GEMMs, site by site, and with those that plain linears would have as members.
GroupChoice = Callable[[list[list[tuple]], list[tuple]], bool]


@dataclass
class Group:
    """Members that may become one launch."""

    scatters: list[fx.Node]
    linears: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # each with what it reads, as [B, A, K]

    @property
    def members(self) -> list[fx.Node]:
        return [*self.scatters, *(linear for linear, _ in self.linears)]

    @property
    def sites(self) -> list[list[fx.Node]]:
        """The scatter-GEMMs by the splice that they make."""
        found: dict[object, list[fx.Node]] = {}
        for node in self.scatters:
            found.setdefault(node.meta.get("site", node), []).append(node)
        return list(found.values())

    @property
    def fits(self) -> bool:
        """Whether one launch can have these members: not too many, of one K, and splices that several linears feed as a whole."""
        whole = all(node.meta.get("ops", 1) == len(site) for site in self.sites for node in site)
        inputs = [*(op.args[1] for op in self.scatters), *(x for _, x in self.linears)]
        kinds = {(x.meta["val"].shape[-1], x.meta["val"].dtype) for x in inputs}  # type: ignore[union-attr]
        return whole and len(kinds) == 1 and 2 <= len(self.members) <= MOST


def group_scatter_linear(graph: fx.Graph, pays: GroupChoice | None) -> int:
    """Groups the scatter-GEMMs of a sparse program; returns how many launches there are of several.

    Those that `fuse_scatter_linear` has only offered (they do not pay alone) are taken back where no group has them.

    Args:
        pays: says of a group whether it is faster than its members in their best forms; None: nothing is grouped.
    """
    answers: dict[object, bool] = {}
    numbers: dict[int, fx.Node] = {}
    count = 0
    for alternatives in candidates(graph) if pays is not None else ():
        done: set[fx.Node] = set()  # members of a launch
        refused: list[list[fx.Node]] = []  # scatter-GEMMs that do not pay together
        for group in alternatives:
            if done.intersection(group.members) or group.scatters in refused or not group.fits:
                continue
            before = place(graph, group)
            if before is None:
                continue
            if accepted(group, pays, answers):  # type: ignore[arg-type]
                merge(graph, group, before, numbers)
                done.update(group.members)
                count += 1
            else:
                refused.append(group.scatters)
    withdraw(graph)
    graph.eliminate_dead_code()
    return count


def candidates(graph: fx.Graph) -> Iterator[list[Group]]:
    """For each set of streams that write into the same caches, the groups that may be made of it, the best first."""
    streams: dict[fx.Node, list[fx.Node]] = {}
    offered: set[fx.Node | None] = set()  # linears that an offered scatter-GEMM would replace
    for node in graph.find_nodes(op="call_function", target=own.scatter_linear.default):
        streams.setdefault(source(node.args[1]), []).append(node)
        offered.add(node.meta.get("offered"))
    joint: list[tuple[set[fx.Node], list[fx.Node]]] = []  # (caches, streams)
    for x, scatters in streams.items():
        caches, together = {root(op.args[0]) for op in scatters}, [x]
        for other in [entry for entry in joint if entry[0] & caches]:
            joint.remove(other)
            caches, together = caches | other[0], [*other[1], *together]
        joint.append((caches, together))
    for _, together in joint:
        alternatives = []
        for chosen in [together, *([x] for x in together if len(together) > 1)]:
            scatters = [op for x in chosen for op in streams[x]]
            found = [pair for x in chosen for pair in linears_of(x, streams[x][0]) if pair[0] not in offered]
            alternatives += [Group(scatters, found), Group(scatters)] if found else [Group(scatters)]
        yield alternatives


def linears_of(x: fx.Node, op: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The plain linears of a stream, in the dtype of its scatter-GEMMs."""
    given: Tensor = op.args[1].meta["val"]  # type: ignore[union-attr]
    kind, found = given.dtype, []
    if x.meta["val"].shape[-1] != given.shape[-1]:  # they read rows of another length
        return []
    for user in x.users:
        if user.target is aten.linear.default and user.args[0] is x:
            values = [operand.meta["val"] for operand in (user, *user.all_input_nodes)]
            if all(value.dtype is kind for value in values):
                found.append((user, op.args[1]))
    return found  # type: ignore[return-value]


def source(x: fx.Node) -> fx.Node:
    """What a scatter-GEMM reads, before it is made [B, A, K]."""
    return x.args[0] if x.target is aten.reshape.default else x  # type: ignore[return-value]


def place(graph: fx.Graph, group: Group) -> fx.Node | None:
    """The node before which the launch can stand, with what its members read moved there; None where there is none.

    That is the first scatter-GEMM of the group, or the first node that reads one of its linears. What the members need and
    what comes later is moved in front of it, unless that reads a cache, writes, or depends on a member. A scatter-GEMM
    moves up to there, unless its cache is read or written in between.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    members = set(group.members)
    first = min(
        [*group.scatters, *(user for linear, _ in group.linears for user in linear.users)], key=order.__getitem__
    )
    stack = [operand for node in group.members for operand in node.all_input_nodes]
    stack += [x for _, x in group.linears]
    caches = {op.args[0] for op in group.scatters}
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
    puts = {node.meta.get("site") for node in group.scatters}
    nodes = list(graph.nodes)
    for op in group.scatters:
        cache = root(op.args[0])  # type: ignore[arg-type]
        for node in nodes[order[first] : order[op]]:
            touches = not is_view(node) and any(root(operand) is cache for operand in node.all_input_nodes)
            if touches and node not in members and node not in puts:
                return None
    for node in late:
        first.prepend(node)
    return first


def accepted(group: Group, pays: GroupChoice, answers: dict[object, bool]) -> bool:
    """Whether a group pays; those of other layers are of the same sizes, and asked about once."""
    scatters = [[values(node.args) for node in site] for site in group.sites]
    linears = [values(member(linear, x)) for linear, x in group.linears]
    key = str(pytree.tree_map_only(Tensor, lambda t: (t.dtype, tuple(t.shape), t.stride()), (scatters, linears)))
    if key not in answers:
        answers[key] = pays(scatters, linears)
    return answers[key]


def values(args: Sequence[object]) -> tuple:
    return fx.node.map_arg(tuple(args), lambda operand: operand.meta["val"])


def member(linear: fx.Node, x: fx.Node, cache: fx.Node | None = None, rows: fx.Node | None = None) -> tuple:
    """A plain linear as a member: into a cache [B, A, N] of its own, row by row. Without nodes for these, their values."""
    _, weight, bias = (*linear.args, None)[:3]
    given: Tensor = x.meta["val"]
    if cache is None:
        cache = linear.meta["val"].new_empty(*given.shape[:2], linear.meta["val"].shape[-1])
        rows = given.new_empty(1, given.shape[1], dtype=torch.int64)  # type: ignore[assignment]
    return (cache, x, weight, bias, rows, *REST)


def merge(graph: fx.Graph, group: Group, before: fx.Node, numbers: dict[int, fx.Node]) -> None:
    """Writes the launch in front of a node, and takes its members away."""
    listed = []
    with graph.inserting_before(before):
        for linear, x in group.linears:
            value: Tensor = linear.meta["val"]
            samples, length, _ = x.meta["val"].shape
            shape = [samples, length, value.shape[-1]]
            made = {"dtype": value.dtype, "device": value.device}
            cache = graph.call_function(aten.empty.memory_format, (shape,), made)
            cache.meta = {**linear.meta, "val": value.new_empty(shape)}
            listed.append((linear, cache, member(linear, x, cache, counted(graph, length, value, numbers))))
        members = [args for _, _, args in listed] + [(*op.args, *REST[len(op.args) - 5 :]) for op in group.scatters]
        columns = map(list, zip(*members, strict=True))
        fused = graph.call_function(own.grouped_scatter_linear.default, tuple(columns))
        fused.meta = {**group.scatters[0].meta, "val": None}
        for linear, cache, _ in listed:
            result, value = cache, linear.meta["val"]
            if value.shape != cache.meta["val"].shape:
                result = graph.call_function(aten.view.default, (cache, list(value.shape)))
                result.meta = {**linear.meta}
            linear.replace_all_uses_with(result)
            graph.erase_node(linear)
    for op in group.scatters:
        graph.erase_node(op)
    for put in {op.meta["site"] for op in group.scatters if op.meta.get("offered")}:
        graph.erase_node(put)


def counted(graph: fx.Graph, length: int, like: Tensor, known: dict[int, fx.Node]) -> fx.Node:
    """`[[0, 1, .., length - 1]]`, one node for all groups."""
    if length not in known:
        with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
            made = {"dtype": torch.int64, "device": like.device}
            row = graph.call_function(aten.arange.start, (0, length), made)
            row.meta["val"] = like.new_empty(length, dtype=torch.int64)
            known[length] = graph.call_function(aten.unsqueeze.default, (row, 0))
            known[length].meta["val"] = like.new_empty(1, length, dtype=torch.int64)
    return known[length]


def withdraw(graph: fx.Graph) -> None:
    """Takes back the scatter-GEMMs that were only offered, and the notes of `fuse_scatter_linear`."""
    for node in graph.find_nodes(op="call_function", target=own.scatter_linear.default):
        if node.meta.get("offered"):
            graph.erase_node(node)
        for note in ("site", "ops", "offered"):
            node.meta.pop(note, None)


def launches(graph: fx.Graph) -> int:
    """How many linears of a program write straight into a cache, alone or in a group."""
    grouped = graph.find_nodes(op="call_function", target=own.grouped_scatter_linear.default)
    caches = [cache for node in grouped for cache in node.args[0]]
    return len(graph.find_nodes(op="call_function", target=own.scatter_linear.default)) + sum(
        root(cache).op == "placeholder" for cache in caches
    )


__all__ = ["Group", "group_scatter_linear", "launches"]
