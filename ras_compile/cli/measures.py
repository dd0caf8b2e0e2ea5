"""How near a picture comes to another one, and how well it fits its prompt."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ras_compile.errors import ConfigError

# Tells how well a picture of Pillow's fits a prompt; more is better.
Judge = Callable[[Any, str], float]


def psnr(picture: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; at most 100; not a number where they hold such."""
    error = float((picture.double() - exact.double()).square().mean())
    return min(-10 * math.log10(max(error, 1e-10)), 100.0)  # in this order what is not a number stays


def ssim(picture: Tensor, exact: Tensor) -> float:
    """Structural similarity of pictures [B, C, H, W] in [0, 1] (Wang et al. 2004, Gaussian windows of 11, sigma 1.5)."""
    size = min(11, *(2 * ((side + 1) // 2) - 1 for side in picture.shape[-2:]))
    line = torch.exp(-(torch.arange(size, dtype=torch.float64) - size // 2).square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    a, b = (value.double().flatten(0, 1)[:, None] for value in (picture, exact))

    def smooth(value: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(value, window)

    mean_a, mean_b = smooth(a), smooth(b)
    spread = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    shared = smooth(a * b) - mean_a * mean_b
    first, second = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + first) * (2 * shared + second)
    return float((top / ((mean_a**2 + mean_b**2 + first) * (spread + second))).mean())


def clip_score(folder: Path) -> Judge:
    """100 times the cosine of a picture and a prompt (CLIPScore, Hessel et al. 2021).

    Raises:
        ConfigError: the folder holds no CLIP model.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ImportError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(
            f"--clip takes a folder with a CLIP model and its processor; {folder} is none ({line})."
        ) from None

    @torch.no_grad()
    def score(picture: Any, prompt: str) -> float:
        inputs = processor(text=[prompt], images=picture, return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs)
        return 100 * float(torch.cosine_similarity(found.image_embeds, found.text_embeds))

    return score


def image_reward(folder: Path) -> Judge:
    """What people would say of a picture and its prompt, about normally distributed (ImageReward, Xu et al. 2023).

    Raises:
        ConfigError: the folder holds no ImageReward model, or the package that reads it is not installed.
    """
    weights, shape = folder / "ImageReward.pt", folder / "med_config.json"
    if not weights.is_file() or not shape.is_file():
        raise ConfigError(f"--image-reward takes a folder with {weights.name} and {shape.name}; {folder} lacks them.")
    try:
        import ImageReward
    except ImportError as error:
        raise ConfigError(f"--image-reward needs its package: pip install image-reward ({error}).") from None
    with redirect_stdout(sys.stderr):  # it prints what it loads
        model = ImageReward.load(str(weights), device="cpu", med_config=str(shape))

    @torch.no_grad()
    def score(picture: Any, prompt: str) -> float:
        return float(model.score(prompt, picture))

    return score
