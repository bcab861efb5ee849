"""What packing gains: bytes on disk, decoding, windows per second that one core loads; a line of JSON per data set.

    python -m datasets.tools.synthetic build/hd --train 6 --val 1 --width 1280 --videos 3
    python -m benchmarks.packing --data_set DoTA videos --data_path build/hd build/hd/videos

Each data set is packed into temporary folders, one for each --short_side and --squash. Training: random windows of 16
frames at 10 fps, decoded and augmented as in run_finetune.py. Evaluation: whole clips, each frame decoded once. To
decode: 16 JPEGs in memory. The same windows and frames from all, in turns, because machines are noisy; in this process
without workers, in CPU seconds, after a warm-up. The bytes are those of the frames.
"""

import argparse
import io
import itertools
import json
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from datasets import ClipTable, DataError, VideoScan, build_clips
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.formats.packed import read_manifest
from datasets.loader import Key, Source, WindowDataset
from datasets.stream import SplitWindows, WindowBatch
from datasets.tools.pack import Settings, pack
from datasets.windows import WindowIndex, index_clips

DECODERS = {
    "pillow": lambda data: np.array(Image.open(io.BytesIO(data))),
    "simplejpeg": simplejpeg.decode_jpeg,
}
ROUNDS = 15  # of decoding, of which the median counts


def train_seconds(dataset: WindowDataset, key: Key) -> float:
    """Return the CPU seconds that a training window takes to load."""
    started = time.process_time()
    dataset[key]
    return time.process_time() - started


def eval_batches(clips: ClipTable, index: WindowIndex, batch_size: int = 64) -> Iterator[WindowBatch]:
    """Yield the windows of a table, of 224 x 224 pixels. Raises DataError for a clip that cannot be read."""
    for item in SplitWindows(clips, index, EvalTransform(224), batch_size=batch_size):
        if isinstance(item, WindowBatch):
            yield item
        elif not item.frames:
            raise DataError(str(item))


def eval_seconds(clips: ClipTable, number: int, stride: int) -> float:
    """Return the CPU seconds that all windows of a clip take to load."""
    table = replace(clips, clips=[clips[number]])
    index = WindowIndex(table.frame_counts, src_fps=table.fps, num_frames=16, view_fps=10, stride=stride)
    started = time.process_time()
    for _ in eval_batches(table, index):
        pass
    return time.process_time() - started


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


def measure(tables: Mapping[str, ClipTable], windows: int) -> dict[str, dict[str, float]]:
    """Return {table: {"train_windows_per_s", "eval_windows_per_s"}} of the same windows of original and packs."""
    stride = int(np.lcm.reduce(np.concatenate([table.pack_steps for table in tables.values()])))
    indices = {k: index_clips(t, num_frames=16, view_fps=10, stride=stride) for k, t in tables.items()}
    datasets = {
        k: WindowDataset([Source(t, indices[k], FinetuneTransform(224))], seed=0, targets=False)
        for k, t in tables.items()
    }
    total = len(indices["original"])
    drawn = np.random.default_rng(0).choice(total, size=windows, replace=windows > total).tolist()
    spent = {k: {"train": 0.0, "eval": 0.0} for k in tables}
    for k in tables:
        train_seconds(datasets[k], (0, 0, drawn[0], drawn[0]))
    for window in drawn:
        for k in tables:
            spent[k]["train"] += train_seconds(datasets[k], (0, 0, window, window))
    for number in np.flatnonzero(indices["original"].counts).tolist():
        for k, table in tables.items():
            spent[k]["eval"] += eval_seconds(table, number, stride)
    return {
        k: {
            "train_windows_per_s": round(windows / s["train"], 2),
            "eval_windows_per_s": round(total / s["eval"], 2),
        }
        for k, s in spent.items()
    }


def compare(name: str, root: str, packs: Sequence[Settings], windows: int) -> dict[str, Any]:
    """Pack one data set in several ways and measure them and the original; returns what is printed of them."""
    with tempfile.TemporaryDirectory() as folder:
        scan = VideoScan(Path(folder, "videos.json"), workers=1)
        tables, about = {"original": build_clips(name, root, "all", scan)}, {}
        for settings in packs:
            key, out = str(settings), Path(folder, str(settings))
            started = time.perf_counter()
            pack(name, root, out, settings=settings, workers=1)
            seconds = time.perf_counter() - started
            entries = list(read_manifest(out))
            totals = {k: sum(getattr(entry, k) for entry in entries) for k in ("frames", "bytes")}
            each = {"kb_per_frame": round(totals["bytes"] / totals["frames"] / 1e3, 2)}
            about[key] = {**asdict(settings), **totals, **each, "seconds_to_pack": round(seconds, 1)}
            tables[key] = build_clips(name, str(out), "all", scan)
        rates, decoding = measure(tables, windows), decode_ms({k: tables[k] for k in about})
    original = {"bytes": sum(entry.original["size"] for entry in entries)} | rates["original"]
    for k, entry in about.items():
        entry |= decoding[k] | rates[k]
        entry["ratio"] = {key: round(entry[key] / original[key], 3) for key in original}
    counts = {"clips": len(tables["original"]), "frames": int(tables["original"].frame_counts.sum())}
    return {"data_set": name, **counts, "original": original, "packs": list(about.values())}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_set", nargs="+", required=True, help="names of data sets")
    parser.add_argument("--data_path", nargs="+", required=True, help="their roots")
    parser.add_argument("--short_side", type=int, nargs="+", default=[320, 256], help="(default: 320 256)")
    parser.add_argument("--squash", type=int, nargs="+", default=[0, 320, 224], help="(default: 0 320 224)")
    parser.add_argument("--fps", type=float, default=10, help="frames per second to keep (default: 10)")
    parser.add_argument("--quality", type=int, default=92, help="of the JPEGs (default: 92)")
    parser.add_argument("--windows", type=int, default=40, help="training windows to time (default: 40)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    packs = [Settings(s, args.fps, args.quality, w) for s, w in itertools.product(args.short_side, args.squash)]
    for name, root in zip(args.data_set, args.data_path, strict=True):
        print(json.dumps(compare(name, root, packs, args.windows)), flush=True)


if __name__ == "__main__":
    main()
