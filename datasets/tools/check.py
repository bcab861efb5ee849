"""Check a data set, or a pack of one, before training on it.

    python -m datasets.tools.check DoTA /data/DoTA [--split train val] [--deep]

Reads every annotation and every file: whole zips with the CRC of each picture, the header of pictures, the header and
first frames of videos; with --deep every picture and every frame is decoded, and videos are read in sequence and by
seeking. (A decoder conceals damage inside a JPEG where it can: the CRC of a zip finds it all the same, a picture in a
folder may pass.)

Prints a summary, and writes <data set>_check.json and <data set>_bad_clips.txt to --output_dir. The second is a list of
the clips with errors for --bad_clips of run_finetune.py, run_dapt.py and datasets.tools.pack. The exit code is 1 where
there are errors, 0 where there are none or warnings alone.

Errors                                                     Warnings
  annotation        missing, malformed, not of this clip     extra_frames   more pictures than the annotation has
  unreadable        zip, picture or video                    short          shorter than a window: goes unused
  missing_frames    annotated, not there                     rate           the video has another than the annotation
  damaged           a video's decoder reports damage         truncated      a video is shorter than its container says
  seek              other pictures by seeking than in sequence, in a video
  label_beyond_end  anomalous after the last frame there is
  sizes             pictures of several sizes in a clip, by their headers
  in_two_splits     the clip, its name or its source, in another split too
  changed           a zip of a pack has another size or, with --deep, another SHA-256 than when it was packed
"""

import json
import logging
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets import Clip, ClipTable, DataError, VideoScan, build_clips, find_data_set, find_data_sets
from datasets.clips import BeyondEnd, Unreadable, data_errors
from datasets.formats.packed import PackedClip, read_manifest
from datasets.labels import ANOMALOUS, IGNORED
from datasets.parallel import available_cores, in_processes
from datasets.readers import PICTURE_SUFFIXES, PictureReader, Reader, open_clip, picture_size
from datasets.scan import probe
from datasets.tools.check_video import look_deep
from datasets.windows import WindowIndex, kept_frames
from utils.cli import Parser, frame_count, frame_rate, processes
from utils.files import check_writable, replaced
from utils.flags import ASSUME_FPS
from utils.logging import setup_logging
from utils.names import LABELS
from utils.text import first_few, one_line

WARNINGS = ("extra_frames", "short", "rate", "truncated")
NOT_OF_THE_CLIP = (*WARNINGS, "in_two_splits")  # leaving out the clip is no remedy
KINDS = {Unreadable: "unreadable", BeyondEnd: "label_beyond_end"}  # of the errors of a clip's annotation
SHOWN = 10  # findings of a kind that the summary shows


@dataclass(frozen=True)
class Finding:
    """What is wrong with a clip of a split."""

    split: str
    clip: str  # its name; "" where the finding concerns the split
    kind: str  # one of the errors and warnings above
    message: str

    @property
    def is_error(self) -> bool:
        """Tell whether it ends the command with exit code 1."""
        return self.kind not in WARNINGS


@dataclass(frozen=True)
class Task:
    """A clip to inspect."""

    split: str
    clip: Clip
    deep: bool  # whether every frame is decoded
    packed: PackedClip | None = None  # its entry in the manifest of the pack at root, where it is of one
    root: Path = Path()

    def __str__(self) -> str:
        return self.clip.name


def check(
    name: str,
    root: str,
    *,
    splits: Sequence[str] | None = None,
    deep: bool = False,
    num_frames: int = 16,
    view_fps: float = 10,
    assume_fps: float | None = None,
    labels: str = "own",
    workers: int = 1,
) -> tuple[list[Finding], dict[str, dict[str, Any]]]:
    """Return (findings in the order of splits and clips, {split: its numbers}) of a data set.

    Args:
        splits: those to check; None: all there are.
        deep: whether every frame is decoded.
        num_frames, view_fps: the window that clips are measured by.
        assume_fps, labels: as in build_clips.
        workers: processes that inspect clips.

    Raises DataError for an unknown data set or where no split can be read.
    """
    (data_set,) = find_data_sets([name], assume_fps)
    splits = splits or data_set.splits
    tables, findings = _read_tables(name, root, splits, workers, assume_fps=assume_fps, labels=labels)
    if not tables:
        raise DataError(findings[0].message)
    packed = {entry.clip["name"]: entry for entry in read_manifest(Path(root))}
    tasks = [
        Task(split, clip, deep, packed.get(clip.name), Path(root)) for split, table in tables.items() for clip in table
    ]
    options = {"workers": workers, "description": "check", "failed": lambda task, error: [("unreadable", str(error))]}
    for task, found in in_processes(inspect_clip, tasks, **options):
        findings += [Finding(task.split, task.clip.name, *pair) for pair in found]
    numbers = {}
    for split, table in tables.items():
        index = WindowIndex(
            table.frame_counts, src_fps=table.fps, num_frames=num_frames, view_fps=view_fps, keep=kept_frames(table)
        )
        window = f"a window of {num_frames} frames at {view_fps:g} fps spans"
        for i in index.short_clips:
            message = f"{table[i].num_frames} frames; {window} {index.spans[i]}"
            findings.append(Finding(split, table[i].name, "short", message))
        numbers[split] = _numbers(table, index)
    findings += _in_two_splits(tables)
    _compare_with_published(name, numbers, findings, tables)
    order = {(split, clip.name): i for split, table in tables.items() for i, clip in enumerate(table)}
    return sorted(findings, key=lambda f: (splits.index(f.split), order.get((f.split, f.clip), -1))), numbers


