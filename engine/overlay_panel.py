"""The panel below the pictures of an overlay: score and state in words, a bar, and the curve so far."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from engine.curve import RiskCurve
from engine.fonts import fitting
from engine.summary import clock

# States of a frame: words, colour.
STATES = (
    ("no picture", (120, 120, 120)),
    ("warming up", (170, 170, 170)),
    ("risk", (70, 130, 200)),  # where there is no rule
    ("below threshold", (46, 140, 70)),
    ("at risk", (230, 150, 30)),
    ("ALERT", (215, 40, 40)),
)
NO_PICTURE, WARMING_UP, SCORED, BELOW, AT_RISK, ALERT = range(len(STATES))
_COLOURS = np.array([colour for _, colour in STATES], np.uint8)
_BACKGROUND, _INK, _DIM = (24, 24, 27), (240, 240, 240), (150, 150, 155)


def frame_states(curve: RiskCurve) -> tuple[np.ndarray, np.ndarray]:
    """Return (state (num_frames,) uint8, a number in STATES, score (num_frames,) float32, NaN where there is none).

    A frame has the last score at or before it, unless a gap came since. It is at risk where that reaches the threshold,
    not smoothed, and of an alert from the time that the rule was met to the end of the event.
    """
    number = np.searchsorted(curve.frame, np.arange(curve.num_frames), side="right") - 1
    score = np.full(curve.num_frames, np.nan, np.float32)
    state = np.full(curve.num_frames, WARMING_UP, np.uint8)
    known = number >= 0
    score[known] = curve.score[number[known]]
    state[known] = SCORED
    if curve.rule:
        risky = score >= np.float32(curve.rule.threshold)
        state[known] = np.where(risky[known], AT_RISK, BELOW)
        for event in curve.events():
            alert, last = (int(round(t * curve.fps)) for t in (event.alert, event.end))
            state[alert : last + curve.step] = ALERT
    state[known & np.append(curve.warming_up, False)[number]] = WARMING_UP
    for gap in curve.gaps:
        first, end = (int(round(t * curve.fps)) for t in (gap.start, gap.end))
        place = np.searchsorted(curve.frame, end)
        resumed = int(curve.frame[place]) if place < len(curve.frame) else curve.num_frames
        state[first:resumed], score[first:resumed] = WARMING_UP, np.nan
        state[first:end] = NO_PICTURE
    return state, score


class Panel:
    """Draws the panel of each frame of a curve, in order or not.

    width, height: in pixels.
    """

    def __init__(self, curve: RiskCurve, width: int, height: int):
        self._curve, self.width, self.height = curve, width, height
        self._state, self._score = frame_states(curve)
        self._left = min(int(2.5 * height), int(0.42 * width))
        self._bar = slice(self._left, self._left + max(height // 5, 6))
        self._strip = slice(self._bar.stop + height // 8, width - height // 12)
        self._rows = slice(height // 12, height - height // 12)
        self._future, self._past = self._strips()
        self._words = lru_cache(maxsize=4)(self._draw_words)  # neighbours are often alike

    def state(self, frame: int) -> int:
        """Return the state of a frame, a number in STATES."""
        return int(self._state[frame])

    def draw(self, out: np.ndarray, frame: int) -> None:
        """Draw the panel of a frame into `out`, uint8 (height, width, 3)."""
        state, score, rows = int(self._state[frame]), float(self._score[frame]), self._rows
        out[:] = self._future
        now = self._strip.start + int((frame + 0.5) / self._curve.num_frames * (self._strip.stop - self._strip.start))
        out[:, self._strip.start : now] = self._past[:, self._strip.start : now]
        out[rows, now : now + 2] = _INK
        text = f"{score:.2f}" if score == score else "- -"
        out[:, : self._left] = self._words(state, text, clock(frame / self._curve.fps, self._curve.duration))
        if score == score:
            top = rows.stop - int(round(score * (rows.stop - rows.start)))
            out[top : rows.stop, self._bar] = _COLOURS[state]

    def _draw_words(self, state: int, score: str, time: str) -> np.ndarray:
        """Return uint8 (height, left, 3): the score, the state on its colour, the time."""
        name, colour = STATES[state]
        image = Image.new("RGB", (self._left, self.height), _BACKGROUND)
        draw, pad = ImageDraw.Draw(image), self.height // 12
        room = self._left - 2 * pad
        large = fitting("0.00", int(0.42 * self.height), int(0.54 * room))  # a tall panel may be narrow
        draw.text((pad, int(0.27 * self.height)), score, _INK, large, anchor="lm")
        small = fitting(time, int(0.17 * self.height), int(0.42 * room))
        draw.text((self._left - pad, int(0.27 * self.height)), time, _DIM, small, anchor="rm")
        box = (pad, int(0.56 * self.height), self._left - pad, self.height - pad)
        draw.rectangle(box, colour)
        middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
        ink = _BACKGROUND if sum(colour) > 380 else _INK  # which of the two can be read on it
        draw.text(middle, name, ink, fitting(name, int(0.26 * self.height), room - pad), anchor="mm")
        return np.asarray(image)

    def _strips(self) -> tuple[np.ndarray, np.ndarray]:
        """Return two uint8 (height, width, 3): the panel without words, its curve faint, and bright."""
        bright = np.full((self.height, self.width, 3), _BACKGROUND, np.uint8)
        rows, columns = self._rows, self._strip.stop - self._strip.start
        tall = rows.stop - rows.start
        bright[rows, self._bar] = bright[rows, self._strip] = (44, 44, 48)
        edges = np.linspace(0, self._curve.num_frames, columns + 1)
        heights = np.arange(tall, 0, -1) / tall
        for column in range(columns):
            span = slice(int(edges[column]), max(int(np.ceil(edges[column + 1])), int(edges[column]) + 1))
            state, score = int(self._state[span].max(initial=0)), np.nanmax(np.nan_to_num(self._score[span], nan=-1.0))
            pixels = bright[rows, self._strip.start + column]
            if score >= 0:
                pixels[heights <= max(score, 1.5 / tall)] = _COLOURS[state]
            elif state == NO_PICTURE:
                pixels[(np.arange(tall) + column) % 6 < 2] = _COLOURS[state]
            else:
                pixels[:] = (62, 62, 66)
        faint = bright.copy()
        faint[:, self._strip] = (0.35 * bright[:, self._strip] + 0.65 * np.array(_BACKGROUND)).astype(np.uint8)
        if self._curve.rule:
            row = rows.stop - int(round(self._curve.rule.threshold * tall))
            dashes = [c for c in range(self._strip.start, self._strip.stop) if c // 5 % 2 == 0]
            for strip in (faint, bright):
                strip[min(row, self.height - 1), dashes] = _INK
                strip[min(row, self.height - 1), self._bar] = _INK
        return faint, bright
