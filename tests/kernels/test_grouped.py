"""`grouped_scatter_linear`: what its members do one by one, on a CPU, under the Triton interpreter, and on a GPU."""

import importlib
import importlib.util
import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ras_compile.kernels import grouped_scatter_linear, scatter_linear, scatter_linear_reference
from ras_compile.kernels.arguments import ScatterArguments
from ras_compile.kernels.tiles import timings

module = importlib.import_module("ras_compile.kernels.grouped")
launches = importlib.import_module("ras_compile.kernels.launch")
ONE_BY_ONE = module.one_by_one

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
B, S = 2, 21  # samples, tokens
TEXT = 5  # tokens of text before the picture's, in a joint cache


@pytest.fixture(autouse=True)
def one_launch(request, monkeypatch, tmp_path):
    """Where the kernel should run, the members must not be run one by one: the tests would then prove nothing."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if INTERPRETED or parameters.get("device") == "cuda":
        monkeypatch.setattr(module, "one_by_one", None)
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    timings.cache_clear()
    if parameters.get("device") == "cuda":  # many sizes: only the tests that are CUDA's own time the tiles
        monkeypatch.setattr(module.GroupedLaunch, "fastest", lambda launch: list(launch.tiles().values())[-1])


class Attention:
    """The products of one attention: into joint caches [B, H, TEXT + S, D] of keys and values, the queries compact."""

    def __init__(self, dtype=torch.float32, device="cpu", H=4, D=16, K=40, A=7):
        self.made = dict(dtype=dtype, device=device)
        self.H, self.D, self.K, self.A = H, D, K, A
        self.x = torch.randn(B, A, K, **self.made)
        self.text = torch.randn(B, TEXT, K, **self.made)
        self.rows = torch.stack([torch.randperm(S, device=device)[:A] for _ in range(B)])
        self.text_rows = torch.arange(TEXT, device=device)[None]
        self.buffers = [torch.full((B, H, TEXT + S, D), torch.nan, **self.made) for _ in "kv"]

    def weights(self, N, bias=True):
        weight = torch.randn(N, self.K, device=self.made["device"]) * self.K**-0.5
        return weight.to(self.made["dtype"]), torch.randn(N, **self.made) if bias else None

    def spliced(self, buffer, text=False, bias=True, **epilogue):
        """The arguments of a member that writes into keys or values."""
        cache = self.buffers[buffer][:, :, :TEXT] if text else self.buffers[buffer][:, :, TEXT:]
        x, rows = (self.text, self.text_rows) if text else (self.x, self.rows)
        return self.member(cache.permute(0, 2, 1, 3), x, rows, self.H * self.D, bias, **epilogue)

    def compact(self, N=None, text=False, bias=True, **epilogue):
        """The arguments of a member whose result stays compact: a fresh cache, row by row."""
        x, N = self.text if text else self.x, self.H * self.D if N is None else N
        cache = torch.full((B, x.shape[1], N), torch.nan, **self.made)
        self.buffers.append(cache)
        rows = torch.arange(x.shape[1], device=x.device)[None]
        return self.member(cache, x, rows, N, bias, **epilogue)

    def member(self, cache, x, rows, N, bias, norm="none", rope="none", shared=False, table=torch.float32):
        device, D = x.device, self.D
        cos = sin = weight = vector = None
        if norm != "none":
            weight = 1 + torch.randn(D, device=device)
        if norm == "layer":
            vector = torch.randn(D, device=device)
        if rope != "none":
            angles = torch.randn(1 if shared else B, x.shape[1], D // 2, device=device)
            cos, sin = angles.cos().to(table), angles.sin().to(table)
        head = 0 if norm == rope == "none" else D
        parameters = self.weights(N, bias)
        return ScatterArguments(
            cache, x, *parameters, rows, 1, head, norm, weight, vector, 1e-5, rope, cos, sin
        )  # fmt: skip


GROUPS = {
    "keys, values": lambda a: [a.spliced(0), a.spliced(1)],
    "queries, keys, values": lambda a: [a.compact(), a.spliced(0), a.spliced(1)],
    "two streams": lambda a: [
        a.compact(), a.spliced(0), a.spliced(1), a.compact(text=True), a.spliced(0, text=True), a.spliced(1, text=True)
    ],
    "one alone": lambda a: [a.spliced(1)],
    "widths of their own, one without a bias": lambda a: [
        a.compact(33), a.spliced(0, bias=False), a.compact(130), a.compact(1)
    ],
    "keys normed, values not": lambda a: [a.spliced(0, norm="rms"), a.spliced(1)],
    "queries and keys normed and rotated": lambda a: [
        a.compact(norm="rms", rope="interleaved"), a.spliced(0, norm="rms", rope="interleaved"), a.spliced(1)
    ],
    "other norms and rotations in each stream": lambda a: [
        a.spliced(0, norm="layer", rope="half"), a.spliced(1), a.spliced(0, text=True, norm="rms", bias=False),
        a.spliced(1, text=True, bias=False), a.compact(rope="half", shared=True),
    ],
    "the most there can be": lambda a: [a.compact(8 * (n + 1)) for n in range(8)],
}  # fmt: skip


def columns(members):
    return tuple(map(list, zip(*members, strict=True)))


def wide(value):
    """A member's argument in float64; where an epilogue keeps fp32, the twin does so for float64 alone."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@DEVICES
