"""The contract over several processes: what all of them return together is what one process returns for the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from across import Columns, Gathered, Own, Ring, Split, Transformer, Ulysses, on_a_cpu, on_ranks
from contract import Subject, error, subject
from torch import Tensor, nn

import ras_compile
from ras_compile.errors import UnsupportedGraph
from ras_compile.notices import fallbacks
from ras_compile.passes.analysis.cost import ACTIVE
from ras_compile.passes.fusion.sites import sites
from ras_compile.passes.rules.attention import KERNELS

TIGHT = 1e-9
SAMPLES, TOKENS = 2, 24


def inputs(seed: int, tokens: slice = slice(None)) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    latent, places = torch.randn(SAMPLES, TOKENS, 4), torch.randn(TOKENS, 16)
    return {"latent": latent[:, tokens], "places": places[tokens], "time": torch.full((SAMPLES,), 0.5)}


@pytest.fixture(autouse=True, scope="module")
def double() -> Iterator[None]:
    """All processes compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def transformer(**layers: Any) -> nn.Module:
    torch.manual_seed(7)
    return Transformer(**layers).eval()


@pytest.fixture(scope="module")
def alone() -> Subject:
    """The model of one process, whatever the processes of the others send each other. It is captured once."""
    return subject(transformer(attention=lambda: Ulysses(16, 4)), inputs(0))


