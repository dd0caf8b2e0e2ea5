"""Inpainting: half of a picture is drawn anew, whose tokens come first in each sparse step.

python examples/pipelines/inpainting.py
"""

from collections.abc import Sequence

from PIL import Image
from random_weights import text_to_image
from shared import arguments, load, picture, say, seeded

import ras_compile

KIND = "StableDiffusion3InpaintPipeline"


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "a door", 28, side=32)
    pipe = load(KIND, args, lambda: text_to_image(KIND))  # the pipeline wants 16 channels, and the shipped model has 8
    mask = Image.new("L", (args.side, args.side), 0)
    mask.paste(255, (0, 0, args.side // 2, args.side))  # white is drawn anew
    given = {"image": picture(args.side), "mask_image": mask, "height": args.side, "width": args.side, "strength": 1.0}
    with ras_compile.attach(pipe, preset=args.preset, inner_backend=args.inner_backend) as handle:
        image = pipe(args.prompt, num_inference_steps=args.steps, generator=seeded(args), **given).images[0]
        records = say(handle)
    image.save(args.output / "inpainting.png")
    return records


if __name__ == "__main__":
    main()
