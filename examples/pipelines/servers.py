"""A server: two requests at the same time share one model, each with a scheduler of its own.

python examples/pipelines/servers.py
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from shared import arguments, load, seeded

import ras_compile


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "a red apple", 28, other="a green pear", side=128)
    pipe = load("StableDiffusion3Pipeline", args)
    options = {"preset": args.preset, "inner_backend": args.inner_backend}
    pipe.transformer.compile(backend="ras", options=options)  # attach() would follow one scheduler alone

    def serve(prompt: str) -> Image.Image:
        own = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
        own.set_progress_bar_config(disable=True)
        sizes = {"height": args.side, "width": args.side}
        return own(prompt, num_inference_steps=args.steps, generator=seeded(args), **sizes).images[0]

    with ThreadPoolExecutor(2) as requests:
        pictures = list(requests.map(serve, [args.prompt, args.other]))
    for number, image in enumerate(pictures):
        image.save(args.output / f"servers_{number}.png")
    return ras_compile.trace(pipe.transformer)


if __name__ == "__main__":
    main()
