"""A video with its risk curve below the pictures: overlay.mp4."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from engine.curve import RiskCurve
from engine.overlay_panel import Panel
from engine.sound import Sound, first_picture, pixel_aspect
from utils.files import replaced
from utils.text import short_reason

NARROWEST, LONGEST = 480, 1920  # pixels: the panel's words need the one, encoders and screens the other
LOWEST_PANEL, HIGHEST_PANEL = 72, 160
_NO_PICTURE = (360, 640)  # height, width of a video without any
_GREY = 96
_END = object()
_BT709 = 1  # of primaries, transfer and matrix, in H.273


class OverlayError(RuntimeError):
    """A video that cannot be written; the message names it and says why."""


def write_overlay(
    path: str | Path,
    curve: RiskCurve,
    source: str | Path | None,
    pictures: Iterable[np.ndarray | None],
    *,
    start: float | None = None,
    preset: str = "veryfast",
    crf: int = 23,
    threads: int = 0,
) -> None:
    """Write an H.264 MP4 that shows each frame of a curve at frame / fps, its score below it, with the source's sound.

    Args:
        path: of the MP4.
        curve: of the video.
        source: video file whose sound is kept, and whose pixels may not be square; None: there is none, as of a folder
            of pictures.
        pictures: uint8 (H, W, 3) RGB of the frames 0 to num_frames - 1, upright; None where there is no picture. One is
            read at a time. All come in the size of the first; the video is at least 480 pixels wide and at most 1920
            on its longer side.
        start: time in the source, in seconds, of frame 0; None: of the first picture that it shows.
        preset, crf: libx264's speed and quality.
        threads: of libx264; 0: as many as it likes.

    Raises OverlayError where there are fewer or more pictures than frames, or the encoder fails; OSError, which names
    the file, where it cannot be written or the source cannot be read; nothing is left of the file then. What `pictures`
    raises passes through.
    """
    path, source = Path(path), None if source is None else str(source)
    shape, pictures = _begun(pictures)
    with _named(path, source):
        aspect = pixel_aspect(source, shape) if source else 1.0
        begin = first_picture(source) if source and start is None else start or 0.0
    canvases = _canvases(path, curve, pictures, _shown_size(shape, aspect))
    with replaced(path) as temporary:
        first = next(canvases)
        with closing(_Mp4(path, temporary, first.shape, curve.fps, preset=preset, crf=crf, threads=threads)) as mp4:
            if source:
                mp4.add_sound(source, begin, curve.duration)
            for canvas in chain([first], canvases):
                mp4.add(canvas)
            mp4.finish()


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or short_reason(error)


@contextmanager
def _named(path: Path, source: str | None = None) -> Iterator[None]:
    """Turn what PyAV raises into an error that names the file, or the source where one is given."""
    try:
        yield
    except (av.FFmpegError, OSError) as e:
        if isinstance(e, OSError) and e.errno:
            raise OSError(e.errno, os.strerror(e.errno), source or str(path)) from e
        cause = f"{source} cannot be read again" if source else "the encoder failed"
        raise OverlayError(f"{path}: not written: {cause} ({_reason(e)})") from e


class _Mp4:
    """An MP4 on its way to the disk; what fails names `path`, whatever the file is called so far."""

    def __init__(self, path: Path, temporary: Path, shape: tuple[int, ...], fps: float, *, preset, crf, threads):
        self._path, self._fps, self._frames, self._sound = path, fps, 0, None
        rate = Fraction(fps).limit_denominator(100_000)
        with _named(path):
            self._output = av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"})
            options = {"preset": preset, "crf": str(crf)}
            self._stream = stream = self._output.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *shape[:2], "yuv420p"
        context = stream.codec_context
        context.time_base, context.thread_count = 1 / rate, threads
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        self._reformatter = VideoReformatter()

    def add_sound(self, source: str, start: float, duration: float) -> None:
        """Take the sound of a file along; before the first picture."""
        with _named(self._path):
            self._sound = Sound(source, self._output, start, duration)

    def add(self, picture: np.ndarray) -> None:
        """Write the next picture, uint8 (height, width, 3), and the sound up to it."""
        with _named(self._path):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = self._reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = self._frames, self._stream.codec_context.time_base
            self._output.mux(self._stream.encode(frame))
            if self._sound:
                self._sound.copy_until(self._frames / self._fps)
        self._frames += 1

    def finish(self) -> None:
        """Write what is left."""
        with _named(self._path):
            self._output.mux(self._stream.encode(None))
            if self._sound:
                self._sound.copy_until(float("inf"))
            self._output.close()

    def close(self) -> None:
        """Release the files; after an error, whatever is said of them then."""
        if self._sound:
            self._sound.close()
        with suppress(av.FFmpegError, OSError):
            self._output.close()


def _begun(pictures: Iterable[np.ndarray | None]) -> tuple[tuple[int, int], Iterator[np.ndarray | None]]:
    """Return (height, width) of the first picture there is, and all of them again."""
    rest, missing, first = iter(pictures), 0, None
    for first in rest:
        if first is not None:
            break
        missing += 1
    known = [] if first is None else [first]
    shape = tuple(first.shape[:2]) if known else _NO_PICTURE
    return shape, chain(repeat(None, missing), known, rest)


def _shown_size(shape: tuple[int, int], aspect: float) -> tuple[int, int]:
    """Return (height, width) in which pictures of a shape are shown. aspect: width of their pixels over the height."""
    height, width = shape[0], shape[1] * aspect
    scale = max(min(1, LONGEST / max(height, width)), NARROWEST / width)
    return round(height * scale), round(width * scale)


def _canvases(
    path: Path, curve: RiskCurve, pictures: Iterator[np.ndarray | None], size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield what is shown of each frame, uint8 (even height, even width, 3), which holds until the next one."""
    height, width = size
    tall = min(max(round(0.16 * height), LOWEST_PANEL), HIGHEST_PANEL) // 2 * 2
    canvas = np.zeros(((height + 1) // 2 * 2 + tall, (width + 1) // 2 * 2, 3), np.uint8)
    panel = Panel(curve, canvas.shape[1], tall)
    for frame in range(curve.num_frames):
        picture = next(pictures, _END)
        if picture is _END:
            raise OverlayError(f"{path}: not written: there are {frame} pictures for {curve.num_frames} frames")
        _fill(canvas[: height + height % 2], picture, size)
        panel.draw(canvas[-tall:], frame)
        yield canvas
    if next(pictures, _END) is not _END:
        raise OverlayError(f"{path}: not written: there are more pictures than the {curve.num_frames} frames")


def _fill(out: np.ndarray, picture: np.ndarray | None, size: tuple[int, int]) -> None:
    """Put a picture of any size into `out`, uint8, `size` and a row or column more where that is odd."""
    height, width = size
    if picture is None:
        out[:] = _GREY
        return
    picture = np.asarray(picture)
    if picture.shape[:2] != size:
        smaller = picture.shape[0] * picture.shape[1] > height * width
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
    out[:height, :width] = picture
    out[height:], out[:, width:] = out[height - 1], out[:, width - 1 : width]