@DTYPES
@pytest.mark.parametrize("sizes", [{}, dict(A=1, K=24), dict(A=17, K=100, H=3, D=8)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_equals_its_members_one_by_one(device, dtype, sizes, name):
    attention = Attention(dtype, device, **sizes)
    members = GROUPS[name](attention)
    grouped_scatter_linear(*columns(members))
    unit = torch.finfo(dtype).eps
    for cache, x, *others in members:
        want = cache.double().fill_(torch.nan)
        scatter_linear_reference(want, *map(wide, (x, *others)))
        got, written = cache.double(), ~want.isnan()
        assert written.any() and not got[written].isnan().any()
        # on a CPU the linear's result is rounded, and then the epilogue's
        assert (got[written] - want[written]).abs().max() <= (2 * unit + 4e-6) * want[written].abs().max()
        cache[written] = torch.nan
    for buffer in attention.buffers:  # nothing beside the members' rows was written
        assert buffer.isnan().all()


@DEVICES
def test_the_same_bits_as_one_by_one(device, monkeypatch):
    attention = Attention(torch.bfloat16, device)
    members = GROUPS["two streams"](attention)
    tile = [tile for tile in module.GroupedLaunch(members).tiles().values() if not tile.persistent][-1]
    monkeypatch.setattr(module.GroupedLaunch, "fastest", lambda launch: tile)
    monkeypatch.setattr(launches.Launch, "fastest", lambda launch: tile)
    grouped_scatter_linear(*columns(members))
    together = [buffer.clone() for buffer in attention.buffers]
    for member in members:
        scatter_linear(*member)
    for buffer, other in zip(attention.buffers, together, strict=True):
        assert torch.equal(buffer.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize(
    ("dtype", "more"),
    [(torch.float64, {}), (torch.float32, dict(D=6, H=3)), (torch.float32, dict(table=True))],
    ids=["float64", "heads of 6", "tables of two dtypes"],
)
def test_what_the_kernel_does_not_take_runs_one_by_one(dtype, more, monkeypatch):
    ran, table = [], "table" in more
    monkeypatch.setattr(module, "one_by_one", lambda members: ran.append(members) or ONE_BY_ONE(members))
    attention = Attention(dtype, **({} if table else more))
    members = [attention.spliced(0, rope="half"), attention.spliced(1, rope="half")]
    if table:
        members[1] = attention.spliced(1, rope="half", table=torch.bfloat16)
    grouped_scatter_linear(*columns(members))
    assert len(ran) == 1
    for cache, *others in members:
        want = torch.full_like(cache, torch.nan)
        scatter_linear_reference(want, *others)
        torch.testing.assert_close(cache, want, equal_nan=True)


@DEVICES
def test_members_without_rows_are_left_out(device):
    attention = Attention(device=device)
    members = [attention.spliced(0), attention.spliced(1)]
    cache, x, weight, bias, rows, *others = members[0]
    grouped_scatter_linear(*columns([(cache, x[:, :0], weight, bias, rows[:, :0], *others), members[1]]))
    assert attention.buffers[0].isnan().all() and attention.buffers[1][:, :, TEXT:].isfinite().any()
    attention.buffers[1].fill_(torch.nan)
    empty = [(cache, x[:, :0], weight, bias, rows[:, :0], *others) for cache, x, weight, bias, rows, *others in members]
    grouped_scatter_linear(*columns(empty))
    assert attention.buffers[1].isnan().all()


def refused(change):
    attention = Attention()
    members = [list(attention.spliced(0)), list(attention.spliced(1))]
    lists = list(columns(members))
    change(lists)
    return tuple(lists)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lists: lists[3].pop(), "one entry per member"),
        (lambda lists: [entries.clear() for entries in lists], "1 to 8"),
        (lambda lists: [entries.extend(entries * 4) for entries in lists], "1 to 8"),
        (lambda lists: lists[7].__setitem__(1, "batch"), "norm must be one of"),
        (lambda lists: lists[1].__setitem__(1, torch.zeros(B, 7, 41)), r"weight must be \[N, K\]"),
        (
            lambda lists: [lists[1].__setitem__(1, torch.zeros(B, 7, 41)), lists[2].__setitem__(1, torch.zeros(64, 41))],
            "must share K",
        ),
        (
            lambda lists: [lists[n].__setitem__(1, lists[n][1].half()) for n in range(4)],
            "must share K, dtype and device",
        ),
    ],
)  # fmt: skip
def test_refuses_with_what_is_allowed(change, says):
    lists = refused(change)
    with pytest.raises(ValueError, match=says):
        grouped_scatter_linear(*lists)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError, match=says):  # also when traced
        grouped_scatter_linear(*tree_map_only(torch.Tensor, mode.from_tensor, lists))


