"""Zips whose members are stored as they are, as those of pictures are: a quarter of zipfile's time for a window.

Where anything is out of the ordinary (compression, encryption, 64-bit sizes, comments, names in other alphabets,
damage) nothing is said, and zipfile is to be asked: it reads more, or says what is wrong.
"""

import os
import struct
import zlib
from typing import NamedTuple

_END = struct.Struct("<4s6xHIIH")  # of the directory: signature; members; its size and offset; length of a comment
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")  # of a member: signature, flags, method, CRC, sizes, lengths, offset
_LOCAL = struct.Struct("<4s22xHH")  # before a member: signature, lengths of name and extra field
_EXTRA = 64  # bytes of an extra field that are read along
_ENCRYPTED, _UNKNOWN = 0x1, 0xFFFFFFFF


class Member(NamedTuple):
    """Where a member of a zip is: its bytes begin after a header at `offset`."""

    offset: int
    size: int
    crc: int


def stored_members(fd: int) -> dict[str, Member] | None:
    """Return the members of an open zip by name; None where zipfile is to be asked."""
    end = os.fstat(fd).st_size - _END.size
    if end < 0:
        return None
    signature, count, size, offset, comment = _END.unpack(os.pread(fd, _END.size, end))
    if signature != b"PK\5\6" or comment or offset + size != end:
        return None
    directory, place, members = os.pread(fd, size, offset), 0, {}
    while place + _ENTRY.size <= len(directory):
        signature, flags, method, crc, packed, whole, name, extra, note, start = _ENTRY.unpack_from(directory, place)
        place += _ENTRY.size
        text = directory[place : place + name]
        if signature != b"PK\1\2" or flags & _ENCRYPTED or method or packed != whole or _UNKNOWN in (whole, start):
            return None
        if not text.isascii():
            return None
        members[text.decode()] = Member(start, whole, crc)
        place += name + extra + note
        count -= 1
    return members if not count and place == len(directory) else None


def read_stored(fd: int, name: str, member: Member) -> bytes | None:
    """Return the bytes of a member; None where they, or what stands before them, are damaged."""
    data = os.pread(fd, _LOCAL.size + len(name) + _EXTRA + member.size, member.offset)
    if len(data) < _LOCAL.size:
        return None
    signature, length, extra = _LOCAL.unpack_from(data)
    start = _LOCAL.size + length + extra
    content = data[start : start + member.size]
    if signature != b"PK\3\4" or data[_LOCAL.size : _LOCAL.size + length] != name.encode():
        return None
    return content if len(content) == member.size and zlib.crc32(content) == member.crc else None
