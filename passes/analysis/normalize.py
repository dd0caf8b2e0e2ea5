"""Small rewrites that leave one spelling for one thing, before layouts are propagated."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ras_compile._torch import OpOverload, is_composite, schema_of
from ras_compile.passes import rules  # noqa: F401  (fills the registry)
from ras_compile.passes.analysis.emit import Emitter, origin_of, sweep
from ras_compile.passes.analysis.gathers import spell_collectives
from ras_compile.passes.analysis.layers import LAYERS
from ras_compile.passes.rules.concatenation import CONCATENATIONS
from ras_compile.passes.rules.constants import constant
from ras_compile.passes.rules.pointwise import is_pointwise
from ras_compile.passes.rules.registry import Call, named_arguments, operands, rule_of

aten = torch.ops.aten

# What they give of all entries they give of what they give of each row, to the last bit.
EXTREMES = {
    overload: getattr(aten, name).default
    for name in ("amax", "amin")
    for overload in (getattr(aten, name).default, getattr(aten, name[1:]).default)
}


def normalize(graph: fx.Graph) -> None:
    """Drops assertions, empty segments and dead code, spells out ops that have no rule, and causal attention as a mask.

    (In the sparse world the queries are not all there.) A mask that hides nothing goes: with one, attention takes a slower
    kernel.
    """
    spelled = True
    while spelled:  # what an op is spelled with may have no rule, either
        spelled = sum(spell_out(graph, node) for node in list(graph.nodes) if node.op == "call_function") > 0
    for node in list(graph.nodes):
        if is_assertion(node):
            graph.erase_node(node)
        elif node.target is aten.scaled_dot_product_attention.default:
            spell_causal_mask(graph, node)
            drop_open_mask(node)
        elif node.target in CONCATENATIONS:
            drop_empty_segments(node)
        elif node.target in EXTREMES:
            channels_first(graph, node)
        elif node.target is aten.slice_scatter.default:
            join_writes(graph, node)
    spell_collectives(graph)
    sweep(graph)


def is_assertion(node: fx.Node) -> bool:
    """Whether one of PyTorch's ops only looks at values, and raises: it returns nothing, and writes nothing."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    return not schema_of(target).returns and not schema_of(target).is_mutable


def spell_out(graph: fx.Graph, node: fx.Node) -> bool:
    """An op that has no rule, and that PyTorch or `layers.py` puts together from others: those others take its place.

    `tensordot(x, w)  ->  reshape, mm, reshape`
    """
    target = node.target
    if not isinstance(target, OpOverload) or rule_of(target) is not None or is_pointwise(target):
        return False
    layer = LAYERS.get(target)
    if layer is None and not is_composite(target):
        return False
    given = operands(node)
    if not given or not all(isinstance(operand.meta.get("val"), torch.Tensor) for operand in given):
        return False

    def run(*values: torch.Tensor) -> Any:
        left = iter(values)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: next(left))
        return (layer or target)(*args, **kwargs)

    try:
        with torch.no_grad(), given[0].meta["val"].fake_mode:
            # tracing tells its inputs apart by the object, and equal nodes may share a fake tensor
            apart = [operand.meta["val"].detach() for operand in given]
            parts = make_fx(run, pre_dispatch=layer is not None)(*apart).graph
    except NotImplementedError:
        return False
    calls = [part for part in parts.nodes if part.op == "call_function"]
    if any(part.op == "get_attr" for part in parts.nodes) or any(
        not isinstance(part.target, OpOverload) or part.target is target or schema_of(part.target).is_mutable
        for part in calls
        if part.target is not operator.getitem
    ):
        return False
    env = dict(zip(parts.find_nodes(op="placeholder"), given, strict=True))
    with graph.inserting_before(node):
        for part in calls:
            new = env[part] = graph.node_copy(part, lambda operand: env[operand])
            new.meta.update(origin_of(node))
    emit, result = Emitter.of(graph), parts.output_node().args[0]
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            if user.target is not operator.getitem:
                return False
            emit.replace(user, env[result[user.args[1]]])
        graph.erase_node(node)
    else:
        emit.replace(node, env[result])
    return True


def drop_empty_segments(node: fx.Node) -> None:
    """`cat([x[:, :n], x[:, n:]])  ->  cat([x[:, :n]])`, where x has n entries: what is padded on may be nothing."""
    value, (tensors, *rest) = node.meta["val"], node.args
    dim = named_arguments(node)["dim"]
    kept = [tensor for tensor in tensors if tensor.meta["val"].shape[dim]]
    if any(tensor.meta["val"].dtype == value.dtype for tensor in kept):
        node.args = (kept, *rest)


