"""Pictures and videos, in whatever form pipelines give them, as frames that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ras_compile.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

# A page holds at most so many frames of a video, evenly spread, of at most so many pixels a side.
_FRAMES, _SIDE = 48, 512
# Larger pictures are held as JPEG.
_PIXELS = 1 << 18
# Milliseconds of a frame of an animation: about what video models draw.
_FRAME_MS = 60


def pillow() -> Any:
    """Pillow's module of pictures.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import PIL.Image
    except ImportError:
        raise ConfigError("a report needs Pillow to hold pictures: pip install pillow.") from None
    return PIL.Image


def frames_of(value: Any, video: bool = False) -> list[Image]:
    """The frames of a video, or a picture as one frame; of a batch the first.

    Args:
        value: Pillow's pictures, arrays [..., H, W, C] or tensors [..., C, H, W]; floats are in [0, 1]. Also in lists, and
            what a pipeline returns around them.
        video: lists and first dimensions are frames, where there is one such level alone.

    Raises:
        ConfigError: it is nothing that can be shown.
    """
    value = next((getattr(value, name) for name in ("images", "frames") if hasattr(value, name)), value)
    if isinstance(value, (list, tuple)):
        if not value:
            raise ConfigError("an empty list is no picture; give a picture, or the frames of a video.")
        nested = isinstance(value[0], (list, tuple)) or getattr(value[0], "ndim", 0) == 4
        if not video or nested:
            return frames_of(value[0], video)
        return [frame for one in value for frame in frames_of(one)]
    if isinstance(value, pillow().Image):
        return [value.convert("RGB")]
    if isinstance(value, Tensor):
        tensor = value.detach().float() if value.is_floating_point() else value.detach()
        value = (tensor.movedim(-3, -1) if tensor.ndim > 2 else tensor).cpu().numpy()
    if not hasattr(value, "__array__"):
        raise ConfigError(
            f"{type(value).__name__} is no picture; give Pillow's (PIL.Image.open reads a file), an array [H, W, C], or a "
            "tensor [C, H, W]."
        )
    import numpy as np

    array = np.asarray(value)
    if array.ndim == 5 or (array.ndim == 4 and not video):
        return frames_of(array[0], video)
    if array.ndim == 4:
        return [frame for one in array for frame in frames_of(one)]
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ConfigError(
            f"what has the shape {list(array.shape)} is no picture; give one of 1, 3 or 4 channels, decoded from its latents."
        )
    if array.dtype.kind == "f":
        array = (np.nan_to_num(array).clip(0, 1) * 255).round()
    array = array.astype(np.uint8)
    return [pillow().fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")]


def few(frames: Sequence[Image]) -> list[Image]:
    """At most as many frames as a page holds, none of them too large; a single picture stays as it is."""
    if len(frames) == 1:
        return list(frames)
    count = min(len(frames), _FRAMES)
    chosen = [frames[place * (len(frames) - 1) // max(1, count - 1)].copy() for place in range(count)]
    for frame in chosen:
        frame.thumbnail((_SIDE, _SIDE))
    return chosen


def as_uri(frame: Image, exact: bool) -> str:
    """A picture as the address that holds it; small ones exactly, unless they are many."""
    exact = exact and frame.width * frame.height <= _PIXELS
    held = io.BytesIO()
    if exact:
        frame.save(held, "PNG")
    else:
        frame.save(held, "JPEG", quality=88)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(held.getvalue()).decode()}"


def from_uri(uri: str) -> Image:
    """The picture that an address of `as_uri` holds."""
    return pillow().open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def save(frames: Sequence[Image], path: Path) -> Path:
    """Writes a picture as a PNG, and frames as an animated GIF; returns the path, which gets that suffix."""
    found = path.with_suffix(".png" if len(frames) == 1 else ".gif")
    moving: dict[str, Any] = {} if len(frames) == 1 else {"append_images": frames[1:], "duration": _FRAME_MS, "loop": 0}
    frames[0].save(found, save_all=len(frames) > 1, **moving)
    return found
