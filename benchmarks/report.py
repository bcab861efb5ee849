"""Write BENCHMARKS.md: what the other benchmarks print, on this machine, now.

    python -m benchmarks.report [--out BENCHMARKS.md] [--data build/benchmark] [--video FILE]

It takes a quarter of an hour on a quiet core. Where there is a GPU, the training steps are measured there.
"""

import subprocess
import sys
from pathlib import Path

import torch

from utils.cli import Parser, positive

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.report`; each table stands with its command, machine and load. The yardstick is the
published way of loading (`benchmarks/_yardstick.py`): every window on its own, at full size, with Pillow and float32.
"ratio" is how often ours is faster, the median over rounds, and "spread" the range of that over rounds; "_cpu" does in
the worker what a GPU does otherwise. Packs are measured against the published way on the originals.
"""


def section(title: str, module: str, flags: list[str]) -> str:
    """Run a benchmark and return its section of the file; what it logs is shown. Raises CalledProcessError."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
    return f"\n## {title}\n\n{subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout}"


def main() -> None:
    """Run the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--out", default="BENCHMARKS.md", help="file to write (default: BENCHMARKS.md)")
    parser.add_argument("--data", default="build/benchmark", help="folder for the data (default: build/benchmark)")
    parser.add_argument("--video", default="", help="video to make the data of, enlarged (default: rendered roads)")
    parser.add_argument("--rounds", type=positive, default=7, help="rounds of a median (default: 7)")
    args = parser.parse_args()
    loading = ["--data", args.data, "--rounds", str(args.rounds), *(["--video", args.video] if args.video else [])]
    cuda = torch.cuda.is_available()
    step = ["--device", "cuda", "--compile"] if cuda else ["--device", "cpu", "--steps", "2", "--batch_size", "4"]
    text = INTRODUCTION + section("Loading", "data", [*loading, "--workers", "1", "2"])
    text += section("Evaluation", "evaluate", loading)
    text += section("Prediction", "predict", ["--seconds", "2.2", *(["--video", args.video] if args.video else [])])
    text += section("Training steps", "step", step)
    if not cuda:
        text += "\nThe table of a GPU: `python -m benchmarks.step --device cuda --compile`. None was at hand here.\n"
    Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
