"""Live scoring: pictures go in as they come, a score comes out for each frame that a window ends on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.evaluate import EvaluationError
from utils.windows import window_offsets

_LEARN = 30  # pictures whose times tell the rate of a source that does not say it
_LONGEST_GAP = 2.0  # seconds
_HIGHEST_RATE = 1000.0  # frames per second: the memory of a stream grows with the rate


@dataclass(frozen=True)
class Score:
    """The risk at a frame, from pictures up to it.

    time: of the frame, in seconds of the times that were pushed.
    frame: its number, ascending; in the first stretch that of the frame at frame / fps seconds.
    score: in [0, 1], the softmax probability of an anomaly, as it came from the model.
    warming_up: whether the window began before the stretch and repeats its first frame.
    stretch: number of the stretch, from 0.
    """

    time: float
    frame: int
    score: float
    warming_up: bool = False
    stretch: int = 0


@dataclass
class StreamCounts:
    """What came of the pictures and frames of a stream so far.

    pictures: that came.
    scores: that were made.
    skipped: frames that a score was due for, and that a newer one was scored instead of.
    repeated: frames without a picture of their own, which show the one before.
    replaced: pictures that a later one of the same frame took the place of, or that came when it was scored already.
    stretches: how often the time jumped, so that the window was filled anew.
    """

    pictures: int = 0
    scores: int = 0
    skipped: int = 0
    repeated: int = 0
    replaced: int = 0
    stretches: int = 0


class RiskStream:
    """Scores a stream of pictures; the same frames give the same scores as in a recorded video.

    Frame i of a stretch is at i / fps seconds after its first picture. A picture belongs to the frame nearest to its
    time. A frame without one shows the picture before, as a viewer sees it; of two pictures of a frame the later one
    counts, unless the frame is scored already. Where time runs back by a frame or more, or forward by more than
    max_gap, another stretch begins, and its window is filled anew.

    The window of a frame is that of `datasets.windows.WindowIndex`: num_frames frames at view_fps, counted back from
    it. The first scored frame is the first whose window is full, later ones are `stride` apart. Memory: each picture is
    resized and normalised once and kept, on the device, as long as a window may need it: a span of a window and, with a
    stride, up to another.

    Args:
        model: maps normalised video (1, 3, num_frames, S, S) to logits (1, 2), safe and anomalous; normalises uint8
            video itself (`model.normalize`). It is on the device.
        preprocess: maps a picture, uint8 Tensor (H, W, 3) RGB, to uint8 (3, S, S), on the CPU; called in any thread.
        num_frames, view_fps: frames of a window, and how many of them there are per second.
        fps: frames per second of the source. None: unknown; taken from the times of the first 30 pictures, which are
            kept until then: their number, less one, over the time between the first and the last of them, where steps
            of several times the median count as several.
        stride: step between scored frames, in frames of the source.
        warm_up: whether to score from the first frame on, with windows that repeat it; then the scored frames are
            `stride` apart from it on, and those of such windows are marked.
        dtype: of autocast; float32 turns it off.
        device: where the model is.
        max_gap: seconds without a picture that are filled with the one before; 3 frames at least.

    Raises ValueError for a number that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Tensor], Tensor],
        *,
        num_frames: int,
        view_fps: float,
        fps: float | None,
        stride: int = 1,
        warm_up: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_gap: float = _LONGEST_GAP,
    ):
        known = {} if fps is None else {"fps": fps}
        numbers = {"num_frames": num_frames, "view_fps": view_fps, "stride": stride, "max_gap": max_gap} | known
        for name, value in numbers.items():
            if not 0 < value < np.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        self.model, self.preprocess = model.eval(), preprocess
        self.num_frames, self.view_fps, self.stride, self.warm_up = int(num_frames), view_fps, int(stride), warm_up
        self.dtype, self.device, self.max_gap = dtype, torch.device(device), max_gap
        self.counts = StreamCounts()
        self.fps: float | None = None
        self._early: list[tuple[Tensor, float]] = []  # pictures that came before the rate was known
        self._frames: Tensor | None = None  # (capacity, 3, S, S), normalised; frame i at i % capacity
        self._begin: float | None = None  # time of frame 0 of the stretch
        self._last = self._scored = -1  # frames of the stretch
        self._first = 0.0  # time of frame 0 of the first stretch
        self._number = 0  # of frame 0 of the stretch among all frames
        if fps is not None:
            self._set_rate(float(fps))

    @property
    def span(self) -> int:
        """Source frames from the first to the last of a window; num_frames while the rate is unknown."""
        return int(1 - self._offsets[0]) if self.fps else self.num_frames

    def push(self, frame: np.ndarray | Tensor, time: float) -> Score | None:
        """Take a picture, uint8 (H, W, 3) RGB, of a time in seconds; return the score of the newest frame due, if any.

        Frames that came due before it, without a picture of their own, are counted as skipped. Raises ValueError for
        another picture or time, EvaluationError where logits are not finite or the rate cannot be told.
        """
        self.add(self.prepare(frame), time)
        return self.score()

    def prepare(self, frame: np.ndarray | Tensor) -> Tensor:
        """Return a picture, uint8 (H, W, 3) RGB, as `add` takes it: uint8 (3, S, S). May be called in any thread."""
        if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape or frame.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"expected a picture uint8 (H, W, 3), got {frame.dtype} {tuple(frame.shape)}")
        return self.preprocess(torch.as_tensor(frame))

    @torch.inference_mode()
    def add(self, picture: Tensor, time: float) -> None:
        """Take what `prepare` returned, of a picture of a time in seconds, without scoring it."""
        if not np.isfinite(time):
            raise ValueError(f"the time of a picture must be a number of seconds, not {time}")
        self.counts.pictures += 1
        if self.fps is None:
            self._early.append((picture, time))
            if len(self._early) < _LEARN:
                return
            try:
                self._set_rate(estimated_rate([time for _, time in self._early]))
            except ValueError as e:
                raise EvaluationError(f"{e}; give the rate of the source (--stream_fps)") from e
            early, self._early = self._early, []
        else:
            early = [(picture, time)]
        for picture, time in early:
            self._place(self._normalized(picture), time)

    @property
    def due(self) -> bool:
        """Whether there is a frame to score."""
        return self._due() > self._scored

    @torch.inference_mode()
    def score(self) -> Score | None:
        """Return the score of the newest frame that is due, None where there is none; it waits for the device."""
        frame = self._due()
        if frame <= self._scored:
            return None
        warming_up, ids = frame < self.span - 1, np.maximum(frame + self._offsets, 0)
        self.counts.skipped += self._due_count(frame) - self._due_count(self._scored) - 1
        rows = torch.from_numpy(ids % len(self._frames)).to(self.device)
        video = self._frames.index_select(0, rows).transpose(0, 1)[None]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            safe, risk = self.model(video)[0].double().tolist()
        if not np.isfinite((safe, risk)).all():
            raise EvaluationError(
                f"frame {self._number + frame}: logits of {safe}, {risk}: the weights have diverged, or {self.dtype} "
                "overflows, where --precision fp32 does not"
            )
        self._scored = frame
        self.counts.scores += 1
        probability = 1 / (1 + np.exp(np.clip(safe - risk, -700, 700)))
        at = self._begin + frame / self.fps
        return Score(at, self._number + frame, float(np.float32(probability)), warming_up, self.counts.stretches - 1)

    def finish(self) -> None:
        """Count the frames that a score is due for and that will have none as skipped; no picture comes any more."""
        self._skip_rest()
        self._scored = max(self._scored, self._last)

    # ------------------------------------------------------------------------------------------------------------------

    def _set_rate(self, fps: float) -> None:
        if fps > _HIGHEST_RATE:
            raise ValueError(f"{fps:g} pictures per second cannot be, {_HIGHEST_RATE:g} is the most")
        self.fps, self._offsets = fps, window_offsets(fps / self.view_fps, self.num_frames)
        self.max_gap = max(self.max_gap, 3 / fps)

    def _due_count(self, frame: int) -> int:
        """Count the frames of the stretch up to this one that a score is due for."""
        return max((frame - self._first_due) // self.stride + 1, 0)

    def _due(self) -> int:
        """Return the newest frame that a score is due for, if its window is still here; -1 where there is none."""
        if not (count := self._due_count(self._last) if self.fps else 0):
            return -1
        frame = self._first_due + (count - 1) * self.stride
        return frame if self._last - max(frame - self.span + 1, 0) < len(self._frames) else -1

    @property
    def _first_due(self) -> int:
        return 0 if self.warm_up else self.span - 1

    def _normalized(self, picture: Tensor) -> Tensor:
        """Return (3, S, S) on the device, as the windows are made of."""
        video = self.model.normalize(picture.to(self.device)[None, :, None])
        return video[0, :, 0].to(self.dtype)

    def _place(self, picture: Tensor, time: float) -> None:
        """Put a picture on its frame, and the one before on the frames that were left out."""
        if self._frames is None:
            self._frames = picture.new_zeros(self.span + min(self.stride - 1, self.span), *picture.shape)
        frame = (
            -1 if self._begin is None else int(np.ceil((time - self._begin) * self.fps - 0.5))
        )  # ties to the earlier
        if frame < self._last or self._begin is None or frame - self._last > self.max_gap * self.fps:
            self._start_stretch(time)
            frame = 0
        capacity = len(self._frames)
        if frame == self._last:
            self.counts.replaced += 1
            if self._scored == frame:
                return
        elif (missing := frame - self._last - 1) > 0:
            self.counts.repeated += missing
            held = self._frames[self._last % capacity].clone()
            for i in range(max(self._last + 1, frame - capacity), frame):
                self._frames[i % capacity] = held
        self._frames[frame % capacity] = picture
        self._last = frame

    def _start_stretch(self, time: float) -> None:
        self._skip_rest()
        if self._begin is None:
            self._first = time
        else:
            self._number = max(self._number + self._last + 1, round((time - self._first) * self.fps))
        self._begin, self._last, self._scored = time, -1, -1
        self.counts.stretches += 1

    def _skip_rest(self) -> None:
        """Count the frames of the stretch that stay without a score."""
        if self.fps and self._last >= 0:
            self.counts.skipped += self._due_count(self._last) - self._due_count(self._scored)


def estimated_rate(times: list[float]) -> float:
    """Return the frames per second of pictures at these times in seconds, of which a few may be missing.

    Raises ValueError where no time passes between them.
    """
    steps = np.diff(np.asarray(times, np.float64))
    steps = steps[steps > 0]
    if not len(steps):
        raise ValueError(f"{len(times)} pictures came at the same time of {times[0]:g} s: their rate cannot be told")
    return float(np.maximum(np.round(steps / np.median(steps)), 1).sum() / steps.sum())
