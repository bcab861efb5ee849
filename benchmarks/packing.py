"""What packing gains: windows per second that one core loads and bytes on disk, original and packed; a line of JSON.

    python -m datasets.tools.synthetic build/hd --train 6 --val 1 --width 1280 --videos 3
    python -m benchmarks.packing --data_set DoTA videos --data_path build/hd build/hd/videos

Each data set is packed into a temporary folder. Training: random windows of 16 frames at 10 fps, decoded and augmented
as in run_finetune.py. Evaluation: whole clips, each frame decoded once. The same windows from both, in turns, because
machines are noisy; in this process without workers, in CPU seconds, after a warm-up. The bytes are those of the frames.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import ClipTable, DataError, VideoScan, build_clips
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.formats.packed import read_manifest
from datasets.loader import Key, Source, WindowDataset
from datasets.stream import SplitWindows, WindowBatch
from datasets.tools.pack import Settings, pack
from datasets.windows import WindowIndex, index_clips


def train_seconds(dataset: WindowDataset, key: Key) -> float:
    """Return the CPU seconds that a training window takes to load."""
    started = time.process_time()
    dataset[key]
    return time.process_time() - started


def eval_batches(clips: ClipTable, index: WindowIndex, batch_size: int = 64) -> Iterator[WindowBatch]:
    """Yield the windows of a table, uint8, of 224 x 224 pixels. Raises DataError for a clip that cannot be read."""
    for item in SplitWindows(clips, index, EvalTransform(224), batch_size=batch_size).batches(lambda frames: frames):
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


def measure(tables: dict[str, ClipTable], windows: int) -> dict[str, dict[str, float]]:
    """Return {"original", "packed": {"train_windows_per_s", "eval_windows_per_s"}} of the same windows."""
    stride = int(np.lcm.reduce(tables["packed"].pack_steps))
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


def compare(name: str, root: str, settings: Settings, windows: int) -> dict[str, Any]:
    """Pack one data set and measure it and the original; returns what is printed of them."""
    with tempfile.TemporaryDirectory() as folder:
        out, scan = Path(folder, "pack"), VideoScan(Path(folder, "videos.json"), workers=1)
        started = time.perf_counter()
        pack(name, root, out, settings=settings, workers=1)
        seconds = time.perf_counter() - started
        entries = list(read_manifest(out))
        tables = {k: build_clips(name, str(path), "all", scan) for k, path in (("original", root), ("packed", out))}
        result = measure(tables, windows)
    result["original"]["bytes"] = sum(entry.original["size"] for entry in entries)
    result["packed"]["bytes"] = sum(entry.bytes for entry in entries)
    ratios = {k: round(result["packed"][k] / result["original"][k], 3) for k in result["packed"]}
    frames = {
        "frames": int(tables["original"].frame_counts.sum()),
        "frames_packed": sum(entry.frames for entry in entries),
    }
    return {"data_set": name, **vars(settings), "clips": len(entries), **frames, **result, "ratio": ratios,
            "seconds_to_pack": round(seconds, 1)}  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_set", nargs="+", required=True, help="names of data sets")
    parser.add_argument("--data_path", nargs="+", required=True, help="their roots")
    parser.add_argument("--short_side", type=int, nargs="+", default=[320, 256], help="(default: 320 256)")
    parser.add_argument("--fps", type=float, default=10, help="frames per second to keep (default: 10)")
    parser.add_argument("--quality", type=int, default=92, help="of the JPEGs (default: 92)")
    parser.add_argument("--windows", type=int, default=40, help="training windows to time (default: 40)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [
        compare(name, root, Settings(side, args.fps, args.quality), args.windows)
        for name, root in zip(args.data_set, args.data_path, strict=True)
        for side in args.short_side
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