def test_refuses_a_row_outside_the_cache():
    attention = Attention()
    attention.rows[1, 3] = S
    with pytest.raises(IndexError, match=rf"\[0, {S}\)"):
        grouped_scatter_linear(*columns([attention.spliced(0), attention.spliced(1)]))


@DEVICES
def test_opcheck(device):
    attention = Attention(device=device)
    members = GROUPS["other norms and rotations in each stream"](attention)
    for buffer in attention.buffers:
        buffer.zero_()
    torch.library.opcheck(grouped_scatter_linear, columns(members))


@DEVICES
def test_flops_are_those_of_the_linears(device):
    members = GROUPS["widths of their own, one without a bias"](Attention(device=device))
    with FlopCounterMode(display=False) as grouped:
        grouped_scatter_linear(*columns(members))
    with FlopCounterMode(display=False) as linears:
        for _, x, weight, bias, *_ in members:
            F.linear(x, weight, bias)
    assert grouped.get_total_flops() == linears.get_total_flops() > 0


def attend(keys, values, x, text, wq, wk, wv, bias, rows):
    """A joint attention: text and picture write into slices of the same caches, the queries into a fresh tensor."""
    query = torch.empty(B, x.shape[1], wq.shape[0], dtype=x.dtype, device=x.device)
    at, first = torch.arange(x.shape[1], device=x.device)[None], torch.arange(TEXT, device=x.device)[None]
    parts = [
        (query, x, wq, bias, at),
        *((c[:, :, TEXT:].permute(0, 2, 1, 3), x, w, bias, rows) for c, w in ((keys, wk), (values, wv))),
        *((c[:, :, :TEXT].permute(0, 2, 1, 3), text, w, None, first) for c, w in ((keys, wk), (values, wv))),
    ]
    rest = (1, 0, "none", None, None, 0.0, "none", None, None)
    torch.ops.ras_compile.grouped_scatter_linear(*columns([(*part, *rest) for part in parts]))
    return F.scaled_dot_product_attention(query.unflatten(2, (4, 16)).transpose(1, 2), keys, values)


