"""report.html: the risk of all videos on one page, which needs no network and no other file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.curve import RiskCurve, Thumbnail
from engine.events import EventRule
from engine.report_parts import STYLE, curve_drawing, table, terms, text, thumbnail_figures
from engine.summary import Result, SummaryRow, clock, riskiest_first, unscored
from utils.files import replaced
from utils.text import label_of

MOST_SECTIONS = 200  # videos with a section of their own: 20 MB where each has six thumbnails
_LONGEST = 100  # characters of a name in a table; its section has all
_MOST_EVENTS = 100  # of a video, in its table

NOT_A_SAFETY_DEVICE = "This is not a safety device. Nothing that protects people may rest on these scores."


@dataclass(frozen=True)
class About:
    """What scores rest on, for the head of a report.

    weights: file of the weights.
    model: name of the model.
    trained_on: data the weights were trained on, in words; "" where their file does not say.
    epoch: after which they were saved; None where their file does not say.
    rule: that makes events of scores; None = there is none.
    stride: step between scores, in frames of the video.
    warm_up: whether windows before the first full one are scored, with the first frame repeated.
    more: further terms, each with what it is.
    """

    weights: str
    model: str
    trained_on: str = ""
    epoch: int | None = None
    rule: EventRule | None = None
    stride: int = 1
    warm_up: bool = False
    more: Mapping[str, str] = field(default_factory=dict)


def footage_warning(trained_on: str) -> str:
    """Return what to say of footage that weights were not trained on. trained_on: in words; "" = not known."""
    known = f"The weights were trained on {trained_on}." if trained_on else (
        "The weights file does not say what it was trained on."
    )  # fmt: skip
    return (
        f"{known} Of other footage (another camera, another height or angle of it, other roads, drawn scenes) they "
        "know nothing: what their scores mean there is not known until it is measured on labelled clips of it."
    )


def rule_words(rule: EventRule | None) -> str:
    """Return a rule in words: from which score, for how long, and so on."""
    if rule is None:
        return "none: the weights file has no operating point and no threshold was given, so there are no events"
    words = [f"scores at or above {rule.threshold:.6g}"]
    words += [f"an alert after {rule.alert_after:g} s of them"] if rule.alert_after else []
    words += [f"up to {rule.gap:g} s below within an event"] if rule.gap else []
    words += [f"events of at least {rule.min_duration:g} s"] if rule.min_duration else []
    words += [f"scores smoothed over {rule.rise:g} s as they rise"] if rule.rise else []
    words += [f"scores smoothed over {rule.fall:g} s as they fall"] if rule.fall else []
    return ", ".join(words)


def write_report(
    path: str | Path,
    results: Iterable[Result],
    about: About,
    thumbnails: Callable[[RiskCurve], Sequence[Thumbnail]] = lambda curve: (),
    most_sections: int = MOST_SECTIONS,
) -> None:
    """Write one page over all videos, the riskiest first.

    Args:
        path: of the page.
        results: of all videos, those that cannot be read too.
        about: what the scores rest on.
        thumbnails: returns pictures of `summary.peak_frames`; it is called once for each video with a section.
        most_sections: videos with a section of their own, the riskiest; all are in the table.

    Raises OSError, which names the file; nothing is left of it then. What `thumbnails` raises passes through.
    """
    results = list(results)
    ranked, without = riskiest_first(results), unscored(results)
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as f:
        f.write(_head(len(results), about))
        f.write(_overview(ranked, about, min(most_sections, len(ranked))))
        f.write(_unreadable(without))
        for number, (result, row) in enumerate(ranked[:most_sections], start=1):
            f.write(_section(number, result.curve, row, thumbnails(result.curve)))
        f.write("</main></body></html>\n")


def _videos(count: int) -> str:
    return f"{count} video" if count == 1 else f"{count} videos"


def _head(count: int, about: About) -> str:
    title, rule = f"Risk of {_videos(count)}", about.rule
    warm_up = "windows that repeat the first frame are scored, and marked" if about.warm_up else "not scored"
    said = [
        ("Weights", about.weights),
        ("Model", about.model),
        ("Trained on", about.trained_on or "not known"),
        ("Saved after epoch", "not known" if about.epoch is None else str(about.epoch)),
        ("Events", rule_words(rule)),
        *([("The rule comes from", rule.source or "not known")] if rule else []),
        ("Scores", "every frame" if about.stride == 1 else f"every {about.stride} frames"),
        ("Before a window is full", warm_up),
        *about.more.items(),
    ]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1>
<p class="note"><strong>{NOT_A_SAFETY_DEVICE}</strong> {text(footage_warning(about.trained_on))}</p>
{terms(said)}
"""


