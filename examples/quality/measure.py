"""What is measured on pictures: distances of feature distributions, what the captions ask for, likeness to a reference.

Public Inception and CLIP weights are not part of this repository. The feature space is that of its judge
(`examples/emoji/classifier.py`), a small network trained on real scenes of the same kind and never on generated
pictures. Its distances compare rows of one table; they are no FIDs of the literature.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

EMOJI = Path(__file__).parents[1] / "emoji"
if str(EMOJI) not in sys.path:
    sys.path.append(str(EMOJI))  # the emoji example is a folder of scripts that import each other

from classifier import Judge, load, targets, verdict  # noqa: E402  (found through the line above)
from compose import Atlas, compose  # noqa: E402
from objects import FILLS  # noqa: E402
from scenes import Scene, SceneSampler, collate  # noqa: E402

__all__ = [
    "FILLS",
    "Atlas",
    "Distances",
    "Looks",
    "compose",
    "facts_of",
    "interval_of",
    "likeness",
    "load",
    "look",
    "ndcg",
    "overall",
    "scenes_of",
    "summary",
]

SPATIAL = 7  # channels of the spatial features, as in sFID (Nash et al., 2021)
GROUPS = 10  # of the jackknife
STUDENT = 2.262  # 97.5th percentile of Student's t with GROUPS - 1 degrees of freedom
RESAMPLES = 200  # of the bootstrap
PSNR_LIMIT = 99.0  # dB; equal pictures have no finite one
_CHUNK = 100  # scenes drawn from one seed

Facts = dict[str, Tensor]


def scenes_of(count: int, seed: int) -> list[Scene]:
    """`count` held-out scenes; the first ones are the same whatever `count` is."""
    scenes: list[Scene] = []
    for chunk in range(-(-count // _CHUNK)):
        sampler = SceneSampler((seed, chunk), held_out=True)
        scenes += [sampler.scene() for _ in range(_CHUNK)]
    return scenes[:count]


def facts_of(scenes: list[Scene], device: str | torch.device) -> Facts:
    """What the captions say, as tensors [n, ...] (`scenes.collate`)."""
    return {name: value.to(device) for name, value in collate(scenes).items()}


@dataclass
class Looks:
    """What the judge sees in n pictures.

    Attributes:
        features: float32 [n, 256] (64 of videos), its last layer that all its answers share.
        spatial: float32 [n, 7 * 8 * 8], the first seven channels of its trunk's map.
        scores: per picture, float32 [n]; NaN where a caption says nothing about it.
    """

    features: Tensor
    spatial: Tensor
    scores: dict[str, Tensor]


@torch.no_grad()
def look(
    judge: nn.Module, pictures: Tensor, facts: Facts, batch: int = 500,
    scored: Callable[[dict[str, Tensor], Facts], dict[str, Tensor]] | None = None, frames: int = 0,
) -> Looks:  # fmt: skip
    """Let a judge look at pictures that should show `facts` [n, ...].

    Args:
        judge: has the parts `trunk`, a map of features, and `whole`, a row of them; `classifier.Judge` and `watch.Watcher` do.
        pictures: uint8 [n, 3, h, w].
        facts: what they should show.
        batch: pictures at once.
        scored: (the judge's answers, facts) -> values per picture; `scores` where it is not given.
        frames: of videos, which lie one under another in a picture.
    """
    parts = []
    kept: dict[str, Tensor] = {}
    hooks = [
        judge.trunk.register_forward_hook(lambda module, given, out: kept.update(spatial=out)),
        judge.whole.register_forward_hook(lambda module, given, out: kept.update(features=out)),
    ]
    try:
        for at in range(0, len(pictures), batch):
            part = pictures[at : at + batch].float() / 127.5 - 1
            asked = {name: value[at : at + batch] for name, value in facts.items()}
            logits = judge(part.unflatten(2, (frames, -1)) if frames else part)
            spatial = kept["spatial"][:, :SPATIAL].flatten(1)
            parts.append(Looks(kept["features"].float(), spatial.float(), (scored or scores)(logits, asked)))
    finally:
        for hook in hooks:
            hook.remove()
    return Looks(
        torch.cat([part.features for part in parts]),
        torch.cat([part.spatial for part in parts]),
        {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
    )


def scores(logits: dict[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    """Per picture, float32 [n]: alignment, and accuracies by task (1 or 0; NaN where it is not asked for).

    `alignment` is the mean log-probability (nats) that the judge gives to the facts of the caption: each object in its
    place, its colour, the background's colour and fill, the digits of the number. The accuracies follow GenEval (Ghosh
    et al., 2023): `one`, `position` (two objects in their relation) and `count` ask for every object in its place and
    nothing else, `colour` for the colours of all objects, `number` for both digits exactly; `accuracy` for all.
    """
    want = targets(facts)
    odds = {name: value.float().log_softmax(-1) for name, value in logits.items()}
    log_p = {name: value.gather(-1, want[name][..., None])[..., 0] for name, value in odds.items()}
    there, coloured, numbered = want["item"] > 0, want["colour"] > 0, facts["number"] >= 0
    known = [there, coloured] + [torch.ones_like(numbered)[:, None]] * 2 + [numbered[:, None]] * 2
    values = [log_p["item"], log_p["colour"]] + [
        log_p[name][:, None] for name in ("background", "fill", "tens", "ones")
    ]
    stated = torch.cat(known, 1).float()
    alignment = (torch.cat(values, 1) * stated).sum(1) / stated.sum(1)

    right = verdict(_answered(logits), torch.empty(0), facts)
    objects = (facts["item"] >= 0).sum(1)
    pair = (objects == 2) & (facts["item"][:, 0] != facts["item"][:, 1])
    tasks = {
        "one": (right["objects"], objects == 1),
        "position": (right["objects"], pair),
        "count": (right["objects"], (objects > 1) & ~pair),
        "colour": (right["colours"], coloured.any(1)),
        "background": (right["background"] & right["fill"], torch.ones_like(pair)),
        "number": (right["number"], numbered),
    }
    found = {"alignment": alignment, "accuracy": torch.stack(list(right.values())).all(0).float()}
    return found | {name: torch.where(asked, hit.float(), torch.nan) for name, (hit, asked) in tasks.items()}


def _answered(logits: dict[str, Tensor]) -> Judge:
    """A judge that has looked already, for `classifier.verdict`."""
    seen = Judge.__new__(Judge)
    nn.Module.__init__(seen)
    seen.forward = lambda pictures: logits
    return seen


def likeness(pictures: Tensor, others: Tensor, batch: int = 500) -> dict[str, Tensor]:
    """Per picture, float32 [n]: PSNR (dB, at most 99) and SSIM of uint8 pictures [n, 3, h, w] to others."""
    psnr, ssim = [], []
    for at in range(0, len(pictures), batch):
        a, b = (group[at : at + batch].float() / 255 for group in (pictures, others))
        psnr.append(peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3)))
        ssim.append(structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").reshape(-1))
    return {"psnr": torch.cat(psnr).clamp(max=PSNR_LIMIT), "ssim": torch.cat(ssim)}


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., d] and unbiased covariance [..., d, d] of features [..., n, d], in double precision."""
    features = features.double()
    mean = features.mean(-2)
    centred = features - mean[..., None, :]
    return mean, centred.transpose(-1, -2) @ centred / (features.shape[-2] - 1)


