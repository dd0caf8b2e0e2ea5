"""A hand-written loop that says its steps: generations, branches, rows, counts, and what ends them."""

import contextvars
import threading
import warnings

import pytest
import torch
from fakes import CHANNELS, TOKENS, FakeTransformer, denoise, falling, prompts

import ras_compile
from ras_compile import RASConfig
from ras_compile.errors import RASWarning
from ras_compile.sampling.calls import CallInfo, Decision
from ras_compile.sampling.rows import RowChooser
from ras_compile.sampling.selection import SelectionInfo
from ras_compile.sampling.state import TransformerState

DEFAULT = "dddd" + "ssssssss" + "d" + "sssssss" + "d" + "sssssss"  # 28 steps of the fake: dense at 0..3, 12 and 20


def test_default_plan():
    for model, wanted in (
        (FakeTransformer(), DEFAULT),
        (FakeTransformer(preset="balanced"), "dddd" + "ss" + "dss" * 7 + "d"),
    ):
        with ras_compile.generation(num_steps=28) as gen:
            denoise(model, falling(28), prompts("cond"), gen=gen)
        assert model.kinds() == wanted


def test_branches_have_their_own_caches_and_share_rows():
    model = FakeTransformer()
    with ras_compile.generation() as gen:
        denoise(model, falling(8), prompts("cond", "uncond"), gen=gen)
    assert model.kinds(branch="cond") == model.kinds(branch="uncond") == "ddddssss"
    records = model.state.records
    assert [record.step for record in records] == [step for step in range(8) for _ in range(2)]
    assert [record.branch for record in records[:2]] == ["0", "1"]
    for cond, uncond in zip(records[8::2], records[9::2], strict=True):
        assert cond.rows is uncond.rows


def test_named_branches_need_no_contexts():
    model = FakeTransformer()
    with ras_compile.generation() as gen:
        for step, time in enumerate(falling(7)):
            gen.step()
            latent = torch.randn(1, TOKENS, CHANNELS)
            for name in ("uncond", "cond") if step != 5 else ("cond",):
                with gen.branch(name):
                    model(latent, time, torch.randn(1, 3, 8), truth=(0, name, step))
    assert model.kinds(branch="cond") == "ddddsss"
    assert model.kinds(branch="uncond") == "ddddsd"  # not called at step 5, so what it has is old
    assert {record.branch for record in model.state.records} == {"uncond", "cond"}


def test_a_branch_that_appears_starts_dense():
    model = FakeTransformer()
    with ras_compile.generation() as gen:
        contexts = prompts("uncond", "cond")
        denoise(model, falling(9), contexts, gen=gen, only=lambda name, step: name == "cond" or step >= 6)
    assert model.kinds(branch="cond") == "ddddsssss"
    assert model.kinds(branch="uncond") == "dss"


def test_two_calls_with_one_context_in_a_step_are_two_branches():
    model = FakeTransformer(warmup_steps=1)
    context = torch.randn(1, 3, 8)
    with ras_compile.generation() as gen:
        for step in range(4):
            gen.step()
            for picture in range(2):
                model(torch.randn(1, TOKENS, CHANNELS), None, context, truth=(0, picture, step))
    assert model.kinds() == "ddssssss"


def test_branches_that_nothing_tells_apart_run_dense():
    model = FakeTransformer()
    with ras_compile.generation() as gen:
        denoise(
            model,
            falling(9),
            prompts("uncond", "cond"),
            gen=gen,
            only=lambda name, step: name == "cond" or step != 6,
            context_of=lambda context, step: (context[0] + step,),
        )
    assert model.kinds(branch="cond")[6] == "d"


def test_steps_that_begin_anew_are_another_generation():
    model = FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation() as gen:
        denoise(model, falling(8), contexts, gen=gen)
        gen.current = None
        denoise(model, falling(8), contexts, gen=gen)
    assert model.kinds() == "ddddssss"
    assert len(model.state.records) == 8


@pytest.mark.parametrize(
    ("between", "expected"), [("nothing", 3), ("a dense step", 0), ("one that nobody planned", 0), ("all tokens", 0)]
)
def test_after_a_dense_step_no_token_is_absent(between, expected):
    chooser = RowChooser(RASConfig(metric="std", max_absence=2, starvation_scale=0.0, focus="low"))
    latent, noise = torch.randn(1, 4, 1), torch.tensor([[1.0, -1.0]]) * torch.arange(1.0, 5)[:, None]
    for step in range(3):
        chooser.observe(noise.reshape(1, 4, 1, 2), SelectionInfo())
        if step == 2 and between != "nothing":
            chooser.advance(dense=between == "a dense step")
            if between == "all tokens":
                assert chooser.rows(latent, 1, 4, 4, SelectionInfo()).tolist() == [[0, 1, 2, 3]]
            chooser.observe(noise.reshape(1, 4, 1, 2), SelectionInfo())
        chooser.advance(dense=False)
        rows = chooser.rows(latent, 1, 4, 1, SelectionInfo())
    assert rows.tolist() == [[expected]]


