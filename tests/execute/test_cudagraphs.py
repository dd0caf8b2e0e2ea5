"""With CUDA graphs everything is as without: on a GPU, and on the CPU with a stand-in that replays a program by calling it."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from recorded import Recorded
from tiny import TinyDiT, run

import ras_compile
from ras_compile.execute import cudagraphs, replay
from ras_compile.sampling.registry import states_of

pytestmark = [
    pytest.mark.filterwarnings("error::ras_compile.notices.RASWarning"),
    pytest.mark.usefixtures("quick_collections"),
]
# the fewest launches beside the model's, which these tests count
OPTIONS = {
    "inner_backend": "eager", "metric": "std", "sample_ratio": 0.5, "warmup_steps": 2, "reset_interval": None
}  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(cudagraphs, "DEVICE", "cpu")
        monkeypatch.setattr(cudagraphs, "Graph", Recorded)
    return request.param


@pytest.fixture(autouse=True)
def captured(device, monkeypatch):
    """The programs captured so far."""
    made: list[object] = []
    graph = cudagraphs.Graph

    class Counted(graph):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(cudagraphs, "Graph", Counted)
    return made


def model(device) -> TinyDiT:
    return TinyDiT().eval().to(device)


def both(module, **options):
    """The module compiled with and without graphs: two states, so that one never helps the other."""
    return [
        torch.compile(module, backend="ras", options={**OPTIONS, "cuda_graphs": graphs, **options})
        for graphs in (True, False)
    ]


def given(device, seed=0, shape=(2, 4, 8, 12), words=3):
    generator = torch.Generator().manual_seed(seed)
    latent, text = torch.randn(shape, generator=generator), torch.randn(shape[0], words, 6, generator=generator)
    return latent.to(device), text.to(device)


def clock(step, steps=6, device="cpu"):
    return torch.full((1,), 1 - step / steps, device=device).expand(2)  # expanded, as pipelines do


def loop(compiled, latent, text, steps=6):
    return run(compiled, latent, text, steps, lambda step, steps: clock(step, steps, latent.device)[:1])


def test_pictures_are_the_same(device, captured):
    graphed, plain = both(model(device))
    for seed in (0, 1, 1, 2):  # other prompts, and the same one again
        latent, text = given(device, seed)
        assert torch.equal(loop(graphed, latent, text), loop(plain, latent, text))
    assert len(captured) == 2  # later generations take the slot of the first one over


def test_sizes_have_slots_of_their_own(device, captured):
    graphed, plain = both(model(device))
    for shape in ((2, 4, 8, 12), (1, 4, 16, 16), (2, 4, 8, 12)):
        latent, text = given(device, shape=shape)
        assert torch.equal(loop(graphed, latent, text), loop(plain, latent, text))
    assert len(captured) == 4


def guided(compiled, latent, texts, steps=6):
    """A generator over the steps of a loop with several branches."""
    with torch.no_grad():
        for step in range(steps):
            time = clock(step, steps, latent.device)
            latent = latent - sum(compiled(latent, time, text) for text in texts) / steps / len(texts)
            yield latent


def last(values):
    return list(values)[-1]


@pytest.mark.parametrize("branches", [2, cudagraphs.SLOTS + 1])
def test_branches_have_slots_of_their_own(device, captured, branches):
    graphed, plain = both(model(device))
    latent = given(device)[0]
    texts = [given(device, seed)[1] for seed in range(branches)]
    if branches > cudagraphs.SLOTS:
        with pytest.warns(ras_compile.RASWarning, match="without CUDA graphs"):
            first = last(guided(graphed, latent, texts))
    else:
        first = last(guided(graphed, latent, texts))
    expected = last(guided(plain, latent, texts))
    assert torch.equal(first, expected)
    assert torch.equal(last(guided(graphed, latent, texts)), expected)
    assert len(captured) == 2 * min(branches, cudagraphs.SLOTS)


def test_generations_take_turns(device):
    """Two transformers of one class share a plan; and two threads share a transformer."""
    modules = model(device), model(device)
    pairs = [both(module) for module in modules]
    latent = given(device)[0]
    texts = [given(device, seed)[1] for seed in (1, 2)]
    for _ in range(2):
        results = []
        for kind in (0, 1):
            runs = [guided(pair[kind], latent, [text]) for pair, text in zip(pairs, texts, strict=True)]
            results.append(list(zip(*runs, strict=True))[-1])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_have_slots_of_their_own(device):
    graphed, plain = both(model(device))
    latent = given(device)[0]
    texts = [given(device, seed)[1] for seed in (1, 2)]
    expected = [loop(plain, latent, text) for text in texts]
    loop(graphed, latent, texts[0])
    found: dict[int, list] = {0: [], 1: []}
    gate = threading.Barrier(2)

    def work(index: int) -> None:
        for _ in range(4):
            gate.wait()
            found[index].append(loop(graphed, latent, texts[index]).cpu())

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, wanted in enumerate(expected):
        assert len(found[index]) == 4 and all(torch.equal(value, wanted.cpu()) for value in found[index])


def in_place(module, state):
    module.load_state_dict(state)


def other_data(module, state):
    """As LoRA and offloading do it: neither the parameter nor its version changes."""
    module.load_state_dict(state)
    for value in module.parameters():
        value.data = value.data.clone()


def one_weight(module, state):
    value = list(module.parameters())[-1]
    value.data = list(state.values())[-1].clone()


def other_objects(module, state):
    module.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)


def other_memory(module, state):
    """The same storage object, at another address."""
    storages = [value.untyped_storage() for value in module.parameters()]
    sizes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    for storage, size in reversed(list(zip(storages, sizes, strict=True))):
        storage.resize_(size)
    module.load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 4])
@pytest.mark.parametrize("change", [in_place, other_data, one_weight, other_objects, other_memory])
def test_weights_change_on_the_way(device, at, change):
    """Before, in and after the sparse steps' first graph."""
    pictures = []
    start = model(device).state_dict()
    other = {name: value * 1.5 for name, value in model(device).state_dict().items()}
    module = model(device)
    # the paper's metric: drift rests on two dense steps, of which the one with a capture in it keeps nothing
    for compiled in both(module, metric="std", noise_reuse="hold"):
        for _ in range(2):
            module.load_state_dict(start)
            results = []
            for step, latent in enumerate(guided(compiled, *given(device)[:1], [given(device)[1]], steps=8)):
                results.append(latent)
                if step == at:
                    change(module, other)
            pictures.append(results[-1])
    assert all(torch.equal(picture, pictures[-1]) for picture in pictures)


