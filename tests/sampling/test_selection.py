"""Selection: eq. 1 and its two ends, priority, starvation, groups. Small cases by definition, the rest by property."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ras_compile import RASConfig
from ras_compile.config import PRESETS
from ras_compile.sampling.rows import RowChooser
from ras_compile.sampling.selection import (
    SelectionInfo,
    checked_rows,
    mean_metric,
    sample_groups,
    select_rows,
    token_metric,
    update_counts,
)

INFO = SelectionInfo(step=3, grid=(2, 3))


def select(metric, k, drops=None, absence=None, **options):
    metric = torch.as_tensor(metric, dtype=torch.float32)
    metric = metric[None] if metric.dim() == 1 else metric
    zeros = torch.zeros(metric.shape, dtype=torch.int64)
    drops = zeros if drops is None else torch.as_tensor(drops).expand_as(metric)
    absence = zeros if absence is None else torch.as_tensor(absence).expand_as(metric)
    config = RASConfig(**options)
    if config.selector is not None:
        return checked_rows(config.selector(metric, drops, k, INFO), metric, k)
    return by_options(metric, drops, absence, k, config)


def by_options(metric, drops, absence, k, config):
    longest = config.longest_absences[2 * k >= metric.shape[1]]
    return select_rows(metric, drops, absence, k, config.high_share, config.starvation, longest)


def test_metrics_by_definition():
    noise = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    by_hand = torch.stack([torch.stack([token.std(dim=-1, correction=0).mean() for token in x]) for x in noise])
    torch.testing.assert_close(token_metric(noise, "std", INFO), by_hand.float())
    norms = torch.tensor([[math.sqrt((token**2).sum()) for token in x] for x in noise])
    torch.testing.assert_close(token_metric(noise, "l2norm", INFO), norms)


def test_std_of_one_channel_is_taken_over_the_patch():
    noise = torch.randn(1, 6, 4, 1)
    torch.testing.assert_close(token_metric(noise, "std", INFO), noise[..., 0].std(dim=-1, correction=0))


def test_metric_in_half_precision_is_computed_in_float32():
    noise = (torch.randn(1, 50, 1, 16) * 0.01 + 4).bfloat16()
    torch.testing.assert_close(token_metric(noise, "std", INFO), token_metric(noise.float(), "std", INFO))


def test_random_metric_repeats_and_leaves_the_global_generator_alone():
    noise = torch.zeros(2, 6, 1, 3)
    before = torch.get_rng_state()
    first, second = token_metric(noise, "random", INFO), token_metric(noise, "random", INFO)
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, token_metric(noise, "random", SelectionInfo(step=4)))


def test_a_metric_that_one_noise_does_not_tell_is_refused():
    for unknown in ("drift", "st", None):
        with pytest.raises(ValueError, match="token_metric takes 'std'"):
            token_metric(torch.zeros(2, 6, 1, 3), unknown, INFO)


def test_callable_metric_sees_flat_tokens_and_info():
    seen = []

    def metric(noise, info):
        seen.append((noise.shape, info))
        return noise.double().sum(-1)

    result = token_metric(torch.ones(2, 6, 4, 3), metric, INFO)
    assert seen == [((2, 6, 12), INFO)]
    assert result.dtype == torch.float32 and bool((result == 12).all())


@pytest.mark.parametrize("bad", [lambda noise, info: noise, lambda noise, info: noise[:, 0, 0], lambda noise, info: 3])
def test_a_metric_of_another_shape_names_the_option(bad):
    with pytest.raises(ValueError, match=r"option metric.*\[2, 6\]"):
        token_metric(torch.zeros(2, 6, 1, 3), bad, INFO)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["std", "l2norm"])
@pytest.mark.parametrize("focus", ["high", "low", 0.5])
def test_not_a_number_is_computed_first(focus, metric, value):
    """At either end, and though nothing else would ever bring such a token back: the paper waits without end."""
    config = RASConfig(**{**PRESETS["paper"], "metric": metric, "focus": focus})
    noise = torch.randn(2, 6, 1, 4)
    noise[1, 2] = value
    found = token_metric(noise, metric, INFO)
    assert found.isfinite().all()
    shared = mean_metric([found, token_metric(torch.randn(2, 6, 1, 4), metric, INFO)], torch.empty(0))
    for seen in (found, shared, mean_metric([found], torch.eye(2))):
        zeros = torch.zeros(2, 6, dtype=torch.int64)
        rows = by_options(seen, zeros, zeros, 1, config)
        assert rows[1].tolist() == [2] and (seen[0] < 100).all()


def test_focus_chooses_the_end():
    metric = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert select(metric, 2, focus="low").tolist() == [[1, 3]]
    assert select(metric, 2, focus="high").tolist() == [[0, 5]]
    assert select(metric, 2, focus=0.5).tolist() == [[2, 4]]
    assert select(metric, 3, focus=1 / 3).tolist() == [[0, 2, 4]]


def test_default_focus_computes_the_high_end():
    assert select([3.0, 1.0, 2.0], 1).tolist() == [[0]]


@pytest.mark.parametrize("focus", ["low", "high", 0.5])
def test_ties_go_by_index_and_repeat(focus):
    rows = select(torch.ones(2, 9), 4, focus=focus)
    assert torch.equal(rows, select(torch.ones(2, 9), 4, focus=focus)) and torch.equal(rows[0], rows[1])
    assert rows.dtype == torch.int64 and rows[0].tolist() == sorted(set(rows[0].tolist()))


def test_equation_one_decides_between_two_tokens():
    # token 0 overtakes token 1 at the high end once exp(0.1 * drops) makes up for the metric
    for drops, winner in ((6, 1), (8, 0)):  # 2 * exp(0.6) < 4 < 2 * exp(0.8) = 4.45
        assert select([2.0, 4.0], 1, drops=[drops, 0], focus="high", starvation_scale=0.1).tolist() == [[winner]]
    for drops, winner in ((6, 1), (8, 0)):  # at the low end the count divides
        assert select([4.0, 2.0], 1, drops=[drops, 0], focus="low", starvation_scale=0.1).tolist() == [[winner]]


def test_large_drop_counts_do_not_overflow():
    drops = torch.tensor([5000, 4000, 3000])
    for focus in ("high", "low"):
        assert select([1.0, 1.0, 1.0], 2, drops=drops, focus=focus, starvation_scale=2).tolist() == [[0, 1]]


def test_the_overdue_go_first_and_the_oldest_of_them():
    metric, absence = [9.0, 9.0, 9.0, 1.0, 2.0], [8, 10, 9, 0, 7]
    assert select(metric, 2, absence=absence, focus="low").tolist() == [[1, 2]]
    assert select(metric, 4, absence=absence, focus="low").tolist() == [[0, 1, 2, 3]]
    assert select(metric, 2, absence=absence, max_absence=11, focus="low").tolist() == [[3, 4]]


def test_all_rows():
    assert select([3.0, 1.0, 2.0], 3).tolist() == [[0, 1, 2]]


floats = st.floats(0, 2.0**99, width=32)


@given(data=st.data(), focus=st.sampled_from(["low", "high", 0.3, 0.5]), tokens=st.integers(2, 12))
def test_a_higher_drop_count_never_loses_a_token_its_place(data, focus, tokens):
    metric = data.draw(st.lists(floats, min_size=tokens, max_size=tokens))
    drops = data.draw(st.lists(st.integers(0, 40), min_size=tokens, max_size=tokens))
    absence = data.draw(st.lists(st.integers(0, 12), min_size=tokens, max_size=tokens))
    k = data.draw(st.integers(1, tokens - 1))
    token = data.draw(st.integers(0, tokens - 1))
    more = list(drops)
    more[token] += data.draw(st.integers(1, 60))
    before = select(metric, k, drops, absence, focus=focus)[0].tolist()
    after = select(metric, k, more, absence, focus=focus)[0].tolist()
    assert len(before) == len(after) == k
    assert token not in before or token in after


@given(
    tokens=st.integers(2, 30),
    ratio=st.floats(0.05, 0.95),
    bound=st.integers(1, 9),
    focus=st.sampled_from(["low", "high", 0.5]),
    scale=st.sampled_from([0.0, 0.1]),
    how=st.sampled_from(["fixed", "against", "noise"]),
)
def test_absence_is_bounded(tokens, ratio, bound, focus, scale, how):
    k = max(1, int(ratio * tokens))
    config = RASConfig(focus=focus, max_absence=bound, starvation_scale=scale)
    drops = absence = torch.zeros(2, tokens, dtype=torch.int64)
    generator, worst = torch.Generator().manual_seed(tokens), 0
    for _ in range(3 * (bound + math.ceil(tokens / k)) + 5):
        if how == "fixed":
            metric = torch.arange(tokens).expand(2, tokens) ** 2 + 1.0
        elif how == "noise":
            metric = torch.rand(2, tokens, generator=generator)
        else:  # the tokens that have waited longest get the worst metric
            metric = absence.float() if focus == "low" else 1 / (1 + absence.float())
        rows = by_options(metric, drops, absence, k, config)
        drops, absence = update_counts(drops, absence, rows)
        worst = max(worst, int(absence.max()))
    assert worst <= bound + math.ceil(tokens / k)


def test_without_the_bound_a_token_would_starve():
    config = RASConfig(max_absence=10_000, starvation_scale=0.0, focus="low")
    drops = absence = torch.zeros(1, 6, dtype=torch.int64)
    for _ in range(40):
        rows = by_options(torch.arange(6.0)[None], drops, absence, 3, config)
        drops, absence = update_counts(drops, absence, rows)
    assert absence[0].tolist() == [0, 0, 0, 40, 40, 40]


def test_counts():
    drops, absence = torch.tensor([[3, 1, 0, 2]]), torch.tensor([[2, 1, 0, 0]])
    new_drops, new_absence = update_counts(drops, absence, torch.tensor([[0, 2]]))
    assert new_drops.tolist() == [[3, 2, 0, 3]] and new_absence.tolist() == [[0, 2, 0, 1]]
    assert drops.tolist() == [[3, 1, 0, 2]]


def test_samples_are_independent():
    metric = torch.rand(3, 20)
    together = select(metric, 7, focus=0.4)
    for sample, rows in enumerate(together):
        assert torch.equal(select(metric[sample], 7, focus=0.4)[0], rows)


def test_duplicated_latents_form_groups():
    one, two = torch.randn(2, 4, 3, 3)
    groups = sample_groups(torch.stack([one, two, one, two, one + 1e-6]))
    assert groups.tolist() == [[0.5, 0, 0.5, 0, 0], [0, 0.5, 0, 0.5, 0]] * 2 + [[0, 0, 0, 0, 1]]
    assert sample_groups(one[None]).tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_groups_are_those_of_a_comparison_of_all_pairs(dtype):
    latent = torch.randint(-1, 2, (30, 3, 2)).to(dtype)[torch.randint(30, (90,))]
    latent[3] = -0.0
    latent[4] = 0.0
    flat = latent.flatten(1)
    same = (flat[:, None] == flat).all(-1).float()
    assert torch.equal(sample_groups(latent), same / same.sum(1, keepdim=True))


def test_a_sample_of_nans_is_its_own_group():
    assert sample_groups(torch.full((2, 3), math.nan)).tolist() == [[1, 0], [0, 1]]


def test_custom_selector_is_sorted_and_told():
    seen = []

    def selector(metric, drops, k, info):
        seen.append((metric.shape, drops.shape, k, info))
        return metric.topk(k, dim=1).indices.int()

    rows = select([5.0, 1.0, 4.0, 6.0], 2, selector=selector)
    assert rows.tolist() == [[0, 3]] and rows.dtype == torch.int64
    assert seen == [((1, 4), (1, 4), 2, INFO)]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (torch.tensor([[0]]), r"\[1, 2\]"),
        (torch.tensor([[0.0, 1.0]]), "integers"),
        (torch.tensor([[True, False]]), "integers"),
        (torch.tensor([[0, 4]]), r"0\.\.3"),
        (torch.tensor([[-1, 2]]), r"0\.\.3"),
        (torch.tensor([[2, 2]]), "twice"),
        ([[0, 1]], "list"),
    ],
)
def test_a_bad_selector_names_the_option(rows, complaint):
    with pytest.raises(ValueError, match=f"option selector.*{complaint}"):
        select([5.0, 1.0, 4.0, 6.0], 2, selector=lambda *args: rows)


@pytest.mark.parametrize(("value", "complaint"), [(math.nan, "not a number"), (-1.0, "negative")])
def test_a_bad_value_of_a_metric_names_the_option(value, complaint):
    with pytest.raises(ValueError, match=f"option metric.*{complaint}"):
        token_metric(torch.randn(1, 6, 1, 4), lambda noise, info: torch.full((1, 6), value), INFO)


@pytest.mark.parametrize("batch", [1, 4])
def test_drop_counts_outlive_a_change_of_the_batch(batch):
    """Guidance ends, or begins: a token that was dropped before is still the next to be computed."""
    chooser = RowChooser(RASConfig(cuda_graphs=False, metric="std", max_absence=99))
    noise = torch.tensor([[1.0, -1.0]]) * torch.tensor([3.0, 2.9, 2.8, 1.0, 0.9, 0.8])[None, :, None, None]

    def choose(batch):
        chooser.observe(noise.expand(batch, -1, -1, -1), INFO)
        chooser.advance(dense=False)
        return chooser.rows(torch.zeros(batch, 6, 2), batch, 6, 3, INFO).tolist()

    assert choose(2) == [[0, 1, 2]] * 2
    assert choose(batch) == [[3, 4, 5]] * batch


def chosen_with(batches, noises, autocast=False):
    """Rows of the first sample at each step; all samples share a latent, and their noise."""
    chooser, rows = RowChooser(RASConfig(cuda_graphs=False, metric="std", max_absence=2)), []
    for batch, noise in zip(batches, noises, strict=True):
        chooser.observe(noise.expand(batch, -1, -1, -1), INFO)
        chooser.advance(dense=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rows.append(chooser.rows(torch.zeros(batch, 40, 2), batch, 40, 10, INFO)[0].tolist())
    return rows


@pytest.mark.parametrize("batches", [[2, 1, 1, 2, 2, 2], [1, 2, 2, 1, 1, 1], [4, 2, 1, 4, 1, 2]])
def test_counts_go_on_whatever_the_batch(batches):
    noises = torch.randn(len(batches), 1, 40, 1, 4)
    assert chosen_with(batches, noises) == chosen_with([1] * len(batches), noises)


def test_rows_do_not_depend_on_autocast():
    noises = torch.randn(6, 1, 40, 1, 256)  # of nearly equal deviations
    assert chosen_with([2] * 6, noises, autocast=True) == chosen_with([2] * 6, noises)


def test_callables_are_looked_at_at_every_step():
    """What they return may go wrong late: it is refused all the same."""
    wrong: set[str] = set()

    def metric(noise, info):
        return noise.sum(-1) * math.nan if "metric" in wrong else noise.abs().sum(-1)

    def selector(m, d, k, info):
        return torch.zeros(1, k, dtype=torch.int64) if "selector" in wrong else m.topk(k)[1]

    chooser = RowChooser(RASConfig(metric=metric, selector=selector))
    for _step in range(3):
        chooser.observe(torch.randn(1, 6, 1, 4), INFO)
        chooser.advance(dense=False)
        assert chooser.rows(torch.randn(1, 6, 4), 1, 6, 2, INFO).shape == (1, 2)
    wrong.add("metric")
    with pytest.raises(ValueError, match="option metric"):
        chooser.observe(torch.randn(1, 6, 1, 4), INFO)
    wrong.clear()
    chooser.observe(torch.randn(1, 6, 1, 4), INFO)
    chooser.advance(dense=False)
    wrong.add("selector")
    with pytest.raises(ValueError, match="option selector.*twice"):
        chooser.rows(torch.randn(1, 6, 4), 1, 6, 2, INFO)


@pytest.mark.parametrize("focus", ["low", "high", 0.5])
def test_what_is_known_goes_first_and_is_never_overdue(focus):
    metric = torch.tensor([[9.0, 1.0, 5.0, 3.0, 8.0, 2.0]])
    known = torch.tensor([[True, True, True, False, False, False]])
    zeros = torch.zeros(1, 6, dtype=torch.int64)
    config = RASConfig(focus=focus)

    def chosen(k, known=known, absence=zeros):
        return select_rows(metric, zeros, absence, k, config.high_share, 0.1, 8, known)[0].tolist()

    assert chosen(3) == [3, 4, 5] and set(chosen(2)) < {3, 4, 5} and set(chosen(5)) > {3, 4, 5}
    assert chosen(3, absence=zeros + 20 * known.long()) == [3, 4, 5]
    assert chosen(2, known=torch.ones_like(known)) == chosen(2, known=None)  # nothing else: as if nothing were known
