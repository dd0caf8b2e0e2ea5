"""One rule, one oracle, for every rule: the rewritten op on the active rows gives the active rows of the op.

A row of the table is one call of one op on a stage: a latent `b h w c` of random values, and views of it. The oracle is
told nothing else: it follows the step that the rule gives (uses, rewrite, whole) and picks rows by brute force. The rows
also say what a rule must answer: "rows" (it stays sparse), "apart" (the result has no tokens: a text segment),
"whole" (it runs on whole operands), or the reason for which it refuses.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from brute import random_rows, rows_of, spliced
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Frame, Sizes
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.analysis.propagate import Analysis, propagate
from ras_compile.passes.analysis.splices import plan
from ras_compile.passes.programs.program import dense_program, sparse_program
from ras_compile.passes.rules.attention import KERNELS
from ras_compile.passes.rules.collectives import COLLECTIVES, WAIT
from ras_compile.passes.rules.pointwise import is_pointwise
from ras_compile.passes.rules.registry import RULES, Gather, Use, rule_of
from ras_compile.passes.rules.token_wise import number_of

aten = torch.ops.aten
HEIGHT, WIDTH, CHANNELS, TEXT = 3, 4, 6, 3


def qbytes_mm(A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    """What stands in for quanto's product with a weight of 8 bits."""
    return A @ (B.to(A.dtype) * scales).t()


with contextlib.suppress(ImportError):
    importlib.import_module("optimum.quanto")
if not hasattr(torch.ops.quanto, "qbytes_mm"):  # the library is not installed
    torch.library.define("quanto::qbytes_mm", "(Tensor A, Tensor B, Tensor scales) -> Tensor")
    torch.library.impl("quanto::qbytes_mm", "CompositeExplicitAutograd")(qbytes_mm)
    torch.library.register_fake("quanto::qbytes_mm")(qbytes_mm)
EIGHT_BITS = torch.ops.quanto.qbytes_mm.default
TOKENS = HEIGHT * WIDTH


class Stage:
    """A latent `b h w c` behind one linear, its usual views, and dense tensors beside it. Calling it emits the op on trial."""

    def __init__(self, target: Callable, batch: int) -> None:
        self.target, self.batch = target, batch
        self.emit = Emitter(FakeTensorMode())
        self.values: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)
        self.tried: fx.Node | None = None
        self.latent = self.given(batch, HEIGHT, WIDTH, 5)
        self.x = self.also(aten.linear.default, self.latent, self.given(CHANNELS, 5))

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.tried = self.emit(self.target, *args, **kwargs)
        return self.tried

    def also(self, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        return self.emit(target, *args, **kwargs)

    def given(self, *shape: int) -> fx.Node:
        """A dense input of standard normal values."""
        return self.constant(torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def below(self, limit: int, *shape: int) -> fx.Node:
        """A dense input of indices."""
        return self.constant(torch.randint(0, limit, shape, generator=self.generator))

    def constant(self, value: Tensor) -> fx.Node:
        first = next(iter(self.emit.graph.nodes), None)
        with self.emit.graph.inserting_before(first):
            node = self.emit.placeholder(f"input_{len(self.values)}", self.emit.mode.from_tensor(value))
        self.values.insert(0, value)
        return node

    def mask(self, *shape: int) -> fx.Node:
        return self.constant(torch.rand(shape, generator=self.generator) > 0.5)

    def pieces(self, *args: Any, **kwargs: Any) -> list[fx.Node]:
        """The results of an op with several."""
        node = self(*args, **kwargs)
        return [self.also(operator.getitem, node, index) for index in range(len(node.meta["val"]))]

    @cached_property
    def tokens(self) -> fx.Node:
        """`b (h w) c`"""
        return self.also(aten.reshape.default, self.x, [self.batch, TOKENS, CHANNELS])

    @cached_property
    def turned(self) -> fx.Node:
        """`b (w h) c`: the same shape as tokens, in another order."""
        other = self.also(aten.transpose.int, self.x, 1, 2)
        return self.also(aten.reshape.default, other, [self.batch, TOKENS, CHANNELS])

    @cached_property
    def flat(self) -> fx.Node:
        """`(b h w) c`"""
        return self.also(aten.reshape.default, self.x, [self.batch * TOKENS, CHANNELS])

    @cached_property
    def image(self) -> fx.Node:
        """`b c h w`"""
        return self.also(aten.permute.default, self.x, [0, 3, 1, 2])

    @cached_property
    def columns(self) -> fx.Node:
        """`b c (h w)`"""
        return self.also(aten.transpose.int, self.tokens, 1, 2)

    @cached_property
    def heads(self) -> fx.Node:
        """`b heads (h w) d`"""
        split = self.also(aten.reshape.default, self.tokens, [self.batch, TOKENS, 2, 3])
        return self.also(aten.permute.default, split, [0, 2, 1, 3])

    @cached_property
    def pairs(self) -> fx.Node:
        """`b (h w) 3 2`"""
        return self.also(aten.reshape.default, self.tokens, [self.batch, TOKENS, 3, 2])

    @cached_property
    def text(self) -> fx.Node:
        return self.given(self.batch, TEXT, CHANNELS)

    @cached_property
    def joint(self) -> fx.Node:
        """`b (text | h w) c`"""
        return self.also(aten.cat.default, [self.text, self.tokens], 1)

    @cached_property
    def scores(self) -> fx.Node:
        """`b (h w) m`: what each token thinks of every token."""
        return self.also(aten.matmul.default, self.tokens, self.columns)

    @cached_property
    def marks(self) -> fx.Node:
        """`(b h w)`"""
        return self.also(aten.sum.dim_IntList, self.flat, [-1])

    @cached_property
    def classes(self) -> fx.Node:
        """`b (h w)`, indices below 6."""
        return self.also(aten.argmax.default, self.tokens, -1)


@dataclass(frozen=True)
class Row:
    """One call of one op.

    Attributes:
        target: the op.
        build: makes the call on a stage and returns what becomes an output of the graph.
        says: "rows", "apart", "whole", or a part of the reason for which the graph is refused.
        single: the same where the batch has one sample, if the answer differs.
        grid: the region's extent, where the op leaves only a part of it.
        defined: False where the values of the result are undefined.
        pooled: the samples of a batch are mixed: they become a part of the region.
        batches: sizes of the batch with which the row is tried.
    """

    target: Callable
    build: Callable[[Stage], Any]
    says: str = "rows"
    single: str | None = None
    grid: tuple[int, ...] | None = None
    defined: bool = True
    pooled: bool = False
    batches: tuple[int, ...] = (1, 2)

    def answer(self, batch: int) -> str:
        return self.single if batch == 1 and self.single is not None else self.says


def shifted(stage: Stage) -> fx.Node:
    """`b (h w) c`, but its tokens stand one place further."""
    return stage.also(aten.roll.default, stage.tokens, [CHANNELS])  # over the samples' borders, too


def ordered(stage: Stage, *steps: int) -> fx.Node:
    """Places of the tokens in an order that is known: each one is so many steps behind the last."""
    places = stage.also(aten.arange.default, TOKENS)
    for step in steps:
        places = stage.also(aten.remainder.Scalar, stage.also(aten.mul.Tensor, places, step), TOKENS)
    return places


def twice(stage: Stage) -> fx.Node:
    """`b (n 2) c`"""
    return stage.also(aten.repeat_interleave.self_int, stage.tokens, 2, 1)


def whole_numbers(stage: Stage) -> fx.Node:
    """`(b n) c` as dynamic quantisation of the rows gives it."""
    return stage.also(aten._to_copy.default, stage.also(aten.mul.Tensor, stage.flat, 9), dtype=torch.int8)


def eighths(stage: Stage, node: fx.Node, columns: int) -> fx.Node:
    """A matrix in float8, of so many columns."""
    wide = stage.also(aten.linear.default, node, stage.given(columns, node.meta["val"].shape[-1]))
    return stage.also(aten._to_copy.default, wide, dtype=torch.float8_e4m3fn)


def scaled(stage: Stage, rows: bool) -> fx.Node:
    """A product of matrices in float8, whose activations have a scale for each row, or one for all."""
    first = eighths(stage, stage.flat, 16)
    weight = stage.constant(torch.ones(16, 16).to(torch.float8_e4m3fn).t())
    size = stage.also(aten.abs.default, stage.flat)
    over = stage.also(aten.amax.default, size, [1] if rows else [0, 1], True)
    scale = stage.also(aten._to_copy.default, over, dtype=torch.float32)
    ones = stage.constant(torch.ones(1, 16 if rows else 1))
    return stage(first, weight, scale, ones, None, None, torch.float32)


def alike(stage: Stage) -> fx.Node:
    """An order as `gather` wants it: the same for all samples and channels."""
    places = stage.also(aten.reshape.default, ordered(stage, 5), [1, TOKENS, 1])
    return stage.also(aten.expand.default, places, [stage.batch, TOKENS, CHANNELS])


def views() -> list[Row]:
    n, c = TOKENS, CHANNELS
    cut_last = lambda s: s.also(aten.reshape.default, s.columns, [s.batch, c, n // 2, 2])  # noqa: E731
    return [
        *[
            row
            for target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
            for row in (
                Row(target, lambda s: s(s.tokens, [s.batch, HEIGHT, WIDTH, c])),
                Row(target, lambda s: s(s.tokens, [s.batch, n, 2, -1])),
                Row(target, lambda s: s(s.tokens, [s.batch, n * c])),
                Row(target, lambda s: s(s.tokens, [s.batch * n, 1, c])),
                Row(target, lambda s: s(s.joint, [s.batch, n + TEXT, 2, 3])),
                Row(target, lambda s: s(s.tokens, [s.batch, c, n])),  # cuts the width into 2 x 2
                Row(target, lambda s: s(s.tokens, [s.batch, 8, 9]), "whole"),
                Row(target, lambda s: s(s.joint, [s.batch, 5, 3, c]), "whole"),
                Row(target, lambda s: s(s.joint, [s.batch, (n + TEXT) * c])),
            )
        ],
        Row(aten.view.default, lambda s: s(s.tokens, [2, s.batch * c, c]), single="whole"),
        Row(aten.flatten.using_ints, lambda s: s(s.x, 1, -2)),
        Row(aten.flatten.using_ints, lambda s: s(s.x, 0, 2)),
        Row(aten.flatten.using_ints, lambda s: s(s.image, -2)),
        Row(aten.unflatten.int, lambda s: s(s.tokens, 1, [HEIGHT, -1])),
        Row(aten.unflatten.int, lambda s: s(s.tokens, -1, [2, 3])),
        Row(aten.unflatten.int, lambda s: s(s.joint, 1, [5, 3]), "whole"),
        Row(aten.view_as.default, lambda s: s(s.tokens, s.given(s.batch, HEIGHT, WIDTH, c))),
        Row(aten.view_as.default, lambda s: s(s.tokens, s.x)),
        Row(aten.view_as.default, lambda s: s(s.given(s.batch, HEIGHT, WIDTH, c), s.tokens), "apart"),
        Row(aten.reshape_as.default, lambda s: s(s.x, s.tokens)),
        Row(aten.reshape_as.default, lambda s: s(s.given(s.batch, HEIGHT, WIDTH, c), s.tokens), "apart"),
        Row(aten.unsqueeze.default, lambda s: s(s.tokens, 1)),
        Row(aten.unsqueeze.default, lambda s: s(s.tokens, -1)),
        Row(aten.unsqueeze.default, lambda s: s(s.tokens, -4)),
        Row(aten.squeeze.default, lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 1))),
        Row(aten.squeeze.default, lambda s: s(s.x)),
        Row(aten.squeeze.dim, lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 1), -3)),
        Row(aten.squeeze.dim, lambda s: s(s.tokens, 1)),
        Row(aten.squeeze.dim, lambda s: s(s.x, 2)),  # one entry in the sparse world only
        Row(aten.squeeze.dims, lambda s: s(s.also(aten.unsqueeze.default, s.x, -1), [-1, 2, 0])),
        Row(aten.permute.default, lambda s: s(s.x, [0, -1, 2, 1])),
        Row(aten.transpose.int, lambda s: s(s.tokens, 1, -1)),
        Row(aten.t.default, lambda s: s(s.flat)),
        Row(aten.t.default, lambda s: s(s.marks)),
        *[
            row
            for target in (aten.expand.default, aten.broadcast_to.default)
            for row in (
                Row(target, lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 1), [s.batch, 5, n, c])),
                Row(target, lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 2), [-1, -1, 5, -1])),
                Row(target, lambda s: s(s.tokens, [5, -1, n, -1])),
                Row(target, lambda s: s(s.joint, [2, s.batch, n + TEXT, c])),
            )
        ],
        Row(
            aten.expand_as.default, lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 1), s.given(s.batch, 5, n, c))
        ),
        Row(aten.expand_as.default, lambda s: s(s.tokens, s.tokens)),
        Row(aten.expand_as.default, lambda s: s(s.given(1, n, 1), s.tokens), "apart"),
        Row(aten.repeat.default, lambda s: s(s.tokens, [1, 2, 1])),
        Row(aten.repeat.default, lambda s: s(s.tokens, [2, 1, 3])),
        Row(aten.repeat.default, lambda s: s(s.tokens, [4, 1, 2, 1])),
        Row(aten.repeat.default, lambda s: s(s.joint, [1, 2, 1])),
        Row(aten.tile.default, lambda s: s(s.tokens, [2])),
        Row(aten.tile.default, lambda s: s(s.tokens, [2, 1, 2, 1])),
        Row(aten.repeat_interleave.self_int, lambda s: s(s.tokens, 2, 1)),
        Row(aten.repeat_interleave.self_int, lambda s: s(s.tokens, 3, -1)),
        Row(aten.repeat_interleave.self_int, lambda s: s(s.tokens, 2, 0)),
        Row(aten.repeat_interleave.self_int, lambda s: s(s.joint, 2, 1)),
        Row(aten.repeat_interleave.self_int, lambda s: s(s.tokens, 2, 1, output_size=2 * n)),
        Row(aten.repeat_interleave.self_int, lambda s: s(s.tokens, 2), "whole"),
        Row(aten.view_as_complex.default, lambda s: s(s.pairs)),
        Row(aten.view_as_complex.default, lambda s: s(s.also(aten.contiguous.default, cut_last(s))), "whole"),
        Row(aten.view_as_real.default, lambda s: s(s.also(aten.view_as_complex.default, s.pairs))),
        Row(aten.pixel_shuffle.default, lambda s: s(s.also(aten.repeat.default, s.image, [1, 2, 1, 1]), 2)),
        Row(aten.pixel_shuffle.default, lambda s: s(s.also(aten.permute.default, s.x, [0, 2, 1, 3]), 2), "whole"),
    ]


