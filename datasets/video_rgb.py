"""Decoded pictures as RGB tensors, upright; datasets/video.py finds the pictures.

They are converted at full size, and shrunk by OpenCV afterwards, as published. swscale can do both in one pass, but
always widens its filters where it shrinks: at 720p it was 38 to 44 dB from the published pixels, and no faster than its
own unscaled conversion with OpenCV's resizing (benchmarks/decoding.py prints both).
"""

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

# swscale starts a thread for each processor otherwise, in every reading process; PyAV before 17 has no such argument
# and does not.
ONE_THREAD = {"threads": 1} if "threads" in (VideoReformatter.reformat.__doc__ or "") else {}


class ToRGB:
    """Converts the pictures of a video, in one thread."""

    def __init__(self):
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        """Return uint8 (H, W, 3). Raises FFmpegError, OSError or ValueError where a picture cannot be converted."""
        picture = self._reformatter.reformat(frame, format="rgb24", **ONE_THREAD).to_ndarray()
        return torch.from_numpy(np.ascontiguousarray(_upright(picture, frame)))


def _upright(picture: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and mirror a picture, (H, W, 3), as the display matrix of its frame says."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
