"""The backend from the user's side: one line, the right steps, clear errors, nothing left behind."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch
from tiny import EAGER, LATENT, TEXT, TinyDiT, kinds, model, run
from torch import nn

import ras_compile
import ras_compile.plans.plan
from ras_compile.errors import UnsupportedGraph

pytestmark = pytest.mark.usefixtures("quick_collections")


def test_by_its_name_alone():
    compiled = torch.compile(model(), backend="ras", options=EAGER)
    run(compiled, LATENT, TEXT)
    assert kinds(compiled) == "ddssss"
    sparse = [record for record in ras_compile.trace(compiled) if record.kind == "sparse"]
    assert all(record.active == 12 and record.rows.shape == (2, 12) for record in sparse)


def test_dynamo_never_stops_to_compile_a_model_without_a_word():
    """The limit counts all compilations of a function, which many classes may share: those of other pipelines, too."""
    torch.compile(model(), backend="ras")  # which loads the backend
    assert torch._dynamo.config.recompile_limit >= 64
    with torch._dynamo.config.patch(recompile_limit=1):
        for sample_ratio in (0.5, 0.25):
            with (
                pytest.warns(ras_compile.RASWarning, match="recompile_limit = 1")
                if sample_ratio < 0.5
                else nullcontext()
            ):
                compiled = torch.compile(
                    TinyDiT().eval(), backend="ras", options={**EAGER, "sample_ratio": sample_ratio}
                )
                run(compiled, LATENT, TEXT)
    assert kinds(compiled) == ""


def test_all_tokens_give_the_dense_picture():
    plain = model()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "sample_ratio": 1.0})
    assert torch.allclose(run(compiled, LATENT, TEXT), run(plain, LATENT, TEXT), atol=1e-6)
    assert "s" in kinds(compiled)


def test_half_the_tokens_stay_near_the_dense_picture():
    plain = model()
    compiled = torch.compile(plain, backend="ras", options=EAGER)
    gap = (run(compiled, LATENT, TEXT) - run(plain, LATENT, TEXT)).norm() / LATENT.norm()
    assert 0 < gap < 0.1


class Numbers(TinyDiT):
    """Takes a list of numbers, as many pictures are in the batch."""

    def forward(self, hidden_states, timestep, text):
        return super().forward(hidden_states, torch.tensor(timestep, dtype=torch.float32), text)


@pytest.mark.parametrize(
    ("kind", "number"),
    [(TinyDiT, float), (TinyDiT, int), (Numbers, lambda time: [float(time), time / 2])],
    ids=["float", "int", "list"],
)
def test_a_python_number_as_timestep(kind, number):
    """One graph serves every value from the first call on, and steps are told by it."""
    torch.manual_seed(1)
    plain = kind().eval()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "sample_ratio": 1.0})
    for _ in range(2):
        latent = LATENT
        with torch.no_grad():
            for step in range(6):
                time = number(1000 - 100 * step)
                noise = compiled(latent, time, TEXT)
                torch.testing.assert_close(noise, plain(latent, time, TEXT))
                latent = latent - noise / 10
        assert kinds(compiled) == "ddssss", "the second picture's steps are those of the first"


def test_a_list_of_python_numbers_has_the_models_type():
    """`torch.tensor` of a list of floats is a float32 tensor, though each of them alone is a number of 64 bits."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model()

        def forward(self, hidden_states, timestep, text):
            out = self.model(hidden_states, torch.full((2,), 0.5), text)
            return out * (1 + torch.tensor([timestep] * 2)[:, None, None, None])

    plain = Scaled().eval()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "sample_ratio": 1.0})
    with torch.no_grad(), ras_compile.generation(4) as gen:
        for step in range(4):
            gen.step()
            found, wanted = (each(LATENT, 1 - step / 4, TEXT) for each in (compiled, plain))
            torch.testing.assert_close(found, wanted)
    assert kinds(compiled) == "ddss"


def test_a_picture_does_not_depend_on_the_one_before():
    compiled = torch.compile(model(), backend="ras", options=EAGER)
    alone = run(compiled, LATENT, TEXT)
    run(compiled, torch.randn_like(LATENT), torch.randn_like(TEXT), steps=5)
    with torch.no_grad():  # a run that stops half-way
        other = torch.randn_like(TEXT)
        for step in range(4):
            compiled(torch.randn_like(LATENT), torch.full((2,), 1 - step / 6), other)
    assert torch.equal(run(compiled, LATENT, TEXT), alone)


