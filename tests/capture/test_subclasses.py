"""Weights that are no plain tensors: quantised ones as torchao makes them, and as diffusers holds those of GGUF files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ras_compile
from ras_compile.backend import ras
from ras_compile.capture.export import capture
from ras_compile.errors import UnsupportedGraph

OPTIONS = {"inner_backend": "eager", "warmup_steps": 2, "reset_interval": None, "unsupported": "error"}


class Dressed(nn.Parameter):
    """A plain tensor with a scale beside it, which only `as_tensor` takes off; results are dressed again, as GGUF's are."""

    def __new__(cls, data, scale=None):
        self = Tensor._make_subclass(cls, data, False)
        self.scale = float(scale)  # fails on what has lost it
        return self

    def as_tensor(self):
        return Tensor._make_subclass(Tensor, self, False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        scale = next((value.scale for value in args if isinstance(value, cls)), None)
        return cls(result, scale) if isinstance(result, Tensor) else result


class DressedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.as_tensor().to(x.dtype) * self.weight.scale, self.bias)


class Made(Tensor):
    """Integers and their scales, and a product with them."""

    @staticmethod
    def __new__(cls, integers, scales):
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scales.dtype, device=integers.device)

    def __init__(self, integers, scales):
        self.integers, self.scales = integers, scales

    def __tensor_flatten__(self):
        return ["integers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["integers"], inner["scales"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            y = F.linear(x, weight.integers.to(x.dtype)) * weight.scales
            return y if bias is None else y + bias
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(func(args[0].integers), func(args[0].scales))
        raise NotImplementedError(func)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"qkv": nn.Linear(32, 96), "out": nn.Linear(32, 32)}) for _ in "ab"])
        self.time = nn.Linear(1, 32)

    def forward(self, hidden_states, timestep):
        x = self.enter(hidden_states.flatten(2).transpose(1, 2)) + self.time(timestep.reshape(-1, 1, 1))
        for block in self.blocks:
            q, k, v = (part.unsqueeze(1) for part in block["qkv"](x).chunk(3, -1))
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return self.leave(x).transpose(1, 2).reshape(hidden_states.shape)


def linears(model):
    return [(block, name) for block in model.blocks for name in ("qkv", "out")]


def dressed(model):
    for block, name in linears(model):
        old = block[name]
        block[name] = new = DressedLinear(old.in_features, old.out_features)
        new.weight, new.bias = Dressed((old.weight.detach() * 64).round().to(torch.int8), 1 / 64), old.bias
    return model


def made(model):
    for block, name in linears(model):
        integers = (block[name].weight.detach() * 64).round().to(torch.int8)
        scales = torch.full((len(integers),), 1 / 64)
        block[name].weight = nn.Parameter(Made(integers, scales), requires_grad=False)
    return model


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    return model


def by_quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model.blocks, weights=quanto.qint8)
    quanto.freeze(model.blocks)
    return model


def by_bitsandbytes(model):
    layers = pytest.importorskip("bitsandbytes").nn
    for block, name in linears(model):
        old = block[name]
        block[name] = new = layers.Linear4bit(
            old.in_features, old.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.weight = layers.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")._quantize("cpu")
        new.bias = old.bias
    return model


def by_gguf(model):
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0
    for block, name in linears(model):
        old = block[name]
        block[name] = new = utils.GGUFLinear(old.in_features, old.out_features, True, compute_dtype=torch.float32)
        data = torch.from_numpy(gguf.quants.quantize(old.weight.detach().numpy(), kind))
        new.weight, new.bias = utils.GGUFParameter(data, quant_type=kind), old.bias
    return model


def sample(model, steps=5):
    """The noises of one picture, sampled with Euler's steps."""
    x = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    noises = []
    with torch.no_grad():
        for step in range(steps):
            noises.append(model(x, torch.tensor([1 - step / steps])))
            x = x - noises[-1] / steps
    return noises


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("quantised", [dressed, made, by_torchao, by_quanto, by_bitsandbytes, by_gguf])
def test_quantised_weights_run_sparse(quantised):
    """All rows active: the model's own noise; a quarter of them: sparse steps, and the same through Inductor."""

    def sampled(**options):
        compiled = torch.compile(quantised(Model()), backend=ras, options={**OPTIONS, **options})
        noises = sample(compiled)
        assert [record.kind for record in ras_compile.trace(compiled)] == ["dense"] * 2 + ["sparse"] * 3
        return noises

    def same(found, wanted):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    same(sampled(sample_ratio=1.0), sample(quantised(Model())))
    few = sampled(sample_ratio=0.25)
    assert all(torch.isfinite(noise).all() for noise in few)
    same(sampled(sample_ratio=0.25, inner_backend="inductor"), few)


def test_explain_takes_quantised_weights_apart():
    found = ras_compile.explain(made(Model()), hidden_states=torch.randn(1, 4, 4, 6), timestep=torch.ones(1))
    assert not found.reason and found.splices


@pytest.mark.parametrize("quantised", [by_quanto, by_bitsandbytes])
def test_a_product_with_packed_weights_costs_what_the_plain_one_does(quantised):
    given = {"hidden_states": torch.randn(1, 4, 4, 6), "timestep": torch.ones(1)}
    plain, packed = (ras_compile.explain(model, **given).cost for model in (Model(), quantised(Model())))
    assert packed.dense_flops == plain.dense_flops and packed.sparse_flops == plain.sparse_flops


def test_a_value_that_is_lost_is_refused_and_never_compiled():
    """A constant of which only the sizes are left would end the process."""

    def lost(x):
        return x + Tensor(x)  # inside of a function, where the capture does not see it

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(lost, (x,)),))
    with pytest.raises(UnsupportedGraph, match="cannot be followed|cannot be captured"):
        capture(torch.fx.GraphModule(nn.Module(), graph), [torch.ones(2)])
