"""Splits of one's own: lists of clips of a split, as `python -m datasets.tools.prepare split` writes them.

ROOT/splits/<split>.txt, or where ROOT is a file, <its name without suffix>_<split>.txt beside it. The first line says
of which split of the data set the clips are ("# clips of split all; by source, val 0.2, seed 0"), each other is a name.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path

from datasets.clips import ClipTable, DataError
from datasets.formats.text import first_repeated, read_lines
from utils.text import first_few

logger = logging.getLogger("tad")

_FIRST = re.compile(r"# clips of split ([^\s;]+);.*")


def is_split_name(name: str) -> bool:
    """Tell whether a split of one's own may be called so."""
    return re.fullmatch(r"[\w.-]+", name) is not None


def list_path(root: str, split: str) -> Path:
    """Return where the list of a split is."""
    path = Path(root)
    return path.with_name(f"{path.stem}_{split}.txt") if path.is_file() else path / "splits" / f"{split}.txt"


def list_text(base: str, about: str, names: list[str]) -> str:
    """Return the content of a list. base: the split its clips are of. about: how they were chosen."""
    return "".join(f"{line}\n" for line in (f"# clips of split {base}; {about}", *names))


def base_of(root: str, split: str) -> str | None:
    """Return the split that a list of one's own takes its clips from; None where there is no such list.

    Raises DataError for a list that does not say so.
    """
    path = list_path(root, split)
    if not is_split_name(split) or not path.is_file():
        return None
    first = _FIRST.fullmatch((read_lines(path) or [""])[0])
    if not first:
        raise DataError(
            f"{path}: its first line does not say of which split the clips are; write it with prepare split"
        )
    return first[1]


def of_list(table: ClipTable, root: str, split: str) -> ClipTable:
    """Return the clips of a table that the list of a split names, in the order of the list.

    Raises DataError where the list is empty, repeats a clip or names one that the table does not know.
    """
    path = list_path(root, split)
    names, clips = read_lines(path)[1:], {clip.name: clip for clip in table}
    if not names:
        raise DataError(f"{path}: lists no clips")
    if repeated := first_repeated(names):
        raise DataError(f"{path}: clip {repeated} is listed twice")
    if unknown := set(names) - clips.keys() - table.unreadable.keys() - set(table.left_out):
        raise DataError(f"{path}: not of {table}: {first_few(sorted(unknown))}; write the list anew")
    logger.info(f"{table.name} {split}: {len(names)} clips of split {table.split}, listed in {path}")
    return replace(
        table,
        split=split,
        clips=[clips[name] for name in names if name in clips],
        unreadable={name: why for name, why in table.unreadable.items() if name in set(names)},
        left_out=[name for name in table.left_out if name in set(names)],
    )
