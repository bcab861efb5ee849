"""What video files hold, frame counts above all: found out once, in parallel, and kept in a file.

Finding out takes milliseconds a video, a hundred thousand of them minutes. A scan remembers each file by path, size and
modification time; a later one opens what is new or changed and nothing else. Files that cannot be read are remembered
too, with the reason, and not tried again until they change; those that hung or crashed a reader are tried again by the
next scan. What an earlier version of this file kept is found out anew.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from datasets.clips import MOST_FRAMES, DataError
from datasets.parallel import READ_TIMEOUT, ReadFailure, in_processes
from datasets.video import VideoInfo, probe
from utils.damage import parse_json, with_sum
from utils.files import replaced
from utils.text import first_few

logger = logging.getLogger("tad")

SAVE_EVERY = 60.0  # seconds between saves of a scan in progress
VERSION = 3  # of what an entry means; entries of others are found out anew
_TYPES = tuple(map(type, astuple(VideoInfo(0, 0.0))))


class VideoScan:
    """Looks up videos in a cache file and probes the ones it does not know.

    Args:
        cache: JSON file, made where absent.
        workers: processes that open videos.
        read_timeout: seconds without a sign of life after which a video counts as unreadable, this time.
        known_only: no video is opened; one that the cache does not know is refused.
    """

    def __init__(
        self, cache: str | Path, *, workers: int, read_timeout: float = READ_TIMEOUT, known_only: bool = False
    ):
        self.cache, self.workers, self.read_timeout, self.known_only = Path(cache), workers, read_timeout, known_only

    def __call__(self, paths: Sequence[str]) -> list[VideoInfo]:
        """Return the VideoInfo of each path, in order. A missing file is a problem too, but is not remembered.

        Raises DataError where the cache cannot be used, or does not know a video under known_only.
        """
        known, stamps = self._load(), {path: _stamp(path) for path in paths}
        stale = {path: stamp for path, stamp in stamps.items() if stamp and known.get(path, [None])[0] != stamp}
        if stale and self.known_only:
            raise DataError(f"{self.cache}: the frames of {len(stale)} of {len(paths)} videos are not counted in it")
        failed = self._probe_all(stale, known) if stale else {}
        missing = VideoInfo(0, 0.0, "no such file, or no permission to read it")
        found = {path: VideoInfo(*known[path][1:]) if path in known else missing for path in paths}
        return [missing if not stamps[path] else failed.get(path) or found[path] for path in paths]

    def _load(self) -> dict[str, list]:
        """Return what the cache holds: {path: [stamp, *fields of VideoInfo]}."""
        if not self.cache.exists():
            return {}
        try:
            content = parse_json(self.cache.read_bytes())
            if "version" not in content and all(isinstance(e, list) and len(e) == 4 for e in content.values()):
                return {}  # of before there were versions
            if not isinstance(content["version"], int):
                raise ValueError(f"version {content['version']!r}")
            if content["version"] != VERSION:
                return {}
            known = content["videos"]
            if odd := next((path for path, entry in known.items() if not _is_entry(entry)), None):
                raise ValueError(f"what it says of {odd[:60]!r}")
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as e:
            raise DataError(f"{self.cache}: not a scan of videos ({e}); remove it to scan again") from e
        return known

    def _save(self, known: dict[str, list]) -> None:
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with replaced(self.cache) as temporary:  # another run may have written meanwhile
                content = {"version": VERSION, "videos": self._load() | known}
                temporary.write_text(json.dumps(with_sum(content), sort_keys=True))
        except OSError as e:
            raise DataError(f"{self.cache}: cannot be written ({e.strerror}); choose another --scan_cache") from e

    def _probe_all(self, stamps: dict[str, list[int]], known: dict[str, list]) -> dict[str, VideoInfo]:
        """Add what is found out to `known`, and return {path: info} of videos that hung or crashed their reader."""
        logger.info(f"looking into {len(stamps)} videos; kept in {self.cache}")
        saved, failed = time.monotonic(), {}

        def give_up(path: str, error: ReadFailure) -> VideoInfo:
            failed[path] = VideoInfo(0, 0.0, str(error))
            return failed[path]

        options = {"workers": self.workers, "description": "videos", "failed": give_up, "limit": self.read_timeout}
        try:
            for path, info in in_processes(probe, stamps, **options):
                if path not in failed:
                    known[path] = [stamps[path], *astuple(info)]
                if time.monotonic() - saved > SAVE_EVERY:
                    self._save(known)
                    saved = time.monotonic()
        finally:
            self._save(known)
        return failed


def _is_entry(entry: Any) -> bool:
    """Tell whether this is [stamp, *fields of VideoInfo], of values that a video can have."""
    if not isinstance(entry, list) or tuple(map(type, entry[1:])) != _TYPES:
        return False
    stamp, frames, fps, *_ = entry
    return isinstance(stamp, list) and 0 <= frames < MOST_FRAMES and 0 <= fps < 1000


def log_notes(name: str, found: Mapping[str, VideoInfo]) -> None:
    """Log what is to be known of the videos of a data set, {name of video: info}, once for each kind of note."""
    usable = {video: info for video, info in found.items() if not info.problem}
    variable = [video for video, info in usable.items() if not info.constant]
    slow = [f"{video} ({info.note})" for video, info in usable.items() if info.method == "sequence"]
    short = [f"{video} ({info.short})" for video, info in usable.items() if info.short]
    for videos, note in (
        (variable, "have a variable frame rate or lost pictures; their frames are the nearest pictures on a grid"),
        (slow, "are decoded from the beginning at each read, which is slow; encode them anew, as H.264 in mp4"),
        (short, "are shorter than they claim; what is there is used"),
    ):
        if videos:
            logger.warning(f"{name}: {len(videos)} of {len(found)} videos {note}: {first_few(videos, 3)}")


def _stamp(path: str) -> list[int] | None:
    """Return [size in bytes, modification time in ns], or None where there is no file that may be read."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns] if os.access(path, os.R_OK) else None
