"""Exported files: how they are told apart, the record that each of them holds, and the sum of what it was made with.

    FILE.onnx           the record is the entry "spec" of its metadata_props
    FILE.pt2            of torch.export.save: an extra file, spec.json
    FILE.safetensors    the entry "spec" of its metadata
    FILE.spec.json      the same record beside each of them, for other programs to read
    spec.json           the record of a folder for transformers, whose sum is that of its tensors

A record is the spec of the weights file, and under "export" what `export_record` says, the SHA-256 of all else in the
file with it, by which a file with another weight is found; it has a sum of its own. Nothing here runs, unpickles or
needs what a file holds.
"""

import hashlib
import json
import mmap
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from utils.damage import parse_json, with_sum
from utils.text import short_reason

ONNX, PROGRAM, SAFETENSORS = "onnx", "torch_export", "safetensors"
SUFFIXES = {ONNX: ".onnx", PROGRAM: ".pt2", SAFETENSORS: ".safetensors"}
_AGAIN = "export it again: python -m models.export WEIGHTS --to"
_IR_VERSION = b"\x08"  # the first byte of an ONNX file: its first field, a number
_PRODUCER = 0x12  # the third: its second field, text
_METADATA = 14  # the field of ONNX's ModelProto
_PARTS = {  # ONNX's messages that hold tensors: field -> message
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_ELSEWHERE = 13  # the field of a tensor that says in which other file its values are
_EXTRA = re.compile(r"[^/]+/extra/spec\.json|extra_files/spec\.json")  # from PyTorch 2.8 on, before
_OF_THE_COPY = re.compile(r"[^/]+/\.data/serialization_id")


class ExportedFileError(ValueError):
    """An exported file that cannot be used; the message says what is wrong and the remedy, and the caller the file."""


def is_safetensors(head: bytes) -> bool:
    """Tell whether a file that begins with these 9 bytes is one: the length of a JSON header, and the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def kind_of(path: Path) -> str | None:
    """Return the kind of an exported file by what it holds; None for another file, or one that cannot be read."""
    try:
        with path.open("rb") as f:
            head = f.read(9)
    except OSError:
        return None
    if is_safetensors(head):
        return SAFETENSORS
    if head[:2] == b"PK":
        return PROGRAM if _is_program(path) else None
    is_onnx = head[:1] == _IR_VERSION and (head[2:3] == bytes([_PRODUCER]) or path.suffix == SUFFIXES[ONNX])
    return ONNX if is_onnx else None


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as z:
            return any(re.fullmatch(r"[^/]+/models/[^/]+|serialized_exported_program\.json", n) for n in z.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def export_record(spec: Mapping[str, Any], *, kind: str, batch: str, tolerance: float, sha256: str) -> str:
    """Return the record of an exported file as text in JSON.

    batch: "dynamic" or "1". tolerance: within which its logits are those of the weights. sha256: see `sum_of`.
    """
    made_by = {"format": kind, "batch": batch, "tolerance": tolerance, "torch": str(torch.__version__)}
    return json.dumps(with_sum({**spec, "export": {**made_by, "sha256": sha256}}), indent=2) + "\n"


def beside(path: Path) -> Path:
    """Return the file that holds an exported file's record for other programs."""
    return path.with_name(f"{path.name}.spec.json")


def read_record(path: Path, kind: str, *, check: bool = True) -> dict[str, Any] | None:
    """Return the record of an exported file, or None for a safetensors file without one.

    check: compare the sum of the content, for which the file is read whole.

    Raises ExportedFileError: a damaged file, one without a record, whose content has changed, or beside which stands
    another record.
    """
    inside = _parsed(_READ[kind](path), "its spec")
    outside = _parsed(beside(path).read_bytes(), beside(path).name) if beside(path).is_file() else None
    record = inside or outside
    if record is None and kind != SAFETENSORS:
        raise ExportedFileError(f"this {kind} file has no spec, so it is not of `python -m models.export`; {_AGAIN} "
                                f"{kind}")  # fmt: skip
    if record is None:
        return None
    if outside and (other := [key for key in {**record, **outside} if record.get(key) != outside.get(key)]):
        raise ExportedFileError(
            f"{beside(path).name} beside it says {other[0]} = {outside.get(other[0])!r}, the file itself "
            f"{record.get(other[0])!r}; {_AGAIN} {kind}"
        )
    if check and sum_of(path, kind) != record["export"]["sha256"]:
        raise ExportedFileError(
            f"its content has changed since it was exported: it is not what its SHA-256 was made of; {_AGAIN} {kind}"
        )
    return record


def check_folder(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a safetensors file with the sum in the record of its folder, where it has one.

    Raises ExportedFileError where they have changed since the folder was exported, or the record is damaged.
    """
    file = path.with_name("spec.json")
    if path.name != "model.safetensors" or not file.is_file():
        return
    try:
        record = parse_json(file.read_bytes())
        export = record["export"] if isinstance(record, dict) and "export" in record else {}
        expected = export["sha256"] if export and export["format"] == "hf" else None  # else another code's
    except (ValueError, KeyError, TypeError) as e:
        raise ExportedFileError(f"{file.name} beside it is damaged ({short_reason(e)}); copy it again") from e
    if expected is not None and sum_of_tensors(tensors) != expected:
        raise ExportedFileError(
            f"its content has changed since it was exported: it is not what the SHA-256 in {file.name} was made of; "
            f"{_AGAIN} hf (or remove {file.name}, if that was on purpose)"
        )


def _parsed(text: str | bytes | None, name: str) -> dict[str, Any] | None:
    """Return a record from its text. Raises ExportedFileError where it is none."""
    if text is None:
        return None
    try:
        record = parse_json(text)
    except ValueError as e:
        raise ExportedFileError(f"{name} is damaged, or was changed by hand ({e}); copy it again") from e
    export = record.get("export") if isinstance(record, dict) else None
    if not isinstance(export, dict) or not isinstance(export.get("sha256"), str) or "batch" not in export:
        raise ExportedFileError(f"{name} does not say what was exported; {_AGAIN} onnx, torch_export or safetensors")
    return record


def sum_of(path: Path, kind: str) -> str:
    """Return the SHA-256, in hexadecimal, of all that an exported file holds but its record.

    Raises ExportedFileError for a damaged file.
    """
    digest = hashlib.sha256()
    for part in _CONTENT[kind](path):
        digest.update(part)
    return digest.hexdigest()


def sum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for part in _bytes_of(tensors):
        digest.update(part)
    return digest.hexdigest()


def _bytes_of(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


# ----------------------------------------------------------------------------------------------------------------------
# safetensors


def _safetensors_record(path: Path) -> str | None:
    with safe_open(path, "pt") as f:
        text = (f.metadata() or {}).get("spec")
    return text if text and '"export"' in text else None  # another code's has another


def _safetensors_content(path: Path) -> Iterator[Any]:
    with safe_open(path, "pt") as f:
        for name in sorted(f.keys()):
            yield from _bytes_of({name: f.get_tensor(name)})


# ----------------------------------------------------------------------------------------------------------------------
# torch.export: a zip


def _opened_program(path: Path) -> zipfile.ZipFile:
    """Open a zip that unpacks to no more than it is. Raises ExportedFileError for another."""
    z = zipfile.ZipFile(path)
    if any(info.compress_type != zipfile.ZIP_STORED for info in z.infolist()):
        z.close()
        raise ExportedFileError(f"it is compressed, as no file of torch.export is; {_AGAIN} {PROGRAM}")
    return z


def _program_record(path: Path) -> str | None:
    with _opened_program(path) as z:
        found = [name for name in z.namelist() if _EXTRA.fullmatch(name)]
        return z.read(found[0]).decode() if len(found) == 1 else None


def _program_content(path: Path) -> Iterator[bytes]:
    try:
        with _opened_program(path) as z:
            for name in sorted(z.namelist()):
                if not _EXTRA.fullmatch(name) and not _OF_THE_COPY.fullmatch(name):
                    yield f"{name.partition('/')[2] or name}\n".encode()
                    yield z.read(name)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as e:
        raise ExportedFileError(f"damaged ({e}); copy it again") from e


def add_program_record(path: Path, record: str) -> None:
    """Add a record to a file of torch.export.save."""
    with zipfile.ZipFile(path, "a") as z:
        first = z.namelist()[0]
        name = "extra_files/spec.json" if "/" not in first else f"{first.split('/')[0]}/extra/spec.json"
        z.writestr(name, record)


# ----------------------------------------------------------------------------------------------------------------------
# ONNX: a message in the encoding of protobuf, read as far as is needed here (protobuf.dev/programming-guides/encoding)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None, memoryview]]:
    """Yield (field number, its bytes or None where it is a number, the bytes with its tag) of a message.

    Raises ExportedFileError where the bytes are not one.
    """
    at = 0
    while at < len(data):
        start = at
        tag, at = _number(data, at)
        value, size = None, 0
        if tag & 7 == 0:
            _, at = _number(data, at)
        elif tag & 7 == 2:
            size, at = _number(data, at)
            value = data[at : at + size]
        elif tag & 7 in (1, 5):
            size = struct.calcsize("<q" if tag & 7 == 1 else "<i")
        else:
            raise ExportedFileError("damaged, or not an ONNX file; copy it again")
        at += size
        if at > len(data):
            raise ExportedFileError("truncated; copy it again")
        yield tag >> 3, value, data[start:at]


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number in base 128 that begins here, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ExportedFileError("truncated; copy it again")


def _onnx_record(path: Path) -> str | None:
    for number, value, _ in _onnx_fields(path):
        if number == _METADATA and value is not None:
            entry = {key: bytes(text) for key, text, _ in _fields(value) if text is not None}
            if entry.get(1) == b"spec":
                return entry.get(2, b"").decode()
    return None


def _onnx_content(path: Path) -> Iterator[memoryview]:
    for number, _, whole in _onnx_fields(path):
        if number != _METADATA:
            yield whole


def _onnx_fields(path: Path) -> Iterator[tuple[int, memoryview | None, memoryview]]:
    with path.open("rb") as f:
        yield from _fields(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)))


def reads_elsewhere(data: bytes) -> bool:
    """Tell whether an ONNX file takes values of tensors from other files. Raises ExportedFileError for another file."""
    return _reads_elsewhere(memoryview(data), "model")


def _reads_elsewhere(data: memoryview, message: str) -> bool:
    if message == "tensor":
        return any(number == _ELSEWHERE for number, _, _ in _fields(data))
    parts = _PARTS[message]
    return any(_reads_elsewhere(value, parts[n]) for n, value, _ in _fields(data) if n in parts and value is not None)


_READ = {ONNX: _onnx_record, PROGRAM: _program_record, SAFETENSORS: _safetensors_record}
_CONTENT = {ONNX: _onnx_content, PROGRAM: _program_content, SAFETENSORS: _safetensors_content}
