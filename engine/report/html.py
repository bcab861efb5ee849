"""A report as one page that needs nothing else: styles and plots are inside, in the light or dark of the system."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from engine.report import text
from engine.report.svg import Plot

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --panel: #f5f6f8; --ink: #1c2024; --soft: #5c646d; --rule: #d5d9de;
  --a: #0b62c4; --b: #b3470a; --c: #23783a; --band: #f3c6b6; --warn: #a3260f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --panel: #1e2327; --ink: #e8eaed; --soft: #a3abb3;
  --rule: #3a4148; --a: #6fb1ff; --b: #ff9d5c; --c: #76cf8c; --band: #5b2f22; --warn: #ff9180; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; } p { margin: .4rem 0; max-width: 60rem; }
.soft { color: var(--soft); } .verdict { border-left: 4px solid var(--a);
  padding: .4rem .8rem; background: var(--panel); }
.verdict.not { border-color: var(--warn); }
.scroll { overflow-x: auto; margin-bottom: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: pre; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--soft); font-weight: 600; }
td.words { text-align: left; color: var(--soft); white-space: normal; min-width: 14rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; padding: .6rem; background: var(--panel);
  border-radius: 6px; max-width: 100%; box-sizing: border-box; } figcaption { max-width: 360px; font-size: 13px;
  overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; display: block; }
.shots { display: flex; gap: 8px; max-width: 360px; margin-top: 6px; font-size: 12px; } .shots div { flex: 1; }
.shots img { width: 100%; display: block; border-radius: 3px; }
.grid { stroke: var(--rule); } .tick, .axis { fill: var(--soft); font-size: 11px; } .end { text-anchor: end; }
.mid { text-anchor: middle; } .line { fill: none; stroke-width: 2; } .band { fill: var(--band); }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); stroke-dasharray: 6 3; } .line.c { stroke: var(--c);
  stroke-dasharray: 2 3; } .line.faint { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.c { fill: var(--c); }
.key.a { color: var(--a); } .key.b { color: var(--b); } .key.c { color: var(--c); } .key { font-weight: 600; }
"""


Thumbnails = Mapping[tuple[str, int], str]


