"""Drift: the tokens that are computed are those whose noise changes, by a reference in plain Python over whole runs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from fakes import FakeTransformer, prompts
from recorded import Recorded

import ras_compile
from ras_compile import RASConfig
from ras_compile.config import NEAR
from ras_compile.execute import replay
from ras_compile.sampling.rows import RowChooser
from ras_compile.sampling.selection import FLOOR, SelectionInfo

INFO = SelectionInfo()
BATCH, TOKENS, PIXELS, CHANNELS = 2, 24, 2, 4


class Reference:
    """The formula, token by token, for one branch."""

    def __init__(self, samples: int, tokens: int) -> None:
        self.computed = [[None] * tokens for _ in range(samples)]  # (step, noise)
        self.rates = [[None] * tokens for _ in range(samples)]

    def note(self, step: int, noise: torch.Tensor, rows) -> None:
        for sample, tokens in enumerate(noise):
            for token in range(len(tokens)) if rows is None else rows[sample].tolist():
                before = self.computed[sample][token]
                if before is not None:
                    change = tokens[token].double() - before[1]
                    rate = change.std(-1, correction=0).mean().item() / (step - before[0])
                    self.rates[sample][token] = rate if math.isfinite(rate) else None
                self.computed[sample][token] = step, tokens[token].double().nan_to_num(0, 0, 0)

    def scores(self, step: int) -> torch.Tensor:
        found = []
        for rates, computed in zip(self.rates, self.computed, strict=True):
            highest = max([rate for rate in rates if rate is not None], default=1.0)
            rates = [highest if rate is None else rate for rate in rates]
            mean = sum(rates) / len(rates)
            found.append(
                [(rate + FLOOR * mean + 1e-38) * (step - at) for rate, (at, _) in zip(rates, computed, strict=True)]
            )
        return torch.tensor(found, dtype=torch.float64)


def truth(step: int, branch: int = 0, batch: int = BATCH) -> torch.Tensor:
    """What a call would compute of every token [B, N, P, C]: each token moves at a pace of its own."""
    generator = torch.Generator().manual_seed(branch)
    paces = torch.rand(batch, TOKENS, 1, 1, generator=generator) ** 3
    generator.manual_seed(100 * step + branch)
    return paces * torch.randn(batch, TOKENS, PIXELS, CHANNELS, generator=generator) + 0.1 * step


class Branch:
    """Caches of a branch: noise that is written over by its calls."""

    def __init__(self, number: int, batch: int = BATCH) -> None:
        self.number, self.slots, self.batch = number, {}, batch
        self.noise = torch.zeros(batch, TOKENS, PIXELS, CHANNELS)
        self.reference = Reference(batch, TOKENS)

    def call(self, chooser: RowChooser, step: int, rows, noise=None) -> None:
        """Computes `rows`, or all, as the runtime does it."""
        noise = truth(step, self.number, self.batch) if noise is None else noise
        chooser.computing(self.slots, rows)
        if rows is None:
            self.noise.copy_(noise)
        else:
            index = rows[..., None, None].expand(-1, -1, PIXELS, CHANNELS)
            self.noise.scatter_(1, index, noise.gather(1, index))
        self.reference.note(step, noise, rows)
        chooser.observe(self.noise, INFO, None, self.slots)


def run(kinds: str, branches=(0,), active=7, group=False, noises=truth, check=True, **options):
    """The rows of each sparse step; each is compared with the reference's, which knows no `max_absence`."""
    chooser = RowChooser(RASConfig(metric="drift", **options))
    branches, picked = [Branch(number) for number in branches], []
    for step, kind in enumerate(kinds):
        chooser.advance(dense=kind == "d")
        latent = torch.zeros(BATCH, TOKENS, 1)
        latent = latent if group else latent + torch.arange(BATCH)[:, None, None]
        rows = None
        if kind == "s":
            scores = sum(branch.reference.scores(step) for branch in branches) / len(branches)
            scores = scores.mean(0, keepdim=True).expand_as(scores) if group else scores
            ascending = scores.sort(dim=1, stable=True).indices  # of equals, the later token is computed
            wanted = ascending[:, -active:].sort(dim=1).values
            rows = chooser.rows(latent, BATCH, TOKENS, active, INFO)
            assert not check or torch.equal(rows, wanted), step
            picked.append(rows)
        for branch in branches:
            branch.call(chooser, step, rows, noises(step, branch.number))
    return picked


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("branches", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("kinds", ["ddd" + "s" * 30, "dd" + "sssd" * 7, "d" + "s" * 20, "dd" + "sd" * 8 + "ddsssddds"])
def test_rows_are_those_of_the_formula(kinds, branches, group):
    run(kinds, branches, group=group, max_absence=1000)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "Graph", Recorded)