def channels_first(graph: fx.Graph, node: fx.Node) -> None:
    """`amax(x, all)  ->  amax(amax(x, last), all)`: a scale of a whole activation then needs one number of each token.

    A sparse step keeps what is reduced over tokens; of activations that would be all their channels.
    """
    operand, dims = operands(node)[0], named_arguments(node).get("dim") or ()
    shape = operand.meta["val"].shape
    gone = {dim % len(shape) for dim in dims} or set(range(len(shape)))
    if len(gone) > 1 and len(shape) - 1 in gone and shape[-1] > 1:
        with graph.inserting_before(node):
            rows = Emitter.of(graph)(EXTREMES[node.target], operand, [-1], True)
        node.replace_input_with(operand, rows)


def join_writes(graph: fx.Graph, node: fx.Node) -> None:
    """`y[..., 0::2] = a; y[..., 1::2] = b  ->  y = stack([a, b], -1).flatten(-2)`, where that is all of a contiguous y.

    Rotary positions are often written so. Inductor unfolds the writes into each reader, one condition inside of another; in
    one model of width 192 that took 40 % of a dense step.
    """
    value: torch.Tensor = node.meta["val"]
    sources: dict[int, fx.Node] = {}
    dim, step = (named_arguments(node)[name] for name in ("dim", "step"))
    lengths = all(isinstance(length, int) for length in (step, *value.shape))  # symbols are left alone
    if not lengths or step == 1 or dim % value.dim() != value.dim() - 1 or not value.is_contiguous():
        return
    write = node
    while write.target is aten.slice_scatter.default and len(sources) < step:
        given = named_arguments(write)
        if (given["dim"], given["step"]) != (dim, step) or not _to_the_end(given, value):
            return
        sources.setdefault(given["start"] or 0, given["src"])
        write = given["self"]
    if set(sources) != set(range(step)) or value.shape[-1] % step:
        return
    emit = Emitter.of(graph)
    emit.origin = node
    with graph.inserting_before(node):
        parts = [_written(emit, sources[start]) for start in range(step)]
        emit.replace(node, emit(aten.view.default, emit(aten.stack.default, parts, -1), list(value.shape)))


def _to_the_end(given: dict[str, Any], value: torch.Tensor) -> bool:
    """Whether a write with a stride starts in the first period and leaves nothing out behind it."""
    start, end = given["start"] or 0, value.shape[-1] if given["end"] is None else given["end"]
    return isinstance(start, int) and isinstance(end, int) and 0 <= start < given["step"] and end >= value.shape[-1]


def _written(emit: Emitter, source: fx.Node) -> fx.Node:
    """What a write leaves: `copy(y[..., 0::2], a)` has the values of a in the shape and the dtype of y."""
    if source.target is not aten.copy.default:
        return source
    value: torch.Tensor = source.meta["val"]
    given: Any = source.args[1]
    if given.meta["val"].dtype != value.dtype:
        given = emit(aten._to_copy.default, given, dtype=value.dtype)
    return given if given.meta["val"].shape == value.shape else emit(aten.expand.default, given, list(value.shape))


def spell_causal_mask(graph: fx.Graph, node: fx.Node) -> None:
    """`sdpa(q, k, v, is_causal=True)  ->  sdpa(q, k, v, tril(ones(l, s)))`"""
    call = Call(node, {}, None)
    if not call.args["is_causal"]:
        return
    query, key = (call.args[name].meta["val"] for name in ("query", "key"))
    with graph.inserting_before(node), query.fake_mode:
        shape = [query.shape[-2], key.shape[-2]]
        ones = graph.call_function(aten.ones.default, (shape,), {"dtype": torch.bool, "device": query.device})
        mask = graph.call_function(aten.tril.default, (ones,))
        for made in (ones, mask):
            made.meta["val"] = torch.empty(shape, dtype=torch.bool, device=query.device)
    _, node.args, node.kwargs = call.with_args(attn_mask=mask, is_causal=False)


def drop_open_mask(node: fx.Node) -> None:
    """`sdpa(q, k, v, ones(...))  ->  sdpa(q, k, v)`, where the mask depends on no input: no weight, no argument."""
    call = Call(node, {}, None)
    mask = call.args["attn_mask"]
    if mask is not None and is_open(mask):
        _, node.args, node.kwargs = call.with_args(attn_mask=None)


def is_open(mask: fx.Node) -> bool:
    """Whether a mask hides nothing and depends on no input. At another length of the context it may hide something."""
    value = constant(mask)
    if value is None or value.is_meta:  # a meta tensor has no entries to look at
        return False
    value = value[
        tuple(
            0 if stride == 0 and size else slice(None) for size, stride in zip(value.shape, value.stride(), strict=True)
        )
    ]
    return bool(value.all() if value.dtype is torch.bool else (value == 0).all())
