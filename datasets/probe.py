"""Few windows of a labelled split that say much of an encoder: of both classes, spread over the recordings."""

import logging
import math

import numpy as np

from datasets.clips import ClipTable, DataError
from datasets.labels import ANOMALOUS
from datasets.windows import WindowIndex, index_clips

logger = logging.getLogger("tad")

_SEED = 0  # the same windows in every run, so that their figures can be compared


def choose_windows(clips: ClipTable, count: int, *, num_frames: int, view_fps: float) -> WindowIndex:
    """Return the index of `count` windows at most of labelled clips, half of them anomalous where there are so many.

    Within a class each window has the same chance, so an area under the ROC curve over the chosen ones estimates that
    over all. The same table has the same windows chosen; of a pack, those that end on frames that it holds.

    num_frames: frames of a window; view_fps: its frames per second.
    Raises DataError where no window is anomalous, or none is safe, and what `index_clips` raises.
    """
    step = math.lcm(*clips.pack_steps.tolist())
    index = index_clips(clips, num_frames=num_frames, view_fps=view_fps, stride=step)
    clip, last = index.locations()
    label = np.concatenate([np.asarray(clip.labels)[index.last_frames(c)] for c, clip in enumerate(clips)])
    of_class = [np.flatnonzero(label == ANOMALOUS), np.flatnonzero(label != ANOMALOUS)]
    for rows, word in zip(of_class, ("an anomalous", "a safe"), strict=True):
        if not len(rows):
            raise DataError(f"{clips}: none of its {len(index)} windows ends on {word} frame; a probe needs both")
    rare, common = sorted(of_class, key=len)
    rng = np.random.Generator(np.random.PCG64(_SEED))
    few = rng.choice(rare, min(len(rare), count // 2), replace=False)
    many = rng.choice(common, min(len(common), count - len(few)), replace=False)
    keep = {number: np.zeros(clips[number].num_frames, bool) for number in range(len(clips))}
    for row in (*few, *many):
        keep[int(clip[row])][last[row]] = True
    anomalous = len(few) if rare is of_class[0] else len(many)
    total = len(few) + len(many)
    logger.info(f"{clips}: {total} of {len(index)} windows for the probe, {anomalous} of them anomalous")
    return WindowIndex(
        index.frame_counts,
        src_fps=index.src_fps,
        num_frames=index.num_frames,
        view_fps=index.view_fps,
        stride=index.stride,
        keep=keep,
    )
