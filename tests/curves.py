"""Risk curves made by hand."""

import numpy as np

from engine.curve import RiskCurve
from engine.events import EventRule

RULE = EventRule(threshold=0.6, alert_after=0.2, gap=0.3, source="best MCC on DoTA val (1402 clips)")


def bumpy(frames: int, *, fps: float = 10, first: int = 15, step: int = 1, peaks=(0.7,), **more) -> RiskCurve:
    """Scores of 0.1 but for bumps of 0.9 and 0.8 s at these shares of the video; what lies in gaps has none.

    more: fields of RiskCurve. With warming_up=True the frames before `first` have scores, too.
    """
    warm = more.pop("warming_up", False)
    frame = np.arange(0 if warm else first, frames, step, dtype=np.int64)
    time, score = frame / fps, np.full(len(frame), 0.1)
    for number, peak in enumerate(peaks):
        bump = (0.9 - 0.01 * number) * np.exp(-(((time - peak * frames / fps) / 0.6) ** 2))
        score = np.maximum(score, bump)
    gaps = more.get("gaps", ())
    kept = np.ones(len(frame), dtype=bool)
    for gap in gaps:
        kept &= (time < gap.start - 1e-9) | (time > gap.end + 0.4)
    fields = {"name": "day1/0004.mp4", "rule": RULE, **more}
    frame, score = frame[kept], score[kept].astype(np.float32)
    return RiskCurve(fps=fps, num_frames=frames, frame=frame, score=score, warming_up=frame < first, **fields)
