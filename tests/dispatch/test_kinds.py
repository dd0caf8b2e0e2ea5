"""What a call may be: the whole model behind a hook, its parts, one block, and what cannot be told."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from reading import OPTIONS, Length, Pipe, inputs, kinds, latents, sample
from torch import nn

import ras_compile
from ras_compile.dispatch import callers
from ras_compile.dispatch.kinds import KINDS
from ras_compile.errors import RASWarning, UnsupportedGraph
from ras_compile.pipelines import follow

STRICT = {**OPTIONS, "unsupported": "error"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, text, embedded):
        joint = torch.cat([x, text], 1) * (1 + embedded)
        q, k, v = self.qkv(joint).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        joint = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + joint[:, : x.shape[1]], text + joint[:, x.shape[1] :]


class Sorted(nn.Module):
    """Puts the valid tokens of its text first in a loop that Dynamo breaks, so that each block is compiled by itself."""

    reads = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.time, self.leave = nn.Linear(4, 16), nn.Linear(1, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states, timestep, text, mask):
        x, embedded = self.enter(hidden_states), self.time(timestep.view(-1, 1, 1))
        if self.reads and torch.all(text == 0):
            text = text * 0
        text = torch.stack([torch.cat([one[m], one[~m]]) for one, m in zip(text, mask.bool(), strict=True)])
        for block in self.blocks:
            x, text = block(x, text, embedded)
        return self.leave(x)


class ReadsFirst(Sorted):
    """Has a graph break before that loop, where the whole is captured; its blocks are compiled in that very call."""

    reads = True


class Loops(Sorted):
    """The same with a plain loop, whose frame Dynamo gives up."""

    def forward(self, hidden_states, timestep, text, mask):
        x, embedded = self.enter(hidden_states), self.time(timestep.view(-1, 1, 1))
        ordered = []
        for one, m in zip(text, mask.bool(), strict=True):
            ordered.append(torch.cat([one[m], one[~m]]))  # Dynamo breaks a comprehension otherwise
        text = torch.stack(ordered)
        for block in self.blocks:
            x, text = block(x, text, embedded)
        return self.leave(x)


@pytest.mark.parametrize("kind", [Sorted, ReadsFirst, Loops])
def test_a_break_inside_of_a_loop(kind):
    """The blocks that Dynamo compiles then are parts of the model, neither blocks that the user compiled nor models."""
    model, steps = kind(), 5
    compiled = torch.compile(model, backend="ras", options={**STRICT, "warmup_steps": 1})
    text, mask = torch.randn(1, 6, 16), torch.ones(1, 6)
    with torch.no_grad(), ras_compile.generation(num_steps=steps) as gen:
        for step in range(steps):
            gen.step()
            given = torch.randn(1, 64, 4), torch.tensor([1 - step / steps]), text, mask
            found = compiled(*given)
            assert found.shape == model(*given).shape
    assert kinds(compiled) == ["dense", "sparse", "sparse", "sparse", "sparse"]


class MovesFirst:
    """A hook in accelerate's manner: a forward in place of the model's, which breaks Dynamo's graph before it calls that."""

    def __init__(self, model: nn.Module, copies: bool) -> None:
        self.forward, self.copies, self.moves = model.forward, copies, 0
        model.forward = self

    @torch.compiler.disable
    def move(self, kwargs):
        self.moves += 1
        return {name: value.clone() for name, value in kwargs.items()} if self.copies else kwargs

    def __call__(self, **kwargs):
        kwargs = self.move(kwargs)
        return self.forward(**kwargs)


class Joint(Length):
    """Reads nothing."""

    def read(self, text, mask):
        return text


@pytest.mark.parametrize("copies", [False, True], ids=["the same tensors", "copies"])
def test_a_hook_before_the_whole_model(copies):
    """Dynamo's graph is that of a resumed function, and holds the whole model: offloading runs sparse."""
    model = Joint()
    hook = MovesFirst(model, copies)
    compiled = torch.compile(model, backend="ras", options=STRICT)
    context = inputs(4)
    with torch.no_grad(), ras_compile.generation(num_steps=4) as gen:
        for step, latent in enumerate(latents(4)):
            gen.step()
            compiled(hidden_states=latent, timestep=torch.tensor([1 - step / 4]), **context)
    assert kinds(compiled) == ["dense", "dense", "sparse", "sparse"]
    assert [record.timestep for record in ras_compile.trace(compiled)] == [1.0, 0.75, 0.5, 0.25]
    assert hook.moves == 4


def test_a_hook_is_explained():
    model = Joint()
    MovesFirst(model, False)
    told = ras_compile.explain(model, hidden_states=latents(1)[0], timestep=torch.ones(1), **inputs(4))
    assert told.supported and told.latent == "hidden_states"