def test_prompts_of_two_lengths():
    model = FakeTransformer()
    contexts = {**prompts("cond", length=5), **prompts("uncond", length=3)}
    with ras_compile.generation() as gen:
        denoise(model, falling(6), contexts, gen=gen)
    assert model.kinds() == "dd" * 4 + "ss" * 2


def test_a_graph_of_another_shape_runs_dense_first():
    model = FakeTransformer()
    context = torch.randn(1, 3, 8)
    with ras_compile.generation() as gen:
        for step in range(9):
            gen.step()
            latent = torch.randn(2 if step < 6 else 1, TOKENS, CHANNELS)
            model(latent, None, context, truth=(0, latent.shape[0], step))
    assert model.kinds() == "ddddss" + "dss"


def test_a_lone_branch_may_have_a_context_that_changes_at_every_step():
    model = FakeTransformer()
    with ras_compile.generation() as gen:
        denoise(model, falling(7), prompts("cond"), gen=gen, context_of=lambda context, step: (context[0] + step,))
    assert model.kinds() == "ddddsss"


def test_both_halves_of_batched_guidance_compute_the_same_tokens_and_pictures_their_own():
    model = FakeTransformer(starvation_scale=0.5)
    context = torch.randn(4, 3, 8)
    with ras_compile.generation() as gen:
        for step in range(10):
            gen.step()
            model(torch.randn(2, TOKENS, CHANNELS).repeat(2, 1, 1), None, context, truth=(0, 0, step))
    sparse = [record.rows for record in model.state.records if record.kind == "sparse"]
    assert len(sparse) == 6
    assert all(torch.equal(rows[:2], rows[2:]) for rows in sparse)
    assert any(not torch.equal(rows[0], rows[1]) for rows in sparse)


def test_a_smaller_batch_in_the_same_step_gets_the_rows_of_its_pictures():
    model = FakeTransformer(warmup_steps=1)
    both, skip = torch.randn(4, 3, 8), torch.randn(2, 3, 8)
    with ras_compile.generation() as gen:
        for step in range(4):
            gen.step()
            latent = torch.randn(2, TOKENS, CHANNELS)
            model(torch.cat([latent, latent]), None, both, truth=(0, "both", step))
            model(latent.flip(0), None, skip, truth=(0, "skip", step))
    records = model.state.records
    for both_record, skip_record in zip(records[2::2], records[3::2], strict=True):
        assert torch.equal(skip_record.rows, both_record.rows[[1, 0]])


def test_every_row_at_ratio_one():
    model = FakeTransformer(sample_ratio=1.0)
    with ras_compile.generation() as gen:
        denoise(model, falling(6), prompts("cond"), gen=gen)
    assert model.kinds() == "ddddss"
    assert model.state.records[-1].rows.tolist() == [list(range(TOKENS))]


def test_no_token_is_absent_longer_than_allowed_in_a_run():
    model = FakeTransformer(warmup_steps=1, reset_interval=None, sample_ratio=0.25, max_absence=3, starvation_scale=0.0)
    with ras_compile.generation() as gen:
        denoise(model, falling(40), prompts("cond"), gen=gen)
    absence = torch.zeros(TOKENS)
    for record in model.state.records[1:]:
        absence += 1
        absence[record.rows[0]] = 0
        assert absence.max() <= 3 + 4


def test_aborted_then_shorter_run():
    model = FakeTransformer()
    contexts = prompts("cond")
    with pytest.raises(KeyboardInterrupt), ras_compile.generation(num_steps=28) as gen:
        denoise(model, falling(28), contexts, gen=gen, stop=9)
        raise KeyboardInterrupt
    with ras_compile.generation(num_steps=10) as gen:
        denoise(model, falling(10), contexts, gen=gen)
    assert model.kinds() == "ddddssssss"