def _read_tables(
    name: str, root: str, splits: Sequence[str], workers: int, **options: Any
) -> tuple[dict[str, ClipTable], list[Finding]]:
    tables, findings = {}, []
    with tempfile.TemporaryDirectory() as folder:  # a scan of its own: files may have broken since an earlier one
        scan = VideoScan(Path(folder, "videos.json"), workers=workers)
        for split in splits:
            problems: dict[str, DataError] = {}
            try:
                tables[split] = build_clips(name, root, split, scan, problems=problems, **options)
            except DataError as e:
                findings.append(Finding(split, "", "annotation", str(e)))
            findings += [Finding(split, c, KINDS.get(type(e), "annotation"), str(e)) for c, e in problems.items()]
    return tables, findings


# ----------------------------------------------------------------------------------------------------------------------
# One clip


def inspect_clip(task: Task) -> list[tuple[str, str]]:
    """Return (kind, message) of everything that is wrong with the frames of a clip."""
    clip = task.clip
    if clip.labels is None and not task.deep and os.path.isfile(clip.source):
        return []  # the scan has just opened this video
    try:
        with open_clip(clip) as reader:
            damage = task.packed.damage(task.root, deep=task.deep) if task.packed else ""
            look = _look_at_pictures if isinstance(reader, PictureReader) else _look_at_video
            return [("changed", f"{damage}; pack it again")] * bool(damage) + list(look(reader, clip, task.deep))
    except DataError as e:
        return [("unreadable", str(e))]


def _look_at_pictures(reader: PictureReader, clip: Clip, deep: bool) -> Iterator[tuple[str, str]]:
    expected = {clip.picture(i): i for i in clip.stored_frames.tolist()}
    names = sorted(name for name in reader.file_names() if name.lower().endswith(PICTURE_SUFFIXES))
    there = [expected[name] for name in names if name in expected]
    yield from _lacking(clip, reader.path, there, f"; it holds {names[0]} and so on" if names and not there else "")
    if there and clip.offset is None and (extra := [name for name in names if name not in expected]):
        yield "extra_frames", f"{reader.path}: {len(extra)} more than the {len(expected)} annotated: {_some(extra)}"
    broken: list[str] = []
    sizes: dict[tuple[int, int], list[str]] = defaultdict(list)  # {(height, width): names}
    for i in there:
        try:
            size = next(reader.frames([i])).shape[:2] if deep else next(reader.frames([i], decode=picture_size))
            sizes[tuple(size)].append(clip.picture(i))
        except DataError as e:
            broken.append(str(e))
    if broken:
        yield "unreadable", broken[0] + f"; and {len(broken) - 1} more of its {len(there)} frames" * (len(broken) > 1)
    if len(sizes) > 1:
        yield "sizes", f"{reader.path}: pictures of {_sizes(sizes)}; a window needs one size: resize the others"


def _sizes(names: Mapping[tuple[int, int], Sequence[str]]) -> str:
    """Say how many pictures are of each size, the commonest first, with names of the others."""
    (size, most), *others = sorted(names.items(), key=lambda pair: -len(pair[1]))
    rest = [f"{w} x {h}: {len(of)} ({_some(of)})" for (h, w), of in others]
    return first_few([f"{size[1]} x {size[0]}: {len(most)}", *rest])


def _look_at_video(reader: Reader, clip: Clip, deep: bool) -> Iterator[tuple[str, str]]:
    info = probe(reader.path)
    if info.problem:
        yield "unreadable", f"{reader.path}: {info.problem}"
        return
    frames = range(max(min(info.frames - clip.in_source(0), clip.num_frames), 0))
    yield from _lacking(clip, reader.path, frames, "")
    if abs(info.fps / clip.fps - 1) > 0.01:
        yield "rate", f"{reader.path}: {info.fps:g} fps, annotated as {clip.fps:g}"
    if info.short:
        yield "truncated", f"{reader.path}: {info.short}"
    if deep:
        yield from look_deep(reader.path, clip.in_source(len(frames)))


