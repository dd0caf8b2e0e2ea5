"""The gather-GEMM pass: it fires where a linear reads gathered rows, changes no number, and leaves the rest alone."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from contract import by_model, error, of_zoo, subject
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ras_compile.passes.fusion import gathered
from ras_compile.passes.fusion.gather import fuse_gather_linear
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.programs.program import sparse_program

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernel runs, in single precision
DTYPE, TIGHT = (torch.float32, 1e-4) if INTERPRETED else (torch.float64, 1e-12)


class Embedding(nn.Module):
    """`[B, 3, h p, w q] -> [B, N, 16]`, N = h w: patches of 2 x 3 by a convolution; position embeddings are added."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 16, (2, 3), (2, 3)), nn.Linear(18, 16)
        self.table = nn.Parameter(torch.randn(1, 12, 16))
        self.large = nn.Parameter(torch.randn(1, 6, 7, 16))

    def forward(self, image):
        return self.convolution(image).flatten(2).mT + self.table


class Turned(Embedding):
    """The table counts channels first, and is added before the tokens are put in order."""

    def forward(self, image):
        return (self.convolution(image) + self.table.mT.unflatten(2, (3, 4))).flatten(2).mT


class Cropped(Embedding):
    def forward(self, image):
        return self.large[:, 2:5, 1:5].reshape(1, -1, 16) + self.convolution(image).flatten(2).mT


class PerSample(Embedding):
    def forward(self, image, table):
        return super().forward(image) - self.table + table


class Reshaped(Embedding):
    def forward(self, image):
        patches = image.unflatten(3, (4, 3)).unflatten(2, (3, 2)).permute(0, 2, 4, 3, 5, 1)
        return self.linear(patches.reshape(len(image), 12, 18))


class Scaled(Embedding):
    """Half the numbers: no entry is the same, though every address would be."""

    def forward(self, image):
        return self.convolution(image * 0.5).flatten(2).mT


class Standardised(Embedding):
    """What is gathered is computed in the program."""

    def forward(self, image):
        return self.convolution(image - image.mean()).flatten(2).mT


class Kept(Embedding):
    """What is gathered has another use."""

    def forward(self, image):
        x = image.unflatten(3, (4, 3)).unflatten(2, (3, 2)).permute(0, 2, 4, 1, 3, 5).reshape(len(image), 12, 18)
        return self.linear(x) + x[..., :16]


class ScaledTable(Embedding):
    def forward(self, image):
        return self.convolution(image).flatten(2).mT + self.table * 0.5


class Alpha(Embedding):
    def forward(self, image):
        return torch.add(self.convolution(image).flatten(2).mT, self.table, alpha=2)


class Flipped(Embedding):
    def forward(self, image):
        return self.convolution(image).flatten(2).mT + self.table.flip(1)


class Across(Reshaped):
    """The sum counts channels first: the product's entries stand elsewhere in it."""

    def forward(self, image):
        return (super().forward(image).mT + self.table.mT).mT


class Wider(Embedding):
    """The table is of a wider dtype, as position embeddings of single precision are beside a product in bf16."""

    def forward(self, image, table):
        return (self.convolution(image).flatten(2).mT + table).to(image.dtype)


class Twice(Embedding):
    """The product has another use than the sum."""

    def forward(self, image):
        x = self.convolution(image).flatten(2).mT
        return torch.cat([x + self.table, x], -1)[..., ::2]


class Grouped(Embedding):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 18, (2, 3), (2, 3), groups=3)

    def forward(self, image):
        return self.grouped(image)[:, 2:].flatten(2).mT


class Frames(Embedding):
    """The frames of a video are samples of the convolution."""

    def forward(self, image):
        x = self.convolution(image.transpose(1, 2).flatten(0, 1))
        return x.unflatten(0, (len(image), -1)).flatten(3).transpose(2, 3).flatten(1, 2)


