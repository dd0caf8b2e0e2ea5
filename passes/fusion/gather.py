"""Linears behind a gather: one whose operand is only gathered reads the active rows itself.

    t = index(permute(latent), indices(rows))           # the pixels of the active patches
    y = linear(reshape(t), w, b)                        # [B, A, N]; or a convolution whose kernel is its stride
    z = y + index(table, indices(rows))                 # optional: position embeddings

becomes

    z = ras_compile::gather_linear(view(latent), w, b, rows, .., view(table))

because a GEMM may load its rows from anywhere. As for splices (`sites.py`), no way of writing is matched: the ops that move
entries are composed into one map from the linear's operand to memory (`walks.py`), and the index tensors are *run*, for
active rows that together name every token. What is no sum of one stride per digit is no site. Neither looks at the entries
themselves, so that a batch of a thousand costs what one picture does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ras_compile.notices import fell_back
from ras_compile.passes.analysis.emit import Emitter, sweep
from ras_compile.passes.analysis.roles import rows_of
from ras_compile.passes.fusion.addresses import Target, draws_of, target_of
from ras_compile.passes.fusion.choices import Asked
from ras_compile.passes.fusion.gathered import Gathered
from ras_compile.passes.fusion.scatter import Fusion, addressed, writable
from ras_compile.passes.fusion.walks import Walk, chained, contiguous, moves_entries
from ras_compile.passes.rules.convolution import per_dim
from ras_compile.passes.rules.registry import named_arguments

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class Source:
    """An input of the graph or a view of one, and the addresses at which its entries are taken."""

    base: fx.Node
    target: Target
    samples: int

    def view(self, emit: Emitter, channels: int) -> tuple[fx.Node, int] | None:
        """``base`` as [B or 1, *grid, *channels], and how many dims its grid has; None where no view is it."""
        return addressed(emit, self.base, self.target, self.samples if self.target.sample else 1, channels)


@dataclass(frozen=True)
class Site:
    """`gather -> linear (-> add)`."""

    product: fx.Node  # the linear, or the convolution
    last: fx.Node  # the node whose value the fused op gives: the product, or the sum with a table
    x: Source  # where the product's operand comes from
    table: Source | None  # where the table's rows come from
    # ``last`` counts [samples, N, places] for these (samples, places), as a convolution does; else [B, A, N]
    turned: tuple[int, int] | None


def fuse_gather_linear(graph: fx.Graph, fusion: Fusion) -> int:
    """Replaces every `gather -> linear` of a sparse program; returns how many there were.

    It does not fire where what is gathered is computed in the program (the kernel needs it in memory), where a value in
    between has another use, or where dtypes differ (a custom op is not under autocast).
    """
    finder, emit, count = Finder(graph, fusion.tokens), Emitter.of(graph), 0
    pays = Asked(fusion.gather_pays)
    for product in list(graph.nodes):
        site = finder.site(product, fusion.dtypes)
        if site is not None:
            with graph.inserting_before(site.last):
                args = arguments(site, finder.rows, emit)
                if args is None or not pays(args):
                    continue  # what was emitted has no user, and goes with the dead code
                y = emit.like(site.last, torch.ops.ras_compile.gather_linear.default, *args)
                if site.turned:
                    y = emit(aten.transpose.int, emit(aten.reshape.default, y, [*site.turned, -1]), 1, 2)
                y = emit(aten.reshape.default, y, list(site.last.meta["val"].shape))
            emit.replace(site.last, y)
            count += 1
    sweep(graph)
    return count


def arguments(site: Site, rows: fx.Node, emit: Emitter) -> tuple | None:
    """The fused op's arguments, in the order of its schema; None where an input has no such view."""
    _, weight, bias = (*site.product.args, None)[:3]
    outputs, *inner = weight.meta["val"].shape
    channels = weight.meta["val"][0].numel()
    x = site.x.view(emit, channels)
    table = None if site.table is None else site.table.view(emit, outputs)
    if x is None or (table is None) != (site.table is None):
        return None
    if len(inner) > 1:
        weight = emit(aten.reshape.default, weight, [outputs, channels])
    return (x[0], weight, bias, rows, x[1], *(table or ()))


