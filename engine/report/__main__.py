"""Honest numbers from predictions.csv, beside what a rule that never looks at a pixel reaches.

    python -m engine.report runs/eval                                   predictions.csv of the folder
    python -m engine.report ours=runs/a theirs=published.csv            paired differences on what both have
    python -m engine.report ours=s0 ours=s1 ours=s2 base=b0 base=b1     runs of several seeds: mean and deviation

Prints the report and writes report.json and report.html to --out. A file needs the columns clip, frame, score and
label; time, ttc and source are used where they are there, and each further column makes groups.
"""

import re
import sys
from pathlib import Path

from engine.report.build import Options, write_report
from engine.report.frames import ScoresError, read_frames
from utils.cli import Number, Parser, natural, share

REPLICATES = Number(100, 10**6, whole=True)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.prog = "python -m engine.report"
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE", help="predictions.csv, or a folder that holds it")
    parser.add_argument("--out", metavar="DIR", help="where report.json and report.html go (the first file's folder)")
    parser.add_argument("--replicates", type=REPLICATES, default=1000, help="of the bootstrap (%(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of the bootstrap (%(default)s)")
    parser.add_argument("--threshold", type=share, default=0.5, help="score from which a frame alarms (%(default)s)")
    parser.add_argument("--same_clips", action="store_true", help="every figure is of the frames that all files have")
    parser.add_argument(
        "--train_labels",
        metavar="FILE",
        help="columns clip, frame, label of the training split, on which the baselines are learned "
        "(default: on the scored clips themselves, each tenth from the others)",
    )
    return parser


def _named(words: list[str]) -> dict[str, list[Path]]:
    """Return {name: files} of "NAME=FILE" and "FILE"; a file without a name is called as its folder."""
    files: dict[str, list[Path]] = {}
    for word in words:
        match = re.fullmatch(r"([^/=]+)=(.+)", word)
        name, path = (match[1], Path(match[2])) if match and not Path(word).exists() else (None, Path(word))
        path = path / "predictions.csv" if path.is_dir() else path
        if name is None:
            name = path.absolute().parent.name if path.name == "predictions.csv" else path.stem
            while name in files:
                name += "'"
        files.setdefault(name, []).append(path)
    return files


def main() -> None:
    """Run the command."""
    args = _parser().parse_args()
    files = _named(args.files)
    out = args.out or next(iter(files.values()))[0].parent
    try:
        train = read_frames(args.train_labels, scores=False).table if args.train_labels else None
        options = Options(args.replicates, args.seed, args.same_clips, args.threshold, train)
        text, paths = write_report(files, out, options)
    except ScoresError as e:
        sys.exit(f"error: {e}")
    print(text)
    print("report: " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    main()