def test_weights_that_move_at_every_call_are_never_captured(device, captured):
    module = model(device)
    graphed, plain = both(module)
    kept = []
    latent, text = given(device)

    def moving():
        for value in guided(graphed, latent, [text]):
            for weight in module.parameters():
                kept.append(weight.data)
                weight.data = weight.data.clone()
            yield value

    assert torch.equal(last(moving()), last(guided(plain, latent, [text])))
    assert not captured


def test_an_aborted_generation(device):
    graphed, plain = both(model(device))
    latent, text = given(device)
    expected = loop(plain, latent, text)
    loop(graphed, latent, text)
    stopped = guided(graphed, *given(device, 3)[:1], [given(device, 3)[1]])
    for _ in range(4):
        next(stopped)
    assert torch.equal(loop(graphed, latent, text), expected)


def test_what_is_returned_stays(device):
    graphed, _ = both(model(device))
    latent, text = given(device)
    for _ in range(2):
        kept = []
        with torch.no_grad(), ras_compile.generation() as gen:
            for _ in range(6):
                noise = graphed(latent, clock(gen.step(), 6, device), text)
                kept.append((noise, noise.clone()))
        assert all(torch.equal(*pair) for pair in kept)


def test_inputs_written_in_place(device):
    """A prompt and a latent that stay the same objects while their content changes."""
    pictures = []
    for compiled in both(model(device)):
        latent, text = (value.clone() for value in given(device))
        with torch.no_grad(), ras_compile.generation(num_steps=8) as gen:
            for step in range(8):
                gen.step()
                latent -= compiled(latent, clock(step, 8, device), text) / 8
                text.mul_(1.1)
        pictures.append(latent)
    assert torch.equal(*pictures)


def test_modes_of_autograd(device):
    module = model(device)
    graphed, plain = both(module)
    latent, text = given(device)
    expected = loop(plain, latent, text)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(loop(graphed, latent.clone(), text.clone()), expected)


def test_nothing_is_left_when_the_model_goes(device, captured):
    compiled = torch.compile(model(device), backend="ras", options=OPTIONS)
    loop(compiled, *given(device))
    assert any(graph() is not None for graph in captured)
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert all(graph() is None for graph in captured)


