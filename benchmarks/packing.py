"""What packing gains: bytes on disk and the time to decode a window's pictures; a line of JSON for each data set.

    python -m datasets.tools.synthetic build/hd --train 6 --val 1 --width 1280 --videos 3
    python -m benchmarks.packing --data_set DoTA videos --data_path build/hd build/hd/videos

Each data set is packed into temporary folders, one for each --short_side and --squash. 16 pictures of each are decoded
in memory, those of all packs in turns, because machines are noisy; CPU seconds of this process, after a warm-up.
"""

import io
import itertools
import json
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from datasets import ClipTable, build_clips
from datasets.formats.packed import read_manifest
from datasets.tools.pack import Settings, pack
from utils.cli import Parser, frame_rate_or_0, percent, pixels_or_0

DECODERS = {
    "pillow": lambda data: np.array(Image.open(io.BytesIO(data))),
    "simplejpeg": simplejpeg.decode_jpeg,
}
ROUNDS = 15  # of decoding, of which the median counts


def stored_jpegs(clips: ClipTable) -> Iterator[bytes]:
    """Yield the pictures of a pack."""
    for clip in clips:
        with zipfile.ZipFile(f"{clip.source}.zip") as z:
            yield from map(z.read, z.namelist())


def decode_ms(packs: Mapping[str, ClipTable]) -> dict[str, dict[str, float]]:
    """Return {pack: {"pillow_ms", "simplejpeg_ms"}}, the CPU ms that 16 frames take to decode; all in turns."""
    jpegs = {k: list(itertools.islice(stored_jpegs(clips), 16)) for k, clips in packs.items()}
    spent: dict[tuple[str, str], list[float]] = {pair: [] for pair in itertools.product(packs, DECODERS)}
    for _ in range(ROUNDS + 1):
        for (pack_name, decoder), seconds in spent.items():
            started = time.process_time()
            for data in jpegs[pack_name]:
                DECODERS[decoder](data)
            seconds.append((time.process_time() - started) * 16 / len(jpegs[pack_name]))
    return {k: {f"{d}_ms": round(1e3 * float(np.median(spent[k, d][1:])), 2) for d in DECODERS} for k in packs}


def compare(name: str, root: str, packs: Sequence[Settings]) -> dict[str, Any]:
    """Pack one data set in several ways; returns what is printed of the packs."""
    tables, about = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for settings in packs:
            key, out = str(settings), Path(folder, str(settings))
            started = time.perf_counter()
            pack(name, root, out, settings=settings, workers=1)
            seconds = time.perf_counter() - started
            entries = list(read_manifest(out))
            totals = {k: sum(getattr(entry, k) for entry in entries) for k in ("frames", "bytes")}
            each = {"kb_per_frame": round(totals["bytes"] / totals["frames"] / 1e3, 2)}
            about[key] = {**asdict(settings), **totals, **each, "seconds_to_pack": round(seconds, 1)}
            tables[key] = build_clips(name, str(out), "all")
        decoding = decode_ms(tables)
    original = {"clips": len(entries), "bytes": sum(entry.original["size"] for entry in entries)}
    return {"data_set": name, "original": original, "packs": [about[key] | decoding[key] for key in about]}


def main() -> None:
    """Run the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data_set", nargs="+", required=True, help="names of data sets")
    parser.add_argument("--data_path", nargs="+", required=True, help="their roots")
    parser.add_argument("--short_side", type=pixels_or_0, nargs="+", default=[320, 256], help="(default: 320 256)")
    parser.add_argument("--squash", type=pixels_or_0, nargs="+", default=[0, 320, 224], help="(default: 0 320 224)")
    parser.add_argument("--fps", type=frame_rate_or_0, default=10, help="frames per second to keep (default: 10)")
    parser.add_argument("--quality", type=percent, default=92, help="of the JPEGs (default: 92)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    packs = [Settings(s, args.fps, args.quality, w) for s, w in itertools.product(args.short_side, args.squash)]
    for name, root in zip(args.data_set, args.data_path, strict=True):
        print(json.dumps(compare(name, root, packs)), flush=True)


if __name__ == "__main__":
    main()
