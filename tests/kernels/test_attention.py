"""`attention`: the eager twin on a CPU, the Triton kernel under the interpreter (a process of its own), and on a GPU."""

import importlib
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ras_compile.kernels import attention, attention_pays, attention_reference
from ras_compile.kernels.tiles import timings

# The package's attribute of this name is the op, which hides the module.
module = importlib.import_module("ras_compile.kernels.attention")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
BULK = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not BULK, reason="needs a CUDA device with bulk loads")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def may(request, monkeypatch, tmp_path):
    """Where the kernel should run, the op must not fall back to the twin: the tests would then prove nothing.

    A test of what the kernel does not take says so: `may["run the twin"] = True`.
    """
    allowed = {"run the twin": False}
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    if INTERPRETED:
        monkeypatch.setattr(module, "processors", lambda device: 3)  # few: programs have shares of several tiles
    if INTERPRETED or request.node.get_closest_marker("gpu"):

        def twin(q, k, v, scale):
            assert allowed["run the twin"] or q.numel() == 0, "the op ran its twin"
            return attention_reference(q, k, v, scale)

        monkeypatch.setattr(module, "attention_reference", twin)
    yield allowed
    timings.cache_clear()


def draw(B, H, Q, N, D, dtype=torch.bfloat16, device="cpu"):
    """Queries with tokens outside of heads, keys and values as a joint cache has them."""
    q = torch.randn(B, Q, H, D, device=device).to(dtype).transpose(1, 2)
    cache = torch.randn(2, B, H, N, D, device=device).to(dtype)
    return q, cache[0], cache[1], D**-0.5


def check(found, q, k, v, scale):
    """Against the definition in float64: weights and values are rounded to the dtype once."""
    weights = torch.softmax(scale * (q.double() @ k.double().mT), -1)
    want = weights @ v.double()
    assert found.shape == want.shape and found.dtype == q.dtype and found.transpose(1, 2).is_contiguous()
    bound = 4 * torch.finfo(q.dtype).eps * (weights @ v.double().abs()) + 1e-6
    assert ((found.double() - want).abs() <= bound).all()


@DEVICES
@DTYPES
@pytest.mark.parametrize(
    ("B", "H", "Q", "N", "D"),
    [
        (1, 1, 1, 1, 16),
        (2, 3, 40, 70, 64),  # keys past the last whole block
        (1, 2, 33, 64, 16),
        (1, 1, 5, 200, 48),  # heads that are no power of two
        (2, 2, 64, 33, 32),
        (1, 5, 7, 16, 8),
    ],
)
def test_equals_the_definition_at_odd_sizes(device, dtype, B, H, Q, N, D):
    given = draw(B, H, Q, N, D, dtype, device)
    check(attention(*given), *given)


@DEVICES
def test_strides(device):
    q, k, v, scale = draw(2, 3, 20, 50, 16, device=device)
    other = k.transpose(1, 2).contiguous().transpose(1, 2), v[:, :, 3:], q[:, :, ::2]
    check(attention(q, other[0], v, scale), q, k, v, scale)
    check(attention(other[2], k[:, :, 3:], other[1], 0.7), other[2], k[:, :, 3:], other[1], 0.7)
    first = [x[:1, :, :1] for x in (q, k, v)]  # dimensions of one entry, whose strides say nothing
    odd = [x.as_strided(x.shape, (3, x.stride(1), 5, 1)) for x in first]
    check(attention(*odd, scale), *first, scale)


@DEVICES
def test_large_scores(device):
    """Scores in the hundreds, all of one sign: the running maximum has to follow them."""
    q, k, v, _ = draw(1, 2, 20, 100, 16, device=device)
    for sign in (1, -1):
        given = (q.abs() * 4 * sign, k.abs() * 4, v, 1.0)
        check(attention(*given), *given)


@DEVICES
def test_what_the_kernel_does_not_take(device, may):
    may["run the twin"] = True
    q, k, v, scale = draw(1, 2, 20, 30, 16, device=device)
    wide = [torch.randn(1, 2, 20, 80, device=device).bfloat16() for _ in range(3)]
    check(attention(*wide, 0.1), *wide, 0.1)
    odd = [torch.randn(1, 2, 21, 12, device=device).bfloat16()[..., 1:11] for _ in range(3)]  # no bulk loads
    check(attention(*odd, 0.3), *odd, 0.3)
    one = k[:, :1].expand(1, 2, 30, 16)
    check(attention(q, one, v, scale), q, one, v, scale)
    double = [tensor.double() for tensor in (q, k, v)]
    torch.testing.assert_close(attention(*double, scale), F.scaled_dot_product_attention(*double, scale=scale))