def pointwise() -> list[Row]:
    n, c = TOKENS, CHANNELS
    dense = [
        (c,),
        (),
        (1,),
        (n, c),
        (n, 1),
        (1, n, c),
        (1, 1, c),
        (1, n, 1),
        (0, n, c),
        (0, 1, c),
        (0, n, 1),
        (0, 1, 1),
    ]

    def sized(s: Stage, shape: tuple[int, ...]) -> fx.Node:
        return s.given(*(size or s.batch for size in shape))

    return [
        *[Row(aten.mul.Tensor, lambda s, shape=shape: s(s.tokens, sized(s, shape))) for shape in dense],
        *[Row(aten.mul.Tensor, lambda s, shape=shape: s(sized(s, shape), s.tokens)) for shape in dense],
        Row(aten.add.Tensor, lambda s: s(s.x, s.given(WIDTH, c))),  # one side of the grid alone
        Row(aten.add.Tensor, lambda s: s(s.x, s.given(HEIGHT, 1, 1))),
        Row(aten.add.Tensor, lambda s: s(s.x, s.given(s.batch, 1, WIDTH, 1))),
        Row(aten.add.Tensor, lambda s: s(s.image, s.given(1, c, HEIGHT, 1))),
        Row(aten.add.Tensor, lambda s: s(s.flat, s.given(s.batch * n, c))),
        Row(aten.add.Tensor, lambda s: s(s.joint, s.given(1, n + TEXT, c))),
        Row(aten.add.Tensor, lambda s: s(s.joint, s.given(n + TEXT, 1))),
        Row(aten.add.Tensor, lambda s: s(s.tokens, s.given(5, 1, n, c))),
        Row(aten.add.Tensor, lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 2), s.given(7, c))),
        Row(aten.add.Tensor, lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 1), s.given(s.batch, 5, 1, c))),
        Row(aten.add.Tensor, lambda s: s(s.tokens, s.tokens)),
        Row(aten.add.Tensor, lambda s: s(s.tokens, s.turned), "whole"),
        Row(aten.add.Tensor, lambda s: s(s.x, s.also(aten.transpose.int, s.given(s.batch, 4, 3, c), 1, 2))),
        Row(
            aten.sub.Tensor,
            lambda s: s(s.also(aten.unsqueeze.default, s.tokens, 2), s.also(aten.unsqueeze.default, s.tokens, 1)),
            "whole",
        ),
        Row(aten.add.Scalar, lambda s: s(s.tokens, 1)),
        Row(aten.pow.Scalar, lambda s: s(2.0, s.tokens)),
        Row(aten.where.self, lambda s: s(s.mask(n, 1), s.tokens, s.given(c))),
        Row(aten.where.self, lambda s: s(s.also(aten.gt.Scalar, s.tokens, 0), s.given(n, c), s.given(s.batch, n, 1))),
        Row(aten.masked_fill.Scalar, lambda s: s(s.tokens, s.mask(s.batch, n, 1), 0.5)),
        Row(aten.masked_fill.Tensor, lambda s: s(s.tokens, s.mask(s.batch, n, 1), s.given())),
        Row(aten.floor_divide.Scalar, lambda s: s(s.classes, 2)),
        Row(aten.rsub.Tensor, lambda s: s(s.tokens, s.given(n, 1))),
        Row(aten.masked_fill.Scalar, lambda s: s(s.given(s.batch, n, c), s.also(aten.gt.Scalar, s.tokens, 0), 0.5)),
        Row(aten.clamp.Tensor, lambda s: s(s.tokens, None, s.given(n, 1))),
        Row(aten.addcmul.default, lambda s: s(s.given(n, c), s.tokens, s.given(s.batch, 1, c))),
        Row(aten.lerp.Tensor, lambda s: s(s.tokens, s.given(c), s.given(s.batch, n, 1))),
        Row(aten.maximum.default, lambda s: s(s.x, s.given(HEIGHT, WIDTH, 1))),
        Row(aten.frexp.Tensor, lambda s: s.pieces(s.tokens)),
        Row(aten.gelu.default, lambda s: s(s.joint, approximate="tanh")),
        Row(aten._to_copy.default, lambda s: s(s.tokens, dtype=torch.float32)),
        Row(aten.copy.default, lambda s: s(s.given(s.batch, n, c), s.tokens)),
        Row(aten.copy.default, lambda s: s(s.tokens, s.given(n, c))),
        Row(aten.alias.default, lambda s: s(s.tokens)),
        Row(aten.detach.default, lambda s: s(s.tokens)),
        Row(aten.dropout.default, lambda s: s(s.tokens, 0.5, False)),
        Row(aten.dropout.default, lambda s: s(s.tokens, 0.5, True), "eval mode"),
        Row(aten.clone.default, lambda s: s(s.image, memory_format=torch.contiguous_format)),
        Row(aten.clone.default, lambda s: s(s.also(aten.clone.default, s.x), memory_format=torch.channels_last)),
        Row(aten.contiguous.default, lambda s: s(s.image)),
        Row(aten.lift_fresh.default, lambda s: s(s.tokens)),
        Row(aten._prelu_kernel.default, lambda s: s(s.tokens, s.given(1, 1, c))),
        Row(aten._prelu_kernel.default, lambda s: s(s.image, s.given(1, c, 1, 1))),
        Row(aten.type_as.default, lambda s: s(s.tokens, s.given(1))),
        Row(aten.type_as.default, lambda s: s(s.given(n, c), s.tokens), "apart"),
        Row(aten.type_as.default, lambda s: s(s.tokens, s.turned)),
        Row(aten.zeros_like.default, lambda s: s(s.tokens)),
        Row(aten.zero.default, lambda s: s(s.tokens)),
        Row(aten.fill.Scalar, lambda s: s(s.tokens, 2.0)),
        Row(aten.fill.Tensor, lambda s: s(s.tokens, s.given())),
        Row(aten.ones_like.default, lambda s: s(s.image, dtype=torch.int64)),
        Row(aten.full_like.default, lambda s: s(s.joint, 2.5)),
        Row(aten.empty_like.default, lambda s: s(s.tokens), defined=False),
    ]


def sides(stage: Stage) -> fx.Node:
    """The latent itself as `b c h w`, whose height of three no patch divides."""
    return stage.also(aten.permute.default, stage.latent, [0, 3, 1, 2])


def patched(stage: Stage, value: fx.Node) -> fx.Node:
    """Patches of 2 x 2."""
    return stage.also(aten.conv2d.default, value, stage.given(CHANNELS, 5, 2, 2), None, [2, 2])


def unpatched(stage: Stage) -> fx.Node:
    """`b c 4 w`, from patches of the latent with a row of zeros behind it."""
    tokens = patched(stage, stage.also(aten.constant_pad_nd.default, sides(stage), [0, 0, 0, 1]))
    return stage.also(aten.upsample_nearest2d.vec, tokens, None, [2.0, 2.0])


