"""A pipeline from a folder, and the ways of drawing with it that are compared: dense steps, presets, another solver."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ras_compile
from ras_compile.errors import ConfigError, first_line
from ras_compile.pipelines.attach import Handle
from ras_compile.report.pictures import frames_of
from ras_compile.summary import Summary

# A way is drawn again until nothing compiles, but not for ever: an option may make each run compile.
_RUNS = 3
DPM = "DPMSolverMultistepScheduler"  # the solver that presets are compared with


def load(folder: Path, device: str | None = None) -> Any:
    """The pipeline of a folder, on a device: bfloat16 on CUDA, else float32. Nothing is downloaded.

    Raises:
        ConfigError: it is no folder of a pipeline, lacks weights or cannot be loaded, there is no such device, or diffusers is
            not installed.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        what = "give what pipe.save_pretrained(folder) wrote"
        if (folder.parent / "model_index.json").is_file():
            what = f"give the folder of the whole pipeline, {folder.parent}"
        elif not folder.exists() and len(folder.parts) == 2:
            what = f"nothing is downloaded here, so get it first: hf download {folder} --local-dir {folder.name}"
        raise ConfigError(f"{folder} is no folder of a pipeline: it has no model_index.json; {what}.")
    for name, part in json.loads(index.read_text()).items():
        where = folder / name
        models = isinstance(part, list) and part[0] is not None and (where / "config.json").is_file()
        if models and not any(where.glob("*.safetensors*")) and not any(where.glob("*.bin*")):
            raise ConfigError(f"{where} holds no weights (*.safetensors); download the pipeline in full.")
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise ConfigError("pipelines need diffusers: pip install 'ras_compile[diffusers]'.") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        here = "cuda or cpu" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"there is no device {device!r} here ({first_line(error)}); take {here}.") from None
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    parameter = "dtype" if _takes_dtype() else "torch_dtype"
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **{parameter: dtype})
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"diffusers cannot load {folder}: {first_line(error)}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _takes_dtype() -> bool:
    """Whether diffusers calls the dtype by its newer name."""
    import diffusers

    return tuple(int(part) for part in diffusers.__version__.split(".")[:2]) >= (0, 38)


def named(given: Sequence[str]) -> dict[str, Any]:
    """Arguments given as name=value, where values are Python's or else texts.

    Raises:
        ConfigError: one without a name.
    """
    found = {}
    for entry in given:
        name, mark, value = entry.partition("=")
        if not mark or not name.isidentifier():
            raise ConfigError(f"--set takes name=value, such as guidance_scale=4, not {entry!r}.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def settings(pipe: Any, given: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of a pipeline: of what is given what it takes, and all that is asked for by name.

    Raises:
        ConfigError: it does not take one of the latter, and the text gives the nearest that it does take; or it takes a number
            (a truth value, too) there, and would fail at a text or take it for true.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    for name, value in more.items():
        if name not in known:
            raise ConfigError(f"{type(pipe).__name__} takes no {name!r}{nearest(name, known)}")
        if isinstance(value, str) and isinstance(known[name].default, (int, float)):
            raise ConfigError(f"--set {name}={value}: give a value such as {known[name].default}.")
    return {**{name: value for name, value in given.items() if value is not None and name in known}, **more}


def nearest(name: str, known: Any) -> str:
    """The end of a sentence, which says which known name is meant, where one is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def as_tensor(picture: Any, video: bool = False) -> Tensor:
    """Float32 [frames, 3, H, W] in [0, 1]."""
    frames = frames_of(picture, video)
    flat = [torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8) for frame in frames]
    width, height = frames[0].size
    return torch.stack(flat).reshape(len(frames), height, width, 3).movedim(-1, 1) / 255


class Drawn:
    """What one way drew.

    Attributes:
        picture: the first picture, or the frames of the first video.
    """

    def __init__(self, picture: Any, video: bool, summary: Summary) -> None:
        self.picture, self.video, self.summary = picture, video, summary

    @property
    def seconds(self) -> float:
        """Of its steps."""
        return self.summary.seconds or 0.0


class Artist:
    """An attached pipeline that draws in several ways, all of them with the same compiled dense program."""

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], seed: int, options: Mapping[str, Any]) -> None:
        self.pipe, self._inputs, self._seed = pipe, dict(inputs), seed
        self._options: dict[str, Any] = dict(options)
        self.handle: Handle = ras_compile.attach(pipe, **self._options)

    def dense(self, steps: int, **more: Any) -> Drawn:
        """All steps dense."""
        with warnings.catch_warnings():  # that nothing is skipped is what is wanted
            warnings.simplefilter("ignore", ras_compile.RASWarning)
            return self._drawn(steps, more, warmup_steps=steps)

    def adaptive(self, steps: int, preset: str, **more: Any) -> Drawn:
        """With a preset."""
        return self._drawn(steps, more, preset=preset)

    @contextmanager
    def solver(self, scheduler: Any) -> Iterator[None]:
        """Draws with another scheduler meanwhile."""
        before, self.pipe.scheduler = self.pipe.scheduler, scheduler
        try:
            yield
        finally:
            self.pipe.scheduler = before

    def close(self) -> None:
        """Detaches."""
        self.handle.detach()

    def _drawn(self, steps: int, more: Mapping[str, Any], **options: Any) -> Drawn:
        given = self.handle.config
        self.handle.configure(**options)
        try:
            for _ in range(_RUNS):
                generator = torch.Generator().manual_seed(more.get("seed", self._seed))
                inputs = {**self._inputs, **{name: value for name, value in more.items() if name != "seed"}}
                result = self.pipe(**inputs, num_inference_steps=steps, generator=generator)
                summary = self.handle.summary()
                if not summary.compiled:
                    break
        finally:
            self.handle.follower.config = given
        video = hasattr(result, "frames")
        found = result.frames if video else getattr(result, "images", None)
        if found is None:
            raise ConfigError(
                f"{type(self.pipe).__name__} returns no pictures and no videos, and only these are compared."
            )
        return Drawn(found[0], video, summary)


def dpm_solver(scheduler: Any) -> Any:
    """DPM-Solver++ in place of a pipeline's scheduler, with what that one is configured to.

    Raises:
        ConfigError: it does not fit.
    """
    import diffusers

    solver = getattr(diffusers, DPM)
    if "FlowMatch" in type(scheduler).__name__:
        shift = scheduler.config.get("shift", 1.0)
        return solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    try:
        return solver.from_config(scheduler.config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"DPM-Solver++ does not take over from {type(scheduler).__name__}: {error}.") from None
