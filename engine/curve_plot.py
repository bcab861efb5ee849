"""The figure of a risk curve: curve.png."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from engine.curve import RiskCurve, Thumbnail, envelope
from engine.summary import clock, score_at
from utils.files import replaced
from utils.text import label_of

_PARTS = 1000  # of a curve: a figure has about as many columns of pixels
_COLUMNS = 6  # thumbnails of a row, as wide where there are fewer
_MOST_NAMED = 3  # gaps whose reasons stand below the figure
_CURVE, _EVENT, _GAP, _WARM = "#1f4e79", "#d1495b", "#555555", "#d9d9d9"
_TICKS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 36000, 86400)  # seconds


def curve_figure(curve: RiskCurve, thumbnails: Sequence[Thumbnail] = ()) -> Figure:
    """Return the figure of a curve: the risk over time, threshold, events, alerts and gaps; below it the thumbnails.

    thumbnails: of the frames of `summary.peak_frames`, ascending, in one row.
    """
    rows = 2 if thumbnails else 1
    figure = Figure(figsize=(10, 3.6 + 1.6 * (rows - 1)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
    grid = figure.add_gridspec(rows, max(len(thumbnails), _COLUMNS), height_ratios=[2.4, 1.15][:rows])
    axes = figure.add_subplot(grid[0, :])
    _draw_time(axes, curve)
    _draw_gaps(axes, curve)
    _draw_scores(axes, curve)
    _draw_rule(axes, curve)
    _mark(axes, curve, thumbnails)
    title = axes.set_title(label_of(curve.name, 90), loc="left", fontsize=11)
    title.set_parse_math(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper right", fontsize=8, ncols=3, frameon=False)
    for number, thumbnail in enumerate(thumbnails):
        below = figure.add_subplot(grid[1, number])
        below.imshow(thumbnail.picture)
        below.set_axis_off()
        score = score_at(curve, thumbnail.frame)
        said = "" if score is None else f", score {score:.3f}"
        when = clock(thumbnail.frame / curve.fps, curve.duration)
        below.set_title(f"{number + 1}: {when}{said}\nframe {thumbnail.frame}", fontsize=8)
    return figure


def save_figure(path: str | Path, figure: Figure) -> None:
    """Write a figure as PNG. Raises OSError, which names the file."""
    with replaced(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name in a script that the font lacks
        figure.savefig(temporary, format="png", dpi=110)


def _draw_time(axes: Axes, curve: RiskCurve) -> None:
    axes.set(xlim=(0, max(curve.duration, 1e-3)), ylim=(0, 1.03), ylabel="risk")
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if curve.duration < 60:
        axes.xaxis.set_major_locator(MaxNLocator(10))
        axes.set_xlabel("time (seconds)")
        return
    step = next((tick for tick in _TICKS if curve.duration / tick <= 12), curve.duration / 10)
    axes.set_xticks(np.arange(0, curve.duration + 1e-9, step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _tick(seconds, curve.duration)))
    axes.set_xlabel("time (minutes:seconds)" if curve.duration < 3600 else "time (hours:minutes)")


def _tick(seconds: float, span: float) -> str:
    whole = int(round(seconds))
    return f"{whole // 60}:{whole % 60:02d}" if span < 3600 else f"{whole // 3600}:{whole // 60 % 60:02d}"


def _draw_gaps(axes: Axes, curve: RiskCurve) -> None:
    said = []
    for number, gap in enumerate(curve.gaps):
        label = {"label": "no picture"} if number == 0 else {}
        style = {"facecolor": "#f4f4f4", "edgecolor": _GAP, "hatch": "///", "linewidth": 0.6, "zorder": 1}
        axes.axvspan(gap.start, gap.end, **style, **label)
        when = f"{clock(gap.start, curve.duration)} to {clock(gap.end, curve.duration)}"
        said.append(f"no picture {when}: {label_of(gap.reason, 80)}")
    if more := len(said) - _MOST_NAMED:
        said = [*said[:_MOST_NAMED], *([f"and {more} more stretches without pictures"] if more > 0 else [])]
    text = axes.set_xlabel("\n".join([axes.get_xlabel(), *said]), fontsize=9)
    text.set_parse_math(False)


def _draw_scores(axes: Axes, curve: RiskCurve) -> None:
    if not len(curve.frame):
        axes.text(0.5, 0.5, "no frame is scored", transform=axes.transAxes, ha="center", va="center", color=_GAP)
        return
    _draw_warm_up(axes, curve)
    for x, y in envelope(curve, _PARTS):
        marker = {"marker": ".", "markersize": 3} if len(x) < 100 else {}
        axes.plot(x, y, color=_CURVE, linewidth=1.2, zorder=4, **marker)


def _draw_warm_up(axes: Axes, curve: RiskCurve) -> None:
    """Shade where windows repeat the first frame, and where none is full: at the beginning and after gaps."""
    repeated = "; at first the first frame is repeated" if curve.warming_up.any() else ""
    for number, (begin, end) in enumerate(curve.filling()):
        label = {"label": f"no full window yet{repeated}"} if number == 0 else {}
        axes.axvspan(begin, end, color=_WARM, linewidth=0, zorder=0, **label)


def _draw_rule(axes: Axes, curve: RiskCurve) -> None:
    if curve.rule is None:
        return
    source = f", {label_of(curve.rule.source, 60)}" if curve.rule.source else ""
    label = f"threshold {curve.rule.threshold:.3g}{source}"
    line = axes.axhline(curve.rule.threshold, color="black", linestyle="--", linewidth=1, zorder=3, label="threshold")
    line.set_label(label.replace("$", r"\$"))
    for number, event in enumerate(curve.events()):
        named = number == 0
        # The edge keeps an event of a second visible in a recording of hours.
        axes.axvspan(event.start, event.end, facecolor=_EVENT, edgecolor=_EVENT, alpha=0.25, linewidth=1.2, zorder=2,
                     label="event" if named else None)  # fmt: skip
        axes.plot(event.alert, 1.0, marker="v", color=_EVENT, markersize=7, linestyle="", zorder=6, clip_on=False,
                  label="alert" if named else None)  # fmt: skip


def _mark(axes: Axes, curve: RiskCurve, thumbnails: Sequence[Thumbnail]) -> None:
    """Number the points on the curve that the thumbnails show."""
    for number, thumbnail in enumerate(thumbnails, start=1):
        score = score_at(curve, thumbnail.frame)
        if score is None:
            continue
        place = (thumbnail.frame / curve.fps, score)
        axes.plot(*place, "o", color="white", markeredgecolor=_CURVE, markersize=5, zorder=5)
        below = -12 if score > 0.85 else 6
        box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
        style = {"ha": "center", "fontsize": 9, "zorder": 7, "bbox": box}
        axes.annotate(str(number), place, (0, below), textcoords="offset points", **style)