class _Given(nn.Module):
    """The feature network of a metric that is given features [n, d] in place of pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class Distance:
    """The Frechet distance (Heusel et al., 2017) of feature distributions to a reference.

    In per cent of the reference's total variance: the scale of a network's features is nobody's.

    Args:
        reference: features [n, d] of real pictures.
    """

    def __init__(self, reference: Tensor) -> None:
        self.scale = 10 / moments(reference)[1].trace().sqrt()
        reference = reference * self.scale
        self.metric = FrechetInceptionDistance(_Given(reference.shape[1]), reset_real_features=False)
        self.metric.update(reference.cpu(), real=True)
        self.mean, self.covariance = moments(reference)
        values, vectors = torch.linalg.eigh(self.covariance)
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def __call__(self, features: Tensor) -> float:
        """The distance of features [n, d], by torchmetrics."""
        self.metric.reset()
        self.metric.update((features * self.scale).cpu(), real=False)
        return self.metric.compute().item()

    def of(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The same of scaled features, from moments [..., d], [..., d, d]: |m - m'|^2 + tr(C + C' - 2 (R C R)^(1/2)), R R = C'."""
        root = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp(min=0).sqrt().sum(-1)
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + self.covariance.trace()
        return (mean - self.mean).square().sum(-1) + trace - 2 * root

    def interval(self, features: Tensor, value: float) -> list[float]:
        """95 % interval of `value`, the distance of features [n, d], by the delete-a-group jackknife.

        A bootstrap would be biased here: a resample has fewer distinct pictures, and the distance grows with that.
        """
        which = torch.arange(len(features), device=features.device) % GROUPS
        least = GROUPS * 2
        if len(features) < least:
            return [float("nan"), float("nan")]
        features = features * self.scale
        left = [self.of(*moments(features[which != group])) for group in range(GROUPS)]
        return jackknifed(torch.stack(left), value)


