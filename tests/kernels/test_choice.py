"""Whether a fused op pays: asked with sizes alone, measured once on a device, remembered on disk."""

import contextlib
import importlib
import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ras_compile.kernels import epilogue_reference, grouped_scatter_linear, pays, pays_grouped, scatter_linear
from ras_compile.kernels.arguments import ScatterArguments
from ras_compile.kernels.tiles import timings

choice = importlib.import_module("ras_compile.kernels.choice")
tiles = importlib.import_module("ras_compile.kernels.tiles")
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    yield
    timings.cache_clear()


def site(device, A=300, N=256, K=512, D=64):
    """Arguments of one op with everything in it, as fake tensors."""
    with FakeTensorMode(), torch.device(device):
        half = dict(dtype=torch.bfloat16)
        cache = torch.empty(2, N // D, 1024, D, **half).permute(0, 2, 1, 3)
        x, weight, bias = torch.empty(2, A, K, **half), torch.empty(N, K, **half), torch.empty(N, **half)
        rows = torch.empty(2, A, dtype=torch.int64)
        cos, sin = torch.empty(2, 1, A, D // 2)
        return (cache, x, weight, bias, rows, 1, D, "rms", torch.empty(D), None, 1e-6, "interleaved", cos, sin)


def test_no_kernel_never_pays():
    float64 = tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in site("cpu"))
    assert not pays([float64])


class Operand:
    is_cuda = True


def test_ops_of_one_site_are_weighed_together(monkeypatch):
    times = {"text": (3.0, 2.0), "picture": (5.0, 7.0)}
    ops = {name: (name, Operand(), None, None, None) for name in times}
    monkeypatch.setattr(choice, "runs_kernel", lambda *given: True)
    monkeypatch.setattr(choice, "measured", lambda what, args, measure, count=2: times[args[0][0]])
    assert pays([ops["text"], ops["picture"]]) and pays([ops["picture"]]) and not pays([ops["text"]])
    times["picture"] = None  # it cannot be measured now
    assert not pays([ops["text"], ops["picture"]])


def test_a_group_is_weighed_against_the_best_form_of_each_member(monkeypatch):
    times = {
        ("pays", "keys"): (3.0, 2.0),
        ("pays", "values"): (5.0, 7.0),
        ("linear", "queries"): (1.0,),
        ("grouped", "keys"): (7.9,),
    }
    keys, values, queries = ((name, Operand(), None, None, None) for name in ("keys", "values", "queries"))
    monkeypatch.setattr(choice, "runs_kernel", lambda *given: True)
    monkeypatch.setattr(choice, "measured", lambda what, args, measure, count=2: times[what, args[0][0]])
    assert pays_grouped([[keys], [values]], [queries])  # 7.9 against 2 + 5 + 1
    times["grouped", "keys"] = (8.1,)
    assert not pays_grouped([[keys], [values]], [queries])
    # keys and values fed by one splice go together: 8 fused, 9 not, against 8.1 without the queries
    assert not pays_grouped([[keys, values]])
    times["pays", "keys"] = (4.0, 2.0)
    assert pays_grouped([[keys, values]])
    assert pays_grouped([[keys, values]], [queries])
    for missing in list(times):  # what cannot be measured now
        with monkeypatch.context() as patch:
            patch.setitem(times, missing, None)
            assert not pays_grouped([[keys, values]], [queries])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("inside", [True, False], ids=["norm and rotary embedding", "plain"])
def test_what_a_pass_beats_is_weighed_against_inductor(monkeypatch, inside):
    """Where there is a norm or a rotary embedding: no pass does without what they cost. The answer is right, too."""
    args = choice.real_arguments([ScatterArguments(*(site("cpu") if inside else site("cpu")[:6]))])
    ran, answers = [], []

    def milliseconds(run):
        ran.append(run)
        return answers[len(ran) - 1]

    monkeypatch.setattr(choice, "milliseconds", milliseconds)
    monkeypatch.setattr(choice.Launch, "fastest", lambda launch: "tile")
    for (of_pass, of_inductor), expected in (
        ((6.0, 7.0), (5.0, 6.0)),  # the pass is slower: nothing else is asked
        ((4.0, 7.0), (5.0, 7.0 if inside else 4.0)),
        ((4.0, float("inf")), (5.0, 4.0)),  # Inductor refuses
    ):
        ran[:], answers[:] = [], [5.0, of_pass, of_inductor]
        assert choice.fused_and_plain(args) == expected
    if not inside:
        assert len(ran) == 2
        return
    _, x, weight, bias, _, _, *more = args[0]
    want = epilogue_reference(torch.nn.functional.linear(x, weight, bias), *more)
    torch.testing.assert_close(ran[2](), want, rtol=2**-7, atol=2**-6)


def test_what_is_postponed_gets_an_answer_and_is_not_remembered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tiles, "replayed", lambda run: run())
    device, times = torch.device("cpu"), lambda: (tiles.milliseconds(lambda: 1.5), tiles.milliseconds(lambda: 2.5))
    with tiles.postponed() as noted:
        assert choice.remembered("key", device, times) == (0.0, 0.0) and len(noted) == 1
    assert choice.remembered("key", device, times) == (1.5, 2.5)
    with tiles.postponed() as noted:
        assert choice.remembered("key", device, times) == (1.5, 2.5) and not noted


