"""Score any video with a fine-tuned model: its risk curve, events, an overlay, and a report over all videos.

The weights file says which model it is of, how that is fed and what counts as an event; nothing else is to be given:
    python run_predict.py dashcam.mp4 /data/trips --weights runs/videomae_s_dota/checkpoint-best_auroc.pth \\
        --output_dir runs/risk

Files are shared over processes, on N GPUs (Slurm: see jobs/predict.sh); the same command goes on where one stopped:
    torchrun --standalone --nproc_per_node=N run_predict.py ...the same flags...

In Python:
    from run_predict import load_scorer
    scorer = load_scorer("weights.pth")
    curve = scorer("clip.mp4")
    curve.plot("curve.png")

It is a research tool, not a safety device.
"""

from utils.exits import fail, report_uncaught

if __name__ == "__main__":  # first, so that what follows is answered in a line
    report_uncaught()

from utils.cli import ConfigError, config_errors
from utils.files import check_writable
from utils.lock import end_with_torchrun, folder_lock
from utils.predict_flags import OUTPUTS, predict_parser
from utils.record import differing, read_run_record, write_run_record
from utils.resolve import common_flags, leave_gpus_alone
from utils.signals import EXIT_CODE, MARKER, Preempted, catch_signals, first_signal, remove_marker, stop_requested

if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = predict_parser(__doc__).parse_args()
    leave_gpus_alone(ARGS.device)
    catch_signals()
    end_with_torchrun()

import logging
import tempfile
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datasets import Clip, ClipTable, DataError, VideoScan, load_inputs, open_clip
from datasets.augment.frames import EvalTransform
from datasets.readers import Reader, VideoReader
from datasets.slots import reserve
from datasets.stream import SplitWindows
from datasets.windows import WindowIndex
from engine.curve import Gap, RiskCurve, Thumbnail
from engine.evaluate import EvaluationError, Scorer
from engine.events import EventRule
from engine.optim import DTYPES
from engine.overlay import OverlayError, write_overlay
from engine.prediction import (
    BYTES_OF_A_SCORE,
    VideoResult,
    fingerprint,
    load_result,
    rule_by,
    save_result,
    stamp,
)
from engine.summary import peak_frames, write_summary
from models import classifier_of, load
from models.weights import CheckpointError, fetch
from utils.distributed import Process, ended_together, from_main, local_main_first, process_group, require_same
from utils.logging import setup_logging
from utils.text import first_few

ERRORS = (CheckpointError, ConfigError, DataError, EvaluationError, OverlayError)
logger = logging.getLogger("tad")