@pytest.mark.skipif(INTERPRETED, reason="it sees Inductor's code: the same again")
@DEVICES
def test_inductor_writes_in_place_without_a_copy_of_the_caches(device):
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    attention = Attention(device=device)
    (wk, bias), (wq, _), (wv, _) = (attention.weights(64) for _ in range(3))
    keys, values = torch.randn(2, B, 4, TEXT + S, 16, device=device).unbind()
    given = (attention.x, attention.text, wq, wk, wv, bias, attention.rows)
    want_caches = keys.clone(), values.clone()
    want = attend(*want_caches, *given)
    caches = keys.clone(), values.clone()
    with torch._inductor.config.patch(fx_graph_cache=False):
        got, code = run_and_get_code(torch.compile(attend, fullgraph=True), *caches, *given)
    torch.testing.assert_close(caches, want_caches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    code = "\n".join(code)
    assert code.count("torch.ops.ras_compile.grouped_scatter_linear.default(") == 1
    # Of all buffers that the code allocates, none is as large as a cache.
    sizes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    assert sizes, "the pattern no longer matches Inductor's code"
    numels = [torch.Size(int(n) for n in size.split(",") if n.strip()).numel() for size in sizes]
    assert max(numels) < keys.numel(), sizes


def test_this_file_under_the_triton_interpreter(run_interpreted):
    run_interpreted(__file__)


class TestOnCUDA:
    pytestmark = ON_CUDA

    @pytest.mark.parametrize("name", ["two streams", "queries and keys normed and rotated"])
    def test_every_tile_gives_the_same_numbers(self, name):
        """So that pictures do not change with the timings of a run (a norm sums in an order that depends on the tile)."""
        attention = Attention(torch.bfloat16, "cuda", H=8, D=64, K=512, A=S)
        members = GROUPS[name](attention)
        launch = module.GroupedLaunch(members)
        results, names = [], []
        tiles = {tile.name: tile for tile in (*launches.TILES_HOPPER_GROUPED, *launches.TILES_16_BIT)}
        hopper = torch.cuda.get_device_capability() >= (9, 0) and launch.tma
        triton = importlib.import_module("triton")
        for label, tile in tiles.items():
            if tile.BN % launch.padded or (tile.tma and not hopper) or (tile.persistent and launch.padded > 1):
                continue
            for buffer in attention.buffers:
                buffer.fill_(torch.nan)
            try:
                launch(tile)
            except triton.OutOfResources:  # a smaller device
                continue
            names.append(label)
            results.append([buffer.clone() for buffer in attention.buffers])
        assert len(results) > 2 and (not hopper or any("tma" in label for label in names))
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                if name == "two streams":
                    assert torch.equal(a.view(torch.int16), b.view(torch.int16))
                else:
                    torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-5, equal_nan=True)

    def test_real_sizes_are_timed_and_right(self, monkeypatch):
        monkeypatch.setattr(module, "one_by_one", None)
        x, text = (
            torch.randn(2, 512, 1536, device="cuda").bfloat16(),
            torch.randn(2, 333, 1536, device="cuda").bfloat16(),
        )
        keys = torch.full((2, 24, 333 + 4096, 64), torch.nan, device="cuda", dtype=torch.bfloat16)
        rows = torch.stack([torch.randperm(4096, device="cuda")[:512] for _ in range(2)])
        weights = [torch.randn(1536, 1536, device="cuda").bfloat16() / 40 for _ in range(3)]
        query = torch.empty(2, 512, 1536, device="cuda", dtype=torch.bfloat16)
        rest = (1, 0, "none", None, None, 0.0, "none", None, None)
        parts = [
            (query, x, weights[0], None, torch.arange(512, device="cuda")[None]),
            (keys[:, :, 333:].permute(0, 2, 1, 3), x, weights[1], None, rows),
            (keys[:, :, :333].permute(0, 2, 1, 3), text, weights[2], None, torch.arange(333, device="cuda")[None]),
        ]
        grouped_scatter_linear(*columns([(*part, *rest) for part in parts]))
        batch = torch.arange(2, device="cuda")[:, None]
        results = [
            query,
            keys[:, :, 333:].permute(0, 2, 1, 3)[batch, rows].flatten(2),
            keys[:, :, :333].transpose(1, 2).flatten(2),
        ]
        for got, given, weight in zip(results, (x, x, text), weights, strict=True):
            want = F.linear(given.double(), weight.double())
            assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-5 * want.abs().max()).all()
        keys[:, :, :333] = keys[:, :, 333:].permute(0, 2, 1, 3)[batch, rows] = torch.nan
        assert keys.isnan().sum() >= keys.numel() - 2 * 512 * 1536

    @pytest.mark.parametrize("timed", [True, False], ids=["timed", "not timed"])
    def test_cuda_graph_replays_on_new_rows(self, timed):
        attention = Attention(torch.bfloat16, "cuda", H=8, D=64, K=512 if timed else 448, A=16)
        members = GROUPS["two streams"](attention)
        if timed:
            grouped_scatter_linear(*columns(members))
        else:
            F.linear(attention.x, members[0][2])  # cuBLAS starts outside a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grouped_scatter_linear(*columns(members))
        for buffer in attention.buffers:
            buffer.fill_(torch.nan)
        attention.x.copy_(torch.randn_like(attention.x))
        attention.rows.copy_(torch.stack([torch.randperm(S, device="cuda")[:16] for _ in range(B)]))
        graph.replay()
        got = [buffer.clone() for buffer in attention.buffers]
        for buffer in attention.buffers:
            buffer.fill_(torch.nan)
        for member in members:
            scatter_linear_reference(*member)
        torch.testing.assert_close(got, attention.buffers, rtol=2**-7, atol=1e-2, equal_nan=True)
