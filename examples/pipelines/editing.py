"""Editing: a picture and a wish; the reference's tokens stand beside those of the new picture, and are never chosen from.

python examples/pipelines/editing.py
python examples/pipelines/editing.py --pipeline black-forest-labs/FLUX.1-Kontext-dev --side 1024
"""

from collections.abc import Sequence

from random_weights import editing
from shared import arguments, load, picture, say, seeded

import ras_compile


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "make the disc blue", 28, side=16)
    pipe = load("FluxKontextPipeline", args, editing)
    given = {"image": picture(args.side), "height": args.side, "width": args.side}
    with ras_compile.attach(pipe, preset=args.preset, inner_backend=args.inner_backend) as handle:
        image = pipe(prompt=args.prompt, num_inference_steps=args.steps, generator=seeded(args), **given).images[0]
        records = say(handle)
    image.save(args.output / "editing.png")
    return records


if __name__ == "__main__":
    main()