@dataclass(frozen=True)
class VideoScorer:
    """Scores videos with a model. A score at time t is made of frames up to t alone.

    model: a classifier on its device. spec: of its weights file.
    rule: that makes events of scores; None = no events.
    stride: step between scores in frames of the video.
    warm_up: whether scores begin on the first frame, with windows that repeat it, instead of on the first full window.
    assume_fps: frame rate of zips and folders of pictures.
    dtype: of autocast; float32 turns it off.
    batch_size: windows of a forward pass at most.
    num_workers: reading processes; 0: this one.
    read_timeout: seconds without a picture read after which a video counts as unreadable.
    """

    model: nn.Module
    spec: dict[str, Any]
    rule: EventRule | None = None
    stride: int = 1
    warm_up: bool = False
    assume_fps: float = 30.0
    dtype: torch.dtype = torch.float32
    batch_size: int = 64
    num_workers: int = 2
    read_timeout: float = 60.0
    pin_memory: bool = False

    def __call__(self, path: str | Path) -> RiskCurve:
        """Return the curve of one video: a file, or a zip or folder of pictures.

        Raises DataError where it is none, cannot be read or is too short, EvaluationError for scores that are not
        finite.
        """
        with tempfile.TemporaryDirectory() as folder:
            clips = self.find([str(path)], Path(folder, "videos.json"))
        if len(clips) != 1:
            raise DataError(f"{path}: {len(clips)} videos; give one, or use run_predict.py for many")
        (result,) = (result for _, result in self.results(clips))
        if result.problem:
            raise DataError(result.problem)
        return result.curve

    def find(self, paths: Sequence[str], scan_cache: str | Path) -> ClipTable:
        """Return the videos of files, folders and lists. Raises DataError where there are none."""
        scan = VideoScan(scan_cache, workers=max(self.num_workers, 1), read_timeout=self.read_timeout)
        return load_inputs(paths, scan, self.assume_fps)

    def results(self, clips: ClipTable, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, VideoResult]]:
        """Yield (number of a clip, its result) of this rank's share of clips, each as soon as it is scored."""
        index = self.index(clips)
        for number in index.short_clips[rank::world_size].tolist():
            seconds = index.spans[number] / clips[number].fps
            reason = f"shorter than a window, which takes {seconds:.3g} s; --warm_up repeat scores it"
            yield number, VideoResult(clips[number].name, problem=f"{clips[number].source}: {reason}")
        windows = SplitWindows(
            clips,
            index,
            EvalTransform(self.spec["input_size"]),
            device=next(self.model.buffers()).device,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            allow_missing=True,
            read_timeout=self.read_timeout,
            across_clips=False,  # so that a video is complete when its last window is read
            gaps=True,
        )
        reserve(windows.slots)
        for scores in Scorer(windows, self.dtype).by_clip(self.model):
            clip, end = clips[scores.clip], scores.end
            gaps = tuple(Gap(gap.first / clip.fps, gap.end / clip.fps, gap.reason) for gap in end.gaps)
            warming_up = index.warming_up(scores.clip, scores.frame)
            curve = RiskCurve(
                clip.name, clip.fps, clip.num_frames, scores.frame, scores.score, warming_up, self.rule, gaps
            )
            if len(scores.frame):
                yield scores.clip, VideoResult(clip.name, curve)
            else:
                yield scores.clip, VideoResult(clip.name, problem=f"{clip.source}: {_reason(end)}")

    def index(self, clips: ClipTable) -> WindowIndex:
        """Return the windows of clips: anchored at the beginning, so that the future decides nothing."""
        return WindowIndex(
            clips.frame_counts,
            src_fps=clips.fps,
            num_frames=self.spec["num_frames"],
            view_fps=self.spec["view_fps"],
            stride=self.stride,
            forward=True,
            warm_up=self.warm_up,
        )


def _reason(end: Any) -> str:
    if end.fault:
        return end.fault.reason
    return "; ".join(gap.reason for gap in end.gaps) or "no window can be scored"


