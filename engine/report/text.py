"""A report in lines of text. Figures are in percent; what is undefined is "n/a"."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = {"auroc": "AUC_ROC", "ap": "AP", "auc_mcc": "AUC_MCC", "mcc_05": "MCC@0.5"}
FLAGS = {"ego": "1: the recording car is involved", "night": "1: at night"}
CLIP_NAME = 40  # characters that are shown


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """Return a number in print, n/a where it is undefined."""
    return "n/a" if value is None or value != value else f"{scale * value:.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share in percent, without the sign."""
    return number(value, digits, 100)


def span(found: Mapping[str, Any] | None, kind: str = "percentile", digits: int = 2) -> str:
    """Return an interval in percent: "76.5 to 78.6", or n/a."""
    low, high = found[kind] if found else (None, None)
    return "n/a" if low is None or low != low else f"{percent(low, digits)} to {percent(high, digits)}"


def text_table(rows: Iterable[Sequence[str]], indent: str = "  ") -> list[str]:
    """Return rows of cells as lines of columns, the first and those without a heading to the left."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        indent
        + "  ".join(
            cell.ljust(width) if i == 0 or not rows[0][i] else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report for a terminal."""
    lines = ["every figure is of the frames that all files have"] if report["same_clips"] else []
    for model in report["models"]:
        lines += _model(model)
    if report["comparison"]:
        lines += _comparison(report["comparison"])
    lines.append(
        f"intervals: {100 * report['level']:.0f} %, {report['replicates']} replicates, seed {report['seed']}; they "
        "hold the choice of clips, not the choice of the checkpoint nor of the seed of training"
    )
    return "\n".join(lines)


def data_line(data: Mapping[str, Any]) -> str:
    """Return what was scored in one line."""
    sources = "recordings not known" if data["sources"] is None else f"{data['sources']} recordings"
    name = f"{data['clip_list']['name']} ({data['clip_list']['sha256'][:12]})"
    frames = f"{data['frames']} frames, {data['frames_anomalous']} anomalous, {number(data['hours'])} hours"
    return f"{name}, {data['clips_with_anomaly']} with an anomaly, {sources}, {frames}"