def concatenation() -> list[Row]:
    n, c, both = TOKENS, CHANNELS, TOKENS + TEXT
    return [
        *[
            row
            for target in (aten.cat.default, aten.concat.default, aten.concatenate.default)
            for row in (
                Row(target, lambda s: s([s.text, s.tokens], 1)),
                Row(target, lambda s: s([s.tokens, s.given(s.batch, 1, c)], -2)),
                Row(target, lambda s: s([s.given(s.batch, 1, c), s.joint, s.text], 1)),
                Row(target, lambda s: s([s.tokens, s.given(s.batch, n, 2), s.tokens], -1)),
                Row(target, lambda s: s([s.given(s.batch, n, 1), s.tokens], 2)),
                Row(target, lambda s: s([s.tokens, s.tokens], 1)),
                Row(target, lambda s: s([s.tokens, shifted(s)], 0), "whole", single="rows"),
                Row(
                    target, lambda s: s([s.tokens, s.also(aten.neg.default, s.tokens)], 0)
                ),  # both branches of guidance
                Row(target, lambda s: s([s.tokens, s.also(aten.repeat.default, s.tokens, [1, 2, 1])], 1)),
                Row(target, lambda s: s([s.tokens, s.turned], 1), "whole"),
                Row(target, lambda s: s([s.joint, s.tokens], 1), "whole"),
                Row(target, lambda s: s([s.tokens, s.text, s.tokens], 1), "whole"),
                Row(target, lambda s: s([s.tokens, s.given(2, n, c)], 0), "whole", single="rows"),
                Row(target, lambda s: s([s.tokens, s.turned], -1), "whole"),
                Row(target, lambda s: s([s.given(s.batch, 2, WIDTH, c), s.x], 1), grid=(WIDTH,)),
                Row(target, lambda s: s([s.also(aten.slice.Tensor, s.joint, 1, 0, TEXT), s.tokens], 1)),
            )
        ],
        Row(aten.pad_sequence.default, lambda s: s([s.also(aten.select.int, s.tokens, 0, 0)], True), batches=(1,)),
        Row(aten.pad_sequence.default, lambda s: s([s.also(aten.select.int, s.tokens, 0, 0)]), batches=(1,)),
        Row(aten.pad_sequence.default, lambda s: s([s.flat, s.flat], True), "whole"),
        Row(aten.stack.default, lambda s: s([s.tokens, s.tokens])),
        Row(aten.stack.default, lambda s: s([s.tokens, s.given(s.batch, n, c)], -1)),
        Row(aten.stack.default, lambda s: s([s.given(s.batch, n, c), s.tokens], -2)),
        Row(aten.stack.default, lambda s: s([s.tokens, s.turned], 1), "whole"),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, TEXT)),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, -n, None)),
        Row(aten.slice.Tensor, lambda s: s(s.joint, -2, TEXT, 2**63 - 1)),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, 2)),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, 0, TEXT), "apart"),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, None, -n - 1), "apart"),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, 1, 1), "apart"),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, 2, 1), "apart"),
        Row(aten.slice.Tensor, lambda s: s(s.tokens, 1, n), "apart"),
        Row(aten.slice.Tensor, lambda s: s(s.x, 1, HEIGHT), "whole"),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, 0, TEXT + 2), "whole"),
        Row(aten.slice.Tensor, lambda s: s(s.tokens, 1, 1), "whole"),
        Row(aten.slice.Tensor, lambda s: s(s.tokens, 1, 0, n, 2), "whole"),
        Row(aten.slice.Tensor, lambda s: s(s.joint, 1, 0, TEXT, 2), "whole"),
        Row(aten.slice.Tensor, lambda s: s(s.tokens, -1, 0, c, 2)),
        Row(aten.slice.Tensor, lambda s: s(s.tokens, 2, -2)),
        Row(aten.slice.Tensor, lambda s: s(s.tokens)),
        Row(aten.slice.Tensor, lambda s: s(s.tokens, 0, 0, 1)),
        Row(aten.slice.Tensor, lambda s: s(s.also(aten.repeat.default, s.joint, [1, 2, 1]), 1, 0, 3), "whole"),
        Row(aten.split.Tensor, lambda s: s.pieces(s.joint, 3, 1), "whole"),
        Row(aten.split.Tensor, lambda s: s.pieces(s.tokens, 4, -1)),
        Row(aten.split.Tensor, lambda s: s.pieces(s.tokens, 1)),
        Row(aten.split_with_sizes.default, lambda s: s.pieces(s.tokens, [n, 0], 1)),
        *[
            row
            for target in (aten.split_with_sizes.default, aten.split.sizes)
            for row in (
                Row(target, lambda s: s.pieces(s.joint, [TEXT, n], 1)),
                Row(target, lambda s: s.pieces(s.joint, [1, TEXT - 1, n], -2)),
                Row(target, lambda s: s.pieces(s.joint, [1, n + TEXT - 1], 1)),
                Row(target, lambda s: s.pieces(s.joint, [TEXT, 0, n], 1)),
                Row(target, lambda s: s.pieces(s.joint, [TEXT + 1, n - 1], 1), "whole"),
                Row(target, lambda s: s.pieces(s.tokens, [1, 2, 3], -1)),
            )
        ],
        Row(aten.chunk.default, lambda s: s.pieces(s.tokens, 3, -1)),
        Row(aten.chunk.default, lambda s: s.pieces(s.tokens, 4, -1)),
        Row(aten.chunk.default, lambda s: s.pieces(s.tokens, 2, 1), "whole"),
        Row(aten.chunk.default, lambda s: s.pieces(s.tokens, 2, 0)),
        Row(aten.tensor_split.sections, lambda s: s.pieces(s.tokens, 4, -1)),
        Row(aten.tensor_split.sections, lambda s: s.pieces(s.joint, 5, 1), "whole"),
        Row(aten.unbind.int, lambda s: s.pieces(s.pairs, -2)),
        Row(aten.unbind.int, lambda s: s.pieces(s.tokens, 1), "whole"),
        Row(aten.unbind.int, lambda s: s.pieces(s.tokens)),
        Row(aten.select.int, lambda s: s(s.joint, 1, TEXT - 1), "apart"),
        Row(aten.select.int, lambda s: s(s.also(aten.cat.default, [s.tokens, s.text], 1), 1, -2), "apart"),
        Row(aten.select.int, lambda s: s(s.joint, 1, TEXT), "whole"),
        Row(aten.select.int, lambda s: s(s.x, -1, -2)),
        Row(aten.select.int, lambda s: s(s.tokens, 0, -1)),
        Row(aten.select.int, lambda s: s(s.x, 2, 1), "whole"),
        Row(aten.slice_scatter.default, lambda s: s(s.tokens, s.given(s.batch, n, 2), -1, 1, 3)),
        Row(aten.slice_scatter.default, lambda s: s(s.given(s.batch, n, 8), s.tokens, 2, 2)),
        Row(aten.slice_scatter.default, lambda s: s(s.given(s.batch, 2 * n, c), s.tokens, 1, 1, None, 2)),
        Row(aten.slice_scatter.default, lambda s: s(twice(s), s.tokens, 1, 0, None, 2)),
        Row(aten.slice_scatter.default, lambda s: s(twice(s), s.given(s.batch, n, c), 1, 1, None, 2)),
        Row(aten.slice_scatter.default, lambda s: s(twice(s), s.turned, 1, 0, None, 2), "whole"),
        Row(aten.slice_scatter.default, lambda s: s(twice(s), shifted(s), 1, 0, None, 2), "whole"),
        Row(aten.slice_scatter.default, lambda s: s(s.tokens, s.given(s.batch, n // 2, c), 1, 0, None, 2), "whole"),
        Row(aten.slice.Tensor, lambda s: s(twice(s), 1, 1, None, 2)),
        Row(aten.slice.Tensor, lambda s: s(twice(s), 1, 0, None, 3), "whole"),
        Row(aten.slice.Tensor, lambda s: s(twice(s), 1, 2, None, 2), "whole"),
        Row(aten.slice_scatter.default, lambda s: s(s.tokens, s.also(aten.neg.default, s.tokens), 2)),
        Row(aten.slice_scatter.default, lambda s: s(s.tokens, s.turned, 2), "whole"),
        Row(aten.slice_scatter.default, lambda s: s(s.joint, s.text, 1, 0, TEXT)),
        Row(aten.slice_scatter.default, lambda s: s(s.given(s.batch, both, c), s.tokens, 1, TEXT)),
        # a value in which tokens stand elsewhere, written beside tokens that are known
        Row(aten.slice_scatter.default, lambda s: s(s.tokens, shifted(s), -1), "whole"),
        Row(
            aten.slice_scatter.default,
            lambda s: s(s.also(aten.cat.default, [shifted(s), shifted(s)], 2), s.tokens, 2, 2, 8),
            "whole",
        ),
        *[
            row
            for target in (aten.constant_pad_nd.default, aten.pad.default)
            for row in (
                Row(target, lambda s: s(s.tokens, [1, 2])),
                Row(target, lambda s: s(s.tokens, [-1, 2])),
                Row(target, lambda s: s(s.tokens, [0, 0, 1, 2])),
                Row(target, lambda s: s(s.tokens, [1, 1, 0, 3])),
                Row(target, lambda s: s(s.joint, [0, 0, 1, 0])),
                Row(target, lambda s: s(s.tokens, [0, 0, -1, 2]), "whole"),
                Row(target, lambda s: s(s.x, [0, 0, 1, 1]), "whole"),
                Row(target, lambda s: s(s.image, [1, 1, 1, 1]), "whole"),
                Row(target, lambda s: s(s.tokens, [0, 0, 0, 0, 1, 0]), "whole", single="rows"),
                Row(target, lambda s: s(s.tokens, [0, 0])),
            )
        ],
        Row(aten.constant_pad_nd.default, lambda s: s(s.tokens, [0, 0, 2, 1], 1.5)),
        Row(aten.pad.default, lambda s: s(s.tokens, [0, 0, 2, 1], "constant", 1.5)),
        Row(aten.pad.default, lambda s: s(s.tokens, [1, 2], "reflect")),
        Row(aten.pad.default, lambda s: s(s.columns, [1, 2], "replicate"), "whole"),
        Row(aten.pad.default, lambda s: s(s.image, [1, 1, 1, 1], "circular"), "whole"),
        # a side that the patches do not divide is filled up, and cut again
        Row(aten.constant_pad_nd.default, lambda s: patched(s, s(sides(s), [0, 0, 0, 1])), "whole", grid=(2, 2)),
        *[
            Row(aten.pad.default, lambda s, m=mode: patched(s, s(sides(s), [0, 0, 0, 1], m)), "whole", grid=(2, 2))
            for mode in ("constant", "circular", "reflect", "replicate")
        ],
        Row(
            aten.cat.default,
            lambda s: patched(s, s([sides(s), s.given(s.batch, 5, 1, WIDTH)], 2)),
            "whole",
            grid=(2, 2),
        ),
        Row(aten.slice.Tensor, lambda s: s(unpatched(s), 2, 0, HEIGHT), "whole", grid=(2, 2)),
    ]


def contraction() -> list[Row]:
    n, c = TOKENS, CHANNELS
    column = lambda s: s.also(aten.unsqueeze.default, s.tokens, -1)  # noqa: E731
    square = lambda s: s.also(aten.mm.default, s.flat, s.given(c, s.batch * n))  # noqa: E731
    first = lambda s: s.also(aten.transpose.int, s.tokens, 0, 1)  # noqa: E731 -- `n b c`
    return [
        Row(aten.linear.default, lambda s: s(s.tokens, s.given(5, c), s.given(5))),
        Row(aten.linear.default, lambda s: s(s.joint, s.given(5, c))),
        Row(aten.linear.default, lambda s: s(s.columns, s.given(7, n)), "whole"),
        Row(aten.linear.default, lambda s: s(s.image, s.given(WIDTH, WIDTH)), "whole", grid=(WIDTH,)),
        Row(aten.linear.default, lambda s: s(s.given(5, c), s.flat, s.marks)),
        Row(aten.linear.default, lambda s: s(s.flat, s.given(s.batch * n, c), s.marks), "bias"),
        Row(aten.linear.default, lambda s: s(s.flat, s.flat)),
        Row(aten.linear.default, lambda s: s(s.also(aten.permute.default, s.x, [1, 2, 3, 0]), s.given(7, s.batch))),
        Row(aten.linear.default, lambda s: s(s.also(aten.reshape.default, s.x, [s.batch, n * c]), s.given(7, n * c)),
            "no token grid"),
        Row(aten.linear.default, lambda s: s(s.also(aten.reshape.default, s.x, [s.batch, HEIGHT, WIDTH * c]),
                                             s.given(7, WIDTH * c)), grid=(3,)),
        Row(aten.matmul.default, lambda s: s(s.tokens, s.given(c, 5))),
        Row(aten.matmul.default, lambda s: s(s.tokens, s.given(c))),
        Row(aten.matmul.default, lambda s: s(s.given(c), s.columns)),
        Row(aten.matmul.default, lambda s: s(s.given(5, c), s.columns)),
        Row(aten.matmul.default, lambda s: s(s.given(n, n), s.tokens), "whole"),
        Row(aten.matmul.default, lambda s: s(s.given(n), s.tokens), "whole"),
        Row(aten.matmul.default, lambda s: s(s.columns, s.given(n, 5)), "whole"),
        Row(aten.matmul.default, lambda s: s(s.columns, s.tokens), "whole"),
        Row(aten.matmul.default, lambda s: s(s.heads, s.also(aten.transpose.int, s.heads, -2, -1))),
        Row(aten.matmul.default, lambda s: s(s.scores, s.tokens)),
        Row(aten.matmul.default, lambda s: s(s.also(aten.transpose.int, s.scores, -2, -1), s.tokens), "whole"),
        Row(aten.matmul.default, lambda s: s(s.heads, s.given(2, 3, 5))),
        Row(aten.matmul.default, lambda s: s(s.heads, s.given(s.batch, 1, 3, 5))),
        Row(aten.matmul.default, lambda s: s(s.x, s.given(HEIGHT, c, 5)), "whole"),
        Row(aten.matmul.default, lambda s: s(s.given(n, 5, c), column(s)), "whole", single="rows"),
        Row(aten.matmul.default, lambda s: s(s.given(7, 3), s.pairs)),
        Row(aten.matmul.default, lambda s: s(s.given(4, s.batch), first(s))),
        Row(aten.matmul.default, lambda s: s(s.given(5, 1, 1, n, c), s.columns)),
        Row(aten.matmul.default, lambda s: s(s.joint, s.also(aten.transpose.int, s.joint, -2, -1))),
        Row(aten.bmm.default, lambda s: s(s.tokens, s.given(s.batch, c, 5))),
        Row(aten.bmm.default, lambda s: s(s.scores, s.tokens)),
        Row(aten.bmm.default, lambda s: s(s.given(s.batch, 5, n), s.tokens), "whole"),
        Row(aten.mm.default, lambda s: s(s.flat, s.given(c, 5))),
        Row(aten._scaled_mm.default, lambda s: scaled(s, True)),
        Row(aten._scaled_mm.default, lambda s: scaled(s, False)),
        Row(aten._int_mm.default, lambda s: s(whole_numbers(s), s.constant(torch.ones(c, 5, dtype=torch.int8)))),
        Row(aten.mm.default, lambda s: s(s.flat, s.also(aten.t.default, s.flat))),
        Row(aten.mm.default, lambda s: s(s.given(5, s.batch * n), s.flat), "whole", pooled=True),
        Row(aten.mv.default, lambda s: s(s.flat, s.given(c))),
        Row(aten.mv.default, lambda s: s(s.given(5, s.batch * n), s.marks), "whole", pooled=True),
        Row(aten.dot.default, lambda s: s(s.marks, s.marks), "whole", pooled=True),
        Row(aten.dot.default, lambda s: s(s.marks, s.given(s.batch * n)), "whole", pooled=True),
        Row(aten.addmm.default, lambda s: s(s.given(5), s.flat, s.given(c, 5))),
        Row(aten.addmm.default, lambda s: s(s.given(s.batch * n, 5), s.flat, s.given(c, 5), beta=0.5, alpha=2)),
        Row(aten.addmm.default, lambda s: s(s.flat, s.flat, s.given(c, c))),
        Row(aten.addmm.default, lambda s: s(square(s), s.given(s.batch * n, c), s.given(c, s.batch * n)), "whole"),
        Row(aten.addmm.default, lambda s: (lambda q: s(q, q, q))(square(s)), pooled=True),
        Row(aten.addmm.default, lambda s: s(s.marks, s.flat, s.given(c, s.batch * n)), "bias"),
        Row(aten.baddbmm.default, lambda s: s(s.given(s.batch, n, 5), s.tokens, s.given(s.batch, c, 5))),
        Row(aten.baddbmm.default, lambda s: s(s.given(1, 1, n), s.tokens, s.columns)),
        Row(aten.einsum.default, lambda s: s("bnc,cd->bnd", [s.tokens, s.given(c, 5)])),
        Row(aten.einsum.default, lambda s: s("... c, c d -> ... d", [s.x, s.given(c, 5)])),
        Row(aten.einsum.default, lambda s: s("b...c,cd->b...d", [s.x, s.given(c, 5)])),
        Row(aten.einsum.default, lambda s: s("bnc,cd", [s.tokens, s.given(c, 5)])),
        Row(aten.einsum.default, lambda s: s("bhwc->bchw", [s.x])),
        Row(aten.einsum.default, lambda s: s("bnc,bmc->bnm", [s.tokens, s.tokens])),
        Row(aten.einsum.default, lambda s: s("bnc,bmc->bmn", [s.tokens, s.tokens])),
        Row(aten.einsum.default, lambda s: s("...nc,...mc->...nm", [s.heads, s.heads])),
        Row(aten.einsum.default, lambda s: s("bnm,bmc->bnc", [s.scores, s.tokens])),
        Row(aten.einsum.default, lambda s: s("bnc,bnc->bn", [s.tokens, s.tokens])),
        Row(aten.einsum.default, lambda s: s("bnc,nc->bnc", [s.tokens, s.given(n, c)]), "whole", single="rows"),
        Row(aten.einsum.default, lambda s: s("bnc,bnd->bncd", [s.tokens, s.given(s.batch, n, 4)])),
        Row(aten.einsum.default, lambda s: s("bhwc,wc->bhwc", [s.x, s.given(WIDTH, c)]), "whole"),
        Row(aten.einsum.default, lambda s: s("bnc,n->bc", [s.tokens, s.given(n)]), "whole"),
        Row(aten.einsum.default, lambda s: s("b...c->bc", [s.x]), "whole"),
        Row(aten.einsum.default, lambda s: s("bnn->bn", [s.scores]), "whole"),
        Row(aten.einsum.default, lambda s: s("bnc,cd,de->bne", [s.tokens, s.given(c, 5), s.given(5, 2)])),
        Row(aten.einsum.default, lambda s: s("bnc,bmc,bmd->bnd", [s.tokens] * 3)),
        Row(aten.einsum.default, lambda s: s("bnc,ab->anc", [s.tokens, s.given(s.batch, s.batch)])),
        Row(aten.einsum.default, lambda s: s("anc,bnc->abn", [s.tokens, s.tokens]), "whole", single="rows"),
        Row(aten.einsum.default, lambda s: s("bnc,bnc->bn", [s.tokens, s.turned]), "whole"),
        Row(aten.einsum.default, lambda s: s("bnc,bmn->bnm", [s.tokens, s.also(aten.transpose.int, s.scores, -2, -1)])),
        Row(aten.einsum.default, lambda s: s("bnc,bmn->bnm", [s.tokens, s.scores]), "whole"),
    ]  # fmt: skip


def convolution() -> list[Row]:
    n, c = TOKENS, CHANNELS
    wide = lambda s: s.also(aten.reshape.default, s.flat, [s.batch * n, 1, c])  # noqa: E731 -- `(b n) 1 c`
    deep = lambda s: s.also(aten.reshape.default, s.image, [s.batch, 2, 3, HEIGHT, WIDTH])  # noqa: E731
    one = lambda s: s.also(aten.select.int, s.image, 0, 0)  # noqa: E731
    return [
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 1, 1), s.given(5))),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(c, 2, 1, 1), None, [1], [0], [1], 3)),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 3, 2), None, [3, 2]), grid=(2,)),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 1, 2), None, [1, 2]), grid=(3, 2)),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 2, 2), None, [2]), "does not divide"),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(c, 1, 3, 3), None, [1], [1], [1], c), "whole"),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 3, 3), None, [2], [1]), "whole"),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 3, 3), None, [1], [2], [2]), "whole"),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 3, 1), None, [1], [1, 0]), "whole"),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 1, 1), None, [1], [1]), "whole"),
        Row(aten.conv2d.default, lambda s: s(s.image, s.given(5, c, 1, 1), None, [2]), "whole"),
        Row(aten.conv2d.default, lambda s: s(one(s), s.given(5, c, 1, 1)), batches=(1,)),
        Row(aten.conv2d.default, lambda s: s(s.given(1, c, 5, 5), s.also(aten.reshape.default, s.flat, [s.batch * n, c, 1, 1])),
            "whole"),
        Row(aten.conv2d.padding, lambda s: s(s.image, s.given(5, c, 1, 1), None, [1], "same")),
        Row(aten.conv2d.padding, lambda s: s(s.image, s.given(5, c, 1, 2), None, [1, 2], "valid"), grid=(3, 2)),
        Row(aten.conv2d.padding, lambda s: s(s.image, s.given(5, c, 3, 3), None, [1], "same"), "whole"),
        Row(aten.conv1d.default, lambda s: s(s.columns, s.given(5, c, 1), s.given(5))),
        Row(aten.conv1d.default, lambda s: s(s.columns, s.given(5, c, 3), None, [1], [1]), "whole"),
        Row(aten.conv1d.default, lambda s: s(s.columns, s.given(5, c, 4), None, [4]), grid=(3,)),
        Row(aten.conv1d.default, lambda s: s(wide(s), s.given(2, 1, 3), None, [2], [1])),
        Row(aten.conv1d.default, lambda s: s(s.tokens, s.given(5, n, 1)), "no token grid"),
        Row(aten.conv1d.default, lambda s: s(s.columns, s.also(aten.reshape.default, s.flat, [s.batch * n, c, 1])), "whole"),
        Row(aten.conv1d.default, lambda s: s(s.also(aten.cat.default, [s.also(aten.transpose.int, s.text, -2, -1), s.columns], 2),
                                             s.given(5, c, 1))),
        Row(aten.conv1d.padding, lambda s: s(s.columns, s.given(5, c, 3), None, [1], "same"), "whole"),
        Row(aten.conv1d.padding, lambda s: s(s.columns, s.given(5, c, 1), None, [1], "valid")),
        Row(aten.conv3d.default, lambda s: s(deep(s), s.given(5, 2, 1, 1, 1))),
        Row(aten.conv3d.default, lambda s: s(deep(s), s.given(5, 2, 3, 1, 1), None, [1], [1, 0, 0])),
        Row(aten.conv3d.default, lambda s: s(deep(s), s.given(5, 2, 2, 1, 2), None, [1, 1, 2]), grid=(3, 2)),
        Row(aten.conv3d.default, lambda s: s(deep(s), s.given(5, 2, 3, 3, 3), None, [1], [1]), "whole"),
        Row(aten.conv3d.padding, lambda s: s(deep(s), s.given(5, 2, 3, 1, 1), None, [1], "same")),
        Row(aten.conv_transpose2d.input, lambda s: s(s.image, s.given(c, 5, 2, 2), s.given(5), [2])),
        Row(aten.conv_transpose2d.input, lambda s: s(s.image, s.given(c, 5, 1, 2), None, [1, 2], [0], [0], 2)),
        Row(aten.conv_transpose2d.input, lambda s: s(s.image, s.given(c, 5, 3, 3), None, [1], [1]), "whole"),
        Row(aten.conv_transpose2d.input, lambda s: s(s.image, s.given(c, 5, 2, 2), None, [3]), "whole"),
        Row(aten.silu.default,  # kernels that overlap: each token still has entries of its own
            lambda s: s(s.also(aten.conv_transpose2d.input, s.image, s.given(c, 5, 4, 3), None, [2, 1], [1, 1]))),
        Row(aten.conv_transpose1d.default, lambda s: s(s.columns, s.given(c, 5, 2), None, [2])),
        Row(aten.conv_transpose1d.default, lambda s: s(s.tokens, s.given(n, 5, 2), None, [2]), "whole"),
        Row(aten.conv_transpose1d.default, lambda s: s(s.columns, s.also(aten.reshape.default, s.flat, [c, -1, 2]), None, [2]),
            "whole"),
        Row(aten.conv_transpose3d.input, lambda s: s(deep(s), s.given(2, 5, 1, 2, 2), None, [1, 2, 2])),
    ]  # fmt: skip