def _lacking(clip: Clip, path: str, there: Sequence[int], note: str) -> Iterator[tuple[str, str]]:
    """Yield what to say of annotated frames that are not in `there`, ascending; anomalous ones after its end differ."""
    end = there[-1] + 1 if there else 0
    anomalous = np.flatnonzero(clip.labels == ANOMALOUS) if clip.labels is not None else np.zeros(0, np.int64)
    beyond = bool((anomalous >= end).any())
    if there and beyond:
        last = int(anomalous[-1])
        yield "label_beyond_end", f"{path}: anomalous up to frame {last}, the last one there is {end - 1}"
    have = set(there)
    missing = [i for i in clip.stored_frames.tolist() if i not in have and not (there and beyond and i >= end)]
    if missing:
        names = _some([clip.picture(i) for i in missing])
        if missing[0] >= end > 0:
            note = f"; the {end} before them are trained on and evaluated"
        yield "missing_frames", f"{path}: {len(missing)} of {len(clip.stored_frames)} frames: {names}{note}"


def _some(names: Sequence[str]) -> str:
    """Join names: the first three and the last."""
    return ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")


# ----------------------------------------------------------------------------------------------------------------------
# The splits


def _in_two_splits(tables: Mapping[str, ClipTable]) -> Iterator[Finding]:
    """Yield clips whose name or source an earlier split has too."""
    names: dict[str, tuple[str, str]] = {}
    sources: dict[str, str] = {}
    for split, table in tables.items():
        if split == "all":
            continue
        for clip in table:
            if other := sources.get(clip.source):
                message = f"in {other} too; take it out of one split file ({clip.source})"
                yield Finding(split, clip.name, "in_two_splits", message)
            elif clip.name in names:
                other, source = names[clip.name]
                message = f"the name of {source} in {other} too; give {clip.source} another"
                yield Finding(split, clip.name, "in_two_splits", message)
        sources = {clip.source: split for clip in table} | sources
        names = {clip.name: (split, clip.source) for clip in table} | names


def _numbers(table: ClipTable, index: WindowIndex) -> dict[str, Any]:
    """Count what a split holds."""
    numbers = {
        "clips": len(table),
        "frames": int(table.frame_counts.sum()),
        "frames_per_clip": [int(f(table.frame_counts)) if len(table) else 0 for f in (min, max)],
        "fps": {f"{fps:g}": n for fps, n in sorted(Counter(table.fps.round(3).tolist()).items())},
        "windows": len(index),
    }
    labels = {i: clip.labels for i, clip in enumerate(table) if clip.labels is not None}
    if not labels:
        return numbers
    return numbers | {
        "unlabelled_clips": len(table) - len(labels),
        "anomalous_frames": sum(int((of_clip == ANOMALOUS).sum()) for of_clip in labels.values()),
        "ignored_frames": sum(int((of_clip == IGNORED).sum()) for of_clip in labels.values()),
        "anomalous_windows": sum(int((labels[i][index.last_frames(i)] == ANOMALOUS).sum()) for i in labels),
        "clips_with_anomaly": sum(bool((of_clip == ANOMALOUS).any()) for of_clip in labels.values()),
        "categories": dict(Counter(str(clip.category) for clip in table).most_common()),
        "ego": sum(bool(clip.ego) for clip in table),
        "night": sum(bool(clip.night) for clip in table),
    }