def load_scorer(weights: str | Path, *, device: str | None = None, **options: Any) -> VideoScorer:
    """Return the scorer of a weights file: `scorer("clip.mp4")` returns a RiskCurve.

    Args:
        weights: file or URL of a fine-tuned model, which has a spec.
        device: "cuda" or "cpu"; None: cuda where there is one.
        options: fields of VideoScorer.

    Raises CheckpointError: an unreadable file, one without a spec, or of a masked autoencoder.
    """
    model, spec = load(str(weights))
    if classifier_of(spec["model"]) != spec["model"] or len(spec["classes"]) != 2:
        raise CheckpointError(f"{weights}: {spec['model']} with classes {spec['classes']} gives no risk; fine-tune it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.setdefault("rule", rule_by(spec, {}))
    return VideoScorer(model.to(device), spec, **options)


def main(args: Namespace) -> None:
    """Score the videos of the command line, or a live source."""
    resolve(args)
    timeout = timedelta(minutes=args.dist_timeout)
    joined = process_group(args.device, timeout=timeout, expected=ERRORS, same=common_flags(args))
    with joined as process, ExitStack() as held:
        setup_logging(process.rank)
        from_main(lambda: held.enter_context(folder_lock(args.output_dir)))
        require_same(common_flags(args))
        predict(args, process)


def resolve(args: Namespace) -> None:
    """Fill what was left open, and refuse what does not go together."""
    args.write = args.write.split(",")
    if unknown := set(args.write) - set(OUTPUTS):
        raise ConfigError(f"--write {','.join(sorted(unknown))}: unknown; known are {', '.join(OUTPUTS)}")
    if not args.inputs:
        raise ConfigError("no video is given: name files or folders")
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    args.pin_mem = args.pin_mem and args.device == "cuda"
    args.scan_cache = args.scan_cache or str(Path(args.output_dir, "videos.json"))


def build_scorer(args: Namespace, process: Process) -> VideoScorer:
    """Return the scorer of the command line, on this process's device."""
    with local_main_first(process):  # one download per node
        path = fetch(args.weights)
    scorer = load_scorer(
        path,
        device=str(process.device),
        stride=args.stride,
        warm_up=args.warm_up == "repeat",
        assume_fps=args.assume_fps,
        dtype=DTYPES[args.precision],
        batch_size=args.eval_batch_size,
        num_workers=args.num_workers,
        read_timeout=args.read_timeout,
        pin_memory=args.pin_mem,
    )
    given = {
        "threshold": args.threshold,
        "alert_after": args.alert_after,
        "gap": args.event_gap,
        "min_duration": args.event_min_duration,
        "rise": args.smooth_rise,
        "fall": args.smooth_fall,
    }
    with config_errors():
        return replace(scorer, rule=rule_by(scorer.spec, given))


def predict(args: Namespace, process: Process) -> None:
    """Score what is not scored yet, draw what is not drawn, and write the report over all."""
    scorer, output_dir = build_scorer(args, process), Path(args.output_dir)
    if process.is_main:
        remove_marker(output_dir)
        say_what_it_rests_on(scorer)
    args.fingerprint = fingerprint(scorer.model)  # of the weights, so that args.json holds it
    clips = from_main(lambda: begin(args, scorer, process))
    of = {name: getattr(args, name) for name in ("fingerprint", "stride", "warm_up", "assume_fps", "precision")}
    writer = Writer(output_dir, clips, {*args.write, *(["explain"] if args.explain else [])}, of, scorer)
    with ended_together(), marked_if_stopped(output_dir):
        done = from_main(lambda: {number: result for number in range(len(clips)) if (result := writer.known(number))})
        if done:
            logger.info(f"{len(done)} of {len(clips)} videos are scored already")
        for number in sorted(done)[process.rank :: process.world_size]:
            writer.write(number, done[number])
        to_do = [number for number in range(len(clips)) if number not in done]
        rest = replace(clips, clips=[clips[number] for number in to_do], unreadable={})
        for place, result in scorer.results(rest, process.rank, process.world_size) if to_do else ():
            writer.write(to_do[place], result)
    if process.is_main:
        summarize(clips, writer, args.write)


@contextmanager
def marked_if_stopped(output_dir: Path) -> Iterator[None]:
    """Leave the sign for the job's launcher that the same command goes on, where a signal stops the body."""
    try:
        yield
    except Preempted:
        logger.info(f"stopped on {first_signal()}; the same command goes on with the videos that are not written yet")
        (output_dir / MARKER).write_text(f"{first_signal()}\n")
        raise


def begin(args: Namespace, scorer: VideoScorer, process: Process) -> ClipTable:
    """Return the videos of the command line; for rank 0, which says what there is and writes predict_args.json.

    Raises ConfigError where the folder holds scores of other settings.
    """
    output_dir, record = Path(args.output_dir), Path(args.output_dir, "predict_args.json")
    if record.exists():
        changes = differing(read_run_record(record), vars(args), predict_parser("").free_on_resume | {"inputs"})
        if changes:
            what = f"{output_dir} holds scores of other settings ({'; '.join(changes)})"
            raise ConfigError(f"{what}: use those, or another --output_dir")
    clips = scorer.find(args.inputs, args.scan_cache)
    hours = float((clips.frame_counts / clips.fps).sum()) / 3600
    logger.info(f"{len(clips)} videos of {hours:.3g} hours, {len(scorer.index(clips))} scores")
    check_writable(output_dir, BYTES_OF_A_SCORE * len(scorer.index(clips)))
    write_run_record(record, vars(args), process.world_size)
    return clips


def say_what_it_rests_on(scorer: VideoScorer) -> None:
    """Log what the weights were trained on and where events come from."""
    spec = scorer.spec
    logger.info(f"{spec['model']}: {spec['num_frames']} frames at {spec['view_fps']:g} per second, trained on "
                f"{spec.get('data_set', 'unknown footage')}; of other footage nothing is known")  # fmt: skip
    if scorer.rule:
        logger.info(f"events: score {scorer.rule.threshold:.4g} and above; {scorer.rule.source}")
    else:
        logger.info("no events: the weights file has no operating point (run_finetune.py --eval stores one), and no "
                    "--threshold is given")  # fmt: skip


def thumbnails(clip: Clip, curve: RiskCurve) -> list[Thumbnail]:
    """Return the pictures that say most of a curve."""
    frames = peak_frames(curve)
    with open_clip(clip) as reader:
        pictures = [picture.numpy().copy() for picture in reader.frames(frames)] if frames else []
    return [Thumbnail(frame, picture) for frame, picture in zip(frames, pictures, strict=True)]


def all_pictures(reader: Reader, curve: RiskCurve) -> Iterator[np.ndarray | None]:
    """Yield uint8 (H, W, 3) of each frame of a video, None in gaps."""
    there = np.ones(curve.num_frames, dtype=bool)
    for gap in curve.gaps:
        there[round(gap.start * curve.fps) : round(gap.end * curve.fps)] = False
    frames = reader.frames(np.flatnonzero(there))
    for readable in there:
        yield next(frames).numpy() if readable else None


def draw_curve(clip: Clip, curve: RiskCurve, folder: Path) -> None:
    """Write curve.png."""
    curve.plot(folder / "curve.png", thumbnails(clip, curve))


def draw_overlay(clip: Clip, curve: RiskCurve, folder: Path) -> None:
    """Write overlay.mp4."""
    with open_clip(clip) as reader:
        source = clip.source if isinstance(reader, VideoReader) else None
        write_overlay(folder / "overlay.mp4", curve, source, all_pictures(reader, curve))


DRAW = {"curve": draw_curve, "overlay": draw_overlay}


def summarize(clips: ClipTable, writer: "Writer", wanted: Collection[str]) -> None:
    """Count what was scored, name what was not, and write the report over all."""
    results = [writer.left(number) for number in range(len(clips))]
    results += [VideoResult(name, problem=reason) for name, reason in clips.unreadable.items()]
    failed = [f"{result.name} ({result.problem})" for result in results if result.problem]
    if failed:
        logger.error(f"{len(failed)} of {len(results)} videos are not scored: {first_few(failed, sep='; ')}")
    if "report" in wanted:
        write_summary(writer.output_dir / "summary.csv", results)
    logger.info(f"{len(results) - len(failed)} of {len(results)} videos scored; see {writer.output_dir}")


class Writer:
    """Writes what is wanted of each video, and knows what is there already."""

    def __init__(self, output_dir: Path, clips: ClipTable, wanted: set[str], of: dict[str, Any], scorer: VideoScorer):
        self.output_dir, self.clips, self.wanted, self._of, self._scorer = output_dir, clips, wanted, of, scorer

    def known(self, number: int) -> VideoResult | None:
        """Return the scores of a video that are there already."""
        clip = self.clips[number]
        result = load_result(self._folder(clip), clip.name, self._of_clip(clip), self._scorer.rule)
        return result if result and not result.problem else None

    def left(self, number: int) -> VideoResult:
        """Return what is known of a video at the end."""
        name = self.clips[number].name
        result = load_result(self._folder(self.clips[number]), name, None, self._scorer.rule)
        return result or VideoResult(name, problem="its events.json is damaged; the same command writes it again")

    def write(self, number: int, result: VideoResult) -> None:
        """Write what is missing of a video, events.json before what takes longer, and once more at the end."""
        if stop_requested():
            raise Preempted(EXIT_CODE)
        clip, folder = self.clips[number], self._folder(self.clips[number])
        missing = () if result.problem else sorted(self.wanted - {"scores", "report"} - result.written)
        if {"scores", "events"} <= result.written and not missing:
            return
        save_result(folder, result, self._of_clip(clip))
        if result.problem:
            logger.error(f"{clip.name}: not scored: {result.problem}")
            return
        for name in missing:
            DRAW[name](clip, result.curve, folder)
        if missing:
            written = frozenset({"scores", "events", *result.written, *missing})
            save_result(folder, replace(result, written=written), self._of_clip(clip))
        highest = int(np.argmax(result.curve.score))
        logger.info(f"{clip.name}: highest score {result.curve.score[highest]:.3f} at "
                    f"{result.curve.time[highest]:.2f} s, {len(result.curve.events())} events")  # fmt: skip

    def _folder(self, clip: Clip) -> Path:
        return self.output_dir / clip.name

    def _of_clip(self, clip: Clip) -> dict[str, Any]:
        return {**self._of, "source": clip.source, "stamp": stamp(clip.source)}


if __name__ == "__main__":
    try:
        main(ARGS)
    except ERRORS as e:
        fail(f"error: {e}")
