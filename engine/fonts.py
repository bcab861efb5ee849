"""The font of drawn words: the one that matplotlib brings along, so that no machine lacks it."""

from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

_FILE = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
_SMALLEST = 6  # pixels


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font in a size in pixels."""
    return ImageFont.truetype(str(_FILE), max(size, _SMALLEST))


def fitting(text: str, size: int, room: int) -> ImageFont.FreeTypeFont:
    """Return the font in at most a size, in which a text is at most `room` pixels wide where that can be read."""
    while size > _SMALLEST and font(size).getlength(text) > room:
        size -= 1
    return font(size)
