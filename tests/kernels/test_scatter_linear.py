"""`scatter_linear`, three times over: the eager twin on a CPU, the Triton kernel under the interpreter, and on a GPU.

Triton decides at its import whether it interprets, and other tests need it not to; so the interpreted run of this file
is a process of its own, started by `test_this_file_under_the_triton_interpreter`.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ras_compile.kernels import epilogue_reference, scatter_linear, scatter_linear_reference
from ras_compile.kernels.arguments import ScatterArguments
from ras_compile.kernels.tiles import timings

# The package's attribute of this name is the op, which hides the module.
module = importlib.import_module("ras_compile.kernels.scatter_linear")
launches = importlib.import_module("ras_compile.kernels.launch")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size: compares NaNs bit by bit


@pytest.fixture(autouse=True)
def kernel_is_what_runs(request, monkeypatch, tmp_path):
    """Where the kernel should run, the op must not fall back to the twin: the tests would then prove nothing."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if INTERPRETED or (request.node.get_closest_marker("gpu") and parameters.get("timed", True)):

        def twin(cache, x, *others):
            assert x.dtype is torch.float64, "the op ran its twin instead of the kernel"
            scatter_linear_reference(cache, x, *others)

        monkeypatch.setattr(module, "scatter_linear_reference", twin)
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    if parameters.get("device") == "cuda":  # many sizes: only the tests that are CUDA's own time the tiles
        monkeypatch.setattr(module.Launch, "fastest", lambda launch: list(launch.tiles().values())[-1])


def draw(B, A, S, K, N, dtype=torch.float32, device="cpu", bias=True, shared=False):
    """Fresh x, weight, bias and rows."""
    x = torch.randn(B, A, K, device=device, dtype=dtype)
    weight = (torch.randn(N, K, device=device) * K**-0.5).to(dtype)
    rows = torch.stack([torch.randperm(S, device=device)[:A] for _ in range(1 if shared else B)])
    return x, weight, torch.randn(N, device=device, dtype=dtype) if bias else None, rows


def expected(cache, x, weight, bias, rows):
    """The definition, row by row, in float64: (the cache after, which of its elements are written)."""
    after, written = cache.double(), torch.zeros_like(cache, dtype=torch.bool)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            row = rows[b % rows.shape[0], i]
            y = weight.double() @ x[b, i].double() + (0 if bias is None else bias.double())
            after[b, row], written[b, row] = y.reshape(cache.shape[2:]), True
    return after, written


def check(buffer, view, x, weight, bias, rows):
    """Run the op on `view(buffer)`; every element of the buffer must be right, and untouched ones the same bits."""
    before = buffer.clone()
    after, written = expected(view(before), x, weight, bias, rows)
    scatter_linear(view(buffer), x, weight, bias, rows)

    got, want = view(buffer)[written].double(), after[written]
    # One rounding to the dtype (the interpreter truncates to bf16, the CPU's linear may round before the bias), and
    # the order of fp32 sums.
    roundings = 1 if buffer.is_cuda else 2
    unit = torch.finfo(buffer.dtype).eps / 2
    bound = roundings * unit * want.abs() + (1e-12 if buffer.dtype is torch.float64 else 2e-6) * want.abs().max()
    worst = ((got - want).abs() - bound).max()
    assert worst <= 0, f"beyond the rounding of {buffer.dtype} by {worst}"

    inside = torch.zeros_like(buffer, dtype=torch.bool)
    view(inside).copy_(written)
    bits = INTEGER[buffer.element_size()]
    assert torch.equal(buffer.view(bits)[~inside], before.view(bits)[~inside])


def poisoned(*shape, dtype=torch.float32, device="cpu"):
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@DEVICES
@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("B", "A", "S", "K", "N"),
    [
        (1, 1, 1, 16, 32),
        (2, 1, 9, 24, 40),
        (2, 7, 20, 100, 129),
        (3, 65, 70, 24, 33),
        (1, 33, 33, 64, 64),
        (2, 5, 8, 1, 1),
    ],
)
def test_equals_the_definition_at_odd_sizes(device, dtype, bias, B, A, S, K, N):
    check(poisoned(B, S, N, dtype=dtype, device=device), lambda c: c, *draw(B, A, S, K, N, dtype, device, bias))


