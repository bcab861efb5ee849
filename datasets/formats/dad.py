"""DAD, the Dashcam Accident Dataset (Chan et al., ACCV 2016; aliensunmin.github.io/project/dashcam): folders -> clips.

ROOT/videos/{training,testing}/{positive,negative}/NNNNNN.mp4     ROOT/{training,testing}/... is read, too

Where: by the form of the project's page; 620 + 1,130 clips of 100 frames. training is split train, testing is val. The
label is the folder, and there is no other annotation: the accident begins in frame 90 of every positive clip. The 1.5 s
before it are anomalous, the frames from it on ignored; for times that people have marked, take --labels consensus.

What is known to be wrong: papers say 20 frames per second, other evidence says 25 or 30; frames and seconds here are
those of each file, whose own rate is read. The accident is at one place in all clips, so a baseline that knows the
place alone is perfect. 92 % of the accidents are not the camera car's. Published figures from the features lack six
test clips.
"""

from pathlib import Path

import numpy as np

from datasets.clips import Clip, ClipTable, DataError, Selection
from datasets.formats.shipped import Videos, event_labels, refuse_split, require_constant, require_folder
from datasets.scan import VideoScan

FOLDERS = {"train": ("training",), "val": ("testing",), "all": ("training", "testing")}
FRAMES, ACCIDENT = 100, 90  # of a clip, and the first of them that shows the accident


def load_dad(root: str, split: str, scan: VideoScan, selection: Selection) -> ClipTable:
    """Return the clips of a split: train, val or all, called "testing/positive/000456". Raises DataError."""
    refuse_split("DAD", split, FOLDERS)
    sources: dict[str, Path] = {}
    for folder in FOLDERS[split]:
        where = require_folder(root, "DAD", f"videos/{folder}", folder)
        for label in ("positive", "negative"):
            found = sorted((where / label).glob("*.mp4"))
            if not found:
                raise DataError(f"{where / label}: no .mp4 in it; DAD has positive and negative clips in each split")
            sources |= {f"{folder}/{label}/{path.stem}": path for path in found}
    videos = Videos(f"DAD {split}", sources, scan, leave_out=selection.leave_out)

    def clip(name: str) -> Clip:
        info, positive = videos.require(name), "/positive/" in name
        if positive:
            require_constant(videos.sources[name], info)
        if positive and info.frames != FRAMES:
            raise DataError(
                f"{videos.sources[name]}: {info.frames} frames; the accident is in frame {ACCIDENT} of {FRAMES}, so "
                "that a file cut or encoded otherwise does not say where: take the original"
            )
        event = ACCIDENT / info.fps if positive else None
        labels = event_labels(videos.sources[name], info, event, None) if positive else np.zeros(info.frames, np.uint8)
        return Clip(
            name=name,
            source=videos.sources[name],
            num_frames=info.frames,
            fps=info.fps,
            labels=labels,
            positive=positive,
            event_time=event,
        )

    return selection.table("DAD", split, sources, clip)
