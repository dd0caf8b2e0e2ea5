"""Outlining of repeated blocks: a transformer's layers become calls of one subgraph, which is compiled once.

    block_0 ops; block_1 ops; block_2 ops      becomes      invoke_subgraph(block, inputs_0); invoke_subgraph(block, inputs_1); ...

Blocks are found in the graph alone: stretches of nodes with the same ops, arguments and shapes, whose operands follow the
same pattern. The borders are put where the fewest values pass from one stretch to the next.

What a block hands on must own its memory: Inductor takes each result of a call for a buffer of its own, which it gives to
something else after the last use, and a view's memory is larger than the view and belongs to others, too. So a block hands
on what a view is made of, and the view is made outside.

What a block writes into, it alone may use: Inductor does not see that a call writes into an operand, and lets what reads the
operand behind the call have what it held before.

Complex numbers, as the tables of a rotary embedding, go in and out as pairs of real ones: Inductor leaves a call alone that
takes or gives others, and stops where the call also writes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ras_compile.passes.analysis.roles import Role, role_of
from ras_compile.passes.programs.aliases import INVOKE, apart, fills, is_view, run_on_fakes, viewers, writes
from ras_compile.passes.programs.aliases import root as memory

aten = torch.ops.aten

MIN_NODES = 12  # shorter stretches are not worth a call
MIN_REPEATS = 2
CANDIDATES = 64  # periods that are tried, the commonest distances between two equal ops first


@dataclass(frozen=True)
class Repeat:
    """``count`` stretches of ``period`` nodes, the first one at ``start``."""

    start: int
    period: int
    count: int


def outline(module: fx.GraphModule) -> fx.GraphModule:
    """Outlines repeated stretches of ``module.graph`` in place and returns the module.

    Values that pass between stretches, and the caches that a stretch writes, become operands of the subgraph. What each
    stretch computes from inputs alone is computed once before (`share.py`).
    """
    taken: set[fx.Node] = set()
    for number in range(8):
        body = [node for node in module.graph.nodes if node.op == "call_function"]
        found = find_repeat(body, taken)
        if found is None:
            break
        repeat, operand_lists, outputs = found
        _replace(module, body, repeat, operand_lists, outputs, f"repeated_block_{number}", taken)
    # results that other calls hand on; a call that only writes has no users either
    module.graph.eliminate_dead_code(lambda node: node.is_impure() or node.target is INVOKE)
    module.graph.lint()
    module.recompile()
    return module


def token(node: fx.Node) -> object:
    """What must agree for two nodes to be the same op: target, arguments without their nodes, sizes and strides."""
    plain = fx.node.map_arg((node.args, node.kwargs), lambda operand: "node")
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    metas = tuple((v.dtype, tuple(v.shape), v.stride()) if isinstance(v, torch.Tensor) else None for v in values)
    return str(node.target), str(plain), metas, str(node.meta.get("sizes"))


def description(node: fx.Node) -> object | None:
    """What must agree for two operands: type, sizes and strides, at every length of the context (`interpolate.py`).

    None for what is no tensor and no length.
    """
    value = node.meta.get("val")
    if isinstance(value, (int, float)):
        return value
    sizes = str(node.meta.get("sizes"))
    return (value.dtype, tuple(value.shape), value.stride(), sizes) if isinstance(value, torch.Tensor) else None


def find_repeat(body: Sequence[fx.Node], taken: set[fx.Node]) -> tuple[Repeat, list[list[fx.Node]], list[int]] | None:
    """The repeat that saves most nodes, with each stretch's operands and the places of the values it hands on."""
    names: dict[object, int] = {}
    word = [
        -1 - index if node in taken else names.setdefault(token(node), len(names)) for index, node in enumerate(body)
    ]
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for index, letter in enumerate(word):
        if letter in last:
            distances[index - last[letter]] += 1
        last[letter] = index
    candidates = []
    for period in [period for period, _ in distances.most_common(CANDIDATES) if period >= MIN_NODES]:
        for start, length in runs(word, period):
            count = length // period + 1
            if count >= MIN_REPEATS:
                candidates.append(((count - 1) * period, -period, start, length))
    for _, negative, start, length in sorted(candidates, reverse=True):
        best = best_cut(body, start, length + -negative, -negative)
        if best is None or not all(writes_stay(stretch) for stretch in stretches(body, best[0])):
            continue
        if returns_own_memory(body, *best):
            return best
    return None