def _compare_with_published(
    name: str, numbers: dict[str, dict[str, Any]], findings: Sequence[Finding], tables: Mapping[str, ClipTable]
) -> None:
    """Add the published numbers, and how many clips are cut from recordings of an earlier split, in place."""
    data_set, videos = find_data_set(name), set()
    for split, counts in numbers.items():
        counts["unusable_annotations"] = sum(f.split == split and f.kind == "annotation" for f in findings)
        if split in data_set.published:
            counts["published"] = dict(zip(("clips", "frames"), data_set.published[split], strict=True))
        if of_split := [clip.recording for clip in tables[split] if clip.recording is not None]:
            counts["clips_of_videos_in_earlier_splits"] = sum(video in videos for video in of_split)
            videos.update(of_split)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def report(findings: Sequence[Finding], numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the summary as text."""
    lines = [line for split, counts in numbers.items() for line in _split_lines(split, counts)]
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    for kind, found in sorted(by_kind.items(), key=lambda pair: (pair[0] in WARNINGS, pair[0])):
        lines.append(f"{'error' if found[0].is_error else 'warning'}: {kind}, {len(found)}")
        lines += ["    " + one_line(f"{f.split} {f.clip}: {f.message}") for f in found[:SHOWN]]
        lines += ["    ..."] * (len(found) > SHOWN)
    errors = sum(f.is_error for f in findings)
    return "\n".join([*lines, f"{errors} errors, {len(findings) - errors} warnings"])


def _split_lines(split: str, counts: Mapping[str, Any]) -> Iterator[str]:
    published = {k: f" ({n} are published)" for k, n in counts.get("published", {}).items() if n}
    clips, frames = (f"{counts[k]} {k}{published.get(k, '')}" for k in ("clips", "frames"))
    fps = ", ".join(f"{n} at {fps} fps" for fps, n in counts["fps"].items())
    low, high = counts["frames_per_clip"]
    yield f"{split}: {clips}, {frames}; {low} to {high} frames per clip; {fps}; {counts['windows']} windows"
    if "categories" in counts:
        share = counts["anomalous_frames"] / max(counts["frames"], 1)
        yield (
            f"    anomalous: {counts['clips_with_anomaly']} clips, {counts['anomalous_frames']} frames ({share:.1%}), "
            f"{counts['anomalous_windows']} windows; ego {counts['ego']}, night {counts['night']}"
        )
        if ignored := counts["ignored_frames"]:
            yield f"    ignored: {ignored} frames, which no window that is trained on or scored ends on"
        if unlabelled := counts["unlabelled_clips"]:
            yield f"    unlabelled: {unlabelled} clips, which can be neither fine-tuned on nor evaluated"
        yield "    " + ", ".join(f"{category} {n}" for category, n in counts["categories"].items())
    if shared := counts.get("clips_of_videos_in_earlier_splits"):
        yield f"    {shared} clips are cut from videos of an earlier split"


def write_report(
    folder: Path, name: str, findings: Sequence[Finding], numbers: Mapping[str, Any], about: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write <name>_check.json and <name>_bad_clips.txt; returns their paths."""
    paths = folder / f"{name}_check.json", folder / f"{name}_bad_clips.txt"
    content = {
        **about,
        "splits": numbers,
        "errors": [asdict(f) for f in findings if f.is_error],
        "warnings": [asdict(f) for f in findings if not f.is_error],
    }
    bad = {f.clip: f for f in reversed(findings) if f.clip and f.kind not in NOT_OF_THE_CLIP}
    with replaced(paths[0]) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with replaced(paths[1]) as temporary:
        lines = [f"{one_line(clip)}\t{one_line(f'{f.kind}: {f.message}')}\n" for clip, f in reversed(bad.items())]
        temporary.write_text("".join(lines), encoding="utf-8")
    return paths


def main() -> None:
    """Run the command line."""
    parser = Parser(__doc__)
    parser.add_argument("data_set", help="name of the data set")
    parser.add_argument("root", help="its folder, or list file, or a pack of it")
    parser.add_argument("--split", nargs="+", help="splits to check (default: all of the data set)")
    parser.add_argument("--deep", action="store_true", help="decode every frame")
    parser.add_argument("--num_frames", type=frame_count, default=16, help="frames of a window (default: 16)")
    parser.add_argument("--view_fps", type=frame_rate, default=10.0, help="and their rate (default: 10)")
    parser.add_argument("--assume_fps", type=frame_rate, help=ASSUME_FPS)
    parser.add_argument(
        "--labels", choices=LABELS, default="own", help="of its frames (default: own), see docs/data.md"
    )
    parser.add_argument("--output_dir", default=".", help="where the two files go (default: the current folder)")
    parser.add_argument("--workers", type=processes, default=available_cores(), help="processes (default: all cores)")
    args = parser.parse_args()
    setup_logging(0)
    logging.getLogger("tad").setLevel(logging.WARNING)
    about = {"data_set": args.data_set, "root": os.path.abspath(args.root), "deep": args.deep}
    window = {"num_frames": args.num_frames, "view_fps": args.view_fps, "assume_fps": args.assume_fps}
    window["labels"] = args.labels
    folder = Path(args.output_dir)
    try:
        with data_errors(folder, "written, choose another --output_dir"):  # known before the work
            check_writable(folder)
        findings, numbers = check(
            args.data_set, args.root, splits=args.split, deep=args.deep, workers=args.workers, **window
        )
        print(report(findings, numbers))
        paths = write_report(folder, args.data_set, findings, numbers, about | window)
    except (DataError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{paths[0]}: all of it; {paths[1]}: clips to repair, or to leave out with --bad_clips")
    sys.exit(any(f.is_error for f in findings))


if __name__ == "__main__":
    main()
