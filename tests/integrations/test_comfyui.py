"""The nodes for ComfyUI, in its own loop: its model, patcher, guidance and samplers, where they are installed.

The package that holds them is of December 2024, a month before ComfyUI's wrappers: the two that the nodes use are added here, as
`comfy.patcher_extension` has them. Without the package the same loop runs on stand-ins.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TinyDiT

import ras_compile
from ras_compile.config import PRESETS

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
INSTALL = "needs ComfyUI's classes: pip install --no-deps notcomfy torchsde trampoline einops pyyaml"
STEPS, SHAPE = 10, (1, 16, 8, 12)


@pytest.fixture(scope="module")
def nodes():
    """The folder as ComfyUI imports it: by its path, as a package."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_nodes", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == spec.name]:
        del sys.modules[name]


class Executor:
    """Calls wrappers around a function, the first one outermost."""

    def __init__(self, function, owner, wrappers):
        self.function, self.class_obj, self.wrappers = function, owner, wrappers

    def __call__(self, *args, **named):
        if not self.wrappers:
            return self.function(*args, **named)
        return self.wrappers[0](Executor(self.function, self.class_obj, self.wrappers[1:]), *args, **named)


class Wrapped:
    """What ComfyUI's patchers can do since January 2025."""

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.model_options["transformer_options"].setdefault("wrappers", {}).setdefault(kind, {})[key] = wrapper

    def remove_wrappers_with_key(self, kind, key):
        self.model_options["transformer_options"].get("wrappers", {}).get(kind, {}).pop(key, None)


def wrappers(options, kind):
    return list(options.get("wrappers", {}).get(kind, {}).values())


class Patcher(Wrapped):
    """A stand-in for ComfyUI's `ModelPatcher`."""

    def __init__(self, model, options=None):
        self.model = model
        self.model_options = options or {"transformer_options": {}}

    def clone(self):
        return type(self)(self.model, copy.deepcopy(self.model_options))

    def get_model_object(self, name):
        return getattr(self.model, name)

    def set_model_sampler_post_cfg_function(self, function):
        self.model_options["sampler_post_cfg_function"] = [
            *self.model_options.get("sampler_post_cfg_function", []),
            function,
        ]


class Twice(torch.nn.Module):
    """A model with ComfyUI's arguments around a small one."""

    def __init__(self):
        super().__init__()
        self.inner = TinyDiT()

    def forward(self, x, timesteps, context=None, transformer_options=None):
        for wrapper in transformer_options.get("wrappers", {}).get("diffusion_model", {}).values():
            raise AssertionError(wrapper)
        return self.inner(x, timesteps, context)


class StandIn:
    """ComfyUI's loop in small: guidance in one call or in two, around a model that its own wrappers surround."""

    def __init__(self):
        self.patcher = Patcher(SimpleNamespace(diffusion_model=Twice().eval()))
        self.latent = torch.randn(1, 4, 8, 12)
        self.contexts = torch.randn(2, 1, 3, 6)

    def sample(self, patcher, sampler="euler", together=True):
        self.sigmas = sigmas = torch.linspace(1, 0, STEPS + 1)
        options = patcher.model_options["transformer_options"]
        outer = Executor(lambda noise, image, kernel, sigmas: self.loop(patcher, noise, sigmas, sampler, together), None,
                         wrappers(options, "outer_sample"))  # fmt: skip
        with torch.inference_mode():
            function = SimpleNamespace(__name__=f"sample_{sampler}")
            kernel = SimpleNamespace(sampler_function=function)
            return outer(self.latent, torch.zeros_like(self.latent), kernel, sigmas)

    def loop(self, patcher, x, sigmas, sampler, together):
        for now, later in zip(sigmas[:-1], sigmas[1:], strict=True):
            noise = self.guided(patcher, x, now, together)
            if sampler == "heun" and later > 0:
                noise = (noise + self.guided(patcher, x + (later - now) * noise, later, together)) / 2
            x = x + (later - now) * noise
        return x

    def plain(self, x, t, concat, context, control, options):
        return self.patcher.model.diffusion_model(x, t, context=context, transformer_options=options)

    def call(self, patcher, x, sigma, group):
        options = {**patcher.model_options["transformer_options"], "cond_or_uncond": group, "sigmas": sigma[None]}
        options |= {"sample_sigmas": self.sigmas, "uuids": [uuid.uuid4() for _ in group]}
        call = Executor(self.plain, patcher.model, wrappers(options, "apply_model"))
        context = torch.cat([self.contexts[which].expand(len(x), -1, -1) for which in group])
        return call(torch.cat([x] * len(group)), sigma.expand(len(group) * len(x)), None, context, None, options)

    def guided(self, patcher, x, sigma, together):
        groups = [[1, 0]] if together else [[0], [1]]
        found = {}
        for group in groups:
            found |= dict(zip(group, self.call(patcher, x, sigma, group).chunk(len(group)), strict=True))
        noise = found[1] + 3 * (found[0] - found[1])
        for function in patcher.model_options.get("sampler_post_cfg_function", []):
            noise = function({"input": x, "sigma": sigma.expand(1), "denoised": noise})
        return noise


