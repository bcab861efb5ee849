"""Frame counts and frame rates of video files: read once, in parallel, and kept in a file.

Opening a video to count its frames takes milliseconds, a hundred thousand of them minutes. A scan remembers each file
by path, size and modification time; a later one opens what is new or changed and nothing else. Files that cannot be
read are remembered too, with the reason, and not tried again until they change.
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from datasets.clips import Clip, ClipTable, DataError
from utils.files import replaced
from utils.logging import progress_bar

logger = logging.getLogger("tad")

SAVE_EVERY = 60.0  # seconds between saves of a scan in progress


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video file: frames and fps, or why it cannot be read ("" where it can)."""

    frames: int
    fps: float
    problem: str = ""


def probe(path: str) -> VideoInfo:
    """Open a video with the decoder that will read it. decord counts the packets, whatever the container claims."""
    import decord

    try:
        video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        frames, fps = len(video), float(video.get_avg_fps())
    except (RuntimeError, decord.DECORDError) as e:
        return VideoInfo(0, 0.0, " ".join(str(e).split())[:160] or type(e).__name__)
    if frames == 0 or not 0 < fps < 1000:
        return VideoInfo(0, 0.0, f"{frames} frames at {fps:g} fps")
    return VideoInfo(frames, fps)


class VideoScan:
    """Looks up videos in a cache file and probes the ones it does not know.

    Args:
        cache: JSON file, made where absent. workers: processes that open videos.
    """

    def __init__(self, cache: str | Path, *, workers: int):
        self.cache, self.workers = Path(cache), max(workers, 1)

    def __call__(self, paths: Sequence[str]) -> list[VideoInfo]:
        """VideoInfo of each path, in order. A missing file is a problem too, but is not remembered."""
        known, stamps = self._load(), {path: _stamp(path) for path in paths}
        stale = {path: stamp for path, stamp in stamps.items() if stamp and known.get(path, [None])[0] != stamp}
        if stale:
            self._probe_all(stale, known)
        missing = VideoInfo(0, 0.0, "no such file")
        return [VideoInfo(*known[path][1:]) if stamps[path] else missing for path in paths]

    def _load(self) -> dict[str, list]:
        if not self.cache.exists():
            return {}
        try:
            return json.loads(self.cache.read_text())
        except ValueError as e:
            raise DataError(f"{self.cache}: not a scan of videos ({e}); remove it to scan again") from e

    def _save(self, known: dict[str, list]) -> None:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self.cache) as temporary:
            temporary.write_text(json.dumps(known))

    def _probe_all(self, stamps: dict[str, list[int]], known: dict[str, list]) -> None:
        workers = min(self.workers, len(stamps))
        logger.info(f"counting the frames of {len(stamps)} videos with {workers} processes; kept in {self.cache}")
        saved = time.monotonic()
        # In processes of their own: decord must not live through the forks of the data loader.
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            results = pool.map(probe, stamps, chunksize=max(1, min(64, len(stamps) // (4 * workers))))
            bar = progress_bar(results, description="videos", total=len(stamps))
            for (path, stamp), info in zip(stamps.items(), bar, strict=True):
                known[path] = [stamp, info.frames, info.fps, info.problem]
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save(known)
                    saved = time.monotonic()
        self._save(known)


def _stamp(path: str) -> list[int] | None:
    """[size in bytes, modification time in ns], or None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def video_table(name: str, split: str, root: Path, videos: Iterable[str], scan: VideoScan, **options) -> ClipTable:
    """The readable ones among videos, which are paths relative to root, as unlabelled clips named by those paths.

    The others are counted and named in the log. options: of ClipTable. Raises DataError where none is readable.
    """
    videos = list(videos)
    clips, problems = [], []
    folder = os.path.abspath(root)
    sources = [os.path.join(folder, video) for video in videos]
    for video, source, info in zip(videos, sources, scan(sources), strict=True):
        if info.problem:
            problems.append(f"{video} ({info.problem})")
        else:
            clips.append(Clip(name=video, source=source, num_frames=info.frames, fps=info.fps))
    if problems:
        shown = "; ".join(problems[:5]) + (f"; ... all of them in {scan.cache}" if len(problems) > 5 else "")
        message = f"{name} {split}: {len(problems)} of {len(videos)} videos cannot be read: {shown}"
        if not clips:
            raise DataError(f"{root}: {message}")
        logger.warning(f"{message}; the run goes on without them")
    return ClipTable(name, split, clips, **options)
