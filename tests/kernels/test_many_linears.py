"""`many_linears`: each member's linear, on a CPU, under the Triton interpreter, and on a GPU."""

import importlib
import importlib.util
import math
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ras_compile.kernels import many_linears, many_linears_reference, many_pays
from ras_compile.kernels.tiles import timings

module = importlib.import_module("ras_compile.kernels.many_linears")
choice = importlib.import_module("ras_compile.kernels.choice")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def one_launch(request, monkeypatch, tmp_path):
    """Where the kernel should run, the eager twin must not: the tests would then prove nothing."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    twin = "twin" in request.node.name
    if (INTERPRETED or parameters.get("device") == "cuda") and not twin:
        monkeypatch.setattr(module, "many_linears_reference", None)
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    if parameters.get("device") == "cuda":  # many sizes: only the tests that are CUDA's own time the tiles
        monkeypatch.setattr(module.ManyLaunch, "fastest", lambda launch: list(launch.tiles().values())[-1])


def draw(lead, K, Ns, dtype=torch.float32, device="cpu", biased=lambda g: True):
    """x [*lead, K], weights [N, K] and biases [N]."""
    x = torch.randn(*lead, K, device=device).to(dtype)
    weights = [(torch.randn(N, K, device=device) * K**-0.5).to(dtype) for N in Ns]
    biases = [torch.randn(N, device=device).to(dtype) if biased(g) else None for g, N in enumerate(Ns)]
    return x, weights, biases


def check(x, weights, biases):
    """Against the linears in float64: one rounding, and the order of a sum in fp32."""
    results = many_linears(x, weights, biases)
    assert len(results) == len(weights)
    unit = torch.finfo(x.dtype).eps
    for result, weight, bias in zip(results, weights, biases, strict=True):
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert result.shape == want.shape and result.dtype == x.dtype and result.is_contiguous()
        assert ((result.double() - want).abs() <= unit * want.abs() + 4e-6 * want.abs().max()).all()
    memories = {result.untyped_storage().data_ptr() for result in results}
    assert len(memories) == len(results), "each owns its memory"


SIZES = {
    "blocks alike": ((2,), 48, [96] * 3),
    "odd sizes": ((3,), 37, [65, 1, 30]),
    "one row": ((), 70, [33, 40]),
    "three dimensions": ((2, 1), 64, [64, 32]),
    "sixteen rows": ((2, 8), 33, [50, 7]),
    "one alone": ((4,), 16, [10]),
    "more than one launch": ((2,), 17, [3 + g % 5 for g in range(70)]),
}


@DEVICES
@DTYPES
@pytest.mark.parametrize("biased", ["all", "none", "some"])
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_linears(device, dtype, biased, name):
    has = {"all": lambda g: True, "none": lambda g: False, "some": lambda g: g % 2 == 1}[biased]
    check(*draw(*SIZES[name], dtype, device, has))


@DEVICES
def test_any_strides_of_the_input(device):
    x, weights, biases = draw((4,), 40, [30, 20], device=device)
    wide = torch.randn(4, 80, device=device)
    for given in (x.t().contiguous().t(), x[:1].expand(4, 40), wide[:, ::2], wide[:, 40:], x[::2]):
        check(given, weights, biases)


@DEVICES
def test_a_changed_weight_is_seen(device):
    x, weights, biases = draw((2,), 40, [30, 20], device=device)
    before = many_linears(x, weights, biases)
    with torch.no_grad():
        weights[1].mul_(2)
    after = many_linears(x, weights, biases)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    check(x, weights, biases)


@DEVICES
@pytest.mark.parametrize("case", ["float64", "seventeen rows", "a transposed weight", "a strided bias", "no rows"])
def test_the_twin_runs(device, case, monkeypatch):
    """What the kernel does not take."""
    monkeypatch.setattr(module.ManyLaunch, "__call__", None)
    dtype = torch.float64 if case == "float64" else torch.float32
    lead = {"seventeen rows": (17,), "no rows": (0,)}.get(case, (2,))
    x, weights, biases = draw(lead, 24, [24, 10], dtype, device)
    if case == "a transposed weight":
        weights[0] = weights[0].t()
    if case == "a strided bias":
        biases[0] = torch.randn(48, device=device)[::2]
    assert not many_pays(x, weights, biases)
    if case == "no rows":
        assert [result.shape for result in many_linears(x, weights, biases)] == [(0, 24), (0, 10)]
    else:
        check(x, weights, biases)


def test_the_twin_takes_none():
    assert many_linears(torch.randn(2, 3), [], []) == many_linears_reference(torch.randn(2, 3), [], []) == []


@DEVICES
def test_opcheck(device):
    given = draw((2, 1), 33, [40, 9], device=device, biased=lambda g: g == 0)
    torch.library.opcheck(torch.ops.ras_compile.many_linears.default, given)
    with FakeTensorMode() as mode:
        results = many_linears(*tree_map_only(torch.Tensor, mode.from_tensor, given))
    assert [(result.shape, result.stride()) for result in results] == [
        ((2, 1, 40), (40, 40, 1)),
        ((2, 1, 9), (9, 9, 1)),
    ]


def test_flops_are_those_of_the_linears():
    with FlopCounterMode(display=False) as counter, FakeTensorMode():
        many_linears(torch.empty(2, 3, 10), [torch.empty(4, 10), torch.empty(7, 10)], [None, torch.empty(7)])
    assert counter.get_total_flops() == 2 * 6 * 10 * (4 + 7)


BAD = {
    "a bias or None for each weight": lambda x, w, b: (x, w, b[:1]),
    r"bias \[10\]": lambda x, w, b: (x, w, [b[1], b[0]]),
    r"x \[2, 23\]": lambda x, w, b: (x[:, :23], w, b),
    r"weight \[24\]": lambda x, w, b: (x, [w[0][0], w[1]], b),
    "one dtype and device; given: torch.float32 on cpu, torch.float16": lambda x, w, b: (x, [w[0].half(), w[1]], b),
    "torch.float64 on cpu": lambda x, w, b: (x, w, [b[0], b[1].double()]),
    "on meta": lambda x, w, b: (x.to("meta"), w, b),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=f"many_linears: .*{message}"):
        many_linears(*BAD[message](*draw((2,), 24, [30, 10])))


def test_pays_where_it_is_not_slower(monkeypatch):
    """One question for members of each size, whatever their order."""
    asked, times = [], {}

    def remembered(key, device, measure):
        asked.append((key, measure.args[1]))
        return times["now"]

    monkeypatch.setattr(choice, "remembered", remembered)
    with FakeTensorMode():
        x, weights, biases = draw((2,), 48, [96, 32, 96, 96], torch.bfloat16, "cuda", lambda g: g != 3)
        for now, answer in {(1.0, 2.0): True, (2.0, 2.0): True, (2.1, 2.0): False, None: False}.items():
            times["now"] = now
            assert many_pays(x, weights, biases) is answer
            assert many_pays(x, weights[::-1], biases[::-1]) is answer
        assert len({key for key, _ in asked}) == 1 and asked[0][1] == {(96, True): 2, (32, True): 1, (96, False): 1}
        assert not many_pays(x, weights[:1] * 3, biases[:1] * 3) and len({key for key, _ in asked}) == 2


def test_no_more_is_measured_than_needed(monkeypatch):
    """Of each size as large a share of the members, at least one."""
    made = []

    class Launch:
        def __init__(self, x, weights, biases):
            made.append(
                sorted((weight.shape[0], bias is not None) for weight, bias in zip(weights, biases, strict=True))
            )

        def fastest(self):
            return None

    monkeypatch.setattr(choice, "ManyLaunch", Launch)
    monkeypatch.setattr(choice, "milliseconds", lambda run: 1.0)
    x, sizes = torch.randn(2, 10), Counter({(8, True): 12, (4, False): 8, (2, True): 1})
    assert choice.measure_many(x, sizes) == (math.inf, 1.0)
    monkeypatch.setattr(choice, "MEASURED_BYTES", sum(N * count for (N, _), count in sizes.items()) * 10 * 4 // 4)
    choice.measure_many(x, sizes)
    assert made == [sorted(sizes.elements()), [(2, True)] + [(4, False)] * 2 + [(8, True)] * 3]


def test_this_file_under_the_triton_interpreter(run_interpreted):
    run_interpreted(__file__)


class TestOnCUDA:
    pytestmark = ON_CUDA

    def given(self, members=6, dtype=torch.bfloat16):
        return draw((2,), 1536, [9216] * members + [3072], dtype, "cuda")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_real_sizes_are_timed_and_right(self, dtype, monkeypatch):
        monkeypatch.setattr(module, "many_linears_reference", None)
        check(*self.given(dtype=dtype))

    def test_measured_once_and_for_all_processes(self, monkeypatch):
        ran, real = [], choice.measure_many
        monkeypatch.setattr(choice, "measure_many", lambda *sizes: ran.append(sizes) or real(*sizes))
        given = self.given()
        answer = many_pays(*given)
        timings.cache_clear()  # as a new process
        assert many_pays(*given) is answer and len(ran) == 1
        monkeypatch.setattr(importlib.import_module("ras_compile.kernels.tiles"), "milliseconds", None)
        many_linears(*given)  # finds the tile that was measured

    def test_a_cuda_graph_replays_on_a_new_input(self):
        x, weights, biases = self.given()
        many_linears(x, weights, biases)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = many_linears(x, weights, biases)
        x.copy_(torch.randn_like(x))
        weights[3].copy_(torch.randn_like(weights[3]))
        graph.replay()
        for result, wanted in zip(results, many_linears_reference(x, weights, biases), strict=True):
            torch.testing.assert_close(result, wanted, rtol=2**-7, atol=1e-2)
