"""What a file is that holds no weights, or none that can be read: said by its first bytes, and never by its suffix."""

import codecs
import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from models.weights.container import is_safetensors
from utils.pickles import refused_code
from utils.text import first_few, short_reason

CONVERT_VIVIT = "convert it with other_models/ViViT/ckpt_vivit.py"
_STREAMS, _MAGIC_NUMBER = 5, 0x1950A86A20F9469CFC6C  # pickles of PyTorch before 1.6, what the first of them is
_LINE = 600  # bytes looked at
_MAGIC = (  # first bytes -> what it is and what to do
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, of Keras perhaps; save the weights with torch.save or safetensors"),
    (b"\x1f\x8b", "compressed by gzip; unpack it (gunzip) and give what comes out"),
    (b"BZh", "compressed by bzip2; unpack it (bunzip2) and give what comes out"),
    (b"\xfd7zXZ\x00", "compressed by xz; unpack it (unxz) and give what comes out"),
    (b"\x04\x22\x4d\x18", "compressed by lz4; unpack it (unlz4) and give what comes out"),
    (b"\x78\x9c", "compressed by zlib, as by joblib; unpack it and save the weights with torch.save"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it (unzstd) and give what comes out"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it and give the weights file in it"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it and give the weights file in it"),
    (b"GGUF", "a GGUF file, of llama.cpp; it holds no video model that is known here"),
    (b"\x93NUMPY", "an array of NumPy; save a dictionary of tensors with torch.save"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run `git lfs pull`"),
)


def is_flax(head: bytes) -> bool:
    """Tell whether a file that begins with these 9 bytes is a flax checkpoint: a msgpack map. No pickle does."""
    if not head or is_safetensors(head) or any(head.startswith(magic[: len(head)]) for magic, _ in _MAGIC):
        return False
    return 0x80 < head[0] <= 0x8F or head[0] in (0xDE, 0xDF)


def foreign_kind(file: Path) -> str:
    """Say what a file is that is not read, by its first bytes, and what to do with it; "" of any other file."""
    with file.open("rb") as f:
        head = f.read(_LINE)
    if is_safetensors(head[:9]):
        return ""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for magic, what in _MAGIC:
        if head.startswith(magic) or (magic.isascii() and text.startswith(magic)):
            return f"this is {what}"
    if text[:1] == b"<":
        return "this is an HTML or XML page saved under the name of a checkpoint; download the file itself"
    if head[4:8] == b"ftyp":
        return "this is a video"
    if head[257:262] == b"ustar" or _is_tar(file, head):
        return (
            "this is a tar archive; unpack it (tar -xf) and give the weights file in it. A model saved by PyTorch "
            "before 0.4 is one, too: load and save it again with such a version"
        )
    if text[:1] in (b"{", b"["):
        return "this is JSON, not weights; give the weights file that belongs to it, or their folder"
    if head[:2] == b"PK":
        return _zip_kind(file)
    if is_flax(head[:9]):
        return f"this is a flax checkpoint; if it is ViViT's, {CONVERT_VIVIT}"
    return ""


def _is_tar(file: Path, head: bytes) -> bool:
    """Tell old tar archives, which have no magic, by the checksum of their first header."""
    if len(head) < 512 or not re.fullmatch(rb"[0-7]{4,7}[\0 ]{1,4}", head[148:156]):
        return False
    fields = head[:148] + b" " * 8 + head[156:512]
    return sum(fields) == int(head[148:156].strip(b"\0 "), 8)


def _is_text(head: bytes) -> bool:
    if not all(byte in b"\t\n\r\f" or byte >= 0x20 for byte in head):
        return False
    try:
        head.decode()
    except UnicodeDecodeError as e:
        return e.start > len(head) - 4  # cut within a character
    return True


def _zip_kind(file: Path) -> str:
    """Say what a whole zip is that torch.save did not write; "" for one of torch.save, or a damaged one."""
    try:
        with zipfile.ZipFile(file) as z:
            names = z.namelist()
    except Exception:  # zipfile raises a dozen types, depending on where the bytes go wrong
        return ""
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends or any("/code/" in name for name in names):
        return (
            "this is a TorchScript program, which is refused because it holds code; if you trust it, save its weights: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if "data.pkl" in ends:
        return ""
    if {"version", "byteorder"} <= ends or "serialization_id" in ends:
        return "torch.save began this file and failed: it holds no pickle; save it again"
    if names and all(name.endswith(".npy") for name in names):
        return f"this holds arrays of NumPy ({first_few(names, 3)}); save a dictionary of tensors with torch.save"
    return f"this is a zip of {first_few(names, 3) or 'nothing'}; unpack it and give the weights file in it"


def explain_unreadable(file: Path, error: Exception) -> str:
    """Say why a file that is of no foreign kind cannot be read; `error` is what reading it raised.

    "truncated" is said only where its container ends early.
    """
    if refusal := refused_code(file, error):
        return refusal
    with file.open("rb") as f:
        head = f.read(_LINE)
    if head[:2] != b"PK" and _is_text(head):
        return f"this is text, not weights; it begins {head[:40].decode(errors='replace')!r}"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"this is text, not weights; it begins {head[:80].decode('utf-16', errors='replace')!r}"
    if unknown := re.search(r"unknown variant `(\w+)`", str(error)):
        return f"has tensors of type {unknown[1]}, which this version of safetensors does not know; update it"
    no_reason = "weights_only" in str(error) or not re.search(
        "[a-z]", str(error)
    )  # advice to unpickle all, or a number
    reason = type(error).__name__ if no_reason else short_reason(error)
    what = "truncated" if _ends_early(file, error) else "damaged"
    if head[:2] != b"PK" or what == "truncated":
        what += ", or not a PyTorch checkpoint"
    return f"{what} ({reason}); download or copy it again"


def _ends_early(file: Path, error: Exception) -> bool:
    """Tell whether a container ends before its end: a zip without directory, tensors or a pickle beyond the file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(9)
        if head[:2] == b"PK":
            return not zipfile.is_zipfile(file)
        if is_safetensors(head):
            length = int.from_bytes(head[:8], "little")
            f.seek(8)
            try:
                tensors = json.loads(f.read(length)) if size >= 8 + length else None
                ends = [about["data_offsets"][1] for key, about in tensors.items() if key != "__metadata__"]
                return size < 8 + length + max(ends, default=0)
            except (AttributeError, LookupError, TypeError, ValueError):  # a damaged header
                return size < 8 + length
        if "unexpected EOF" in str(error):
            return True
        f.seek(0)
        return _pickles_end_early(f) or isinstance(error, EOFError)


def _pickles_end_early(f: BinaryIO) -> bool:
    """Tell whether the last of the pickles in a file of PyTorch before 1.6, or the one of another file, is cut."""
    try:
        magic = [argument for _, argument, _ in pickletools.genops(f)]
        for _ in range(_STREAMS - 1 if _MAGIC_NUMBER in magic else 0):
            if not f.peek(1):
                return True
            for _ in pickletools.genops(f):
                pass
    except Exception as e:  # pickletools raises several types where bytes go wrong
        return bool(re.search(r"exhausted|not enough data|remain|no newline|expected", str(e)))
    return False
