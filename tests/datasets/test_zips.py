"""Zips read without zipfile: the same members and bytes, and nothing where zipfile has something to say."""

import os
import random
import zipfile

import pytest

from datasets.zips import read_stored, stored_members


def write(path, *, names=("000000.jpg", "000001.jpg", "sub/a.png"), method=zipfile.ZIP_STORED, comment=b"", **options):
    rng = random.Random(0)
    with zipfile.ZipFile(path, "w", method, **options) as z:
        for i, name in enumerate(names):
            z.writestr(name, rng.randbytes(1000 * i + 5))
        z.comment = comment
    return path


def read_all(path):
    """{name: bytes, or None}; None where zipfile is to be asked."""
    with open(path, "rb") as f:
        members = stored_members(f.fileno())
        return members and {name: read_stored(f.fileno(), name, member) for name, member in members.items()}


def test_members_and_bytes_are_zipfile_s(tmp_path):
    path = write(tmp_path / "a.zip")
    with zipfile.ZipFile(path) as z:
        assert read_all(path) == {name: z.read(name) for name in z.namelist()}


def test_extra_fields_and_streamed_members(tmp_path):
    """As Info-ZIP and streaming writers leave them: other lengths in the header before a member, sizes after it."""
    path = tmp_path / "b.zip"
    with path.open("wb") as f, zipfile.ZipFile(Unseekable(f), "w") as z:
        for i in range(3):
            info = zipfile.ZipInfo(f"{i}.jpg")
            info.extra = bytes.fromhex("555409000300000000") + bytes(
                4 + 90 * i
            )  # a time stamp, and more than is read along
            z.writestr(info, bytes([i]) * 500)
    found = read_all(path)
    assert found["0.jpg"] == bytes(500) and found["1.jpg"] in (bytes([1]) * 500, None) and len(found) == 3


class Unseekable:
    def __init__(self, file):
        self.write, self.flush = file.write, file.flush


@pytest.mark.parametrize(
    "options",
    [{"method": zipfile.ZIP_DEFLATED}, {"comment": b"hello"}, {"names": ("stra\u00dfe.jpg",)}],
    ids=["compressed", "comment", "another alphabet"],
)
def test_zipfile_is_to_be_asked(tmp_path, options):
    assert read_all(write(tmp_path / "c.zip", **options)) is None


def test_damage_is_never_taken_for_content(tmp_path):
    """Every flipped byte leads to nothing, an entry of another name, or the right bytes."""
    path = write(tmp_path / "d.zip", names=("0.jpg", "1.jpg"))
    whole, right = path.read_bytes(), read_all(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        for name, content in (read_all(path) or {}).items():
            assert content is None or content == right.get(name)
    for length in range(len(whole)):
        os.truncate(path, 0)
        path.write_bytes(whole[:length])
        assert read_all(path) is None
