"""Which calls share a family of plans: one is made for each key and region, and no more than a few."""

from __future__ import annotations

from types import SimpleNamespace

from ras_compile.config import RASConfig
from ras_compile.plans import family
from ras_compile.plans.family import FAMILIES, Families


def test_a_family_is_made_once_for_what_calls_have_in_common(monkeypatch):
    made: list[tuple] = []

    def make(self, key, lengths, values, config):
        made.append(key)
        return None if values[0] == "refused" else SimpleNamespace(member=lambda values: (key, values[1]))

    lengths = SimpleNamespace(key_without_lengths=lambda values, users: values[0])
    monkeypatch.setattr(family.Lengths, "of", lambda graph, inputs, values, numbers: lengths if values else None)
    monkeypatch.setattr(Families, "make", make)
    families, config = Families(None, [], []), RASConfig()
    assert families.plan([], config, []) is None and not made, "there are no lengths"
    assert families.plan(["a", 5], config, []) == (("a", None), 5)
    assert families.plan(["a", 7], config, []) == (("a", None), 7) and len(made) == 1
    assert families.plan(["a", 7], config, [], fixed=1) == (("a", 1), 7), "other numbers among the weights"
    families.plan(["a", 7], RASConfig.from_options({"region": slice(0, 4)}), [])
    assert len(made) == 3, "another region"
    assert families.plan(["refused", 7], config, []) is families.plan(["refused", 9], config, []) is None
    assert len(made) == 4
    for number in range(FAMILIES):
        families.plan([number, 7], config, [])
    assert len(made) == FAMILIES and families.plan([FAMILIES, 7], config, []) is None
