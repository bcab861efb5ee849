"""Draw what run_predict.py said of a video: frames up to and in its first event, and the risk curve, on one picture.

    python -m benchmarks.risk_picture VIDEO build/demo/risk/VIDEO docs/risk.png

VIDEO is the file, zip or folder of pictures that was scored. The second is the folder of its scores.csv.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from datasets import DataError, VideoScan, load_inputs, open_clip
from engine.curve import RiskCurve, Thumbnail
from engine.events import EventRule
from engine.prediction import EVENTS, load_result

FRAMES = 6  # on the picture


def curve_in(folder: Path) -> RiskCurve:
    """Return the curve that a folder of run_predict.py holds. Raises ValueError where it holds none."""
    try:
        known = json.loads((folder / EVENTS).read_text())
        rule = EventRule.from_spec(known["rule"]) if known["rule"] else None
        result = load_result(folder, known["video"], known["of"], rule)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{folder}: holds no scores of run_predict.py ({e})") from e
    if not (result and result.curve and len(result.curve.frame)):
        raise ValueError(f"{folder}: holds no scores of run_predict.py")
    return result.curve


def frames_of(curve: RiskCurve) -> list[int]:
    """Return scored frames, evenly spaced from as long before the first event as it lasts; of the video without one."""
    first, last = curve.time[[0, -1]]
    if events := curve.events():
        first, last = max(first, 2 * events[0].start - events[0].end), events[0].end
    places = np.searchsorted(curve.time, np.linspace(first, last, FRAMES) - 1e-9)
    return np.unique(curve.frame[places]).tolist()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="what was scored")
    parser.add_argument("folder", type=Path, help="folder of its scores.csv and events.json")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    try:
        curve = curve_in(args.folder)
        with tempfile.TemporaryDirectory() as folder:
            clips = load_inputs([args.video], VideoScan(Path(folder, "videos.json"), workers=1), curve.fps)
        frames = frames_of(curve)
        with open_clip(clips[0]) as reader:
            pictures = [Thumbnail(i, p.numpy().copy()) for i, p in zip(frames, reader.frames(frames), strict=True)]
        curve.plot(args.picture, pictures)
    except (DataError, OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(f"{args.picture}: frames {frames} of {args.video}")


if __name__ == "__main__":
    main()
