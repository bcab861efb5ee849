"""Which classes and functions a pickle would call, found without unpickling it."""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_NO_CODE = ("torch", "collections", "numpy", "_codecs")  # modules that files of tensors and plain types name
_BUILT_IN = "collections.OrderedDict", "argparse.Namespace"
_STREAMS = 5  # pickles one after another in files from before PyTorch 1.6


def refused_code(path: Path, error: Exception) -> str | None:
    """Return why a file cannot be read that pickles more than tensors and plain types, or None where it does not.

    error: what torch.load(path, weights_only=True) raised.
    """
    named = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error))
    if named and (name := next(filter(None, named.groups()), None)):
        return _refusal([name])
    try:
        names = [name for name in _names(path) if name.partition(".")[0] not in _NO_CODE and name not in _BUILT_IN]
    except Exception:  # pickletools raises several types where bytes go wrong
        return None
    if names:
        return _refusal(names)
    if "Unsupported operand" in str(error):
        return "a whole pickle, but in a protocol that is not read: re-save it with torch.save(weights, NEW_FILE)"
    return None


def _refusal(names: list[str]) -> str:
    return (
        f"it pickles {', '.join(dict.fromkeys(names))}, which is refused because unpickling can run code; if you trust "
        "the file, re-save its weights alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"
    )


def _names(path: Path) -> Iterator[str]:
    """Yield module.name of everything that a file would import. Raises where it is no pickle, or cut short."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in (name for name in archive.namelist() if name.endswith("/data.pkl")):
                with archive.open(member) as stream:
                    yield from _names_in(stream)
        return
    with path.open("rb") as stream:
        yield from _names_in(stream)
        for _ in range(_STREAMS - 1):
            if stream.peek(1)[:1] != b"\x80":
                return
            yield from _names_in(stream)


def _names_in(stream: BinaryIO) -> Iterator[str]:
    strings: list[str] = []  # as they come: the last two are what STACK_GLOBAL takes
    memo: dict[int, str] = {}
    count = 0  # of what was memoised
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif "PUT" in opcode.name or opcode.name == "MEMOIZE":
            memo[count if argument is None else int(argument)] = strings[-1] if strings else ""
            count += 1
        elif "GET" in opcode.name:
            strings.append(memo.get(int(argument), ""))
        elif isinstance(argument, str):
            strings.append(argument)
