"""Pieces of report.html: the style, curves as inline SVG, pictures as data URIs. Every name is escaped here."""

import html
from collections.abc import Iterable, Sequence

import numpy as np

from engine.curve import RiskCurve, Thumbnail, envelope
from engine.pictures import data_uri
from engine.summary import clock, score_at
from utils.text import printable

_WIDE, _HIGH = 1000, 200  # units of a curve's drawing, which is stretched to the page
_PARTS = 300  # of a curve, each with its highest and lowest score: some 7 kB for a video of any length
_OF_WORDS = ("Video", "Reason")  # columns of a table

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1f; background: #fff; max-width: 1100px; margin: 0 auto;
  padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.6em; line-height: 1.25; } h2 { font-size: 1.2em; margin: 0 0 8px; }
h3 { font-size: 1em; margin: 16px 0 4px; }
p { margin: 8px 0; } a { color: #1f4e79; }
.note { border-left: 4px solid #d1495b; background: #fdf3f4; padding: 8px 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0; }
dt { color: #555; } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 4px 12px 4px 0; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd; }
th { font-weight: 600; vertical-align: bottom; } td { white-space: nowrap; }
th.name, td.name { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
section { border-top: 2px solid #1b1b1f; margin-top: 32px; padding-top: 12px; }
.curve { position: relative; margin: 12px 0 0 34px; height: 200px; }
.curve svg { position: absolute; inset: 0; width: 100%; height: 100%; border-left: 1px solid #888;
  border-bottom: 1px solid #888; box-sizing: border-box; }
.curve span { position: absolute; font-size: 12px; line-height: 1; color: #555;
  white-space: nowrap; }
.curve .y { right: calc(100% + 6px); transform: translateY(-50%); }
.curve .peak { transform: translate(-50%, 4px); color: #1b1b1f; background: #fffc; padding: 0 2px; font-weight: 600; }
.times { display: flex; justify-content: space-between; margin-left: 34px; font-size: 12px; color: #555; }
.legend { font-size: 13px; color: #555; margin: 4px 0 0 34px; }
.legend b { display: inline-block; width: 22px; height: 10px; margin: 0 4px 0 10px; box-sizing: border-box; }
.legend b:first-child { margin-left: 0; }
.peaks { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
figure { margin: 0; } figure img { width: 100%; display: block; background: #eee; }
figcaption { font-size: 13px; color: #555; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; }
  .curve { height: 150px; } .times span:nth-child(even) { display: none; } }
"""


def text(value: object) -> str:
    """Return a value as text of a page: printable and escaped."""
    return html.escape(printable(str(value)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str) -> str:
    """Return a table of cells that are HTML already; numbers stand to the right. caption: for who hears it."""
    names = [' class="name"' if cell in _OF_WORDS else "" for cell in head]
    cells = "".join(f'<th scope="col"{kind}>{cell}</th>' for kind, cell in zip(names, head, strict=True))
    lines = ("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(names, row, strict=True)) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    label = html.escape(caption)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table aria-label="{label}">'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of terms and what they are; both are escaped here."""
    return "<dl>" + "".join(f"<dt>{text(term)}</dt><dd>{text(said)}</dd>" for term, said in pairs) + "</dl>"


def curve_drawing(curve: RiskCurve, thumbnails: Sequence[Thumbnail], label: str) -> str:
    """Return the risk over time as inline SVG, with axes and legend in text beside it, which no width distorts."""
    shapes = [*_gaps(curve), *_warm_up(curve), *_events(curve), *_rule(curve), *_lines(curve)]
    svg = (
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none" role="img" aria-label="{text(label)}">'
        f"{''.join(shapes)}</svg>"
    )
    scale = "".join(f'<span class="y" style="top:{100 - 100 * y:g}%">{y:g}</span>' for y in (0, 0.5, 1))
    peaks = "".join(_peak(curve, number, shown) for number, shown in enumerate(thumbnails, start=1))
    marks = [clock(curve.duration * quarter / 4, curve.duration).removesuffix(".0") for quarter in range(5)]
    times = "".join(f"<span>{mark}</span>" for mark in marks)
    return (
        f'<div class="curve">{svg}{scale}{peaks}</div>\n<div class="times" aria-hidden="true">{times}</div>\n'
        f"{_legend(curve)}"
    )


def thumbnail_figures(curve: RiskCurve, thumbnails: Sequence[Thumbnail]) -> str:
    """Return the pictures of the frames, numbered as on the curve, with time, frame and score in words."""
    figures = []
    for number, shown in enumerate(thumbnails, start=1):
        when, score = clock(shown.frame / curve.fps, curve.duration), score_at(curve, shown.frame)
        caption = f"{number}: {when}, frame {shown.frame}" + ("" if score is None else f", score {score:.3f}")
        picture = f'<img src="{data_uri(shown.picture)}" alt="frame {shown.frame}" loading="lazy">'
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="peaks">{"".join(figures)}</div>' if figures else ""


def _x(curve: RiskCurve, seconds: float | np.ndarray) -> float | np.ndarray:
    return np.clip(seconds / curve.duration, 0, 1) * _WIDE


def _y(score: float | np.ndarray) -> float | np.ndarray:
    return (1 - score) * _HIGH


def _band(curve: RiskCurve, start: float, end: float, style: str) -> str:
    left, right = _x(curve, start), _x(curve, end)
    return f'<rect x="{left:.1f}" y="0" width="{max(right - left, 1):.1f}" height="{_HIGH}" {style}/>'


def _gaps(curve: RiskCurve) -> list[str]:
    return [_band(curve, gap.start, gap.end, 'class="gap" fill="#8a8a8a"') for gap in curve.gaps]


def _warm_up(curve: RiskCurve) -> list[str]:
    return [_band(curve, start, end, 'class="warm" fill="#e4e4e4"') for start, end in curve.filling()]


def _events(curve: RiskCurve) -> list[str]:
    bands = []
    for event in curve.events():
        x = _x(curve, event.alert)
        bands.append(_band(curve, event.start, event.end, 'class="event" fill="#d1495b" fill-opacity="0.3"'))
        bands.append(f'<path class="alert" d="M{x:.1f} 0V{_HIGH}" stroke="#a01028" stroke-width="2" '
                     'vector-effect="non-scaling-stroke"/>')  # fmt: skip
    return bands


def _rule(curve: RiskCurve) -> list[str]:
    if not curve.rule:
        return []
    dashes = 'stroke="#1b1b1f" stroke-dasharray="6 4" vector-effect="non-scaling-stroke"'
    return [f'<path class="threshold" d="M0 {_y(curve.rule.threshold):.1f}H{_WIDE}" {dashes}/>']


def _lines(curve: RiskCurve) -> list[str]:
    lines = []
    for time, score in envelope(curve, _PARTS):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(_x(curve, time), _y(score), strict=True))
        lines.append(f'<polyline points="{points}" fill="none" stroke="#1f4e79" stroke-width="1.5" '
                     'stroke-linecap="round" vector-effect="non-scaling-stroke"/>')  # fmt: skip
    return lines


def _peak(curve: RiskCurve, number: int, shown: Thumbnail) -> str:
    score = score_at(curve, shown.frame)
    place = f"left:{_x(curve, shown.frame / curve.fps) * 100 / _WIDE:.2f}%;top:{_y(score or 0) * 100 / _HIGH:.1f}%"
    return f'<span class="peak" style="{place}" aria-hidden="true">{number}</span>'


def _legend(curve: RiskCurve) -> str:
    shown = []
    if curve.rule:
        shown.append(("border-top:2px dashed #1b1b1f;height:2px;vertical-align:middle", "threshold"))
    if curve.rule and curve.events():
        shown += [("background:#d1495b4d", "event"), ("border-left:2px solid #a01028;width:2px", "alert")]
    if _warm_up(curve):
        repeated = "; at the beginning the first frame is repeated" if curve.warming_up.any() else ""
        shown.append(("background:#e4e4e4", f"no full window yet{repeated}"))
    if curve.gaps:
        shown.append(("background:#8a8a8a", "no picture"))
    entries = " ".join(f'<b style="{style}"></b>{said}' for style, said in shown)
    return f'<p class="legend">{entries}</p>' if entries else ""
