"""Time the decoding of windows from a video file, PyAV beside decord where that is installed.

    python -m benchmarks.decoding --video FILE [--windows 30]

A window is 16 frames at 10 fps, at a random place; opening the file is part of it, as in training. All take turns on
the same windows, in one thread, as in a loading process. Prints JSON: CPU milliseconds per window, median and
quartiles, of

- decord, full size;
- pyav, full size: with the index of the file known, new to the process, and decoding also what nothing refers to;
- pyav, shrunk to a short side of 320: by OpenCV (as published) and by swscale in one pass with the conversion to RGB;
- pyav, 4 windows that start within 2 or 10 seconds, shrunk by OpenCV: from 4 openings and from one.

The last line has the largest mean difference of full-size pictures, over a window, and the mean PSNR of those that
swscale shrank to those that OpenCV did. On H.264 of 720p, GOP 30 and 250, skipping gave 1.18 and 1.33, swscale 0.97.
"""

import importlib.util
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import quantiles

import cv2
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from datasets import video_index
from datasets.video import Video
from datasets.video_rgb import ONE_THREAD
from utils.cli import Parser, natural, positive

SPAN = 16
SHORT = 320


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


def read_all(path: str, ids: Sequence[int]) -> np.ndarray:
    """Return uint8 (len(ids), H, W, 3), decoded without leaving pictures out."""
    video = Video(path)
    video._index = replace(video._index, may_skip=False)
    frames = video.read(ids).numpy()
    video.close()
    return frames


def _small(height: int, width: int) -> tuple[int, int]:
    """Return the (width, height) whose short side is SHORT."""
    scale = SHORT / min(height, width)
    return int(width * scale), round(height * scale)


def shrink(path: str, ids: Sequence[int]) -> list[np.ndarray]:
    """Return pictures uint8 (h, w, 3) of frames in ascending order, shrunk by OpenCV."""
    video = Video(path)
    frames = [cv2.resize(f.numpy(), _small(*f.shape[:2]), interpolation=cv2.INTER_LINEAR) for f in video.frames(ids)]
    video.close()
    return frames


def shrink_swscale(path: str, ids: Sequence[int]) -> list[np.ndarray]:
    """Return what shrink does, by swscale; upright only where the video is stored so."""
    reformatter = VideoReformatter()

    def convert(frame):
        size = _small(frame.height, frame.width)
        picture = reformatter.reformat(frame, *size, "rgb24", interpolation="BILINEAR", **ONE_THREAD)
        return torch.from_numpy(picture.to_ndarray())

    video = Video(path)
    video._to_rgb = convert
    frames = [f.numpy() for f in video.frames(ids)]
    video.close()
    return frames


def _psnr(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    square = np.mean([((a.astype(np.float32) - b) ** 2).mean() for a, b in zip(ours, theirs, strict=True)])
    return float(10 * np.log10(255**2 / max(square, 1e-9)))


def main() -> None:
    """Run the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--video", required=True, help="the file")
    parser.add_argument("--windows", type=positive, default=30, help="how many (default: 30)")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the places (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    full = {"known": read_known, "new": read_new, "nothing skipped": read_all}
    if importlib.util.find_spec("decord"):
        full = {"decord": read_decord} | full
    ways = full | {"320, OpenCV": shrink, "320, swscale": shrink_swscale}
    video, rng = Video(args.video), random.Random(args.seed)
    count, step, fps = len(video), video.fps / 10, video.fps
    video.close()
    spent: dict[str, list[float]] = {}
    differ, psnr = [], []

    def timed(name: str, read: Callable, windows: int = 1):
        started = time.process_time()
        frames = read()
        spent.setdefault(name, []).append(1000 * (time.process_time() - started) / windows)
        return frames

    def window(first: int) -> list[int]:
        return [min(count - 1, first + int(i * step)) for i in range(SPAN)]

    for _ in range(args.windows):
        first = rng.randrange(max(1, count - int(SPAN * step)))
        results = {name: timed(name, partial(read, args.video, window(first))) for name, read in ways.items()}
        frames = [results[name] for name in full]
        differ.append(max(float(np.abs(frames[0].astype(np.int16) - f).mean()) for f in frames[1:]))
        psnr.append(_psnr(results["320, OpenCV"], results["320, swscale"]))
        for seconds in (2, 10):
            ids = [window(first + rng.randrange(int(seconds * fps))) for _ in range(4)]
            together = sorted(set().union(*ids))
            timed(f"4 within {seconds} s, 4 openings", lambda ids=ids: [shrink(args.video, i) for i in ids], 4)
            timed(f"4 within {seconds} s, 1 opening", partial(shrink, args.video, together), 4)
    for name, values in spent.items():
        low, median, high = quantiles(values, n=4)
        print(json.dumps({"way": name, "ms": round(median, 1), "quartiles": [round(low, 1), round(high, 1)]}))
    found = {"largest_mean_difference": round(max(differ), 2), "swscale_psnr": round(float(np.mean(psnr)), 1)}
    print(json.dumps({"video": args.video, "frames": count} | found))


if __name__ == "__main__":
    main()
