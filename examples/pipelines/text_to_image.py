"""Text to image, with the model that this repository ships or one of your own.

python examples/pipelines/text_to_image.py --prompt "a red apple"
python examples/pipelines/text_to_image.py --pipeline stabilityai/stable-diffusion-3-medium-diffusers --preset fast
"""

from collections.abc import Sequence

from shared import arguments, load, say, seeded

import ras_compile


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "a cat to the left of a tree", 28, side=128)
    pipe = load("StableDiffusion3Pipeline", args)
    with ras_compile.attach(pipe, preset=args.preset, inner_backend=args.inner_backend) as handle:
        sizes = {"height": args.side, "width": args.side}
        image = pipe(args.prompt, num_inference_steps=args.steps, generator=seeded(args), **sizes).images[0]
        records = say(handle)
    image.save(args.output / "text_to_image.png")
    return records


if __name__ == "__main__":
    main()
