"""Where a linear feeds a splice or a GELU, or reads a gather: the fused kernel beside what Inductor makes of the same ops.

    python examples/benchmarks/kernel_sites.py --out examples/benchmarks/results

For each site of the benchmarked models (patch embedding, keys, values, all products of an attention, the output projection and
the MLP, at 50, 25 and 12.5 % of the tokens):

    fused      ras_compile::scatter_linear, with norm and rotary embedding in its epilogue where the site has them
               (MLP: ras_compile::linear_gelu, which splices nothing; patch embedding: ras_compile::gather_linear;
               attention: ras_compile::grouped_scatter_linear, queries, keys and values of picture and text in one launch)
    apart      of an attention: a scatter-GEMM for each key and value, linears for the queries
    unfused    linear (cuBLAS), norm, rotary embedding and index_put_ into the cache, compiled by Inductor
    linear     the linear alone, which no fusion can beat by much

Both are checked against fp32 before they are timed. Each time is that of a CUDA graph of many launches: no host time, and
operands that are warm in the L2 cache for all three alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_site import Attention
from machine import describe, dtype_of, short_name
from rows import save
from torch import Tensor

from ras_compile.kernels import epilogue_reference, gather_linear, linear_gelu, scatter_linear

__all__ = ["SITES", "Site", "main", "measure"]

RATIOS = (0.5, 0.25, 0.125)
LAUNCHES = 20  # of one CUDA graph


@dataclass(frozen=True)
class Site:
    """One linear whose result is spliced, or goes through a GELU, or whose operand is gathered.

    Args:
        model: the model that has it.
        name: "embed", "key", "value", "qkv", "output" or "mlp".
        batch: samples of a call.
        grid: the token grid; its product is the tokens of a sample.
        inputs: channels that come in.
        outputs: channels that go out.
        head_dim: channels of a head; 0: no heads (the output projection).
        context: tokens of the joint cache that stand before the region.
        norm: "none", "rms" or "layer", of each head by itself.
        rope: "none" or "interleaved".
        patch: side of a patch of the output (of the input, where it is embedded); 0: it is packed.
        table: position embeddings are added to the embedded patches.
    """

    model: str
    name: str
    batch: int
    grid: tuple[int, int]
    inputs: int
    outputs: int
    head_dim: int = 0
    context: int = 0
    norm: str = "none"
    rope: str = "none"
    patch: int = 0
    table: bool = False

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


# Keys that are normed across all heads (Lumina-Next, Wan) are not fused; those of SD3-medium are like its values.
SITES = (
    Site("sd3-medium", "embed", 2, (64, 64), 64, 1536, patch=2, table=True),
    Site("flux-dev", "embed", 1, (64, 64), 64, 3072),
    Site("sd3-medium", "value", 2, (64, 64), 1536, 1536, 64),
    Site("sd3-medium", "qkv", 2, (64, 64), 1536, 1536, 64, 333),
    Site("sd3-medium", "output", 2, (64, 64), 1536, 64, patch=2),
    Site("sd3-medium", "mlp", 2, (64, 64), 1536, 6144),
    Site("sd3.5-large", "key", 2, (64, 64), 2432, 2432, 64, norm="rms"),
    Site("sd3.5-large", "value", 2, (64, 64), 2432, 2432, 64),
    Site("sd3.5-large", "mlp", 2, (64, 64), 2432, 9728),
    Site("flux-dev", "key", 1, (64, 64), 3072, 3072, 128, 512, norm="rms", rope="interleaved"),
    Site("flux-dev", "value", 1, (64, 64), 3072, 3072, 128, 512),
    Site("flux-dev", "output", 1, (64, 64), 3072, 64),
    Site("flux-dev", "mlp", 1, (64, 64), 3072, 12288),
    Site("lumina-next", "value", 2, (64, 64), 2304, 576, 72),
    Site("lumina-next", "output", 2, (64, 64), 2304, 32, patch=2),
    Site("wan-1.3b", "value", 1, (30, 1092), 1536, 1536, 128),
    Site("wan-1.3b", "mlp", 1, (30, 1092), 1536, 8960),
)


@dataclass
class Problem:
    """The tensors of one site at one active count; `epilogue` holds the arguments of norm and rotary embedding."""

    site: Site
    x: Tensor  # [B, A, K]; to be embedded: [B, S, K] or [B, C, h p, w p]
    weight: Tensor  # [N, K]
    bias: Tensor  # [N]
    rows: Tensor  # [B, A]
    epilogue: dict[str, Any]

    def cache(self, dtype: torch.dtype) -> Tensor:
        """Zeros: [B, heads, context + S, D], or [B, C, h p, w p], or [B, S, N]."""
        site, made = self.site, {"dtype": dtype, "device": self.x.device}
        if site.head_dim:
            heads = site.outputs // site.head_dim
            return torch.zeros(site.batch, heads, site.context + site.tokens, site.head_dim, **made)
        if site.patch:
            channels = site.outputs // site.patch**2
            return torch.zeros(site.batch, channels, *(side * site.patch for side in site.grid), **made)
        return torch.zeros(site.batch, site.tokens, site.outputs, **made)

    def fused(self, cache: Tensor) -> Tensor:
        """One launch; returns what it wrote."""
        site, dims, whole = self.site, 1, cache
        if site.name == "mlp":
            return linear_gelu(self.x, self.weight, self.bias)
        if site.name == "embed":
            x = self.x
            if site.patch:
                x = x.unflatten(3, (-1, site.patch)).unflatten(2, (-1, site.patch)).permute(0, 2, 4, 1, 3, 5)
            return gather_linear(x, self.weight, self.bias, self.rows, 2 if site.patch else 1, **self.epilogue)
        if site.head_dim:
            cache = cache[:, :, site.context :].permute(0, 2, 1, 3)
        elif site.patch:
            cache = cache.unflatten(3, (-1, site.patch)).unflatten(2, (-1, site.patch)).permute(0, 2, 4, 3, 5, 1)
            dims = 2
        scatter_linear(cache, self.x, self.weight, self.bias, self.rows, dims, **self.epilogue)
        return whole

    def unfused(self, cache: Tensor) -> Tensor:
        """The ops one by one; the splice is written on the cache itself, as the sparse program does."""
        site = self.site
        batch = torch.arange(site.batch, device=self.x.device)[:, None]
        if site.name == "embed":
            return self.embedded(batch)
        y = F.linear(self.x, self.weight, self.bias)
        if site.name == "mlp":
            return F.gelu(y, approximate="tanh")
        if site.head_dim:
            y = epilogue_reference(y, **{"head_dim": site.head_dim} | self.epilogue)
        if site.head_dim:
            values = y.unflatten(-1, (-1, site.head_dim))
            torch.ops.aten.index_put_(cache, [batch, None, self.rows + site.context], values)
        elif site.patch:
            p = torch.arange(site.patch, device=y.device)
            down = (self.rows // site.grid[1])[..., None, None] * site.patch + p[:, None]
            along = (self.rows % site.grid[1])[..., None, None] * site.patch + p
            values = y.unflatten(-1, (site.patch, site.patch, -1))
            torch.ops.aten.index_put_(cache, [batch[..., None, None], None, down, along], values)
        else:
            cache.index_put_((batch, self.rows), y)
        return cache

    def embedded(self, batch: Tensor) -> Tensor:
        """Active patches are gathered and projected; with a side, by the convolution that models have for it."""
        site, rows = self.site, self.rows
        if not site.patch:
            return F.linear(self.x[batch, rows], self.weight, self.bias)
        p = torch.arange(site.patch, device=rows.device)
        down = ((rows // site.grid[1])[..., None] * site.patch + p).flatten(1)[..., None]  # [B, A p, 1]
        along = ((rows % site.grid[1])[..., None] * site.patch + p).repeat_interleave(site.patch, 1)  # [B, A p, p]
        pixels = self.x.permute(0, 2, 3, 1)[batch[..., None], down, along].permute(0, 3, 1, 2)  # [B, C, A p, p]
        kernel = self.weight.unflatten(1, (-1, site.patch, site.patch))
        y = F.conv2d(pixels, kernel, self.bias, stride=site.patch).flatten(2).mT
        return y + self.epilogue["table"].expand(site.batch, -1, -1)[batch, rows] if site.table else y

    def linear(self, cache: Tensor) -> Tensor:
        return F.linear(self.compact, self.weight, self.bias)

    @cached_property
    def compact(self) -> Tensor:
        """The linear's operand [B, A, K], where it is not gathered."""
        return self.x if self.site.name != "embed" else self.x.new_ones(*self.rows.shape, self.site.inputs)

    def wide(self) -> Problem:
        """The same problem in fp32."""
        tables = {key: v.float() if isinstance(v, Tensor) else v for key, v in self.epilogue.items()}
        return Problem(self.site, self.x.float(), self.weight.float(), self.bias.float(), self.rows, tables)


