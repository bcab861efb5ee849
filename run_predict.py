"""Score any video with a fine-tuned model: its risk curve, events, an overlay, and a report over all videos.

The weights file says which model it is of, how that is fed and what counts as an event; nothing else is to be given:
    python run_predict.py dashcam.mp4 /data/trips --weights runs/videomae_s_dota/checkpoint-best_auroc.pth \\
        --output_dir runs/risk

A live source: alerts are lines of JSON on stdout, scores go to a file in the folder:
    python run_predict.py --stream rtsp://camera/1 --weights w.pth --output_dir runs/camera1

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
from utils.files import check_writable, replaced
from utils.lock import end_with_torchrun, folder_lock
from utils.predict_flags import OUTPUTS, predict_parser
from utils.record import differing, read_run_record, write_run_record
from utils.resolve import common_flags, leave_gpus_alone
from utils.signals import EXIT_CODE, Preempted, catch_signals, marked_if_stopped, remove_marker, stop_requested

if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = predict_parser(__doc__).parse_args()
    leave_gpus_alone(ARGS.device)
    catch_signals()
    end_with_torchrun()

import logging
import math
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from datasets import Clip, ClipTable, DataError, VideoScan, load_inputs, open_clip
from datasets.augment.frames import EvalTransform
from datasets.live import LiveSource
from datasets.slots import reserve
from datasets.stream import SplitWindows
from datasets.windows import WindowIndex
from engine.alerts import Alerts, command_notifier, webhook_notifier
from engine.curve import Gap, RiskCurve
from engine.evaluate import EvaluationError, Scorer
from engine.events import EventRule
from engine.explain import explain_picture, saliency
from engine.live import ScoreFile, watch
from engine.optim import DTYPES
from engine.overlay import OverlayError
from engine.prediction import (
    BYTES_OF_A_SCORE,
    Outputs,
    VideoResult,
    draw_curve,
    draw_overlay,
    fingerprint,
    require_apart,
    rule_by,
    thumbnails,
)
from engine.prediction_report import About, footage_warning, rule_words, write_report
from engine.stream import RiskStream
from engine.summary import write_summary
from models import classifier_of, load
from models.weights import CheckpointError, fetch
from models.weights.programs import ExportedModel
from utils.distributed import Process, ended_together, from_main, local_main_first, process_group, require_same
from utils.logging import setup_logging
from utils.text import first_few

ERRORS = (CheckpointError, ConfigError, DataError, EvaluationError, OverlayError)
SCORED_WITH = ("weights_sha256", "stride", "warm_up", "assume_fps", "precision")  # what scores depend on
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
    pin_memory: whether the memory of pictures is page-locked for copies to a CUDA device.
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

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that cannot be."""
        for name, least in (("stride", 1), ("batch_size", 1), ("num_workers", 0)):
            if not isinstance(value := getattr(self, name), Integral) or value < least:
                raise ValueError(f"{name}={value!r}: expected is a whole number of at least {least}")
        for name in ("assume_fps", "read_timeout"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value!r}: expected is a number above 0")

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
            device=next(chain(self.model.parameters(), self.model.buffers())).device,  # a program has but buffers
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

    Raises CheckpointError: an unreadable file, one without a spec, or of a masked autoencoder; ValueError: an option.
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
        setup_logging(process.rank, sys.stderr if args.stream else None)
        from_main(lambda: held.enter_context(folder_lock(args.output_dir)))
        require_same(common_flags(args))
        if args.stream:
            watch_source(args, process)
        else:
            predict(args, process)


