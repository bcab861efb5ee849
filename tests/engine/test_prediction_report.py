"""The page over all videos: its numbers, computed again from scores.csv alone; names, sizes, what it needs."""

import base64
import csv
import io
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from curves import RULE, bumpy
from PIL import Image

from engine.curve import Gap, RiskCurve, Thumbnail
from engine.prediction_report import NOT_A_SAFETY_DEVICE, About, write_report
from engine.summary import peak_frames, write_summary
from utils.files import temporary_beside

ODD = '<script>alert("1")</script>&amp;\u202e\udcff\n.mp4'
ABOUT = About("runs/a/best.pth", "vit_small_patch16_224", "DoTA train (3275 clips)", 9, RULE, stride=2, warm_up=True)


@dataclass(frozen=True)
class Scored:
    name: str
    curve: RiskCurve | None
    problem: str = ""


def scored(name, frames=200, **more):
    return Scored(name, bumpy(frames, name=name, step=2, **more))


RESULTS = [
    scored("quiet.mp4", peaks=()),
    scored("two.mp4", peaks=(0.4, 0.7), warming_up=True),
    scored(ODD, fps=25, peaks=(0.5,), gaps=(Gap(1.0, 1.4, "<b>damaged</b>"), Gap(7.0, 7.2, "again"))),
    scored("minutes.mp4", frames=3000, fps=30, peaks=np.linspace(0.1, 0.95, 9)),
    Scored("bro\udcffken.mp4", None, "it holds <no> pictures"),
    Scored("absent.mp4", None, "No such file"),
]


def noise(curve):
    rng = np.random.default_rng(0)
    return [Thumbnail(frame, rng.integers(0, 255, (540, 960, 3), np.uint8)) for frame in peak_frames(curve)]


@dataclass
class Part:
    """What a page says between two headings of videos."""

    id: str = ""
    name: str = ""
    text: str = ""
    tables: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    captions: list = field(default_factory=list)


class Page(HTMLParser):
    """The parts of a page: its head, then a section for each video. Tags must be balanced."""

    EMPTY = {"meta", "img", "path", "rect", "polyline"}

    def __init__(self, content):
        super().__init__()
        self.parts, self._open, self.links, self.attributes = [Part()], [], [], []
        self.feed(content)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.attributes += attributes.items()
        part = self.parts[-1]
        if tag == "section":
            self.parts.append(Part(attributes["id"]))
        elif tag == "table":
            part.tables.append([])
        elif tag == "tr":
            part.tables[-1].append([])
        elif tag in ("td", "th"):
            part.tables[-1][-1].append("")
        elif tag == "polyline":
            points = [point.split(",") for point in attributes["points"].split()]
            part.lines.append(np.array(points, float))
        elif tag == "img":
            part.pictures.append(attributes["src"])
        elif tag == "figcaption":
            part.captions.append("")
        elif tag == "a":
            self.links.append(attributes["href"])
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data):
        part = self.parts[-1]
        if "td" in self._open or "th" in self._open:
            part.tables[-1][-1][-1] += data
        elif "figcaption" in self._open:
            part.captions[-1] += data
        elif "h2" in self._open:
            part.name += data
        part.text += data


def recount(path, fps, rule):
    """Times, scores and events (start, end, alert, peak, score), from a scores.csv alone, by other code."""
    rows = list(csv.DictReader(path.open()))
    times, scores = [int(r["frame"]) / fps for r in rows], [float(r["score"]) for r in rows]
    events, risky = [], [i for i, score in enumerate(scores) if score >= rule.threshold]
    for i in risky:
        joined = events and (times[i] - times[min(events[-1][-1] + 1, i)] <= rule.gap)
        if joined and times[i] - times[i - 1] < rule.gap:
            events[-1].append(i)
        else:
            events.append([i])
    found = []
    for event in events:
        alert = next(i for i in event if times[i] - times[event[0]] >= rule.alert_after - 1e-9)
        peak = max(event, key=lambda i: (scores[i], -i))
        found.append((times[event[0]], times[event[-1]], times[alert], times[peak], scores[peak]))
    return rows, times, scores, found


def when(seconds, duration):
    if duration < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)}:{seconds % 60:04.1f}"


def expected_rows(folder, results):
    """{name: (row of the first table, rows of events, captions)} of the videos with scores."""
    expected = {}
    for number, result in enumerate(results):
        if not result.curve:
            continue
        fps, duration = result.curve.fps, result.curve.num_frames / result.curve.fps
        rows, times, scores, events = recount(folder / f"{number}.csv", fps, RULE)
        warm = sum(row["warming_up"] == "1" for row in rows)
        step = min(int(b["frame"]) - int(a["frame"]) for a, b in zip(rows, rows[1:], strict=False)) / fps
        gaps = sum(gap.end - gap.start for gap in result.curve.gaps)
        row = [
            when(duration, duration),
            f"{max(scores):.3f}",
            when(times[scores.index(max(scores))], duration)
            + (" (warming up)" if rows[scores.index(max(scores))]["warming_up"] == "1" else ""),
            str(len(events)),
            f"{step * sum(score >= RULE.threshold for score in scores):.2f} s",
            f"{len(result.curve.gaps)} ({gaps:.2f} s)" if result.curve.gaps else "0",
            str(len(rows)) + (f" ({warm} warming up)" if warm else ""),
        ]
        table = [[str(k), *(when(t, duration) for t in event[:4]), f"{event[4]:.3f}"]
                 for k, event in enumerate(events, start=1)]  # fmt: skip
        highest = sorted(sorted(events, key=lambda event: -event[4])[:6])
        shown = [
            f"{k}: {when(peak, duration)}, frame {round(peak * fps)}, score {score:.3f}"
            for k, (*_, peak, score) in enumerate(highest, start=1)
        ]
        expected[result.name] = row, table, shown, scores
    return expected


