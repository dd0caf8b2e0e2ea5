"""What the page of `examples/app.py` shows: a picture as it is drawn, where it was computed, and plain steps in the same time."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any, Literal, get_args

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import ras_compile

__all__ = ["LEAST", "MOST", "PRESETS", "Studio"]

Preset = Literal["balanced", "fast", "quality", "paper"]
PRESETS = list(get_args(Preset))
LEAST, MOST = 2, 50  # steps


class Stopped(Exception):
    """Nobody looks any more."""


class Studio:
    """An attached pipeline that draws for one person at a time.

    Args:
        pipe: a text-to-image pipeline.
        inputs: of each of its calls.
        options: of `ras_compile.attach`.
    """

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], **options: Any) -> None:
        self.pipe, self.inputs, self.handle = pipe, inputs, ras_compile.attach(pipe, **options)
        self.own, shift = pipe.scheduler, pipe.scheduler.config.get("shift", 1.0)
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        named = flow if "FlowMatch" in type(self.own).__name__ else {}
        self.solver = DPMSolverMultistepScheduler.from_config(self.own.config, **named)

    def draw(
        self, prompt: str, steps: float, preset: Preset, seed: float | None
    ) -> Iterator[tuple[Any, Any, Any, str]]:
        """Picture, map, plain picture and what to say of them, again and again until all is drawn."""
        count, start = int(min(max(steps, LEAST), MOST)), int(seed or 0) % 2**63
        picture, focus, told = None, None, "drawing"
        yield None, None, None, "drawing; a preset that is new here compiles first, which takes a minute"
        for turn in range(3):  # until nothing compiles: a time with compilation in it would be no time to compare
            self.pipe.scheduler = self.own
            self.handle.configure(preset=preset)
            for done, drawn, times in self.run(prompt, count, start, previews=turn == 0):  # noqa: B007, used below
                picture = drawn or picture  # what was drawn last time stays, while it is drawn once more
                yield picture, focus, None, f"{told}: step {done} of {count}"
            focus, summary = self.focus(), self.summary
            if not summary.compiled:
                break
            told = f"compiled for {summary.compiled:.0f} s, now drawing once more to time it"
        kinds = [step.kind for step in summary.steps]
        dense = median([spent for spent, kind in zip(times, kinds, strict=False) if kind == "dense"])
        fewer = max(1, min(count, round(sum(times) / dense)))
        yield picture, focus, None, f"{summary}\n\nplain steps in the same time: {fewer}"
        plain, spent = self.plain(prompt, fewer, start)
        said = f"{count} steps, region-adaptive: {sum(times):.2f} s; {fewer} plain steps: {spent:.2f} s"
        yield picture, focus, plain, f"**{said}**\n\n{summary}"

    def plain(self, prompt: str, steps: int, seed: int) -> tuple[Any, float]:
        """What so many dense steps of the solver make, and their seconds; once more if that compiled."""
        self.pipe.scheduler = self.solver
        try:
            with warnings.catch_warnings():  # that nothing is skipped is what is wanted
                warnings.simplefilter("ignore", ras_compile.RASWarning)
                self.handle.configure(warmup_steps=steps)
                for _ in range(2):
                    *_, (_, picture, times) = self.run(prompt, steps, seed, previews=False)
                    if not self.summary.compiled:
                        break
        finally:
            self.pipe.scheduler = self.own
        return picture, sum(times)

    def run(self, prompt: str, steps: int, seed: int, previews: bool) -> Iterator[tuple[int, Any, list[float]]]:
        """Steps done, the picture so far and the seconds of each step, those of previews left out."""
        found: queue.Queue[Any] = queue.Queue()
        stop, times, last = threading.Event(), [], [time.perf_counter()]

        def tick(pipe: Any, step: int, now: Any, values: dict[str, Any]) -> dict[str, Any]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - last[0])
            if stop.is_set():
                raise Stopped
            found.put((step + 1, self.decode(values["latents"]) if previews else None, times))
            last[0] = time.perf_counter()
            return values

        def work() -> None:
            try:
                noise = torch.Generator().manual_seed(seed)
                drawn = self.pipe(
                    prompt, num_inference_steps=steps, generator=noise, callback_on_step_end=tick, **self.inputs
                )
                self.summary = self.handle.summary()  # while the thread lives, whose caches it tells of
                found.put((steps, drawn.images[0], times))
                found.put(None)
            except Exception as error:
                found.put(error)

        thread = threading.Thread(target=work)
        last[0] = time.perf_counter()
        thread.start()
        try:
            while (what := found.get()) is not None:
                if isinstance(what, Exception):
                    raise what
                yield what
        finally:
            stop.set()  # the page was left, so that the next one to draw need not wait for all steps
            thread.join()

    def decode(self, latents: torch.Tensor) -> Any:
        """The picture that latents hold, however noisy it is; None where they have to be unpacked first."""
        vae = self.pipe.vae
        if latents.ndim != 4:
            return None
        with torch.no_grad():
            scaled = latents[:1] / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            return self.pipe.image_processor.postprocess(vae.decode(scaled.to(vae.dtype)).sample)[0]

    def focus(self) -> Image.Image:
        """How often each token of the last picture was computed: black least, white most."""
        grid, records = self.summary.grid, ras_compile.trace(self.handle)
        counts = torch.zeros(max((record.active for record in records), default=1))
        for record in records:
            if record.rows is None:
                counts += 1
            else:
                counts[record.rows[-1].cpu()] += 1  # of several branches in one call, the last follows the prompt
        low, high = counts.aminmax()
        share = (counts - low) / (high - low).clamp_min(1)
        colours = torch.stack([(3 * share).clamp(0, 1), (3 * share - 1).clamp(0, 1), (3 * share - 2).clamp(0, 1)], -1)
        rows = grid[-2] if len(grid) > 1 else 1
        pixels = (255 * colours).byte().reshape(rows, -1, 3).contiguous()
        small = Image.frombytes("RGB", (pixels.shape[1], rows), bytes(pixels.flatten().tolist()))
        return small.resize((16 * small.width, 16 * small.height), Image.Resampling.NEAREST)
