"""Numbered pictures in a folder or zip: img_0001.png, img_0002.png, ... are the frames 0, 1, ... of a clip.

Hidden files and those that are no pictures are passed over. What remains is one sequence: one beginning of the names,
one suffix, numbers that go up by 1, or by a step that the user has stated, as where every third frame of a recording
was kept (0000.jpg, 0003.jpg, 0006.jpg, ...). A frame's number in the clip is its place in the sequence either way.
"""

import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datasets.clips import Clip
from datasets.readers import OTHER_PICTURE_SUFFIXES, PICTURE_SUFFIXES, is_hidden
from utils.text import first_few


@dataclass(frozen=True, eq=False)
class SteppedClip(Clip):
    """A Clip whose frame i is called frame_name.format(first_frame + i * number_step)."""

    number_step: int = 1

    def filename(self, frame: int) -> str:
        """Return the name of frame i in the original source."""
        return super().filename(frame * self.number_step)

    def picture(self, frame: int) -> str:
        """Return the name of the picture that holds frame i: its filename, or in a pack the JPEG of that number."""
        return super().picture(frame * self.number_step) if self.pack_step else self.filename(frame)


@dataclass(frozen=True)
class Numbered:
    """A numbered sequence: picture i of [0, count) is called name.format(first + i * step)."""

    count: int
    name: str
    first: int
    step: int


def find_numbered(path: str, step: int | None = 1) -> Numbered:
    """Find the numbered pictures of a zip or folder.

    step: that of their numbers, as stated. None: it is the largest that fits, and pictures may be missing, but no more
        than are there.

    Raises ValueError saying why they are no such sequence and what to do, OSError, zipfile.BadZipFile.
    """
    if os.path.isdir(path):
        return _numbered(os.listdir(path), step)
    if path.endswith(".zip"):
        with zipfile.ZipFile(path) as z:
            return _numbered(z.namelist(), step)
    os.stat(path)
    suffix = os.path.splitext(path)[1]
    if suffix.lower() == ".zip":
        raise ValueError(f"the suffix {suffix} is not read: rename it to .zip")
    if suffix.lower() in PICTURE_SUFFIXES + OTHER_PICTURE_SUFFIXES:
        raise ValueError("a single picture; a clip is a folder or zip of them")
    raise ValueError("neither a folder of pictures nor a zip of them, whose suffix is .zip")


def _numbered(names: Sequence[str], step: int | None) -> Numbered:
    pictures = _of_one_suffix([name for name in names if not is_hidden(name)])
    parts = [re.fullmatch(r"(.*?)([0-9]+)(\.\w+)", name, re.DOTALL) for name in pictures]
    kinds = {p.group(1, 3) if p else None for p in parts}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"not one numbered sequence of pictures: {first_few(sorted(pictures), 3)}")
    ((before, after),) = kinds
    numbers, width = sorted(int(p.group(2)) for p in parts), min(len(p.group(2)) for p in parts)
    before, after = (text.replace("{", "{{").replace("}", "}}") for text in (before, after))
    name = f"{before}{{:0{width}d}}{after}"
    if step is None:
        sequence = _with_gaps(name, numbers)
    else:
        sequence = Numbered(len(numbers), name, numbers[0], step)
        _check_step(sequence, numbers)
    there = set(pictures)
    if odd := [name for name in map(sequence.name.format, numbers) if name not in there]:
        raise ValueError(f"numbers with and without zeros in front: expected {odd[0]}; rename the pictures alike")
    return sequence


def _with_gaps(name: str, numbers: Sequence[int]) -> Numbered:
    """Return the sequence that ascending numbers are of, some of which may be missing. Raises ValueError for none."""
    apart = [b - a for a, b in zip(numbers[:-1], numbers[1:], strict=True)]
    if 0 in apart:
        _check_step(Numbered(len(numbers), name, numbers[0], 1), numbers)
    step = math.gcd(*apart) or 1
    count = (numbers[-1] - numbers[0]) // step + 1
    if count > 2 * len(numbers):
        raise ValueError(f"{len(numbers)} pictures whose numbers leave out {count - len(numbers)}: renumber them")
    return Numbered(count, name, numbers[0], step)


def _of_one_suffix(names: Sequence[str]) -> list[str]:
    """Return the pictures among the names. Raises ValueError where there are none, or of more suffixes than one."""
    pictures = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES)]
    others = [name for name in names if name.lower().endswith(OTHER_PICTURE_SUFFIXES)]
    pictures += [name for name in others if re.search(r"[0-9]\.\w+$", name)]  # a cover.gif is no frame
    counts = Counter(os.path.splitext(name)[1] for name in pictures)
    if not counts:
        raise ValueError(f"no pictures; it holds {first_few(sorted(names), 3) or 'nothing'}")
    if len(counts) > 1:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items()))
        raise ValueError(f"pictures of mixed suffixes: {kinds}; convert or rename them alike, or move the others away")
    (suffix,) = counts
    if suffix.lower() in OTHER_PICTURE_SUFFIXES:
        raise ValueError(f"{suffix} pictures are not read, only {' '.join(PICTURE_SUFFIXES)}: convert them")
    return pictures


def _check_step(sequence: Numbered, numbers: Sequence[int]) -> None:
    """Raise ValueError where the ascending numbers do not go up by the step; it names the first that is missing."""
    pairs = list(zip(numbers[:-1], numbers[1:], strict=True))
    steps = {b - a for a, b in pairs}
    if steps <= {sequence.step}:
        return
    if 0 in steps:
        twice = next(a for a, b in pairs if a == b)
        raise ValueError(f"the number {twice} is there twice; a picture of a sequence has a number of its own")
    if len(steps) == 1:
        (step,) = steps
        raise ValueError(
            f"the numbers of its pictures go up by {step}, not {sequence.step}: if none is missing, put {step} into "
            "the column step; frames are then counted, and fps is, of the pictures there are"
        )
    step = sequence.step if sequence.step > 1 else math.gcd(*steps)
    if between := next((n for n in numbers if (n - sequence.first) % step), None):
        raise ValueError(f"picture {sequence.name.format(between)} is not among the numbers that go up by {step}")
    gap = next(a + step for a, b in pairs if b - a > step)
    others = (numbers[-1] - sequence.first) // step - len(numbers)  # no range of them: the numbers may be times
    more = f", and {others} more" if others else ""
    raise ValueError(
        f"picture {sequence.name.format(gap)} is missing{more}; restore or renumber them, or leave the clip out with "
        "--bad_clips"
    )