def resolve(args: Namespace) -> None:
    """Fill what was left open, and refuse what does not go together."""
    args.write = args.write.split(",")
    if unknown := set(args.write) - set(OUTPUTS):
        raise ConfigError(f"--write {','.join(sorted(unknown))}: unknown; known are {', '.join(OUTPUTS)}")
    if bool(args.inputs) == bool(args.stream):
        raise ConfigError("give videos to score, or a live source by --stream" + ", not both" * bool(args.stream))
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
    if args.explain and isinstance(scorer.model, ExportedModel):
        raise ConfigError(f"--explain: {args.weights} has no gradients; give the weights file that it was made from")
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
    args.weights_sha256 = fingerprint(scorer.model, fetch(args.weights))
    clips = from_main(lambda: begin(args, scorer, process))
    of = {name: getattr(args, name) for name in SCORED_WITH}
    draw = {"curve": partial(draw_curve, open_clip), "overlay": partial(draw_overlay, open_clip)}
    draw = {name: function for name, function in draw.items() if name in args.write}
    draw |= {"explain": partial(explain, scorer)} if args.explain else {}
    outputs = Outputs(output_dir, of, scorer.rule, draw)
    with ended_together(), marked_if_stopped(output_dir, "the videos that are not written yet"):
        done = from_main(lambda: {n: known for n, clip in enumerate(clips) if (known := outputs.known(clip))})
        if done:
            logger.info(f"{len(done)} of {len(clips)} videos are scored already")
        for number in sorted(done)[process.rank :: process.world_size]:
            write(outputs, clips[number], done[number])
        to_do = [number for number in range(len(clips)) if number not in done]
        rest = replace(clips, clips=[clips[number] for number in to_do], unreadable={})
        for number, result in scorer.results(rest, process.rank, process.world_size) if to_do else ():
            write(outputs, rest[number], result)
    if process.is_main:
        summarize(args, scorer, clips, outputs)


def write(outputs: Outputs, clip: Clip, result: VideoResult) -> None:
    """Write what is missing of a video, and say what it comes to. Raises Preempted after a signal.

    One that cannot be drawn is named, and drawn by the next run of the command.
    """
    if stop_requested():
        raise Preempted(EXIT_CODE)
    try:
        outputs.write(clip, result)
    except (DataError, EvaluationError, OverlayError) as e:
        logger.error(f"{clip.name}: scored, but not drawn: {e}")
    if result.problem:
        logger.error(f"{clip.name}: not scored: {result.problem}")
        return
    highest, curve = int(np.argmax(result.curve.score)), result.curve
    logger.info(f"{clip.name}: highest score {curve.score[highest]:.3f} at {curve.time[highest]:.2f} s, "
                f"{len(curve.events())} events")  # fmt: skip
    for gap in curve.gaps:
        logger.warning(f"{clip.name}: no picture from {gap.start:.2f} to {gap.end:.2f} s: {gap.reason}")


def explain(scorer: VideoScorer, clip: Clip, curve: RiskCurve, folder: Path) -> None:
    """Write explain-<n>.png of each event: where the model looked at its peak. Raises OSError, which names the file."""
    index = scorer.index(ClipTable("", "", [clip]))
    for number, event in enumerate(curve.events(), start=1):
        frames = index.frames(0, round(event.peak * curve.fps))
        with open_clip(clip) as reader:
            pictures = reader.read(frames)
        heat = saliency(scorer.model, EvalTransform(scorer.spec["input_size"])(pictures).transpose(0, 1))
        caption = f"{clip.name}, event {number}: score {event.peak_score:.3f} at {event.peak:.2f} s"
        labels = [f"{frame / curve.fps:.2f} s" for frame in frames.tolist()]
        with replaced(folder / f"explain-{number}.png") as temporary:
            Image.fromarray(explain_picture(pictures.numpy(), heat, caption, labels)).save(temporary, "PNG")


