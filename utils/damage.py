"""Damage that files show: zips and JSON by the sums they hold, JSON also by its form and the types of its values."""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from utils.text import short_reason

_SUM = "crc32"  # key of the sum of all else in a JSON object
_BLOCK = 1 << 20  # bytes read at a time
_FOLDER = 0x10  # in the attributes of a zip's member: readers take nothing of its bytes


def stand_in(head: bytes) -> str:
    """Say what a file that begins with `head` is in place of the one that was to be fetched; "" where it is none.

    head: its first 256 bytes or more.
    """
    head = head.lstrip()[:256].lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself; git lfs pull fetches it"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file itself, as servers give out where they refuse one; download it again"
    return ""


def zip_damage(path: Any, leave_out: str = "") -> str:
    """Say what is damaged in a zip, whose members are read once; "" where nothing is.

    Every member has its CRC-32, unless all of these are 0, as where torch.save was told to write none: then only the
    directory of the zip can tell. leave_out: pattern of the names of members that are not read.
    """
    try:
        with zipfile.ZipFile(path) as z:
            has_sums = any(info.CRC for info in z.infolist())
            for info in z.infolist():
                if info.external_attr & _FOLDER and info.file_size:
                    return f"{info.filename} is marked as a folder"
                if has_sums and not (leave_out and re.fullmatch(leave_out, info.filename)):
                    with z.open(info) as f:
                        while f.read(_BLOCK):
                            pass
    except Exception as e:  # zipfile raises a dozen types, depending on where the bytes go wrong
        return short_reason(e)
    return ""


def with_sum(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object, whose keys are strings, with the sum of its content, which `parse_json` checks."""
    return {**record, _SUM: _sum(record)}


def parse_json(text: str | bytes, *, summed: bool = False) -> Any:
    """Return what a text in JSON says, less its sum, which must be right where there is one.

    summed: whether there must be one.

    Raises ValueError: no JSON, not in UTF-8, nested too deeply, another sum.
    """
    try:
        value = json.loads(text)
        if summed and not (isinstance(value, dict) and _SUM in value):
            raise ValueError(f"no object with a {_SUM}")
        if isinstance(value, dict) and _SUM in value and value.pop(_SUM) != _sum(value):
            raise ValueError(f"its content is not what its {_SUM} was made of")
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    return value


def check_types(kind: type, values: Any) -> None:
    """Raise ValueError where `values` are not a dictionary that a dataclass could be made of, by name and type."""
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__} in place of an object")
    hints = _hints(kind)
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if odd := (required - values.keys()) | (values.keys() - hints.keys()):
        raise ValueError(f"{min(odd)} is absent or unknown")
    for name, value in values.items():
        if not _is_of(value, hints[name]):
            raise ValueError(f"{name} is {str(value)[:40]!r}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_of(value: Any, hint: Any) -> bool:
    """Tell whether a value that JSON may hold is of a type; whole numbers do for float."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, parts[0]) for item in value)
    if origin is dict or not parts:
        return hint is Any or type(value) is origin or (hint is float and type(value) is int)
    return any(value is None if part is NoneType else _is_of(value, part) for part in parts)


def _sum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"
