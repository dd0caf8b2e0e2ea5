"""Models whose Python code reads values of tensors: traced where Dynamo breaks their graph, and never on other values."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from reading import OPTIONS, Length, Pipe, Reads, inputs, kinds, latents, sample
from torch import Tensor, nn

import ras_compile
from ras_compile.backend import ras
from ras_compile.capture.python_state import PythonState
from ras_compile.dispatch.hooks import has_hooks
from ras_compile.dispatch.traced import TracedModel
from ras_compile.errors import RASWarning, UnsupportedGraph
from ras_compile.plans.plan import Plan


class Way(Reads):
    """Takes another way where the text is empty."""

    def read(self, text, mask):
        return text * 0.5 if torch.all(mask == 0) else text


class BooleanIndex(Reads):
    def read(self, text, mask):
        return torch.stack([one[use] for one, use in zip(text, mask.bool(), strict=True)])


class Nonzero(Reads):
    def read(self, text, mask):
        return text[:, torch.nonzero(mask[0]).flatten()]


class MaskedSelect(Reads):
    def read(self, text, mask):
        return torch.masked_select(text[:1], mask[:1, :, None].bool()).reshape(1, -1, text.shape[-1])


class Repeats(Reads):
    def read(self, text, mask):
        return torch.repeat_interleave(text, mask[0].long() + 1, dim=1)


class Numpy(Reads):
    def read(self, text, mask):
        return text[:, : int(mask[0].cpu().numpy().sum())]


class Border(Reads):
    """A tensor as the border of a slice, and as a size."""

    def read(self, text, mask):
        count = mask.sum(1)[0].long()
        return text[:, :count].reshape(1, count, -1) + torch.zeros(count, 1)


class Branches(Reads):
    def read(self, text, mask):
        kept = [row for row, use in zip(text[0], mask[0], strict=True) if use]
        return torch.stack(kept)[None]


class Written(Reads):
    """Writes at places that a mask gives."""

    def read(self, text, mask):
        text = text.clone()
        text[mask.bool()] = text[mask.bool()] * 2 + 1
        return text


class Shown(Reads):
    """Looks at its mask as text."""

    def read(self, text, mask):
        shown = str(mask), repr(mask[0]), f"{mask}"
        return text * (1 + sum(map(len, shown)) % 7) * (2 if "1, 1, 1" in shown[0] else 1)


@torch.compiler.disable
def formatted(number):
    return float(f"{number:.1f}")


class Formatted(Reads):
    def read(self, text, mask):
        return text * formatted(mask.sum())


READERS = [
    Length,
    Way,
    BooleanIndex,
    Nonzero,
    MaskedSelect,
    Repeats,
    Numpy,
    Border,
    Branches,
    Written,
    Shown,
    Formatted,
]


EXACT = {**OPTIONS, "sample_ratio": 1.0, "unsupported": "error"}


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=ras, options=EXACT)
    return model


def by_function(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="ras", options=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "compiled_by"), [*((kind, by_function) for kind in READERS), (Length, in_place), (Written, in_place)]
)
def test_a_model_that_reads_values_samples_adaptively(kind, compiled_by):
    """All rows active: each step is the model's own, for texts of two lengths."""
    model, compiled = kind(), compiled_by(kind())
    for length in (4, 2, 4):
        context = inputs(length, seed=length)
        for found, wanted in zip(sample(compiled, context), sample(model, context), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert "sparse" in kinds(compiled)


def test_a_value_that_changes_in_place_is_noticed():
    """The very tensors of the call before, with other values in them."""
    model = Length()
    compiled = torch.compile(model, backend="ras", options={**OPTIONS, "sample_ratio": 1.0})
    context = inputs(5)
    sample(compiled, context)
    context["mask"][:, 3:] = 0
    for found, wanted in zip(sample(compiled, context), sample(model, context), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_values_under_inference_mode_are_read_at_each_call():
    model = Length()
    compiled = torch.compile(model, backend="ras", options={**OPTIONS, "sample_ratio": 1.0})
    with torch.inference_mode():
        context = inputs(5)
        sample(compiled, context)
        context["mask"][:, 3:] = 0
        for found, wanted in zip(sample(compiled, context), sample(model, context), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_sparse_steps_compute_the_active_rows():
    compiled = torch.compile(Length(), backend="ras", options=OPTIONS)
    sample(compiled, inputs(4))
    last = ras_compile.trace(compiled)[-1]
    assert (last.kind, last.active) == ("sparse", 6)


def test_two_instances_that_share_dynamos_code():
    first, second = Length(), Length()
    with torch.no_grad():
        second.leave.weight.mul_(-2)
    for model in (first, second):
        compiled = torch.compile(model, backend="ras", options=EXACT)
        for found, wanted in zip(sample(compiled, inputs(4)), sample(model, inputs(4)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert isinstance(compiled.forward, TracedModel)
        assert "sparse" in kinds(compiled)


def scaled(model):
    model.scale = 3.0


def exchanged(model):
    model.qkv = nn.Linear(8, 24)


def assigned(model):
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)


def read_otherwise(model):
    model.read = lambda text, mask: text[:, :1]


@pytest.mark.parametrize("change", [scaled, exchanged, assigned, read_otherwise])
def test_a_model_that_changes_between_calls(change):
    """A graph holds for the Python objects that it was traced from: adapters that are scaled, parts that are exchanged."""
    model = Length()
    compiled = torch.compile(model, backend="ras", options={**OPTIONS, "sample_ratio": 1.0})
    sample(compiled, inputs(4))
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sample(compiled, inputs(4))
    for one, wanted in zip(found, sample(model, inputs(4)), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


class Table(Length):
    """Keeps a table that is no buffer, made at the first call."""

    table = None

    def read(self, text, mask):
        if self.table is None:
            self.table = torch.linspace(0, 1, 8)
        return super().read(text + self.table, mask)


def test_a_table_that_the_first_call_makes():
    model = Table()
    compiled = torch.compile(model, backend="ras", options=EXACT)
    for found, wanted in zip(sample(compiled, inputs(4)), sample(model, inputs(4)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert type(model.table) is Tensor
    model.table = model.table * 2
    for found, wanted in zip(sample(compiled, inputs(4)), sample(model, inputs(4)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    model.table.mul_(2)
    for found, wanted in zip(sample(compiled, inputs(4)), sample(model, inputs(4)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Placed(Reads):
    """Text and tokens go to the places that index vectors name; Dynamo captures it, but not where the tokens stand."""

    def forward(self, hidden_states, timestep, text, mask, places):
        x = self.enter(hidden_states.flatten(2).transpose(1, 2)) + self.time(timestep.reshape(-1, 1, 1))
        joint = torch.zeros(len(x), x.shape[1] + text.shape[1], x.shape[2])
        others = torch.ones(joint.shape[1], dtype=torch.bool).index_fill(0, places, False).nonzero().flatten()
        joint = joint.index_copy(1, places, x)
        joint[:, others] = text
        q, k, v = (part.unsqueeze(1) for part in self.qkv(joint).chunk(3, -1))
        joint = joint + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.leave(joint.index_select(1, places)).transpose(1, 2).reshape(hidden_states.shape)


class PlacedByIndex(Placed):
    """The same in other words, and without a reading."""

    def forward(self, hidden_states, timestep, text, mask, places):
        x = self.enter(hidden_states.flatten(2).transpose(1, 2)) + self.time(timestep.reshape(-1, 1, 1))
        joint = torch.zeros(len(x), x.shape[1] + 2, x.shape[2])
        joint = joint.scatter_add(1, torch.arange(2).reshape(1, 2, 1).expand(1, 2, x.shape[2]), text[:, :2])
        joint[:, places] = x
        joint = joint.index_add(1, places, x, alpha=2)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(joint).chunk(3, -1))
        joint = joint + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.leave(joint[:, places]).transpose(1, 2).reshape(hidden_states.shape)


@pytest.mark.parametrize("kind", [Placed, PlacedByIndex])
def test_places_that_follow_one_another(kind):
    """Tokens behind or before the text: two specialisations; places out of order run dense, and right."""
    model = kind()
    compiled = torch.compile(model, backend="ras", options={**OPTIONS, "sample_ratio": 1.0})
    for start in (6, 0, 6) if kind is Placed else (2, 0):
        context = {**inputs(6), "places": torch.arange(start, start + 24)}
        for found, wanted in zip(sample(compiled, context), sample(model, context), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert "sparse" in kinds(compiled)
    context["places"] = torch.arange(24).roll(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for found, wanted in zip(sample(compiled, context), sample(model, context), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert any("runs dense" in str(item.message) for item in caught)


class FromLatent(Reads):
    """Skips its attention where the noise is small: what it reads depends on the latent."""

    def forward(self, hidden_states, timestep, text, mask):
        if hidden_states.abs().mean() < 0.5:
            return hidden_states * 0
        return super().forward(hidden_states, timestep, text, mask)

    def read(self, text, mask):
        return text


class Counts(Length):
    """Counts its calls in an attribute, and lets the count into the result."""

    calls = 0

    def read(self, text, mask):
        self.calls += 1
        return super().read(text, mask) * self.calls


class Assigns(Length):
    """Exchanges what a tensor holds: no op of PyTorch says so."""

    def read(self, text, mask):
        text = super().read(text, mask) * 1
        text.data = text.data * 2
        return text


class FromTime(Length):
    """Multiplies by the timestep as a number: another one at each step."""

    def forward(self, hidden_states, timestep, text, mask):
        return super().forward(hidden_states, timestep, text, mask) * (1 + timestep.item())


class Phases(Length):
    """Goes another way in the second half of a run."""

    def forward(self, hidden_states, timestep, text, mask):
        noise = super().forward(hidden_states, timestep, text, mask)
        return noise * 2 if timestep[0] > 0.6 else noise


def test_a_test_of_the_timestep():
    model = Phases()
    compiled = torch.compile(model, backend="ras", options=EXACT)
    for found, wanted in zip(sample(compiled, inputs(4), 8), sample(model, inputs(4), 8), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert "sparse" in kinds(compiled)
    (found,) = compiled.forward.plans.values()
    assert len(found) == 2


class Number(Length):
    """Takes the timestep as a Python number."""

    def forward(self, hidden_states, timestep, text, mask):
        return super().forward(hidden_states, torch.full((len(hidden_states),), timestep), text, mask)


class Either(Length):
    """Takes a number for another kind of time than a tensor."""

    def forward(self, hidden_states, timestep, text, mask):
        time = torch.full((len(hidden_states),), 1000 * timestep if isinstance(timestep, float) else timestep)
        return super().forward(hidden_states, time, text, mask)


def test_a_timestep_that_is_a_number():
    """One trace serves all values, from the first call on: the model takes a tensor in its place."""
    model = Number()
    compiled = torch.compile(model, backend="ras", options=EXACT)
    latent, others = latents(1)[0], inputs(4)
    with torch.no_grad():
        for step in range(6):
            noise = compiled(latent, 1 - step / 6, **others)
            torch.testing.assert_close(noise, model(latent, 1 - step / 6, **others), rtol=1e-4, atol=1e-5)
            latent = latent - noise / 6
    assert kinds(compiled) == ["dense"] * 2 + ["sparse"] * 4
    assert sum(map(len, compiled.forward.plans.values())) == 1


def test_a_timestep_that_only_a_number_can_be():
    model = Either()
    compiled = torch.compile(model, backend="ras", options=OPTIONS)
    with torch.no_grad(), pytest.warns(RASWarning, match="a Python number.*computes something else: give it a tensor"):
        for time in (1.0, 0.9):
            found = compiled(latents(1)[0], time, **inputs(4))
            torch.testing.assert_close(found, model(latents(1)[0], time, **inputs(4)), rtol=1e-4, atol=1e-5)


REFUSED = {
    FromTime: "depends on the timestep's values.*in forward",
    FromLatent: "depends on the latent's values.*in forward",
    Counts: "changes itself",
    Assigns: "assigns to the `data` of a tensor; write into it with `copy_`.*in read",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_traced_runs_dense_with_one_warning(kind, monkeypatch):
    model = kind()
    compiled = torch.compile(model, backend="ras", options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sample(compiled, inputs(4))
    told = [str(item.message) for item in caught if issubclass(item.category, RASWarning)]
    assert len(told) == 1
    assert re.search(REFUSED[kind], told[0])
    if kind is not Counts:
        for one, wanted in zip(found, sample(model, inputs(4)), strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
    explanation = ras_compile.explain(kind(), hidden_states=latents(1)[0], timestep=torch.ones(1), **inputs(4))
    assert re.search(REFUSED[kind], explanation.reason)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_traced_is_an_error_on_demand(kind):
    compiled = torch.compile(kind(), backend="ras", options={**OPTIONS, "unsupported": "error"})
    with pytest.raises(UnsupportedGraph, match=REFUSED[kind]):
        sample(compiled, inputs(4), steps=1)


def with_a_hook(model):
    model.leave.register_forward_hook(lambda module, args, output: output * 2)


def with_another_forward(model):
    before = model.leave.forward
    model.leave.forward = lambda x: before(x) * 2


@pytest.mark.parametrize("change", [with_a_hook, with_another_forward])
def test_hooks_are_not_traced(change):
    """What a hook does must happen at each call: offloading moves weights, caches count calls."""
    model = Length()
    change(model)
    compiled = torch.compile(model, backend="ras", options={**OPTIONS, "unsupported": "error"})
    with pytest.raises(UnsupportedGraph, match="'leave' has hooks"):
        sample(compiled, inputs(4), steps=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ras", options=OPTIONS)
    with pytest.warns(RASWarning, match="'leave' has hooks"):
        found = sample(compiled, inputs(4))
    for one, wanted in zip(found, sample(model, inputs(4)), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_hooks_that_are_taken_away_leave_nothing_behind():
    """Dynamo stays at its fragments."""
    model = Length()
    hook = model.leave.register_forward_hook(lambda module, args, output: output * 2)
    compiled = torch.compile(model, backend="ras", options=OPTIONS)
    with pytest.warns(RASWarning, match="Length runs dense: .*'leave' has hooks"):
        sample(compiled, inputs(4))
    hook.remove()
    with ras_compile.generation():
        sample(compiled, inputs(4))
    assert kinds(compiled) == ["dense", "dense", "sparse", "sparse"]


def test_a_forward_that_is_put_back_is_no_hook():
    model = Length()
    before = model.leave.forward
    with_another_forward(model)
    assert has_hooks(model.leave)
    model.leave.forward = before
    assert not has_hooks(model.leave)


@pytest.mark.parametrize(("metric", "warmup"), [("std", 2), ("drift", 3)])
def test_the_first_run_is_like_all_others(metric, warmup):
    """Its first call runs in Dynamo's fragments and counts, though its noise is not known: drift needs two that are."""
    model = Length()
    for _ in range(2):  # compiled anew, with what Dynamo has made before
        compiled = torch.compile(model, backend="ras", options={**OPTIONS, "metric": metric, "warmup_steps": warmup})
        runs = []
        for _ in range(2):
            with ras_compile.generation(num_steps=5):
                runs.append(sample(compiled, inputs(4), steps=5))
            assert kinds(compiled) == ["dense"] * warmup + ["sparse"] * (5 - warmup)
        for one, other in zip(*runs, strict=True):
            torch.testing.assert_close(one, other)


def test_an_attached_pipeline_whose_branches_read_different_values():
    pipe = Pipe()
    with torch.no_grad():
        wanted = pipe.run(5)
        with ras_compile.attach(pipe, **EXACT) as handle:
            for _ in range(2):
                torch.testing.assert_close(pipe.run(5), wanted, rtol=1e-4, atol=1e-5)
            told = [(record.step, record.kind) for record in ras_compile.trace(handle)]
    assert told == [(step, "dense" if step < 2 else "sparse") for step in range(5) for _ in range(2)]


def test_explain_tells_what_is_traced():
    explanation = ras_compile.explain(Length(), hidden_states=latents(1)[0], timestep=torch.ones(1), **inputs(4))
    assert explanation.supported
    assert explanation.context == (4,)
    assert explanation.tokens == 24


def test_python_state_knows_what_has_changed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    model.config = {"width": 2, "names": ["a", "b"]}
    state = PythonState(model)
    assert state.holds()
    model.config = {"width": 2, "names": ["a", "b"]}
    assert not state.holds()  # another dictionary
    for change in (
        lambda: model.config["names"].append("c"),
        lambda: model.config.update(width=3),
        lambda: setattr(model[1], "p", 0.5),
        lambda: model.append(nn.Identity()),
        lambda: model[0].to(torch.float64),
        lambda: model[0].register_buffer("extra", torch.ones(1)),
        lambda: model.eval(),
    ):
        state = PythonState(model)
        assert state.holds()
        change()
        assert not state.holds()
    state = PythonState(model)
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    assert state.holds()  # weights are looked up at each call


@pytest.mark.parametrize("ratio", [0.5, 0.98, 1.0])
def test_a_step_behind_the_call_that_captured_goes_on_from_it(ratio):
    """That call runs as Dynamo's parts, and leaves what any dense one does."""
    compiled = torch.compile(Length(), backend="ras", options={**OPTIONS, "sample_ratio": ratio, "warmup_steps": 1})
    with ras_compile.generation(num_steps=4) as gen, torch.no_grad():
        for step, latent in enumerate(latents(4)):
            gen.step()
            compiled(latent, torch.tensor([1 - step / 4]), **inputs(4))
    assert kinds(compiled) == ["dense", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize(
    ("warmup", "metric", "reuse"), [(1, "drift", "forecast"), (2, "drift", "forecast"), (1, "std", "linear")]
)
def test_the_first_picture_is_the_second_one(warmup, metric, reuse):
    """Of two branches, whose texts are of two lengths."""
    options = {**OPTIONS, "warmup_steps": warmup, "metric": metric, "noise_reuse": reuse}
    compiled, pictures = torch.compile(Length(), backend="ras", options=options), []
    for _ in range(2):
        latent = latents(1)[0]
        with ras_compile.generation(num_steps=7) as gen, torch.no_grad():
            for step in range(7):
                gen.step()
                noises = [compiled(latent, torch.tensor([1 - step / 7]), **inputs(length)) for length in (4, 2)]
                latent = latent - sum(noises) / 14
        pictures.append(latent)
        assert kinds(compiled) == ["dense"] * 2 * warmup + ["sparse"] * 2 * (7 - warmup)
    # the very first noise is that of Dynamo's parts, which add in another order
    torch.testing.assert_close(*pictures, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left", [0, 1])
def test_no_memory_for_what_the_call_that_captured_leaves(left, monkeypatch):
    """That call is answered without it: it runs as Dynamo's parts, and the next one is dense."""
    ran = []

    def dense(plan, *given, dense=Plan.dense):
        ran.append(plan)
        if len(ran) == 1:
            raise torch.OutOfMemoryError("for caches")
        return dense(plan, *given)

    def bare(plan, given, bare=Plan.bare):
        if not left:
            raise torch.OutOfMemoryError("for anything")
        return bare(plan, given)

    monkeypatch.setattr(Plan, "dense", dense)
    monkeypatch.setattr(Plan, "bare", bare)
    compiled = torch.compile(Length(), backend="ras", options={**OPTIONS, "warmup_steps": 1})
    with pytest.warns(RASWarning, match="no memory left"):
        noises = sample(compiled, inputs(4))
    torch.testing.assert_close(noises[:2], sample(Length(), inputs(4))[:2])
    assert kinds(compiled) == ["dense", "dense", "sparse", "sparse"][1 - left :]


class Within(Length):
    """Enters a mode of autograd inside of its forward."""

    mode = torch.no_grad

    def read(self, text, mask):
        with type(self).mode():
            return super().read(text * 2, mask)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_mode_of_autograd_inside_of_the_model(mode, outer, monkeypatch):
    monkeypatch.setattr(Within, "mode", mode)
    model = Within()
    compiled = torch.compile(model, backend="ras", options=EXACT)
    with outer(), ras_compile.generation(num_steps=5) as gen:
        context = inputs(4)
        for step, latent in enumerate(latents(5)):
            gen.step()
            given = latent, torch.tensor([1 - step / 5])
            torch.testing.assert_close(compiled(*given, **context), model(*given, **context), rtol=1e-4, atol=1e-5)
    assert "sparse" in kinds(compiled)


def test_a_fact_about_the_mask_needs_no_attention():
    """FX takes attention for an op with effects: the guard of a model would be the model."""
    compiled = torch.compile(Length(), backend="ras", options=OPTIONS)
    sample(compiled, inputs(4))
    ((entry,),) = compiled.forward.plans.values()
    assert len(entry.trace.guard.reads) == 1
    computed = [node.name for node in entry.trace.guard.module.graph.nodes if node.op == "call_function"]
    assert len(computed) <= 3


def test_a_changed_weight_makes_a_traced_step_dense():
    model = Length()
    compiled = torch.compile(model, backend="ras", options=OPTIONS)
    for _ in range(2):
        with torch.no_grad(), ras_compile.generation(num_steps=6) as gen:
            for step, latent in enumerate(latents(6)):
                gen.step()
                if step == 4:
                    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
                compiled(latent, torch.tensor([1 - step / 6]), **inputs(4))
        assert kinds(compiled) == ["dense", "dense", "sparse", "sparse", "dense", "sparse"]
        assert ras_compile.trace(compiled)[4].reason == "its weights have changed"
