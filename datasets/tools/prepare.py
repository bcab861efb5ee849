"""Files that the data sets, or the study's offline scripts, expect beside the frames.

    python -m datasets.tools.prepare half DoTA ROOT             half of the training clips of each category, for _half
    python -m datasets.tools.prepare split NAME ROOT --val 0.2  lists of two splits, no source in both
    python -m datasets.tools.prepare frames DADA2K ROOT OUT     csv of the category, ego, night of each window
    python -m datasets.tools.prepare bdd100k ROOT OUT           list of the videos that open, for --data_path
    python -m datasets.tools.prepare sheet SHEET.xlsx OUT.csv   an annotation sheet as csv; .xls too

Nothing is overwritten. Each command has --help.
"""

import argparse
import csv
import io
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import DataError, VideoScan, build_clips, find_data_sets
from datasets.clips import ClipTable, data_errors
from datasets.formats.dada import LAYOUTS
from datasets.formats.dota import CATEGORIES, CODES, HINT, SPLIT_FILES, category_of, read_metadata
from datasets.formats.lists import is_split_name, list_path, list_text
from datasets.formats.text import read_split
from datasets.labels import ANOMALOUS
from datasets.splits import draw_sources, sources_of
from datasets.windows import index_clips
from utils.cli import frame_count, frame_rate, natural, processes, share_below_1
from utils.files import replaced
from utils.flags import ASSUME_FPS
from utils.logging import setup_logging
from utils.text import short_reason

CATEGORY_IDS = {name: number for number, name in CATEGORIES.items()}
CAP_SHEET = "annotation file"  # the sheet of CAP-DATA's workbook that holds the annotation