def test_two_instances_of_a_class_keep_apart():
    first, second = model(), model()
    options = {**EAGER, "unsupported": "error"}
    a, b = (torch.compile(m, backend="ras", options=options) for m in (first, second))
    alone = run(a, LATENT, TEXT), run(b, LATENT, TEXT)
    x = y = LATENT
    other = TEXT.clone()
    with torch.no_grad():
        for step in range(6):
            time = torch.full((2,), 1 - step / 6)
            x, y = x - a(x, time, TEXT) / 6, y - b(y, time, other) / 6
    assert torch.equal(x, alone[0])
    assert torch.equal(y, alone[1])


def test_a_second_size_and_a_new_weight():
    compiled = torch.compile(model(), backend="ras", options=EAGER)
    run(compiled, LATENT, TEXT)
    run(compiled, torch.randn(2, 4, 12, 8), TEXT.clone())
    assert kinds(compiled) == "ddssss"
    run(compiled, torch.randn(1, 4, 16, 16), torch.randn(1, 5, 6))
    assert kinds(compiled) == "ddssss"
    before = run(compiled, LATENT, TEXT)
    with torch.no_grad():
        compiled.head.weight.mul_(2)
    assert not torch.allclose(run(compiled, LATENT, TEXT), before)


def test_the_returned_noise_stays_as_it_was():
    compiled = torch.compile(model(), backend="ras", options=EAGER)
    kept, copies, latent = [], [], LATENT
    with torch.no_grad():
        for step in range(5):
            noise = compiled(latent, torch.full((2,), 1 - step / 5), TEXT)
            kept.append(noise)
            copies.append(noise.clone())
            latent = latent - noise / 5
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"sampel_ratio": 0.5}, "sampel_ratio.*sample_ratio"),
        ({"sample_ratio": 0}, "sample_ratio"),
        ({"sample_ratio": 1.5}, "sample_ratio"),
        ({"latent": "pixels"}, "pixels.*hidden_states"),
        ({"unsupported": "maybe"}, "unsupported.*dense.*error"),
        ({"inner_backend": "inducter"}, "inner_backend='inducter' is no backend.*'aot_eager'.*'inductor'"),
        ({"inner_backend": "inductor", "inner_options": {"max-autotune": True}}, "inner_options.*'max_autotune'"),
    ],
)
def test_a_bad_option_is_one_clear_error(options, names):
    compiled = torch.compile(model(), backend="ras", options={**EAGER, **options})
    with pytest.raises(ValueError, match=names) as caught:
        run(compiled, LATENT, TEXT)
    assert isinstance(caught.value, ras_compile.RASError)


class Prior(nn.Module):
    """`[B, C] -> [B, C]`: no tokens at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, hidden_states):
        return self.layers(hidden_states)


class Broken(TinyDiT):
    """Breaks Dynamo's graph in the middle; in a compiled function, so that there is no module to trace."""

    def forward(self, hidden_states, timestep, text):
        x = super().forward(hidden_states, timestep, text)
        torch._dynamo.graph_break()
        return x * 1.5


class Deciding(TinyDiT):
    """Goes one of two ways, by the values of its latent."""

    def forward(self, hidden_states, timestep, text):
        return super().forward(hidden_states, timestep, text) * (1.5 if hidden_states.mean() < 5 else 2.0)


class Dropping(TinyDiT):
    """Drops out, in training mode."""

    def forward(self, hidden_states, timestep, text):
        return nn.functional.dropout(super().forward(hidden_states, timestep, text), 0.1, self.training)


def cases():
    given = (LATENT, torch.ones(2), TEXT)
    yield "prior", Prior().eval(), (torch.randn(2, 8),), "no token grid"
    broken = Broken().eval()
    yield "graph break", lambda *arguments: broken(*arguments), given, "Dynamo broke the model's graph"
    yield "latent read", Deciding().eval(), given, "Python code reads.*latent's values.*in forward"
    yield "training mode", Dropping().train(), given, "training mode"
    yield "ambiguous", Ambiguous().eval(), (LATENT, LATENT + 1, TEXT), "hidden_states.*control.*latent="


class Ambiguous(TinyDiT):
    """Two inputs that could be the latent."""

    def forward(self, hidden_states, control, text):
        return super().forward(hidden_states + control, torch.ones(len(text)), text)


