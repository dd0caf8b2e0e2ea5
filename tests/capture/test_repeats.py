"""Repeated blocks that are captured once: the graph is the one that a capture of the whole gives."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import ras_compile
from ras_compile.capture import export as capturing
from ras_compile.capture.export import capture
from ras_compile.capture.repeats import NotRepeated, block, shortened
from ras_compile.passes.analysis.emit import described


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, scale):
        q, k, v = self.qkv(self.norm(x) * (1 + scale)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """`[B, N, 8] -> [B, N, 8]`: the classes below differ in what repeats."""

    entry: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.entry() for _ in range(5)])

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        for layer in self.blocks:
            x = layer(x, scale)
        return x


class WritingBlock(Block):
    """Writes into what it has made itself."""

    def forward(self, x, scale):
        turned = torch.empty_like(x)
        turned[..., 0::2], turned[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return super().forward(x + turned.mul_(scale), scale)


class Writing(Model):
    entry = WritingBlock


class OutwardBlock(Block):
    def forward(self, x, scale):
        x = super().forward(x, scale)
        x[:, 0].mul_(2)
        return x


class WritingOutside(Model):
    """Writes into what a block returns."""

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        for layer in self.blocks:
            y = layer(x, scale)
            x = y.add_(x) + y
        return x


class InwardBlock(Block):
    """Writes into its operand, which the model has made."""

    def forward(self, x, scale):
        return super().forward(x.mul_(0.5), scale) + x


class WritingInward(Model):
    entry = InwardBlock

    def forward(self, x, time):
        return super().forward(x + 0, time)


class Outward(Model):
    entry = OutwardBlock


class Table(Block):
    """Makes a table of its own in each block."""

    def forward(self, x, scale):
        return super().forward(x + torch.arange(x.shape[1])[:, None] / 7, scale)


class Tables(Model):
    entry = Table


class Several(Model):
    """Two kinds of block, in turns and called from two lines, and lists in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([Block(), Table(), Block()]) for _ in range(3)])

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        skips = []
        for stage in self.stages:
            for layer in stage:
                x = layer(x, scale)
            skips.append(x)
        return super().forward(x + skips[0], time) + skips[1]


class PartBlock(Block):
    """Returns parts of one tensor."""

    def forward(self, x, scale):
        both = torch.cat([super().forward(x.view(x.shape), scale), x], dim=1)
        return both[:, x.shape[1] :], both[:, : x.shape[1]].transpose(1, 2)


class Parts(Model):
    entry = PartBlock

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        for layer in self.blocks:
            old, new = layer(x, scale)
            x = old + new.transpose(1, 2)
        return x


class Carried(Parts):
    """Hands on what a block returned as it is."""

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        for layer in self.blocks:
            x, other = layer(x, scale)
        return x + other.transpose(1, 2)


class Skip(Parts):
    """Takes the second result of one block only."""

    def forward(self, x, time):
        scale, others = time[:, None, None].sin(), []
        for layer in self.blocks:
            x, other = layer(x, scale)
            others.append(other)
        return x + others[2].transpose(1, 2)


class Stacked(Model):
    """What blocks return goes into an op that is spelled out."""

    def forward(self, x, time):
        scale, seen = time[:, None, None].sin(), []
        for layer in self.blocks:
            x = layer(x, scale)
            seen.append(x)
        return x + torch.dstack(seen[1:3])[..., 4:12]


class PairBlock(Block):
    """Returns a tensor and a view of it."""

    def forward(self, x, scale):
        x = super().forward(x, scale)
        return x, x.transpose(1, 2)


class WritingView(Model):
    """Writes into one result of a block, and reads the other, which has the same memory."""

    entry = PairBlock

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        for layer in self.blocks:
            x, turned = layer(x, scale)
            F.leaky_relu(turned, 0.2, True)
        return x


class MiddleBlock(Block):
    """Returns two parts of one tensor, which are not the last thing that it makes."""

    def forward(self, x, scale):
        both = torch.cat([super().forward(x, scale), x], dim=1)
        old, new = both[:, x.shape[1] :], both[:, : x.shape[1]]
        return old, new, new.sin()


class WritingMiddle(Model):
    entry = MiddleBlock

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        for layer in self.blocks:
            old, new, other = layer(x, scale)
            x = old.add_(new) + new + other
        return x


class DroppingBlock(Block):
    """Returns what is one tensor, though Dynamo takes it for two."""

    def forward(self, x, scale):
        x = super().forward(x, scale)
        return x, F.dropout(x, 0.1, training=False), x.sin()


class Dropping(Model):
    entry = DroppingBlock

    def forward(self, x, time):
        scale = time[:, None, None].sin()
        for layer in self.blocks:
            x, dropped, other = layer(x, scale)
            x = x.add_(other) + dropped
        return x


