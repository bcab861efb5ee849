"""Pack a data set small: every clip, from zips, folders or videos, becomes one zip of small JPEGs.

    python -m datasets.tools.pack DoTA /data/DoTA /data/DoTA_320 --short_side 320 --fps 10 --quality 92
    python run_finetune.py --data_set DoTA --data_path /data/DoTA_320 ...

Annotations travel along, and OUT stands in for ROOT everywhere (see datasets/formats/packed.py for what is in it).
Frames, labels and names keep the numbers of the original. Of a source at a whole multiple n of --fps, every n-th frame
is kept, counted back from the clip's last one, so windows end on every n-th frame and training and evaluation need a
step of n (--sampling_rate, --sampling_rate_val); of other sources every frame is kept.

With --squash WIDTH the width of frames is squashed once, as training and evaluation do anyway, in the resampling that
shrinks them: of 1280 x 720 a --short_side of 320 makes 569 x 320, and --squash 224 makes that 224 x 320. Each clip
remembers the shape it was filmed in, by which training pads. Frames are never enlarged, and those that are higher than
wide stay as they are.

Killed at any moment, the same command goes on where it stopped; OUT can be used once it has finished. A later run adds
splits or variants (DoTA_half to DoTA) and packs again the clips whose source has changed.
"""

import fcntl
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from datasets import ClipTable, DataError, VideoScan, build_clips, find_data_sets
from datasets.clips import data_errors
from datasets.faults import read_bad_clips, warn_unmatched
from datasets.formats.packed import (
    INDEX,
    MANIFEST,
    VERSION,
    PackedClip,
    describe,
    is_packed,
    read_index,
    read_manifest,
    refuse_outdated,
)
from datasets.parallel import available_cores, in_processes
from datasets.tools.pack_clip import Job, Settings, pack_clip, sample_bytes, stamp
from utils.cli import Parser, frame_rate, frame_rate_or_0, percent, pixels_or_0, processes
from utils.damage import with_sum
from utils.files import replaced
from utils.flags import ASSUME_FPS
from utils.logging import setup_logging
from utils.text import first_few

logger = logging.getLogger("tad")

BAD_CLIPS = "bad_clips.txt"  # in OUT: what could not be packed
SAMPLED_CLIPS = 8  # for the estimate of space


def pack(
    name: str,
    root: str,
    out: str | Path,
    *,
    splits: Sequence[str] | None = None,
    settings: Settings,
    leave_out: Collection[str] = frozenset(),
    assume_fps: float | None = None,
    workers: int = 1,
) -> None:
    """Pack a data set into the folder `out`, or go on with it.

    Args:
        splits: those to pack; None: all there are.
        settings: how to pack them.
        leave_out: names of clips not to pack.
        assume_fps: as in build_clips; the pack keeps it.
        workers: processes that pack.

    Raises DataError: `out` is another pack, an old one of videos, of another root or no pack, is being written, cannot
    be, is on a disk that is too small; clips that cannot be read, after all others are done, in out/bad_clips.txt.
    """
    out = Path(out)
    if is_packed(root):
        raise DataError(f"{root}: a pack already; pack the original again")
    with _locked(out, settings):
        scan = VideoScan(out / "videos.json", workers=workers)
        (data_set,) = find_data_sets([name], assume_fps)
        splits = splits or data_set.splits
        problems: dict[str, DataError] = {}
        tables = {
            split: build_clips(name, root, split, scan, assume_fps, leave_out=leave_out, problems=problems)
            for split in splits
        }
        warn_unmatched(leave_out, tables.values())
        jobs = _jobs(tables, out, settings)
        done = {entry.clip["name"]: entry for entry in read_manifest(out, skip_damaged=True)}
        _refuse_other_originals(name, os.path.abspath(root), out, jobs, done)
        with replaced(out / MANIFEST) as temporary:  # without lines that a kill cut short or that are damaged
            _write_manifest(temporary, done.values())
        to_do = [job for job in jobs.values() if not _is_done(job, done.get(job.clip.name))]
        logger.info(f"{name}: {len(jobs)} clips, {len(jobs) - len(to_do)} of them packed already")
        _check_space(to_do, out, workers)
        failed = {clip: str(e) for clip, e in problems.items()} | _pack_all(to_do, done, out, workers)
        if failed:
            text = "".join(f"{clip}\t{why}\n" for clip, why in failed.items())
            with replaced(out / BAD_CLIPS) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            raise DataError(
                f"{len(failed)} clips cannot be packed: {first_few(failed.values(), 3, '; ')}; {len(done)} are. Repair "
                f"them and run this again, or leave them out with --bad_clips {out / BAD_CLIPS}"
            )
        _finish(name, os.path.abspath(root), tables, jobs, done, out, settings)