class TestOnCUDA:
    pytestmark = CUDA

    def test_measured_once_and_for_all_processes(self, monkeypatch):
        ran = []
        real = choice.fused_and_plain
        monkeypatch.setattr(choice, "fused_and_plain", lambda ops: ran.append(ops) or real(ops))
        answer = pays([site("cuda"), site("cuda", A=40)])
        assert len(ran) == 2 and pays([site("cuda"), site("cuda", A=40)]) is answer
        timings.cache_clear()  # as a new process
        assert pays([site("cuda")]) in (True, False) and len(ran) == 2
        assert pays([site("cuda")[:6]]) in (True, False) and len(ran) == 3

    def test_the_op_finds_the_tile_that_was_measured(self, monkeypatch):
        args = site("cuda")
        pays([args])
        monkeypatch.setattr(importlib.import_module("ras_compile.kernels.tiles"), "milliseconds", None)
        (real,) = choice.real_arguments([ScatterArguments(*args)])
        scatter_linear(*real)

    def test_kernels_of_several_choices_are_built_before_one_is_timed(self):
        sites = [site("cuda"), site("cuda", A=40)]
        with tiles.postponed() as noted:
            pays(sites[:1]), pays(sites[1:]), pays_grouped([[args] for args in sites])
        assert len([variants for variants in noted.values() if variants]) >= 3
        assert not tiles.timings(sites[0][1].device).known
        tiles.build(noted)
        with tiles.postponed() as noted:
            pays(sites[:1])
        assert noted, "nothing was timed yet"
        assert pays(sites) in (True, False)

    def test_a_group_is_measured_once(self, monkeypatch):
        ran = []
        real = choice.measure_grouped
        monkeypatch.setattr(choice, "measure_grouped", lambda ops: ran.append(ops) or real(ops))
        keys, text, linear = site("cuda"), site("cuda", A=40), site("cuda")[:6]
        answer = pays_grouped([[keys], [text]], [linear])
        timings.cache_clear()  # as a new process
        assert pays_grouped([[keys], [text]], [linear]) is answer and len(ran) == 1
        monkeypatch.setattr(importlib.import_module("ras_compile.kernels.tiles"), "milliseconds", None)
        members = choice.real_arguments([ScatterArguments(*member) for member in (keys, text, linear)])
        grouped_scatter_linear(*map(list, zip(*members, strict=True)))

    def test_measuring_leaves_the_random_numbers_alone(self):
        """A cold start must not draw another picture than a warm one."""
        before = torch.cuda.get_rng_state(), torch.get_rng_state()
        assert pays([site("cuda")]) in (True, False)
        assert torch.equal(before[0], torch.cuda.get_rng_state()) and torch.equal(before[1], torch.get_rng_state())

    def test_nothing_is_measured_inside_a_capture(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not pays([site("cuda")])
