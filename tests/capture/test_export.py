"""What stands in a graph of Dynamo beside its ops, and what is left of a capture that fails."""

from __future__ import annotations

from operator import getitem

import pytest
import torch
from contract import error, subject
from torch import fx, nn

import ras_compile
from ras_compile import UnsupportedGraph
from ras_compile.capture.export import capture, refuse_effects


class Plain(nn.Module):
    """`[B, N, C] -> [B, N, C]`: two layers of attention. The classes below say the same in other words."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 24) for _ in range(2)])

    def forward(self, x):
        x = x[None][0]
        for layer in self.layers:
            x = self.layer(x, layer)
        return x

    def layer(self, x, layer):
        return x + nn.functional.scaled_dot_product_attention(*layer(x).chunk(3, -1))


class InInferenceMode(Plain):
    def forward(self, x):
        with torch.inference_mode():
            return super().forward(x)


class Checkpointed(Plain):
    def layer(self, x, layer):
        return torch.utils.checkpoint.checkpoint(super().layer, x, layer, use_reentrant=False)


class OneRegion(Plain):
    @torch.compiler.nested_compile_region
    def layer(self, x, layer):
        return super().layer(x, layer)


@pytest.mark.parametrize("kind", [InInferenceMode, Checkpointed, OneRegion])
def test_what_changes_no_value_is_left_out(kind):
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    model = kind().double().eval()
    case = subject(model, {"x": x})
    plain = subject(Plain().double().eval(), {"x": x})
    ops = [
        [node.target for node in made.plan.captured.graph.nodes if node.op == "call_function"] for made in (case, plain)
    ]
    assert ops[0] == ops[1]
    with torch.no_grad():
        assert error(case.dense(case.values)[0], [model(x)]) < 1e-12


class Float(Plain):
    """The timestep is a Python number, and fills a tensor."""

    def __init__(self, fill) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x, timestep):
        return super().forward(x + self.fill(x, timestep)[:, None, None])


FILLS = {
    "full": lambda x, t: torch.full((len(x),), t),
    "full of a dtype": lambda x, t: torch.full((len(x),), t, dtype=x.dtype, device=x.device),
    "full_like": lambda x, t: torch.full_like(x[:, 0, 0], t),
    "new_full": lambda x, t: x.new_full((len(x),), t),
}


@pytest.mark.parametrize("fill", FILLS)
def test_a_tensor_is_filled_with_a_python_number(fill):
    """One graph serves every value: the second call's (the first one's value is a constant) and all that follow."""
    model = Float(FILLS[fill]).eval()
    options = {
        "inner_backend": "eager",
        "unsupported": "error",
        "sample_ratio": 1.0,
        "warmup_steps": 2,
        "reset_interval": None,
    }
    compiled = torch.compile(model, backend="ras", options=options)
    x = torch.randn(2, 12, 8)
    with torch.no_grad(), ras_compile.generation() as gen:
        for _ in range(12):  # more than Dynamo would compile
            step = gen.step()
            assert torch.allclose(compiled(x, 1 - step / 20), model(x, 1 - step / 20), rtol=1e-4, atol=1e-5)
    assert "sssss" in "".join(record.kind[0] for record in ras_compile.trace(compiled))


def test_a_capture_that_fails_leaves_no_autocast_behind():
    def fail(value):
        raise AssertionError("no such op")

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, True))
    graph.output((graph.call_function(fail, (graph.call_function(torch.matmul, (x, x)),)),))
    with pytest.raises(UnsupportedGraph, match="cannot be captured: no such op"):
        capture(fx.GraphModule(nn.Module(), graph), [torch.randn(3, 3)])
    assert not torch.is_autocast_enabled("cpu")


SAME = {
    "type_as": lambda x: x.type_as(torch.ones(1)),
    "dropout": lambda x: nn.functional.dropout(x, 0.1, training=False),
    "alpha_dropout": lambda x: nn.functional.alpha_dropout(x),
    "nn.Dropout2d": lambda x: nn.Dropout2d(0.3).eval()(x),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, torch.ones(1))[0],
    "to": lambda x: x.to(torch.ones(1)),
    "contiguous": lambda x: x.contiguous(),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, False),
    "torch.dropout by name": lambda x: torch.dropout(x, p=0.5, train=False),
    "sum_to_size": lambda x: x.sum_to_size(x.shape),
    "sum_to_size of numbers": lambda x: x.sum_to_size(*x.shape),
    "atleast_3d": lambda x: torch.atleast_3d([x, x])[0],
    "meshgrid": lambda x: torch.meshgrid(x.flatten(), indexing="ij")[0].view(x.shape),
    "einsum": lambda x: torch.einsum("abcd -> bacd", x).transpose(0, 1),
    "einsum of a list": lambda x: torch.einsum("...d->d...", [x]).movedim(0, -1),
}


@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("written", [0, 1])
def test_a_result_that_is_the_operand(same, written):
    """What is written into the one is seen in the other."""

    def model(x):
        x = x + 1
        both = x, SAME[same](x)
        both[written].mul_(3)
        return both[0] + both[1].sin()

    def backend(graph, inputs):
        return lambda *given: capture(graph, given)(*given)

    x = torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))


class Within(Plain):
    """Another type than the trace follows, cast back behind it."""

    def forward(self, x, enabled=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = x @ torch.eye(8)
        return super().forward(x + y.float())


@pytest.mark.parametrize("enabled", [True, False])
def test_a_cast_behind_autocast_inside_of_a_model_is_refused(enabled):
    """The trace does not enter the region, and would leave the cast out; where the region changes no type it is followed."""

    def backend(graph, inputs):
        return lambda *given: capture(graph, given)(*given)

    x, model = torch.randn(2, 12, 8), Within().eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        if enabled:
            with pytest.raises(UnsupportedGraph, match="makes a value torch.bfloat16 that is cast to torch.float32"):
                compiled(x)
        else:
            torch.testing.assert_close(compiled(x, False), model(x, False))


class Inverse(Plain):
    """What checks values has effects, by which it is ordered."""

    def forward(self, x, camera):
        turned = torch.linalg.solve(camera, torch.linalg.inv(camera)).flatten(1)[:, None, :8]
        return super().forward(x + turned)


def test_checks_of_values_are_left_out():
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    model, camera = Inverse().double().eval(), torch.eye(3, dtype=torch.float64) + torch.rand(2, 3, 3).double() / 9
    case = subject(model, {"x": x, "camera": camera})
    with torch.no_grad():
        assert error(case.dense(case.values)[0], [model(x, camera)]) < 1e-12
    assert "check" not in str(case.plan.captured.graph)


class Drawn(Plain):
    """Adds random numbers of a generator that it makes anew in each call, or of one that it holds."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0) if held else None

    def forward(self, x):
        generator = self.generator or torch.Generator().manual_seed(0)
        return super().forward(x + torch.rand(8, generator=generator))