@DEVICES
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
def test_rows_shared_by_all_samples_or_not(device, shared, index):
    x, weight, bias, rows = draw(3, 7, 12, 24, 40, device=device, shared=shared)
    check(poisoned(3, 12, 40, device=device), lambda c: c, x, weight, bias, rows.to(index))


# Shape of the buffer, and the cache [B=2, S=12, ...] with N=40 in it. The rest of the buffer must not change.
CACHES = {
    "keys [B, H, S, D]": ((2, 5, 12, 8), lambda c: c.permute(0, 2, 1, 3)),
    "keys [B, S, H, D]": ((2, 12, 5, 8), lambda c: c),
    "image rows behind text": ((2, 5, 19, 8), lambda c: c[:, :, 7:].permute(0, 2, 1, 3)),
    "image rows before text": ((2, 19, 40), lambda c: c[:, :12]),
    "values of one buffer [2, B, H, S, D]": ((2, 2, 5, 12, 8), lambda c: c[1].permute(0, 2, 1, 3)),
    "every other sample": ((4, 12, 40), lambda c: c[::2]),
    "some channels": ((2, 12, 50), lambda c: c[..., 3:43]),
    "channels first": ((2, 40, 12), lambda c: c.transpose(1, 2)),
    "strided channels": ((2, 12, 80), lambda c: c[..., ::2]),
    "three dims, two runs": ((2, 5, 12, 4, 2), lambda c: c.permute(0, 2, 1, 3, 4)),
    "three dims, three runs": ((2, 2, 5, 4, 12), lambda c: c.permute(0, 4, 3, 1, 2)),
    "a dim of one, of a stride that fits nothing": ((3, 2, 12, 5, 8), lambda c: c[1:2].permute(1, 2, 3, 0, 4)),
}


@DEVICES
@pytest.mark.parametrize("name", CACHES)
def test_cache_of_any_strides(device, name):
    shape, view = CACHES[name]
    check(poisoned(*shape, device=device), view, *draw(2, 7, 12, 24, 40, device=device))


@DEVICES
def test_operands_of_any_strides(device):
    x = torch.randn(24, 7, 2, device=device).permute(2, 1, 0)
    weight = torch.randn(24, 80, device=device)[:, ::2].T
    bias = torch.randn(40, 3, device=device)[:, 1]
    rows = torch.stack([torch.randperm(12, device=device)[:7] for _ in range(2)], dim=1).T
    check(poisoned(2, 12, 40, device=device), lambda c: c, x, weight, bias, rows)
    check(poisoned(2, 12, 40, device=device), lambda c: c, x[:1].expand(2, -1, -1), weight, bias, rows)


def full(more):
    """All of the op's arguments after the rows, from some of them by name."""
    defaults = dict(grid_dims=1, head_dim=0, norm="none", norm_weight=None, norm_bias=None, eps=0.0, rope="none",
                    cos=None, sin=None)  # fmt: skip
    return (defaults | more).values()


