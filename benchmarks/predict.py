"""Scores per second of a recorded video, ours beside two ways people write by hand.

    python -m benchmarks.predict [--json] [--video FILE] [--model vit_small_patch16_224] [--seconds 3] [--strides 1 3]

"each window" decodes, shrinks and normalises the frames of every window for itself. "window by window" decodes each
frame once, keeps the frames of a window, and runs the model on one window at a time. All three score the same windows
of the first seconds of a video with the same model (random weights; "none" looks at one frame) and must agree, which
is checked. In one thread, CPU seconds, each way in a process of its own, in turns, medians over rounds.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._common import Way, against, comparison, in_turns, parser_of, print_results, single_thread
from benchmarks.evaluate import NoModel
from datasets import Clip, open_clip
from datasets.augment.frames import EvalTransform
from datasets.tools.synthetic import render_videos, write_video
from datasets.video import Video
from models import create_model
from run_predict import VideoScorer
from utils.cli import positive, wait


def beginning(video: str, seconds: float, folder: Path) -> str:
    """Write the first seconds of a video, or of a rendered road of 720 lines, as H.264; return where."""
    if not video:
        render_videos(folder / "road", count=1, size=(1280, 720))
        (video,) = map(str, (folder / "road").iterdir())
    source = Video(video)
    frames = [frame.numpy() for frame in source.frames(range(min(len(source), round(seconds * source.fps))))]
    path = folder / "beginning.mp4"
    write_video(path, frames, size=frames[0].shape[1::-1], fps=round(source.fps), crf="23")
    return str(path)


def ways_of(path: str, model: str, stride: int) -> dict[str, Way]:
    """Return the three ways, by name; each returns how many scores it made."""
    torch.manual_seed(0)
    network = (NoModel() if model == "none" else create_model(model)).eval()
    spec = {"num_frames": 16, "view_fps": 10, "input_size": 224} if model == "none" else network.spec
    scorer = VideoScorer(network, spec, stride=stride, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        clips = scorer.find([path], Path(folder, "videos.json"))
    index, transform = scorer.index(clips), EvalTransform(spec["input_size"])
    (result,) = (result for _, result in scorer.results(clips))

    def ours(_: int) -> int:
        return sum(len(result.curve.score) for _, result in scorer.results(clips))

    def by_hand(videos: Iterator[Tensor]) -> int:
        with torch.inference_mode():
            scores = [float(network(video).softmax(1)[0, 1]) for video in videos]
        if not np.allclose(scores, result.curve.score, atol=1e-5):
            raise RuntimeError("the ways do not agree")
        return len(scores)

    windows = [index[i][1] for i in range(len(index))]
    return {
        "ours": ours,
        "each window": lambda _: by_hand(each_window(clips[0], windows, transform, network)),
        "window by window": lambda _: by_hand(window_by_window(clips[0], windows, transform, network)),
    }


def each_window(clip: Clip, windows: list[np.ndarray], transform: EvalTransform, model: nn.Module) -> Iterator[Tensor]:
    """Yield (1, 3, T, S, S) normalised of every window, read for itself."""
    for ids in windows:
        with open_clip(clip) as reader:
            frames = transform(reader.read(ids))
        yield model.normalize(frames.transpose(0, 1)[None])


def window_by_window(
    clip: Clip, windows: list[np.ndarray], transform: EvalTransform, model: nn.Module
) -> Iterator[Tensor]:
    """Yield (1, 3, T, S, S) normalised of every window, of frames that are read once, in order."""
    needed, kept = np.unique(windows), {}
    with open_clip(clip) as reader:
        frames = zip(needed.tolist(), reader.frames(needed), strict=True)
        for ids in windows:
            while ids[-1] not in kept:
                number, frame = next(frames)
                kept[number] = transform([frame])[0]
            yield model.normalize(torch.stack([kept[i] for i in ids.tolist()], 1)[None])
            kept = {number: frame for number, frame in kept.items() if number > ids[0]}


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--video", default="", help="video to score the beginning of (default: a rendered road)")
    parser.add_argument("--model", default="vit_small_patch16_224", help="model to run, or none")
    parser.add_argument("--seconds", type=wait, default=3.0, help="of the video (default: 3)")
    parser.add_argument("--strides", type=positive, nargs="+", default=[1, 3], help="steps between scores in frames")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds to take the median of (default: 3)")
    args = parser.parse_args()
    single_thread()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = beginning(args.video, args.seconds, Path(folder))
        for stride in args.strides:
            seconds = in_turns(partial(ways_of, path, args.model, stride), [[0]] * args.rounds)
            for name in ("each window", "window by window"):
                results[f"stride {stride}, beside {name}"] = against(seconds["ours"], seconds[name])
    text = f"Scores per second, {args.model}, {args.rounds} rounds in turns, one thread:\n\n{comparison(results)}"
    print_results(text, results, as_json=args.json)


if __name__ == "__main__":
    main()
