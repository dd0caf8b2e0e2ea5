"""Scaled dot-product attention: the queries stay sparse, keys and values are spliced.

A kernel that is called by its own name also returns the log-sum-exp of each query's scores, by which attention to several sets of
keys is put together (ring attention, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ras_compile.passes.algebra.layout import (
    Axis,
    Dim,
    Exclude,
    Layout,
    Unbatch,
    atoms_of,
    normal,
    opaque,
    paired,
)
from ras_compile.passes.rules.contraction import apart, counts_samples, region_atoms, smaller
from ras_compile.passes.rules.pointwise import dense_use
from ras_compile.passes.rules.registry import Call, Gather, Result, Step, Use, rule_for

aten = torch.ops.aten

KERNELS = (
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)  # fmt: skip
ATTENTION = (aten.scaled_dot_product_attention.default, *KERNELS)


@rule_for(*ATTENTION)
def attention(call: Call) -> Step:
    """`b h l e, b h s e, b h s f -> b h l f`; the mask, `b h l s`, is gathered on the query side."""
    query, key, value = (call.args[name] for name in ("query", "key", "value"))
    mask = call.args.get("attn_mask", call.args.get("attn_bias"))
    if call.args["dropout_p"]:
        raise call.unsupported("dropout in training mode: region-adaptive sampling runs a model in eval mode")
    split = split_region(call, [query, key, value])
    if split is None:
        return call.whole(results(call, of_rows(call, query)))
    in_batch, layout = split
    if call.args["is_causal"] and not in_batch:
        raise call.unsupported("causal attention among tokens: spell it as a mask")
    dims = [dim if any(atoms_of(dim)) else opaque(size) for dim, size in zip(layout.dims, call.shape, strict=True)]
    out = Layout.of(dims)
    mixed = Use.ROWS if in_batch or not call.kv_cache else Use.WHOLE
    uses: list[Use | Gather] = []
    for index, node in enumerate(call.operands):
        if node is mask and index == 3:
            uses.append(mask_use(call, out, node))
        elif call.layout(node) is not None:
            uses.append(mixed if index else Use.ROWS)
        elif in_batch:
            lead = ungrouped(out.dims[-3], grouped(call, node))
            if lead is None:
                return call.whole(results(call, None))
            rest = [opaque(size) for size in call.shape_of(node)[-2:]]
            uses.append(dense_use(call, Layout((*out.dims[:-3], lead, *rest)), call.shape_of(node)))
        else:
            uses.append(Use.SAME)
    return Step(results(call, out), tuple(uses))


def results(call: Call, out: Layout | None) -> Result:
    """The layouts of all results: a kernel's second one is the log-sum-exp, `b h l` or `b h l 1`; others have no tokens."""
    if call.node.target not in KERNELS or out is None:
        return call.each(out)
    value = call.node.meta["val"]
    of_scores = Layout((*out.dims[:-1], ()) if value[1].ndim == value[0].ndim else out.dims[:-1])
    return (out, of_scores, *[None] * (len(value) - 2))


def mask_use(call: Call, out: Layout, mask: fx.Node) -> Use | Gather:
    """A mask of positions: its query side is gathered like the queries, its key side stays whole."""
    if call.layout(mask) is not None:
        raise call.unsupported("an attention mask computed from the latent's values; masks of positions are supported")
    if not call.kv_cache and call.shape_of(mask)[-1] != 1:
        raise call.unsupported(
            "an attention mask beside kv_cache=False: the keys of the mask are not the active tokens"
        )
    shape = call.shape_of(mask)
    return dense_use(call, Layout((*out.dims[:-1], opaque(shape[-1]))), shape)


def split_region(call: Call, nodes: Sequence[fx.Node]) -> tuple[bool, Layout] | None:
    """Where the tokens stand: ``(in_batch, layout)``, or None where no query row can stay sparse.

    Raises:
        Exclude: a part of the region counts the batch and another the sequence (factorised attention): the larger stays.
        Unbatch: the samples attend to each other.
    """
    query = call.layout(nodes[0])
    carriers = [layout for layout in map(call.layout, nodes) if layout is not None]
    for layout in carriers:
        if counts_samples(call, layout.dims[-2:]):
            raise Unbatch
        batch, sequence = region_atoms(call, layout.dims[:-2]), region_atoms(call, layout.dims[-2:-1])
        if batch and sequence and (apart(call, batch | sequence)):
            return None
        if batch and sequence:
            raise Exclude(smaller(call, batch, sequence))
        if contracted := region_atoms(call, layout.dims[-1:]):
            if layout.raw:  # the latent itself attends: what the scores contract are its channels
                raise Exclude(contracted)
            return None
        if batch:
            lead = paired_batch(call, nodes)
            if lead is None or any(region_atoms(call, other.dims[-2:]) for other in carriers):
                return None
            return True, Layout.of([*lead, (), ()])
    if query is None or not region_atoms(call, query.dims[-2:-1]):
        return None
    return False, query


def of_rows(call: Call, query: fx.Node) -> Layout | None:
    """The layout of attention that runs whole: row l of the result belongs to the token of query l, whatever it attends to."""
    layout = call.layout(query)
    if layout is None or region_atoms(call, layout.dims[-1:]) or counts_samples(call, layout.dims[-1:]):
        return None
    out = Layout((*layout.dims[:-1], opaque(call.shape[-1])))
    return out if out.shape == call.shape else None


def paired_batch(call: Call, nodes: Sequence[fx.Node]) -> list[Dim] | None:
    """The batch dimensions of the result, as queries, keys and values are paired in them; None where they differ.

    Where heads are grouped, each head of the keys meets so many heads of the queries, one after another: `h` is `(h g)`.
    """
    dims = [opaque(size) for size in call.shape[:-2]]
    for node in nodes:
        layout = call.layout(node)
        if layout is None:
            continue
        lead = list(layout.dims[:-2])
        if lead and grouped(call, node) > 1:
            lead[-1] = normal((*lead[-1], Axis(grouped(call, node))))
        for index, dim in enumerate(lead, start=len(dims) - len(lead)):
            both = paired(dims[index], dim)
            if both is None:
                return None
            dims[index] = both
    return None if call.frame.twice(dims) else dims


def grouped(call: Call, node: fx.Node) -> int:
    """How many heads of the queries share one head of an operand (`enable_gqa`)."""
    shape = call.shape_of(node)
    return call.shape[-3] // shape[-3] if call.args.get("enable_gqa") and len(shape) > 2 else 1


def ungrouped(dim: Dim, count: int) -> Dim | None:
    """`(h g) -> h`, or None where the last ``count`` entries are no factor of their own."""
    if count == 1:
        return dim
    last = dim[-1] if dim else None
    if not isinstance(last, Axis) or last.atom is not None or last.size % count:
        return None
    return normal([*dim[:-1], Axis(last.size // count)])
