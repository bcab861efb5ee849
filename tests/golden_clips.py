"""The 40 clips of tests/golden/anticipation.json, as an evaluation scores them: windows of 16 frames on each frame."""

import numpy as np
from helpers import golden

from engine.anticipation import ScoredClip

GOLDEN = golden("anticipation")


def scored(clip, key="scores_1024"):
    """The scores of a clip of the golden file; frames 0 to 14 have none."""
    n, fps = clip["n_frames"], clip["fps"]
    return ScoredClip(
        clip["name"],
        np.arange(15, n) / fps,
        np.array(clip[key][15:n]) / 1024,
        1 / fps,
        bool(clip["label"]),
        clip["event_time"],
        tuple((s / fps, (e + 1) / fps) for s, e in clip["intervals"]),
        clip["time_to_accident"],
    )


CLIPS = [scored(c) for c in GOLDEN["clips"]]


def labels_of(clip):
    """The labels of its scored frames, (n,) 0 or 1."""
    frames = np.arange(15, clip["n_frames"])
    return np.array([any(s <= f <= e for s, e in clip["intervals"]) for f in frames], int)