def test_an_aborted_run_leaves_no_trace_in_the_next_picture():
    contexts, start = prompts("cond", "uncond"), torch.randn(1, TOKENS, CHANNELS)

    def picture(model):
        with ras_compile.generation() as gen:
            denoise(model, falling(12), contexts, gen=gen, latent=start)
        return [record.rows for record in model.state.records if record.kind == "sparse"]

    used = FakeTransformer()
    with ras_compile.generation() as gen:
        denoise(used, falling(28), prompts("cond"), gen=gen, stop=11)
    after, alone = picture(used), picture(FakeTransformer())
    assert len(after) == 16 and all(torch.equal(*rows) for rows in zip(after, alone, strict=True))


def test_skipped_steps_are_followed_by_a_dense_one():
    model = FakeTransformer(reset_interval=None)
    with ras_compile.generation() as gen:
        denoise(model, falling(12), prompts("cond"), gen=gen, only=lambda name, step: step not in (6, 7))
    assert model.kinds() == "dddd" + "ss" + "d" + "sss"


def test_a_call_that_fails_ends_what_was_cached():
    model = FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation() as gen:
        number, latent = denoise(model, falling(6), contexts, gen=gen)
        model.state.decide(CallInfo(("x", latent.shape), latent, contexts["cond"], None, 1, TOKENS))  # no record
        for step in range(6, 12):
            gen.step()
            model(latent + step, None, *contexts["cond"], truth=(number, "cond", step), graph="x")
    assert model.kinds() == "ddddss" + "ddddss"


def test_a_call_that_fails_is_no_longer_under_way():
    """Who catches the error may go on in another thread; the caches that the call left half written serve nobody."""
    model = FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation() as gen:
        number, latent = denoise(model, falling(6), contexts, gen=gen)
        gen.step()
        call = CallInfo(("x", latent.shape), latent, contexts["cond"], None, 1, TOKENS)
        model.state.fail(model.state.decide(call))
        decisions: list[Decision] = []
        here = contextvars.copy_context()
        other = threading.Thread(target=here.run, args=(lambda: decisions.append(model.state.decide(call)),))
        other.start()
        other.join()
    assert [(decision.kind, decision.slots) for decision in decisions] == [("dense", {})]


def test_a_call_that_failed_is_not_taken_up_after_a_reset():
    """Which counts one on: a generation that failed must not look like a new one."""
    model = FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation() as gen:
        _, latent = denoise(model, falling(6), contexts, gen=gen)
        gen.step()
        call = CallInfo(("x", latent.shape), latent, contexts["cond"], None, 1, TOKENS)
        model.state.fail(model.state.decide(call))
        model.state.reset()
        decision = model.state.decide(call)
    assert (decision.kind, decision.slots, len(model.state.records)) == ("dense", {}, 0)
    assert decision.reason == "warm-up"


def test_reset_forgets():
    model = FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation() as gen:
        _, latent = denoise(model, falling(6), contexts, gen=gen)
        model.state.reset()
        denoise(model, falling(6), contexts, gen=gen)
    assert model.kinds() == "ddddss"


def test_a_model_that_joins_late_has_its_own_warm_up():
    first, second = FakeTransformer(), FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation() as gen:
        for step in range(14):
            gen.step()
            model = first if step < 7 else second
            # the fake counts warm-up from its own first call
            latent = torch.randn(1, TOKENS, CHANNELS)
            model(latent, None, *contexts["cond"], truth=(0, "cond", step if model is first else step - 7))
    assert first.kinds() == "ddddsss" and second.kinds() == "ddddsss"
    assert [record.step for record in second.state.records] == list(range(7, 14))


def test_changed_context():
    for context, expected in (("fresh", "ddddsssss"), ("frozen", "ddddssdss")):
        model = FakeTransformer(context=context)
        with ras_compile.generation() as gen:
            prompt = torch.randn(1, 3, 8)
            for step in range(9):
                gen.step()
                if step == 6:
                    prompt = torch.randn(1, 3, 8)
                with gen.branch("cond"):
                    model(torch.randn(1, TOKENS, CHANNELS), None, prompt, truth=(0, "cond", step))
        assert model.kinds() == expected


def test_a_context_written_in_place_has_changed():
    model = FakeTransformer(context="frozen")
    with ras_compile.generation() as gen:
        prompt = torch.randn(1, 3, 8)
        for step in range(9):
            gen.step()
            if step == 6:
                prompt.add_(1)
            with gen.branch("cond"):
                model(torch.randn(1, TOKENS, CHANNELS), None, prompt, truth=(0, "cond", step))
    assert model.kinds() == "ddddssdss"