class Finder:
    """Finds sites of one sparse program."""

    def __init__(self, graph: fx.Graph, tokens: int) -> None:
        self.rows = rows_of(graph)
        self.samples, self.active = self.rows.meta["val"].shape
        self.tokens = tokens
        self.draws = draws_of(self.samples, self.active, tokens, torch.Generator().manual_seed(0))

    def site(self, product: fx.Node, dtypes: Sequence[torch.dtype]) -> Site | None:
        """The site that this node is the product of, if it is one."""
        kernel = kernel_of(product)
        if kernel is None or product.meta["val"].dtype not in dtypes:
            return None
        try:
            return self.experiment(product, kernel)
        except Exception as error:  # an op that does not run on integers, or on a CPU: the site stays as it is
            fell_back("a gather not fused", error)
            return None

    def experiment(self, product: fx.Node, kernel: list[int]) -> Site | None:
        """Runs what stands around a product on addresses."""
        x, weight, bias = (*product.args, None)[:3]
        given, result = [node.meta["val"] for node in (x, weight, bias) if node is not None], product.meta["val"]
        outputs, channels = len(given[1]), given[1][0].numel()
        samples, rest = divmod(result.numel(), self.active * outputs)
        if rest or self.samples not in (1, samples) or any(value.dtype != result.dtype for value in given):
            return None
        lead = (samples, self.active)
        source = self.source(x, lead, channels, Walk.of(patches(contiguous(x), kernel)))
        if source is None or (source.target.sample == 0 and samples > self.samples):
            return None
        # How the product counts: [samples, N, places], as a convolution does, or [B, A, N].
        turned = (result.shape[0], result[0, 0].numel()) if kernel else None
        return self.sum(product, source, turned, (*lead, outputs)) or Site(product, product, source, None, turned)

    def sum(
        self, product: fx.Node, x: Source, turned: tuple[int, int] | None, shape: tuple[int, int, int]
    ) -> Site | None:
        """The site that ends in the sum of a product and a gathered table; None where there is no such sum."""
        node, moves = product, []
        while len(uses(node)) == 1:
            (user,) = uses(node)
            if user.target is aten.add.Tensor and not user.kwargs:
                break
            if not moves_entries(user):
                return None
            moves.append(node := user)
        else:
            return None
        other, value = next((operand for operand in user.args if operand is not node), None), user.meta["val"]
        if not isinstance(other, fx.Node) or value.numel() != math.prod(shape):
            return None
        if {value.dtype, other.meta["val"].dtype} != {product.meta["val"].dtype}:  # the kernel's table has that of x
            return None
        # In which order the sum, and the product, visit the entries of [B, A, N]; and [B, A, N] those of the product.
        plain = places = back = Walk(((math.prod(shape), 1),))
        if turned:
            images, count, outputs = *turned, shape[2]
            places = Walk(((images, count * outputs), (outputs, 1), (count, outputs)))
            back = Walk(((images, count * outputs), (count, 1), (outputs, count)))
        moved = chained([*reversed(moves)], Walk.of(contiguous(node)))
        moved = None if moved is None else moved.over(places)
        if moved is None or moved.joined() not in (plain.joined(), places.joined()):
            return None
        if moved.joined() == plain.joined():
            turned, back = None, plain
        order = back.over(Walk.of(contiguous(other).expand(value.shape)))
        table = None if order is None else self.source(other, shape[:2], shape[2], order)
        return None if table is None else Site(product, user, x, table, turned)

    def source(self, value: fx.Node, lead: tuple[int, int], channels: int, order: Walk) -> Source | None:
        """Where the entries of a gathered value come from.

        Args:
            lead: (B, A) of the fused op.
            channels: of the fused op.
            order: how [B, A, channels] visits the entries of ``value``.
        """
        moves: list[fx.Node] = []  # behind the index
        base = value
        while base.op == "call_function" and base.target is not aten.index.Tensor:
            if len(uses(base)) != 1 or not moves_entries(base):
                return None
            moves.append(base)
            base = base.all_input_nodes[0]
        if base.op != "call_function" or len(uses(base)) != 1:
            return None
        gathered, taken = Gathered.of(base, self.rows), chained(moves, order)
        if gathered is None or taken is None:
            return None
        found = gathered.addresses(taken, lead, channels, self.draws)
        if found is None:
            return None
        target = target_of(torch.stack(found[0]), found[1], self.draws, self.tokens)
        return None if target is None or not writable(target) else Source(gathered.base, target, lead[0])


def uses(node: fx.Node) -> list[fx.Node]:
    """The users of a node that look at more than its dtype."""
    return [user for user in node.users if user.target is not aten.type_as.default or user.args[0] is node]


def kernel_of(node: fx.Node) -> list[int] | None:
    """The sides of the patches that a convolution projects, [] for a linear, and None for all else."""
    if node.target is aten.linear.default:
        return []
    if node.target not in CONVOLUTIONS:
        return None
    args = named_arguments(node)
    given, kernel = args["input"].meta["val"].shape, list(args["weight"].meta["val"].shape[2:])
    rank = len(kernel)
    plain = per_dim(args["padding"], rank) == [0] * rank and per_dim(args["dilation"], rank) == [1] * rank
    fits = len(given) == rank + 2 and not any(size % side for size, side in zip(given[2:], kernel, strict=True))
    return kernel if plain and fits and args["groups"] == 1 and per_dim(args["stride"], rank) == kernel else None


def patches(value: Tensor, kernel: list[int]) -> Tensor:
    """`b c (h p) (w q) -> b h w c p q` for a kernel of p x q; the value itself for a linear."""
    rank = len(kernel)
    for index in reversed(range(rank)):
        value = value.unflatten(2 + index, (-1, kernel[index]))
    outer, inner = [2 + 2 * index for index in range(rank)], [3 + 2 * index for index in range(rank)]
    return value.permute(0, *outer, 1, *inner) if rank else value
