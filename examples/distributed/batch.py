"""Draws many prompts on many devices: one process for each, each with the whole model.

    python examples/distributed/batch.py prompts.txt                                   # one process
    torchrun --nproc-per-node 8 examples/distributed/batch.py prompts.txt              # 8 GPUs of a machine
    accelerate launch --multi_gpu examples/distributed/batch.py prompts.txt            # what `accelerate config` says
    python examples/distributed/batch.py prompts.txt --ray 8                           # Ray Data: 8 actors, on any machines

`prompts.txt` has one prompt a line. The picture of line 7 is `00007.png`, whoever draws it: its noise comes from the seed and
its line alone. What is there already is not drawn again, so that a run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm import tqdm

import ras_compile

SHIPPED = Path(__file__).parents[1] / "emoji" / "pipeline"


class Drawer:
    """One process's pipeline. Ray Data makes one for each actor and calls it with batches.

    Args:
        args: the command line.
        device: where the model stands; None: a GPU if there is one.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device | None = None) -> None:
        self.args, self.device = args, device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        ras_compile.attach(self.pipe, preset=args.preset, inner_backend=args.inner_backend)

    def draw(self, line: int, prompt: str) -> None:
        """Draws one prompt; its file appears when it is complete."""
        generator = torch.Generator().manual_seed(self.args.seed + line)  # on the CPU: the same on every machine
        sides = {} if self.args.side is None else {"height": self.args.side, "width": self.args.side}
        image = self.pipe(prompt, num_inference_steps=self.args.steps, generator=generator, **sides).images[0]
        path = picture(self.args.output, line)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        image.save(unfinished, format="png")
        unfinished.replace(path)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for line, prompt in zip(batch["line"], batch["prompt"], strict=True):
            self.draw(int(line), str(prompt))
        return {"line": batch["line"]}


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    prompts = enumerate(args.prompts.read_text().splitlines())
    left = [(line, prompt) for line, prompt in prompts if prompt.strip() and not picture(args.output, line).exists()]
    if args.ray:
        with_ray(args, left)
        return
    state = PartialState(cpu=not torch.cuda.is_available())
    mine = left[state.process_index :: state.num_processes]  # lines are as long as each other on average
    state.wait_for_everyone()  # all have looked at what is left before anyone draws
    drawer = Drawer(args, state.device)
    for line, prompt in tqdm(mine, desc=f"process {state.process_index}", position=state.local_process_index):
        drawer.draw(line, prompt)
    state.wait_for_everyone()
    state.destroy_process_group()


def with_ray(args: argparse.Namespace, left: list[tuple[int, str]]) -> None:
    """The same by Ray Data, which shows its progress and starts an actor that has died again."""
    import ray

    # actors look for modules in the folder that they are started from: in this repository's they would find sources in place of
    # what is installed
    os.chdir(args.output)
    ray.init(ignore_reinit_error=True)
    if left:
        items = [{"line": line, "prompt": prompt} for line, prompt in left]
        rows = ray.data.from_items(
            items, override_num_blocks=len(items)
        )  # a block each: whoever is free takes the next
        rows.map_batches(
            Drawer, fn_constructor_args=(args,), batch_size=1, compute=ray.data.ActorPoolStrategy(size=args.ray),
            num_gpus=1 if torch.cuda.is_available() else 0,
        ).materialize()  # fmt: skip
    ray.shutdown()


def picture(folder: Path, line: int) -> Path:
    return folder / f"{line:05}.png"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a file with one prompt a line")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="a folder for the pictures")
    parser.add_argument("--model", default=str(SHIPPED), help="a pipeline of diffusers: a folder or a name of the hub")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--side", type=int, help="height and width of a picture, in pixels; the model's own by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="balanced", help="fast, balanced, quality or paper")
    parser.add_argument(
        "--inner-backend", default="inductor", help="what compiles the programs; eager compiles nothing"
    )
    parser.add_argument("--ray", type=int, default=0, metavar="ACTORS", help="draw with so many actors of Ray Data")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    args.model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    return args


if __name__ == "__main__":
    main()
