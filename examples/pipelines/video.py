"""Video: tokens are chosen among those of all frames; where a pipeline has two transformers, each warms up by itself.

python examples/pipelines/video.py
python examples/pipelines/video.py --pipeline Wan-AI/Wan2.1-T2V-1.3B-Diffusers
"""

from collections.abc import Sequence

from diffusers.utils import export_to_video
from random_weights import video
from shared import arguments, load, say, seeded

import ras_compile


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "a boat in the rain", 28, height=480, width=832, frames=81)
    pipe = load("WanPipeline", args, video)
    given = {"height": args.height, "width": args.width, "num_frames": args.frames}
    with ras_compile.attach(pipe, preset=args.preset, inner_backend=args.inner_backend) as handle:
        frames = pipe(args.prompt, num_inference_steps=args.steps, generator=seeded(args), **given).frames
        records = say(handle)
    if args.pipeline:  # the tiny one has no autoencoder
        export_to_video(frames[0], str(args.output / "video.mp4"), fps=16)
    return records


if __name__ == "__main__":
    main()