def _overview(ranked: Sequence[tuple[Result, SummaryRow]], about: About, sections: int) -> str:
    if not ranked:
        return "<h2>Videos</h2><p>No video could be scored.</p>\n"
    head = ["Video", "Duration", "Highest score", "at", "Events", "At risk", "Gaps", "Scored frames"]
    rows = []
    for number, (_, row) in enumerate(ranked, start=1):
        name = text(label_of(row.name, _LONGEST))
        name = f'<a href="#video-{number}">{name}</a>' if number <= sections else name
        rows.append([name, *(text(cell) for cell in _cells(row))])
    more = ""
    if sections < len(ranked):
        more = f"<p>The {sections} riskiest of {len(ranked)} videos have a section below.</p>"
    at_risk = "At risk are scores at or above the threshold, each for the time to the next one. " if about.rule else ""
    meaning = f"A score is the model's probability of an anomaly, from 0 to 1. {at_risk}Gaps hold no picture."
    return f"<h2>Videos, the riskiest first</h2>\n{more}\n{table(head, rows, caption='Videos')}\n<p>{meaning}</p>\n"


def _cells(row: SummaryRow) -> list[str]:
    warm, gaps = " (warming up)" if row.highest_warming_up else "", f"{row.gaps} ({row.gap_seconds:.2f} s)"
    return [
        clock(row.duration, row.duration),
        f"{row.highest:.3f}",
        clock(row.highest_time, row.duration) + warm,
        "no rule" if row.events is None else str(row.events),
        "no rule" if row.seconds_at_risk is None else f"{row.seconds_at_risk:.2f} s",
        gaps if row.gaps else "0",
        f"{row.scored}" + (f" ({row.warming_up} warming up)" if row.warming_up else ""),
    ]


def _unreadable(without: Sequence[tuple[str, str]]) -> str:
    if not without:
        return ""
    rows = [[text(label_of(name, _LONGEST)), text(reason)] for name, reason in without]
    head = f"<h2>Without scores: {_videos(len(without))}</h2>"
    return f"{head}\n{table(['Video', 'Reason'], rows, caption='Videos without scores')}\n"


def _section(number: int, curve: RiskCurve, row: SummaryRow, thumbnails: Sequence[Thumbnail]) -> str:
    highest = f"highest score {row.highest:.3f} at {clock(row.highest_time, row.duration)}"
    said = ", ".join([f"{row.duration:.2f} s at {curve.fps:.5g} frames per second", highest])
    parts = [
        f'<section id="video-{number}"><h2>{text(row.name)}</h2>\n<p>{text(said)}</p>',
        curve_drawing(curve, thumbnails, f"risk over time, {highest}"),
        _event_table(curve),
        _gap_list(curve),
        f"<h3>Peaks</h3>\n{thumbnail_figures(curve, thumbnails)}" if thumbnails else "",
    ]
    return "\n".join(part for part in parts if part) + "</section>\n"


def _event_table(curve: RiskCurve) -> str:
    if not curve.rule:
        return ""
    events = curve.events()
    if not events:
        return "<p>No event.</p>"
    head = ["Event", "Start", "End", "Alert", "Peak", "Peak score"]
    rows = []
    for number, event in enumerate(events[:_MOST_EVENTS], start=1):
        times = (clock(t, curve.duration) for t in (event.start, event.end, event.alert, event.peak))
        rows.append([str(number), *times, f"{event.peak_score:.3f}"])
    rest = len(events) - _MOST_EVENTS
    more = f"<p>{rest} more are in events.json.</p>" if rest > 0 else ""
    return f"<h3>Events</h3>\n{table(head, rows, caption='Events')}{more}"


def _gap_list(curve: RiskCurve) -> str:
    if not curve.gaps:
        return ""
    lines = []
    for gap in curve.gaps[:_MOST_EVENTS]:
        when = f"{clock(gap.start, curve.duration)} to {clock(gap.end, curve.duration)}"
        lines.append(f"<li>{when}: {text(gap.reason)}</li>")
    rest = len(curve.gaps) - _MOST_EVENTS
    more = f"<p>{rest} more are in events.json.</p>" if rest > 0 else ""
    return f"<h3>Without pictures</h3>\n<ul>{''.join(lines)}</ul>{more}"
