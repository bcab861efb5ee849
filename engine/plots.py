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
from torch import Tensor

from engine.metrics import HALF, THRESHOLDS, precision_recall_curve, roc_curve, threshold_curve
from utils.files import replaced

FIGURES = ("roc", "pr", "mcc", "confusion")


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def evaluation_figures(scores: np.ndarray, labels: np.ndarray, metrics: dict[str, float]) -> dict[str, Figure]:
    """Scores in [0, 1], 0/1 labels and their `frame_metrics` -> {"roc", "pr", "mcc", "confusion": Figure}."""
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
    return dict(zip(FIGURES, (roc, pr, mcc, confusion), strict=True))


def reconstruction_picture(videos: Sequence[Tensor], columns: int = 8) -> np.ndarray:
    """Videos (B, 3, T, H, W) in [0, 1] -> uint8 (B x len(videos) x H, columns x W, 3).

    A row of frames, evenly spaced in time, for each of the videos; the rows of a clip below each other.
    """
    frames = videos[0].shape[2]
    shown = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    rows = torch.stack([video[:, :, torch.from_numpy(shown)] for video in videos])
    pixels = (rows.cpu() * 255).round().byte()
    return rearrange(pixels, "v b c t h w -> (b v h) (t w) c").numpy()


def health_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw what `engine.health` keeps, over epochs: AUC with its interval, effective rank, loss and trivial loss."""
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
    return figure


def save_figures(folder: str | Path, figures: dict[str, Figure]) -> None:
    """Write <folder>/<name>.png. Raises OSError, which names the file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with replaced(Path(folder, f"{name}.png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
