"""`gather_linear`: the eager twin on a CPU, the Triton kernel under the interpreter (a process of its own), and on a GPU."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ras_compile.kernels import gather_linear, gather_linear_reference, gather_pays
from ras_compile.kernels.tiles import timings

# The package's attribute of this name is the op, which hides the module.
module = importlib.import_module("ras_compile.kernels.gather_linear")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def kernel_is_what_runs(request, monkeypatch, tmp_path):
    """Where the kernel should run, the op must not fall back to the twin: the tests would then prove nothing."""
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    if INTERPRETED or request.node.get_closest_marker("gpu"):

        def twin(x, *others):
            assert x.dtype is torch.float64 or 0 in (x.numel(), others[2].numel()), "the op ran its twin"
            return gather_linear_reference(x, *others)

        monkeypatch.setattr(module, "gather_linear_reference", twin)
    yield
    timings.cache_clear()


def draw(B, A, S, K, N, dtype=torch.float32, device="cpu", bias=True, shared=False):
    """Tokens [B, S, K] with their weight, bias and rows."""
    x = torch.randn(B, S, K, device=device, dtype=dtype)
    weight = (torch.randn(N, K, device=device) * K**-0.5).to(dtype)
    rows = torch.stack([torch.randperm(S, device=device)[:A] for _ in range(1 if shared else B)])
    return x, weight, torch.randn(N, device=device, dtype=dtype) if bias else None, rows


def expected(tokens, weight, bias, rows, table=None):
    """The definition, row by row, in float64; ``tokens`` [B, S, K], ``table`` [B, S, N]."""
    samples = max(len(tokens), len(rows))
    y = torch.empty(samples, rows.shape[1], len(weight), dtype=torch.float64, device=weight.device)
    for b in range(samples):
        for i in range(rows.shape[1]):
            row = rows[b % len(rows), i]
            y[b, i] = weight.double() @ tokens[b % len(tokens), row].double() + (0 if bias is None else bias.double())
            if table is not None:
                y[b, i] += table[b % len(table), row].double()
    return y


def check(found, want, dtype):
    """One rounding to the dtype (the interpreter truncates to bf16; the CPU's linear may round before the sum)."""
    assert found.shape == want.shape and found.dtype == dtype and found.is_contiguous()
    unit, scale = torch.finfo(dtype).eps, want.abs().max()
    bound = (unit / 2 if found.is_cuda else 1.5 * unit) * want.abs() + (2e-6 + (0 if found.is_cuda else unit)) * scale
    assert ((found.double() - want).abs() <= bound).all()


@DEVICES
@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("B", "A", "S", "K", "N"),
    [
        (1, 1, 1, 16, 32),
        (2, 1, 9, 24, 40),
        (2, 7, 20, 100, 129),
        (3, 35, 70, 24, 33),
        (1, 33, 33, 64, 64),
        (2, 5, 8, 1, 1),
    ],
)
def test_equals_the_definition_at_odd_sizes(device, dtype, bias, B, A, S, K, N):
    given = draw(B, A, S, K, N, dtype, device, bias)
    check(gather_linear(*given), expected(*given), dtype)


@DEVICES
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
def test_rows_shared_by_all_samples_or_not(device, shared, index):
    x, weight, bias, rows = draw(3, 7, 12, 24, 40, device=device, shared=shared)
    check(gather_linear(x, weight, bias, rows.to(index)), expected(x, weight, bias, rows), torch.float32)


@DEVICES
def test_one_picture_for_all_samples(device):
    x, weight, bias, rows = draw(3, 7, 12, 24, 40, device=device)
    check(gather_linear(x[:1], weight, bias, rows), expected(x[:1], weight, bias, rows), torch.float32)


@DEVICES
@DTYPES
@pytest.mark.parametrize("samples", [1, 2])
def test_patches_are_read_from_their_pixels(device, dtype, samples):
    """A patch embedding, beside the convolution that it is; the table is a crop of a larger one, as position embeddings are."""
    B, C, h, w, p, q, N = 2, 3, 5, 4, 2, 3, 40
    image = torch.randn(B, C, h * p, w * q, device=device, dtype=dtype)
    weight = (torch.randn(N, C, p, q, device=device) / 4).to(dtype)
    bias = torch.randn(N, device=device, dtype=dtype)
    table = torch.randn(samples, h + 2, w + 3, N, device=device, dtype=dtype)[:, 1 : h + 1, 2 : w + 2]
    rows = torch.stack([torch.randperm(h * w, device=device)[:7] for _ in range(B)])
    x = image.view(B, C, h, p, w, q).permute(0, 2, 4, 1, 3, 5)  # b h w c p q
    found = gather_linear(x, weight.flatten(1), bias, rows, 2, table, 2)
    dense = F.conv2d(image.double(), weight.double(), bias.double(), stride=(p, q)).flatten(
        2
    ).mT + table.double().flatten(1, 2)
    check(found, dense[torch.arange(B, device=device)[:, None], rows], dtype)


