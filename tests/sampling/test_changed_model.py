"""A model that changes in the middle of a picture: the next call is dense, every time, and equal events give equal pictures."""

import copy

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pipelines import EAGER as PIPELINE
from pipelines import draw_sd3, kinds, sd3
from tiny import EAGER, LATENT, TEXT, TinyDiT
from torch import nn

import ras_compile


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Adapted(TinyDiT):
    """With a side path whose strength is an attribute, as that of an adapter is."""

    def __init__(self) -> None:
        super().__init__()
        self.strength, self.down, self.up = 1.0, nn.Linear(16, 2), nn.Linear(2, 16)
        self.register_buffer("shift", torch.zeros(16))

    def forward(self, hidden_states, timestep, text):
        text = text + self.strength * nn.functional.pad(text, (0, 10)).matmul(self.down.weight.T).matmul(
            self.up.weight.T[:, :6]
        )
        return super().forward(hidden_states + self.shift.mean() + 0.1 * self.strength, timestep, text)


def exchange(model: Adapted) -> None:
    model.head.weight = nn.Parameter(1.5 * model.head.weight)


def write(model: Adapted) -> None:
    with torch.no_grad():
        model.shift.add_(0.5)


CHANGES = {
    "strength": lambda model: setattr(model, "strength", 0.5),
    "load_state_dict": lambda model: model.load_state_dict({k: 1.2 * v for k, v in model.state_dict().items()}),
    "a buffer": write,
    "a parameter": exchange,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("said", ["steps", "branches", "nothing"])
def test_equal_events_give_equal_pictures(change, said):
    model = Adapted().eval()
    compiled = torch.compile(model, backend="ras", options=EAGER)
    start, pictures, orders = copy.deepcopy(model.state_dict()), [], []
    for _ in range(3):
        model.strength, latent, order = 1.0, LATENT, ""
        model.load_state_dict(start)
        with torch.no_grad(), ras_compile.generation(num_steps=8) as gen:
            for step in range(8):
                if step == 5:
                    CHANGES[change](model)
                given = latent, torch.full((2,), 1 - step / 8), TEXT
                if said != "nothing":
                    gen.step()
                if said == "branches":
                    with gen.branch("cond"):
                        noise = compiled(*given)
                else:
                    noise = compiled(*given)
                if step == 5:
                    torch.testing.assert_close(noise, model(*given))
                order += ras_compile.trace(compiled)[-1].kind[0]
                latent = latent - noise / 8
        pictures.append(latent)
        orders.append(order)
    # alone, another graph, which Dynamo makes of another strength, is another model
    assert orders == ["dd" + "sss" + ("dds" if said == "nothing" else "dss")] * 3
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def drawn(compiled, model, steps: int, change=None) -> str:
    """The kinds of a picture's steps; ``change`` happens before the sixth, whose noise is then the changed model's."""
    latent, order = LATENT, ""
    with torch.no_grad(), ras_compile.generation(num_steps=8) as gen:
        for step in range(steps):
            if change and step == 5:
                change(model)
            gen.step()
            given = latent, torch.full((2,), 1 - step / 8), TEXT
            noise = compiled(*given)
            kind = ras_compile.trace(compiled)[-1].kind[0]
            if kind == "d":
                torch.testing.assert_close(noise, model(*given))
            latent, order = latent - noise / 8, order + kind
    return order


def adapters(model: nn.Module) -> list:
    return [part for part in model.modules() if isinstance(part, LoraLayer)]


ADAPTED = {
    "merged": lambda model: [part.merge() for part in adapters(model)],
    "another strength": lambda model: [part.set_scale("default", 0.3) for part in adapters(model)],
    "turned off": lambda model: [part.enable_adapters(False) for part in adapters(model)],
}


@pytest.mark.parametrize("change", ADAPTED)
def test_what_happens_to_adapters_is_seen(change):
    """PEFT merges them through `.data`, which moves no version; its layers then go another way, which is another graph."""
    torch.manual_seed(0)
    model = TinyDiT().eval()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"], init_lora_weights=False), model)
    compiled = torch.compile(model.eval(), backend="ras", options=EAGER)
    assert drawn(compiled, model, 8, ADAPTED[change]) == "ddsss" + "dss"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_write_through_data_is_seen_in_the_next_picture(frozen):
    """No version and no object tells it. Nothing made of the old weights outlives a picture, the context neither."""
    model = Adapted().eval()
    compiled = torch.compile(model, backend="ras", options=EAGER | ({"context": "frozen"} if frozen else {}))

    def write(model):
        model.head.weight.data.mul_(1.5)
        model.up.weight.data = 1.5 * model.up.weight

    assert drawn(compiled, model, 8, write) == "dd" + "s" * 6
    assert drawn(compiled, model, 2) == "dd", "which have the changed model's noise"


def to_and_back(model: Adapted) -> None:
    model.to(torch.float64).to(torch.float32)


def copied_buffers(model: Adapted) -> None:
    """As a move between devices leaves them: new objects of equal content, whose versions begin anew."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())


MOVES = {"to another dtype and back": to_and_back, "its buffers": copied_buffers}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("said", [True, False])
def test_a_move_of_equal_weights_is_no_change(move, inference, said):
    """At every step, as an offloading hook may move them, or once in the middle of a picture."""
    model = Adapted().eval()
    write(model)
    compiled = torch.compile(model, backend="ras", options=EAGER)
    with torch.inference_mode() if inference else torch.no_grad():
        for moved in (range(8), [5]):
            latent, order = LATENT.clone(), ""
            with ras_compile.generation(num_steps=8) as gen:
                for step in range(8):
                    if step in moved:
                        MOVES[move](model)
                    if said:
                        gen.step()
                    noise = compiled(latent, torch.full((2,), 1 - step / 8), TEXT)
                    order += ras_compile.trace(compiled)[-1].kind[0]
                    latent = latent - noise / 8
            assert order == "dd" + "s" * 6


def test_a_buffer_that_is_moved_and_changed():
    model = Adapted().eval()
    compiled = torch.compile(model, backend="ras", options=EAGER)
    order = ""
    with torch.no_grad(), ras_compile.generation(num_steps=8) as gen:
        for step in range(8):
            copied_buffers(model)
            if step in (3, 5):
                model.shift = model.shift + 1
            gen.step()
            given = LATENT - step, torch.full((2,), 1 - step / 8), TEXT
            noise = compiled(*given)
            order += ras_compile.trace(compiled)[-1].kind[0]
            if step in (3, 5):
                torch.testing.assert_close(noise, model(*given))
    assert order == "dd" + "s" + "d" + "s" + "d" + "ss"


def test_model_offload_is_no_change():
    pipe = sd3(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device="cpu")  # whose hook copies all buffers at every step
    with ras_compile.attach(pipe, **PIPELINE) as handle:
        for _ in range(2):
            draw_sd3(pipe, steps=6)
            assert kinds(ras_compile.trace(handle)) == "dd" + "ssss"


def test_weights_that_a_callback_loads():
    pipe = sd3(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    start = copy.deepcopy(pipe.transformer.state_dict())

    def load(pipe, step, time, tensors):
        if step == 3:
            pipe.transformer.load_state_dict({name: 0.9 * value for name, value in start.items()})
        return {}

    pictures = []
    with ras_compile.attach(pipe, **PIPELINE) as handle:
        for _ in range(2):
            pipe.transformer.load_state_dict(start)
            pictures.append(draw_sd3(pipe, steps=7, callback_on_step_end=load))
            assert kinds(ras_compile.trace(handle)) == "dd" + "ss" + "d" + "ss"
            assert ras_compile.trace(handle)[4].reason == "its weights have changed"
    assert torch.equal(*pictures)
