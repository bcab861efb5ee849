"""Draw what run_predict.py said of a video for a front page: frames before and in its first event, the risk under them.

    python -m benchmarks.risk_picture VIDEO build/demo/predicted/VIDEO docs/risk.png

VIDEO is the file, zip or folder of pictures that was scored. The second is the folder of its scores.csv.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datasets import DataError, VideoScan, load_inputs, open_clip
from engine.curve import RiskCurve
from engine.curve_plot import save_figure
from engine.events import EventRule
from engine.prediction import EVENTS, load_result
from engine.summary import score_at

FRAMES = 5  # on the picture
CALM, RISKY, CURVE = "#8a9aa8", "#c62f3f", "#1f4e79"


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


def figure_of(curve: RiskCurve, pictures: dict[int, np.ndarray]) -> Figure:
    """Return the figure: the pictures, {frame: uint8 (H, W, 3) RGB}, in a row, and the curve with its events below."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, len(pictures), height_ratios=[1, 1.2])
    below = figure.add_subplot(grid[1, :])
    _draw_curve(below, curve)
    for column, (frame, picture) in enumerate(pictures.items()):
        score, time = score_at(curve, frame), frame / curve.fps
        colour = RISKY if curve.rule and score >= curve.rule.threshold else CALM
        axes = figure.add_subplot(grid[0, column], xticks=[], yticks=[])
        axes.imshow(picture)
        axes.set_title(f"{time:.1f} s   risk {score:.2f}", fontsize=11, color=colour, fontweight="bold")
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=3)
        below.plot(time, score, "o", color="white", markeredgecolor=colour, markeredgewidth=2, markersize=7, zorder=3)
    return figure


def _draw_curve(axes: Axes, curve: RiskCurve) -> None:
    axes.plot(curve.time, curve.score, color=CURVE, linewidth=2)
    axes.fill_between(curve.time, curve.score, color=CURVE, alpha=0.12, linewidth=0)
    axes.set(xlim=(0, max(curve.duration, 1e-3)), ylim=(0, 1.08), yticks=[0, 0.5, 1])
    axes.set_xlabel("seconds", fontsize=11)
    axes.set_ylabel("risk", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    if curve.rule is None:
        return
    axes.axhline(curve.rule.threshold, color="black", linestyle="--", linewidth=1)
    axes.text(curve.duration, curve.rule.threshold + 0.02, "threshold", ha="right", va="bottom", fontsize=10)
    for event in curve.events():
        axes.axvspan(event.start, event.end, color=RISKY, alpha=0.12, linewidth=0)
        axes.text(event.start, 1.02, " event", va="bottom", fontsize=10, color=RISKY, fontweight="bold")


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
            pictures = {i: p.numpy().copy() for i, p in zip(frames, reader.frames(frames), strict=True)}
        save_figure(args.picture, figure_of(curve, pictures))
    except (DataError, OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(f"{args.picture}: frames {frames} of {args.video}")


if __name__ == "__main__":
    main()