# Tokens [B=2, S=12, K=40], and how the op sees them.
VIEWS = {
    "behind text": lambda x: F.pad(x, (0, 0, 7, 0))[:, 7:],
    "channels first": lambda x: x.mT.contiguous().mT,
    "some channels": lambda x: F.pad(x, (3, 5))[..., 3:43],
    "strided channels": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "samples inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@DEVICES
@pytest.mark.parametrize("name", VIEWS)
def test_operands_of_any_strides(device, name):
    x, weight, bias, rows = draw(2, 7, 12, 40, 24, device=device)
    want = expected(x, weight, bias, rows, table := torch.randn(2, 12, 24, device=device))
    weight = weight.repeat(1, 2)[:, :40].T.contiguous().T
    bias, rows = torch.stack([bias, bias], 1)[:, 0], rows.T.contiguous().T
    check(gather_linear(VIEWS[name](x), weight, bias, rows, 1, table.mT.contiguous().mT), want, torch.float32)


@DEVICES
def test_a_grid_and_channels_of_three_strides_each(device):
    x, weight, bias, rows = draw(2, 7, 24, 30, 20, device=device)
    parts = x.view(2, 2, 3, 4, 5, 3, 2)
    strided = parts.permute(6, 3, 5, 2, 4, 1, 0).contiguous().permute(6, 5, 3, 1, 4, 2, 0)
    assert torch.equal(strided, parts) and len(module.runs(strided, 1, 4)) == len(module.runs(strided, 4, 7)) == 3
    check(gather_linear(strided, weight, bias, rows, 3), expected(x, weight, bias, rows), torch.float32)


@DEVICES
def test_a_row_depends_on_no_other(device):
    x, weight, bias, rows = draw(2, 20, 50, 100, 40, device=device)
    other = torch.full_like(x, torch.nan)
    batch = torch.arange(2, device=device)
    other[batch, rows[:, 17]] = x[batch, rows[:, 17]]
    found = gather_linear(other, weight, bias, rows)
    assert torch.equal(found[:, 17], gather_linear(x, weight, bias, rows)[:, 17])
    assert found.isnan().all(-1).sum() == 2 * 19


def test_float64_runs_the_twin():
    given = draw(2, 7, 12, 24, 40, torch.float64)
    assert (gather_linear(*given) - expected(*given)).abs().max() < 1e-12


@DEVICES
def test_no_active_row(device):
    assert gather_linear(*draw(2, 0, 12, 24, 40, device=device)).shape == (2, 0, 40)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(12, 24)}, r"x must be \[B, \*grid, \*channels\]"),
        ({"grid_dims": 0}, r"x must be \[B, \*grid, \*channels\]"),
        ({"weight": torch.zeros(40, 25)}, "must multiply to the K"),
        ({"weight": torch.zeros(24)}, r"weight must be \[N, K\]"),
        ({"bias": torch.zeros(41)}, r"bias must be None or \[N\]"),
        ({"rows": torch.zeros(7, dtype=torch.int64)}, r"rows must be \[B, A\] or \[1, A\]"),
        ({"rows": torch.zeros(3, 7, dtype=torch.int64)}, "B samples, or one for all"),
        ({"rows": torch.zeros(2, 7)}, "int64 or int32"),
        ({"table": torch.zeros(2, 12, 41)}, r"table must be \[B or 1, \*grid, N\]"),
        ({"table": torch.zeros(2, 11, 40)}, "as many places as that of x"),
        ({"table": torch.zeros(2, 3, 4, 40)}, "table_dims dims of a grid"),
        ({"table": torch.zeros(2, 12, 40, dtype=torch.bfloat16)}, "share one dtype"),
        ({"weight": torch.zeros(40, 24, device="meta")}, "one device"),
        ({"x": torch.zeros(2, 12, 2, 3, 2, 2).permute(0, 1, 5, 4, 3, 2)}, "each be viewable as three dims"),
        (
            {
                "x": torch.zeros(1, 12, 24),
                "rows": torch.zeros(1, 7, dtype=torch.int64),
                "table": torch.zeros(2, 12, 40),
            },
            "more samples",
        ),
        (
            {
                "x": torch.zeros(2, 16, 24),
                "table": torch.zeros(2, 2, 2, 2, 2, 40).permute(0, 4, 3, 2, 1, 5),
                "table_dims": 4,
            },
            "table's grid must be viewable",
        ),
    ],
)
def test_refuses_with_what_is_allowed(change, says):
    x, weight, bias, rows = draw(2, 7, 12, 24, 40)
    arguments = {"x": x, "weight": weight, "bias": bias, "rows": rows} | change
    with pytest.raises(ValueError, match=says):
        gather_linear(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError, match=says):  # also when traced
        gather_linear(**tree_map_only(torch.Tensor, mode.from_tensor, arguments))


