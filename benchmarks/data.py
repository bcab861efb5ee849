"""Items per second that one core loads, ours beside the published way, which takes turns with it.

    python -m benchmarks.data [--json] [--data build/benchmark] [--video FILE] [--workers 1 2]

The data is made here: 1280 x 720 zips in DoTA's layout, an H.264 video, packs of both. What is measured is all that a
reading process does for a window: reading, decoding, shrinking, drawing, and the message to the process that trains;
with "_cpu" also the augmentation that a GPU does elsewhere. Each way has a process of its own and one thread; they take
turns with the same windows. CPU seconds, medians over rounds. The yardstick of packs is the published
way on the originals.

With --workers also batches per wall second of whole loaders with so many processes.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _yardstick
from benchmarks._common import (
    Way,
    add_data_flags,
    against,
    comparison,
    in_turns,
    parser_of,
    print_results,
    single_thread,
    table,
)
from benchmarks._data_sets import Recipe, make
from datasets import ClipTable, DataError, VideoScan, build_clips
from datasets.augment.dapt import PretrainTransform
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.batches import BatchLoader
from datasets.chunks import ClipStream
from datasets.faults import Fault
from datasets.loader import EpochSampler, Source, Transform, WindowDataset
from datasets.parallel import _dumps
from datasets.windows import WindowIndex, index_clips
from utils.cli import processes

CHUNK = 64  # frames that evaluation reads at a time
VIDEO_STEP = 3  # from 30 frames per second to 10


def table_of(roots: dict[str, str], name: str) -> tuple[ClipTable, WindowIndex]:
    """Return the clips of a data set of `make`, and their windows of 16 frames at 10 per second."""
    videos = name == "mp4" or name.startswith("dapt")
    scan = VideoScan(Path(roots["mp4"]).parent / "videos.json", workers=1)
    clips = build_clips("videos" if videos else "DoTA", roots[name], "all", scan)
    return clips, index_clips(clips, num_frames=16, view_fps=10, stride=VIDEO_STEP if videos else 1)


def training_set(roots: dict[str, str], name: str, **options: Any) -> WindowDataset:
    """Return the training windows of a data set, for fine-tuning or, of videos, for DAPT. options: of the transform."""
    clips, index = table_of(roots, name)
    if name == "mp4" or name.startswith("dapt"):
        transform: Transform = PretrainTransform(
            _yardstick.SIZE, grid=(8, 14, 14), mask_ratio=0.75, short_side=_yardstick.SHORT_SIDE, **options
        )
        return WindowDataset([Source(clips, index, transform)], seed=0, targets=False)
    return WindowDataset([Source(clips, index, FinetuneTransform(_yardstick.SIZE, **options))], seed=0, targets=True)


def loading(dataset: WindowDataset, together: int = 1) -> Way:
    """Return what a reading process does for the window of a number. together: with so many, --windows_per_read."""
    places = torch.zeros(together, *dataset.shape, dtype=torch.uint8)
    (source,) = dataset.sources
    apart = source.index.windows_apart

    def load(window: int) -> int:
        first = max(0, min(window, len(source.index) - 1 - (together - 1) * apart))
        windows = range(first, len(source.index), apart)[:together]
        for sample in dataset.fill_together([(0, 0, i, i) for i in windows], list(places[: len(windows)])):
            if isinstance(sample, Fault):
                raise DataError(str(sample))
            _dumps(("result", sample))
        return len(windows)

    return load


def finetune_ways(roots: dict[str, str]) -> dict[str, Way]:
    """Return the ways of fine-tuning, the yardstick first."""
    yardstick = _yardstick.Yardstick()
    clips, index = table_of(roots, "zips")

    def finetune(window: int) -> int:
        number, frames = index[window]
        yardstick.finetune(f"{clips[number].source}.zip", [clips[number].filename(i) for i in frames])
        return 1

    ways = {"yardstick": finetune, "finetune_zips": loading(training_set(roots, "zips", here=False))}
    for decoding in ("full", "exact"):
        ways[f"finetune_zips_{decoding}"] = loading(training_set(roots, "zips", here=False, decoding=decoding))
    ways |= {f"finetune_{name}": loading(training_set(roots, name, here=False)) for name in ("pack", "squashed")}
    ways |= {f"finetune_{name}_cpu": loading(training_set(roots, name, here=True)) for name in ("zips", "pack")}
    return ways


def dapt_ways(roots: dict[str, str]) -> dict[str, Way]:
    """Return the ways of DAPT, the yardstick first."""
    yardstick = _yardstick.Yardstick()
    videos, index = table_of(roots, "mp4")

    def dapt(window: int) -> int:
        number, frames = index[window]
        yardstick.dapt(videos[number].source, frames.tolist())
        return 1

    names = ("mp4", "dapt_pack", "dapt_squashed")
    ways = {"yardstick": dapt}
    ways |= {f"dapt_{name.removeprefix('dapt_')}": loading(training_set(roots, name, here=False)) for name in names}
    ways["dapt_mp4_4windows"] = loading(training_set(roots, "mp4", here=False), together=4)
    return ways


def evaluation_ways(roots: dict[str, str], windows: int) -> dict[str, Way]:
    """Return the ways of evaluation, the yardstick first. windows: of the yardstick a clip."""
    yardstick, rng = _yardstick.Yardstick(), np.random.default_rng(1)
    clips, index = table_of(roots, "zips")

    def alone(number: int) -> int:
        clip = clips[number]
        for last in rng.choice(index.last_frames(number), size=windows):
            names = [clip.filename(i) for i in index.frames(number, last)]
            yardstick.evaluation(f"{clip.source}.zip", names)
        return windows

    def streamed(number: int) -> int:
        stream = ClipStream(clips, index, EvalTransform(_yardstick.SIZE), chunk_frames=CHUNK)
        stream.share = [number]
        for chunk in stream:
            if isinstance(chunk, Fault):
                raise DataError(str(chunk))
        return int(index.counts[number])

    return {"yardstick": alone, "evaluation": streamed}


def measure(roots: dict[str, str], *, rounds: int, windows: int) -> dict[str, Any]:
    """Return what `against` says of each way of loading."""
    results: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for ways, name in ((finetune_ways, "zips"), (dapt_ways, "mp4")):
        numbers = rng.integers(len(table_of(roots, name)[1]), size=(rounds, windows)).tolist()
        seconds = in_turns(partial(ways, roots), numbers)
        results |= {way: against(spent, seconds["yardstick"]) for way, spent in seconds.items() if way != "yardstick"}
    clips, _ = table_of(roots, "zips")
    seconds = in_turns(partial(evaluation_ways, roots, windows), [[i % len(clips)] for i in range(rounds)])
    return results | {"evaluation": against(seconds["evaluation"], seconds["yardstick"])}


def workers_rates(dataset: WindowDataset, counts: list[int], *, seconds: float, rounds: int) -> dict[int, float]:
    """Return the windows per wall second of loaders with so many reading processes, medians; they take turns."""
    sampler = EpochSampler([len(dataset.sources[0].index)], batch_sizes=[4])
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            loader = BatchLoader(dataset, sampler, num_workers=count)
            started, windows = None, 0
            while started is None or time.perf_counter() - started < seconds:
                for batch in loader:
                    if started is None:  # all processes are at work
                        started = time.perf_counter()
                        continue
                    windows += len(batch["samples"])
                    if time.perf_counter() - started >= seconds:
                        break
            rates[count].append(windows / (time.perf_counter() - started))
            loader.close()
    return {count: round(float(np.median(values)), 2) for count, values in rates.items()}


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__)
    add_data_flags(parser)
    parser.add_argument("--workers", type=processes, nargs="+", default=[], help="processes, e.g. 1 2 (default: none)")
    args = parser.parse_args()
    single_thread()
    with tempfile.TemporaryDirectory() as folder:
        roots = make(Path(args.data or folder), Recipe(args.video, tuple(args.size)))
        results = measure(roots, rounds=args.rounds, windows=args.windows)
        text = f"Items per second and core, {args.rounds} rounds of {args.windows} windows in turns, one thread:\n\n"
        text += comparison(results)
        if not _yardstick.HAS_DECORD:
            text += "\n\ndecord is not installed: the yardstick of DAPT decodes with PyAV, at full size."
        if args.workers:
            dataset = training_set(roots, "zips", here=False)
            rates = workers_rates(dataset, args.workers, seconds=5, rounds=args.rounds)
            first = rates[args.workers[0]]
            results["workers"] = {str(n): {"ours": r, "ratio": round(r / first, 2)} for n, r in rates.items()}
            rows = [{"processes": n, "windows/s": r, "ratio": r / first} for n, r in rates.items()]
            text += f"\n\nWhole loaders on the zips, wall seconds:\n\n{table(rows)}"
    print_results(text, results, as_json=args.json)


if __name__ == "__main__":
    main()