def problem(site: Site, ratio: float, device: torch.device) -> Problem | Attention:
    """The site with random values and random active rows."""
    dtype = dtype_of(device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    active = max(1, round(ratio * site.tokens))
    rows = torch.rand(site.batch, site.tokens, generator=generator, device=device).argsort(1)[:, :active].sort(1).values
    if site.name == "qkv":
        return Attention.drawn(site, rows, draw, dtype)
    epilogue: dict[str, Any] = {}
    if site.norm != "none":
        epilogue |= dict(norm=site.norm, norm_weight=draw(site.head_dim).to(dtype), eps=1e-6)
    if site.rope != "none":
        angle = draw(site.batch, active, site.head_dim // 2).repeat_interleave(2, -1)
        epilogue |= dict(rope=site.rope, cos=angle.cos(), sin=angle.sin())
    if site.norm != "none" or site.rope != "none":
        epilogue["head_dim"] = site.head_dim
    weight = draw(site.outputs, site.inputs) / site.inputs**0.5
    x = draw(site.batch, site.tokens if site.name == "embed" else active, site.inputs)
    if site.name == "embed" and site.patch:
        x = x.reshape(site.batch, -1, *(side * site.patch for side in site.grid))
    if site.table:
        epilogue["table"] = draw(1, site.tokens, site.outputs).to(dtype)
    return Problem(site, x.to(dtype), weight.to(dtype), draw(site.outputs).to(dtype), rows, epilogue)


def measure(site: Site, ratio: float, device: torch.device, inner_backend: str = "inductor") -> dict:
    """One row: errors against fp32, and microseconds of a launch; no times for a kernel that is wrong."""
    given = problem(site, ratio, device)
    compiled = torch.compile(given.unfused, backend=inner_backend, fullgraph=True, dynamic=False)
    dtype, true = dtype_of(device), flat(given.wide().unfused(given.cache(torch.float32)))
    errors = {}
    for name, splice in (("fused", given.fused), ("unfused", compiled)):
        made = flat(splice(given.cache(dtype)))
        errors[name] = ((made.float() - true).abs().max() / true.abs().max()).item()
    right = errors["fused"] <= max(1.5 * errors["unfused"], 1e-5)
    products, text = (1, 0) if isinstance(given, Problem) else (3, site.batch * site.context)
    rows = site.batch * max(1, round(ratio * site.tokens)) + text
    row = dict(
        model=site.model, site=site.name, sample_ratio=ratio, m=rows, n=products * site.outputs, k=site.inputs,
        norm=site.norm, rope=site.rope, error_fused=errors["fused"], error_unfused=errors["unfused"], right=right,
        fused_us=None, unfused_us=None, linear_us=None, apart_us=None, x=None, fused_tflops=None,
    )  # fmt: skip
    if right:
        cache = given.cache(dtype)
        row["fused_us"] = _microseconds(lambda: given.fused(cache), device)
        row["unfused_us"] = _microseconds(lambda: compiled(cache), device)
        row["linear_us"] = _microseconds(lambda: given.linear(cache), device)
        if isinstance(given, Attention):
            row["apart_us"] = _microseconds(lambda: given.apart(cache), device)
        row["x"] = row["unfused_us"] / row["fused_us"]
        row["fused_tflops"] = 2 * row["m"] * row["n"] * row["k"] / row["fused_us"] / 1e6
    return row


def flat(made: Tensor | tuple[Tensor, ...]) -> Tensor:
    """All entries of one tensor or several."""
    return made if isinstance(made, Tensor) else torch.cat([part.flatten() for part in made])


def _microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of one launch, of a graph of launches; by the host's clock on a CPU."""
    call()
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    times = []
    for _ in range(10):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(1e3 * first.elapsed_time(last) / LAUNCHES)
    return statistics.median(times[2:])


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    """Measures every site and writes `DIR/kernels-<gpu>.json` after each; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=sorted({site.model for site in SITES}))
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no further row is begun"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    unknown = set(args.models) - {site.model for site in SITES}
    if unknown:
        parser.error(f"unknown models {sorted(unknown)}; there are {sorted({site.model for site in SITES})}")
    until = time.perf_counter() + args.budget
    device = torch.device(args.device)
    torch._dynamo.config.recompile_limit = 256  # each row compiles the same method anew
    given = sys.argv[1:] if argv is None else argv
    content: dict = {"meta": describe(__file__, given, device), "rows": []}
    for site in (site for site in SITES if site.model in args.models):
        for ratio in args.ratios:
            if time.perf_counter() > until:
                print("the budget is spent: the rest is left out")
                return content
            row = measure(site, ratio, device, args.inner_backend)
            content["rows"].append(row)
            save(args.out / f"kernels-{short_name(device)}.json", content)
            figures = "  ".join(
                f"{key} {row[key]:.4g}" for key in ("fused_us", "unfused_us", "linear_us", "apart_us", "x") if row[key]
            )
            print(
                f"{site.model:<12} {site.name:<7} {ratio:>6.1%}  {figures}" + ("" if row["right"] else "  WRONG"),
                flush=True,
            )
    return content


if __name__ == "__main__":
    main()
