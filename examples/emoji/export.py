"""Write the trained parts as a diffusers pipeline folder in half precision.

python examples/emoji/export.py --vae runs/emoji/vae --weights runs/emoji/average.safetensors --out runs/pipeline
"""

from __future__ import annotations

import argparse
from pathlib import Path

from components import pipeline
from diffusers import AutoencoderKL
from recipe import save
from safetensors.torch import load_file


def export(vae: Path, weights: Path, out: Path) -> None:
    """`average.safetensors` of train.py and an autoencoder's folder -> a `StableDiffusion3Pipeline` folder."""
    pipe = pipeline()
    pipe.register_modules(vae=AutoencoderKL.from_pretrained(vae))
    state = load_file(weights)
    for prefix, module in (
        ("transformer.", pipe.transformer),
        ("text.0.", pipe.text_encoder),
        ("text.1.", pipe.text_encoder_2),
    ):
        module.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        )
    save(pipe, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.vae, args.weights, args.out)
