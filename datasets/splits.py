"""Parts of a split that share no recording: `python -m datasets.tools.prepare split` lists them, `hold_out` makes them
within a run.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from datasets.clips import Clip, ClipTable, DataError
from datasets.labels import ANOMALOUS
from datasets.windows import WindowIndex

logger = logging.getLogger("tad")


def sources_of(clips: Sequence[Clip], by: str = "source") -> dict[str, list[str]]:
    """Return {source: names of its clips}. by: "source", the recording a clip was cut from; "clip"; a group column.

    A clip whose recording is not known is a source of its own. Raises DataError where a clip is in no such group.
    """
    sources: dict[str, list[str]] = defaultdict(list)
    for clip in clips:
        named = {"source": clip.recording or f"clip {clip.name}", "clip": clip.name} | clip.groups
        if by not in named:
            known = ", ".join(named)
            raise DataError(f"clip {clip.name} has no {by}, by which the split is to be made; known of it: {known}")
        sources[named[by]].append(clip.name)
    return sources


def draw_sources(sources: Mapping[str, Sequence[str]], share: float, seed: int = 0) -> set[str]:
    """Draw whole sources, {source: its clips}, up to a share of all clips, but one at least and never all of them.

    The order in which they are tried is that of a hash of seed and name, so it is the same on every machine, and a
    source more or fewer changes little.
    """
    order = sorted(sources, key=lambda source: _sha256(f"{seed} {source}"))
    room, drawn = share * sum(map(len, sources.values())), set()
    for source in order[: len(order) - 1]:
        if len(sources[source]) <= room:
            drawn.add(source)
            room -= len(sources[source])
    return drawn or {min(order[:-1], key=lambda source: len(sources[source]))}


def hold_out(clips: ClipTable, share: float) -> tuple[ClipTable, ClipTable, str]:
    """Return the clips of a split to train on, those to choose the best checkpoint on, and what these are in words.

    Whole sources up to `share` of the clips are held out, those that `prepare split --val SHARE` draws with its own
    defaults. The words hold the number and the SHA-256 of the sorted names, so others stand for other clips. Raises
    DataError where there is one source alone, or no source fits into the share.
    """
    sources = sources_of(clips)
    if len(sources) < 2:
        raise DataError(
            f"{clips}: {len(clips)} clips of {len(sources)} source, and --select_split holds out whole sources: leave "
            "it out, or add clips of other recordings"
        )
    drawn = draw_sources(sources, share)
    held = {name for source in drawn for name in sources[source]}
    if len(held) > share * len(clips):
        least = np.ceil(1000 * len(held) / len(clips)) / 1000
        raise DataError(
            f"{clips}: --select_split {share:g} of {len(clips)} clips is less than any source has, the smallest "
            f"{len(held)}: give {least:g} at least, or leave it out"
        )
    parts = [replace(clips, clips=[c for c in clips if (c.name in held) == wanted]) for wanted in (False, True)]
    fit, select = parts[0], replace(parts[1], split=f"{clips.split}, held out", unreadable={}, left_out=[])
    return fit, select, _in_words(clips, select, share, len(drawn), len(sources))


def _in_words(clips: ClipTable, select: ClipTable, share: float, drawn: int, sources: int) -> str:
    unknown = sum(clip.recording is None for clip in clips)
    if unknown:
        of = "the clips" if unknown == len(clips) else f"{unknown} of the {len(clips)} clips"
        logger.info(f"{clips}: the recordings of {of} are not known; each clip counts as a source of its own")
    by = "clip" if unknown == len(clips) else "source"
    digest = _sha256("\n".join(sorted(clip.name for clip in select)))
    names = f"{len(select)} of {len(clips)} clips, {drawn} of {sources} sources, SHA-256 {digest[:16]}"
    return f"{share:g} of {clips} by {by}: {names}"


def require_both_classes(clips: ClipTable, index: WindowIndex) -> None:
    """Raise DataError unless some window of a held-out part, or of what is left, ends on an anomalous frame and some
    other on a safe one.
    """
    number, last = index.locations()
    found = {
        bool(label == ANOMALOUS)
        for clip in np.unique(number)
        for label in np.unique(np.asarray(clips[clip].labels)[last[number == clip]])
    }
    if found != {False, True}:
        lacking = "an anomalous" if True not in found else "a safe"
        raise DataError(
            f"{clips}: no window of its {len(clips)} clips ends on {lacking} frame: give --select_split another share, "
            "or leave it out"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