def epilogue(B, A, D, norm="none", rope="none", table=torch.float32, wide=False, shared=False, device="cpu"):
    """Arguments of an epilogue, random; ``wide``: the rotary tables have an entry per channel and not per pair."""
    more = dict(head_dim=D, norm=norm, rope=rope, eps={"none": 0.0, "rms": 1e-6, "layer": 1e-2}[norm])
    if norm != "none":
        more["norm_weight"] = 1 + torch.randn(D, device=device)
    if norm == "layer":
        more["norm_bias"] = torch.randn(D, device=device)
    if rope != "none":
        size = (1 if shared else B, A, D if wide else D // 2)
        angles = torch.randn(size, device=device)
        more["cos"], more["sin"] = angles.cos().to(table), angles.sin().to(table)
    return more


def written_out(y, D, norm="none", rope="none", norm_weight=None, norm_bias=None, eps=0.0, cos=None, sin=None):
    """The epilogue as its definition says, channel by channel, in float64: [B, A, N]."""
    z = y.double().unflatten(-1, (-1, D))
    if norm == "layer":
        z = z - z.mean(-1, keepdim=True)
    if norm != "none":
        z = z / (z.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
        z = z + (0 if norm_bias is None else norm_bias.double())
    if rope == "none":
        return z.flatten(-2)
    out = torch.empty_like(z)
    for i in range(D // 2):
        a, b = (2 * i, 2 * i + 1) if rope == "interleaved" else (i, i + D // 2)
        wide = cos.shape[-1] == D
        for to, other, sign in ((a, b, -1), (b, a, 1)):
            c, s = (t.double()[..., to if wide else i][..., None] for t in (cos, sin))
            out[..., to] = z[..., to] * c + sign * z[..., other] * s
    return out.flatten(-2)


EPILOGUES = {
    "rms": dict(norm="rms"),
    "layer": dict(norm="layer"),
    "interleaved": dict(rope="interleaved"),
    "half": dict(rope="half"),
    "rms, interleaved, an entry per channel": dict(norm="rms", rope="interleaved", wide=True),
    "rms, half, an entry per channel": dict(norm="rms", rope="half", wide=True),
    "layer, half, shared by the samples": dict(norm="layer", rope="half", shared=True),
    "interleaved, tables of the model's dtype": dict(rope="interleaved", table=None),
}


@DEVICES
@DTYPES
@pytest.mark.parametrize("D", [6, 16, 96])
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("two_launches", [False, True], ids=["one launch", "cuBLAS and a pass"])
def test_norm_and_rotary_embedding_before_the_splice(device, dtype, D, name, two_launches, monkeypatch):
    """Into the keys of a joint cache [B, H, text + S, D], by the definition of each step."""
    if two_launches:
        if not INTERPRETED and device == "cpu":
            pytest.skip("the twin has no launches")
        tile = launches.Tile(16, 128, 0, 4, 1, two_launches=True)
        monkeypatch.setattr(module, "interpreted_tile", lambda padded: tile)
        monkeypatch.setattr(module.Launch, "fastest", lambda launch: tile)
    B, A, S, K, H = 2, 19, 24, 20, 3
    given = dict(EPILOGUES[name])
    given["table"] = given.get("table", torch.float32) or dtype
    x, weight, bias, rows = draw(B, A, S, K, H * D, dtype, device)
    more = epilogue(B, A, D, **given, device=device)
    y = x.double() @ weight.double().T + bias.double()
    want = written_out(y, D, **{name: value for name, value in more.items() if name != "head_dim"})

    buffer = poisoned(B, H, 5 + S, D, dtype=dtype, device=device)
    cache = buffer[:, :, 5:].permute(0, 2, 1, 3)
    scatter_linear(cache, x, weight, bias, rows, **more)
    batch = torch.arange(B, device=device)[:, None]
    got = cache[batch, rows].flatten(2).double()
    unit = torch.finfo(dtype).eps
    assert (got - want).abs().max() <= (
        2 * unit + 4e-6
    ) * want.abs().max()  # on a CPU the linear's result is rounded too
    assert ((got - want).norm() / want.norm()) <= unit + 2e-6
    cache[batch, rows] = torch.nan
    assert buffer.isnan().all()


@pytest.mark.parametrize("D", [6, 16])
@pytest.mark.parametrize("name", EPILOGUES)
def test_the_twin_of_the_epilogue_is_its_definition(D, name):
    y = torch.randn(2, 5, 3 * D, dtype=torch.float64)
    more = epilogue(2, 5, D, **{**EPILOGUES[name], "table": torch.float64})
    want = written_out(y, D, **{name: value for name, value in more.items() if name != "head_dim"})
    assert (epilogue_reference(y, **more) - want).abs().max() < 1e-12


@DEVICES
@DTYPES
def test_patches_go_to_their_pixels(device, dtype):
    """Rows count a grid of two dims, channels are (p, q, c): the last projection and the un-patchify."""
    B, C, h, w, p, q = 2, 3, 5, 4, 2, 3
    x, weight, bias, rows = draw(B, 7, h * w, 24, p * q * C, dtype, device)
    image = poisoned(B, C, h * p, w * q, dtype=dtype, device=device)
    cache = image.view(B, C, h, p, w, q).permute(0, 2, 4, 3, 5, 1)  # b h w p q c
    scatter_linear(cache, x, weight, bias, rows, grid_dims=2)
    y = (x.double() @ weight.double().T + bias.double()).unflatten(-1, (p, q, C))
    unit = torch.finfo(dtype).eps
    for b in range(B):
        for i, row in enumerate(rows[b].tolist()):
            r, s = divmod(row, w)
            patch = image[b, :, r * p : (r + 1) * p, s * q : (s + 1) * q]
            assert (patch.double() - y[b, i].permute(2, 0, 1)).abs().max() <= (unit + 2e-6) * y.abs().max()
            patch.fill_(torch.nan)
    assert image.isnan().all()


def test_heads_too_large_for_a_tile_run_the_twin(monkeypatch):
    ran = []
    monkeypatch.setattr(module, "scatter_linear_reference", lambda *given: ran.append(given))
    x, weight, bias, rows = draw(1, 3, 4, 8, 600)
    scatter_linear(torch.zeros(1, 4, 600), x, weight, bias, rows, **epilogue(1, 3, 300, norm="rms"))
    assert ran


def test_float64_runs_the_twin():
    check(poisoned(2, 12, 40, dtype=torch.float64), lambda c: c, *draw(2, 7, 12, 24, 40, torch.float64))


@DEVICES
def test_no_active_row_changes_nothing(device):
    cache = torch.randn(2, 12, 40, device=device)
    before = cache.clone()
    x, weight, bias, rows = draw(2, 0, 12, 24, 40, device=device)
    scatter_linear(cache, x, weight, bias, rows)
    assert torch.equal(cache, before)


@DEVICES
def test_a_row_does_not_depend_on_the_others(device):
    x, weight, bias, rows = draw(2, 40, 50, 100, 40, device=device)
    cache, other = torch.zeros(2, 2, 50, 40, device=device)
    scatter_linear(cache, x, weight, bias, rows)
    noise = torch.randn_like(x)
    noise[:, 17] = x[:, 17]
    scatter_linear(other, noise, weight, bias, rows)
    batch = torch.arange(2, device=device)
    assert torch.equal(cache[batch, rows[:, 17]], other[batch, rows[:, 17]])
    assert not torch.equal(cache, other)


def test_works_on_parameters_and_under_inference_mode():
    x, weight, bias, rows = draw(2, 7, 12, 24, 40)
    weight.requires_grad_()
    cache = torch.zeros(2, 12, 40)
    with torch.inference_mode():
        scatter_linear(cache, x, weight, bias, rows)
    want = torch.zeros(2, 12, 40)
    scatter_linear(want, x, weight, bias, rows)
    assert torch.equal(cache, want) and cache.any() and not cache.requires_grad


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(7, 24)}, r"x must be \[B, A, K\]"),
        ({"weight": torch.zeros(40, 25)}, r"weight must be \[N, K\]"),
        ({"bias": torch.zeros(41)}, r"bias must be None or \[N\]"),
        ({"cache": torch.zeros(3, 12, 40)}, r"cache must be \[B, S, N\]"),
        ({"cache": torch.zeros(2, 12, 5, 9)}, "must multiply to the N"),
        ({"cache": torch.zeros(2, 6, 40)}, "at most S rows"),
        ({"cache": torch.zeros(2, 12, 1).expand(2, 12, 40)}, "must not be expanded"),
        (
            {"cache": torch.zeros(5, 2, 2, 2, 2, 12).permute(4, 5, 3, 2, 1, 0)},
            r"viewable as \[patch, heads, channels\]",
        ),
        ({"grid_dims": 0}, "grid_dims must be"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"rope": "full"}, "rope must be one of"),
        ({"norm": "rms", "head_dim": 7}, "head_dim must divide"),
        ({"norm_weight": torch.zeros(8)}, "belong to a norm"),
        ({"norm": "rms", "head_dim": 8, "norm_weight": torch.zeros(9)}, r"must be \[head_dim\]"),
        ({"rope": "half", "head_dim": 8}, "cos and sin must be given together"),
        ({"rope": "half", "head_dim": 5, "cos": torch.zeros(2, 7, 5), "sin": torch.zeros(2, 7, 5)}, "must be even"),
        (
            {"rope": "half", "head_dim": 8, "cos": torch.zeros(2, 7, 8), "sin": torch.zeros(2, 6, 8)},
            "a row for each row",
        ),
        ({"rows": torch.zeros(2, 6, dtype=torch.int64)}, r"rows must be \[B, A\] or \[1, A\]"),
        ({"rows": torch.zeros(2, 7)}, "int64 or int32"),
        ({"x": torch.zeros(2, 7, 24, dtype=torch.bfloat16)}, "share one dtype"),
        ({"weight": torch.zeros(40, 24, device="meta")}, "one device"),
    ],
)
def test_refuses_with_what_is_allowed(change, says):
    x, weight, bias, rows = draw(2, 7, 12, 24, 40)
    arguments = {"cache": torch.zeros(2, 12, 40), "x": x, "weight": weight, "bias": bias, "rows": rows} | change
    with pytest.raises(ValueError, match=says):
        scatter_linear(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError, match=says):  # also when traced
        scatter_linear(**tree_map_only(torch.Tensor, mode.from_tensor, arguments))


