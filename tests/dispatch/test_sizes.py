"""Many sizes, one after the other: the programs that are kept have a bound, and what compiles says what for."""

import gc
import logging

import pytest
import torch
from tiny import EAGER, TinyDiT, kinds, run

from ras_compile.dispatch import dispatcher
from ras_compile.dispatch.dispatcher import Dispatcher

pytestmark = pytest.mark.usefixtures("quick_collections")

TEXT = torch.randn(1, 3, 6)


def latent(width: int) -> torch.Tensor:
    return torch.randn(1, 4, 8, width, generator=torch.Generator().manual_seed(width))


def dispatchers() -> list[Dispatcher]:
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), Dispatcher)]


class Reading(TinyDiT):
    """The same as a model that is traced, since its code reads a value."""

    def forward(self, hidden_states, timestep, text):
        return super().forward(hidden_states, timestep, text * float(text[0, 0, 0] * 0 + 1))


@pytest.mark.parametrize("model", [TinyDiT, Reading])
def test_the_sizes_used_longest_ago_go(model, monkeypatch, caplog):
    monkeypatch.setattr(dispatcher, "PLANS", 2)
    torch._dynamo.reset()
    others = dispatchers()
    torch.manual_seed(0)
    plain = model().eval()
    compiled = torch.compile(plain, backend="ras", options={**EAGER, "sample_ratio": 1.0}, dynamic=True)
    with caplog.at_level(logging.INFO, "ras_compile"):
        for width in (12, 16, 20, 24, 12, 24):
            found = run(compiled, latent(width), TEXT)
            assert kinds(compiled) == "ddssss"
            torch.testing.assert_close(found, run(plain, latent(width), TEXT), rtol=1e-4, atol=1e-5)
    said = [record.getMessage() for record in caplog.records if "compiling for a latent" in record.getMessage()]
    assert len(said) == 5, "one for each size that comes, and for one that comes back"
    assert said[0] == "compiling for a latent [1, 4, 8, 12]; sets of sizes that this graph has had before: 0"
    assert said[1] == "compiling for a latent [1, 4, 8, 16]; sets of sizes that this graph has had before: 1"
    own = [each for each in dispatchers() if not any(each is other for other in others)]
    assert 1 <= max(len(each.plans) for each in own) <= 2
