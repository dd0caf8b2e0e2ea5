"""Video: tokens are chosen among those of all frames; where a pipeline has two transformers, each warms up by itself.

python examples/pipelines/video.py
python examples/pipelines/video.py --pipeline Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --frames 81
"""

from collections.abc import Sequence

from diffusers.utils import export_to_video
from shared import arguments, load, say, seeded
from tiny import video

import ras_compile


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "a boat in the rain", 28, height=32, width=32, frames=5)
    pipe = load("WanPipeline", args, video)
    given = {"height": args.height, "width": args.width, "num_frames": args.frames}
    given["output_type"] = "np" if args.pipeline else "latent"  # the tiny one has no autoencoder
    with ras_compile.attach(pipe, preset=args.preset, inner_backend=args.inner_backend) as handle:
        frames = pipe(args.prompt, num_inference_steps=args.steps, generator=seeded(args), **given).frames
        records = say(handle)
    if args.pipeline:
        export_to_video(frames[0], str(args.output / "video.mp4"), fps=16)
    return records


if __name__ == "__main__":
    main()