def attention() -> list[Row]:
    n, both = TOKENS, TOKENS + TEXT
    sdpa = aten.scaled_dot_product_attention.default
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default

    def joint(s: Stage) -> fx.Node:
        split = s.also(aten.reshape.default, s.joint, [s.batch, both, 2, 3])
        return s.also(aten.permute.default, split, [0, 2, 1, 3])

    def folded(s: Stage) -> fx.Node:
        """`(b n) 1 3 2`: attention beside the tokens, as over the frames of a video."""
        return s.also(aten.reshape.default, s.flat, [s.batch * n, 1, 3, 2])

    def rows(s: Stage) -> fx.Node:
        """`(b h) 2 w 3`: attention along the width alone."""
        split = s.also(aten.reshape.default, s.x, [s.batch * HEIGHT, WIDTH, 2, 3])
        return s.also(aten.permute.default, split, [0, 2, 1, 3])

    def four(s: Stage) -> fx.Node:
        return s.also(aten.repeat.default, s.heads, [1, 2, 1, 1])

    def first(s: Stage) -> fx.Node:
        """`b (2 n) 3 2`: two variants of every token, the variant first."""
        pairs = s.also(aten.reshape.default, s.tokens, [s.batch, n, 3, 2])
        return s.also(aten.repeat.default, pairs, [1, 2, 1, 1])

    def last(s: Stage) -> fx.Node:
        """`b (n 2) 3 2`: the variant last."""
        pairs = s.also(aten.reshape.default, s.tokens, [s.batch, n, 3, 2])
        return s.also(aten.repeat_interleave.self_int, pairs, 2, 1)

    def stacked(s: Stage) -> fx.Node:
        """`b (n 2) 3 2`, by a stack."""
        pairs = s.also(aten.reshape.default, s.tokens, [s.batch, n, 3, 2])
        both = s.also(aten.stack.default, [pairs, s.also(aten.neg.default, pairs)], 2)
        return s.also(aten.reshape.default, both, [s.batch, 2 * n, 3, 2])

    def one(s: Stage) -> fx.Node:
        return s.also(aten.reshape.default, s.tokens, [s.batch, n, 3, 2])

    masks = [(n, n), (n, 1), (1, n), (1, n, n), (2, 1, n), (1, 1, n, n), (0, 1, n, n), (0, 1, 1, n), (0, 2, n, n)]
    return [
        Row(sdpa, lambda s: s(s.heads, s.heads, s.heads)),
        *[Row(kernel, lambda s, k=k: s.pieces(s.heads, s.heads, s.heads)[k]) for k in (0, 1)],
        Row(kernel, lambda s: s.pieces(joint(s), joint(s), joint(s))[1]),
        Row(kernel, lambda s: s.pieces(s.given(s.batch, 2, 5, 3), s.heads, s.heads)[1], "whole"),
        Row(kernel, lambda s: s.pieces(s.heads, s.heads, s.heads, 0.0, True)[0], "causal"),
        Row(sdpa, lambda s: s(s.heads, s.also(aten.neg.default, s.heads), s.also(aten.exp.default, s.heads), scale=0.3)),
        Row(sdpa, lambda s: s(joint(s), joint(s), joint(s))),
        Row(sdpa, lambda s: s(s.heads, joint(s), joint(s))),
        Row(sdpa, lambda s: s(s.heads, s.given(s.batch, 2, 5, 3), s.given(s.batch, 2, 5, 4))),
        Row(sdpa, lambda s: s(s.heads, s.given(s.batch, 2, n, 3), s.heads)),
        Row(sdpa, lambda s: s(s.given(s.batch, 2, 5, 3), s.heads, s.heads), "whole"),
        Row(sdpa, lambda s: s(s.tokens, s.tokens, s.tokens)),
        Row(sdpa, lambda s: s(s.columns, s.columns, s.columns), "whole"),
        Row(sdpa, lambda s: s(s.given(s.batch, 1, 5, n), s.also(aten.unsqueeze.default, s.columns, 1), s.given(s.batch, 1, 6, 2)),
            "whole"),
        Row(sdpa, lambda s: s(four(s), s.heads, s.heads, enable_gqa=True)),
        *[Row(sdpa, lambda s, m=m: s(s.heads, s.heads, s.heads, s.given(*(k or s.batch for k in m)))) for m in masks],
        Row(sdpa, lambda s: s(joint(s), joint(s), joint(s), s.mask(both, both))),
        Row(sdpa, lambda s: s(joint(s), joint(s), joint(s), s.given(s.batch, 1, 1, both))),
        Row(sdpa, lambda s: s(s.heads, s.given(s.batch, 2, 5, 3), s.given(s.batch, 2, 5, 4), s.given(s.batch, 1, n, 5))),
        Row(sdpa, lambda s: s(s.heads, s.heads, s.heads, s.also(aten.unsqueeze.default, s.scores, 1)), "mask"),
        Row(sdpa, lambda s: s(s.heads, s.heads, s.heads, None, 0.5), "eval mode"),
        Row(sdpa, lambda s: s(s.heads, s.heads, s.heads, None, 0.0, True), "causal"),
        Row(sdpa, lambda s: s(folded(s), folded(s), folded(s))),
        Row(sdpa, lambda s: s(folded(s), folded(s), folded(s), None, 0.0, True)),
        Row(sdpa, lambda s: s(folded(s), s.given(s.batch * n, 1, 5, 2), s.given(s.batch * n, 1, 5, 4))),
        Row(sdpa, lambda s: s(folded(s), s.given(1, 1, 5, 2), s.given(1, 1, 5, 4))),
        Row(sdpa, lambda s: s(s.given(s.batch * n, 1, 5, 2), folded(s), folded(s))),
        Row(sdpa, lambda s: s(folded(s), folded(s), folded(s), s.given(s.batch * n, 1, 3, 3))),
        Row(sdpa, lambda s: s(folded(s), folded(s), folded(s), s.given(3, 3))),
        Row(sdpa, lambda s: s(rows(s), rows(s), rows(s)), grid=(4,)),
        # two variants of each token, in one order or the other: entries meet by their places
        Row(sdpa, lambda s: s(first(s), first(s), first(s))),
        Row(sdpa, lambda s: s(last(s), stacked(s), last(s))),
        Row(sdpa, lambda s: s(first(s), last(s), last(s)), "whole"),
        Row(sdpa, lambda s: s(first(s), first(s), stacked(s)), "whole"),
        Row(sdpa, lambda s: s(last(s), one(s), one(s), enable_gqa=True)),
        Row(sdpa, lambda s: s(first(s), one(s), one(s), enable_gqa=True), "whole"),
        Row(sdpa, lambda s: s(last(s), s.given(s.batch, n, 5, 2), s.given(s.batch, n, 5, 4), enable_gqa=True)),
        Row(sdpa, lambda s: s(first(s), s.given(s.batch, n, 5, 2), s.given(s.batch, n, 5, 4), enable_gqa=True), "whole"),
        Row(sdpa, lambda s: s(s.given(s.batch, 2 * n, 5, 2), one(s), one(s), enable_gqa=True)),
        Row(sdpa, lambda s: s(folded(s), s.also(aten.reshape.default, s.flat, [1, 1, -1, 2]),
                              s.also(aten.reshape.default, s.flat, [1, 1, -1, 2])), "whole"),
        Row(sdpa, lambda s: s(s.also(aten.reshape.default, s.flat, [1, 1, -1, 2]), folded(s), folded(s)), "whole", pooled=True),
    ]  # fmt: skip