@pytest.mark.parametrize("name", ["prior", "graph break", "latent read", "training mode", "ambiguous"])
def test_what_cannot_be_proved_is_refused_or_runs_dense(name):
    _, module, given, reason = next(case for case in cases() if case[0] == name)
    with torch.no_grad():
        refused = torch.compile(copy.deepcopy(module), backend="ras", options={**EAGER, "unsupported": "error"})
        with pytest.raises(ras_compile.UnsupportedGraph, match=reason):
            refused(*given)
        torch._dynamo.reset()
        dense = torch.compile(module, backend="ras", options=EAGER)
        torch.manual_seed(1)
        with pytest.warns(ras_compile.RASWarning, match=reason):
            found = dense(*given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dense(*given)
        torch.manual_seed(1)
        assert torch.allclose(found, module(*given))


@pytest.mark.parametrize("name", ["prior", "graph break", "latent read", "training mode"])
@pytest.mark.parametrize("unsupported", ["dense", "error"])
def test_a_refused_model_is_not_kept_alive(name, unsupported):
    """Dynamo's code belongs to the model's class and outlives it; no error that is kept there holds the caller's frames."""

    def called() -> weakref.ref:
        _, module, given, _ = next(case for case in cases() if case[0] == name)
        compiled = torch.compile(module, backend="ras", options={**EAGER, "unsupported": unsupported})
        for _ in range(2):
            with torch.no_grad(), suppress(ras_compile.UnsupportedGraph):
                compiled(*given)
        return weakref.ref(module)

    alive = called()
    gc.collect()
    assert alive() is None


def test_gradients_are_refused():
    compiled = torch.compile(model(), backend="ras", options={**EAGER, "unsupported": "error"})
    with pytest.raises(ras_compile.UnsupportedGraph, match="no_grad"):
        compiled(LATENT, torch.ones(2), TEXT)


class Block(nn.Module):
    """One layer, `[B, N, C] -> [B, N, C]`, that looks like a small DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden_states):
        q, k, v = (m(hidden_states)[:, None] for m in (self.q, self.k, self.v))
        return hidden_states + self.o(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def test_one_block_is_not_the_whole():
    """Block-wise compilation: every block keeps its dense result, and one warning says why."""
    blocks = [Block().eval() for _ in range(3)]
    compiled = [torch.compile(block, backend="ras", options=EAGER) for block in blocks]
    with torch.no_grad(), pytest.warns(ras_compile.RASWarning, match="one block"):
        for _ in range(8):
            x = y = torch.randn(1, 12, 16)
            for block, fast in zip(blocks, compiled, strict=True):
                x, y = block(x), fast(y)
            assert torch.allclose(x, y, atol=1e-6)


def test_explain_says_why():
    told = ras_compile.explain(model(), hidden_states=LATENT, timestep=torch.ones(2), text=TEXT)
    assert told.supported and told.tokens == 24 and told.grid == (4, 6) and told.context == (3,)
    assert len(told.splices) == 5 and 1 < told.speedup(0.5) < told.speedup(0.25)
    assert told.speedup(told.ratio_for(1.3)) == pytest.approx(1.3, rel=0.05)
    assert "tiny.py" in str(told.splices[0].source) and "24 tokens" in str(told)
    with pytest.raises(ValueError, match="out of reach"):
        told.ratio_for(50)
    refused = ras_compile.explain(Prior().eval(), hidden_states=torch.randn(2, 8))
    assert not refused.supported and "no token grid" in refused.reason and "no token grid" in str(refused)


def test_a_frozen_context_is_computed_in_dense_steps_only():
    plain = model()
    pictures = {}
    for context in ("fresh", "frozen"):
        torch._dynamo.reset()
        compiled = torch.compile(plain, backend="ras", options={**EAGER, "context": context})
        pictures[context] = run(compiled, LATENT, TEXT)
        assert kinds(compiled) == "ddssss"
    dense = run(plain, LATENT, TEXT)
    assert not torch.equal(pictures["fresh"], pictures["frozen"])
    assert (pictures["frozen"] - dense).norm() / LATENT.norm() < 0.1


class WritesText(TinyDiT):
    """Writes into the text's part of the joint sequence, in place."""

    def forward(self, hidden_states, timestep, text):
        x = torch.cat([self.text(text), self.patch(hidden_states).flatten(2).transpose(1, 2)], 1)
        x[:, : text.shape[1]] = x[:, : text.shape[1]] * 2 + timestep[:, None, None]
        q, k, v = self.qkv[0](x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        height, width = hidden_states.shape[-2] // 2, hidden_states.shape[-1] // 2
        x = self.head(x[:, text.shape[1] :]).unflatten(1, (height, width)).unflatten(3, (2, 2, 4))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def test_a_frozen_context_may_be_written_in_place():
    plain = WritesText().eval()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "context": "frozen"})
    gap = (run(compiled, LATENT, TEXT) - run(plain, LATENT, TEXT)).norm() / LATENT.norm()
    assert kinds(compiled) == "ddssss" and 0 < gap < 0.1


def test_a_context_that_cannot_be_frozen_is_computed_afresh_with_one_warning(monkeypatch):
    def check(program, analysis, sparse):
        if sparse.live is not None:
            raise UnsupportedGraph("an op that wants all of it")

    monkeypatch.setattr(ras_compile.plans.plan, "check_sparse", check)
    plain = model()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "context": "frozen"})
    with pytest.warns(UserWarning, match="cannot be frozen: an op that wants all of it"):
        frozen = run(compiled, LATENT, TEXT)
    torch._dynamo.reset()
    assert torch.equal(frozen, run(torch.compile(plain, backend="ras", options=EAGER), LATENT, TEXT))