@pytest.mark.parametrize("held", [False, True])
def test_a_generator_of_the_model_is_refused_by_its_line(held):
    """Captured, the one that is made anew would go on from step to step."""
    x, options = torch.randn(2, 12, 8), {"inner_backend": "eager"}
    with torch.no_grad():
        with pytest.raises(UnsupportedGraph, match=r"a Generator that the model.*\[at: .*torch\.rand\(8, generator="):
            torch.compile(Drawn(held), backend="ras", options={**options, "unsupported": "error"})(x)
        compiled = torch.compile(Drawn(False), backend="ras", options=options)
        for _ in range(2):
            assert torch.allclose(compiled(x), compiled._orig_mod(x), rtol=1e-4, atol=1e-5)


def test_an_op_that_has_effects_is_refused():
    graph = fx.Graph()
    token, x = graph.placeholder("token"), graph.placeholder("x")
    both = graph.call_function(torch.ops.higher_order.with_effects, (token, torch.ops.aten.neg.default, x))
    graph.output((graph.call_function(getitem, (both, 0)), graph.call_function(getitem, (both, 1))))
    with pytest.raises(UnsupportedGraph, match="an op that has effects .aten.neg.default"):
        refuse_effects(graph)


class Halves(nn.Module):
    """The second half of its latent's channels is a picture that conditions the first; `[B, 2 C, H, W] -> [B, C, H, W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter, self.qkv, self.leave = nn.Linear(channels, 8), nn.Linear(8, 24), nn.Linear(8, channels)

    def forward(self, x):
        noise, picture = x.chunk(2, 1)
        tokens = self.enter((noise * picture.sigmoid()).flatten(2).transpose(1, 2))
        tokens = tokens + nn.functional.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, -1))
        return self.leave(tokens).transpose(1, 2).reshape(noise.shape)


@pytest.mark.parametrize(("channels", "side"), [(4, 4), (8, 4), (8, 16), (64, 16)])
def test_channels_are_no_tokens_at_any_size(channels, side):
    """Nor where they are many, and the pixels few."""
    model = Halves(channels).double().eval()
    x = torch.randn(2, 2 * channels, side, side, dtype=torch.float64)
    assert subject(model, {"x": x}).plan.analysis.frame.tokens == side * side