@contextmanager
def _locked(out: Path, settings: Settings) -> Iterator[None]:
    """Lock the folder of a pack, and remove what an earlier process left half-written."""
    with data_errors(out, "written, choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        if not is_packed(out) and any(out.iterdir()):
            raise DataError(f"{out}: neither empty nor a pack; choose another folder")
        (out / MANIFEST).touch()
        lock = (out / ".lock").open("w")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DataError(f"{out}: another process is packing into it") from e
        entries = list(read_manifest(out, skip_damaged=True))
        refuse_outdated(out, entries)
        for entry in entries:
            if (held := Settings(**entry.settings)) != settings:  # of older packs, --squash 0
                raise DataError(f"{out}: a pack with {held}; choose another folder, or remove it")
        for half_written in out.rglob(".*.tmp"):
            half_written.unlink()
        yield


def _jobs(tables: dict[str, ClipTable], out: Path, settings: Settings) -> dict[str, Job]:
    """Return the clips of all tables by name, each once. Raises DataError for two clips of one name, or one file."""
    jobs: dict[str, Job] = {}
    steps: Counter[tuple[float, int]] = Counter()
    for table in tables.values():
        if table.one_clip_per_video and settings.fps:
            raise DataError(f"{table.name}: training draws clips from all frames of a video; give --fps 0")
        for clip in table:
            clip = replace(clip, pack_step=settings.step(clip.fps))
            job = Job(clip, out, file_of(clip.name), settings)
            if clip.name in jobs:
                other = jobs[clip.name].clip
                if (clip.source, clip.offset, clip.num_frames) != (other.source, other.offset, other.num_frames):
                    both = f"{clip.source}, {other.source}"
                    raise DataError(f"{table.name}: two clips are called {clip.name}: {both}; rename one")
                continue
            jobs[clip.name] = job
            steps[clip.fps, clip.pack_step] += 1
    if len({job.file for job in jobs.values()}) < len(jobs):
        raise DataError("two clips have names that differ by slashes and dots alone; rename one")
    for (fps, step), count in sorted(steps.items())[:10]:
        kept = f"1 frame in {step}, for windows that end on those" if step > 1 else "every frame"
        logger.info(f"{count} clips at {fps:g} fps: {kept}")
    return jobs


def _refuse_other_originals(
    name: str, root: str, out: Path, jobs: Mapping[str, Job], done: Mapping[str, PackedClip]
) -> None:
    """Raise DataError where the pack has this data set from another root, or another data set's clip of one name."""
    for other, splits in (read_index(out) or {"tables": {}})["tables"].items():
        for table in splits.values():
            if other == name and table["root"] != root:
                raise DataError(f"{out}: a pack of {name} of {table['root']}; pack that of {root} into another folder")
            for clip in sorted(jobs.keys() & table["clips"]) if other != name else ():
                original = os.path.abspath(done[clip].original["path"])
                if os.path.abspath(jobs[clip].clip.source) != original.removesuffix(".zip"):
                    raise DataError(f"{out}: holds {clip} of {other}, {original}; pack {name} into another folder")


def file_of(name: str) -> str:
    """Return the path of a clip's zip, relative to the root of the pack; it stays below it, whatever the name."""
    parts = ["%2E%2E" if part == ".." else part for part in name.split("/") if part not in ("", ".")]
    return "/".join(["frames", *parts]) + ".zip"


def _is_done(job: Job, entry: PackedClip | None) -> bool:
    if entry is None:
        return False
    same = all(entry.clip.get(k) == getattr(job.clip, k) for k in ("num_frames", "first_frame", "pack_step", "offset"))
    try:
        return same and (job.root / entry.file).stat().st_size == entry.bytes and stamp(job.clip) == entry.original
    except (OSError, DataError):
        return False


def _check_space(jobs: list[Job], out: Path, workers: int) -> None:
    """Say how much disk the jobs will take, from a few frames. Raises DataError where there is less."""
    if not jobs:
        return
    few, options = jobs[:: -(-len(jobs) // SAMPLED_CLIPS)], {"workers": workers, "description": "estimate"}
    sizes = [s for _, s in in_processes(sample_bytes, few, failed=lambda job, error: None, **options) if s]
    frames = sum(len(job.clip.stored_frames) for job in jobs)
    need, free = frames * float(np.mean(sizes or [0])), shutil.disk_usage(out).free
    logger.info(f"{frames} frames to pack: about {need / 1e9:.3g} GB; {free / 1e9:.3g} GB are free")
    if need > free:
        raise DataError(f"{out}: about {need / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")


def _pack_all(jobs: list[Job], done: dict[str, PackedClip], out: Path, workers: int) -> dict[str, str]:
    """Do the jobs, noting each in the manifest and in `done` when its zip is there; returns {clip: why} of failures."""
    failed = {}
    try:
        with (out / MANIFEST).open("a", encoding="utf-8") as manifest:
            options = {"workers": workers, "description": "pack", "failed": lambda job, error: error}
            for job, entry in in_processes(pack_clip, jobs, **options):
                if isinstance(entry, DataError):
                    failed[job.clip.name] = str(entry)
                    continue
                if entry.frames < (expected := len(job.clip.stored_frames)):
                    logger.warning(f"{job}: its source ends after {entry.frames} of the {expected} frames to pack")
                done[job.clip.name] = entry
                manifest.write(_line(entry))
                manifest.flush()
    except OSError as e:
        raise DataError(f"{out}: cannot be written ({e}); what is packed is kept, the same command goes on") from e
    return failed


def _finish(
    name: str,
    root: str,
    tables: dict[str, ClipTable],
    jobs: dict[str, Job],
    done: dict[str, PackedClip],
    out: Path,
    settings: Settings,
) -> None:
    """Write the manifest in the order of the tables, with the annotations as they are now; then the index, the last."""
    index = {"settings": asdict(settings), "tables": {}} | (read_index(out) or {}) | {"version": VERSION}
    for split, table in tables.items():
        index["tables"].setdefault(name, {})[split] = {
            "root": root,
            "clips": [clip.name for clip in table],
            "left_out": table.left_out,
            "one_clip_per_video": table.one_clip_per_video,
        }
    for clip_name, job in jobs.items():
        annotation = describe(replace(job.clip, aspect=done[clip_name].clip.get("aspect")))
        done[clip_name] = replace(done[clip_name], **annotation)
    listed = {clip: None for splits in index["tables"].values() for table in splits.values() for clip in table["clips"]}
    with replaced(out / MANIFEST) as temporary:  # a clip of another table whose line was damaged is not there
        _write_manifest(temporary, (done[clip] for clip in listed if clip in done))
    with replaced(out / INDEX) as temporary:
        temporary.write_text(json.dumps(with_sum(index)) + "\n", encoding="utf-8")
    (out / BAD_CLIPS).unlink(missing_ok=True)
    _say_what_is_packed([done[clip] for clip in jobs], settings)
    logger.info(f"use it with --data_set {name} --data_path {out}")


def _say_what_is_packed(entries: Sequence[PackedClip], settings: Settings) -> None:
    size, original = sum(entry.bytes for entry in entries), sum(entry.original["size"] for entry in entries)
    each = size / 1e3 / max(sum(entry.frames for entry in entries), 1)
    logger.info(f"packed: {size / 1e9:.3g} GB in place of {original / 1e9:.3g} GB, {each:.3g} kB a frame; {settings}")
    if settings.squash:
        squashed = sum(entry.clip.get("aspect") is not None for entry in entries)
        logger.info(f"{squashed} of {len(entries)} clips are squashed, the others narrower or higher than wide")


def _write_manifest(path: Path, entries: Iterable[PackedClip]) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.writelines(map(_line, entries))


def _line(entry: PackedClip) -> str:
    return json.dumps(with_sum(asdict(entry))) + "\n"


def main() -> None:
    """Run the command line."""
    parser = Parser(__doc__)
    parser.add_argument("data_set", help="name of the data set")
    parser.add_argument("root", help="its folder, or list file")
    parser.add_argument("out", help="folder to make, or to go on with")
    parser.add_argument("--split", nargs="+", help="splits to pack (default: all of the data set)")
    parser.add_argument("--short_side", type=pixels_or_0, default=320, help="pixels; 0: as it is (default: 320)")
    parser.add_argument(
        "--fps", type=frame_rate_or_0, default=10, help="frames per second to keep; 0: all (default: 10)"
    )
    parser.add_argument("--quality", type=percent, default=92, help="of the JPEGs (default: 92)")
    help = "squash wider frames to this width: 224 (--input_size) for fine-tuning and evaluation, 320 (--short_side) "
    help += "for DAPT, which fine-tuning can read too; 0: none (default: 0)"
    parser.add_argument("--squash", type=pixels_or_0, default=0, metavar="WIDTH", help=help)
    parser.add_argument("--assume_fps", type=frame_rate, help=ASSUME_FPS)
    parser.add_argument("--bad_clips", nargs="+", default=[], metavar="FILE", help="lists of clips to leave out")
    parser.add_argument("--workers", type=processes, default=available_cores(), help="processes (default: all cores)")
    args = parser.parse_args()
    setup_logging(0)
    try:
        pack(
            args.data_set,
            args.root,
            args.out,
            splits=args.split,
            settings=Settings(args.short_side, args.fps, args.quality, args.squash),
            leave_out=read_bad_clips(args.bad_clips),
            assume_fps=args.assume_fps,
            workers=args.workers,
        )
    except (DataError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