def indexing() -> list[Row]:
    n, c = TOKENS, CHANNELS
    return [
        Row(aten.embedding.default, lambda s: s(s.given(c, 4), s.classes)),
        Row(aten.embedding.default, lambda s: s(s.flat, s.below(n, 3)), "whole"),
        Row(aten.embedding.default, lambda s: s(s.flat, s.classes), "whole"),
        Row(aten.index.Tensor, lambda s: s(s.tokens, [None, None, s.below(c, 4)])),
        Row(aten.index.Tensor, lambda s: s(s.x, [None, None, None, s.below(c, 4, 2)])),
        Row(aten.index.Tensor, lambda s: s(s.pairs, [None, None, s.below(3, 4)])),
        Row(aten.index.Tensor, lambda s: s(s.tokens, [None, s.below(n, 4)]), "whole"),
        Row(aten.index.Tensor, lambda s: s(s.tokens, [s.below(s.batch, 4)]), "whole", single="rows"),
        Row(aten.index.Tensor, lambda s: s(s.pairs, [None, None, s.below(3, 4), s.below(2, 4)]), "whole"),
        Row(aten.index.Tensor, lambda s: s(s.given(c, 4), [s.classes])),
        Row(aten.index.Tensor, lambda s: s(s.given(5, c, 4), [None, s.classes])),
        Row(aten.index.Tensor, lambda s: s(s.given(c, 6, 4), [s.classes, s.below(6, 1)]), "whole"),
        Row(aten.index.Tensor, lambda s: s(s.tokens, [None, None, s.classes]), "whole"),
        Row(aten.index_select.default, lambda s: s(s.tokens, -1, s.below(c, 4))),
        Row(aten.index_select.default, lambda s: s(s.tokens, 1, s.below(n, 4)), "whole"),
        Row(aten.index_select.default, lambda s: s(s.tokens, -2, ordered(s, 5))),
        Row(aten.index_select.default, lambda s: s(s.tokens, 1, ordered(s, 2)), "whole"),  # some twice, some never
        Row(aten.index.Tensor, lambda s: s(s.tokens, [None, ordered(s, 7)])),
        Row(aten.index.Tensor, lambda s: s(s.also(aten.index.Tensor, s.tokens, [None, ordered(s, 5)]), [None, ordered(s, 5)])),
        Row(aten.gather.default, lambda s: s(s.tokens, 1, alike(s))),
        Row(aten.index_select.default, lambda s: s(s.tokens, 0, s.below(s.batch, 4)), "whole", single="rows"),
        Row(aten.gather.default, lambda s: s(s.tokens, -1, s.below(c, s.batch, n, 4))),
        Row(aten.gather.default, lambda s: s(s.given(s.batch, n, c), 2, s.also(aten.unsqueeze.default, s.classes, -1))),
        Row(aten.gather.default, lambda s: s(s.tokens, 2, s.also(aten.unsqueeze.default, s.classes, -1))),
        Row(aten.gather.default, lambda s: s(s.tokens, 1, s.below(n, s.batch, 4, c)), "whole"),
        Row(aten.gather.default, lambda s: s(s.tokens, 2, s.below(c, s.batch, 5, 4)), "whole"),
        Row(aten.gather.default, lambda s: s(s.given(s.batch, n + 5, c), 2, s.also(aten.unsqueeze.default, s.classes, -1)),
            "whole"),
        Row(aten.gather.default, lambda s: s(s.turned, 2, s.also(aten.unsqueeze.default, s.classes, -1)), "whole"),
        Row(aten.flip.default, lambda s: s(s.tokens, [-1])),
        Row(aten.real.default, lambda s: s(s.also(aten.view_as_complex.default, s.pairs))),
        Row(aten.imag.default, lambda s: s(s.also(aten.view_as_complex.default, s.pairs))),
        Row(aten.conj.default, lambda s: s(s.also(aten.view_as_complex.default, s.pairs))),
        Row(aten.resolve_conj.default, lambda s: s(s.also(aten.view_as_complex.default, s.pairs))),
        Row(aten.complex.default, lambda s: s(s.tokens, s.given(n, c))),
        Row(aten.polar.default, lambda s: s(s.also(aten.abs.default, s.tokens), s.given(n, c))),
        Row(aten.log_sigmoid.default, lambda s: s(s.tokens)),
        Row(aten.hardswish.default, lambda s: s(s.tokens)),
        Row(aten.floor_divide.default, lambda s: s(s.tokens, s.given(n, 1))),
        *[Row(target, lambda s: s(s.also(aten.gt.Scalar, s.tokens, 0), s.mask(s.batch, n, 1)))
          for target in (aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor)],
        Row(aten.new_zeros.default, lambda s: s(s.tokens, [n, 1]), "apart"),
        Row(aten.new_ones.default, lambda s: s(s.tokens, [s.batch, n]), "apart"),
        Row(aten.new_full.default, lambda s: s(s.tokens, [n], 2.0), "apart"),
        Row(aten.new_empty.default, lambda s: s(s.tokens, [n]), "apart", defined=False),
        Row(aten.glu.default, lambda s: s(s.tokens, -1)),
        Row(aten.glu.default, lambda s: s(s.tokens, 1), "whole"),
        Row(aten.diff.default, lambda s: s(s.tokens)),
        Row(aten.diff.default, lambda s: s(s.tokens, dim=1), "whole"),
        Row(aten.tril.default, lambda s: s(s.pairs)),
        Row(aten.triu.default, lambda s: s(s.scores), "whole"),
        Row(aten.tril.default, lambda s: s(s.scores, 1), "whole"),
        Row(aten.linalg_cross.default, lambda s: s(s.pairs, s.given(s.batch, n, 3, 2), dim=2)),
        Row(aten.linalg_cross.default, lambda s: s(s.pairs, s.given(1, 1, 3, 1), dim=-2)),
        Row(aten.linalg_cross.default, lambda s: s(s.x, s.given(s.batch, HEIGHT, WIDTH, c), dim=1), "whole"),
        Row(aten.cdist.default, lambda s: s(s.tokens, s.tokens)),
        Row(aten.cdist.default, lambda s: s(s.tokens, s.given(5, c)), "whole"),
        Row(aten.cdist.default, lambda s: s(s.tokens, s.text)),
        Row(aten.cdist.default, lambda s: s(s.text, s.tokens)),
        Row(aten.instance_norm.default, lambda s: s(s.image, None, None, None, None, True, 0.1, 1e-5, False), "whole"),
        Row(aten.grid_sampler.default, lambda s: s(s.image, s.given(s.batch, 2, 3, 2), 0, 0, False), "whole"),
        Row(aten.flip.default, lambda s: s(s.pairs, [2, -1])),
        Row(aten.flip.default, lambda s: s(s.x, [2])),
        Row(aten.flip.default, lambda s: s(s.tokens, [0]), "whole", single="rows"),
        Row(aten.flip.default, lambda s: s(s.also(aten.view.default, s.tokens, [s.batch, n * c]), [1]), "whole"),
        Row(aten.roll.default, lambda s: s(s.tokens, [2], [-1])),
        Row(aten.roll.default, lambda s: s(s.tokens, [2]), "whole"),
        Row(aten.roll.default, lambda s: s(s.x, [1, 1], [1, 2])),
        Row(aten.roll.default, lambda s: s(s.x, [1], [0]), "whole", single="rows"),
        Row(aten.roll.default, lambda s: s(s.joint, [1], [1]), "whole"),
        *[
            row
            for target in (aten.channel_shuffle.default, aten.native_channel_shuffle.default)
            for row in (
                Row(target, lambda s: s(s.image, 3)),
                Row(target, lambda s: s(s.columns, 2)),
                Row(target, lambda s: s(s.tokens, 2), "whole"),
                Row(target, lambda s: s(s.also(aten.transpose.int, s.image, 0, 1), 1), "whole", single="rows"),
            )
        ],
        Row(aten.index_put.default, lambda s: s(s.tokens, [None, s.constant(torch.tensor([1, 4]))], s.given(2, c)), "whole"),
        Row(aten.index_copy.default, lambda s: s(s.tokens, 1, s.constant(torch.tensor([1, 4])), s.given(s.batch, 2, c)), "whole"),
        Row(aten.scatter_reduce.two, lambda s: s(s.tokens, 1, s.below(n, s.batch, 3, c), s.given(s.batch, 3, c), "amax"), "whole"),
        Row(aten.index_fill.int_Scalar, lambda s: s(s.tokens, 1, s.constant(torch.tensor([1, 4])), 0.5), "whole"),
        Row(aten.masked_scatter.default, lambda s: s(s.tokens, s.mask(s.batch, n, c), s.given(s.batch, n, c)), "whole"),
        Row(aten.scatter.src, lambda s: s(s.tokens, 2, s.below(c, s.batch, n, 1), s.given(s.batch, n, 1))),
        Row(aten.scatter.src, lambda s: s(s.given(s.batch, n, 8), -1, s.also(aten.unsqueeze.default, s.classes, -1), s.tokens)),
        Row(aten.scatter.src, lambda s: s(s.tokens, 2, s.below(c, s.batch, n - 1, 1), s.given(s.batch, n - 1, 1)), "whole"),
        Row(aten.scatter.src, lambda s: s(s.tokens, 2, s.also(aten.unsqueeze.default, s.classes, -1), s.turned), "whole"),
        Row(aten.scatter.value, lambda s: s(s.given(s.batch, n, c), 2, s.also(aten.unsqueeze.default, s.classes, -1), 1.0)),
        Row(aten.scatter.value, lambda s: s(s.tokens, 1, s.below(n, s.batch, 3, c), 1.0), "whole"),
        Row(aten.scatter_add.default, lambda s: s(s.tokens, 2, s.below(c, s.batch, n, 4), s.given(s.batch, n, 4))),
        Row(aten.scatter_reduce.two, lambda s: s(s.tokens, 2, s.below(c, s.batch, n, 4), s.given(s.batch, n, 4), "amax")),
        Row(aten.scatter_add.default, lambda s: s(s.tokens, 1, s.below(n, s.batch, 3, c), s.given(s.batch, 3, c)), "whole"),
        Row(aten.index_add.default, lambda s: s(s.tokens, 1, s.below(n, 3), s.given(s.batch, 3, c)), "whole"),
    ]  # fmt: skip


