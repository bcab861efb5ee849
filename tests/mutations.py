"""Damage as disks, networks, editors and people do it: seeded mutations of bytes, of text and of JSON."""

import json
import random
import re

NUMBERS = ("-1", "0", "1.5", "1e308", "1e400", "-1e400", "NaN", "Infinity", "nan", "inf", "9" * 20, "9" * 5000, "")
VALUES = (
    *(None, True, -1, 0, 1.5, 1e308, float("inf"), float("nan"), 10**30, [], {}, "", "x", "\ud800", "\0", "../x"),
    *([[]], [None], {"x": 1}, "9" * 400, "9" * 5000, "{0.__class__}", "{:0999999999d}"),
)


def flip(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def replace(data, rng):
    for _ in range(rng.choice((1, 1, 8))):
        data[rng.randrange(len(data))] = rng.randrange(256)


def run(data, rng):
    """A run of zeros, of one byte or of noise."""
    size, start = rng.choice((2, 16, 100, 4096)), rng.randrange(len(data))
    end = min(start + size, len(data))
    data[start:end] = rng.choice((bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)))


def insert(data, rng):
    data[(at := rng.randrange(len(data))) : at] = rng.randbytes(rng.choice((1, 4, 100)))


def remove(data, rng):
    del data[(at := rng.randrange(len(data))) : at + rng.choice((1, 4, 100, 4096))]


def truncate(data, rng):
    del data[rng.randrange(len(data)) :]


def duplicate(data, rng):
    at, size = rng.randrange(len(data)), rng.choice((16, 512, 4096))
    data[at:at] = data[at : at + size]


def swap(data, rng):
    size = rng.choice((16, 512, 4096))
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    if a + size <= b:
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def extreme(data, rng):
    """A number of 2, 4 or 8 bytes becomes the smallest, the largest or minus one."""
    size, at = rng.choice((2, 4, 8)), rng.randrange(len(data))
    number = rng.choice((bytes(size), b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), b"\x80" + bytes(size - 1)))
    data[at : at + size] = rng.choice((number, number[::-1]))


def number(data, rng):
    if found := list(re.finditer(rb"-?\d+(\.\d+)?", data)):
        place = rng.choice(found)
        data[place.start() : place.end()] = rng.choice(NUMBERS).encode()


def lines(data, rng):
    """Lines swapped, given twice, taken away, joined, or of another system."""
    parts = bytes(data).split(b"\n")
    a, b = rng.randrange(len(parts)), rng.randrange(len(parts))
    kind = rng.randrange(5)
    if kind == 0:
        parts[a], parts[b] = parts[b], parts[a]
    elif kind == 1:
        parts.insert(a, parts[b])
    elif kind == 2:
        del parts[a]
    data[:] = {3: b"", 4: b"\r\n"}.get(kind, b"\n").join(parts)


def character(data, rng):
    odd = (
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b'"',
        b",",
        b"\xef\xbb\xbf",
        b"/",
        b"../",
        b"\r",
        b"\x1c",
        "\u2028".encode(),
    )
    data[(at := rng.randrange(len(data))) : at] = rng.choice(odd)


def value(data, rng):
    """A value of a JSON object, or of a line of such, becomes one of another type or size, or is nested too deeply."""
    parts = bytes(data).split(b"\n")
    at = rng.choice([i for i, part in enumerate(parts) if part] or [0])
    try:
        if len(parts) > 2 and parts[0].endswith(b"}"):  # a line for each record
            whole = json.loads(parts[at])
        else:
            whole, parts = json.loads(data), None
    except (ValueError, RecursionError):  # damaged before
        return
    if not whole or not isinstance(whole, dict | list):
        return
    if isinstance(whole, dict) and rng.random() < 0.8:
        whole.pop("crc32", None)  # as an older version wrote it
    node = whole
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    if isinstance(node, dict) and rng.random() < 0.1:
        del node[key]
    else:
        node[key] = rng.choice((*VALUES, "DEEP"))
    text = json.dumps(whole).encode().replace(b'"DEEP"', b"[" * 100_000 + b"]" * 100_000)
    data[:] = text if parts is None else b"\n".join([*parts[:at], text, *parts[at + 1 :]])


BYTES = (flip, flip, replace, run, insert, remove, truncate, duplicate, swap, extreme)
TEXT = (*BYTES, number, number, number, lines, lines, character, character, value, value, value, value)


def mutated(data: bytes, seed: str, kinds=BYTES) -> bytes:
    """The data with one seeded mutation, of one in ten seeds with two more; never empty input."""
    rng, result = random.Random(seed), bytearray(data)
    for _ in range(3 if rng.random() < 0.1 else 1):
        if result:
            rng.choice(kinds)(result, rng)
    return bytes(result)