def test_linear_ratio_uses_the_number_of_steps():
    model = FakeTransformer(ratio_schedule="linear", sample_ratio=0.5)
    with ras_compile.generation(num_steps=28) as gen:
        denoise(model, falling(28), prompts("cond"), gen=gen)
    counts = [record.active for record in model.state.records if record.kind == "sparse"]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4
    assert sum(counts) == pytest.approx(22 * TOKENS / 2, abs=3)


def test_linear_ratio_without_a_number_of_steps():
    model = FakeTransformer(ratio_schedule="linear")
    with pytest.raises(ValueError, match="num_steps"):
        denoise(model, falling(8), prompts("cond"))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_a_wrong_number_of_steps(steps):
    with pytest.raises(ValueError, match="num_steps"), ras_compile.generation(num_steps=steps):
        pass


def test_threads_do_not_share_a_generation():
    model = FakeTransformer()
    contexts = prompts("cond", "uncond")
    barrier, failures = threading.Barrier(3), []

    def work(explicit):
        try:
            if explicit:
                with ras_compile.generation() as gen:
                    denoise(model, falling(9), contexts, gen=gen, each=lambda step: barrier.wait(20))
            else:
                denoise(model, falling(9), contexts, each=lambda step: barrier.wait(20))
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=work, args=(explicit,)) for explicit in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    numbers = {call[0] for call in model.calls}
    assert [model.kinds(number) for number in numbers] == ["dd" * 4 + "ss" * 5] * 3


def test_a_loop_that_forgets_its_steps_runs_dense_and_is_told():
    model = FakeTransformer(warmup_steps=1)
    with ras_compile.generation() as gen, pytest.warns(ras_compile.RASWarning, match=r"Call its step\(\) once before"):
        gen.step()
        denoise(model, falling(17), prompts("cond"))
    assert "s" not in model.kinds()


def test_a_generation_whose_calls_never_reach_the_backend_is_told():
    """The plain model was called, or Dynamo gave its forward up: neither of it reaches this library otherwise."""
    with pytest.warns(RASWarning, match="no model call of a generation"), ras_compile.generation(4) as gen:
        gen.step()
    with pytest.raises(KeyError), ras_compile.generation(4) as gen:  # nothing to add to an error
        gen.step()
        raise KeyError


def test_a_generation_is_entered_by_with():
    run = ras_compile.generation(num_steps=3)
    with pytest.raises(ras_compile.ConfigError, match="has not begun: .* belong inside `with"):
        run.step()
    with run as entered:
        assert entered is run and run.step() == 0
    with pytest.raises(ras_compile.ConfigError, match="has ended"):
        run.step()


def test_nested_generations_keep_apart():
    model = FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation() as outer:
        number, latent = denoise(model, falling(6), contexts, gen=outer)
        with ras_compile.generation() as inner:
            denoise(model, falling(6), contexts, gen=inner)
        assert model.kinds() == "ddddss"
        outer.step()
        model(latent, None, *contexts["cond"], truth=(number, "cond", 6), graph=str([(1, 3, 8)]))


def test_slots_of_a_finished_generation_come_back_as_spares():
    model = FakeTransformer()
    contexts = prompts("cond")
    latent = torch.randn(1, TOKENS, CHANNELS)
    call = CallInfo("graph", latent, contexts["cond"], None, 1, TOKENS)
    with ras_compile.generation() as gen:
        gen.step()
        first = model.state.decide(call)
        first.slots["buffer"] = marker = object()
        model.state.record(call, first, None, None)
    assert first.spare is None
    with ras_compile.generation() as gen:
        gen.step()
        second = model.state.decide(call)
        assert second.slots == {} and second.spare == {"buffer": marker}
        model.state.record(call, second, None, None)
        gen.step()
        assert model.state.decide(call).spare is None, "it is taken over once, and its memory is not held"


def test_without_noise_the_next_step_is_dense():
    model = FakeTransformer(warmup_steps=1)
    latent, context = torch.randn(1, TOKENS, CHANNELS), (torch.randn(1, 3, 8),)
    with ras_compile.generation() as gen:
        for _ in range(3):
            gen.step()
            call = CallInfo("graph", latent, context, None, 1, TOKENS)
            decision = model.state.decide(call)
            model.state.record(call, decision, None, None)
            assert decision.kind == "dense"
    assert decision.reason == "the last call of its branch kept nothing"


def test_a_trace_reads_the_time_late():
    model = FakeTransformer()
    with ras_compile.generation() as gen:
        denoise(model, [torch.tensor([7.0, 3.0]), 5, None], prompts("cond"), gen=gen)
    assert [record.timestep for record in model.state.records] == [7.0, 5.0, None]


