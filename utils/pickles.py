"""Which classes and functions a pickle would call, found without unpickling it."""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.text import first_few

_NO_CODE = ("torch", "collections", "numpy", "_codecs")  # modules that files of tensors and plain types name
_BUILT_IN = "collections.OrderedDict", "argparse.Namespace"
# What files hold beside weights that does no harm where it is not called; see models.weights.plain.
HARMLESS = re.compile(
    r"numpy\.(dtype|ndarray|(_?core\.)?(multiarray|numeric|_multiarray_umath)\.(scalar|_reconstruct|_frombuffer))"
    r"|numpy\.(_core|core)\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)|numpy\.dtypes\.\w+|numpy\.(str_|bytes_)"
    r"|numpy\.(float|int|uint|complex|bool)\d*_?|numpy\.random\._pickle\.__\w+_ctor"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|datetime\.(datetime|date|time|timedelta|timezone)|uuid\.(UUID|SafeUUID)"
    r"|collections\.(deque|defaultdict|Counter|ChainMap)|argparse\.Namespace|types\.SimpleNamespace"
    r"|decimal\.Decimal|fractions\.Fraction|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|frozenset|list|dict|tuple|int|float|str|bool|complex|bytes|bytearray|x?range|slice|Ellipsis)"
    # what trainers keep their settings and their log in: dictionaries under another name
    r"|(pytorch_lightning|lightning|lightning_fabric)\.[\w.]+\.AttributeDict|easydict\.EasyDict|yacs\.config\.CfgNode"
    r"|omegaconf\.[\w.]+\.\w+|typing\.Any|mmengine\.config\.config\.ConfigDict|addict\.addict\.Dict"
    r"|mmengine\.logging\.history_buffer\.HistoryBuffer"
)
_STREAMS = 5  # pickles one after another in files from before PyTorch 1.6


def refused_code(path: Path, error: Exception) -> str | None:
    """Return why a file cannot be read that pickles more than tensors and plain types, or None where it does not.

    error: what torch.load(path, weights_only=True) raised.
    """
    try:
        named, is_whole = list(named_in(path)), True
    except Exception:  # pickletools raises several types where bytes go wrong
        named, is_whole = [], False
    modules = [name for name in named if name.startswith("torch.nn.modules.")]
    if names := [name for name in named if not _is_data(name)] + modules:
        return _refusal(names)
    told = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error))
    if told and (name := next(filter(None, told.groups()), None)):
        return _refusal([name])
    if is_whole and "Unsupported operand" in str(error):
        return "a whole pickle, but in a protocol that is not read: re-save it with torch.save(weights, NEW_FILE)"
    return None


def _is_data(name: str) -> bool:
    return name.partition(".")[0] in _NO_CODE or name in _BUILT_IN or bool(HARMLESS.fullmatch(name))


def _refusal(names: list[str]) -> str:
    read = "torch.load(FILE, weights_only=False)"
    remedy = f"torch.save({read}['model'], NEW_FILE)"
    if any(name.startswith("torch.nn.modules.") for name in names):  # a module was saved, not its weights
        remedy = f"torch.save(MODULE.state_dict(), NEW_FILE), where MODULE is what {read} holds"
    return (
        f"it pickles {first_few(dict.fromkeys(names))}, which is refused because unpickling can run code; if you trust "
        f"the file, re-save its weights alone: {remedy}"
    )


def named_in(path: Path) -> Iterator[str]:
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
