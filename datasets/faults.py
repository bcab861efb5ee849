"""What cannot be read: in training skipped, counted and named; in evaluation an error, or left out and counted."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.clips import ClipTable, DataError
from datasets.formats.text import read_text
from utils.distributed import broadcast, gather
from utils.text import first_few

logger = logging.getLogger("tad")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a clip.

    number: its number in its table.
    name: its name.
    reason: what is wrong.
    frames: how many of its frames can be used.
    """

    number: int
    name: str
    reason: str
    frames: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class FrameGap:
    """Frames of a clip, one after the other, that cannot be used.

    clip: number of the clip.
    first, end: its frames first to end - 1. Of those between frames that windows need, nothing is known.
    reason: what is wrong with the first of them.
    """

    clip: int
    first: int
    end: int
    reason: str


@dataclass(frozen=True)
class ClipEnd:
    """All windows of a clip that there are have been handed out.

    clip: number of the clip.
    gaps: its frames that no window handed out has used, ascending and apart.
    fault: what is wrong with the clip as a whole, where it ends early or cannot be read any further; else None.
    """

    clip: int
    gaps: tuple[FrameGap, ...] = ()
    fault: Fault | None = None


class CountedBatches:
    """The batches of a loader, epoch after epoch; counts their samples, and those that could not be read by clip.

    The first fault of each clip is logged. Raises DataError after more than `limit` samples skipped by this process in
    an epoch, and after an epoch without a readable sample.
    """

    def __init__(self, loader: Iterable[dict[str, Any]], *, limit: int):
        self.loader, self.limit = loader, limit
        self._samples, self._skipped, self._bad_clips = 0, 0, Counter()
        self._skipped_here, self._logged = 0, set()

    @property
    def waited(self) -> float:
        """Seconds of waiting for the loader, if it counts them."""
        return getattr(self.loader, "waited", 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return {"samples", "skipped": of the epoch, "bad_clips": {clip: skipped in the run}}, for a checkpoint."""
        return {"samples": self._samples, "skipped": self._skipped, "bad_clips": dict(self._bad_clips)}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of one or several ranks of an interrupted run; from nothing if there are none."""
        self._samples, self._skipped = (sum(state[name] for state in states) for name in ("samples", "skipped"))
        self._skipped_here = self._skipped
        self._bad_clips = sum((Counter(state["bad_clips"]) for state in states), Counter())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            self._count(batch)
            yield batch

    def _count(self, batch: dict[str, Any]) -> None:
        for fault in batch["notes"]:
            self._log_once(logger.warning, fault, str(fault))
        for fault in batch["skipped"]:
            self._skipped_here, self._skipped = self._skipped_here + 1, self._skipped + 1
            self._bad_clips[fault.name] += 1
            self._log_once(logger.error, fault, f"skipped a sample of {fault}")
            if self._skipped_here > self.limit:
                raise DataError(
                    f"more than --max_bad_samples {self.limit} samples skipped in an epoch, the last of {fault}; "
                    f"so far of {_named(self._bad_clips)}; python -m datasets.tools.check finds all such clips for "
                    "--bad_clips, or raise the limit"
                )
        self._samples += len(batch["samples"])

    def _log_once(self, log: Callable[[str], None], fault: Fault, message: str) -> None:
        kind = fault.name, fault.frames > 0
        if kind not in self._logged:
            self._logged.add(kind)
            log(message)

    def counts(self) -> dict[str, Any]:
        """Return the state of all ranks, summed up, on every rank; each rank calls it."""
        total = CountedBatches([], limit=0)
        total.load_state_dicts(broadcast(gather(self.state_dict())))
        return total.state_dict()

    def end_epoch(self) -> dict[str, Any]:
        """Start counting anew; returns the counts of the epoch, for log.txt. Every rank calls it."""
        counts = self.counts()
        self._skipped_here = self._samples = self._skipped = 0
        if counts["skipped"] and not counts["samples"]:
            raise DataError(f"no sample of the epoch could be read, of {_named(counts['bad_clips'])}")
        if counts["skipped"]:
            logger.warning(f"{counts['samples']} samples of the epoch were read, {counts['skipped']} skipped")
        if not counts["bad_clips"]:
            del counts["bad_clips"]
        return {f"train_{name}": value for name, value in counts.items()}

    def log_summary(self) -> None:
        """Name the clips that samples of the run were skipped of. Every rank calls it."""
        if bad := self.counts()["bad_clips"]:
            logger.warning(f"{sum(bad.values())} samples of the run were skipped, of {_named(bad)}")


def _named(clips: Mapping[str, int]) -> str:
    return f"{len(clips)} clips: " + ", ".join(f"{name} ({n})" for name, n in sorted(clips.items()))


def agree_on_faults(faults: list[Fault], clips: ClipTable, *, allow_missing: bool) -> list[Fault]:
    """Return the faults that all ranks met, sorted by clip, on every rank, and log them; each rank calls it.

    Raises DataError naming every clip that cannot be read, unless allow_missing and there are others.
    """
    found = sorted(broadcast(sum(gather(faults) or [], [])), key=lambda fault: fault.number)
    if mismatched := [fault for fault in found if fault.frames]:
        shown = first_few(mismatched, sep="; ")
        logger.warning(f"{len(mismatched)} clips hold more or fewer frames than expected: {shown}")
    bad = [f"{name}: {reason}" for name, reason in clips.unreadable.items()]
    bad += [str(fault) for fault in found if not fault.frames]
    if bad:
        message = f"{clips.name} {clips.split}: {len(bad)} of {clips.listed} clips cannot be read"
        if not allow_missing or len(bad) == clips.listed:
            remedy = "repair them" + ", or evaluate the others with --allow_missing" * (len(bad) < clips.listed)
            raise DataError("\n  ".join([f"{message}; {remedy}:", *bad]))
        logger.warning(f"{message} and go unscored: {'; '.join(bad)}")
    return found


def read_bad_clips(paths: Iterable[str | Path]) -> frozenset[str]:
    """Return the clips in lists as `datasets.tools.check` writes: a name per line, a tab before any remark.

    Raises DataError where a list is missing.
    """
    names = set()
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"{path}: no such list of bad clips; python -m datasets.tools.check writes one")
        for line in read_text(path).splitlines():
            name, tab, _ = line.partition("\t")
            names.add(name.rstrip() if tab else name.strip())  # a name may begin with a space
    return frozenset(names - {""})


def warn_unmatched(bad_clips: Iterable[str], tables: Iterable[ClipTable]) -> None:
    """Log the names in lists of bad clips that are of no clip in any table of a run: misspelt, or of another split."""
    tables = list(tables)
    if rest := sorted(set(bad_clips).difference(*(table.left_out for table in tables))):
        of = ", ".join(f"{table.name} {table.split}" for table in tables)
        logger.warning(f"--bad_clips: {len(rest)} names are of no clip of {of}: {first_few(rest)}")