@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("inductor", marks=pytest.mark.compiles)])
def test_replayed_it_is_the_same(recorded, inner_backend):
    kinds = "ddd" + "sssd" * 5 + "sss"
    found = run(kinds, (0, 1), inner_backend=inner_backend)
    plain = run(kinds, (0, 1), cuda_graphs=False)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_quarter_that_changes_is_computed_four_times_as_often():
    moving = torch.zeros(TOKENS, dtype=torch.bool)
    moving[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))[: TOKENS // 4]] = True

    def noises(step, branch):
        return torch.where(
            moving[:, None, None], truth(step) + torch.randn(BATCH, TOKENS, 1, CHANNELS), 0.001 * truth(step)
        )

    picked = run("dddd" + "s" * 24, active=TOKENS // 4, noises=noises, check=False)
    times = torch.zeros(BATCH, TOKENS)
    for rows in picked:
        times.scatter_add_(1, rows, torch.ones(rows.shape))
    assert times[:, moving].mean() >= 4 * times[:, ~moving].mean()
    assert times.min() >= 1, "and no token starves"


@pytest.mark.parametrize("active", [TOKENS // 2, 2 * TOKENS // 3])
def test_half_of_the_tokens_take_turns_where_dense_steps_are_far_apart(active):
    for interval in (None, NEAR + 1):
        for before, rows in pairwise(run("ddd" + "s" * 8, active=active, check=False, reset_interval=interval)):
            for last, now in zip(before.tolist(), rows.tolist(), strict=True):
                assert {*last} | {*now} == {*range(TOKENS)}
    run("ddd" + "sssd" * 4, active=active, reset_interval=NEAR)  # the formula alone


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_never_stuck_and_never_kept(value):
    """A token whose noise goes wrong for a while is computed again soon, and its state stays finite."""
    chooser = RowChooser(RASConfig(metric="drift", max_absence=1000))
    branch, times = Branch(0), torch.zeros(TOKENS)
    for step in range(30):
        chooser.advance(dense=step < 3)
        rows = None if step < 3 else chooser.rows(torch.zeros(BATCH, TOKENS, 1), BATCH, TOKENS, 4, INFO)
        noise = truth(step)
        if 2 <= step < 12:
            noise[0, 5] = value
        branch.call(chooser, step, rows, noise)
        if rows is not None:
            times[rows[0]] += 1
        drift = branch.slots["drift"]
        assert drift.state.isfinite().all() and (step == 0 or drift.last.isfinite().all())
    assert times[5] >= 4
    everything = torch.full((BATCH, TOKENS, PIXELS, CHANNELS), value)
    for step in range(30, 50):
        chooser.advance(dense=False)
        rows = chooser.rows(torch.zeros(BATCH, TOKENS, 1), BATCH, TOKENS, 4, INFO)
        branch.call(chooser, step, rows, everything)
        times[rows[0]] += 100
    assert times.min() >= 300, "nothing is known of any token: they take turns"


def test_a_noise_that_stands_still_is_computed_in_turns():
    picked = run("dd" + "s" * 12, active=6, noises=lambda step, branch: torch.ones(BATCH, TOKENS, PIXELS, CHANNELS))
    for before, after in pairwise(picked):
        assert not set(before[0].tolist()) & set(after[0].tolist())


@pytest.mark.parametrize(
    ("batches", "kinds"),
    [
        (lambda step: {"cond": 1, "uncond": 1}, "dddd" + "ss" * 8),
        (lambda step: {"cond": 1, "uncond": 1} if step < 6 else {"cond": 1}, "dddd" + "ss" * 4 + "ssss"),  # dropped
        (lambda step: {"cond": 1} if step < 5 else {"cond": 1, "uncond": 1}, "dd" + "sss" + "sd" + "ss" * 4),
        (lambda step: {"cond": 1, "uncond": 1} if step != 5 else {"uncond": 1}, "dddd" + "sssssss" + "ds" + "ss" * 3),
        (lambda step: {"both": 2} if step < 6 else {"cond": 1}, "dd" + "ssss" + "d" + "sss"),
    ],
    ids=["always", "guidance is dropped", "begins late", "one call left out", "the batch is halved"],
)
@pytest.mark.parametrize("reset_interval", [None, 3])
def test_branches_that_come_and_go(batches, kinds, reset_interval):
    """Rows are those of the formula, over the calls of the step before, each with all that its branch has computed."""
    model = FakeTransformer(
        metric="drift",
        warmup_steps=2,
        reset_interval=reset_interval,
        cuda_graphs=False,
        max_absence=100,
        sample_ratio=0.5,
        ratio_schedule="constant",
    )
    contexts, references, seen, called = prompts("cond", "uncond", "both"), {}, "", {}
    with ras_compile.generation(num_steps=10) as gen:
        for step in range(10):
            gen.step()
            scores = [reference.scores(step) for reference in called.values()]
            called, latent = {}, torch.randn(1, 16, 4)
            for name, batch in batches(step).items():
                with gen.branch(name):
                    model(latent.repeat(batch, 1, 1), None, *contexts[name], truth=(0, name, step), graph=name)
                record = model.state.records[-1]
                seen += record.kind[0]
                if record.rows is not None:
                    wanted = torch.cat(scores).mean(0).sort(stable=True).indices[-8:].sort().values
                    assert torch.equal(record.rows, wanted.expand(batch, 8)), (step, name)
                called[name] = references.setdefault(name, Reference(batch, 16))
                called[name].note(step, model.kept[name]["noise"].unsqueeze(2), record.rows)
    if reset_interval is None:
        assert seen == kinds