def test_a_model_that_becomes_dense_is_told_so():
    """Its records are not those of the picture before."""
    model = Length()
    compiled = torch.compile(model, backend="ras", options=OPTIONS)
    for _ in range(2):
        with ras_compile.generation():
            sample(compiled, inputs(4))
    assert kinds(compiled) == ["dense", "dense", "sparse", "sparse"]
    hook = model.leave.register_forward_hook(lambda module, args, output: output * 2)
    for _ in range(2):
        with warnings.catch_warnings(), ras_compile.generation():
            warnings.simplefilter("ignore")
            sample(compiled, inputs(4))
        records = ras_compile.trace(compiled)
        assert [record.kind for record in records] == ["dense"] * 4
        assert all("hooks" in record.reason for record in records)
    for _ in range(2):  # without anybody who tells the steps
        sample(compiled, inputs(4))
        assert kinds(compiled) == ["dense"] * 4
    hook.remove()
    with ras_compile.generation():
        sample(compiled, inputs(4))
    assert kinds(compiled) == ["dense", "dense", "sparse", "sparse"]


def test_a_whole_model_that_is_refused_is_told():
    class Random(Joint):
        def forward(self, hidden_states, timestep, text, mask):
            return nn.functional.dropout(super().forward(hidden_states, timestep, text, mask), 0.1, self.training)

    compiled = torch.compile(Random().train(), backend="ras", options=OPTIONS)
    with pytest.warns(RASWarning, match="training mode"):
        sample(compiled, inputs(4))
    records = ras_compile.trace(compiled)
    assert [record.kind for record in records] == ["dense"] * 4
    assert all("training mode" in record.reason for record in records)


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.time = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(1, 16)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, timestep, text):
        x, embedded = self.enter(x), self.time(timestep.reshape(-1, 1, 1))
        for block in self.blocks:
            x, text = block(x, text.clone(), embedded)
        return self.leave(x)


@pytest.mark.parametrize("unseen", ["is_call", "owner_of"])
def test_who_calls_cannot_be_told(unseen, monkeypatch):
    """Another PyTorch may call what it compiled from frames of other names: nothing runs sparse then, and that is said."""
    if unseen == "is_call":
        monkeypatch.setattr(callers, "is_call", lambda code: False)
    else:
        monkeypatch.setattr(callers, "owner_of", lambda frame: (None, frame))
    model, plain = TwoBlocks(), TwoBlocks()
    for block in model.blocks:
        block.compile(backend="ras", options={**OPTIONS, "warmup_steps": 1})
    text = torch.randn(2, 3, 16)
    with (
        pytest.warns(RASWarning, match="does not show who calls the compiled graph"),
        torch.no_grad(),
        ras_compile.generation(num_steps=4) as gen,
    ):
        for step in range(4):
            gen.step()
            given = torch.randn(2, 16, 4), torch.full((2,), 1 - step / 4), text
            torch.testing.assert_close(model(*given), plain(*given))
    torch._dynamo.reset()
    with pytest.raises(UnsupportedGraph, match="does not show who calls"), torch.no_grad():
        torch.compile(plain.blocks[0], backend="ras", options=STRICT)(
            torch.randn(2, 16, 16), text, torch.ones(2, 1, 16)
        )


def test_a_forward_that_is_compiled_alone_is_a_block_all_the_same():
    model, plain = TwoBlocks(), TwoBlocks()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="ras", options={**OPTIONS, "warmup_steps": 1})
    text = torch.randn(2, 3, 16)
    with pytest.warns(RASWarning, match="one block of a transformer"), torch.no_grad():
        for step in range(4):
            given = torch.randn(2, 16, 4), torch.full((2,), 1 - step / 4), text
            torch.testing.assert_close(model(*given), plain(*given))


def test_the_table_is_in_plain_words():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert all(kind.recognised and kind.runs and kind.said for kind in KINDS)


class Packed(nn.Module):
    """Takes packed tokens `[B, N, C]`, the last of them a reference picture, and reads the length of its text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.time = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(1, 16)
        self.block = Block()

    def forward(self, hidden_states, timestep, text, mask):
        text = text[:, : int(mask.sum())]
        return self.leave(self.block(self.enter(hidden_states), text, self.time(timestep.reshape(-1, 1, 1)))[0])


def test_a_window_of_a_traced_model(monkeypatch):
    """The attached scheduler knows some of the tokens only, the picture: the others are context, whatever way of capture."""
    monkeypatch.setattr(follow, "picture_window", lambda latent, sample: slice(0, 12))
    pipe = Pipe()
    pipe.transformer = Packed()
    pipe.scheduler.set_timesteps(5)
    text, mask = torch.randn(1, 6, 16), torch.ones(4)
    with (
        torch.no_grad(),
        ras_compile.attach(pipe, **{**STRICT, "sample_ratio": 0.5, "ratio_schedule": "constant"}) as handle,
    ):
        for _ in range(2):
            x = torch.randn(1, 20, 4)
            for t in pipe.scheduler.timesteps:
                noise = pipe.transformer(hidden_states=x, timestep=t[None] / 1000, text=text, mask=mask)
                assert noise.shape == x.shape
                x = pipe.scheduler.step(noise, t, x, return_dict=False)[0]
            pipe.scheduler.set_timesteps(5)
        records = ras_compile.trace(handle)
    sparse = [record for record in records if record.kind == "sparse"]
    assert sparse and all(record.active == 6 for record in sparse)


def test_the_docs_show_the_table_of_kinds():
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    for kind in KINDS:
        assert f"| {kind.name} | {kind.recognised} | {kind.runs} | {kind.said} |" in text
