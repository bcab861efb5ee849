"""Time the decoding of windows from a video file, PyAV beside decord where that is installed.

    python -m benchmarks.decoding --video FILE [--windows 30]

A window is 16 frames at 10 fps, at a random place; opening the file is part of it, as in training. Both take turns on
the same windows, in one thread, as in a loading process. Prints JSON: CPU milliseconds per window, median and
quartiles, of decord, of datasets.video that sees the file for the first time in its process, and of one that has its
index. The last line has the largest mean difference of their pictures, over a window.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from statistics import quantiles

import numpy as np
import torch

from datasets import video_index
from datasets.video import Video

SPAN = 16


def read_decord(path: str, ids: Sequence[int]) -> np.ndarray:
    """Return uint8 (len(ids), H, W, 3)."""
    import decord

    return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1).get_batch(list(ids)).asnumpy()


def read_known(path: str, ids: Sequence[int]) -> np.ndarray:
    """Return uint8 (len(ids), H, W, 3)."""
    video = Video(path)
    frames = video.read(ids).numpy()
    video.close()
    return frames


def read_new(path: str, ids: Sequence[int]) -> np.ndarray:
    """Return uint8 (len(ids), H, W, 3); the packets of the file are read, too."""
    video_index.forget()
    return read_known(path, ids)


def _seconds(read: Callable, path: str, ids: Sequence[int]) -> tuple[float, np.ndarray]:
    started = time.process_time()
    frames = read(path, ids)
    return time.process_time() - started, frames


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", required=True, help="the file")
    parser.add_argument("--windows", type=int, default=30, help="how many (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the places (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"pyav, new": read_new, "pyav, index known": read_known}
    try:
        import decord  # noqa: F401

        ways = {"decord": read_decord} | ways
    except ImportError:
        pass
    video, rng = Video(args.video), random.Random(args.seed)
    count, step = len(video), video.fps / 10
    video.close()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    differ = []
    for _ in range(args.windows):
        first = rng.randrange(max(1, count - int(SPAN * step)))
        ids = [min(count - 1, first + int(i * step)) for i in range(SPAN)]
        results = {}
        for name, read in ways.items():
            seconds, results[name] = _seconds(read, args.video, ids)
            spent[name].append(1000 * seconds)
        frames = list(results.values())
        differ.append(max(float(np.abs(frames[0].astype(np.int16) - f).mean()) for f in frames[1:]))
    for name, values in spent.items():
        low, median, high = quantiles(values, n=4)
        print(json.dumps({"way": name, "ms": round(median, 1), "quartiles": [round(low, 1), round(high, 1)]}))
    print(json.dumps({"video": args.video, "frames": count, "largest_mean_difference": round(max(differ), 2)}))


if __name__ == "__main__":
    main()
