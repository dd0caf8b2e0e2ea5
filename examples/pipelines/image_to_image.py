"""Image to image: the run begins part of the way, from a noisy version of a picture.

python examples/pipelines/image_to_image.py --strength 0.8
"""

from collections.abc import Sequence

from shared import arguments, load, picture, say, seeded

import ras_compile


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "a red apple on a blue background", 28, strength=0.8, side=128)
    pipe = load("StableDiffusion3Img2ImgPipeline", args)
    given = {"image": picture(args.side), "strength": args.strength, "height": args.side, "width": args.side}
    with ras_compile.attach(pipe, preset=args.preset, inner_backend=args.inner_backend) as handle:
        image = pipe(args.prompt, num_inference_steps=args.steps, generator=seeded(args), **given).images[0]
        records = say(handle)
    image.save(args.output / "image_to_image.png")
    return records


if __name__ == "__main__":
    main()
