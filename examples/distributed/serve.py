"""Serves pictures over HTTP with Ray Serve: one replica of the pipeline for each GPU, on as many machines as the cluster has.

    pip install 'ras_compile[distributed]' 'ray[serve]'
    python examples/distributed/serve.py --replicas 8
    curl 'localhost:8000/?prompt=a%20red%20apple&seed=3' --output apple.png

Ray hands each request to a replica that is free, and starts one that has died again. A replica draws one picture at a time:
another request's steps in between would have nothing to do with it, and its caches take the memory of a second one. The picture of
a client that has gone is given up at its next step.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import ras_compile

SHIPPED = Path(__file__).parents[1] / "emoji" / "pipeline"


class Gone(Exception):
    """Nobody waits for the picture any more."""


class Painter:
    """One replica.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.turn = args, threading.Lock()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        ras_compile.attach(self.pipe, preset=args.preset, inner_backend=args.inner_backend)

    def picture(self, prompt: str, seed: int, gone: threading.Event | None = None) -> bytes:
        """A picture as PNG, once its turn has come.

        Raises:
            Gone: ``gone`` was set meanwhile.
        """

        def wanted(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if gone is not None and gone.is_set():
                raise Gone
            return values

        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Any] = {} if self.args.side is None else {"height": self.args.side, "width": self.args.side}
        given |= {"num_inference_steps": self.args.steps, "generator": generator, "callback_on_step_end": wanted}
        with self.turn:
            image = self.pipe(prompt, **given).images[0]
        held = io.BytesIO()
        image.save(held, format="png")
        return held.getvalue()

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import Response

        given = request.query_params
        if not given.get("prompt") or not given.get("seed", "0").isdigit():
            return Response(
                "give a prompt, and a whole number as the seed: /?prompt=a red apple&seed=3", status_code=400
            )
        gone = threading.Event()
        try:  # what is cancelled is this coroutine alone: its thread goes on
            made = await asyncio.to_thread(self.picture, given["prompt"], int(given.get("seed", "0")), gone)
        finally:
            gone.set()
        return Response(made, media_type="image/png")


def main(argv: Sequence[str] | None = None) -> None:
    from ray import serve

    args = arguments(argv)
    os.chdir(
        Path(__file__).parent
    )  # replicas look for modules where they start: in the repository they would find sources
    gpus = {"num_gpus": 1} if torch.cuda.is_available() else {}
    deployment: Any = serve.deployment(Painter, num_replicas=args.replicas, ray_actor_options=gpus)
    serve.run(deployment.bind(args), blocking=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replicas", type=int, default=1, help="processes that draw")
    parser.add_argument("--model", default=str(SHIPPED), help="a pipeline of diffusers: a folder or a name of the hub")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--side", type=int, help="height and width of a picture, in pixels; the model's own by default")
    parser.add_argument("--preset", default="balanced", help="fast, balanced, quality or paper")
    parser.add_argument("--inner-backend", default="inductor", help="what compiles the programs; eager: nothing is")
    args = parser.parse_args(argv)
    args.model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    return args


if __name__ == "__main__":
    main()
