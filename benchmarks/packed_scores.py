"""How far the scores of a model move when it reads a pack in place of the original, or JPEGs decoded in a hurry.

    python -m benchmarks.cut_video VIDEO build/cut
    python -m benchmarks.packed_scores --data_path build/cut --short_side 320 256 --squash 0 320 224

It prints a line of JSON for each --decoding of training and for each pack.

Without weights at hand: ViT-S at 16 x 224 x 224 with random weights (seed 0), and a head fitted to its features of the
original's training split (logistic regression). Scores and AUC_ROC are of all windows. With a model of your own,
evaluate both and use compare_predictions.py.
"""

import itertools
import json
import tempfile
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from datasets import ClipTable, build_clips
from datasets.augment.frames import EvalTransform, fit_of
from datasets.clips import Clip
from datasets.readers import open_clip
from datasets.tools.pack import Settings, pack
from datasets.windows import index_clips
from engine.metrics import frame_metrics
from models import create_model
from utils.cli import Parser, percent, pixels_or_0

MODEL, SIZE = "vit_small_patch16_224", 224


@torch.inference_mode()
def features(clips: ClipTable, model: torch.nn.Module, decoding: str = "exact") -> Tensor:
    """Return float64 (windows, D) of all windows, in order, of frames decoded as one of names.DECODINGS."""
    index, found = index_clips(clips, num_frames=16, view_fps=10, stride=1), []
    for number, clip in enumerate(clips):
        ids, video = index.needed_frames(number), pictures(clip, index.needed_frames(number), decoding)
        places = torch.from_numpy(np.searchsorted(ids, index.frames(number, index.last_frames(number))))
        for rows in places.split(4):
            found.append(model.forward_features(model.normalize(video[rows].transpose(1, 2))).double())
    return torch.cat(found)


def pictures(clip: Clip, ids: np.ndarray, decoding: str) -> Tensor:
    """Return frames of a clip as evaluation sees them, uint8 (n, 3, 224, 224)."""
    with open_clip(clip) as reader:
        return EvalTransform(SIZE)(reader.frames(ids, fit_of(decoding, SIZE)))


def pixel_difference(clips: ClipTable, decoding: str) -> dict[str, float]:
    """Return the mean difference in levels, and the PSNR in dB, of every tenth frame to its exact pixels."""
    ids = [np.arange(0, clip.num_frames, 10) for clip in clips]
    pairs = [[pictures(*clip, d).double() for d in (decoding, "exact")] for clip in zip(clips, ids, strict=True)]
    difference = torch.cat([(a - b).flatten() for a, b in pairs])
    psnr = 10 * torch.log10(255**2 / difference.square().mean())
    return {"mean_abs_pixel_difference": round(float(difference.abs().mean()), 3), "psnr": round(float(psnr), 1)}


def fit(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression with a little weight decay to x (n, D): returns weights (D,) and bias (1,)."""
    weights, bias = (torch.zeros(n, dtype=x.dtype, requires_grad=True) for n in (x.shape[1], 1))
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x @ weights + bias, labels) + 0.1 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach(), bias.detach()


def main() -> None:
    """Run the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data_path", required=True, help="root of a data set in DoTA's layout")
    parser.add_argument(
        "--short_side", type=pixels_or_0, nargs="+", default=[320, 256], help="of the packs (default: 320 256)"
    )
    parser.add_argument("--squash", type=pixels_or_0, nargs="+", default=[0, 320, 224], help="(default: 0 320 224)")
    parser.add_argument("--quality", type=percent, default=92, help="of their JPEGs (default: 92)")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(MODEL).eval()
    splits = [build_clips("DoTA", args.data_path, split) for split in ("train", "val")]
    index = [index_clips(clips, num_frames=16, view_fps=10, stride=1) for clips in splits]
    labels = [
        torch.cat([torch.from_numpy(c.labels[i.last_frames(k)]) for k, c in enumerate(s)])
        for s, i in zip(splits, index, strict=True)
    ]
    train, val = (features(clips, model) for clips in splits)
    mean, std = train.mean(0), train.std(0) + 1e-9
    weights, bias = fit((train - mean) / std, labels[0].double())

    def scores(parts: list[Tensor]) -> np.ndarray:
        return torch.sigmoid((torch.cat(parts) - mean) / std @ weights + bias).numpy()

    truth, original = torch.cat(labels).numpy(), scores([train, val])
    auroc = frame_metrics(original, truth)["auroc"]

    def change(found: np.ndarray) -> dict[str, float]:
        return {
            "windows": len(truth),
            "anomalous": int(truth.sum()),
            "auroc_original": round(100 * auroc, 2),
            "auroc_difference": round(100 * (frame_metrics(found, truth)["auroc"] - auroc), 2),
            "mean_abs_score_difference": round(float(np.abs(found - original).mean()), 4),
            "std_of_scores": round(float(original.std()), 4),
        }

    for decoding in ("full", "small"):
        found = scores([features(clips, model, decoding) for clips in splits])
        print(json.dumps({"decoding": decoding} | change(found) | pixel_difference(splits[1], decoding)), flush=True)
    for side, squash in itertools.product(args.short_side, args.squash):
        settings = Settings(side, 10, args.quality, squash)
        with tempfile.TemporaryDirectory() as folder:
            pack("DoTA", args.data_path, folder, settings=settings)
            packed = scores([features(build_clips("DoTA", folder, split), model) for split in ("train", "val")])
        print(json.dumps(asdict(settings) | change(packed)), flush=True)


if __name__ == "__main__":
    main()
