"""The cache backend for vLLM-Omni, called as its model runner calls one: `refresh`, then the pipeline, under inference mode."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import EAGER, TinyDiT

import ras_compile

SHAPE = (1, 4, 8, 12)


@pytest.fixture(scope="module")
def backend():
    path = Path(__file__).parents[2] / "integrations" / "vllm_omni.py"
    spec = importlib.util.spec_from_file_location("vllm_omni_backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = []

    class Closed(module.RegionAdaptiveBackend):
        """Closed at the end: the generation of a last request would be that of all tests that follow."""

        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            made.append(self)

    yield Closed
    for one in made:
        one.close()


class Pipeline(torch.nn.Module):
    """A pipeline as vLLM-Omni's are: a module, whose forward is the whole denoising loop, with guidance in two calls."""

    def __init__(self, experts=1):
        super().__init__()
        self.transformer = TinyDiT().eval()
        if experts == 2:
            self.transformer_2 = TinyDiT().eval()

    def forward(self, steps, abort=None):
        latent, text = torch.randn(SHAPE), torch.randn(2, 1, 3, 6)
        for number, (now, later) in enumerate(pairwise(torch.linspace(1, 0, steps + 1))):
            if number == abort:
                return latent
            model = self.transformer if number < steps // 2 else getattr(self, "transformer_2", self.transformer)
            cond, uncond = (model(latent, now.expand(1), branch) for branch in text)
            latent = latent + (later - now) * (uncond + 3 * (cond - uncond))
        return latent


def request(backend, pipeline, steps, **given):
    with torch.inference_mode():
        if backend.is_enabled():
            backend.refresh(pipeline, steps)
        return pipeline(steps, **given)


def kinds(backend, pipeline):
    by_step = {}
    for record in backend.trace(pipeline):
        by_step.setdefault(record.step, set()).add(record.kind)
    return "".join("/".join(sorted(found))[0] for _, found in sorted(by_step.items()))


def test_requests_are_sparse_one_after_another(backend):
    pipeline, made = Pipeline(), backend(EAGER)
    assert not made.is_enabled()
    made.enable(pipeline)
    for steps in (6, 9, 6):
        assert torch.isfinite(request(made, pipeline, steps)).all()
        assert kinds(made, pipeline) == "dd" + "s" * (steps - 2)


def test_an_aborted_request_leaves_nothing(backend):
    pipeline, made = Pipeline(), backend(EAGER)
    made.enable(pipeline)
    request(made, pipeline, 6, abort=3)
    request(made, pipeline, 6)
    assert kinds(made, pipeline) == "ddssss"


def test_each_of_two_experts_warms_up(backend):
    pipeline, made = Pipeline(experts=2), backend(EAGER)
    made.enable(pipeline)
    request(made, pipeline, 8)
    by_model = {"".join(record.kind[0] for record in ras_compile.trace(m)) for m in pipeline.children()}
    assert by_model == {"ddddssss"}  # two calls a step


def test_the_number_of_steps_is_told(backend):
    pipeline, made = Pipeline(), backend({"inner_backend": "eager", "speedup": 1.5})  # which needs it
    made.enable(pipeline)
    request(made, pipeline, 12)
    assert "s" in kinds(made, pipeline)


def test_without_a_transformer(backend):
    with pytest.raises(ras_compile.ConfigError, match="no transformer"):
        backend().enable(torch.nn.Module())


def methods(tree):
    """Names and arguments of a class's methods, from its source."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:1] != "_"]
    return {node.name: [argument.arg for argument in node.args.args] for node in found}


def test_it_has_the_methods_of_the_real_one(backend):
    """Read from the source alone: importing vLLM-Omni needs vLLM and a GPU."""
    spec = importlib.util.find_spec("vllm_omni")
    if spec is None:
        pytest.skip("needs vLLM-Omni's source: pip install --no-deps vllm-omni")
    source = Path(spec.submodule_search_locations[0]) / "diffusion" / "cache" / "base.py"
    classes = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}
    real = methods(classes["CacheBackend"])
    assert {"enable", "refresh", "is_enabled"} <= set(real)
    assert real == {name: list(inspect.signature(getattr(backend, name)).parameters) for name in real}
