"""What a prediction leaves of each video, from which it goes on after an interruption.

OUTPUT_DIR/
    predict_args.json       arguments
    <video>/
        scores.csv          a row for each score
        events.json         events and gaps, what the scores are of and, under "written", what is complete
        curve.png  overlay.mp4  explain-<n>.png of each event
    summary.csv             a row for each video, the riskiest first
    report.html
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from engine.curve import Gap, RiskCurve, Thumbnail, read_scores
from engine.evaluate import EvaluationError
from engine.events import EventRule
from engine.overlay import write_overlay
from engine.summary import peak_frames
from utils.cli import ConfigError
from utils.damage import parse_json
from utils.record import write_json

SCORES, EVENTS = "scores.csv", "events.json"
_FILES = {"curve": "curve.png", "overlay": "overlay.mp4"}  # which a person may remove, to have them drawn again
DRAWN = (*_FILES.values(), "explain-*.png")
_HALF = ".*.tmp"  # what a run that was killed left of a file
BYTES_OF_A_SCORE = 40  # of scores.csv, about


@dataclass(frozen=True)
class VideoResult:
    """What is known of a video.

    name: of the video, which its folder is called by, too.
    curve: its scores; None where there are none, for the `problem`.
    written: which of the outputs are complete.
    """

    name: str
    curve: RiskCurve | None = None
    problem: str = ""
    written: frozenset[str] = frozenset()


def fingerprint(model: nn.Module, path: str) -> str:
    """Return a SHA-256 of the weights of a model, for ONNX of the whole file, and of how it is fed.

    The operating point, which an evaluation may write into the file later, makes no difference.
    """
    fed = {key: value for key, value in model.spec.items() if key != "operating_point"}
    digest, state = hashlib.sha256(json.dumps(fed, sort_keys=True).encode()), model.state_dict()
    for key, tensor in state.items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    if not state:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def stamp(source: str) -> list[int] | None:
    """Return [size in bytes, modification time in ns] of a file or folder; None where there is none."""
    try:
        status = os.stat(source)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def save_result(folder: Path, result: VideoResult, of: Mapping[str, Any]) -> None:
    """Write events.json, and scores.csv unless `written` has it. of: what the scores are of, in plain types.

    Raises OSError, which names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    curve, content = result.curve, {"video": result.name, "of": dict(of), "problem": result.problem}
    if curve:
        if "scores" not in result.written:
            curve.write_csv(folder / SCORES)
        content |= {
            "fps": curve.fps,
            "num_frames": curve.num_frames,
            "duration": curve.duration,
            "rule": curve.rule and asdict(curve.rule),
            "events": [asdict(event) for event in curve.events()],
            "gaps": [asdict(gap) for gap in curve.gaps],
            "scores_crc32": _sum_of(folder / SCORES),
            "written": sorted({"scores", "events", *result.written}),
        }
    write_json(folder / EVENTS, content)


def load_result(folder: Path, name: str, of: Mapping[str, Any], rule: EventRule | None) -> VideoResult | None:
    """Return what `save_result` left of a video, its events by `rule`; None where nothing is left of it that counts.

    of: what the scores must be of. Where the rule was another, only scores count as written.
    """
    try:
        known = parse_json((folder / EVENTS).read_bytes(), summed=True)
        if known["video"] != name or known["of"] != dict(of):
            return None
        if known["problem"]:
            return VideoResult(name, problem=known["problem"])
        if _sum_of(folder / SCORES) != known["scores_crc32"]:
            return None
        frame, score, warming_up = read_scores(folder / SCORES)
        gaps = tuple(Gap(**gap) for gap in known["gaps"])
        curve = RiskCurve(name, known["fps"], known["num_frames"], frame, score, warming_up, rule, gaps)
        same = known["rule"] == (rule and asdict(rule))
        gone = {output for output, file in _FILES.items() if not (folder / file).exists()}
        return VideoResult(name, curve, written=frozenset(known["written"] if same else ["scores"]) - gone)
    except (OSError, ValueError, KeyError, TypeError, EvaluationError):
        return None  # never written, or damaged: it is scored again


