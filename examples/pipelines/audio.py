"""Audio: a sound's latent has one dimension of tokens, which is time.

python examples/pipelines/audio.py
python examples/pipelines/audio.py --pipeline stabilityai/stable-audio-open-1.0 --steps 50
"""

import wave
from collections.abc import Sequence

from random_weights import audio
from shared import arguments, load, say, seeded

import ras_compile


def main(argv: Sequence[str] | None = None) -> list[ras_compile.Record]:
    args = arguments(__doc__, argv, "rain on a tin roof", 28)
    pipe = load("StableAudioPipeline", args, audio)
    with ras_compile.attach(pipe, preset=args.preset, inner_backend=args.inner_backend) as handle:
        sound = pipe(args.prompt, num_inference_steps=args.steps, generator=seeded(args)).audios[
            0
        ]  # [channels, samples]
        records = say(handle)
    with wave.open(str(args.output / "audio.wav"), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(pipe.vae.sampling_rate)
        file.writeframes((sound.T.float().clamp(-1, 1) * 32767).short().cpu().contiguous().numpy().tobytes())
    return records


if __name__ == "__main__":
    main()