@pytest.mark.parametrize("row", [-1, 12])
def test_refuses_a_row_outside_the_cache(row):
    x, weight, bias, rows = draw(2, 7, 12, 24, 40)
    rows[1, 3] = row
    with pytest.raises(IndexError, match=r"\[0, 12\)"):
        scatter_linear(torch.zeros(2, 12, 40), x, weight, bias, rows)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_row_outside_the_cache_is_left_out_on_cuda():
    x, weight, bias, rows = draw(1, 2, 4, 64, 64, device="cuda")
    rows[0] = torch.tensor([-1, 8])
    buffer = poisoned(3, 4, 64, device="cuda")  # the rows before and after the cache belong to others
    scatter_linear(buffer[1:2], x, weight, bias, rows)
    assert buffer.isnan().all()


@DEVICES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck(device, bias):
    cache = torch.randn(2, 5, 12, 8, device=device).permute(0, 2, 1, 3)
    torch.library.opcheck(scatter_linear, (cache, *draw(2, 7, 12, 24, 40, device=device, bias=bias)))


def keys_and_values(joint, x, wk, wv, bias, rows):
    """Both linears of an attention write behind 7 text rows of one joint buffer [2, B, H, S, D], which is then read."""
    torch.ops.ras_compile.scatter_linear(joint[0, :, :, 7:].permute(0, 2, 1, 3), x, wk, bias, rows)
    torch.ops.ras_compile.scatter_linear(joint[1, :, :, 7:].permute(0, 2, 1, 3), x * 2, wv, None, rows)
    return F.scaled_dot_product_attention(joint[0], joint[0], joint[1])


