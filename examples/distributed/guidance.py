"""Guidance over two GPUs: one process computes the branch with the prompt, the other one that without it.

    pip install imageio imageio-ffmpeg    # what writes the video
    torchrun --nproc-per-node 2 examples/distributed/guidance.py "a cat walks on the grass" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

For pipelines that call their transformer once for each branch, as Wan's does. Both processes hold the same video at the end.
Each chooses its active tokens by the noise of its own branch; where one process runs both, they share theirs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video
from torch import Tensor, nn

import ras_compile


class OneBranch(nn.Module):
    """Stands in for a transformer in each of two processes, and computes every second call.

    The other call returns memory that is filled before the last call of a step returns: nothing reads it earlier.

    Args:
        inner: the transformer; its noise is of its latent's shape.
        branches: how many calls a step has, and processes there are.
    """

    def __init__(self, inner: nn.Module, branches: int = 2) -> None:
        super().__init__()
        self.inner, self.branches, self.noises = inner, branches, list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor]:
        if len(self.noises) == dist.get_rank():
            noise = self.inner(hidden_states=hidden_states, **{**inputs, "return_dict": False})[0].contiguous()
        else:
            noise = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        self.noises.append(noise)
        if len(self.noises) == self.branches:
            for rank, each in enumerate(self.noises):
                try:
                    dist.broadcast(each, rank)
                except RuntimeError as error:
                    what = "the other process has stopped, or did not come in time; its own message says why: start both again."
                    raise RuntimeError(what) from error
            self.noises = []
        return (noise,)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("--model", required=True, help="a pipeline of diffusers: a folder or a name of the hub")
    parser.add_argument("--output", default="video.mp4")
    parser.add_argument(
        "--given", type=json.loads, default={}, help='more for the pipeline, as JSON: {"num_frames": 33}'
    )
    parser.add_argument(
        "--options", type=json.loads, default={}, help='of ras_compile, as JSON: {"sample_ratio": 0.25}'
    )
    args = parser.parse_args()
    import imageio  # noqa: F401  what writes the video: where it is missing, that is told before anything is drawn

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32).to(device)
    ras_compile.attach(pipe, **args.options)  # before the transformer is wrapped: what is compiled is one branch
    pipe.transformer = OneBranch(pipe.transformer)
    frames = pipe(args.prompt, generator=torch.Generator().manual_seed(0), **args.given).frames[0]
    if dist.get_rank() == 0:
        export_to_video(frames, args.output, fps=16)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