def reduction() -> list[Row]:
    n, c = TOKENS, CHANNELS
    dims = [aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.logsumexp.default, aten.var.dim,
            aten.std.dim]  # fmt: skip
    single = [aten.prod.dim_int, aten.argmax.default, aten.argmin.default]
    several = [aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default]
    truth = [aten.any.dim, aten.all.dim]
    truths = [aten.any.dims, aten.all.dims]
    overall = [aten.max.default, aten.min.default, aten.median.default, aten.prod.default, aten.nansum.default,
               aten.nanmedian.default]  # fmt: skip
    spread = [aten.var.correction, aten.std.correction]
    every = [aten.mean.default, aten.sum.default]
    along = [aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default, aten.cumsum.default,
             aten.cumprod.default, aten.logcumsumexp.default]  # fmt: skip
    bits = lambda s: s.also(aten.gt.Scalar, s.tokens, 0)  # noqa: E731
    part = torch.ops.ras_compile.token_wise.default
    return [
        *[
            row
            for target in dims
            for row in (
                Row(target, lambda s: s(s.tokens, [-1])),
                Row(target, lambda s: s(s.tokens, [2], keepdim=True)),
                Row(target, lambda s: s(s.pairs, [-1, -2])),
                Row(target, lambda s: s(s.tokens, [1]), "whole"),
                Row(target, lambda s: s(s.image, [-2, -1], keepdim=True), "whole"),
                Row(target, lambda s: s(s.x, [2]), "whole"),
                Row(target, lambda s: s(s.tokens, [0], keepdim=True), "whole", single="rows"),
            )
            if not (target in (aten.var.dim, aten.std.dim) and row.single)  # of one sample: not a number
        ],
        *[Row(target, lambda s: s(s.tokens, None), "whole") for target in (aten.mean.dim, aten.sum.dim_IntList)],
        *[Row(target, lambda s: s(s.tokens), "whole") for target in (*every, aten.amax.default, aten.argmin.default)],
        *[
            row
            for target in (*single, *several)
            for row in (
                Row(target, lambda s: s.pieces(s.tokens, -1) if s.target in several else s(s.tokens, -1)),
                Row(
                    target, lambda s: s.pieces(s.pairs, 2, True) if s.target in several else s(s.pairs, 2, keepdim=True)
                ),
                Row(target, lambda s: s.pieces(s.tokens, 1) if s.target in several else s(s.tokens, 1), "whole"),
            )
        ],
        *[
            row
            for target in truth
            for row in (Row(target, lambda s: s(bits(s), -1)), Row(target, lambda s: s(bits(s), 1), "whole"))
        ],
        *[
            row
            for target in truths
            for row in (Row(target, lambda s: s(bits(s), [-1])), Row(target, lambda s: s(bits(s), [1, 2]), "whole"))
        ],
        *[Row(target, lambda s: s(bits(s)), "whole") for target in (aten.any.default, aten.all.default)],
        *[Row(target, lambda s: s(s.tokens), "whole") for target in overall],
        Row(aten.nansum.default, lambda s: s(s.tokens, [-1], True)),
        *[
            row
            for target in (aten.quantile.scalar, aten.nanquantile.scalar)
            for row in (
                Row(target, lambda s: s(s.tokens, 0.9, -1)),
                Row(target, lambda s: s(s.tokens, 0.9, 1, True), "whole"),
                Row(target, lambda s: s(s.tokens, 0.9), "whole"),
            )
        ],
        Row(aten.norm.Scalar, lambda s: s(s.tokens), "whole"),
        Row(aten.count_nonzero.dim_IntList, lambda s: s(bits(s), [-1])),
        Row(aten.count_nonzero.dim_IntList, lambda s: s(bits(s), [1]), "whole"),
        *[
            row
            for target in (aten.cummax.default, aten.cummin.default)
            for row in (
                Row(target, lambda s: s.pieces(s.tokens, -1)),
                Row(target, lambda s: s.pieces(s.tokens, 1), "whole"),
            )
        ],
        *[
            row
            for target in spread
            for row in (
                Row(target, lambda s: s(s.tokens, [-1], correction=0, keepdim=True)),
                Row(target, lambda s: s(s.tokens, [1], correction=1), "whole"),
                Row(target, lambda s: s(s.tokens), "whole"),
            )
        ],
        Row(aten.std_mean.correction, lambda s: s.pieces(s.tokens, [-1], correction=0)),
        Row(aten.var_mean.correction, lambda s: s.pieces(s.tokens, [-1], correction=0)),
        Row(aten.var_mean.correction, lambda s: s.pieces(s.tokens, [1, 2], correction=0), "whole"),
        Row(aten.var_mean.dim, lambda s: s.pieces(s.tokens, [-1], False, True)),
        Row(aten.var_mean.dim, lambda s: s.pieces(s.tokens, [1], False), "whole"),
        Row(aten.aminmax.default, lambda s: s.pieces(s.tokens, dim=-1, keepdim=True)),
        Row(aten.aminmax.default, lambda s: s.pieces(s.tokens, dim=1), "whole"),
        Row(aten.count_nonzero.default, lambda s: s(bits(s), -1)),
        Row(aten.count_nonzero.default, lambda s: s(bits(s), 1), "whole"),
        Row(aten.count_nonzero.default, lambda s: s(bits(s)), "whole"),
        Row(aten.linalg_vector_norm.default, lambda s: s(s.tokens, 2, [-1], True)),
        Row(aten.linalg_vector_norm.default, lambda s: s(s.tokens), "whole"),
        Row(aten.norm.ScalarOpt_dim, lambda s: s(s.tokens, 2, [-1])),
        Row(aten.norm.ScalarOpt_dim, lambda s: s(s.tokens, 2, [1], True), "whole"),
        *[
            row
            for target in along
            for row in (
                Row(target, lambda s: s(s.tokens, -1)),
                Row(target, lambda s: s(s.scores, 2)),
                Row(target, lambda s: s(s.tokens, 1), "whole"),
                Row(target, lambda s: s(s.tokens, 0), "whole", single="rows"),
            )
        ],
        Row(aten._softmax.default, lambda s: s(s.tokens, -1, False)),
        Row(aten._softmax.default, lambda s: s(s.tokens, -2, False), "whole"),
        Row(aten.layer_norm.default, lambda s: s(s.joint, [c], s.given(c), s.given(c))),
        Row(aten.layer_norm.default, lambda s: s(s.pairs, [3, 2])),
        Row(aten.layer_norm.default, lambda s: s(s.tokens, [n, c]), "whole"),
        Row(aten.layer_norm.default, lambda s: s(s.columns, [n]), "whole"),
        Row(aten.layer_norm.default, lambda s: s(s.given(5, s.batch * n), [s.batch * n], s.marks), "other than"),
        Row(aten.layer_norm.default, lambda s: s(s.columns, [n], s.given(n), s.given(n)), "whole"),
        Row(aten.rms_norm.default, lambda s: s(s.tokens, [c], s.given(c))),
        Row(aten.rms_norm.default, lambda s: s(s.columns, [n]), "whole"),
        Row(aten.group_norm.default, lambda s: s(s.image, 2, s.given(c), s.given(c)), "whole"),
        Row(aten.group_norm.default, lambda s: s(s.flat, 2)),
        Row(aten.group_norm.default, lambda s: s(s.also(aten.reshape.default, s.flat, [s.batch * n, 2, 3]), 2)),
        Row(aten.topk.default, lambda s: s.pieces(s.tokens, 2)),
        Row(aten.topk.default, lambda s: s.pieces(s.pairs, 2, 2)),
        Row(aten.topk.default, lambda s: s.pieces(s.tokens, 2, 1), "whole"),
        Row(aten.sort.default, lambda s: s.pieces(s.tokens, -1, True)),
        Row(aten.sort.default, lambda s: s.pieces(s.tokens, 1), "whole"),
        Row(aten.sort.stable, lambda s: s.pieces(s.tokens, stable=True)),
        Row(aten.kthvalue.default, lambda s: s.pieces(s.tokens, 2)),
        Row(aten.kthvalue.default, lambda s: s.pieces(s.pairs, 2, 2, True)),
        Row(aten.kthvalue.default, lambda s: s.pieces(s.tokens, 2, 1), "whole"),
        *[
            Row(part, lambda s: s(s.tokens, [s.given(5, c)], linear_part(c, 5), 5)),
            Row(part, lambda s: s(s.joint, [s.given(c, c)], linear_part(c, c), c)),
            Row(part, lambda s: s(s.columns, [s.given(5, n)], linear_part(n, 5), 5), "whole"),
            Row(part, lambda s: s(s.latent, [s.given(5, 5)], linear_part(5, 5), 5)),
        ],
        Row(EIGHT_BITS, lambda s: s(s.tokens, *eight_bits(s, c))),
        Row(EIGHT_BITS, lambda s: s(s.joint, *eight_bits(s, c))),
        Row(EIGHT_BITS, lambda s: s(s.columns, *eight_bits(s, n)), "whole"),
        Row(EIGHT_BITS, lambda s: s(s.given(4, n, c), s.also(aten.reshape.default, s.tokens, [-1, c]), s.given(1)),
            "an operand other than `A`"),
        Row(aten.bucketize.Tensor, lambda s: s(s.joint, s.constant(torch.linspace(-1, 1, 5, dtype=torch.float64)))),
        Row(aten.bucketize.Tensor, lambda s: s(s.tokens, borders(s, s.given(5)))),
        Row(aten.bucketize.Tensor, lambda s: s(s.tokens, s.marks), "whole"),
        Row(aten.searchsorted.Tensor, lambda s: s(borders(s, s.given(5)), s.tokens)),
        Row(aten.searchsorted.Tensor, lambda s: s(borders(s, s.given(s.batch, n, 5)), s.tokens)),
        Row(aten.searchsorted.Tensor, lambda s: s(borders(s, s.tokens), s.given(s.batch, n, 2), right=True)),
        Row(aten.searchsorted.Tensor, lambda s: s(borders(s, s.tokens), s.also(aten.exp.default, s.tokens))),
        Row(aten.searchsorted.Tensor, lambda s: s(s.tokens, s.given(s.batch, n, 2),
                                                  sorter=s.also(aten.argsort.default, s.tokens, -1))),
        Row(aten.searchsorted.Tensor, lambda s: s(borders(s, s.turned), s.tokens), "whole"),
        Row(aten.searchsorted.Tensor, lambda s: s(borders(s, s.given(s.batch, c, 5)), s.columns)),
        Row(aten.searchsorted.Tensor, lambda s: s(s.columns, s.columns), "whole"),
    ]  # fmt: skip


