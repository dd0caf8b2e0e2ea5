"""Contractions: linear, matmul and einsum are one rule over labelled dimensions, `... k, n k -> ... n`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ras_compile.passes.algebra.layout import Axis, Dim, Exclude, Layout, Unbatch, atoms_of, opaque, paired
from ras_compile.passes.algebra.order import Atom
from ras_compile.passes.rules.pointwise import broadcast, dense_use, rows_or_gather
from ras_compile.passes.rules.registry import Call, Gather, Step, Use, rule_for

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """One operand of a contraction: its node and a label for each of its dimensions."""

    node: fx.Node
    labels: tuple[str, ...]


def contract(call: Call, given: Sequence[Term | fx.Node], out: tuple[str, ...]) -> Step:
    """Contracts labelled operands.

    Tokens that are contracted with channels by the first contraction, or together with channels in one dimension, are no
    tokens but channels or pixels of a patch. Tokens that are contracted otherwise are mixed: their operand is spliced, and
    so is the latent itself where all of its tokens are, beside an operand that has them, too (it is a value of attention).
    Where two operands carry the tokens in different places (queries and keys), those of the result stay, the others are
    spliced.

    Args:
        given: the operands in order; one that is no term broadcasts against the result (a bias).
    """
    terms = [operand for operand in given if isinstance(operand, Term)]
    carriers = [term for term in terms if call.layout(term.node) is not None]
    whole: list[Term] = []
    for term in carriers:
        layout = call.layout(term.node)
        assert layout is not None
        gone = [dim for dim, label in zip(layout.dims, term.labels, strict=True) if label not in out]
        if counts_samples(call, gone):
            raise Unbatch
        lost, kept = region_atoms(call, gone), region_atoms(call, [d for d in layout.dims if d not in gone])
        if not lost:
            continue
        channels = any(isinstance(f, Axis) and f.atom is None for dim in gone if region_atoms(call, [dim]) for f in dim)
        if (layout.raw and (kept or len(carriers) == 1)) or (len(carriers) == 1 and channels):
            raise Exclude(lost)
        if kept and apart(call, lost | kept):
            return call.whole(of_terms(call, carriers, out))
        if kept:
            raise Exclude(smaller(call, lost, kept))
        whole.append(term)
    carriers = [term for term in carriers if term not in whole]
    if len(carriers) > 1:
        keep = keeper(call, carriers, out)
        for term in carriers:
            if place(call, term) != place(call, keep):
                shared = set(place(call, term)) & set(place(call, keep))
                if shared:
                    alone = {
                        a for label in place(call, keep) if label not in shared for a in atoms_at(call, keep, label)
                    }
                    together = {a for label in shared for a in atoms_at(call, keep, label)}
                    if apart(call, together | alone):
                        return call.whole(of_terms(call, [keep], out))
                    raise Exclude(smaller(call, together, alone))
                whole.append(term)
    uses: dict[int, Use | Gather] = {}
    dims: dict[str, Dim] = {}
    for term in terms:
        shape = call.shape_of(term.node)
        layout = call.layout(term.node) if term not in whole else None
        for index, label in enumerate(term.labels):
            dim = layout.dims[index] if layout is not None else opaque(shape[index])
            both = paired(dims.get(label, ()), dim)
            if both is None:
                return call.whole()
            dims[label] = both
    carriers = [term for term in carriers if term not in whole]
    # nothing is contracted: what is spelled as a contraction is a permutation, or a product entry by entry
    raw = all(call.layout(term.node).raw for term in carriers) and all({*term.labels} <= {*out} for term in terms)
    result = Layout.of([dims[label] for label in out], raw) if carriers else None
    if result is not None and not one_grid(call, result, [dims[label] for term in whole for label in term.labels]):
        return call.whole()
    for index, term in enumerate(terms):
        if term in whole:
            uses[index] = Use.WHOLE
        elif term in carriers:
            uses[index] = Use.ROWS
        else:
            use = dense_use(call, Layout(tuple(dims[label] for label in term.labels)), call.shape_of(term.node))
            if isinstance(use, Gather) and not complete(call, use.layout):
                return call.whole()  # its rows would need a dimension of samples that it does not have
            uses[index] = use
    if result is None:
        return call.whole()
    pending = iter(uses.values())
    listed = [next(pending) if isinstance(operand, Term) else bias_use(call, result, operand) for operand in given]
    return Step(result, tuple(listed))


def apart(call: Call, atoms: set[Atom]) -> bool:
    """Whether windows of tokens are not to become tokens: others are cut of them, in another order."""
    return call.frame.shifted or any(atom.order is not None for atom in atoms)


def of_terms(call: Call, terms: Sequence[Term], out: tuple[str, ...]) -> Layout | None:
    """The layout of a contraction that runs whole: that of an operand all of whose tokens stand in the result."""
    for term in terms:
        layout = call.layout(term.node)
        assert layout is not None
        dims = dict(zip(term.labels, layout.dims, strict=True))
        gone = [dim for label, dim in dims.items() if label not in out]
        if grid_atoms(call, gone):
            continue
        held = [dims.get(label, ()) for label in out]
        whole = [dim if grid_atoms(call, [dim]) else opaque(size) for dim, size in zip(held, call.shape, strict=True)]
        result = Layout.of(whole)
        if result.shape == call.shape:
            return result
    return None


def one_grid(call: Call, result: Layout, spliced: Sequence[Dim]) -> bool:
    """Whether a result has each atom once (it is not between all pairs), and no whole operand meets its rows."""
    return not call.frame.twice(result.dims) and not region_atoms(call, spliced)


def complete(call: Call, layout: Layout) -> bool:
    """Whether a layout has every atom of the grid, the one that counts the samples included."""
    held = {*call.frame.tokens_in(layout.dims), *(atom for dim in layout.dims for atom in atoms_of(dim))}
    return {atom for atom, _ in call.frame.region} | ({call.frame.batch} - {None}) <= held


def bias_use(call: Call, result: Layout, node: fx.Node) -> Use | Gather:
    """A bias broadcasts against the result; one with the region must have it where the result has it."""
    layout = call.layout(node)
    if layout is None:
        return dense_use(call, result, call.shape_of(node))
    pairs = zip(layout.dims, result.dims[len(result.dims) - len(layout.dims) :], strict=True)
    if any(dim and dim != other for dim, other in pairs):
        raise call.unsupported(f"a bias that arranges the tokens differently: {layout} beside {result}")
    return Use.ROWS


def region_atoms(call: Call, dims: Sequence[Dim]) -> set[Atom]:
    """Atoms of the region that stand in these dimensions: where there are none, there are no tokens."""
    return {atom for dim in dims for atom in atoms_of(dim) if call.frame.counts_tokens(atom)}


def counts_samples(call: Call, dims: Sequence[Dim]) -> bool:
    """Whether one of these dimensions counts the samples."""
    return any(atom == call.frame.batch for dim in dims for atom in atoms_of(dim))


def grid_atoms(call: Call, dims: Sequence[Dim]) -> set[Atom]:
    """Atoms that must not be taken apart: those of the region, and those that count samples or processes."""
    return {atom for dim in dims for atom in atoms_of(dim) if call.frame.counts_pictures(atom)} | region_atoms(
        call, dims
    )


def atoms_at(call: Call, term: Term, label: str) -> set[Atom]:
    layout = call.layout(term.node)
    assert layout is not None
    return region_atoms(call, [layout.dims[term.labels.index(label)]])


def place(call: Call, term: Term) -> tuple[str, ...]:
    """Labels of the dimensions in which an operand carries the region."""
    return tuple(label for label in term.labels if atoms_at(call, term, label))


def keeper(call: Call, carriers: Sequence[Term], out: tuple[str, ...]) -> Term:
    """The operand whose tokens stay: queries come before keys, so not the one that gives the result's last dimension."""
    return next((term for term in carriers if not out or out[-1] not in place(call, term)), carriers[0])


