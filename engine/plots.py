"""Figures of an evaluation: ROC, precision-recall, MCC over the threshold, confusion. Pictures of a reconstruction. The
history of a probe.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from engine.fonts import fitting, font
from engine.metrics import HALF, THRESHOLDS, precision_recall_curve, roc_curve, threshold_curve
from utils.files import replaced
from utils.text import label_of

FIGURES = ("roc", "pr", "mcc", "confusion")
_ROWS = ("input", "masked", "reconstructed")
_LETTERS, _EDGE, _NARROWEST = 12, 6, 640  # pixels: height of words at least, space beside them, width of a picture


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def evaluation_figures(scores: np.ndarray, labels: np.ndarray, metrics: dict[str, float], of: str) -> dict[str, Figure]:
    """Scores in [0, 1], 0/1 labels and their `frame_metrics` -> {"roc", "pr", "mcc", "confusion": Figure}.

    of: what they are of, a model and a split, which stands above each.
    """
    curve = threshold_curve(scores, labels)

    roc, axes = _axes(f"ROC, AUC {metrics['auroc']:.3f}", "false positive rate", "true positive rate")
    axes.plot(*roc_curve(scores, labels))
    axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)

    pr, axes = _axes(f"Precision-recall, AP {metrics['ap']:.3f}", "recall", "precision")
    precision, recall = precision_recall_curve(scores, labels)
    axes.plot(recall, precision)
    axes.axhline(metrics["n_pos"] / metrics["n"], linestyle="--", color="grey", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))

    mcc, axes = _axes(f"MCC, area {metrics['auc_mcc']:.3f}", "threshold", "MCC")
    axes.plot(THRESHOLDS, curve.mcc)
    axes.axvline(metrics["mcc_max_threshold"], linestyle="--", color="grey", linewidth=1)
    axes.set(xlim=(0, 1))

    confusion, axes = _axes("Frames at threshold 0.5", "predicted", "labelled")
    counts = np.array([[curve.tn[HALF], curve.fp[HALF]], [curve.fn[HALF], curve.tp[HALF]]])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        text = f"{count}\n{100 * share:.1f} %"
        axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.5 else "black")
    axes.set(xticks=[0, 1], yticks=[0, 1], xticklabels=["safe", "anomalous"], yticklabels=["safe", "anomalous"])
    figures = dict(zip(FIGURES, (roc, pr, mcc, confusion), strict=True))
    for figure in figures.values():
        figure.suptitle(label_of(of), fontsize=9, color="dimgrey", parse_math=False)
    return figures


def reconstruction_picture(
    videos: Sequence[Tensor], names: Sequence[str], captions: Sequence[str], columns: int = 8
) -> np.ndarray:
    """Draw what a masked autoencoder makes of clips: uint8 (H, W, 3), on which each row says what it is.

    Args:
        videos: what `MaskedAutoencoder.reconstruct` returns, each (B, 3, T, H, W) in [0, 1].
        names: of the B clips; each stands above the clip's rows.
        captions: lines on top.
        columns: frames of a row at most, evenly spaced in time.
    """
    frames = videos[0].shape[2]
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    rows = torch.stack([video[:, :, torch.from_numpy(shown)] for video in videos])
    pixels = rearrange((rows.cpu() * 255).round().byte(), "v b c t h w -> b v h (t w) c").numpy()
    high, wide = pixels.shape[2:4]
    size = max(_LETTERS, wide // 90)
    line, left = round(1.7 * size), round(max(map(font(size).getlength, _ROWS))) + 2 * _EDGE
    width = max(left + wide, _NARROWEST)
    image = Image.new("RGB", (width, line * (len(captions) + len(names)) + len(names) * len(_ROWS) * high), "white")
    draw = ImageDraw.Draw(image)

    def write(words: str, x: int, middle: int) -> None:
        draw.text((x, middle), words, "black", fitting(words, size, width - x - _EDGE), anchor="lm")

    for number, caption in enumerate(captions):
        write(caption, _EDGE, number * line + line // 2)
    y = len(captions) * line
    for name, clip in zip(names, pixels, strict=True):
        write(label_of(name), left, y + line // 2)
        y += line
        for word, row in zip(_ROWS, clip, strict=True):
            write(word, _EDGE, y + high // 2)
            image.paste(Image.fromarray(row), (left, y))
            y += high
    return np.asarray(image)


def health_figure(history: Sequence[Mapping[str, float]], of: str) -> Figure:
    """Draw what `engine.health` keeps, over epochs: AUC with its interval, effective rank, loss and trivial loss.

    of: what was probed on what, which stands above.
    """
    figure = Figure(figsize=(5, 7), layout="constrained")
    probe, rank, loss = figure.subplots(3, sharex=True, height_ratios=(3, 2, 2))
    probed = [record for record in history if "auroc" in record]
    epochs, auroc = ([record[name] for record in probed] for name in ("epochs", "auroc"))
    probe.plot(epochs, auroc, "o-")
    probe.fill_between(epochs, *([r[f"auroc_{end}"] for r in probed] for end in ("low", "high")), alpha=0.2)
    probe.axhline(auroc[0], linestyle="--", color="grey", linewidth=1)
    best = int(np.argmax(auroc))
    probe.plot(epochs[best], auroc[best], "*", markersize=12)
    title = f"linear probe, best AUC {auroc[best]:.3f} after {epochs[best]} epochs"
    probe.set(title=title, ylabel="AUC_ROC, held out")
    rank.plot(epochs, [record["effective_rank"] for record in probed], "o-")
    rank.set(ylabel="effective rank")
    for name, label, style in (("loss", "loss", "-"), ("trivial_loss", "trivial loss", "--")):
        trained = [record for record in history if name in record]
        loss.plot([r["epochs"] for r in trained], [r[name] for r in trained], f"{style}o", markersize=3, label=label)
    loss.set(xlabel="epochs", ylabel="reconstruction loss")
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.legend()
    figure.suptitle(label_of(of), fontsize=9, color="dimgrey", parse_math=False)
    return figure


def save_figures(folder: str | Path, figures: dict[str, Figure]) -> None:
    """Write <folder>/<name>.png. Raises OSError, which names the file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with replaced(Path(folder, f"{name}.png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