class TurningBlock(Block):
    def forward(self, x, turn):
        pairs = torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn
        real = torch.view_as_real(turn.resolve_conj()).flatten(-2)
        return super().forward(torch.view_as_real(pairs).flatten(-2) + real, 0.5)


class Turning(Model):
    """Turns forth and, by a number that is not conjugated yet, back."""

    entry = TurningBlock

    def forward(self, x, time):
        turn = torch.polar(torch.ones(4), torch.arange(4.0))
        for index, layer in enumerate(self.blocks):
            x = layer(x, turn if index % 2 == 0 else turn.conj())
        return x


class FactorBlock(Block):
    factor = 1

    def forward(self, x, scale):
        return super().forward(x * self.factor, scale)


class Factors(Model):
    """Two kinds of block, which differ in a number."""

    entry = FactorBlock

    def __init__(self) -> None:
        super().__init__()
        for index, layer in enumerate(self.blocks):
            layer.factor = 2 + index % 2


class Different(Model):
    """No two blocks are of one width."""

    def __init__(self) -> None:
        super().__init__()
        for index, layer in enumerate(self.blocks):
            layer.up, layer.down = nn.Linear(8, 16 + index), nn.Linear(16 + index, 8)


class InMode(Model):
    def forward(self, x, time):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x, time).to(x.dtype)


def dynamo(model: nn.Module) -> tuple[fx.GraphModule, list]:
    """Dynamo's graph of a model, and what it is called with."""
    found: list = []

    def backend(graph, inputs):
        return lambda *values: found.append((graph, list(values))) or graph(*values)

    with torch.no_grad():
        torch.compile(model.eval(), backend=backend, fullgraph=True)(torch.randn(2, 12, 8), torch.rand(2))
    (pair,) = found
    return pair


def tensors(values: list) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def words(captured: fx.GraphModule) -> list:
    """A graph without the names of its nodes."""
    places = {node: place for place, node in enumerate(captured.graph.nodes)}

    def named(args):
        return str(fx.node.map_arg(args, lambda node: f"%{places[node]}"))

    return [
        (n.op, n.op == "placeholder" or n.target, named((n.args, n.kwargs)), described(n.meta.get("val")))
        for n in places
    ]


def lines(captured: fx.GraphModule) -> list[str]:
    """The user's source line of each node."""
    return [node.meta.get("stack_trace", "") for node in captured.graph.nodes]


def whole(monkeypatch, graph, values) -> fx.GraphModule:
    def refuse(*given):
        raise NotRepeated("the test wants the whole")

    with monkeypatch.context() as patch:
        patch.setattr(capturing, "by_blocks", refuse)
        return capture(graph, values)


@pytest.mark.parametrize(
    "kind",
    [
        Model,
        Writing,
        Outward,
        WritingOutside,
        WritingView,
        Stacked,
        Turning,
        Tables,
        Parts,
        Carried,
        Skip,
        Several,
        Factors,
    ],
)
def test_blocks_are_captured_once(kind, monkeypatch):
    graph, values = dynamo(kind())
    wanted, traced, real = whole(monkeypatch, graph, values), [], capturing.traced
    monkeypatch.setattr(capturing, "traced", lambda *given: traced.append(real(*given)) or traced[-1])
    captured = capturing.by_blocks(graph, values, tensors(values))
    assert words(captured) == words(capture(graph, values)) == words(wanted)
    assert not captured.graph.find_nodes(op="call_function", target=block._opoverload)
    assert lines(captured) == lines(wanted) and any(lines(wanted))
    kinds = {Several: 3, Factors: 2}.get(kind, 1)
    assert len(traced) == 2 * (1 + kinds), "each time the graph with calls, and a block of each kind"
    torch.testing.assert_close(captured(*values), wanted(*values))


@pytest.mark.parametrize("kind", [WritingInward, WritingMiddle, Dropping, Different, InMode])
def test_other_graphs_are_captured_whole(kind, monkeypatch):
    graph, values = dynamo(kind())
    wanted = whole(monkeypatch, graph, values)
    with pytest.raises((NotRepeated, ras_compile.UnsupportedGraph)):
        capturing.by_blocks(graph, values, tensors(values))
    assert words(capture(graph, values)) == words(wanted)
    with torch.no_grad():
        torch.testing.assert_close(capture(graph, values)(*values), graph(*values))


def test_what_stands_for_a_block_does_not_run():
    graph, values = dynamo(Model())
    short, blocks = shortened(graph)
    assert Counter(node.target for node in short.graph.nodes)[block._opoverload] == 5
    assert [len(found.stretches) for found in blocks] == [5]
    with pytest.raises(NotImplementedError, match="computes nothing"):
        short(*values)
