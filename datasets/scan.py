"""Frame counts and frame rates of video files: read once, in parallel, and kept in a file.

Opening a video to count its frames takes milliseconds, a hundred thousand of them minutes. A scan remembers each file
by path, size and modification time; a later one opens what is new or changed and nothing else. Files that cannot be
read are remembered too, with the reason, and not tried again until they change.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from datasets.clips import DataError
from datasets.parallel import in_processes
from datasets.video import VideoInfo, probe
from utils.files import replaced

logger = logging.getLogger("tad")

SAVE_EVERY = 60.0  # seconds between saves of a scan in progress


class VideoScan:
    """Looks up videos in a cache file and probes the ones it does not know.

    Args:
        cache: JSON file, made where absent.
        workers: processes that open videos.
    """

    def __init__(self, cache: str | Path, *, workers: int):
        self.cache, self.workers = Path(cache), workers

    def __call__(self, paths: Sequence[str]) -> list[VideoInfo]:
        """Return the VideoInfo of each path, in order. A missing file is a problem too, but is not remembered.

        Raises DataError where the cache cannot be used, or where decord is needed and not installed.
        """
        known, stamps = self._load(), {path: _stamp(path) for path in paths}
        stale = {path: stamp for path, stamp in stamps.items() if stamp and known.get(path, [None])[0] != stamp}
        if stale:
            self._probe_all(stale, known)
        missing = VideoInfo(0, 0.0, "no such file, or no permission to read it")
        return [VideoInfo(*known[path][1:]) if stamps[path] else missing for path in paths]

    def _load(self) -> dict[str, list]:
        """Return what the cache holds: {path: [stamp, *fields of VideoInfo]}."""
        if not self.cache.exists():
            return {}
        try:
            known = json.loads(self.cache.read_text())
            if not all(len(entry) == 4 for entry in known.values()):
                raise ValueError("entries of another shape")
        except (OSError, ValueError, AttributeError, TypeError) as e:
            raise DataError(f"{self.cache}: not a scan of videos ({e}); remove it to scan again") from e
        return known

    def _save(self, known: dict[str, list]) -> None:
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with replaced(self.cache) as temporary:  # another run may have written meanwhile
                temporary.write_text(json.dumps(self._load() | known, sort_keys=True))
        except OSError as e:
            raise DataError(f"{self.cache}: cannot be written ({e.strerror}); choose another --scan_cache") from e

    def _probe_all(self, stamps: dict[str, list[int]], known: dict[str, list]) -> None:
        logger.info(f"counting the frames of {len(stamps)} videos; kept in {self.cache}")
        saved = time.monotonic()
        try:
            for path, info in in_processes(probe, stamps, workers=self.workers, description="videos"):
                known[path] = [stamps[path], info.frames, info.fps, info.problem]
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save(known)
                    saved = time.monotonic()
        finally:
            self._save(known)


def _stamp(path: str) -> list[int] | None:
    """Return [size in bytes, modification time in ns], or None where there is no file that may be read."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns] if os.access(path, os.R_OK) else None