def test_make_fx_keeps_the_op_whole():
    x, wk, bias, rows = draw(2, 7, 12, 24, 40)
    joint = torch.randn(2, 2, 5, 19, 8)
    graph = make_fx(keys_and_values)(joint.clone(), x, wk, wk, bias, rows)
    assert sum(node.target is torch.ops.ras_compile.scatter_linear.default for node in graph.graph.nodes) == 2
    other = joint.clone()
    assert torch.equal(graph(joint, x, wk, wk, bias, rows), keys_and_values(other, x, wk, wk, bias, rows))
    assert torch.equal(joint, other)


@pytest.mark.skipif(INTERPRETED, reason="it sees Inductor's code: the same again")
@DEVICES
def test_inductor_writes_in_place_without_a_copy_of_the_cache(device):
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    x, wk, bias, rows = draw(2, 7, 12, 24, 40, device=device)
    wv = torch.randn_like(wk)
    joint = torch.randn(2, 2, 5, 19, 8, device=device)
    want_joint = joint.clone()
    want = keys_and_values(want_joint, x, wk, wv, bias, rows)
    with torch._inductor.config.patch(fx_graph_cache=False):
        got, code = run_and_get_code(torch.compile(keys_and_values, fullgraph=True), joint, x, wk, wv, bias, rows)
    torch.testing.assert_close(joint, want_joint, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    code = "\n".join(code)
    assert code.count("torch.ops.ras_compile.scatter_linear.default(") == 2
    # Of all buffers that the code allocates, none holds half of the joint cache (the keys, or the values).
    sizes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    assert sizes, "the pattern no longer matches Inductor's code"
    numels = [torch.Size(int(n) for n in size.split(",") if n.strip()).numel() for size in sizes]
    assert max(numels) < joint.numel() // 2, sizes


@DEVICES
def test_flops_are_those_of_the_linear(device):
    x, weight, bias, rows = draw(2, 7, 12, 24, 40, device=device)
    with FlopCounterMode(display=False) as fused:
        scatter_linear(torch.zeros(2, 12, 40, device=device), x, weight, bias, rows)
    with FlopCounterMode(display=False) as linear:
        F.linear(x, weight, bias)
    assert fused.get_total_flops() == linear.get_total_flops() == 2 * 2 * 7 * 24 * 40


@pytest.mark.skipif(INTERPRETED, reason="a process without Triton: the same again")
def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from ras_compile.kernels import scatter_linear
cache = torch.zeros(1, 4, 3)
scatter_linear(cache, torch.ones(1, 2, 5), torch.ones(3, 5), None, torch.tensor([[3, 1]]))
assert cache[0, :, 0].tolist() == [0, 5, 0, 5]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_this_file_under_the_triton_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("A", "N", "K"), [(512, 1536, 1536), (1000, 3072, 1536), (2048, 64, 3072)])
def test_real_sizes_are_timed_and_right_on_cuda(A, N, K):
    """Timing the tiles launches the kernel many times: the rest of the cache must survive it."""
    x, weight, bias, rows = draw(2, A, 2 * A, K, N, torch.bfloat16, "cuda")
    cache = poisoned(2, 2 * A, N, dtype=torch.bfloat16, device="cuda")
    scatter_linear(cache, x, weight, bias, rows)
    want = F.linear(x.double(), weight.double(), bias.double())
    batch = torch.arange(2, device="cuda")[:, None]
    got = cache[batch, rows].double()
    assert ((got - want).abs() <= 2.0**-8 * want.abs() + 1e-5 * want.abs().max()).all()
    cache[batch, rows] = torch.nan
    assert cache.isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("inside", [{}, {"norm": "rms", "rope": "half"}], ids=["plain", "norm and rope"])