class Model(nn.Module):
    """`[B, C, ...] -> [B, N, 6]` behind an embedding."""

    def __init__(self, embed: Embedding) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = embed, nn.Linear(16, 48), nn.Linear(16, 18)

    def forward(self, latent, **given):
        x = self.embed(latent, **given)
        x = x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        y = self.head(x)
        if latent.ndim == 5:
            return (
                y.unflatten(1, (2, 3, 4)).unflatten(-1, (2, 3, 3)).permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
            )
        return y.unflatten(1, (3, 4)).unflatten(-1, (2, 3, 3)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def gathers(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The gather-GEMMs of a program."""
    return [node for node in graph.nodes if str(node.target) == "ras_compile.gather_linear.default"]


def counts(
    embed: Embedding, batch: int, pays=None, dtypes=(DTYPE,), shape=(3, 6, 12), **given
) -> tuple[int, int, float]:
    """``(gather-GEMMs, those with a table, error against the unfused program)``."""
    torch.manual_seed(0)
    inputs = {"latent": torch.randn(batch, *shape, dtype=DTYPE), **given}
    case = subject(Model(embed).to(DTYPE).eval(), inputs, exact=False)
    rows, tokens = case.rows(5), case.frame.tokens
    _, caches = case.dense(case.values)
    values = case.with_latent(case.other_latent())
    program = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    found = fuse_gather_linear(program.graph, Fusion(tokens, dtypes=dtypes, gather_pays=pays))
    fused = gathers(program.graph)
    assert len(fused) == found
    program.graph.lint()
    program.recompile()
    own = [cache.clone() for cache in caches]
    with torch.no_grad():
        program(*case.plan.tensors(values), rows, *own)
    return found, sum(len(node.args) > 5 for node in fused), error(own, case.sparse(values, rows, caches)[1])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("embed", [Embedding, Turned, Cropped])
def test_fires_on_patches_and_the_table_that_is_added(embed, batch):
    found, tables, gap = counts(embed(), batch)
    assert (found, tables) == (1, 1) and gap < TIGHT


def test_fires_on_a_table_of_each_sample():
    found, tables, gap = counts(PerSample(), 2, table=torch.randn(2, 12, 16, dtype=DTYPE))
    assert found == 1 and gap < TIGHT


@pytest.mark.parametrize("batch", [1, 2])
def test_fires_on_patches_by_reshape(batch):
    found, tables, gap = counts(Reshaped(), batch)
    assert (found, tables) == (1, 0) and gap < TIGHT


@pytest.mark.parametrize("batch", [1, 2])
def test_fires_where_frames_are_samples_of_the_convolution(batch):
    found, tables, gap = counts(Frames(), batch, shape=(3, 2, 6, 12))
    assert (found, tables) == (1, 0) and gap < TIGHT


@pytest.mark.parametrize("embed", [Scaled, Standardised, Kept, Grouped])
def test_leaves_alone_what_the_kernel_does_not_do(embed):
    assert counts(embed(), 2)[0] == 0


@pytest.mark.parametrize("embed", [ScaledTable, Alpha, Flipped, Across, Twice])
def test_leaves_alone_what_is_no_table(embed):
    found, tables, gap = counts(embed(), 2)
    assert (found, tables) == (1, 0) and gap < TIGHT


def test_a_table_of_another_dtype_stays_an_addition(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", torch.float32)
    table = torch.linspace(-1, 1, 192, dtype=torch.float64).view(1, 12, 16)
    found, tables, gap = counts(Wider(), 2, dtypes=(torch.float32,), table=table)
    assert (found, tables) == (1, 0) and gap < 1e-4


def test_leaves_other_dtypes_alone():
    assert counts(Embedding(), 2, dtypes=(torch.bfloat16,))[0] == 0


def test_asks_whether_it_pays():
    asked = []
    assert counts(Embedding(), 2, pays=asked.append)[0] == 0  # None: no
    (args,) = asked
    assert all(isinstance(value, torch.Tensor) for value in args[:4])
    assert counts(Embedding(), 2, pays=lambda args: True)[0] == 1


class Entries(TorchDispatchMode):
    """Notes the most entries that a tensor with memory has, of those that ops return."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not value.is_meta:
                self.most = max(self.most, value.numel())
        return result


@pytest.mark.parametrize("embed", [Embedding, Turned, Reshaped])
def test_a_large_batch_costs_its_index_tensors(embed, batch=50, active=5):
    torch.manual_seed(0)
    case = subject(Model(embed()).to(DTYPE).eval(), {"latent": torch.randn(batch, 3, 6, 12, dtype=DTYPE)}, exact=False)
    program = sparse_program(case.plan.analysis, active, case.plan.sparse)
    with Entries() as entries:
        assert fuse_gather_linear(program.graph, Fusion(case.frame.tokens, dtypes=(DTYPE,))) == 1
    # The tokens of all samples, and the 2 x 3 pixels of the active ones: never a pixel's channels, nor those of the product.
    assert batch * case.frame.tokens <= entries.most <= batch * active * 6


def test_refuses_index_tensors_that_would_take_long(monkeypatch):
    monkeypatch.setattr(gathered, "LARGEST", 3 * 5 * 6)  # of one of the draws
    assert counts(Reshaped(), 3)[0] == 0


# Gather-GEMMs, and those with a table.
MODELS = {
    "SD3": (1, 1), "DiT": (1, 1), "PixArt": (1, 1), "Flux": (1, 0), "Lumina-Next": (1, 0), "Lumina2Transformer2DModel": (1, 0),
    "Wan": (1, 0), "CogVideoXTransformer3DModel": (1, 0), "SanaTransformer2DModel": (1, 0),
}  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="slow there, and the same again")
@pytest.mark.zoo
@pytest.mark.parametrize("name", by_model(MODELS))
def test_sites_of_known_models(name, active=6):
    case = of_zoo(name)
    rows = case.rows(active)
    _, caches = case.dense(case.values)
    values = case.with_latent(case.other_latent())
    program = sparse_program(case.plan.analysis, active, case.plan.sparse)
    found = fuse_gather_linear(program.graph, Fusion(case.frame.tokens, dtypes=(torch.float64,)))
    fused = gathers(program.graph)
    assert (found, sum(len(node.args) > 5 for node in fused)) == MODELS[name]
    program.recompile()
    own = [cache.clone() for cache in caches]
    with torch.no_grad():
        program(*case.plan.tensors(values), rows, *own)
    assert error(own, case.sparse(values, rows, caches)[1]) < 1e-11


def test_this_file_under_the_triton_interpreter(run_interpreted):
    run_interpreted(__file__)
