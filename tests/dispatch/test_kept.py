"""Captures that one process keeps and another one uses: where everything is as it was they are called, and else Dynamo captures."""

from __future__ import annotations

import enum
import gc
import pickle
import sys
import threading
import warnings
import weakref
from types import ModuleType

import pytest
import torch
from tiny import EAGER, LATENT, TEXT, TinyDiT, kinds, run
from torch import nn
from zoo import ZOO

import ras_compile
from ras_compile import _torch
from ras_compile.capture import kept as keeping
from ras_compile.capture import numbers
from ras_compile.capture.kept import Kept, keep
from ras_compile.capture.on_disk import Unkeepable
from ras_compile.capture.words import fingerprint
from ras_compile.dispatch import kept
from ras_compile.dispatch.callers import is_call, kept_calls
from ras_compile.dispatch.kept import Call, captures, give, use_loaded

pytestmark = pytest.mark.skipif(not _torch.CAPTURES_AHEAD, reason="this PyTorch does not capture ahead of time")


def drawn(model, latent=LATENT, text=TEXT, **options):
    """A compiled model, the latent that it draws, and how many graphs Dynamo captured for that."""
    compiled = torch.compile(model, backend="ras", options={**EAGER, **options})
    use_loaded(compiled)
    torch._dynamo.utils.counters.clear()
    picture = run(compiled, latent, text)
    return compiled, picture, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No calls of other tests' models."""
    monkeypatch.setattr(kept, "called", weakref.WeakKeyDictionary())
    torch._dynamo.reset()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyDiT().eval()


def saved(model, **given):
    """The captures of a model that has drawn once, as another process would have them."""
    drawn(model, **given)
    found = captures(model)
    torch._dynamo.reset()
    return found


def test_a_capture_takes_the_place_of_dynamo(model):
    compiled, picture, graphs = drawn(model)
    assert graphs == 1
    found = captures(model)
    assert len(found) == 1
    torch._dynamo.reset()
    other = TinyDiT().eval()
    other.load_state_dict(model.state_dict())
    give(other, found)
    again, same, graphs = drawn(other)
    assert graphs == 0 and torch.equal(picture, same)
    assert kinds(again) == kinds(compiled) and "s" in kinds(again)


def test_the_functional_graph_travels(model, monkeypatch):
    picture, found = drawn(model)[1], captures(model)
    torch._dynamo.reset()
    give(model, found)
    monkeypatch.setattr(numbers, "capture", lambda *given, **named: pytest.fail("captured anew"))
    assert torch.equal(drawn(model)[1], picture)


def test_weights_are_those_of_the_model_that_is_called(model):
    found = saved(model)
    torch.manual_seed(1)
    one, two = TinyDiT().eval(), TinyDiT().eval()
    wanted = [drawn(each)[1] for each in (one, two)]
    torch._dynamo.reset()
    give(one, found)
    give(two, found)
    pictures = [drawn(each) for each in (one, two)]
    assert [graphs for _, _, graphs in pictures] == [0, 0]
    assert all(torch.equal(a, b[1]) for a, b in zip(wanted, pictures, strict=True))


