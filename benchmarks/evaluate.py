"""Windows per second of an evaluation, ours beside the published way.

    python -m benchmarks.evaluate [--json] [--data build/benchmark] [--video FILE] [--model vit_small_patch16_224]

Every window of 16 frames of 1280 x 720 zips is scored once. "worker" is what a reading process does: decode, shrink,
send; "whole" scores a split in this process: it also normalises, gathers windows, and runs the model ("none" looks at
one frame). The yardstick decodes, shrinks and normalises each window on its own, and has no model. In one thread, CPU
seconds, in turns, medians over rounds; the host's alone, where --device is a GPU.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

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
)
from benchmarks._data_sets import Recipe, make
from benchmarks.data import evaluation_ways, table_of
from datasets.augment.frames import EvalTransform
from datasets.stream import SplitWindows
from engine.evaluate import Scorer
from models import create_model


class NoModel(nn.Module):
    """Scores windows by the mean of their last frame; normalises as the models do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.normalize = create_model("vit_tiny_patch16_64").normalize  # by means and deviations alone

    def forward(self, video: Tensor) -> Tensor:
        """Map (B, 3, T, H, W) to (B, 2)."""
        return video[:, :, -1].mean(dim=(1, 2, 3))[:, None] * self.weight


def whole_ways(roots: dict[str, str], windows: int, model: str, device: str) -> dict[str, Way]:
    """Return the ways of `evaluation_ways`, and the whole evaluation with a model of this name, or "none"."""
    network = (NoModel() if model == "none" else create_model(model)).to(device)
    return evaluation_ways(roots, windows) | {"whole": scoring(roots, network, device)}


def scoring(roots: dict[str, str], model: nn.Module, device: str) -> Way:
    """Return what scores all windows of the zips, whatever clip it is called with."""
    clips, index = table_of(roots, "zips")
    scorer = Scorer(SplitWindows(clips, index, EvalTransform(_yardstick.SIZE), device=device))
    return lambda _: len(scorer.score(model).clip)


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__)
    add_data_flags(parser)
    parser.add_argument("--model", default="none", help='model to run, of 16 frames of 224 pixels (default: "none")')
    parser.add_argument("--device", default="cpu", help="where windows are gathered and scored (default: cpu)")
    args = parser.parse_args()
    single_thread()
    with tempfile.TemporaryDirectory() as folder:
        roots = make(Path(args.data or folder), Recipe(args.video, tuple(args.size)))
        ways = partial(whole_ways, roots, args.windows, args.model, args.device)
        clips, _ = table_of(roots, "zips")
        seconds = in_turns(ways, [[i % len(clips)] for i in range(args.rounds)])
    names = {"worker": "evaluation", f"whole, model {args.model}": "whole"}
    results = {shown: against(seconds[name], seconds["yardstick"]) for shown, name in names.items()}
    text = f"Windows per second, {args.rounds} rounds in turns, one thread:\n\n{comparison(results)}"
    print_results(text, results, as_json=args.json)


if __name__ == "__main__":
    main()