def test_no_queries():
    q, k, v, scale = draw(1, 2, 20, 30, 16)
    assert attention(q[:, :, :0], k, v, scale).shape == (1, 2, 0, 16)


def test_what_it_takes():
    q, k, v, scale = draw(1, 2, 3, 4, 16)
    with pytest.raises(ValueError, match=r"q must be \[B, H, Q, D\]"):
        attention(q[0], k[0], v[0], scale)
    with pytest.raises(ValueError, match=r"k and v \[B, H, N, D\]"):
        attention(q, k, v[:, :, :3], scale)
    with pytest.raises(ValueError, match=r"given: q \[1, 2, 3, 16\], k \[1, 1, 4, 16\]"):
        attention(q, k[:, :1], v[:, :1], scale)
    with pytest.raises(ValueError, match="share one dtype"):
        attention(q.half(), k, v, scale)
    for no in (0.0, -0.2, float("nan")):
        with pytest.raises(ValueError, match="scale must be positive"):
            attention(q, k, v, no)


@pytest.mark.skipif(INTERPRETED, reason="opcheck runs fake tensors through the kernel's process as well")
def test_as_an_operator():
    torch.library.opcheck(torch.ops.ras_compile.attention.default, draw(1, 2, 3, 4, 16))
    q, k, v, scale = draw(2, 3, 5, 7, 16)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, scale)
    assert counter.get_total_flops() == 2 * 3 * (2 * 5 * 7 * 16 * 2)


def test_asked_on_a_cpu_it_pays_only_where_the_kernel_runs():
    assert attention_pays(draw(1, 2, 3, 4, 16)) is INTERPRETED
    assert not attention_pays(draw(1, 2, 3, 4, 16, torch.float32))


def test_this_file_under_the_triton_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs the kernel")
@pytest.mark.parametrize("BM", [16, 32])
@pytest.mark.parametrize("shares", [0, 1, 2, 7])
def test_every_cut_gives_the_definition(BM, shares, monkeypatch):
    monkeypatch.setattr(module, "INTERPRETER_CUT", module.Cut(BM, 16, 4, 1, shares=shares))
    given = draw(1, 3, 50, 150, 16)
    check(attention(*given), *given)


class TestOnCUDA:
    pytestmark = ON_CUDA

    @DTYPES
    @pytest.mark.parametrize(
        ("B", "H", "Q", "N", "D"), [(2, 24, 512, 4429, 64), (2, 24, 845, 4429, 64), (1, 3, 100, 1000, 40)]
    )
    def test_every_cut_gives_the_definition(self, dtype, B, H, Q, N, D, monkeypatch):
        given = draw(B, H, Q, N, D, dtype, "cuda")
        for cut in module.CUTS:
            monkeypatch.setattr(module.Launch, "fastest", lambda launch, cut=cut: cut)
            for _ in range(3):  # who comes last puts the parts together: not always the same program
                check(attention(*given), *given)

    @pytest.mark.parametrize(("B", "H", "Q", "N", "D"), [(2, 24, 512, 4429, 64), (2, 38, 1357, 4429, 64)])
    def test_real_sizes_are_timed_and_right(self, B, H, Q, N, D, monkeypatch):
        """Also that it is asked with sizes alone whether it pays, and that the op then has its cut."""
        given = draw(B, H, Q, N, D, device="cuda")
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in given]
        assert attention_pays(fake) in (True, False)
        monkeypatch.setattr(importlib.import_module("ras_compile.kernels.tiles"), "milliseconds", None)
        check(attention(*given), *given)

    def test_in_a_graph(self):
        """Replays start from counters of zero."""
        given = draw(2, 5, 100, 700, 64, device="cuda")
        attention(*given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = attention(*given)
        for _ in range(3):
            given[0].normal_()
            graph.replay()
            check(found, *given)