def runs(word: Sequence[int], period: int) -> list[tuple[int, int]]:
    """Maximal stretches ``(start, length)`` in which every letter stands again ``period`` later, of at least one period."""
    found, start = [], None
    for index in range(len(word) - period + 1):
        same = index + period < len(word) and word[index] == word[index + period] and word[index] >= 0
        if same and start is None:
            start = index
        elif not same and start is not None:
            if index - start >= period:
                found.append((start, index - start))
            start = None
    return found


def best_cut(body: Sequence[fx.Node], start: int, length: int, period: int):
    """Places the borders inside one period so that the fewest values pass; None where the stretches do not match."""
    best = None
    for shift in range(period):
        count = (length - shift) // period
        if count < MIN_REPEATS:
            break
        repeat = Repeat(start + shift, period, count)
        first = stretches(body, repeat)[0]
        inside = set(first)
        inner = [node for node in first if crosses(node, inside)]
        passed = dict.fromkeys(root(node, inside)[0] for node in inner)
        weight = len(passed) + sum(not isinstance(node.meta.get("val"), torch.Tensor) for node in passed) * 1000
        weight += 0 if writes_stay(first) else 1000
        lost = (len(body) and (length - shift) - count * period) / period
        if best is None or (weight + 2 * (length // period - count), lost) < best[0]:
            best = (weight + 2 * (length // period - count), lost), repeat
    if best is None or best[0][0] >= 1000:
        return None
    return matched(body, best[1])


def stretches(body: Sequence[fx.Node], repeat: Repeat) -> list[Sequence[fx.Node]]:
    starts = [repeat.start + k * repeat.period for k in range(repeat.count)]
    return [body[start : start + repeat.period] for start in starts]


def writes_stay(stretch: Sequence[fx.Node]) -> bool:
    """Whether nothing outside of a stretch uses what the stretch writes into and has not made."""
    inside = set(stretch)
    given = {memory(operand) for node in stretch for operand in writes(node)} - inside
    return all(user in inside for node in given for shown in viewers(node) for user in shown.users)


def root(node: fx.Node, inside: Container[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """What a node of a stretch is a view of, and the views that lead from there to the node; they are made of nothing else."""
    views: list[fx.Node] = []
    while node in inside and is_view(node) and len(node.all_input_nodes) == 1:
        views.insert(0, node)
        node = node.all_input_nodes[0]
    if views and not isinstance(node.meta.get("val"), torch.Tensor):  # several results: each is handed on by itself
        node, *views = views
    return node, views


def returns_own_memory(
    body: Sequence[fx.Node], repeat: Repeat, operand_lists: list[list[fx.Node]], outputs: list[int]
) -> bool:
    """Whether all that a block returns fills its memory, and shares it with nothing: the block is run to see."""
    stretch, operands = stretches(body, repeat)[0], operand_lists[0]
    block = _subgraph(stretch, operands, outputs)
    given, returned = run_on_fakes(block, [paired(node.meta["val"]) for node in operands])
    return apart(returned, given) and all(map(fills, returned))


def crosses(node: fx.Node, inside: Container[fx.Node]) -> bool:
    """Whether something outside of its stretch uses a node."""
    return any(user not in inside for user in node.users)


def matched(body: Sequence[fx.Node], repeat: Repeat):
    """``(repeat, operands per stretch, output places)`` if all stretches use their operands in the same pattern."""
    patterns, operand_lists, outputs = [], [], set()
    # a block is given every length, used or not: Inductor knows a symbol in a size, as in s + 4, from an operand that is it
    lengths = [node for node in body[0].graph.nodes if node.op == "placeholder" and role_of(node) is Role.LENGTH]
    for stretch in stretches(body, repeat):
        place = {node: index for index, node in enumerate(stretch)}
        slots: dict[fx.Node, int] = {}
        pattern: list[tuple[str, int]] = []

        def note(operand: fx.Node, place=place, slots=slots, pattern=pattern) -> fx.Node:
            if operand in place:
                pattern.append(("in", place[operand]))
            else:
                pattern.append(("out", slots.setdefault(operand, len(slots))))
            return operand

        for node in stretch:
            fx.node.map_arg((node.args, node.kwargs), note)
        for length in lengths:
            slots.setdefault(length, len(slots))
        metas = [description(operand) for operand in slots]
        if None in metas:
            return None
        patterns.append((pattern, metas))
        operand_lists.append(list(slots))
        outputs |= {place[node] for node in stretch if crosses(node, place)}
    if any(pattern != patterns[0] for pattern in patterns[1:]):
        return None
    return repeat, operand_lists, sorted(outputs)


def _replace(module, body, repeat, operand_lists, outputs, name, taken) -> None:
    found = stretches(body, repeat)
    setattr(module, name, _subgraph(found[0], operand_lists[0], outputs))
    renamed: dict[fx.Node, fx.Node] = {}
    pairs: dict[fx.Node, fx.Node] = {}
    for stretch, listed in zip(found, operand_lists, strict=True):
        operands = [renamed.get(operand, operand) for operand in listed]
        with module.graph.inserting_after(stretch[-1]):
            block = module.graph.get_attr(name)
        for operand in operands:
            if is_complex(operand) and operand not in pairs:
                with module.graph.inserting_before(block):
                    pairs[operand] = module.graph.call_function(aten.view_as_real.default, (operand,))
                pairs[operand].meta["val"] = paired(operand.meta["val"])
                taken.add(pairs[operand])
        given = [pairs.get(operand, operand) for operand in operands]
        with module.graph.inserting_after(block):
            call = module.graph.call_function(INVOKE, (block, name, *given))
        handed = _handed_on(stretch, outputs)
        call.meta["val"] = tuple(paired(node.meta["val"]) for node in handed)
        taken.add(call)
        after, made = call, dict(zip(listed, operands, strict=True))
        for place, node in enumerate(handed):
            with module.graph.inserting_after(after):
                after = made[node] = module.graph.call_function(operator.getitem, (call, place))
            after.meta["val"] = paired(node.meta["val"])
            taken.add(after)
            if is_complex(node):
                with module.graph.inserting_after(after):
                    after = made[node] = module.graph.call_function(aten.view_as_complex.default, (after,))
                after.meta["val"] = node.meta["val"]
                taken.add(after)
        inside = set(stretch)
        for index in outputs:
            for view in root(stretch[index], inside)[1]:
                if view not in made:
                    with module.graph.inserting_after(after):
                        after = made[view] = module.graph.node_copy(view, lambda operand, made=made: made[operand])
                    taken.add(after)
            item = renamed[stretch[index]] = made[stretch[index]]
            stretch[index].replace_all_uses_with(item, delete_user_cb=lambda user, inside=inside: user not in inside)
        for node in reversed(stretch):
            module.graph.erase_node(node)


def _role_inside(operand: fx.Node) -> Role:
    """What an operand is for in a block: roles of which a program has its own kinds of use, and else just an operand."""
    role = role_of(operand)
    return role if role in (Role.CACHE, Role.ROWS, Role.LENGTH) else Role.OPERAND


def is_complex(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_complex()


def paired(value: object) -> object:
    """What goes into a block or out of it: complex numbers [...] as pairs [..., 2]."""
    return torch.view_as_real(value) if isinstance(value, torch.Tensor) and value.is_complex() else value


def _handed_on(stretch: Sequence[fx.Node], outputs: Sequence[int]) -> list[fx.Node]:
    """What a block returns: what its outputs are views of, as far as that is its own."""
    inside = set(stretch)
    return [node for node in dict.fromkeys(root(stretch[index], inside)[0] for index in outputs) if node in inside]


def _subgraph(stretch: Sequence[fx.Node], operands: Sequence[fx.Node], outputs: Sequence[int]) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for index, operand in enumerate(operands):
        env[operand] = graph.placeholder(f"operand_{index}")
        env[operand].meta.update(val=paired(operand.meta["val"]), role=_role_inside(operand))
        if is_complex(operand):
            env[operand] = graph.call_function(aten.view_as_complex.default, (env[operand],))
            env[operand].meta["val"] = operand.meta["val"]
    for node in stretch:
        env[node] = graph.node_copy(node, lambda operand: env[operand])
    handed = _handed_on(stretch, outputs)
    for node in filter(is_complex, handed):
        env[node] = graph.call_function(aten.view_as_real.default, (env[node],))
        env[node].meta["val"] = paired(node.meta["val"])
    graph.output(tuple(env[node] for node in handed))
    return fx.GraphModule({}, graph)
