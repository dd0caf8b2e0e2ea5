"""The scatter-GEMM pass: it fires where a linear only feeds a splice, changes no number, and leaves the rest alone."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from contract import by_model, error, of_zoo, subject
from torch import nn

from ras_compile.kernels import tiles
from ras_compile.passes.fusion import sites as found
from ras_compile.passes.fusion.scatter import Fusion, fuse_scatter_linear
from ras_compile.passes.programs.program import sparse_program
from ras_compile.plans import plan as planning

SCATTER = torch.ops.ras_compile.scatter_linear.default
PUT = torch.ops.aten.index_put_.default
COPY = torch.ops.aten.copy_.default


class Attention(nn.Module):
    """`[B, N, C] -> [B, N, C]`: one attention layer of 4 heads of 4 channels.

    Args:
        norm: name of a norm of the keys.
        rope: name of a rotary embedding of queries and keys, its tables an input `[N, ..]`.
        twice: the values have another use.
        text: so many tokens of text stand before the picture.
        late: text and picture are put together before norm and rotary embedding.
        joint: text and picture are one sequence before the linear.
    """

    def __init__(
        self,
        norm: str = "",
        rope: str = "",
        twice: bool = False,
        text: int = 0,
        late: bool = False,
        joint: bool = False,
    ) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 6)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.kt = nn.Linear(16, 16)
        self.norm = NORMS[norm]() if norm else nn.Identity()
        self.rope, self.twice, self.late, self.joint = ROPES.get(rope), twice, late, joint
        self.text = nn.Parameter(torch.randn(1, text, 16)) if text else None

    def forward(self, x, cos=None, sin=None):
        x = self.embed(x)
        text = None if self.text is None else self.text.expand(len(x), -1, -1)
        if self.joint:
            x = torch.cat([text, x], 1)
        q, k, v = (layer(x).unflatten(2, (4, 4)) for layer in (self.q, self.k, self.v))
        if text is not None and not self.joint:
            kt, vt = (layer(text).unflatten(2, (4, 4)) for layer in (self.kt, self.v))
        if text is not None and self.late:
            k = torch.cat([kt, k], 1)
        k = self.norm(k)
        if self.rope is not None:
            k = self.rope(k, cos[None, :, None], sin[None, :, None])
        if text is not None and not self.joint:
            k, v = k if self.late else torch.cat([kt, k], 1), torch.cat([vt, v], 1)
        mixed = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        out = self.head(mixed.transpose(1, 2).flatten(2) + (v.flatten(2) if self.twice else 0))
        return out[:, text.shape[1] :] if self.joint else out


class WrittenOut(nn.Module):
    """RMS norm as some models write it: in fp32, with a mean and a root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class PlusOne(WrittenOut):
    """A norm that no kernel knows: its weight counts from one."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight.pow(2)) + x


NORMS = {
    "rms": lambda: nn.RMSNorm(4, eps=1e-6),
    "rms without a weight": lambda: nn.RMSNorm(4, eps=1e-6, elementwise_affine=False),
    "rms, written out": WrittenOut,
    "layer": lambda: nn.LayerNorm(4),
    "none that is known": PlusOne,
}


def interleaved(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def by_pairs(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


def turned_back(x, cos, sin):
    return interleaved(x, cos, -sin)


def complex_pairs(x, cos, sin):
    turn = torch.complex(cos[..., :2].contiguous(), sin[..., :2].contiguous())
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def added(x, cos, sin):
    return x * cos + x.flip(-1) * sin


ROPES = {
    "interleaved": interleaved, "half": half, "by pairs": by_pairs, "complex": complex_pairs, "backwards": turned_back,
    "none that is known": added,
}  # fmt: skip


def tables(length: int) -> dict[str, torch.Tensor]:
    angle = torch.rand(length, 2, dtype=torch.float64) * 6
    return {"cos": angle.cos().repeat_interleave(2, -1), "sin": angle.sin().repeat_interleave(2, -1)}


def counts(model: nn.Module, batch: int, dtypes=(torch.float64,), pays=None, **inputs) -> tuple[int, int, float]:
    """``(scatter-GEMMs, splices left, error against the unfused program)``."""
    torch.manual_seed(0)
    case = subject(model.double().eval(), {"x": torch.randn(batch, 12, 6, dtype=torch.float64), **inputs})
    rows = case.rows(5)
    tensors = case.plan.tensors(case.with_latent(case.other_latent()))
    _, caches = case.dense(case.values)
    plain = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    fused = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    probe = sparse_program(case.plan.analysis, 7, case.plan.sparse)
    fuse_scatter_linear(fused.graph, Fusion(12, probe.graph, pays, dtypes))
    fused.graph.lint()
    fused.recompile()
    results = []
    for program in (plain, fused):
        own = [cache.clone() for cache in caches]
        with torch.no_grad():
            program(*tensors, rows, *own)
        results.append(own)
    targets = [node.target for node in fused.graph.nodes]
    return targets.count(SCATTER), targets.count(PUT) + targets.count(COPY), error(*results)


@pytest.mark.parametrize("batch", [1, 3])
def test_fires_on_keys_values_and_noise(batch):
    assert counts(Attention(), batch)[:2] == (3, 0)
    assert counts(Attention(), batch)[2] < 1e-12


def test_sites_are_found_once_for_all_numbers_of_active_rows(monkeypatch):
    case = subject(Attention().double().eval(), {"x": torch.randn(2, 12, 6, dtype=torch.float64)})
    probe = sparse_program(case.plan.analysis, 7, case.plan.sparse)
    fusion, runs, run = Fusion(12, probe.graph, dtypes=(torch.float64,)), [], found.Experiment.run
    monkeypatch.setattr(found.Experiment, "run", lambda self: runs.append(self) or run(self))
    fused = [fuse_scatter_linear(sparse_program(case.plan.analysis, a, case.plan.sparse).graph, fusion) for a in (5, 3)]
    assert fused == [3, 3] and 0 < len(runs) <= 3


def test_kernels_of_all_choices_are_built_before_one_is_timed(monkeypatch):
    """The program is made twice where something has yet to be timed, once where all is known."""
    case = subject(Attention().bfloat16().eval(), {"x": torch.randn(2, 12, 6, dtype=torch.bfloat16)}, exact=False)
    known, events = set(), []

    def pays(ops):
        (_, _, weight, bias, *_), *_ = ops
        key = tuple(weight.shape), bias is None
        if key not in known:
            with suppress(tiles.Postponed):
                tiles.postpone(key)
                known.add(key)
                events.append("timed")
        return False

    for name in ("pays", "gather_pays", "attention_pays", "pays_grouped", "many_pays"):
        monkeypatch.setattr(planning.kernels, name, pays if name == "pays" else lambda *ops: False)
    monkeypatch.setattr(planning, "build", lambda noted: events.append(len(noted)))
    prepare, fusion = planning.prepare, case.plan.fusion  # as on CUDA
    monkeypatch.setattr(planning, "prepare", lambda program, **given: prepare(program, **{**given, "fusion": fusion}))
    case.plan.build(5)
    case.plan.build(5)
    assert events == [3, "timed", "timed", "timed"]


def test_a_splice_of_many_entries_is_no_site(monkeypatch):
    monkeypatch.setattr(found, "MAX_ENTRIES", 3 * 7 * 16 - 1)  # keys and values of three samples; the noise has fewer
    assert counts(Attention(), 3)[:2] == (1, 2)
    monkeypatch.setattr(found, "MAX_ENTRIES", 3 * 7 * 16)
    assert counts(Attention(), 3)[:2] == (3, 0)


@pytest.mark.parametrize(("batch", "rows"), [(1, 61), (2, 31), (4, 13), (8, 7)])
def test_sites_are_looked_for_in_fewer_rows_of_more_samples(batch, rows, monkeypatch):
    monkeypatch.setattr(planning, "PROBED", 62)
    case = subject(Attention().double().eval(), {"x": torch.randn(batch, 64, 6, dtype=torch.float64)})
    (probed,) = (node for node in case.plan.fusion.probe.nodes if node.name == "rows")
    assert tuple(probed.meta["val"].shape) == (batch, rows)


@pytest.mark.parametrize("batch", [1, 2])
def test_fires_inside_a_joint_cache(batch):
    """Text and picture each have their linear, and write into one cache: keys and values of both, and the noise."""
    fused, left, gap = counts(Attention(text=3), batch)
    assert (fused, left) == (5, 0)
    assert gap < 1e-12


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("norm", [name for name in NORMS if "known" not in name])
def test_a_norm_goes_into_the_kernel(batch, norm):
    fused, left, gap = counts(Attention(norm), batch)
    assert (fused, left) == (3, 0)
    assert gap < 1e-12


@pytest.mark.parametrize("norm", ["", "rms"])
@pytest.mark.parametrize("rope", [name for name in ROPES if name not in ("none that is known", "backwards")])
def test_a_rotary_embedding_goes_into_the_kernel(norm, rope):
    fused, left, gap = counts(Attention(norm, rope), 2, **tables(12))
    assert (fused, left) == (3, 0)
    assert gap < 1e-12


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rope", ["interleaved", "half", "complex"])
def test_text_and_picture_may_meet_before_the_norm(batch, rope):
    fused, left, gap = counts(Attention("rms", rope, text=3, late=True), batch, **tables(15))
    assert (fused, left) == (5, 0)
    assert gap < 1e-12


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rope", ["interleaved", "half"])
def test_text_and_picture_may_meet_before_the_linear(batch, rope):
    fused, left, gap = counts(Attention("layer", rope, text=3, joint=True), batch, **tables(15))
    assert fused >= 2 and left <= 1
    assert gap < 1e-12


@pytest.mark.parametrize(
    "model", [Attention("none that is known"), Attention(rope="none that is known"), Attention(twice=True)],
    ids=["a norm", "a rotary embedding", "another use"],
)  # fmt: skip
def test_leaves_alone_what_the_kernel_does_not_do(model):
    given = tables(12) if model.rope else {}
    assert counts(model, 2, **given)[:2] == (2, 1)


def test_a_rotation_the_other_way_is_not_taken_for_a_rotation():
    """The sign is in the table that reaches the kernel, or the site is left alone: never a wrong number."""
    fused, left, gap = counts(Attention(rope="backwards"), 2, **tables(12))
    assert fused + left == 3 and gap < 1e-12


def test_leaves_other_dtypes_alone():
    assert counts(Attention(), 2, dtypes=(torch.bfloat16,))[:2] == (0, 3)


def test_asks_once_for_each_size_whether_it_pays():
    asked = []

    def pays(ops):
        asked.append(ops)
        return ops[0][3] is not None  # those with a bias

    fused, left, gap = counts(Attention(), 2, pays=pays)
    assert (fused, left) == (2, 1) and gap < 1e-12
    assert len(asked) == 3 and all(isinstance(op[0], torch.Tensor) for ops in asked for op in ops)


class Patches(Attention):
    """`[B, C, H, W] -> [B, C, H, W]` in patches of 2 x 3: the last linear writes pixels."""

    def forward(self, x):
        batch, c, height, width = x.shape
        x = x.unflatten(3, (width // 3, 3)).unflatten(2, (height // 2, 2)).permute(0, 2, 4, 3, 5, 1)
        y = super().forward(x.reshape(batch, -1, 6)).reshape(batch, height // 2, width // 3, 2, 3, 1)
        return torch.einsum("bhwpqc->bchpwq", y).reshape(batch, c, height, width)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_last_linear_writes_pixels(batch):
    torch.manual_seed(0)
    case = subject(Patches().double().eval(), {"x": torch.randn(batch, 1, 6, 12, dtype=torch.float64)})
    program = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    assert fuse_scatter_linear(program.graph, Fusion(12, dtypes=(torch.float64,))) == 3
    assert not program.graph.find_nodes(op="call_function", target=PUT)
    program.recompile()
    rows, (_, caches) = case.rows(5), case.dense(case.values)
    own = [cache.clone() for cache in caches]
    values = case.with_latent(case.other_latent())
    with torch.no_grad():
        program(*case.plan.tensors(values), rows, *own)
    assert error(own, case.sparse(values, rows, caches)[1]) < 1e-12


# Linears that write into a cache, and splices left as they are: keys with a norm over all heads (Wan) are left.
MODELS = {"SD3": (9, 0), "SD3.5": (17, 0), "Flux": (9, 0), "QwenImageTransformer2DModel": (9, 0), "Wan": (3, 2)}


@pytest.mark.zoo
@pytest.mark.parametrize("name", by_model(MODELS))
def test_sites_of_known_models(name, active=7):
    case = of_zoo(name)
    rows, tokens = case.rows(active), case.frame.tokens
    _, caches = case.dense(case.values)
    values = case.with_latent(case.other_latent())
    program = sparse_program(case.plan.analysis, active, case.plan.sparse)
    probe = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    fused = fuse_scatter_linear(program.graph, Fusion(tokens, probe.graph, dtypes=(torch.float64,)))
    left = sum(len(program.graph.find_nodes(op="call_function", target=target)) for target in (PUT, COPY))
    assert (fused, left) == MODELS[name]
    program.graph.lint()
    program.recompile()
    own = [cache.clone() for cache in caches]
    with torch.no_grad():
        program(*case.plan.tensors(values), rows, *own)
    assert error(own, case.sparse(values, rows, caches)[1]) < 1e-11


@pytest.mark.parametrize("batch", [1, 2])
def test_fires_where_the_grid_has_two_sides(batch):
    """Rows count a grid of several latent dimensions: still one index, behind reshapes."""
    torch.manual_seed(0)
    case = subject(Grid().double().eval(), {"x": torch.randn(batch, 6, 3, 4, dtype=torch.float64)})
    program = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    assert fuse_scatter_linear(program.graph, Fusion(12, dtypes=(torch.float64,))) == 3
    program.recompile()
    rows, (_, caches) = case.rows(5), case.dense(case.values)
    own = [cache.clone() for cache in caches]
    values = case.with_latent(case.other_latent())
    with torch.no_grad():
        program(*[value for value in values if isinstance(value, torch.Tensor)], rows, *own)
    assert error(own, case.sparse(values, rows, caches)[1]) < 1e-12


class Grid(Attention):
    """`[B, C, H, W] -> [B, C, H, W]` around one attention layer."""

    def forward(self, x):
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
