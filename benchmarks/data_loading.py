"""Windows per second that one core loads, in training and in evaluation; prints a line of JSON.

    python -m datasets.tools.synthetic build/hd --train 6 --val 1 --width 1280
    python -m benchmarks.data_loading --data_path build/hd

Training: random windows, decoded, padded, squashed and augmented as in run_finetune.py. Evaluation: whole clips, each
frame decoded once; beside it the same windows each read on its own, as the published code does. Everything in this
process without workers, in CPU seconds, after a warm-up; the two evaluations take turns, because machines are noisy.
"""

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch

from benchmarks.packing import eval_batches
from datasets import ClipTable, build_clips
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.loader import EpochSampler, Key, Source, WindowDataset
from datasets.readers import open_clip
from datasets.windows import WindowIndex


def train_seconds(dataset: WindowDataset, key: Key) -> float:
    """Return the CPU seconds that a training window takes to load."""
    started = time.process_time()
    dataset[key]
    return time.process_time() - started


def eval_seconds(clips: ClipTable, number: int, stride: int) -> float:
    """Return the CPU seconds that all windows of a clip take to load."""
    table = replace(clips, clips=[clips[number]])
    index = WindowIndex(table.frame_counts, src_fps=table.fps, num_frames=16, view_fps=10, stride=stride)
    started = time.process_time()
    for _ in eval_batches(table, index):
        pass
    return time.process_time() - started


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="root of a DoTA-layout data set")
    parser.add_argument("--data_set", default="DoTA", help="its name (default: DoTA)")
    parser.add_argument("--windows", type=int, default=40, help="training windows to time (default: 40)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clips = build_clips(args.data_set, args.data_path, "train")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=16, view_fps=10)

    dataset = WindowDataset([Source(clips, index, FinetuneTransform(224))], seed=0, targets=True)
    keys = [key for batch in EpochSampler([len(index)], batch_sizes=[1]) for key in batch]
    keys = [keys[i % len(keys)] for i in range(args.windows)]
    train_seconds(dataset, keys[0])
    training = len(keys) / sum(train_seconds(dataset, key) for key in keys)

    transform, streamed, alone = EvalTransform(224), 0.0, 0.0
    for number in np.flatnonzero(index.counts).tolist():
        streamed += eval_seconds(clips, number, stride=1)
        started = time.process_time()
        for last in index.last_frames(number):
            with open_clip(clips[number]) as reader:
                transform(reader.frames(index.frames(number, last)))
        alone += time.process_time() - started
    result = {
        "train_windows_per_s": round(training, 2),
        "eval_windows_per_s": round(len(index) / streamed, 2),
        "eval_each_window_alone_per_s": round(len(index) / alone, 2),
        "eval_ratio": round(alone / streamed, 2),
        "eval_windows": len(index),
        "mean_clip_frames": round(float(np.mean(clips.frame_counts)), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
