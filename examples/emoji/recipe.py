"""What the recipes of the models share beside the loop: how a transformer starts, command lines, the folders written."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def start_as_identity(transformer: nn.Module, *zero: str) -> None:
    """Xavier's weights and no biases, so that at the start every block is the identity and the output is zero.

    Args:
        transformer: changed in place.
        zero: how the names of those linear layers end that start at zero; tables of shifts and scales do as well.
    """
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight) if name.endswith(zero) else nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    for name, param in transformer.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(param)


def save(pipe: Any, folder: Path) -> None:
    """Write a pipeline in half precision, yet so that a plain `from_pretrained(folder)` gives float32 throughout.

    diffusers models load as float32 unless told otherwise, transformers models as their config says: hence the edit.
    """
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where the part lay before says nothing to anyone else
        if file.parent.name.startswith("text"):
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def keep_record(file: Path, out: Path) -> None:
    """What a training wrote of itself becomes `out/results/training.json`."""
    (out / "results").mkdir(exist_ok=True)
    shutil.copyfile(file, out / "results" / "training.json")


def machine(device: str) -> dict[str, str]:
    """What a training ran on, for its record."""
    return {"machine": torch.cuda.get_device_name() if device == "cuda" else "CPU", "torch": torch.__version__}


def export_command(about: str | None, runs: str, out: Path, export: Callable[[Path, Path], None]) -> None:
    """The command that makes a pipeline's folder of what a training left.

    Args:
        about: the script's docstring.
        runs: where trainings are left by default.
        out: the model's folder by default.
        export: (folder of the training, the model's folder).
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    export(args.runs, args.out)


def training_parser(about: str | None, out: str, what: str, steps: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all trainings against the clock have; a script adds its own.

    Args:
        about: the script's docstring.
        out: where the training is left by default.
        what: is painted to learn from, in the plural.
        steps: what `--steps` counts.
        defaults: of `batch`, `rate`, `muon_rate`, `layers`, `heads`, `head_dim` and `workers`.
    """
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seconds", type=float, default=270.0, help="of all, compilation included")
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--pool", type=int, default=200_000, help=f"{what} that are kept to draw from")
    parser.add_argument("--ahead", type=int, default=16, help="batches of them before the first step")
    for name in ("rate", "muon-rate"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("layers", "heads", "head-dim"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="by Inductor")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.set_defaults(**defaults)
    return parser


def training_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options that were given; the folder for the training is there when this returns."""
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args