def shard() -> slice:
    size = TOKENS // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def everyone(rows: Tensor, tokens: int = TOKENS) -> Tensor:
    """The rows of all processes as rows of all tokens."""
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(found, rows)
    return torch.cat([rank * tokens // len(found) + own for rank, own in enumerate(found)], dim=1)


def contract(attention: type, alone: Subject) -> Callable[[int], dict[str, Any]]:
    """What each process, with its shard of the tokens, finds of the contract: the largest errors, and what it sends."""

    def work(rank: int) -> dict[str, Any]:
        shared = subject(transformer(attention=lambda: attention(16, 4, dist.group.WORLD)), inputs(0, shard()))
        tokens, own = shared.frame.tokens, shard()
        dense, caches = shared.dense(shared.values)
        wanted, before = alone.dense(alone.values)
        found = {"dense": error(dense, [wanted[0][:, own]])}
        other = inputs(1)["latent"]
        whole, _ = shared.sparse(shared.with_latent(other[:, own]), torch.arange(tokens).repeat(SAMPLES, 1), caches)
        found["identity"] = error(whole, [alone.reference(alone.with_latent(other))[0][:, own]])
        rows = shared.rows(tokens // 4, seed=rank)  # each process has rows of its own
        same, after = shared.sparse(shared.values, rows, caches)
        found["consistency"] = max(error(same, dense), error(after, caches))
        moved, _ = shared.sparse(shared.with_latent(other[:, own]), rows, caches)
        kept = torch.ones(SAMPLES, tokens, dtype=torch.bool).scatter_(1, rows, False)
        found["locality"] = float(not torch.equal(moved[0][kept], dense[0][kept]))
        found["oracle"] = 0.0
        for step in (1, 2):
            latent, rows = inputs(step)["latent"], shared.rows(tokens // 4, seed=10 * step + rank)
            outputs, caches = shared.sparse(shared.with_latent(latent[:, own]), rows, caches)
            wanted, before = alone.sparse(alone.with_latent(latent), everyone(rows), before)
            found["oracle"] = max(found["oracle"], error(outputs, [wanted[0][:, own]]))
        if rank == 0:  # what is found by running parts of a program waits for no other process, in vain
            sites(shared.plan.sparse_graph(tokens // 4).graph, tokens)
            assert not [told for told in fallbacks() if told.what == "a splice not fused"]
        price = shared.plan.cost
        found["sent"] = float(price.sparse_sent.subs(ACTIVE, tokens // 4)), price.dense_sent
        return found

    return work


@pytest.mark.parametrize(("attention", "count"), [(Ulysses, 2), (Ulysses, 4), (Gathered, 2), (Gathered, 4), (Ring, 4)])
def test_contract(attention, count, alone):
    for found in on_ranks(count, contract(attention, alone)):
        sparse, dense = found.pop("sent")
        assert set(found) == {"dense", "identity", "consistency", "locality", "oracle"}
        assert max(found.values()) < TIGHT, found
        rows = (count - 1) * SAMPLES * (TOKENS // count // 4) * 8
        assert math.isclose(sparse - rows, dense * (TOKENS // count // 4) / (TOKENS // count))


def against_one(shared: Subject, alone: Subject, whole: bool) -> float:
    """The largest error of what all processes return for the whole latent, over a dense and two sparse steps.

    Args:
        whole: the processes share the tokens; else all compute the same ones.
    """
    dense, caches = shared.dense(shared.values)
    wanted, before = alone.dense(alone.values)
    worst = error(dense, wanted)
    for step in (1, 2):
        latent = inputs(step)["latent"]
        rows = shared.rows(shared.frame.tokens // 4, seed=10 * step + dist.get_rank())
        own = everyone(rows)
        if not whole:  # those of the first process are computed by all
            own = own[:, : rows.shape[1]]
        outputs, caches = shared.sparse(shared.with_latent(latent), rows, caches)
        wanted, before = alone.sparse(alone.with_latent(latent), own, before)
        worst = max(worst, error(outputs, wanted))
    return worst


@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind a layer"])
def test_a_model_that_takes_its_shard_itself(behind):
    def build(group: Any = None) -> Subject:
        torch.manual_seed(7)
        first = nn.Linear(4, 4) if behind else None
        return subject(Split(Transformer(lambda: Ulysses(16, 4, group)), group, first).eval(), inputs(0))

    alone = build()

    def work(rank: int) -> Any:
        shared = build(dist.group.WORLD)
        worst = against_one(shared, alone, whole=True)
        noise, latent = shared.dense(shared.values)[0][0], shared.values[shared.plan.latent]
        assert torch.equal(shared.plan.noise_view(noise).flatten(2), noise[:, shard()])
        assert torch.equal(shared.plan.latent_view(latent).flatten(2), latent[:, shard()])
        return worst

    assert max(on_ranks(2, work)) < TIGHT


def test_features_that_processes_add_up():
    """Tensor parallel: every process computes the rows of the first one, whatever it was told."""

    def build(group: Any = None) -> Subject:
        return subject(transformer(attention=lambda: Own(16), feed=lambda: Columns(16, group)), inputs(0))

    alone = build()

    def work(rank: int) -> Any:
        return against_one(build(dist.group.WORLD), alone, whole=False)

    assert max(on_ranks(2, work)) < TIGHT


def test_parallelism_of_diffusers(monkeypatch):
    """Ulysses, ring attention and tensor parallel on a joint sequence."""
    diffusers = pytest.importorskip("diffusers", minversion="0.38")
    flux = diffusers.FluxTransformer2DModel  # imported here once, and not in each process
    config = dict(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip

    given = dict(
        hidden_states=inputs(0)["latent"], encoder_hidden_states=torch.randn(SAMPLES, 8, 32),
        pooled_projections=torch.randn(SAMPLES, 32), timestep=torch.ones(SAMPLES),
        img_ids=torch.randn(TOKENS, 3), txt_ids=torch.zeros(8, 3), return_dict=False,
    )  # fmt: skip

    def build() -> Any:
        torch.manual_seed(7)
        return flux(**config).eval()

    alone = subject(build(), given)

    def work(rank: int) -> Any:
        on_a_cpu()
        worst, of_tokens = [], diffusers.ContextParallelConfig
        ways = [("native", of_tokens(ulysses_degree=2), True), ("_native_flash", of_tokens(ring_degree=2), True)]
        if hasattr(diffusers, "TensorParallelConfig"):  # since 0.42
            monkeypatch.setattr("diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES", ("cpu",))
            ways.append(("native", diffusers.TensorParallelConfig(tp_degree=2), False))
        for kernel, way, whole in ways:
            model = build()
            model.set_attention_backend(kernel)
            model.enable_parallelism(config=way)
            shared = subject(model, given)
            worst.append(against_one(shared, alone, whole))
            kernels = shared.program(3).graph.find_nodes(op="call_function", target=KERNELS[0])
            assert len(kernels) == (4 if kernel == "_native_flash" else 0)  # two layers, two processes' keys
            for called in kernels:  # cuDNN's is wrong on others, and does not say so
                assert all(operand.meta["val"].is_contiguous() for operand in called.args[:3])
        return max(worst)

    assert max(on_ranks(2, work)) < TIGHT


def test_context_parallel_of_a_video():
    """Tokens of a latent with sides of its own, of which each process takes a stretch behind the patches."""
    diffusers = pytest.importorskip("diffusers", minversion="0.38")
    wan = diffusers.WanTransformer3DModel
    config = dict(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32,
        num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    given = dict(
        hidden_states=torch.randn(SAMPLES, 4, 3, 4, 8), timestep=torch.ones(SAMPLES),
        encoder_hidden_states=torch.randn(SAMPLES, 7, 16), return_dict=False,
    )  # fmt: skip

    def build() -> Any:
        torch.manual_seed(7)
        return wan(**config).eval()

    alone = subject(build(), given)

    def work(rank: int) -> Any:
        on_a_cpu()
        model = build()
        model.set_attention_backend("native")
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=4))
        shared = subject(model, given)
        tokens, all_of_them = shared.frame.tokens, alone.frame.tokens
        assert all_of_them == 4 * tokens == 24
        own = slice(rank * tokens, (rank + 1) * tokens)
        dense, caches = shared.dense(shared.values)
        wanted, before = alone.dense(alone.values)
        found = {"dense": error(dense, wanted)}
        other = alone.other_latent()
        every = torch.arange(tokens).repeat(SAMPLES, 1)
        whole, _ = shared.sparse(shared.with_latent(other), every, caches)
        found["identity"] = error(whole, alone.reference(alone.with_latent(other)))
        rows = shared.rows(tokens // 4, seed=rank)
        same, after = shared.sparse(shared.values, rows, caches)
        found["consistency"] = max(error(same, dense), error(after, caches))
        (moved, *_), _ = shared.sparse(shared.with_latent(other), rows, caches)
        kept = torch.ones(SAMPLES, tokens, dtype=torch.bool).scatter_(1, rows, False)
        view, noise = shared.plan.noise_view, dense[0]
        found["locality"] = float(not torch.equal(view(moved)[kept], view(noise)[kept]))
        for step in (1, 2):
            latent, rows = alone.other_latent(step), shared.rows(tokens // 4, seed=10 * step + rank)
            outputs, caches = shared.sparse(shared.with_latent(latent), rows, caches)
            wanted, before = alone.sparse(alone.with_latent(latent), everyone(rows, all_of_them), before)
            found[f"oracle {step}"] = error(outputs, wanted)
        for seen, all_seen, value in (
            (shared.plan.latent_view, alone.plan.latent_view, shared.latent), (view, alone.plan.noise_view, noise)
        ):  # fmt: skip
            assert torch.equal(seen(value), all_seen(value)[:, own])
        assert shared.plan.spread is not None
        made = noise.clone()
        view.write(made, view(noise) + 1)
        assert torch.equal(alone.plan.noise_view(made)[:, own], alone.plan.noise_view(noise)[:, own] + 1)
        shared.plan.spread.share(made)
        assert torch.equal(made, noise + 1)
        return found

    for found in on_ranks(4, work):
        assert max(found.values()) < TIGHT, found


def test_sharded_tensors_of_pytorch():
    """`parallelize_module`: features split by columns and added up by rows, and a modulation whose columns are put together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    alone = subject(transformer(attention=lambda: Own(16)), inputs(0))

    def work(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (4,))

        def split() -> Any:
            model = transformer(attention=lambda: Own(16))
            for block in model.blocks:
                plan = {"feed.0": ColwiseParallel(), "feed.2": RowwiseParallel()}
                parallelize_module(block, mesh, {**plan, "modulation": ColwiseParallel(output_layouts=Replicate())})
            return model

        worst = against_one(subject(split(), inputs(0)), alone, whole=False)
        torch.set_default_dtype(torch.float32)
        model = split()
        model.compile(backend="ras", options={"inner_backend": "eager", "unsupported": "error", "warmup_steps": 1})
        latent = inputs(0)["latent"]
        with torch.no_grad():
            for step in range(4):
                noise = model(**{**inputs(0), "latent": latent, "time": torch.full((SAMPLES,), 1 - step / 4)})
                latent = latent - 0.1 * noise
        assert {record.kind for record in ras_compile.trace(model)} == {"dense", "sparse"}

        class Tokens(nn.Module):
            def forward(self, latent: Tensor, time: Tensor) -> Tensor:
                return (DTensor.from_local(latent, mesh, [Shard(1)]) * 2).to_local() * time[:, None, None]

        with pytest.raises(UnsupportedGraph, match=r"a DTensor as S\(1\); linear layers whose features"):
            subject(Tokens(), {name: inputs(0)[name] for name in ("latent", "time")}, exact=False)
        return worst

    assert max(on_ranks(4, work)) < TIGHT


class Collective(nn.Module):
    """One collective between two layers of a model on the tokens of this process."""

    def __init__(self, collective: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.collective = nn.Linear(4, 4), nn.Linear(4, 4), collective

    def forward(self, latent: Tensor, time: Tensor) -> Tensor:
        return self.second(funcol.wait_tensor(self.collective(self.first(latent)))) * time[:, None, None]


def scattered(x: Tensor) -> Tensor:
    """The sum of features, of which each process gets a half and then all of them again."""
    half = funcol.wait_tensor(funcol.reduce_scatter_tensor(x.movedim(-1, 0).contiguous(), "sum", 0, "0"))
    return torch.cat([half, half]).movedim(0, -1)


def exchanged(x: Tensor) -> Tensor:
    """Tokens of this process that become those of another one."""
    x = funcol.all_to_all_single(x.transpose(0, 1).contiguous(), None, None, "0")
    return funcol.wait_tensor(x).transpose(0, 1)


# What a collective does to tokens: whether they stay sparse, or why the model is refused.
ALONE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a sum": (lambda x: funcol.all_reduce(x, "sum", "0"), ""),
    "of the first": (lambda x: funcol.broadcast(x, 0, "0"), ""),
    "a sum that is scattered": (scattered, ""),
    "samples that are exchanged": (lambda x: funcol.all_to_all_single(x, None, None, "0"), "lost in"),
    "tokens that are exchanged": (exchanged, "lost in"),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_collective_by_itself(name):
    collective, refused = ALONE[name]

    def work(rank: int) -> Any:
        torch.manual_seed(0)
        given = {"latent": inputs(0)["latent"], "time": inputs(0)["time"]}
        try:
            model = subject(Collective(collective), given)
        except UnsupportedGraph as refusal:
            return str(refusal)
        dense, caches = model.dense(model.values)
        other = model.with_latent(model.other_latent())
        rows = model.rows(model.frame.tokens // 4, seed=0)
        outputs, _ = model.sparse(other, rows, caches)
        return error(outputs, model.oracle(other, rows, caches))

    for found in on_ranks(2, work):
        assert refused in found if refused else found < TIGHT, found