def _sum_of(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def rule_by(spec: Mapping[str, Any], given: Mapping[str, float | None]) -> EventRule | None:
    """Return the operating point in a weights file's spec with what is given in its place; None without a threshold.

    given: fields of EventRule, None where left open.
    """
    stored, given = spec.get("operating_point"), {name: value for name, value in given.items() if value is not None}
    if not stored and "threshold" not in given:
        return None
    if not stored:
        return EventRule(source="given on the command line", **given)
    rule = EventRule.from_spec(stored)
    changed = ", ".join(given)
    return replace(rule, **given, source=f"{rule.source}, but for {changed}") if given else rule


def require_apart(folder: Path, sources: Iterable[str]) -> None:
    """Raise ConfigError where one of the absolute paths that are scored is in the folder of outputs, or is that.

    Its outputs would come among what is scored, and the folder would count as one of predictions from then on.
    """
    own = os.path.realpath(folder)
    for source in sources:
        where, name = os.path.split(source)
        path = os.path.join(os.path.realpath(where), name)
        if path == own or path.startswith(os.path.join(own, "")):
            raise ConfigError(f"--output_dir {folder}: {source} is in it, which is to be scored; choose another folder")


class Pictures(Protocol):
    """Opens a clip for reading; `datasets.open_clip` does."""

    def __call__(self, clip: Any) -> AbstractContextManager[Any]:
        """Return a reader, with `is_video`, `path` and `sound_frames`."""


@dataclass(frozen=True)
class Outputs:
    """What is written of each video, and what is there already.

    folder: OUTPUT_DIR.
    of: what scores must be of, in plain types.
    rule: that makes events of scores.
    draw: {name: function of (clip, curve, the video's folder) that writes it} of what is wanted beside the scores.
    """

    folder: Path
    of: Mapping[str, Any]
    rule: EventRule | None
    draw: Mapping[str, Callable[[Any, RiskCurve, Path], None]]

    def known(self, clip: Any) -> VideoResult | None:
        """Return the scores of a clip that are there already."""
        result = load_result(self.folder / clip.name, clip.name, self._of(clip), self.rule)
        return result if result and not result.problem else None

    def left(self, clip: Any) -> VideoResult:
        """Return what is there of a clip at the end."""
        result = load_result(self.folder / clip.name, clip.name, self._of(clip), self.rule)
        return result or VideoResult(clip.name, problem="its scores are gone or damaged; the same command scores it")

    def write(self, clip: Any, result: VideoResult) -> None:
        """Write what is missing of a clip: the scores before what takes longer.

        Raises OSError, which names the file, and what `draw` raises.
        """
        folder = self.folder / clip.name
        missing = () if result.problem else sorted(self.draw.keys() - result.written)
        if {"scores", "events"} <= result.written and not missing:
            return
        drawn = DRAWN if "events" not in result.written else ()  # what was of other events is not to stand beside these
        for stale in [path for pattern in (_HALF, *drawn) for path in folder.glob(pattern)]:
            stale.unlink()
        save_result(folder, result, self._of(clip))
        for name in missing:
            self.draw[name](clip, result.curve, folder)
        if missing:
            save_result(folder, replace(result, written=result.written.union(missing, ["scores"])), self._of(clip))

    def _of(self, clip: Any) -> dict[str, Any]:
        return {**self.of, "source": clip.source, "stamp": stamp(clip.source)}


def thumbnails(open_clip: Pictures, clip: Any, curve: RiskCurve) -> list[Thumbnail]:
    """Return the pictures that say most of a curve."""
    frames = peak_frames(curve)
    with open_clip(clip) as reader:
        pictures = [p if isinstance(p, str) else p.numpy().copy() for p in reader.sound_frames(frames, frames)]
    return [Thumbnail(f, p) for f, p in zip(frames, pictures, strict=True) if not isinstance(p, str)]


def draw_curve(open_clip: Pictures, clip: Any, curve: RiskCurve, folder: Path) -> None:
    """Write curve.png. Raises OSError, which names the file."""
    curve.plot(folder / "curve.png", thumbnails(open_clip, clip, curve))


def draw_overlay(open_clip: Pictures, clip: Any, curve: RiskCurve, folder: Path) -> None:
    """Write overlay.mp4. Raises OverlayError, and OSError, which names the file."""
    frames = range(curve.num_frames)
    with open_clip(clip) as reader:
        pictures = (None if isinstance(p, str) else p.numpy() for p in reader.sound_frames(frames, frames))
        write_overlay(folder / "overlay.mp4", curve, reader.path if reader.is_video else None, pictures)