def test_a_capture_that_fails_costs_a_warning(device, monkeypatch):
    graphed, plain = both(model(device))
    latent, text = given(device)
    expected = loop(plain, latent, text)
    real = cudagraphs.Graph

    def failing(compiled, inputs, pool):
        return real(
            lambda *values: [x * x.sum().item() for x in compiled(*values)] if device == "cuda" else 1 / 0, inputs, pool
        )

    monkeypatch.setattr(cudagraphs, "Graph", failing)
    with pytest.warns(ras_compile.RASWarning, match="capturing it failed"):
        assert torch.equal(loop(graphed, latent, text), expected)
    assert torch.equal(loop(graphed, latent, text), expected)
    if device == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.randn(3, device=device).sum().item()  # the generator was part of the capture


def test_numbers_are_not_baked_in(device, captured):
    """A timestep that is a Python number: a graph would repeat its first value."""
    graphed, plain = both(model(device))
    latent, text = given(device)

    def picture(compiled):
        x = latent
        with torch.no_grad():
            for step in range(6):
                x = x - compiled(x, 1 - step / 6, text) / 6
        return x

    if device == "cuda":
        with pytest.warns(ras_compile.RASWarning, match="without CUDA graphs"):
            picture(graphed)
    picture(graphed), picture(plain)  # Dynamo first takes a float for a constant
    assert torch.equal(picture(graphed), picture(plain))
    assert bool(captured) == (device == "cpu")  # where all is on one device, a number is a tensor like any other


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_the_steady_state_does_not_wait(device, inner):
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    graphed, plain = both(model(device), inner_backend=inner)
    latent, texts = given(device)[0], [given(device, seed)[1] for seed in (1, 2)]

    def picture(compiled, mode):
        value, times = latent, [clock(step, 8, device) for step in range(8)]
        with torch.no_grad(), ras_compile.generation(num_steps=8) as gen:
            for step in range(8):
                gen.step()
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    value = value - sum(compiled(value, times[step], text) for text in texts) / 16
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        return value

    first = picture(graphed, "default")
    assert torch.equal(first, picture(graphed, "error"))
    assert (first - picture(plain, "default")).abs().max() <= 1e-6


@pytest.mark.gpu
def test_streams_wait_for_each_other(device):
    """A slot that goes from one stream to another is written only when the first one is done with it."""
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    graphed, plain = both(TinyDiT(width=64, layers=8).eval().to(device))
    latent, text = given(device, shape=(2, 4, 64, 64))
    other = latent + 1
    expected = [loop(plain, latent, text), loop(plain, other, text)]
    for _ in range(3):
        results = []
        for value in (latent, other):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(loop(graphed, value, text))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "inner"), [("float32", "eager"), ("float32", "inductor"), ("bfloat16", "inductor")])
@pytest.mark.parametrize("metric", ["std", "drift"])
def test_the_shipped_pipeline(device, captured, monkeypatch, dtype, inner, metric):
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    from diffusers import StableDiffusion3Pipeline

    folder = Path(__file__).parents[2] / "examples" / "emoji" / "pipeline"
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).to(
        "cuda"
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt, size):
        return pipe(
            prompt, num_inference_steps=12, guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
            max_sequence_length=1, output_type="latent", height=size, width=size,
        ).images  # fmt: skip

    calls = [("a red apple", 128), ("a cat", 128), ("a red apple", 128)]
    if inner == "eager":
        calls += [("a cat", 64), ("a cat", 64), ("a red apple", 128)]  # a program is captured when it runs again
    with ras_compile.attach(pipe, inner_backend=inner, reset_interval=4, metric=metric) as handle:
        graphed = [draw(*call) for call in calls]
        assert {record.kind for record in ras_compile.trace(handle)} == {"dense", "sparse"}
        count = (2 if inner == "eager" else 1) * (3 if metric == "drift" else 2)  # "ends" has two sparse programs
        assert len(captured) == count
        # The same programs as they are: compiled once more they may round in other ways.
        monkeypatch.setattr(
            cudagraphs.ProgramGraphs, "run", lambda self, active, compiled, inputs, *_: compiled(*inputs)
        )
        for state in states_of(pipe.transformer.parameters()):
            state.reset()  # its selection loses its graphs, too
        monkeypatch.setattr(replay, "Graph", Recorded)  # and gets none that is CUDA's
        plain = [draw(*call) for call in calls]
    assert len(captured) == count
    scale = max(picture.abs().max().item() for picture in plain)
    gaps = [(a - b).abs().max().item() / scale for a, b in zip(graphed, plain, strict=True)]
    assert max(gaps) <= 1e-6, gaps