def smaller(call: Call, first: set[Atom], second: set[Atom]) -> set[Atom]:
    """Of two parts of the region that an op treats apart, the one with fewer entries leaves the region (ties: the first).

    What stands in an order cannot leave by itself; it is told, and the op then runs whole.
    """
    ordered = {atom for atom in first | second if atom.order is not None}
    if ordered:
        return ordered
    sizes = dict(call.frame.region)
    count = {id(part): math.prod(sizes[atom] for atom in part) for part in (first, second)}
    return first if count[id(first)] <= count[id(second)] else second


@rule_for(aten.linear.default)
def linear(call: Call) -> Step:
    """`... k, n k -> ... n`"""
    node, weight, bias = call.args["input"], call.args["weight"], call.args["bias"]
    lead = tuple(f"i{index}" for index in range(len(call.shape_of(node)) - 1))
    terms = [Term(node, (*lead, "k")), Term(weight, ("n", "k"))]
    return contract(call, [*terms, bias] if bias is not None else terms, (*lead, "n"))


def matmul_labels(first: int, second: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels of a matrix product of operands of these ranks (`torch.matmul`'s broadcasting)."""
    batch = [f"b{index}" for index in range(max(first, second) - 2)]
    left = (*batch[max(0, len(batch) - (first - 2)) :], "m", "k") if first > 1 else ("k",)
    right = (*batch[max(0, len(batch) - (second - 2)) :], "k", "n") if second > 1 else ("k",)
    return left, right, (*batch, *(["m"] if first > 1 else []), *(["n"] if second > 1 else []))


@rule_for(aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default)
@rule_for(aten._int_mm.default, aten._scaled_mm.default)
def matmul(call: Call) -> Step:
    """`... m k, ... k n -> ... m n`, and scales behind: one of all rows is of all of them, those that are cached included."""
    first, second, *scales = call.operands
    left, right, out = matmul_labels(len(call.shape_of(first)), len(call.shape_of(second)))
    return contract(call, [Term(first, left), Term(second, right), *scales], out)


@rule_for(aten.cdist.default)
def distances(call: Call) -> Step:
    """`... n k, ... m k -> ... n m`"""
    first, second = call.operands
    rank = len(call.shape)
    if not rank == len(call.shape_of(first)) == len(call.shape_of(second)):
        return call.whole()
    left, right, out = matmul_labels(rank, rank)
    return contract(call, [Term(first, left), Term(second, (*right[:-2], right[-1], right[-2]))], out)


@rule_for(aten.linalg_cross.default)
def cross(call: Call) -> Step:
    """`... 3, ... 3 -> ... 3`: what stands in one dimension is combined, in the latent itself as in any channels."""
    dim, out = call.args["dim"], broadcast(call, call.operands, call.shape)
    if out is None:
        return call.whole()
    if out.raw and region_atoms(call, [out.dims[dim]]):
        raise Exclude(region_atoms(call, [out.dims[dim]]))
    return call.whole() if grid_atoms(call, [out.dims[dim]]) else Step(out, rows_or_gather(call, out))


@rule_for(aten.addmm.default, aten.baddbmm.default)
def addmm(call: Call) -> Step:
    """`m n, m k, k n -> m n`"""
    bias, first, second = call.operands
    left, right, out = matmul_labels(len(call.shape_of(first)), len(call.shape_of(second)))
    return contract(call, [bias, Term(first, left), Term(second, right)], out)


@rule_for(aten.einsum.default)
def einsum(call: Call) -> Step:
    """`equation`, as it stands in the call."""
    equation, nodes = call.args["equation"].replace(" ", ""), call.args["tensors"]
    inputs, _, result = equation.partition("->")
    words = inputs.split(",")
    if "->" not in equation:
        letters = [c for word in words for c in word.replace("...", "")]
        result = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    ranks = [len(call.shape_of(node)) - len(word.replace("...", "")) for node, word in zip(nodes, words, strict=True)]
    batch = [
        f"b{index}"
        for index in range(max([rank for rank, w in zip(ranks, words, strict=True) if "..." in w], default=0))
    ]

    def labels(word: str, rank: int) -> tuple[str, ...]:
        head, dots, tail = word.partition("...")
        return (*head, *(batch[len(batch) - rank :] if dots else []), *tail)

    terms = [Term(node, labels(word, rank)) for node, word, rank in zip(nodes, words, ranks, strict=True)]
    if any(len(set(term.labels)) != len(term.labels) for term in terms):
        return call.whole()
    return contract(call, terms, labels(result, len(batch)))