def eight_bits(stage: Stage, columns: int) -> tuple[fx.Node, fx.Node]:
    """A weight of 8 bits, and its scales."""
    whole = torch.randint(-9, 9, (5, columns), dtype=torch.int8, generator=stage.generator)
    return stage.constant(whole), stage.given(5, 1)


def linear_part(columns: int, width: int) -> int:
    """The number of a linear layer that is called as it is."""
    PARTS.append(nn.Linear(columns, width, bias=False).double())
    return number_of(PARTS[-1])


PARTS: list[nn.Module] = []  # what is called by its number has to live


def borders(stage: Stage, values: fx.Node) -> fx.Node:
    """Sorted along their last dimension."""
    return stage.also(operator.getitem, stage.also(aten.sort.default, values), 0)


def resampling() -> list[Row]:
    n, c = TOKENS, CHANNELS
    deep = lambda s: s.also(aten.reshape.default, s.image, [s.batch, 2, 3, HEIGHT, WIDTH])  # noqa: E731
    wide = lambda s: s.also(aten.reshape.default, s.flat, [s.batch * n, 1, c])  # noqa: E731 -- `(b n) 1 c`
    even = lambda s: s.also(aten.repeat_interleave.self_int, s.image, 2, 2)  # noqa: E731 -- `b c (h 2) w`
    pools = [aten.avg_pool1d.default, aten.max_pool1d.default]
    squares = [aten.avg_pool2d.default, aten.max_pool2d.default]
    cubes = [aten.avg_pool3d.default, aten.max_pool3d.default]
    fft1 = [aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default]
    fft2 = [aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default]
    fftn = [aten.fft_fftn.default, aten.fft_ifftn.default, aten.fft_rfftn.default, aten.fft_irfftn.default]
    smooth = [aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec]
    smoother = [aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default]
    return [
        Row(aten.unfold.default, lambda s: s(s.tokens, -1, 3, 2)),
        Row(aten.unfold.default, lambda s: s(s.x, 2, 2, 2)),
        Row(aten.unfold.default, lambda s: s(s.tokens, 1, 4, 4)),
        Row(aten.unfold.default, lambda s: s(s.tokens, 1, 4, 2), "whole"),
        Row(aten.unfold.default, lambda s: s(s.joint, 1, 5, 5), "whole"),
        Row(aten.pixel_unshuffle.default, lambda s: s(even(s), 2), grid=(HEIGHT, 2)),
        Row(aten.pixel_unshuffle.default, lambda s: s(s.also(aten.permute.default, s.x, [0, 1, 2, 3]), 2), "whole"),
        Row(aten.im2col.default, lambda s: s(s.image, [1, 2], [1, 1], [0, 0], [1, 2]), grid=(HEIGHT, 2)),
        Row(aten.im2col.default, lambda s: s(s.image, [3, 3], [1, 1], [1, 1], [1, 1]), "whole"),
        Row(aten.im2col.default, lambda s: s(s.image, [2, 2], [1, 1], [0, 0], [1, 1]), "whole"),
        Row(aten.col2im.default, lambda s: s(s.columns, [HEIGHT, 2 * WIDTH], [1, 2], [1, 1], [0, 0], [1, 2])),
        Row(aten.col2im.default, lambda s: s(s.columns, [4, 3], [2, 1], [1, 1], [0, 0], [1, 1]), "whole", batches=()),
        *[Row(op, lambda s: s(wide(s), [2], [2])) for op in pools],
        *[Row(op, lambda s: s(s.columns, [3], [1], [1]), "whole") for op in pools],
        *[Row(op, lambda s: s(s.image, [2, 2], [2, 2]), "whole") for op in squares],
        *[Row(op, lambda s: s(s.image, [3, 3], [1, 1], [1, 1]), "whole") for op in squares],
        *[Row(op, lambda s: s(s.x, [1, 2], [1, 2]), "whole") for op in squares],
        *[Row(op, lambda s: s(deep(s), [3, 1, 1], [1, 1, 1]), "whole") for op in cubes],
        Row(aten.adaptive_avg_pool1d.default, lambda s: s(wide(s), [2])),
        Row(aten.adaptive_avg_pool1d.default, lambda s: s(s.columns, [3]), "whole"),
        Row(aten.adaptive_avg_pool2d.default, lambda s: s(s.image, [1, 1]), "whole"),
        Row(aten.adaptive_avg_pool3d.default, lambda s: s(deep(s), [1, 1, 1]), "whole"),
        Row(aten.upsample_linear1d.vec, lambda s: s(wide(s), [12], False, None)),
        Row(aten.upsample_linear1d.vec, lambda s: s(s.columns, [24], False, None), "whole"),
        Row(aten.upsample_linear1d.vec, lambda s: s(s.columns, [18], False, None), "whole"),
        *[Row(op, lambda s: s(s.image, None, False, [2.0, 2.0]), "whole") for op in smooth],
        *[Row(op, lambda s: s(s.image, [6, 5], False), "whole") for op in smoother],
        *[
            Row(aten.silu.default, lambda s, op=op: s(s.also(op, s.image, [2 * HEIGHT, 3 * WIDTH], True, None)))
            for op in (*smooth, *smoother)
        ],
        Row(aten.upsample_trilinear3d.vec, lambda s: s(deep(s), [3, 6, 8], False, None), "whole"),
        Row(aten.upsample_nearest1d.vec, lambda s: s(s.columns, None, [2.0])),
        Row(aten.upsample_nearest1d.vec, lambda s: s(s.columns, [18], None), "whole"),
        Row(aten.upsample_nearest1d.vec, lambda s: s(s.columns, None, [8.0])),  # the largest factor
        Row(aten.upsample_nearest1d.vec, lambda s: s(s.columns, None, [9.0]), "whole"),
        Row(aten.upsample_nearest2d.vec, lambda s: s(s.image, None, [8.0, 8.0])),
        *[
            Row(aten.upsample_nearest2d.vec, lambda s, factors=factors: s(s.image, None, factors), "whole")
            for factors in ([9.0, 1.0], [1.0, 16.0])
        ],
        Row(aten.upsample_nearest3d.vec, lambda s: s(deep(s), None, [2.0, 9.0, 1.0]), "whole"),
        Row(aten.upsample_nearest2d.vec, lambda s: s(s.image, None, [2.0, 3.0])),
        Row(aten.upsample_nearest2d.vec, lambda s: s(s.image, [4, 6], None), "whole"),
        Row(aten.upsample_nearest3d.vec, lambda s: s(deep(s), [6, 6, 8], None)),
        Row(aten._upsample_nearest_exact1d.default, lambda s: s(s.columns, [24], 2.0)),
        Row(aten._upsample_nearest_exact1d.default, lambda s: s(s.columns, [6]), "whole"),
        Row(aten._upsample_nearest_exact2d.default, lambda s: s(s.image, [HEIGHT, 3 * WIDTH], 1.0, 3.0)),
        Row(aten._upsample_nearest_exact2d.default, lambda s: s(s.image, [4, 6]), "whole"),
        Row(aten._upsample_nearest_exact3d.default, lambda s: s(deep(s), [6, 6, 8])),
        Row(aten._upsample_nearest_exact3d.default, lambda s: s(deep(s), [1, 1, 1]), "whole"),
        *[Row(op, lambda s: s(s.tokens, None, -1)) for op in fft1],
        *[Row(op, lambda s: s(s.tokens, None, 1), "whole") for op in fft1],
        *[Row(op, lambda s: s(s.pairs, None, [-2, -1])) for op in fft2],
        *[Row(op, lambda s: s(s.image), "whole") for op in fft2],
        *[Row(op, lambda s: s(s.pairs, None, [2])) for op in fftn],
        *[Row(op, lambda s: s(s.pairs), "whole") for op in fftn],
        Row(aten.one_hot.default, lambda s: s(s.classes, CHANNELS)),
        Row(aten.select_scatter.default, lambda s: s(s.tokens, s.given(s.batch, n), -1, 2)),
        Row(aten.select_scatter.default, lambda s: s(s.tokens, s.given(s.batch, c), 1, 2), "whole"),
        Row(
            aten.select_scatter.default,
            lambda s: s(s.tokens, s.also(aten.select.int, shifted(s), -1, 0), -1, 2),
            "whole",
        ),
        Row(
            aten.select_scatter.default,
            lambda s: s(shifted(s), s.also(aten.select.int, s.tokens, -1, 0), -1, 2),
            "whole",
        ),
        Row(aten.argsort.default, lambda s: s(s.tokens, -1)),
        Row(aten.argsort.default, lambda s: s(s.tokens, 1), "whole"),
        Row(aten.argsort.stable, lambda s: s(s.tokens, stable=True, dim=2)),
        Row(
            aten._native_batch_norm_legit_no_training.default,
            lambda s: s.pieces(
                s.tokens, s.given(n), s.given(n), s.given(n), s.constant(torch.ones(n).double()), 0.1, 1e-5
            ),
            "whole",
        ),
        Row(
            aten._native_batch_norm_legit_no_training.default,
            lambda s: s.pieces(
                s.columns, s.given(c), s.given(c), s.given(c), s.constant(torch.ones(c).double()), 0.1, 1e-5
            ),
        ),
    ]