def watch_source(args: Namespace, process: Process) -> None:
    """Score a live source as it comes, and tell of events, until it ends or a signal comes."""
    if process.world_size > 1:
        raise ConfigError("--stream: a live source is scored by one process; start it without torchrun")
    scorer, output_dir = build_scorer(args, process), Path(args.output_dir)
    say_what_it_rests_on(scorer)
    with config_errors():
        notifiers = [command_notifier(args.on_event)] if args.on_event else []
        notifiers += [webhook_notifier(args.webhook)] if args.webhook else []
    transform, spec = EvalTransform(scorer.spec["input_size"]), scorer.spec
    source = LiveSource(
        args.stream,
        fps=args.stream_fps,
        timeout=args.stream_timeout,
        reconnect=args.reconnect,
        outage=args.outage,
        paced=args.paced,
    )
    stream = RiskStream(
        scorer.model,
        lambda picture: transform([picture])[0],
        num_frames=spec["num_frames"],
        view_fps=spec["view_fps"],
        fps=source.fps,
        stride=args.stride,
        warm_up=scorer.warm_up,
        dtype=scorer.dtype,
        device=process.device,
    )
    alerts = Alerts(source.name, scorer.rule, notifiers=notifiers) if scorer.rule else None
    write_run_record(output_dir / "stream_args.json", vars(args), process.world_size)
    scores = ScoreFile(output_dir / time.strftime("scores-%Y%m%d-%H%M%S.csv"))
    watch(
        source,
        stream,
        alerts=alerts,
        scores=scores,
        report_every=args.report_every,
        realtime=args.realtime or None,
        max_delay=args.max_delay,
    )


def begin(args: Namespace, scorer: VideoScorer, process: Process) -> ClipTable:
    """Return the videos of the command line; for rank 0, which says what there is and writes predict_args.json.

    Raises ConfigError where the folder holds scores of other settings, or one of the videos.
    """
    output_dir, record = Path(args.output_dir), Path(args.output_dir, "predict_args.json")
    if record.exists():
        changes = differing(read_run_record(record), vars(args), predict_parser("").free_on_resume | {"inputs"})
        if changes:
            what = f"{output_dir} holds scores of other settings ({'; '.join(changes)})"
            raise ConfigError(f"{what}: use those, or another --output_dir")
    clips = scorer.find(args.inputs, args.scan_cache)
    require_apart(output_dir, [clip.source for clip in clips])
    hours = float((clips.frame_counts / clips.fps).sum()) / 3600
    length = f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"
    logger.info(f"{len(clips)} videos of {length}, {len(scorer.index(clips))} scores")
    check_writable(output_dir, BYTES_OF_A_SCORE * len(scorer.index(clips)))
    write_run_record(record, vars(args), process.world_size)
    return clips


def say_what_it_rests_on(scorer: VideoScorer) -> None:
    """Log what the weights were trained on and where events come from."""
    spec = scorer.spec
    logger.info(f"{spec['model']}, {spec['num_frames']} frames at {spec['view_fps']:g} per second")
    logger.warning(footage_warning(spec.get("data_set", "")))
    source = f" ({scorer.rule.source})" if scorer.rule else "; run_finetune.py --eval finds one, --threshold gives one"
    logger.info(f"events: {rule_words(scorer.rule)}{source}")


def summarize(args: Namespace, scorer: VideoScorer, clips: ClipTable, outputs: Outputs) -> None:
    """Count what was scored, name what was not, and write the report over all."""
    results = [outputs.left(clip) for clip in clips]
    results += [VideoResult(name, problem=reason) for name, reason in clips.unreadable.items()]
    if failed := [f"{result.name} ({result.problem})" for result in results if result.problem]:
        logger.error(f"{len(failed)} of {len(results)} videos are not scored: {first_few(failed, sep='; ')}")
    if "report" in args.write:
        write_summary(outputs.folder / "summary.csv", results)
        by_name = {clip.name: clip for clip in clips}
        spec = scorer.spec
        about = About(
            args.weights, spec["model"], spec.get("data_set", ""), spec.get("epoch"), scorer.rule, args.stride,
            args.warm_up == "repeat",
        )  # fmt: skip
        write_report(
            outputs.folder / "report.html", results, about,
            lambda curve: thumbnails(open_clip, by_name[curve.name], curve),
        )  # fmt: skip
    logger.info(f"{len(results) - len(failed)} of {len(results)} videos scored; see {outputs.folder}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except ERRORS as e:
        fail(f"error: {e}")