@DTYPES
def test_every_tile_gives_the_same_bits_on_cuda(dtype, inside, monkeypatch):
    """So that pictures do not change with the timings of a run (a norm sums in an order that depends on the tile)."""
    x, weight, bias, rows = draw(2, 300, 400, 1000, 512, dtype, "cuda")
    x = torch.nn.functional.pad(x, (0, 8))[..., :1000]  # rows of 16 bytes, for bulk loads
    weight = torch.nn.functional.pad(weight, (0, 8))[..., :1000]
    more = epilogue(2, 300, 64, **inside, device="cuda") if inside else {}
    # So few that a persistent program walks over several tiles.
    monkeypatch.setattr(launches, "processors", lambda device: 8)
    caches, names = [], []
    whole = torch.zeros(2, 400, 512, dtype=dtype, device="cuda")
    tried = module.Launch(ScatterArguments(whole, x, weight, bias, rows, *full(more))).tiles()
    for name, tile in tried.items():
        monkeypatch.setattr(module.Launch, "fastest", lambda launch, tile=tile: tile)
        cache = torch.zeros(2, 400, 512, dtype=dtype, device="cuda")
        try:
            scatter_linear(cache, x, weight, bias, rows, **more)
        except triton.OutOfResources:  # a smaller device
            continue
        names.append(name)
        caches.append(cache)
    assert len(caches) > 1 and caches[0].any()
    for cache, two_launches in zip(caches[1:], ["two-launches" in name for name in names[1:]], strict=True):
        if inside:  # computed in a launch of its own, a product is rounded before pairs of its entries are added up
            atol = torch.finfo(dtype).eps * caches[0].abs().max().item() if two_launches else 1e-5
            torch.testing.assert_close(cache, caches[0], rtol=2 * torch.finfo(dtype).eps, atol=atol)
        else:
            assert torch.equal(cache, caches[0])
    if dtype is not torch.float32 and torch.cuda.get_device_capability() >= (9, 0):
        assert any("tma" in name for name in names) and any(
            ("two-launches" if inside else "persistent") in name for name in names
        )


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "not timed"])
def test_cuda_graph_replays_on_new_rows(timed):
    # A size of its own for each case, so that the other case has not timed it.
    x, weight, bias, rows = draw(2, 96, 256, 320 if timed else 352, 192, torch.bfloat16, "cuda")
    cache = poisoned(2, 256, 192, dtype=torch.bfloat16, device="cuda")
    if timed:
        scatter_linear(cache, x, weight, bias, rows)
    else:
        F.linear(x, weight, bias)  # cuBLAS starts outside a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scatter_linear(cache, x, weight, bias, rows)
    cache.fill_(torch.nan)
    x.copy_(torch.randn_like(x))
    rows.copy_(torch.stack([torch.randperm(256, device="cuda")[:96] for _ in range(2)]))
    graph.replay()
    want = poisoned(2, 256, 192, dtype=torch.bfloat16, device="cuda")
    scatter_linear_reference(want, x, weight, bias, rows)
    torch.testing.assert_close(cache, want, rtol=2**-7, atol=1e-2, equal_nan=True)