def report_html(report: Mapping[str, Any], thumbnails: Thumbnails) -> str:
    """Return the page. thumbnails: {(clip, frame): data URI} of the pictures that there are."""
    parts = [
        "<h1>Evaluation of risk scores</h1>",
        _p(
            f"Intervals hold {100 * report['level']:.0f} % and come from {report['replicates']} bootstrap replicates "
            f"(seed {report['seed']}). They hold the choice of clips, not the choice of the checkpoint nor of the seed "
            "of training. Figures are in percent where nothing else is said; n/a is undefined, with the reason beside.",
            "soft",
        ),
    ]
    parts += [_p("Every figure is of the frames that all files have.")] if report["same_clips"] else []
    parts += [_comparison(report["comparison"])] if report["comparison"] else []
    parts += [_model(model, thumbnails) for model in report["models"]]
    names = escape(", ".join(model["name"] for model in report["models"]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>Report: {names}</title><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _p(words: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def _table(rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """words: whether the last column is text."""
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for row in body:
        marks = [' class="words"' if words and i == len(row) - 1 else "" for i in range(len(row))]
        tds = (f"<td{m}>{escape(cell)}</td>" for m, cell in zip(marks, row, strict=True))
        lines.append(f"<tr>{''.join(tds)}</tr>")
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(lines)}</table></div>'


def _figure(plot: Plot, caption: str, below: str = "") -> str:
    return f"<figure>{plot.svg()}<figcaption>{caption}</figcaption>{below}</figure>"


def _model(model: Mapping[str, Any], thumbnails: Thumbnails) -> str:
    total, baselines = model["total"], model["baselines"]
    beaten = baselines["verdict"].startswith("The model beats")
    parts = [
        f"<h2>{escape(model['name'])}</h2>",
        _p(model["path"], "soft"),
        _p(text.data_line(model["data"])),
        _p(f"Recordings: {model['data']['sources_are_from']}.", "soft"),
        *(_p(f"Note: {note}.", "soft") for note in model["data"]["notes"]),
        _p(baselines["verdict"], "verdict" if beaten else "verdict not"),
        "<h3>All frames</h3>",
        _table(text.total_rows(total)),
        _p(_binning(total), "soft"),
        *([_p(total["why_undefined"])] if total["why_undefined"] else []),
        "<h3>Beside rules that look at no pixel</h3>",
        _table(text.baseline_rows(model), words=True),
    ]
    for column, groups in model["groups"].items():
        parts.append(f"<h3>By {escape(text.column_title(column))}</h3>")
        left_out = groups.get("left_out")
        parts.append(_p(left_out) if left_out else _table(text.group_rows(groups), words=True))
    parts += ["<h3>Where in the clip, and how far a score is a probability</h3>", _position_and_calibration(model)]
    parts += ["<h3>Anticipation</h3>", _anticipation(model["anticipation"])]
    for title, key in (("Best clips", "best"), ("Worst clips", "worst")):
        parts += [
            f"<h3>{title}, by AUC_ROC within the clip (anomalous frames are shaded)</h3>",
            _clips(model["clips"], key, thumbnails),
        ]
    parts += ["<h3>Worst false alarms</h3>", _alarms(model["false_alarms"], thumbnails)]
    return "".join(parts)


def _binning(total: Mapping[str, Any]) -> str:
    worst = max((abs(v) for v in total["binning_error"].values() if v == v), default=0.0)
    moved = f"{100 * worst:.1g}" if worst >= 1e-5 else "less than 0.001"
    reasons = dict.fromkeys(f["reason"] for kind in total["intervals"].values() for f in kind.values() if f["reason"])
    why = "".join(f" No interval: {reason}." for reason in reasons)
    return (
        f"Decide by the intervals over {total['honest_unit']}s. Replicates count scores in bins, which moves these "
        f"figures by {moved} points at most. AP by chance: {text.percent(total['chance_ap'])}.{why}"
    )


def _position_and_calibration(model: Mapping[str, Any]) -> str:
    rows = model["by_position"]
    x = [(row["from"] + row["to"]) / 2 for row in rows]
    position = Plot("By position in the clip", "position in the clip", "share", 0, 1, (0, 0.25, 0.5, 0.75, 1))
    for key, kind in (("anomalous", "b"), ("mean_score", "a"), ("auroc", "c")):
        position.line(x, [row[key] for row in rows], kind, dots=True)
    keys = (
        '<span class="key b">anomalous frames</span>, <span class="key a">mean score</span>, '
        '<span class="key c">AUC_ROC within the tenth</span>'
    )
    bins = [row for row in model["calibration"]["bins"] if row["frames"]]
    reliability = Plot("Reliability", "mean score", "anomalous frames", 0, 1, (0, 0.25, 0.5, 0.75, 1))
    reliability.line((0, 1), (0, 1), "faint")
    reliability.line([row["mean_score"] for row in bins], [row["anomalous"] for row in bins], "a", dots=True)
    caption = escape(f"Reliability: {text.calibration_line(model['calibration'])}")
    return f'<div class="row">{_figure(position, keys)}{_figure(reliability, caption)}</div>'


def _anticipation(found: Mapping[str, Any]) -> str:
    if "model" not in found:
        return _p(f"n/a: {found['why_undefined']}.")
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in found["counts"].items())
    parts = [_p(f"Clips: {counts}. The event is the {found['event']}.")]
    parts += [_p(f"{found['why_undefined']}.")] if found["why_undefined"] else []
    parts.append(_table(text.anticipation_rows(found)))
    parts += [_table(text.clip_level_rows(found))] if found["counts"]["negative"] else []
    parts.append(_table(text.time_bin_rows(found)))
    parts += [_p(f"Safe frames: {found['time_bins_against']}.", "soft")] if found["time_bins_against"] else []
    parts.append(_p(text.published_line(found["as_published"]) + ".", "soft"))
    return "".join(parts)


def _curve(clip: Mapping[str, Any], caption: str, thumbnails: Thumbnails) -> str:
    x = clip["x"]
    plot = Plot(f"Scores of {clip['clip']}", clip["unit"], "score", x[0], x[-1], height=170)
    for start, end in clip["anomalous"]:
        plot.band(start, end)
    plot.line(x, clip["score"], "a")
    shown = [point for point in clip["shown"] if (clip["clip"], point["frame"]) in thumbnails]
    plot.dots([point["x"] for point in shown], [point["score"] for point in shown], "b")
    shots = "".join(_shot(point, clip["unit"], thumbnails[clip["clip"], point["frame"]]) for point in shown)
    below = f'<div class="shots">{shots}</div>' if shots else ""
    return _figure(plot, f"{escape(clip['clip'])}<br><span class='soft'>{escape(caption)}</span>", below)


def _shot(point: Mapping[str, Any], unit: str, uri: str) -> str:
    place = f"{point['x']:.1f} s" if unit == "seconds" else f"frame {point['frame']}"
    words = f"{'anomalous' if point['label'] else 'safe'}, {place}, score {point['score']:.2f}"
    return f'<div><img src="{uri}" alt="frame {point["frame"]}" loading="lazy"><span class="soft">{words}</span></div>'


def _clips(found: Mapping[str, Any], key: str, thumbnails: Thumbnails) -> str:
    if not found[key]:
        return _p(f"n/a: {found['why_undefined']}.")
    captions = (f"AUC_ROC {text.percent(c['auroc'], 1)}, Brier {c['brier']:.3f}" for c in found[key])
    curves = (_curve(c, caption, thumbnails) for c, caption in zip(found[key], captions, strict=True))
    return f'<div class="row">{"".join(curves)}</div>'


def _alarms(alarms: Sequence[Mapping[str, Any]], thumbnails: Thumbnails) -> str:
    if not alarms:
        return _p("None, or no times are known.")
    captions = (f"{a['from']:.1f} to {a['to']:.1f} s, peak {a['peak']:.2f}, nothing anomalous there" for a in alarms)
    curves = (_curve(a, caption, thumbnails) for a, caption in zip(alarms, captions, strict=True))
    return f'<div class="row">{"".join(curves)}</div>'


def _comparison(found: Mapping[str, Any]) -> str:
    parts = ["<h2>Comparison</h2>", *(_p(line) for line in text.comparison_lines(found))]
    parts += [_p(verdict, "verdict") for verdict in found["verdicts"]]
    parts.append(_table(text.comparison_rows(found)))
    if found["differences"]:
        parts += [_table(text.difference_rows(found)), _p(found["rule"], "soft")]
    parts += [_p(found["seeds"], "soft")] if "seeds" in found else []
    return "".join(parts)
