"""The contract through Inductor: fp32 at 1e-4 on any device, bf16 within 1.5 times the dense program's own error.

A few models on the CPU, where compiling takes long; every model of the list on a GPU, with the fused kernels.
"""

from __future__ import annotations

import pytest
import torch
from contract import Subject, active_mask, error, subject
from handwritten import MODELS as HANDWRITTEN
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from zoo import ZOO, redraw

import ras_compile.execute.inner
import ras_compile.kernels
import ras_compile.plans.plan
from ras_compile.backend import ras

FP32 = 1e-4
MODELS = ["SD3", "SD3.5", "DiT", "PixArt", "Lumina-Next", "Flux", "AuraFlow", "Wan"]
CASES = [pytest.param(name, "cpu", id=f"{name}-cpu") for name in ("SD3.5", "Wan")] + [
    pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in MODELS
]


def moved(value, device: str, dtype: torch.dtype):
    """Inputs on a device; floating tensors in ``dtype``, complex ones in single precision."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return {key: moved(item, device, dtype) for key, item in value.items()} if isinstance(value, dict) else value


def made(name: str, device: str, dtype: torch.dtype, **options) -> Subject:
    torch.manual_seed(0)
    torch._dynamo.reset()
    case = ZOO[name]
    module = redraw(case.build()).eval().to(device, dtype)
    return subject(module, moved(case.inputs(), device, dtype), latent=case.latent, exact=False, **options)


def quarter(model: Subject) -> int:
    return max(1, model.frame.tokens // 4)


@pytest.mark.parametrize(("name", "device"), CASES)
def test_contract_in_fp32(name: str, device: str):
    model = made(name, device, torch.float32, inner_backend="inductor")
    dense, caches = model.dense(model.values)
    assert error(dense, model.reference(model.values)) < FP32
    rows, latent = model.rows(quarter(model)).to(device), model.other_latent()
    values = model.with_latent(latent)
    consistent, after = model.sparse(model.values, rows, caches)
    assert error(consistent, dense) < FP32
    assert error(after, caches) < FP32
    outputs, _ = model.sparse(values, rows, caches)
    assert error(outputs, model.oracle(values, rows, caches)) < FP32
    analysis = model.plan.analysis
    read = active_mask(analysis.frame.layout(), model.frame, rows.cpu()).to(device)
    elsewhere, _ = model.sparse(model.with_latent(torch.where(read, latent, latent + 1)), rows, caches)
    for index in analysis.outputs:
        mask = active_mask(analysis.layouts[analysis.output_nodes[index]], model.frame, rows.cpu()).to(device)
        assert torch.equal(outputs[index][~mask], dense[index][~mask])
        assert torch.equal(elsewhere[index], outputs[index])
    everything = torch.arange(model.frame.tokens, device=device).repeat(model.frame.samples, 1)
    assert error(model.sparse(values, everything, caches)[0], model.reference(values)) < FP32


@pytest.mark.parametrize(
    ("device", "inner", "started"), [("cuda", "inductor", 1), ("cpu", "inductor", 0), ("cuda", "eager", 0)]
)
def test_compile_workers_start_with_the_graph(monkeypatch, device: str, inner: str, started: int):
    """Before anything is compiled: where they are not up in time, kernels are compiled one after the other."""
    calls = []
    monkeypatch.setattr(ras_compile.execute.inner, "maybe_warm_pool", lambda: calls.append("start"))
    with FakeTensorMode():
        inputs = [torch.empty(1), torch.empty(2, device=device)]
    ras(torch.fx.symbolic_trace(lambda a, b: (a, b)), inputs, options=dict(inner_backend=inner))
    assert len(calls) == started


def test_a_second_start_compiles_nothing(monkeypatch):
    """Programs come from PyTorch's caches on disk, outlined blocks and writes into caches included, and give the same.

    Their sizes are static: no size is made a symbol on the way.
    """

    def start() -> tuple[list[torch.Tensor], int, int]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        case = HANDWRITTEN["bias-free rms norms"]
        model = subject(redraw(case.build()).eval(), case.inputs(), exact=False, inner_backend="inductor")
        with monkeypatch.context() as patch:
            patch.setattr(ShapeEnv, "create_symbol", None)
            _, caches = model.dense(model.values)
            values = model.with_latent(model.other_latent())
            outputs, caches = model.sparse(values, model.rows(quarter(model)), caches)
        found = counters["aot_autograd"]
        return [*outputs, *caches], found["autograd_cache_hit"], found["autograd_cache_miss"]

    with fresh_cache():
        first, hits, misses = start()
        assert (hits, misses) == (0, 2)
        second, hits, misses = start()
        assert (hits, misses) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_contract_in_bf16(name: str):
    """A sparse step is as exact as a dense one: at most 1.5 times its error against fp32."""
    exact = made(name, "cuda", torch.float32)
    model = made(name, "cuda", torch.bfloat16, inner_backend="inductor")
    dense, caches = model.dense(model.values)
    own = error([x.float() for x in dense], exact.reference([_float(v) for v in model.values]))
    latent = model.other_latent()
    everything = torch.arange(model.frame.tokens, device="cuda").repeat(model.frame.samples, 1)
    full, _ = model.sparse(model.with_latent(latent), everything, caches)
    wanted = exact.reference([_float(v) for v in model.with_latent(latent)])
    again, _ = model.dense(model.with_latent(latent))
    bound = 1.5 * max(own, error([x.float() for x in again], wanted))
    assert error([x.float() for x in full], wanted) <= bound
    rows = model.rows(quarter(model)).cuda()
    part, _ = model.sparse(model.with_latent(latent), rows, caches)
    oracle = exact.oracle([_float(v) for v in model.with_latent(latent)], rows, [_float(c) for c in caches])
    assert error([x.float() for x in part], oracle) <= bound


def _float(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.gpu
def test_the_kernel_is_in_the_graph():
    model = made("Flux", "cuda", torch.bfloat16, inner_backend="inductor")
    program = model.plan.build(quarter(model), outline_blocks=False)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "ras_compile.scatter_linear.default" in targets


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in groups"])
@pytest.mark.parametrize("name", ["SD3.5", "Flux", "Wan"])
def test_blocks_with_kernels_are_compiled_once(name: str, grouped: bool, monkeypatch):
    """One compilation for each program: blocks that write through kernels of ours are not refused."""
    compiled = []

    def counting(module, *given, compile_inner=ras_compile.plans.plan.compile_inner):
        blocks = [block for at, block in module.named_children() if at.startswith("repeated_block")]
        compiled.append([str(node.args[0]) for block in blocks for node in block.graph.nodes if node.args])
        return compile_inner(module, *given)

    for place in (ras_compile.execute.inner, ras_compile.plans.plan):
        monkeypatch.setattr(place, "compile_inner", counting)
    monkeypatch.setattr(ras_compile.kernels, "pays", lambda ops: True)
    monkeypatch.setattr(ras_compile.kernels, "pays_grouped", lambda *given: grouped)
    exact = made(name, "cuda", torch.float32)
    model = made(name, "cuda", torch.bfloat16, inner_backend="inductor")
    dense, caches = model.dense(model.values)
    own = error([x.float() for x in dense], exact.reference([_float(v) for v in model.values]))
    rows, values = model.rows(quarter(model)).cuda(), model.with_latent(model.other_latent())
    part, _ = model.sparse(values, rows, caches)
    oracle = exact.oracle([_float(v) for v in values], rows, [_float(c) for c in caches])
    assert error([x.float() for x in part], oracle) <= 1.5 * own
    assert len(compiled) == 2
    if name == "SD3.5":  # in the others the kernels stand beside the blocks, of which there are two at most
        assert f"ras_compile.{'grouped_' * grouped}scatter_linear.default" in compiled[1]
