"""Small configurations of every transformer class of diffusers: the contract runs on each of them."""

from . import audio, images, packed, videos, wan
from .absent import NOT_RUN
from .registry import ZOO, Case, case, random, redraw

__all__ = ["NOT_RUN", "ZOO", "Case", "audio", "case", "images", "packed", "random", "redraw", "videos", "wan"]
