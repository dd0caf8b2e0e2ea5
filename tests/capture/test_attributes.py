"""`torch.compile(..., dynamic=True)`: numbers that modules hold are constants, and those that the user passes are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ras_compile
from ras_compile.backend import ras


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.qkv = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8, eps=1e-4)
        self.eps, self.p = 1e-3, 0.7

    def forward(self, hidden_states: Tensor, timestep: float | Tensor) -> Tensor:
        x = self.enter(hidden_states.flatten(2).transpose(1, 2)) * self.p + timestep * 0.1
        x = self.norm(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, scale=self.p).squeeze(1)
        return self.leave(x).transpose(1, 2).reshape(hidden_states.shape)


class CalledOtherwise(Model):
    """Its forward calls the module by another name than `self`."""

    def forward(module, hidden_states: Tensor, timestep: float | Tensor) -> Tensor:
        return Model.forward(module, hidden_states, timestep)


def check(number, change=lambda model: None, kind=Model):
    torch._dynamo.reset()
    plain, model = kind(), kind()
    options = {"sample_ratio": 1.0, "warmup_steps": 2, "reset_interval": None, "inner_backend": "eager"}
    compiled = torch.compile(model, backend=ras, dynamic=True, options={**options, "unsupported": "error"})
    x = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    for step in range(5):
        if step == 4:
            change(plain), change(model)
        with torch.no_grad():
            found, wanted = (one(x, number(1 - step / 5)) for one in (compiled, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        x = x - wanted / 5
    return [record.kind for record in ras_compile.trace(compiled)]


def test_float_attributes_are_constants():
    assert check(lambda time: torch.tensor([time])).count("sparse") == 3
    assert check(lambda time: torch.tensor([time]), kind=CalledOtherwise).count("sparse") == 3


def test_a_timestep_that_is_a_float_stays_the_users():
    assert "sparse" in check(float)


def test_an_attribute_that_changes_is_another_constant():
    def change(model):
        model.p = 0.9

    check(lambda time: torch.tensor([time]), change)