def test_numbers_are_those_of_the_scores(tmp_path):
    for number, result in enumerate(RESULTS):
        if result.curve:
            result.curve.write_csv(tmp_path / f"{number}.csv")
    write_report(tmp_path / "report.html", RESULTS, ABOUT, noise)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    head, *sections = page.parts
    expected = expected_rows(tmp_path, RESULTS)
    by_risk = sorted(expected, key=lambda name: (-max(expected[name][3]), name))
    assert [row[1:] for row in head.tables[0][1:]] == [expected[name][0] for name in by_risk]
    assert [row[0] for row in head.tables[0][1:]] == [section.name for section in sections]
    assert {"two.mp4", "quiet.mp4", "minutes.mp4"} < {section.name for section in sections}
    assert len(sections) == 4 and page.links == [f"#{section.id}" for section in sections]
    for name, section in zip(by_risk, sections, strict=True):
        _, table, shown, scores = expected[name]
        assert [rows[1:] for rows in section.tables] == ([table] if table else [])
        assert section.captions == shown if table else len(section.captions) == 6
        drawn = 1 - np.concatenate(section.lines)[:, 1] / 200
        assert drawn.max() == pytest.approx(max(scores), abs=1e-3) and drawn.min() == pytest.approx(
            min(scores), abs=1e-3
        )
        if len(scores) < 200:
            assert np.allclose(drawn, scores, atol=1e-3)
    assert f"{len(RESULTS)} videos" in head.text


def test_head_says_what_scores_rest_on(tmp_path):
    write_report(tmp_path / "r.html", RESULTS, replace(ABOUT, more={"Input": "16 frames"}))
    text = Page((tmp_path / "r.html").read_text()).parts[0].text
    for words in (
        *(
            NOT_A_SAFETY_DEVICE,
            "trained on DoTA train (3275 clips)",
            "know nothing",
            "runs/a/best.pth",
            "vit_small_patch",
        ),
        *("scores at or above 0.6", "an alert after 0.2 s", "best MCC on DoTA val (1402 clips)", "every 2 frames"),
        *("repeat the first frame", "16 frames", "Saved after epoch9"),
    ):
        assert words in text, words
    write_report(tmp_path / "r.html", RESULTS[:1], About("a.pth", "vit"))
    text = Page((tmp_path / "r.html").read_text()).parts[0].text
    assert "does not say what it was trained on" in text and "no operating point" in text and "every frame" in text
    assert "Risk of 1 video" in text


def test_names_are_escaped_and_failures_named(tmp_path):
    write_report(tmp_path / "report.html", RESULTS, replace(ABOUT, weights=ODD, trained_on="<i>x</i>"))
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    shown = '<script>alert("1")</script>&amp;\\u202e\\udcff\\n.mp4'
    assert shown in [part.name for part in page.parts] and shown in page.parts[0].text
    assert not re.search(r"<script|<b>damaged|<i>|\u202e", content) and "<b>damaged</b>" in "".join(
        p.text for p in page.parts
    )
    assert page.parts[0].tables[-1][1:] == [
        ["absent.mp4", "No such file"],
        ["bro\\udcffken.mp4", "it holds <no> pictures"],
    ]
    assert "Without scores: 2 videos" in page.parts[0].name


def test_page_needs_nothing_and_stays_small(tmp_path):
    write_report(tmp_path / "report.html", RESULTS[3:4], ABOUT, noise)
    content = (tmp_path / "report.html").read_text()
    assert len(content) < 300_000
    page = Page(content)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert references and all(value.startswith(("data:image/jpeg;base64,", "#")) for value in references)
    assert not re.search(r"https?://|url\(|@import|<link|<script", content)
    assert len(page.parts[1].pictures) == 6
    for uri in page.parts[1].pictures:
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
            assert image.format == "JPEG" and image.size == (320, 180)
    labels = [value for name, value in page.attributes if name in ("alt", "aria-label")]
    assert len(labels) >= 8 and all(labels)


def test_sections_are_of_the_riskiest(tmp_path):
    asked = []
    results = [scored(f"{k:03}.mp4", frames=40, peaks=(0.5 + k / 1000,)) for k in range(12)] + RESULTS[:1]
    write_report(tmp_path / "r.html", results, ABOUT, lambda curve: asked.append(curve.name) or (), most_sections=5)
    page = Page((tmp_path / "r.html").read_text())
    assert len(page.parts) == 6 and len(page.parts[0].tables[0]) == 14 and len(page.links) == 5
    assert "The 5 riskiest of 13 videos have a section" in page.parts[0].text
    assert asked == [part.name for part in page.parts[1:]] == [row[0] for row in page.parts[0].tables[0][1:6]]
    write_summary(tmp_path / "summary.csv", results)
    order = [row["name"] for row in csv.DictReader((tmp_path / "summary.csv").open())]
    assert order == [row[0] for row in page.parts[0].tables[0][1:]]


def test_nothing_scored_and_no_rule(tmp_path):
    write_report(tmp_path / "r.html", RESULTS[4:], ABOUT)
    assert "No video could be scored" in (tmp_path / "r.html").read_text()
    write_report(tmp_path / "r.html", [scored("a.mp4", rule=None)], replace(ABOUT, rule=None))
    page = Page((tmp_path / "r.html").read_text())
    assert page.parts[0].tables[0][1][4:6] == ["no rule", "no rule"] and page.parts[1].tables == []


def test_full_disk_leaves_no_page(tmp_path):
    temporary_beside(tmp_path / "r.html").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/r.html'"):
        write_report(tmp_path / "r.html", RESULTS, ABOUT)
    assert not list(tmp_path.iterdir())