def half(categories: Mapping[str, str | None], seed: int) -> list[str]:
    """Draw half of the clips of each category, {name of a clip: its category}, rounded down but one at least.

    Returns their names in the order of the mapping.
    """
    names, groups = list(categories), defaultdict(list)
    for i, category in enumerate(categories.values()):
        groups[category].append(i)
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(groups[name])[: max(len(groups[name]) // 2, 1)] for name in sorted(groups, key=str)]
    return [names[i] for i in sorted(np.concatenate(kept))] if kept else []


def frame_rows(clips: ClipTable, *, num_frames: int, view_fps: float) -> Iterable[list[Any]]:
    """Yield the rows of frame_level_anno_val.csv, the header first: one for each window, that is for each scored frame.

    As in simple-tad, whose scripts join them to predictions by clip and filename, the columns are:
        one without a name: counts the rows.
        clip, filename: of the frame.
        cat: number of the accident type (its name where it has none), 0 in safe frames.
        ego: 1 in anomalous frames of clips the recording car is involved in.
        night: of the clip.
        clip_lvl_cat, clip_lvl_ego: category, as the code of the DoTA paper (ST, AH, LA, OC, TC, VP, VO, OO, UK), and
            ego of the whole clip, DoTA only.
    """
    of_clip = clips.name.startswith("DoTA")
    yield ["", "clip", "filename", "cat", "ego", "night", *(("clip_lvl_cat", "clip_lvl_ego") if of_clip else ())]
    index = index_clips(clips, num_frames=num_frames, view_fps=view_fps, stride=1)
    for row, (number, frame) in enumerate(zip(*index.locations(), strict=True)):
        clip = clips[number]
        label = int(clip.labels[frame] == ANOMALOUS)
        cat = CATEGORY_IDS.get(clip.category, clip.category) if label else 0
        clip_level = [CODES.get(clip.category, clip.category), clip.ego] if of_clip else []
        yield [row, clip.name, clip.filename(frame), cat, label * int(bool(clip.ego)), clip.night, *clip_level]


def read_sheet(path: Path, sheet: str | None) -> list[list[str]]:
    """Return the cells of a worksheet: `sheet`, or CAP-DATA's annotation, or the first. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".xls":
            import xlrd

            book = xlrd.open_workbook(path)
            names, rows_of = book.sheet_names(), lambda name: book.sheet_by_name(name).get_rows()
        else:
            import openpyxl

            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            names, rows_of = [own.title for own in book.worksheets], lambda name: book[name].iter_rows()
        chosen = sheet or (CAP_SHEET if CAP_SHEET in names else names[0])
        # openpyxl parses a sheet only now, with its damage
        rows = [[_text(cell.value) for cell in row] for row in rows_of(chosen)] if chosen in names else []
    except ImportError as e:
        raise DataError(f"{path}: {path.suffix} files need {e.name}: pip install {e.name}") from e
    except Exception as e:  # each library raises a handful of types of its own
        raise DataError(f"{path}: not a readable workbook ({type(e).__name__}: {e})") from e
    if sheet and sheet not in names:
        raise DataError(f"{path}: no sheet {sheet!r}; it has {', '.join(names)}")
    return [row for row in rows if any(row)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def prepare_half(name: str, root: str, *, seed: int, out: str | None) -> str:
    """Write the list of the half split of DoTA or DADA2K, from metadata or sheet alone; returns what was done."""
    if name == "DoTA":
        path = Path(root, "dataset", SPLIT_FILES["DoTA_half"]["train"][0])
        categories = _dota_categories(root)
    else:
        path = Path(root, LAYOUTS["DADA2K_half"].split_folder, LAYOUTS["DADA2K_half"].splits["train"])
        categories = {clip.name: clip.category for clip in build_clips(name, root, "train")}
    path, kept = Path(out) if out else path, half(categories, seed)
    _write(path, "".join(f"{clip}\n" for clip in kept))
    return f"{len(kept)} of {len(categories)} training clips, in {path}"


def _dota_categories(root: str) -> dict[str, str | None]:
    """Return {clip: category} of DoTA's training split, from the metadata, or the annotations where there is none."""
    names, metadata = read_split(Path(root, "dataset", SPLIT_FILES["DoTA"]["train"][0]), HINT), read_metadata(root)
    if set(names) <= metadata.keys():
        return {name: category_of(metadata[name]) for name in names}
    return {clip.name: clip.category for clip in build_clips("DoTA", root, "train")}


def prepare_split(
    name: str,
    root: str,
    *,
    split: str,
    by: str,
    val: float,
    seed: int,
    names: Sequence[str],
    assume_fps: float | None,
    workers: int,
) -> str:
    """Write lists of two splits of the clips of a split, no source in both; returns what was done."""
    find_data_sets([name], assume_fps)
    if odd := next((own for own in names if not is_split_name(own)), None):
        raise DataError(f"{odd!r} is no name of a split: letters, digits, . - and _ make one")
    paths = [list_path(root, own) for own in names]
    if there := next((path for path in paths if path.exists()), None):
        raise DataError(f"{there} exists; remove it, or choose other --names")
    scan = VideoScan(list_path(root, "videos").with_suffix(".json"), workers=workers)
    for own in {*names} - {split}:
        with suppress(DataError):
            build_clips(name, root, own, scan, assume_fps)
            raise ValueError(f"{name} has a split {own} already, which a list would hide; choose other --names")
    clips = build_clips(name, root, split, scan, assume_fps)
    sources = sources_of(clips, by)
    if len(sources) < 2:
        raise DataError(f"{clips}: {len(clips)} clips of {len(sources)} sources; two splits need a source each")
    drawn = draw_sources(sources, val, seed)
    second = {clip for source in drawn for clip in sources[source]}
    done = []
    for own, path, of_val in zip(names, paths, (False, True), strict=True):
        kept = [clip for clip in clips if (clip.name in second) == of_val]
        about = f"by {by}, {names[1]} {val:g}, seed {seed}"
        _write(path, list_text(split, about, [clip.name for clip in kept]))
        positive, number = (
            sum(bool(clip.is_positive) for clip in kept),
            len(drawn) if of_val else len(sources) - len(drawn),
        )
        done.append(f"{own}: {len(kept)} clips ({positive} with an accident) of {number} sources, in {path}")
    return "\n".join(done)


def prepare_frames(
    name: str,
    root: str,
    out: str,
    *,
    split: str,
    assume_fps: float | None,
    model: str | None = None,
    num_frames: int | None = None,
    view_fps: float | None = None,
) -> str:
    """Write the frame-level annotation of a labelled data set; returns what was done.

    model: a weights file of ours, whose window is taken for num_frames and view_fps that are None.
    """
    window = {"num_frames": 16, "view_fps": 10.0} | (window_of(Path(model)) if model else {})
    given = {"num_frames": num_frames, "view_fps": view_fps}
    window |= {key: value for key, value in given.items() if value is not None}
    find_data_sets([name], assume_fps)  # refuses a rate that nothing would use
    scan = VideoScan(Path(out).with_suffix(".videos.json"), workers=8)
    clips = build_clips(name, root, split, scan, assume_fps)
    clips.require_labels()
    rows = list(frame_rows(clips, **window))
    _write_csv(Path(out), rows)
    shape = f"{window['num_frames']} frames at {window['view_fps']:g} fps"
    return f"{len(rows) - 1} frames of {len(clips)} clips, each the last of a window of {shape}, in {out}"


def window_of(weights: Path) -> dict[str, Any]:
    """Return num_frames and view_fps of the model in a weights file of ours. Raises DataError."""
    try:
        with data_errors(weights):
            spec = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)["spec"]
        return {"num_frames": int(spec["num_frames"]), "view_fps": float(spec["view_fps"])}
    except DataError:
        raise
    except Exception as e:  # torch.load raises a dozen types
        remedy = "give --num_frames and --view_fps instead of --model"
        raise DataError(f"{weights}: no weights file that says its window ({short_reason(e)}); {remedy}") from e


def prepare_bdd100k(root: str, out: str, *, workers: int) -> str:
    """Write the list of BDD100K's videos that open; returns what was done."""
    cache = Path(out).with_suffix(".json")
    clips = build_clips("BDD100K", root, "all", VideoScan(cache, workers=workers))
    lines = "".join(f"{clip.name if Path(out).parent == Path(root) else clip.source}\n" for clip in clips)
    _write(Path(out), lines)
    message = f"{len(clips)} videos, in {out}; {len(clips.unreadable)} do not open"
    return f"{message}; {cache} may be given to --scan_cache"


def prepare_sheet(sheet: str, out: str, *, name: str | None) -> str:
    """Write a worksheet as csv; returns what was done."""
    rows = read_sheet(Path(sheet), name)
    _write_csv(Path(out), rows)
    return f"{max(len(rows) - 1, 0)} rows, in {out}"


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise DataError(f"{path} exists; remove it, or write to another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as e:
        raise DataError(f"{path}: cannot be written ({e.strerror})") from e


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write(path, text.getvalue())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("half", help="half of the training clips of each category")
    command.add_argument("name", choices=["DoTA", "DADA2K"])
    command.add_argument("root", help="root folder of the data set")
    command.add_argument("--seed", type=natural, default=0, help="of the draw (default: 0)")
    command.add_argument("--out", help="list to write (default: where DoTA_half or DADA2K_half expects it)")

    command = commands.add_parser("split", help="lists of two splits, no source in both")
    command.add_argument("name", help="data set")
    command.add_argument("root", help="its folder, or a csv file of your own")
    command.add_argument("--split", default="all", help="split to divide (default: all)")
    command.add_argument("--by", default="source", help="source, clip, or a group as weather (default: source)")
    command.add_argument("--val", type=share_below_1, default=0.2, help="share of the second split (default: 0.2)")
    command.add_argument("--seed", type=natural, default=0, help="of the draw (default: 0)")
    command.add_argument("--names", nargs=2, default=["train", "val"], help="of the two splits (default: train val)")
    command.add_argument("--assume_fps", type=frame_rate, help=ASSUME_FPS)
    command.add_argument("--workers", type=processes, default=8, help="processes that open videos (default: 8)")

    command = commands.add_parser("frames", help="frame-level annotation csv for offline metrics")
    command.add_argument("name", help="labelled data set: DoTA, DADA2K, ...")
    command.add_argument("root", help="root folder of the data set")
    command.add_argument("out", help="csv to write, e.g. frame_level_anno_val.csv")
    command.add_argument("--split", default="val", help="train, val or all (default: val)")
    command.add_argument("--model", help="weights file whose window is taken")
    command.add_argument("--num_frames", type=frame_count, help="frames of a window (default: the model's, or 16)")
    command.add_argument("--view_fps", type=frame_rate, help="frames per second of one (default: the model's, or 10)")
    command.add_argument("--assume_fps", type=frame_rate, help=ASSUME_FPS)

    command = commands.add_parser("bdd100k", help="list of BDD100K's videos that open")
    command.add_argument("root", help=".../bdd100k/videos")
    command.add_argument("out", help="list to write; in ROOT its lines are relative, elsewhere absolute")
    command.add_argument("--workers", type=processes, default=8, help="processes that open videos (default: 8)")

    command = commands.add_parser("sheet", help="an .xlsx or .xls sheet as csv")
    command.add_argument("sheet", help="workbook")
    command.add_argument("out", help="csv to write")
    command.add_argument("--name", help=f"worksheet (default: {CAP_SHEET!r} if there is one, else the first)")

    options = vars(parser.parse_args())
    setup_logging(0)
    run: dict[str, Callable[..., str]] = {
        "half": prepare_half,
        "split": prepare_split,
        "frames": prepare_frames,
        "bdd100k": prepare_bdd100k,
        "sheet": prepare_sheet,
    }
    try:
        print(run[options.pop("command")](**options))
    except (DataError, ValueError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