def test_a_speedup_is_turned_into_a_ratio():
    compiled = torch.compile(model(), backend="ras", options={**EAGER, "sample_ratio": 0.25})
    latent = torch.randn(1, 4, 32, 32)

    def sample(compiled, steps):
        with torch.no_grad(), ras_compile.generation(num_steps=steps) as gen:
            for step in range(steps or 4):
                gen.step()
                compiled(latent + step, torch.full((1,), 1 - step / 10), TEXT[:1])
        return ras_compile.trace(compiled)

    with torch.no_grad():
        explained = ras_compile.explain(
            compiled, options=EAGER, hidden_states=latent, timestep=torch.ones(1), text=TEXT[:1]
        )
    target = explained.speedup(0.25, num_steps=10)
    torch._dynamo.reset()
    compiled = torch.compile(
        model(), backend="ras", options={**{k: v for k, v in EAGER.items() if k != "sample_ratio"}, "speedup": target}
    )
    assert [record.active for record in sample(compiled, 10)] == [256] * 2 + [64] * 8
    longer = sample(compiled, 20)[-1].active  # fewer of the steps are warm-up: more tokens do
    assert 64 < longer < 256
    with pytest.raises(ValueError, match=r"option speedup.*2 dense steps of 3: 1.00 to 1\.\d+ can be had"):
        sample(compiled, 3)
    with pytest.raises(ValueError, match="option speedup needs the number of steps"):
        sample(compiled, None)


@pytest.mark.parametrize("change", ["loaded", "one weight", "a float that the model keeps"])
def test_what_changes_in_the_middle_of_a_picture_makes_the_next_step_dense(change):
    """Every time the same way: equal seeds give equal pictures."""

    class Scaled(TinyDiT):
        strength = 1.0

        def forward(self, hidden_states, timestep, text):
            return super().forward(hidden_states, timestep, text * self.strength)

    plain = Scaled().eval()
    before = copy.deepcopy(plain.state_dict())
    compiled = torch.compile(plain, backend="ras", options=EAGER)
    pictures = []
    for _ in range(
        4
    ):  # Dynamo has seen the float change after the first one, and takes it for an input after the second
        plain.load_state_dict(before)
        plain.strength, latent = 1.0, LATENT
        with torch.no_grad(), ras_compile.generation(num_steps=6) as gen:
            for step in range(6):
                gen.step()
                if step == 4 and change == "loaded":
                    plain.load_state_dict({name: value * 0.5 for name, value in before.items()})
                elif step == 4 and change == "one weight":
                    plain.mlp[1][0].weight.mul_(0.5)
                elif step == 4:
                    plain.strength = 0.25
                latent = latent - compiled(latent, torch.full((2,), 1 - step / 6), TEXT) / 6
        assert kinds(compiled) == "ddssds"
        pictures.append(latent)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


@pytest.fixture
def failing():
    """The name of an inner backend that compiles nothing."""
    from torch._dynamo.backends import registry

    def fail(graph, inputs):
        raise NotImplementedError("no code for this machine\nand a long report")

    registry.register_backend(fail, name="failing")
    yield "failing"
    registry._BACKENDS.pop("failing", None)
    registry._COMPILER_FNS.pop("failing", None)


def test_an_inner_compiler_that_fails(failing):
    plain = model()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "sample_ratio": 1.0, "inner_backend": failing})
    with pytest.warns(
        ras_compile.RASWarning, match=r"runs uncompiled.*'failing' fails.*no code for this machine\)"
    ) as told:
        found = run(compiled, LATENT, TEXT)
    assert sum("uncompiled" in str(warning.message) for warning in told) == 1
    assert torch.allclose(found, run(plain, LATENT, TEXT), atol=1e-6)
    assert kinds(compiled) == "ddssss"


def test_an_inner_compiler_that_fails_is_one_error_on_demand(failing):
    options = {**EAGER, "inner_backend": failing, "unsupported": "error"}
    compiled = torch.compile(model(), backend="ras", options=options)
    with pytest.raises(UnsupportedGraph, match="a program cannot be compiled.*no code for this machine"):
        run(compiled, LATENT, TEXT)


def test_an_inner_compiler_that_fails_on_a_refused_model(failing):
    plain = Prior().eval()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "inner_backend": failing})
    given = torch.randn(2, 8)
    with torch.no_grad(), pytest.warns(ras_compile.RASWarning, match="runs uncompiled"):
        assert torch.equal(compiled(given), plain(given))
