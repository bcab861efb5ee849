"""Windows per second that one core loads, in training and in evaluation; prints a line of JSON.

    python -m datasets.tools.synthetic build/hd --train 6 --val 1 --width 1280
    python benchmarks/data_loading.py --data_path build/hd

Training: random windows, decoded, padded, squashed and augmented as in run_finetune.py. Evaluation: whole clips, each
frame decoded once; beside it the same windows each read on its own, as the published code does. Everything in this
process without workers, in CPU seconds, after a warm-up; the two evaluations take turns, because machines are noisy.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from datasets import build_clips
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.loader import EpochSampler, Source, WindowDataset
from datasets.readers import open_clip
from datasets.stream import ClipStream, window_batches
from datasets.windows import WindowIndex


def main() -> None:
    """Command line."""
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
    dataset[keys[0]]
    started = time.process_time()
    for key in keys:
        dataset[key]
    training = len(keys) / (time.process_time() - started)

    transform = EvalTransform(224)
    stream = ClipStream(clips, index, transform, chunk_frames=64)
    streamed, alone, windows = 0.0, 0.0, 0
    for number in stream.share:
        stream.share = [number]
        started = time.process_time()
        windows += sum(len(batch.last) for batch in window_batches(stream, index, batch_size=64, device="cpu"))
        streamed += time.process_time() - started
        started = time.process_time()
        for last in index.last_frames(number):
            with open_clip(clips[number]) as reader:
                transform(reader.frames(index.frames(number, last)))
        alone += time.process_time() - started
    print(
        json.dumps(
            {
                "train_windows_per_s": round(training, 2),
                "eval_windows_per_s": round(windows / streamed, 2),
                "eval_each_window_alone_per_s": round(windows / alone, 2),
                "eval_ratio": round(alone / streamed, 2),
                "eval_windows": windows,
                "mean_clip_frames": round(float(np.mean(clips.frame_counts)), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
