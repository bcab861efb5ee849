"""Which frames a window is made of, for recorded clips and live streams alike."""

import numpy as np


def window_offsets(rates: float | np.ndarray, num_frames: int) -> np.ndarray:
    """Return the offset of each frame of a window from its last frame, in source frames: (..., num_frames) int64 <= 0.

    Each is the source frame nearest to its ideal time, counted back from the last; ties go to the later one.

    rates: (...) source frames per frame of the window: fps / view_fps, above 0; below 1 frames repeat.
    """
    back = np.arange(num_frames)[::-1]
    return -np.ceil(back * np.asarray(rates, np.float64)[..., None] - 0.5).astype(np.int64)  # ceil(x - 0.5): ties down
