"""Pieces of messages: the first few of many names, the short reason of an error, names to write or show."""

import difflib
import unicodedata
from collections.abc import Iterable

_BREAKING = ("Cc", "Zl", "Zp")  # categories of characters: control characters and line breaks
_LONGEST = 400  # characters of an item: a damaged file may have a name of megabytes


def first_few(items: Iterable[object], limit: int = 5, sep: str = ", ") -> str:
    """Join the first items: "a, b, c"; where there are more than `limit`: "a, b, ... (7 in all)".

    Long ones lose their middle: a reason stands at the end.
    """
    half, items = _LONGEST // 2, [one_line(str(item)) for item in items]
    items = [text if len(text) <= _LONGEST else f"{text[:half]}...{text[-half:]}" for text in items]
    return sep.join(items[:limit]) + (f"{sep}... ({len(items)} in all)" if len(items) > limit else "")


def unicode_name(name: str) -> str:
    """Return a name with escapes for what is not Unicode, as the names of files may have: "a\\udcff.mp4"."""
    return name.encode(errors="backslashreplace").decode()


def not_utf8(path: str) -> str:
    """Say that PyTorch opens no file of a name that is not in UTF-8; "" where it is."""
    name = unicode_name(path)
    return "" if name == path else f"{name}: its name is not in UTF-8, and PyTorch opens no other: rename it"


def one_line(name: str) -> str:
    """Return a name with escapes for what is not Unicode, and for control characters, line breaks and tabs among them.

    So it can stand in a log and in a list of names. Letters of any language stay.
    """
    letters = unicode_name(name)
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _BREAKING else c for c in letters)


def short_reason(error: BaseException, limit: int = 120) -> str:
    """Return the first line of what an error says, cut to `limit` characters, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def printable(name: str) -> str:
    """Return a name in one line, with escapes for what is not Unicode or cannot be seen, as what turns text around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in unicode_name(name))


def label_of(name: str, limit: int = 60) -> str:
    """Return a name as a picture can show it: `printable`, its middle cut."""
    name = printable(name)
    if len(name) <= limit:
        return name
    return f"{name[: (limit - 3) // 2]}...{name[len(name) - (limit - 2) // 2 :]}"


def closest(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean DoTA?" with the known name nearest to a wrong one, capitals aside; "" if none is near."""
    by_letters = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_letters, n=1, cutoff=0.75)
    return f", did you mean {by_letters[near[0]]}?" if near else ""