class StableDiffusion3:
    """ComfyUI's model in small, its patcher, guidance and samplers."""

    kind = "SD3"
    given = dict(
        input_size=None, in_channels=16, depth=1, num_blocks=2, patch_size=2, adm_in_channels=8, context_size=6,
        pos_embed_max_size=16, num_patches=256, qk_norm="rms",
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 6, "out_features": 64}},
    )  # fmt: skip

    def __init__(self):
        pytest.importorskip("torchsde", reason=INSTALL)
        given = pytest.importorskip("comfy.cli_args", reason=INSTALL).args
        given.cpu = given.use_pytorch_cross_attention = True  # attention as it is on a GPU
        import comfy.model_patcher
        import comfy.samplers
        import comfy.supported_models

        class Patcher(Wrapped, comfy.model_patcher.ModelPatcher):
            def clone(self):
                other = super().clone()
                other.__class__ = type(self)
                return other

        config = getattr(comfy.supported_models, self.kind)(dict(self.given, dtype=torch.float32))
        base = config.get_model({}, "").eval()
        for weight in (*base.diffusion_model.parameters(), *base.diffusion_model.buffers()):  # all of them are empty
            torch.nn.init.normal_(weight, std=0.1)
        plain = base.apply_model

        def apply_model(x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **named):
            call = Executor(plain, base, wrappers(transformer_options, "apply_model"))
            return call(x, t, c_concat, c_crossattn, control, transformer_options, **named)

        base.apply_model = apply_model
        cpu = torch.device("cpu")
        self.patcher, self.samplers = Patcher(base, cpu, cpu), comfy.samplers
        self.latent = torch.randn(SHAPE)
        pooled = {"pooled_output": torch.randn(1, 8)}
        self.contexts = [[[torch.randn(1, 3, 6), dict(pooled)]] for _ in range(2)]

    def sample(self, patcher, sampler="euler", together=True):
        guider = self.samplers.CFGGuider(patcher)
        guider.set_conds(*self.contexts)
        guider.set_cfg(3.0)
        area = self.samplers.calc_cond_batch.__globals__["comfy"].model_management
        free = area.get_free_memory
        area.get_free_memory = lambda *given: (1 << 40) if together else 0  # too little for both branches in one call
        try:
            kernel = self.samplers.sampler_object(sampler)
            sigmas = self.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", STEPS)
            outer = Executor(
                lambda noise, image, sampler, sigmas: guider.sample(noise, image, sampler, sigmas, disable_pbar=True),
                guider,
                wrappers(patcher.model_options["transformer_options"], "outer_sample"),
            )
            with torch.inference_mode():
                return outer(self.latent, torch.zeros_like(self.latent), kernel, sigmas)
        finally:
            area.get_free_memory = free


class Flux(StableDiffusion3):
    """With joint and single blocks, rotary positions and distilled guidance."""

    kind = "Flux"
    given = dict(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=8, context_in_dim=6, hidden_size=32, mlp_ratio=2.0,
        num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10_000, patch_size=2, qkv_bias=True,
        guidance_embed=True,
    )  # fmt: skip


@pytest.fixture(params=[StandIn, StableDiffusion3, Flux], ids=lambda kind: kind.__name__)
def comfy(request):
    return request.param()


def patched(nodes, patcher, **options):
    return nodes.RegionAdaptive().patch(patcher, "fast", inner_backend="eager", **options)[0]


def records(nodes, patcher):
    return ras_compile.trace(patcher.model_options[nodes.KEY].compiled)


@pytest.mark.parametrize("together", [True, False], ids=["one call", "two calls"])
def test_steps_are_sparse_and_the_model_stays(nodes, comfy, together):
    before = comfy.sample(comfy.patcher, together=together)
    model = patched(nodes, comfy.patcher)
    for _ in range(2):  # a second run begins anew
        after = comfy.sample(model, together=together)
        found = records(nodes, model)
        assert [record.step for record in found] == [s for s in range(STEPS) for _ in range(1 if together else 2)]
        assert {record.kind for record in found[: 4 * (1 if together else 2)]} == {"dense"}
        assert "sparse" in {record.kind for record in found}
        assert len({record.branch for record in found}) == (1 if together else 2)
        assert not [record.reason for record in found if record.reason not in ("", "warm-up", "error reset")]
    assert torch.isfinite(after).all() and not torch.equal(after, before)
    assert torch.equal(comfy.sample(comfy.patcher, together=together), before)