def active_with(tolerance, noise, names=("cond", "uncond"), **options):
    """Tokens that each step of a run computes, of two branches whose noise in a step is `noise` of the step."""
    state, active = TransformerState(RASConfig(tolerance=tolerance, cuda_graphs=False, **options)), []
    with ras_compile.generation(num_steps=12) as gen:
        for step in range(12):
            gen.step()
            latent, counts = torch.full((1, 64, 4), float(step)), set()
            for name in names:
                with gen.branch(name):
                    call = CallInfo(name, latent, (), None, 1, 64, (8, 8))
                    decision = state.decide(call)
                    found = noise(step)
                    if decision.rows is not None:
                        found = decision.slots["noise"].scatter(
                            1, decision.rows[..., None, None].expand(-1, -1, 1, 4), 0
                        )
                    decision.slots["noise"] = found
                    state.record(call, decision, found, found)
                counts.add(decision.active)
            assert len(counts) == 1, "the branches of a step agree"
            active += counts
    return active


def test_a_tolerance_chooses_among_four_programs():
    noises = torch.randn(12, 1, 64, 1, 4)

    def drifting(step):
        return noises[0] + 0.01 * step * noises[1]

    huge, tight = active_with(1e9, drifting), active_with(1e-9, drifting)
    assert huge == [64] * 4 + [4] * 8, "mostly held"
    assert tight == [64] * 12
    between = {count for tolerance in (0.01, 0.02, 0.05) for count in active_with(tolerance, drifting)}
    assert {4, 64} < between <= {4, 16, 32, 64}
    assert active_with(1e9, drifting, reset_steps=[6]) == [64] * 4 + [4] * 2 + [64] + [4] * 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_noise_that_is_not_a_number_is_within_no_tolerance(value):
    assert active_with(1e9, lambda step: torch.full((1, 64, 1, 4), value)) == [64] * 12


def test_a_run_too_short_for_a_sparse_step_is_told_where_nobody_says_the_steps():
    """Once the next one begins: until then nobody knows how many steps there are."""
    model = FakeTransformer()
    with pytest.warns(RASWarning, match="none of the 4 steps can be sparse with warmup_steps=4"):
        for _ in range(2):
            denoise(model, falling(4), prompts("cond"))
    assert model.kinds() == "dddd"


def test_lone_calls_are_no_run_that_is_too_short():
    """Of each prompt one call, without a time: nobody says that these are steps."""
    model = FakeTransformer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            denoise(model, [None], prompts("cond"))
    assert model.kinds() == "d"


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([1.0, 0.5, 0.2], 3),
        ([1.0, 0.5, 1.0, 0.5], 2),  # back where it began: the next picture
        ([1.0, 1.0, 0.5], 3),  # two branches of one step
        ([None, None], 2),
        ([1.0, None, 1.0], 1),
        ([torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([1.0])], 1),
    ],
    ids=str,
)
def test_calls_past_every_plan_are_told_by_generations_where_nobody_says_the_steps(times, wanted):
    state = TransformerState(RASConfig())
    state.graphs = {"old": "graph"}
    for time in times:
        state.passed("refused", time)
    assert len(state.records) == wanted and not state.graphs
    assert {(record.kind, record.reason, record.step, record.branch, record.active) for record in state.records} == {
        ("dense", "refused", 0, "0", 0)
    }
    told = [record.timestep for record in state.records]
    assert told == [time if time is None else float(time) for time in times[-wanted:]]


def test_calls_past_every_plan_are_told_by_the_steps_that_somebody_says():
    state = TransformerState(RASConfig())
    for steps in (3, 2):
        with ras_compile.generation() as gen:
            for _ in range(steps):
                gen.step()
                for name in ("cond", "uncond"):
                    with gen.branch(name):
                        state.passed("refused", 1.0)
    told = [(record.step, record.branch) for record in state.records]
    assert told == [(step, name) for step in range(2) for name in ("cond", "uncond")]


def test_calls_past_every_plan_go_on_in_the_generation_of_those_before():
    model = FakeTransformer()
    with ras_compile.generation() as gen:
        denoise(model, falling(6), prompts("cond"), gen=gen)
        gen.step()
        model.state.passed("gradients are recorded", 0.0)
    assert [record.kind[0] for record in model.state.records] == [*"ddddss", "d"]
    model.state.passed("another", 0.0)
    assert [record.reason for record in model.state.records] == ["another"], "of no generation that was said"