@pytest.mark.parametrize("row", [-1, 12])
def test_refuses_a_row_that_is_not_there(row):
    x, weight, bias, rows = draw(2, 7, 12, 24, 40)
    rows[1, 3] = row
    with pytest.raises(IndexError, match=r"\[0, 12\)"):
        gather_linear(x, weight, bias, rows)


@DEVICES
def test_opcheck(device):
    x, weight, bias, rows = draw(2, 7, 12, 24, 40, device=device)
    torch.library.opcheck(gather_linear, (x, weight, bias, rows))
    torch.library.opcheck(gather_linear, (x, weight, None, rows[:1], 1, torch.randn(1, 12, 40, device=device)))


@pytest.mark.skipif(INTERPRETED, reason="it sees Inductor's code: the same again")
@DEVICES
def test_inductor_keeps_the_strides_of_the_latent(device):
    """The op reads the latent through a view: no copy of it is made."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    image = torch.randn(2, 3, 8, 12, device=device)
    weight, rows = (
        torch.randn(16, 12, device=device),
        torch.stack([torch.randperm(24, device=device)[:5] for _ in range(2)]),
    )

    def embed(image, weight, rows):
        x = image.view(2, 3, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5)
        return torch.ops.ras_compile.gather_linear(x, weight, None, rows, 2).relu()

    with torch._inductor.config.patch(fx_graph_cache=False):
        found, code = run_and_get_code(torch.compile(embed, fullgraph=True), image, weight, rows)
    torch.testing.assert_close(found, embed(image, weight, rows), rtol=1e-5, atol=1e-5)
    assert "empty_strided_cpu((2, 4, 6" not in code[0] and "empty_strided_cuda((2, 4, 6" not in code[0]


@DEVICES
def test_flops_are_those_of_the_linear(device):
    with FlopCounterMode(display=False) as fused:
        gather_linear(*draw(2, 7, 12, 24, 40, device=device))
    assert fused.get_total_flops() == 2 * 2 * 7 * 24 * 40


@pytest.mark.skipif(INTERPRETED, reason="a process without Triton: the same again")
def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from ras_compile.kernels import gather_linear
y = gather_linear(torch.arange(4.0).view(1, 4, 1), torch.ones(3, 1), None, torch.tensor([[3, 1]]))
assert y[0].tolist() == [[3, 3, 3], [1, 1, 1]]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_this_file_under_the_triton_interpreter(run_interpreted):
    run_interpreted(__file__)


class TestOnCUDA:
    pytestmark = ON_CUDA

    @DTYPES
    def test_every_tile_gives_the_same_bits(self, dtype, monkeypatch):
        given = (*draw(2, 300, 400, 200, 500, dtype, "cuda"), 1, torch.randn(1, 400, 500, dtype=dtype, device="cuda"))
        found = []
        for tile in module.Launch(*given).tiles().values():
            monkeypatch.setattr(module.Launch, "fastest", lambda launch, tile=tile: tile)
            found.append(gather_linear(*given))
        assert len(found) > 1 and all(torch.equal(other, found[0]) for other in found[1:])

    @pytest.mark.parametrize(
        ("B", "grid", "K", "N"), [(2, (64, 64), 64, 1536), (1, (64, 64), 64, 3072), (1, (30, 52), 16, 1152)]
    )
    def test_real_sizes_are_timed_and_right(self, B, grid, K, N):
        """Also that it is asked with sizes alone whether it pays, and that the op then has its tile."""
        S = grid[0] * grid[1]
        given = draw(B, S // 8, S, K, N, torch.bfloat16, "cuda")
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(value) for value in given]
        assert gather_pays(fake) in (True, False)
        check(gather_linear(*given), expected(*given), torch.bfloat16)

    def test_a_cuda_graph_replays_on_new_rows(self):
        x, weight, bias, rows = draw(2, 96, 256, 80, 192, torch.bfloat16, "cuda")
        gather_linear(x, weight, bias, rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gather_linear(x, weight, bias, rows)
        x.copy_(torch.randn_like(x))
        rows.copy_(torch.stack([torch.randperm(256, device="cuda")[:96] for _ in range(2)]))
        graph.replay()
        check(y, expected(x, weight, bias, rows), torch.bfloat16)

    def test_a_row_that_is_not_there_counts_as_zeros(self):
        x, weight, bias, rows = draw(1, 2, 4, 64, 64, device="cuda")
        rows[0] = torch.tensor([-1, 4])
        check(gather_linear(x, weight, bias, rows), bias.double().expand(1, 2, 64), torch.float32)
