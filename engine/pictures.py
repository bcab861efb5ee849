"""Pictures inside a page."""

import base64
import io

import numpy as np
from PIL import Image

_SIZE = (320, 180)  # pixels at most


def data_uri(picture: np.ndarray) -> str:
    """Return uint8 (H, W, 3) RGB as a JPEG in a data URI, shrunk to 320 x 180 pixels at most."""
    image, held = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    image.thumbnail(_SIZE)
    image.save(held, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