def test_other_sizes_are_captured(model):
    found = saved(model)
    wide = torch.randn(2, 4, 8, 16)
    wanted = drawn(model, wide)[1]
    torch._dynamo.reset()
    give(model, found)
    compiled, _, graphs = drawn(model)
    assert graphs == 0
    assert torch.equal(run(compiled, wide, TEXT), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Mode(enum.Enum):
    ONCE = 1
    TWICE = 2


def closing(factor):
    """A forward that finds a number around it, and has another one by default."""

    def forward(self, hidden_states, timestep, text, times=1.0):
        found = self.more(twice(TinyDiT.forward(self, hidden_states, timestep, text)))
        if self.mode is Mode.TWICE:
            found = found * 2
        found = kept_or_halved(found).positive()
        return found * FACTOR * self.scale * self.table["x"] * self.own * self.helper.factor * factor * times

    return forward


class Helper:
    """What a model holds and is no module, such as a processor of attention."""

    factor = 1.0


NOTHING = object()


def kept_or_halved(x, given=NOTHING):
    return x if given is NOTHING else x / 2


class Switched(TinyDiT):
    """Reads attributes of its own and of its class, global numbers and functions, and what is around its forward."""

    scale = 1.0
    forward = closing(1.0)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.own, self.mode, self.helper = {"x": 1.0}, 1.0, Mode.ONCE, Helper()

    def more(self, x):
        return x


FACTOR = 1.0


def twice(x):
    return x + x


def thrice(x):
    return x + x + x


def change_attribute(model, patch):
    model.own = 0.5


def change_table(model, patch):
    model.table["x"] = 0.5


def change_global(model, patch):
    patch.setattr(sys.modules[__name__], "FACTOR", 0.5)


def change_function(model, patch):
    patch.setattr(sys.modules[__name__], "twice", thrice)


def change_layer(model, patch):
    model.mlp[0][1] = nn.ReLU()


def change_hook(model, patch):
    model.mlp[1].register_forward_hook(lambda module, given, output: 2 * output)


def change_root_hook(model, patch):
    model.register_forward_hook(lambda module, given, output: 2 * output)


def change_forward(model, patch):
    own = model.forward
    model.forward = lambda *given: 2 * own(*given)


def change_class(model, patch):
    patch.setattr(Switched, "scale", 0.5)


def change_method(model, patch):
    patch.setattr(Switched, "more", lambda self, x: 3 * x)


def change_part_method(model, patch):
    own = nn.GELU.forward
    patch.setattr(nn.GELU, "forward", lambda self, x: 2 * own(self, x))


def change_member(model, patch):
    model.mode = Mode.TWICE


def change_defaults(model, patch):
    patch.setattr(Switched.forward, "__defaults__", (2.0,))


def change_forward_of_class(model, patch):
    own = Switched.forward
    patch.setattr(Switched, "forward", lambda self, *given: 2 * own(self, *given))


def change_sentinel(model, patch):
    patch.setattr(kept_or_halved, "__defaults__", (object(),))


def change_helper(model, patch):
    own = object.__getattribute__
    patch.setattr(
        Helper, "__getattribute__", lambda self, name: 2.0 if name == "factor" else own(self, name), raising=False
    )


def change_tensor(model, patch):
    patch.setattr(torch.Tensor, "positive", lambda self: 2 * self)


def change_cell(model, patch):
    patch.setattr(Switched.forward.__closure__[0], "cell_contents", 3.0)


CHANGES = [
    change_attribute, change_table, change_global, change_function, change_layer, change_hook, change_root_hook, change_forward,
    change_class, change_method, change_part_method, change_member, change_defaults, change_forward_of_class, change_cell,
    change_sentinel, change_helper, change_tensor,
]  # fmt: skip
# What plain torch.compile does not see either, once a call is compiled.
UNSEEN = [change_hook, change_method, change_part_method, change_class, change_helper, change_tensor]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before the first call", "between two pictures"])
def test_what_has_changed_is_captured_anew(change, when, monkeypatch):
    torch.manual_seed(0)
    model = Switched().eval()
    found = saved(model)
    give(model, found)
    compiled, first, graphs = None, None, 0
    if when == "between two pictures":
        compiled, first, graphs = drawn(model)
        assert graphs == 0
    if compiled is not None and change in UNSEEN:
        pytest.skip("goes unseen, as with torch.compile")
    change(model, monkeypatch)
    if compiled is None:
        compiled, picture, _ = drawn(model)
    else:
        picture = run(compiled, LATENT, TEXT)
        assert not torch.equal(picture, first)
    torch._dynamo.reset()
    give(model, {})
    wanted, graphs = drawn(model)[1:]
    assert graphs and torch.equal(picture, wanted)


def test_recording_gradients_is_another_call(model):
    give(model, saved(model))
    compiled, _, graphs = drawn(model)
    assert graphs == 0
    with pytest.warns(ras_compile.RASWarning, match="gradients"):
        out = compiled(LATENT, torch.ones(2), TEXT)
    assert out.requires_grad


def test_a_loaded_process_can_save(model):
    found = saved(model)
    give(model, found)
    drawn(model)
    assert captures(model).keys() == found.keys()


def test_a_capture_that_is_damaged(model, caplog):
    found = saved(model)
    give(model, {name: content[:100] for name, content in found.items()})
    with caplog.at_level("INFO", "ras_compile"):
        assert drawn(model)[2] == 1
    assert "is captured anew" in caplog.text


def test_a_call_of_another_kind_is_told(model, caplog):
    give(model, {})
    with caplog.at_level("INFO", "ras_compile"):
        assert drawn(model)[2] == 1
    assert caplog.text.count("nothing that was loaded is of its kind") == 1


def test_other_source_code(model, monkeypatch):
    found = saved(model)
    give(model, found)
    own = keeping.file_hash
    monkeypatch.setattr(keeping, "file_hash", lambda name: own(name) + "other")
    assert drawn(model)[2] == 1


def test_a_capture_that_holds_no_graph(model, caplog):
    (name, content), *_ = saved(model).items()
    for part in ("graph", "captured"):
        told = pickle.loads(content)
        told[part] = [("call_function", "x", None, (), {}, {}, None)]
        give(model, {name: pickle.dumps(told)})
        torch._dynamo.reset()
        assert drawn(model)[2] == 1


def test_a_timestep_that_is_a_number(model):
    """Dynamo takes it for a constant where it sees one call alone."""
    compiled = torch.compile(model, backend="ras", options=EAGER)
    run(compiled, LATENT[:1], TEXT[:1], time=lambda step, steps: Number(1 - step / steps))
    assert captures(model) == {}


class Number(float):
    """A number that a loop may expand."""

    def expand(self, count):
        return float(self)


def test_two_models_that_share_a_capture_in_the_first_process(model):
    other = TinyDiT().eval()
    drawn(model)
    drawn(other)
    assert len(captures(model)) == len(captures(other)) == 1


def test_captures_stand_in_front_once(model):
    """A first call that raises an error is followed by another first call."""
    give(model, {})
    once = kept.with_loaded(lambda *given: None, model, lambda graph, values: graph)
    assert kept.with_loaded(once, model, lambda graph, values: graph) is once


def test_calls_of_a_model_of_other_weights_are_not_tried(model):
    """Of two models of a class with weights of other types, say, each one's calls are its own."""
    double = TinyDiT().double().eval()
    drawn(double, LATENT.double(), TEXT.double())
    drawn(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(captures(model)) == len(captures(double)) == 1


def test_an_inference_mode_around_other_tensors(model):
    found = {}
    for _ in range(2):
        with torch.inference_mode():
            compiled = torch.compile(model, backend="ras", options=EAGER)
            use_loaded(compiled)
            torch._dynamo.utils.counters.clear()
            compiled(torch.ones(2, 4, 8, 12), torch.ones(2), TEXT)  # a prompt that was embedded outside
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found, before = captures(model), found
        torch._dynamo.reset()
        give(model, found)
    assert before.keys() == found.keys() and graphs == 0


class Counting(TinyDiT):
    """Writes a global variable."""

    def forward(self, hidden_states, timestep, text):
        global FACTOR
        FACTOR = 1.0
        return super().forward(hidden_states, timestep, text)


def test_writing_a_global_is_not_kept():
    model = Counting().eval()
    with pytest.raises(Unkeepable, match="writes global"), torch.no_grad():
        keep(model, (LATENT, torch.ones(2), TEXT), {})


MISSING = object()


class WithSentinel(TinyDiT):
    """Compares an argument with an object that is nothing but itself, as Dynamo's own code for Python's functions does."""

    def forward(self, hidden_states, timestep, text):
        found = super().forward(hidden_states, timestep, text)
        return found if text is MISSING else 2 * found


def test_a_sentinel_is_another_one_in_each_process(monkeypatch):
    torch.manual_seed(0)
    model = WithSentinel().eval()
    found = saved(model)
    monkeypatch.setitem(globals(), "MISSING", object())
    give(model, found)
    compiled, _, graphs = drawn(model)
    assert len(found) == 1 and graphs == 0
    monkeypatch.setitem(globals(), "MISSING", TEXT)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        compiled(LATENT, torch.ones(2), TEXT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Unnamed:
    """Of its objects nothing but the class can be told."""

    width = 2.0


UNNAMED = Unnamed()


class WithObject(TinyDiT):
    """Reads a number of a global object."""

    def forward(self, hidden_states, timestep, text):
        return UNNAMED.width * super().forward(hidden_states, timestep, text)


def test_what_cannot_be_written_is_said_once():
    model = WithObject().eval()
    drawn(model)
    with pytest.warns(ras_compile.RASWarning, match=r"a call of WithObject .*UNNAMED.*Unnamed"):
        assert captures(model) == {}


def test_arguments_are_not_kept_alive(model):
    give(model, saved(model))
    compiled = torch.compile(model, backend="ras", options=EAGER)
    use_loaded(compiled)
    text = TEXT.clone()
    seen = weakref.ref(text)
    with torch.no_grad():
        compiled(LATENT, torch.ones(2), text)
    del text
    ras_compile.release(compiled)
    gc.collect()  # frames of the capture on PyTorch 2.11
    assert seen() is None


def test_a_user_who_wants_eager_calls_has_them(model):
    give(model, saved(model))
    with torch.compiler.set_stance("force_eager"):
        picture = drawn(model)[1]
        with torch.no_grad():
            wanted = LATENT
            for step in range(6):
                wanted = wanted - model(wanted, torch.full((2,), 1 - step / 6), TEXT) / 6
    assert torch.equal(picture, wanted)  # sparse steps would give another one


def test_sizes_that_vary_are_not_kept(model):
    compiled = torch.compile(model, backend="ras", options=EAGER, dynamic=True)
    run(compiled, LATENT, TEXT)
    assert captures(model) == {}


def test_what_dynamo_saw_of_sizes_goes_along(model):
    """Where the first process had compiled a second size for all that follow, the other one need not begin anew with each."""
    compiled, _, _ = drawn(model)
    run(compiled, torch.randn(2, 4, 8, 16), TEXT)
    found = captures(model)
    assert len(found) == 1  # the second graph has sizes that vary
    torch._dynamo.reset()
    torch._dynamo.pgo.reset_code_state()
    give(model, found)
    again, _, graphs = drawn(model)
    assert graphs == 0
    for width in (16, 20, 24):
        run(again, torch.randn(2, 4, 8, width), TEXT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_call_is_known_by_its_arguments():
    given = Call.of((LATENT, 2), {"flag": None})
    same = Call.of((LATENT * 2, 2), {"flag": None})
    assert given is not None and same is not None and given == same and given.name() == same.name()
    others = [
        Call.of((LATENT.mT, 2), {"flag": None}),
        Call.of((LATENT, 3), {"flag": None}),
        Call.of((LATENT, 2), {"other": None}),
    ]
    assert len({given.name(), *[other.name() for other in others]}) == 4
    assert Call.of((object(),), {}) is None and Call.of((nn.Parameter(LATENT),), {}) is None


def test_only_so_many_calls_are_remembered(model):
    with torch.no_grad():
        compiled = torch.compile(model, backend="ras", options=EAGER, dynamic=False)
        for width in range(8, 8 + 2 * 12, 2):
            compiled(torch.randn(1, 4, 8, width), torch.ones(1), torch.randn(1, 3, 6))
    assert [len(calls) for calls in kept.called[TinyDiT].values()] == [kept.CALLS]


def test_a_forward_that_is_none(model):
    with torch.no_grad():
        assert kept.runs_its_class(model)
        model.forward = lambda *given: given
        assert not kept.runs_its_class(model)
        with pytest.raises(Unkeepable):
            keep(model, (LATENT, torch.ones(2), TEXT), {})


def recursive():
    def call():
        return call

    return call


def test_words_for_values():
    def one(x, y=1):
        return x + y

    def two(x, y=2):
        return x + y

    values = [
        None,
        True,
        1,
        1.0,
        "1",
        (1,),
        [1],
        {1},
        {"a": 1},
        torch.float32,
        torch,
        TinyDiT,
        one,
        two,
        one.__code__,
        len,
        object,
    ]
    assert len(set(map(fingerprint, values))) == len(values)
    assert fingerprint(one) == fingerprint(one) and fingerprint(recursive()) == fingerprint(recursive())
    with pytest.raises(Unkeepable):
        fingerprint(threading.Lock())
    assert fingerprint(object()) == fingerprint(object())
    assert fingerprint(ModuleType("torch")) == fingerprint(torch)


def test_guards_are_those_of_dynamo(model):
    """A guard that can be written is checked at each call, without Dynamo."""
    with torch.no_grad():
        args = (LATENT, torch.ones(2), TEXT)
        content = keep(model, args, {})
        one = Kept(model, content, args, {}, lambda graph, values: graph)
        assert one.fits(model, args, {})
        assert torch.equal(one(model, args, {}), model(*args))
        assert not one.fits(model, (LATENT.double(), *args[1:]), {})
        assert not one.fits(model, args[:2], {})
    assert not one.fits(model, args, {})  # gradients would be recorded


def test_code_that_holds_slices():
    """On Python 3.11 such code has no hash."""
    assert not is_call((lambda: None).__code__.replace(co_consts=(slice(1, 2),)))
    assert all(map(is_call, kept_calls))


def test_what_is_attached_again_has_its_captures(model):
    give(model, saved(model))
    for _ in range(2):
        assert drawn(model)[2] == 0
        torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="PyTorch 2.11 writes no call that returns one")
@pytest.mark.parametrize("name", ["SD3", "DiT"])
def test_an_object_may_be_returned(name):
    """Dynamo's code then calls functions that are Python's own, or of a module that it has put among the globals."""
    case = ZOO[name]
    model, given = case.build().eval(), {**case.inputs(), "return_dict": True}
    with torch.no_grad():
        scope = type(model).forward.__globals__
        before, content = set(scope), keep(model, (), given)
        for new in scope.keys() - before:  # as another process has it
            del scope[new]
        one = Kept(model, content, (), given, lambda graph, values: graph)
        assert one.fits(model, (), given)
        found, wanted = one(model, (), given), model(**given)
    assert type(found) is type(wanted) and torch.equal(found.sample, wanted.sample)