def jackknifed(left: Tensor, value: float) -> list[float]:
    """Interval of `value` from the values with one group left out each [GROUPS]."""
    error = ((GROUPS - 1) / GROUPS * (left - left.mean()).square().sum()).sqrt().item()
    return [value - STUDENT * error, value + STUDENT * error]


@dataclass
class Distances:
    """FID and sFID to real pictures, all of them and by background."""

    whole: Distance
    spatial: Distance
    parts: dict[str, Distance]

    @classmethod
    def to(cls, real: Looks, facts: Facts) -> Distances:
        """Distances to what the judge saw in real pictures of `facts`."""
        parts = {name: Distance(real.features[mask]) for name, mask in backgrounds(facts).items()}
        return cls(Distance(real.features), Distance(real.spatial), parts)


def backgrounds(facts: Facts) -> dict[str, Tensor]:
    """Masks [n]: scenes on a flat (or shaded) and on a textured background."""
    textured = facts["fill"] >= 2  # the first two are plain and shaded
    return {"flat": ~textured, "textured": textured}


def interval_of(values: Tensor, statistic: Callable[[Tensor], Tensor]) -> list[float]:
    """95 % interval of a statistic of values [n] by the bootstrap; `statistic` maps [r, n] -> [r]."""
    if len(values) < 2:
        return [float("nan"), float("nan")]
    generator = torch.Generator().manual_seed(len(values))
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator).to(values.device)
    found = statistic(values[draws])
    return found.quantile(torch.tensor([0.025, 0.975], device=found.device, dtype=found.dtype)).tolist()


def described(values: Tensor, name: str, fifth: bool = False) -> dict[str, float | list[float]]:
    """Mean of per-picture values [n] without NaN, and its interval; with `fifth` their 5th percentile as well."""
    values = values[~values.isnan()]
    if not len(values):
        return {}
    row: dict[str, float | list[float]] = {name: values.mean().item()}
    row[f"{name}_ci"] = interval_of(values, lambda drawn: drawn.mean(-1))
    if fifth:
        row[f"{name}_5th"] = values.quantile(0.05).item()
        row[f"{name}_5th_ci"] = interval_of(values, lambda drawn: drawn.quantile(0.05, dim=-1))
    return row


_CONTINUOUS = ("alignment", "psnr", "ssim", "psnr_exact", "ssim_exact", "psnr_same_steps", "ssim_same_steps")


def overall(looks: Looks, scored: dict[str, Tensor], distances: Distances | None) -> dict:
    """What is reported of all of a setting's pictures together; arguments of `summary`, without distances where None."""
    row: dict = {}
    if distances is not None:
        for name, distance, features in (
            ("fid", distances.whole, looks.features),
            ("sfid", distances.spatial, looks.spatial),
        ):
            row[name] = distance(features)
            row[f"{name}_ci"] = distance.interval(features, row[name])
    for name, values in scored.items():
        row |= described(values, name, fifth=name in _CONTINUOUS)
    return row


def summary(looks: Looks, scored: dict[str, Tensor], facts: Facts, distances: Distances) -> dict:
    """Everything that is reported of one setting's pictures.

    Args:
        looks: what the judge saw in them.
        scored: per-picture values [n] (or of the first m pictures alone), `looks.scores` among them.
        facts: what they should show.
        distances: to real pictures.
    """
    row = overall(looks, scored, distances)
    for part, mask in backgrounds(facts).items():
        inside = {"n": int(mask.sum())}
        if inside["n"] > 1:
            inside["fid"] = distances.parts[part](looks.features[mask])
            inside["fid_ci"] = distances.parts[part].interval(looks.features[mask], inside["fid"])
        for name in ("alignment", "accuracy", "psnr", "ssim"):
            if name in scored:
                inside |= described(scored[name][mask[: len(scored[name])]], name, fifth=name in ("psnr", "alignment"))
        row[part] = inside
    return row


def ndcg(scores: Tensor, relevance: Tensor) -> Tensor:
    """How well scores [..., n] rank relevance [..., n] (not negative): normalised discounted cumulative gain [...]."""
    discount = 1 / torch.arange(2, scores.shape[-1] + 2, device=scores.device, dtype=torch.float64).log2()
    relevance = relevance.double()
    gain = (relevance.gather(-1, scores.argsort(-1, descending=True)) * discount).sum(-1)
    best = (relevance.sort(-1, descending=True).values * discount).sum(-1)
    return gain / best