def total_rows(total: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of totals, the heading first."""
    kinds = list(total["intervals"])
    heads = [f"{method} over {kind}s" for kind in kinds for method in ("percentile", "BCa")]
    rows = [["", "exact", "101 bins", *heads]]
    for name, shown in SHOWN.items():
        found = [total["intervals"][kind][name] for kind in kinds]
        binned = total["metrics"].get(f"{name}_binned101")
        cells = [span(f, method) for f in found for method in ("percentile", "bca")]
        rows.append([shown, percent(total["metrics"][name]), "" if binned is None else percent(binned), *cells])
    return rows


def baseline_rows(model: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of baselines, the heading first, the model second."""
    rows = [["", "AUC_ROC", "AP", "AUC_MCC", ""]]
    names = ("auroc", "ap", "auc_mcc")
    rows.append(["this model", *(percent(model["total"]["metrics"][name]) for name in names), ""])
    for name, found in model["baselines"]["of"].items():
        values = found["metrics"] or dict.fromkeys(names)
        rows.append([name, *(percent(values[n]) for n in names), found["how"]])
    return rows


def column_title(column: str) -> str:
    """Return what the values of a column of groups say."""
    return f"{column} ({FLAGS[column]})" if column in FLAGS else column


def group_rows(groups: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of one column's groups, the heading first."""
    rows = [["", "clips", "frames", "anomalous", "AUC_ROC", "interval", "AP", "AUC_MCC", ""]]
    for value, group in groups.items():
        metrics = group["metrics"]
        counts = [str(group["clips"]), str(metrics["n"]), percent(metrics["n_pos"] / metrics["n"], 1) + " %"]
        found = group["intervals"]["auroc"]
        why = group["why_undefined"] or found["reason"]
        row = [
            value,
            *counts,
            percent(metrics["auroc"]),
            span(found),
            percent(metrics["ap"]),
            percent(metrics["auc_mcc"]),
        ]
        rows.append([*row, why])
    return rows


def anticipation_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of anticipation metrics: of the model, of a constant 0.51, of a ramp."""
    sets = [found["model"], found["constant_0.51"], found["ramp"]]
    rows = [["", "this model", "constant 0.51", "ramp"]]

    def add(title: str, *path: str, digits: int = 2, scale: float = 1.0) -> None:
        values = []
        for figures in sets:
            for key in path:
                figures = figures[key]
            values.append(number(figures, digits, scale))
        rows.append([title, *values])

    negatives = bool(found["counts"]["negative"])
    for rate in found["model"]["at_false_alarm_rate"] if negatives else ():
        at = f"at {float(rate):.0%} of safe clips alarmed"
        add(f"{at}: recall (%)", "at_false_alarm_rate", rate, "recall", scale=100)
        add(f"{at}: median lead (s)", "at_false_alarm_rate", rate, "median_lead_detected")
    threshold = f"{found['threshold']:g}"
    add(f"first alarm at {threshold}, before the event: recall (%)", "first_crossing", "recall", scale=100)
    add("  mean lead of the detected (s)", "first_crossing", "mean_lead_detected")
    if negatives:
        add("  safe clips alarmed (%)", "first_crossing", "false_alarm_rate", scale=100)
    add(
        f"sustained alert at {threshold}: early-warning recall (%)",
        "sustained_alert",
        "early_warning_recall",
        scale=100,
    )
    add("  mean time to accident (s)", "sustained_alert", "mtta")
    add("stable time to accident (s)", "stable_tta", "mean")
    if negatives:
        add("false alarms per hour, safe clips", "false_alarms", "per_hour_negative", digits=1)
        add("  share of safe time under alarm (%)", "false_alarms", "share_negative_under_alarm", scale=100)
    add(
        f"false alarms per hour, {'with' if negatives else 'only'} too early ones",
        "false_alarms",
        "per_hour_all",
        digits=1,
    )
    add("events found, F1 (1 s tolerance) (%)", "event_detection", "f1", scale=100)
    add("Brier score by the second", "brier_per_second", "brier", digits=4)
    return rows


def clip_level_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of AUC and AP over clips by the reduction of their scores, the heading first."""
    rows = [["one score a clip", "AUC", "interval", "AP", "interval", "AP by chance", "with event", "safe", "left out"]]
    for reduction, level in found["model"]["clip_level"].items():
        auc, ap = (found["clip_level_intervals"][reduction][name] for name in ("auroc", "ap"))
        n_pos, n_neg = level["n_pos"], level["n_neg"]
        chance = percent(n_pos / (n_pos + n_neg)) if n_pos and n_neg else "n/a"
        row = [reduction, percent(level["auc"]), span(auc), percent(level["ap"]) if n_neg else "n/a"]
        rows.append([*row, span(ap) if n_neg else "n/a", chance, str(n_pos), str(n_neg), str(level["n_na"])])
    shared = percent(found["model"]["nexar_map_shared_negatives"])
    rows.append(["mAP at 0.5, 1, 1.5 s, all safe clips in each", "", "", shared, *[""] * 5])
    if groups := found["model"]["nexar_map"]:  # as its leaderboard has it
        of = ", ".join(name for name in groups if name != "map")
        rows.append([f"Nexar's mAP, clips cut {of} s before the event", "", "", percent(groups["map"]), *[""] * 5])
    return rows


def time_bin_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table by time before the event, the heading first."""
    prior = found["time_bins_of_prior"]
    rows = [["seconds before the event", "AUC", "recall", "frames", "clips", "safe frames"]]
    rows[0] += ["AUC of the position prior"] if prior else []
    for name, row in found["time_bins"].items():
        cells = [name, percent(row["auc"]), percent(row["recall"])]
        cells += [str(row[key]) for key in ("frames_pos", "clips_pos", "frames_neg")]
        rows.append(cells + ([percent(prior[name]["auc"])] if prior else []))
    return rows


def published_line(published: Mapping[str, Any]) -> str:
    """Return the figures as UString and DSTA compute them, marked."""
    true, theirs = published["true_seconds"], published["published_seconds"]
    line = f"mTTA {number(true['mtta'])} s, TTA@R80 {number(true['tta_r80'])} s in true seconds"
    if theirs:
        line += (
            f"; as published (clip length x relative lead) {number(theirs['mtta'])} s, {number(theirs['tta_r80'])} s"
        )
    else:
        line += f"; as published n/a: {published['why_undefined']}"
    return line + ". Gameable: a constant score has the longest; for tables beside published numbers alone"


def calibration_line(found: Mapping[str, Any]) -> str:
    """Return the calibration in one line."""
    return (
        f"expected calibration error (ECE) {percent(found['ece'])} %, Brier score {number(found['brier'], 4)} "
        f"(always the base rate: {number(found['brier_of_base_rate'], 4)})"
    )


def _model(model: Mapping[str, Any]) -> list[str]:
    lines = [f"{model['name']}: {model['path']}", f"  {data_line(model['data'])}"]
    lines += [f"  note: {note}" for note in model["data"]["notes"]]
    total = model["total"]
    lines += text_table(total_rows(total))
    lines += [f"  {total['why_undefined']}"] if total["why_undefined"] else []
    reasons = dict.fromkeys(f["reason"] for kinds in total["intervals"].values() for f in kinds.values() if f["reason"])
    lines += [f"  no interval: {reason}" for reason in reasons]
    lines += ["  baselines", *text_table((row for row in baseline_rows(model)), "    ")]
    lines.append(f"  {model['baselines']['verdict']}")
    for column, groups in model["groups"].items():
        left_out = groups.get("left_out")
        title = f"  {column_title(column)}"
        lines += [f"{title}: {left_out}"] if left_out else [title, *text_table(group_rows(groups), "    ")]
    lines.append("  by tenths of the clip: anomalous (%), mean score (%), AUC_ROC")
    tenths = [
        [f"{row['from']:.1f}", *(percent(row[k], 1) for k in ("anomalous", "mean_score", "auroc"))]
        for row in model["by_position"]
    ]
    lines += text_table(tenths, "    ")
    lines.append(f"  calibration: {calibration_line(model['calibration'])}")
    lines += _anticipation(model["anticipation"])
    for title, key in (("best clips", "best"), ("worst clips", "worst")):
        found = ", ".join(f"{c['clip'][:CLIP_NAME]} {percent(c['auroc'], 1)}" for c in model["clips"][key])
        lines.append(f"  {title} by AUC_ROC within the clip: {found or 'n/a: ' + model['clips']['why_undefined']}")
    alarms = [f"{a['clip'][:CLIP_NAME]} {a['from']:.1f} to {a['to']:.1f} s" for a in model["false_alarms"]]
    lines.append(f"  worst false alarms: {', '.join(alarms) or 'none, or no times are known'}")
    return lines


def _anticipation(found: Mapping[str, Any]) -> list[str]:
    why = found.get("why_undefined")
    if "model" not in found:
        return [f"  anticipation: n/a: {why}"]
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in found["counts"].items())
    lines = [f"  anticipation, clips: {counts}; event: {found['event']}"]
    lines += [f"    {why}"] if why else []
    lines += text_table(anticipation_rows(found), "    ")
    lines += text_table(clip_level_rows(found), "    ") if found["counts"]["negative"] else []
    lines += text_table(time_bin_rows(found), "    ")
    lines += [f"    safe frames: {found['time_bins_against']}"] if found["time_bins_against"] else []
    return [*lines, f"    {published_line(found['as_published'])}"]


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what a comparison is of, in sentences."""
    lines = [f"on {found['clip_list']['name']} ({found['clip_list']['sha256'][:12]}), {found['frames']} frames"]
    if not found["same_frames"]:
        of = ", ".join(f"{row['path']}: {row['clips']} clips, {row['frames']} frames" for row in found["of"])
        lines.append(f"The files are of different frames ({of}): figures here are of what all of them have.")
    if found["labels_differ"]:
        lines.append(f"Labels differ in {found['labels_differ']} frames: those of the first file are used for all.")
    return lines


def comparison_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of runs, their means and standard deviations, the heading first."""
    names = ("auroc", "ap", "auc_mcc", "mcc_05")
    rows = [["", *(SHOWN[name] for name in names)]]
    for model, runs in found["runs"].items():
        for run in runs:
            title = model if len(runs) == 1 else f"{model}: {run['path']}"
            rows.append([title, *(percent(run["metrics"][name]) for name in names)])
        if len(runs) > 1:
            rows.append([f"{model}: mean of {len(runs)} runs", *(_mean(found["mean"][model][name]) for name in names)])
    if len(found["runs"]) == len(found["of"]) > 1:  # files without a name: they may be runs of one model
        rows.append([f"mean of all {len(found['of'])} runs", *(_mean(found["all_runs"][name]) for name in names)])
    return rows


def difference_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of paired differences to the first model, the heading first."""
    rows = [[f"minus {found['against']}", "", "difference", "percentile", "BCa"]]
    for name, by_kind in found["differences"].items():
        for kind, metrics in by_kind.items():
            for metric, shown in SHOWN.items():
                row = metrics[metric]
                rows.append([f"{name}, over {kind}s", shown, percent(row["estimate"]), span(row), span(row, "bca")])
    return rows


def _mean(found: Mapping[str, float]) -> str:
    return f"{percent(found['mean'])} (SD {percent(found['std'])})"


def _comparison(found: Mapping[str, Any]) -> list[str]:
    lines = ["comparison", *(f"  {line}" for line in comparison_lines(found)), *text_table(comparison_rows(found))]
    lines += text_table(difference_rows(found)) if found["differences"] else []
    lines += [f"  {line}" for line in found["verdicts"]]
    lines += [f"  {found['rule']}"] if found["differences"] else []
    return lines + ([f"  {found['seeds']}"] if "seeds" in found else [])