def test_all_tokens_are_the_plain_picture(nodes, comfy):
    model = patched(nodes, comfy.patcher, sample_ratio=1.0)
    torch.testing.assert_close(comfy.sample(model), comfy.sample(comfy.patcher), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [StableDiffusion3, Flux])
def test_a_lora_is_seen_also_when_it_is_taken_off(nodes, kind):
    """ComfyUI adds LoRAs to the weights in place, before a run."""
    comfy = kind()
    name, weight = next(
        (name, weight) for name, weight in comfy.patcher.model.named_parameters() if name.endswith("qkv.weight")
    )
    with_lora = comfy.patcher.clone()
    assert with_lora.add_patches({name: ("diff", (0.3 * torch.randn_like(weight),))})
    model = patched(nodes, with_lora, sample_ratio=1.0)
    before = comfy.sample(comfy.patcher)
    for _ in range(2):
        with_lora.patch_model()
        plain, adaptive = comfy.sample(with_lora), comfy.sample(model)
        with_lora.unpatch_model()
        torch.testing.assert_close(adaptive, plain, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(plain, before, atol=1e-2)
        torch.testing.assert_close(comfy.sample(model), before, rtol=1e-3, atol=1e-3)


def test_a_sampler_that_adds_noise_is_told(nodes, comfy):
    model = patched(nodes, comfy.patcher)
    with pytest.warns(ras_compile.RASWarning, match="euler_ancestral adds noise in each step"):
        comfy.sample(model, "euler_ancestral")


def test_a_batch_of_odd_size(nodes, comfy):
    comfy.latent = torch.randn(2, *comfy.latent.shape[1:3], 14)
    model = patched(nodes, comfy.patcher)
    latent = {"samples": comfy.sample(model)}
    picture, _ = nodes.FocusMap().draw(model, latent)
    assert "sparse" in {record.kind for record in records(nodes, model)}
    assert picture.shape == (2, 64, 112, 3) and not torch.equal(picture[0], picture[1])


def test_each_evaluation_of_a_solver_of_second_order_is_a_step(nodes, comfy):
    model = patched(nodes, comfy.patcher)
    with pytest.warns(ras_compile.RASWarning, match="more often than that"):
        comfy.sample(model, "heun")
    assert [record.step for record in records(nodes, model)] == list(range(2 * STEPS - 1))


def test_a_call_more_for_the_same_step_is_a_branch(nodes):
    """As perturbed-attention guidance makes one, when the branches have been joined."""
    comfy = StandIn()
    model = patched(nodes, comfy.patcher)

    def perturbed(given):
        comfy.call(model, given["input"], given["sigma"][0], [0])
        return given["denoised"]

    model.set_model_sampler_post_cfg_function(perturbed)
    comfy.sample(model)
    found = records(nodes, model)
    assert [record.step for record in found] == [step for step in range(STEPS) for _ in range(2)]
    assert {record.branch for record in found} == {"1-0", "0 once more"}
    assert {record.kind for record in found if record.branch == "0 once more"} == {"dense", "sparse"}


def test_the_focus_map_has_the_size_of_the_picture(nodes, comfy):
    model = patched(nodes, comfy.patcher)
    latent = {"samples": comfy.sample(model)}
    (picture, told), size = nodes.FocusMap().draw(model.clone(), latent), comfy.latent.shape[2:]
    assert picture.shape == (1, 8 * size[0], 8 * size[1], 3) and picture.aminmax() == (0, 1)
    assert told.startswith("10 calls: 5 dense, 5 sparse")
    with pytest.raises(ValueError, match="not region-adaptive"):
        nodes.FocusMap().draw(comfy.patcher, latent)
    with pytest.raises(ValueError, match="no map"):
        nodes.FocusMap().draw(model, {"samples": torch.zeros(1, 4, 50, 50)})


def test_options_replace_those_of_a_node_before_it(nodes, comfy):
    model = patched(nodes, patched(nodes, comfy.patcher), warmup_steps=7)
    comfy.sample(model.clone())
    assert [record.kind for record in records(nodes, model)[:7]] == ["dense"] * 7
    assert len(model.model_options["sampler_post_cfg_function"]) == 1


def test_what_an_interrupted_run_leaves_is_not_used(nodes, comfy):
    model = patched(nodes, comfy.patcher)
    calls = []

    def stop(given):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return given["denoised"]

    model.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(KeyboardInterrupt):
        comfy.sample(model)
    calls = [None] * 100
    comfy.sample(model)
    assert [record.kind for record in records(nodes, model)[:4]] == ["dense"] * 4


def test_the_nodes_are_complete(nodes):
    assert set(nodes.PRESETS) == set(PRESETS)
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        assert callable(getattr(node, node.FUNCTION)) and node.INPUT_TYPES()["required"]["model"] == ("MODEL",)
        assert name in nodes.NODE_DISPLAY_NAME_MAPPINGS