TABLE = [
    row
    for family in (
        views,
        pointwise,
        concatenation,
        contraction,
        convolution,
        attention,
        indexing,
        reduction,
        resampling,
    )
    for row in family()
]


def name(row: Row) -> str:
    return f"{str(row.target).removeprefix('aten.')}-{row.says.split()[0]}"


def staged(row: Row, batch: int) -> tuple[Stage, fx.Graph]:
    stage = Stage(row.target, batch)
    made = row.build(stage)
    stage.emit.graph.output((stage.x, *(made if isinstance(made, list) else [made])))
    assert stage.tried is not None and stage.tried.target is row.target
    return stage, stage.emit.graph


def analysed(stage: Stage, graph: fx.Graph) -> Analysis:
    return propagate(graph, stage.latent, Frame.of(stage.latent.meta["val"].shape))


def values_of(
    graph: fx.Graph, inputs: list[Tensor], change: Callable[[fx.Node, Any], Any] = lambda _, v: v
) -> dict[fx.Node, Any]:
    """The value of every node, each one passed through ``change`` before others use it."""
    given, env = iter(inputs), {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = next(given)
        elif node.op == "output":
            continue
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            value = node.target(*args, **kwargs)
        env[node] = change(node, value)
    return env


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, (tuple, list)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            same(a, b)
    else:
        if getattr(found, "dtype", None) == torch.float8_e4m3fn:
            found, wanted = found.float(), wanted.float()
        # a product of float8 is summed in float32, in an order of the processor's own
        close = 1e-6 if getattr(wanted, "dtype", None) == torch.float32 else 1e-10
        torch.testing.assert_close(found, wanted, rtol=close, atol=close)


def sparse_form(value: Any, out: Any, frame: Frame, rows: Tensor) -> Any:
    """What the sparse program has in place of a value."""
    if isinstance(out, tuple):
        return tuple(sparse_form(v, o, frame, rows) for v, o in zip(value, out, strict=True))
    return value if out is None else rows_of(value, out, frame, rows)


def check_steps(analysis: Analysis, env: dict[fx.Node, Any], rows: Tensor, defined: bool = True) -> None:
    """The oracle: for every step, the rewritten op on rows gives the rows of the op on whole operands."""
    frame, layouts = analysis.frame, analysis.layouts
    for node, step in analysis.steps.items():
        if node.target is operator.getitem:
            continue
        target, args, kwargs = (
            step.rewrite(Sizes(frame, rows.shape[1])) if step.rewrite else (node.target, node.args, node.kwargs)
        )
        uses = iter(step.uses)

        def form(operand: fx.Node, uses: Any = uses) -> Any:
            use, layout = next(uses), layouts.get(operand)
            if isinstance(use, Gather):
                assert layout is None, "only a dense operand is gathered"
                return rows_of(env[operand], use.layout, frame, rows)
            assert (use is Use.SAME) == (layout is None)
            return rows_of(env[operand], layout, frame, rows) if use is Use.ROWS else env[operand]

        args, kwargs = fx.node.map_arg((args, kwargs), form)
        assert not list(uses), "one use per operand that takes part"
        if step.whole:
            assert all(use in (Use.WHOLE, Use.SAME) for use in step.uses)
        else:
            found, wanted = target(*args, **kwargs), sparse_form(env[node], step.out, frame, rows)
            same(found, wanted) if defined else same(found.shape, wanted.shape)


def check_programs(analysis: Analysis, inputs: list[Tensor], latent: int, rows: Tensor) -> None:
    """Both programs end to end: a sparse step equals the dense graph with inactive rows from the caches at each splice."""
    splices = plan(analysis)
    results = list(dense_program(analysis, splices)(*inputs))
    count = len(analysis.output_nodes)
    outputs, left = results[:count], iter(results[count:])
    where = {node: index for index, node in enumerate(analysis.output_nodes)}
    caches = [(outputs[where[s.node]] if s.is_output else next(left)).clone() for s in splices.splices]
    fresh = [torch.randn_like(value) if index == latent else value for index, value in enumerate(inputs)]
    kept = {s.node: (s.layout, cache.clone()) for s, cache in zip(splices.splices, caches, strict=True)}

    def overwrite(node: fx.Node, value: Any) -> Any:
        if node not in kept:
            return value
        layout, cache = kept[node]
        return spliced(cache, rows_of(value, layout, analysis.frame, rows), layout, analysis.frame, rows)

    env = values_of(analysis.graph, fresh, overwrite)
    others = iter(sparse_program(analysis, rows.shape[1], splices)(*fresh, rows, *caches))
    for index, node in enumerate(analysis.output_nodes):
        same(caches[splices.splice(node)] if index in analysis.outputs else next(others), env[node])


@pytest.mark.parametrize(
    ("row", "batch"), [pytest.param(row, batch, id=f"{name(row)}-{batch}") for row in TABLE for batch in row.batches]
)
def test_rule(row: Row, batch: int):
    stage, graph = staged(row, batch)
    says = row.answer(batch)
    inputs = stage.values
    latent = graph.find_nodes(op="placeholder").index(stage.latent)
    if says not in ("rows", "apart", "whole"):
        with pytest.raises(UnsupportedGraph, match=says):
            analysis = analysed(stage, graph)
            sparse_program(analysis, 1)
        return
    analysis = analysed(stage, graph)
    step = analysis.steps[stage.tried]
    carries = any(step.out) if isinstance(step.out, tuple) else step.out is not None
    assert ("whole" if step.whole else "rows" if carries else "apart") == says
    samples = (batch,) if row.pooled and batch > 1 else ()
    assert analysis.frame.grid == (*samples, *(row.grid or (HEIGHT, WIDTH)))
    env = values_of(graph, inputs)
    for active in (1, analysis.frame.tokens - 1):
        check_steps(analysis, env, random_rows(analysis.frame, active, seed=active), row.defined)
    if row.defined and batch == row.batches[-1]:
        check_programs(analysis, inputs, latent, random_rows(analysis.frame, 2))


# Ops whose rule has no row here, and why not.
NO_ROW: dict[Callable, str] = {
    **dict.fromkeys((*COLLECTIVES, *WAIT), "needs several processes: tests/contract/test_across.py"),
    **dict.fromkeys(KERNELS[:2], "runs on a GPU; the last of these kernels has rows"),
}


def test_every_rule_has_a_row():
    tried = {row.target for row in TABLE}
    assert not [str(op) for op in RULES if op not in tried and op not in NO_ROW]
    assert not [row.target for row in TABLE if rule_of(row.target) is None and not is_pointwise(row.target)]


def test_every_rule_that_can_refuse_has_a_row_for_it():
    """A rule that only ever says "rows" mixes nothing: it is pointwise or a view."""
    answers: dict[Callable, Counter] = {}
    for row in TABLE:
        answers.setdefault(rule_of(row.target), Counter())[row.says] += 1
    free = {
        "pointwise",
        "copies",
        "like_first",
        "constant_like",
        "unsqueeze",
        "squeeze",
        "permute",
        "expand",
        "repeat",
        "one_hot",
        "view_as_real",
        "new_constant",
    }
    assert {rule.__name__ for rule, says in answers.items() if rule and len(says) == 1 and "rows" in says} <= free


def test_the_rule_that_the_docs_show_is_the_one_there_is():
    text = (Path(__file__).parents[3] / "docs" / "adding.md").read_text()
    shown = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert inspect.getsource(RULES[aten.flip.default]).strip() in shown
    rows = re.findall(r"Row\(aten.flip.default, .*\),  #", next(block for block in shown if "Row(" in block))
    table = Path(__file__).read_text()
    assert len(rows) == 3 and all(row.removesuffix("  #") in table for row in rows)
