import json

import numpy as np
import pytest

from engine.curve import RiskCurve
from engine.events import Event, EventRule, EventTracker, find_events, smooth
from engine.operating_point import (
    LabelledCurve,
    NoOperatingPoint,
    false_alarms_by_threshold,
    find_operating_point,
    measure,
)

SLACK = 1e-6


def events_by_definition(time, score, rule):
    """What the docstring of engine.events says, of all scores at once and without regard to speed."""
    seen = smooth(time, score, rise=rule.rise, fall=rule.fall)
    risky = np.flatnonzero(seen >= rule.threshold)

    def missing(i):  # between i and i + 1
        step = min(np.diff(time)[: i + 1])
        return time[i + 1] - time[i] > max(rule.gap + SLACK, 1.5 * step)

    def together(a, b):
        dip = time[b] - time[a + 1]
        return dip <= rule.gap + SLACK and not any(missing(i) for i in range(a, b))

    groups = []
    for i in risky:
        if groups and together(groups[-1][-1], i):
            groups[-1].append(i)
        else:
            groups.append([i])
    events = []
    for group in groups:
        met = []
        for k in group:
            runs = [time[j] - time[i] for i in group for j in group if i <= j <= k and set(range(i, j)) <= set(group)]
            if max(runs) >= rule.alert_after - SLACK and time[k] - time[group[0]] >= rule.min_duration - SLACK:
                met.append(time[k])
        if met:
            inside = np.arange(group[0], group[-1] + 1)
            peak = inside[np.argmax(score[inside])]
            events.append(Event(time[group[0]], time[group[-1]], met[0], time[peak], float(score[peak])))
    return events


def random_case(rng):
    """Scores at a regular rate or another, with stretches missing, and a rule that has something to do."""
    n = int(rng.integers(1, 40))
    step = rng.choice([1 / 30, 0.1, 1001 / 60000, 1.0])
    gone = rng.random(n) < rng.choice([0, 0.05, 0.2])
    steps = np.where(gone, rng.integers(2, 9, n), 1) * step
    if rng.random() < 0.2:
        steps = steps * rng.uniform(0.8, 1.2, n)
    time = rng.choice([0.0, 977.3]) + np.cumsum(steps)
    walk = np.cumsum(rng.normal(0, 0.2, n)) if rng.random() < 0.5 else rng.random(n)
    score = np.clip(np.round(walk, int(rng.integers(1, 3))), 0, 1).astype(np.float32)
    seconds = [0.0, step, 2 * step, 3 * step, 0.5]
    rule = EventRule(
        threshold=float(rng.choice(score)),  # which some of them just reach
        alert_after=rng.choice(seconds),
        gap=rng.choice(seconds),
        min_duration=rng.choice(seconds),
        rise=rng.choice([0.0, 0.0, 2 * step]),
        fall=rng.choice([0.0, 0.0, 4 * step]),
    )
    return time, score, rule


def times_at(fps, n):
    return np.arange(n) / fps


# ----------------------------------------------------------------------------------------------------------------------
# Events


@pytest.mark.parametrize("seed", range(4))
def test_events_are_those_of_the_definition_at_once_and_live(seed):
    rng, found = np.random.default_rng(seed), 0
    for _ in range(150):
        time, score, rule = random_case(rng)
        events = find_events(time, score, rule)
        expected = events_by_definition(time, score, rule)
        assert events == expected, (time, score, rule)
        tracker, ended, raised = EventTracker(rule), [], []
        for t, s in zip(time.tolist(), score.tolist(), strict=True):
            change = tracker.push(t, s)
            if change.raised:
                assert change.raised.alert == change.raised.end == t
                raised.append(change.raised)
            ended += [change.ended] if change.ended else []
        last = tracker.close()
        assert ended + ([last] if last else []) == events
        assert [(e.start, e.alert) for e in raised] == [(e.start, e.alert) for e in events]
        assert all(e.start <= e.alert <= e.end and e.start <= e.peak <= e.end for e in events)
        found += len(events)
    assert found > 100


def test_events_of_a_beginning_are_those_of_the_whole():
    """No score changes what was said before it."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        time, score, rule = random_case(rng)
        alerts = [(e.start, e.alert) for e in find_events(time, score, rule)]
        for n in range(len(time)):
            known = [(e.start, e.alert) for e in find_events(time[:n], score[:n], rule)]
            assert known == [pair for pair in alerts if n and pair[1] <= time[n - 1]]


def test_the_parts_of_a_rule():
    time = times_at(10, 40)
    score = np.zeros(40, np.float32)
    score[[3, 10, 11, 12, 15, 16, 30]] = [0.9, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5]
    bounds = lambda **rule: [(e.start, e.end, e.alert) for e in find_events(time, score, EventRule(0.5, **rule))]  # noqa: E731
    assert bounds(gap=0) == [(0.3, 0.3, 0.3), (1.0, 1.2, 1.0), (1.5, 1.6, 1.5), (3.0, 3.0, 3.0)]
    assert bounds(gap=0.2) == [(0.3, 0.3, 0.3), (1.0, 1.6, 1.0), (3.0, 3.0, 3.0)]  # two scores below: 1.3, 1.4
    assert bounds(gap=0.6)[0] == (0.3, 1.6, 0.3) and len(bounds(gap=0.6)) == 2
    assert bounds(gap=0.2, alert_after=0.2) == [(1.0, 1.6, 1.2)]
    assert bounds(gap=0.2, alert_after=0.3) == []  # a dip breaks the run, though not the event
    assert bounds(gap=0.2, min_duration=0.5) == [(1.0, 1.6, 1.5)]
    assert bounds(gap=0, min_duration=0.1) == [(1.0, 1.2, 1.1), (1.5, 1.6, 1.6)]
    assert find_events(time, score, EventRule(0.5, gap=0.2))[1] == Event(1.0, 1.6, 1.0, 1.1, float(np.float32(0.8)))
    assert find_events(time, np.full(40, 0.4), EventRule(0.5)) == find_events([], [], EventRule(0.5)) == []


@pytest.mark.parametrize("fps", [7, 25, 30, 30000 / 1001, 60000 / 1001])
def test_limits_that_are_just_met_are_met_at_any_time_and_rate(fps):
    """The time of a frame is a quotient; its rounding decides nothing."""
    for first in range(0, 3000, 7):
        time = np.arange(first, first + 21) / fps
        score = np.array([0, *[1] * 7, *[0] * 5, *[1] * 7, 0])
        (event,) = find_events(time, score, EventRule(0.5, alert_after=6 / fps, gap=5 / fps, min_duration=18 / fps))
        assert (event.start, event.end, event.alert) == (time[1], time[19], time[19])
        (event,) = find_events(time, score, EventRule(0.5, alert_after=6 / fps, gap=5 / fps))
        assert event.alert == time[7]


def test_missing_scores_end_an_event():
    time = np.r_[times_at(10, 10), 2 + times_at(10, 10)]
    risky = np.ones(20)
    assert [(e.start, e.end) for e in find_events(time, risky, EventRule(0.5))] == [(0, 0.9), (2, 2.9)]
    assert len(find_events(time, risky, EventRule(0.5, gap=1.2))) == 1
    assert find_events(time, risky, EventRule(0.5, alert_after=1.0)) == []


@pytest.mark.parametrize("stride", [1, 3, 30, 90])
def test_neighbours_at_any_stride_are_of_one_event(stride):
    time = times_at(30, 900)[::stride]
    score = (np.abs(time - 15) <= 6).astype(float)
    for gap in (0.0, 0.5):
        (event,) = find_events(time, score, EventRule(0.5, gap=gap, alert_after=3))
        assert event.end - event.start == pytest.approx(12) and event.alert == pytest.approx(12)


@pytest.mark.parametrize("value", np.random.default_rng(0).random(20).astype(np.float32).tolist() + [0.7, 1.0, 0.0])
def test_a_score_is_the_same_to_a_rule_on_its_way_through_a_csv(value):
    score = np.array([value], np.float32)
    below = np.nextafter(score, np.float32(-1))
    for threshold in (value, float(score[0])):
        for scores in (score, [float(f"{score[0]:.9g}")], [value]):
            (event,) = find_events([0.0], scores, EventRule(threshold))
            assert event.peak_score == score[0]
        if value:
            assert find_events([0.0], below, EventRule(threshold)) == []


@pytest.mark.parametrize(
    ("time", "score"),
    [
        ([0, 1], [0.5, np.nan]),
        ([0, 1], [0.5, 1.1]),
        ([0, 0], [0.5, 0.5]),
        ([1, 0], [0.5, 0.5]),
        ([0, np.inf], [0.5, 0.5]),
        ([0, 1], [0.5]),
    ],
)
def test_what_is_no_score_is_refused(time, score):
    with pytest.raises(ValueError, match="score"):
        find_events(np.array(time), np.array(score), EventRule(0.5))


def test_a_tracker_is_as_new_after_it_is_closed():
    tracker = EventTracker(EventRule(0.5, rise=1.0))
    for _ in range(2):
        assert [bool(tracker.push(t, s).raised) for t, s in ((5, 0.2), (6, 0.3), (7, 1.0))] == [False, False, True]
        assert tracker.close().start == 7 and tracker.close() is None


# ----------------------------------------------------------------------------------------------------------------------
# Smoothing


def test_smoothing_is_the_exponential_whatever_the_frame_rate():
    for fps in (5, 30, 59.94):
        time = times_at(fps, round(10 * fps) + 1)
        up = smooth(time, np.r_[0, np.ones(len(time) - 1)], rise=2.0, fall=0.1)
        np.testing.assert_allclose(up, 1 - np.exp(-time / 2), atol=1e-7)
        down = smooth(time, np.r_[1, np.zeros(len(time) - 1)], rise=0.1, fall=3.0)
        np.testing.assert_allclose(down, np.exp(-time / 3), atol=1e-7)


def test_no_smoothing_leaves_scores_as_they_are():
    score = np.random.default_rng(0).random(50).astype(np.float32)
    assert (smooth(times_at(30, 50), score, rise=0, fall=0) == score).all()
    score = np.array([0.1, 0.9, 0.9, 0.2], np.float32)
    assert (smooth(times_at(1, 4), score, rise=0, fall=1.0)[:3] == score[:3]).all()


def test_smoothing_delays_the_alert_and_the_peak_is_of_scores_as_they_came():
    time, score = times_at(10, 30), np.zeros(30)
    score[10:20], score[12] = 0.9, 0.95
    (raw,), (late,) = (find_events(time, score, EventRule(0.5, rise=rise, fall=rise)) for rise in (0.0, 0.3))
    assert raw.alert == 1.0 < late.alert < raw.end < late.end
    assert (late.peak, late.peak_score) == (raw.peak, raw.peak_score) == (1.2, float(np.float32(0.95)))
    curve = RiskCurve("a", 10, 30, np.arange(30), score, np.zeros(30, bool), EventRule(0.5, rise=0.3, fall=0.3))
    assert curve.events() == [late] and curve.score is score


# ----------------------------------------------------------------------------------------------------------------------
# The rule in a weights file


def test_a_rule_goes_through_plain_types():
    rule = EventRule(np.float32(0.7), 1, 0.25, 2.0, "best F1 on mine", 0.5, 0.1)
    spec = json.loads(json.dumps(rule.to_spec()))
    assert EventRule.from_spec(spec) == rule and type(EventRule.from_spec(spec).threshold) is float
    assert EventRule.from_spec({"threshold": 0.5}) == EventRule(0.5)
    assert EventRule.from_spec(spec | {"criterion": "f1", "measured": {"f1": 0.5, "split": "x", "mcc": None}}) == rule


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"threshold": 1.5}, "threshold = 1.5, which is not a number from 0 to 1"),
        ({"threshold": True}, "threshold = True"),
        ({"threshold": None}, "threshold = None"),
        ({"gap": -1}, "gap = -1, which is not a number from 0 to 3600"),
        ({"alert_after": float("nan")}, "alert_after = nan"),
        ({"min_duration": "1"}, "min_duration = 1"),
        ({"rise": [0]}, "rise = "),
        ({"source": 3}, "source = 3, which is not a text"),
        ({"measured": {"f1": [1]}}, "measured = "),
        ({"fell": 0.0}, "has 'fell', which this code does not know"),
        ({1: 0.0}, "has '1'"),
    ],
)
def test_a_damaged_rule_is_named(damage, said):
    with pytest.raises(ValueError, match=said):
        EventRule.from_spec(EventRule(0.5).to_spec() | damage)


def test_a_rule_needs_its_threshold():
    for spec, said in (({"gap": 1.0}, "lacks threshold"), ([0.5], "is a list"), ("x", "is a str")):
        with pytest.raises(ValueError, match=said):
            EventRule.from_spec(spec)


# ----------------------------------------------------------------------------------------------------------------------
# The operating point


def random_clips(rng, count=8, fps=10):
    clips = []
    for _ in range(count):
        n = int(rng.integers(1, 60))
        label = np.zeros(n, int)
        if rng.random() < 0.5:
            start = int(rng.integers(0, n))
            label[start : start + int(rng.integers(1, 20))] = 1
        score = np.round(np.clip(0.3 + 0.3 * label + rng.normal(0, 0.2, n), 0, 1), 2).astype(np.float32)
        clips.append(LabelledCurve(times_at(fps, n), score, label))
    return clips


def joined(clips, name):
    return np.concatenate([getattr(clip, name) for clip in clips])


@pytest.mark.parametrize("criterion", ["mcc", "f1"])
@pytest.mark.parametrize("rise", [0.0, 0.3])
def test_the_best_threshold_is_the_best_of_all(criterion, rise):
    for seed in range(5):
        clips = random_clips(np.random.default_rng(seed))
        rule = EventRule(0.0, rise=rise)
        point = find_operating_point(clips, criterion, rule, split="mine val")
        scores = np.concatenate([smooth(c.time, c.score, rise=rise, fall=0.0) for c in clips])
        values = {t: measure(clips, EventRule(t, rise=rise))[criterion] or 0 for t in np.unique(scores).tolist()}
        assert point.measured[criterion] == pytest.approx(max(values.values()))
        assert values[point.rule.threshold] == pytest.approx(max(values.values()))
        labels, called = joined(clips, "label"), scores >= point.rule.threshold
        assert point.measured["recall"] == (labels & called).sum() / labels.sum()
        assert point.measured["precision"] == (labels & called).sum() / called.sum()
        if criterion == "mcc":
            assert point.measured["mcc"] == pytest.approx(np.corrcoef(labels, called)[0, 1])
        name = {"mcc": "best MCC", "f1": "best F1"}[criterion]
        assert point.rule.source == f"{name} on mine val (8 clips)" and point.measured["split"] == "mine val"
        assert EventRule.from_spec(json.loads(json.dumps(point.to_spec()))) == point.rule


@pytest.mark.parametrize("seed", range(6))
def test_false_alarms_are_counted_right_at_every_threshold(seed):
    """The search looks at each score once; here all events are found again at each threshold."""
    rng = np.random.default_rng(seed)
    for _ in range(12):
        curves, rules = [], []
        for _ in range(3):
            time, score, rule = random_case(rng)
            label = (np.abs(np.arange(len(time)) - rng.integers(0, 40)) < rng.integers(0, 5)).astype(int)
            curves.append(LabelledCurve(time, score, label))
            rules.append(rule)
        rule = rules[0]
        seen = [LabelledCurve(c.time, smooth(c.time, c.score, rise=rule.rise, fall=rule.fall), c.label) for c in curves]
        thresholds, alarms = false_alarms_by_threshold(seen, rule)
        assert thresholds.tolist() == sorted(set(joined(seen, "score").tolist()), reverse=True)
        for threshold, count in zip(thresholds.tolist(), alarms.tolist(), strict=True):
            at = EventRule(threshold, rule.alert_after, rule.gap, rule.min_duration, "", rule.rise, rule.fall)
            assert measure(curves, at)["false_alarms"] == count


def test_the_threshold_of_a_wanted_rate_of_false_alarms():
    clips = random_clips(np.random.default_rng(3), count=20)
    rule = EventRule(0.0, alert_after=0.1, gap=0.2)
    hours = sum((c.label == 0).sum() * 0.1 for c in clips if len(c.time) > 1) / 3600
    thresholds = sorted(set(joined(clips, "score").tolist()), reverse=True)
    for allowed in (0, 1, 5):
        point = find_operating_point(clips, "false_alarms", rule, false_alarms_per_hour=(allowed + 0.5) / hours)
        rates = [measure(clips, EventRule(t, 0.1, 0.2))["false_alarms_per_hour"] * hours for t in thresholds]
        place = thresholds.index(point.rule.threshold)
        assert max(rates[: place + 1]) <= allowed + 0.5 < rates[place + 1]
        assert point.measured["normal_hours"] == pytest.approx(hours)
        assert point.measured["false_alarms"] <= allowed
    assert "at most " in point.rule.source and "false alarms per hour on (20 clips)" in point.rule.source


def test_what_is_measured_of_events():
    """Two accidents in a clip, one found; an alarm without one; an alarm that begins before the accident is none."""
    label = np.zeros(100, int)
    label[20:30] = label[60:70] = 1
    score = np.full(100, 0.1)
    score[15:25] = score[80:83] = 0.9
    clips = [LabelledCurve(times_at(10, 100), score, label), LabelledCurve(times_at(10, 36), score[:36], label[30:66])]
    figures = measure(clips, EventRule(0.5))
    assert (figures["events"], figures["false_alarms"]) == (3, 2)
    assert (figures["accidents"], figures["accidents_detected"], figures["clips"]) == (3, 1, 2)
    assert figures["normal_hours"] == pytest.approx((80 + 30) / 10 / 3600)
    assert figures["false_alarms_per_hour"] == pytest.approx(2 / (11 / 3600))
    sparse = [LabelledCurve(c.time[::3], c.score[::3], c.label[::3]) for c in clips]
    assert measure(sparse, EventRule(0.5))["normal_hours"] == pytest.approx((80 + 30) / 10 / 3600, rel=0.05)


def test_where_there_is_no_operating_point():
    time, half = times_at(10, 10), np.linspace(0.1, 0.9, 10)
    normal, anomalous = (LabelledCurve(time, half, np.full(10, label)) for label in (0, 1))
    alike = LabelledCurve(time, np.full(10, 0.5), np.arange(10) % 2)
    for clips, criterion, said in (
        ([], "mcc", "there are no scores"),
        ([LabelledCurve(time[:0], half[:0], time[:0])], "f1", "there are no scores"),
        ([normal], "mcc", "all frames are normal"),
        ([anomalous], "f1", "all frames are anomalous"),
        ([alike], "mcc", "do not tell anomalous frames"),
        ([alike], "f1", "do not tell anomalous frames"),
        ([anomalous], "false_alarms", "no footage without anomaly"),
        ([normal], "false_alarms", "the highest score alone, 0.9, gives more than 1 false alarm per hour"),
    ):
        with pytest.raises(NoOperatingPoint, match=said):
            find_operating_point(clips, criterion, EventRule(0.0))
    figures = measure([anomalous], EventRule(0.5))
    assert (figures["mcc"], figures["false_alarms_per_hour"], figures["recall"]) == (None, None, 0.5)
    figures = measure([normal], EventRule(0.95))
    assert (figures["precision"], figures["recall"], figures["false_alarms_per_hour"]) == (None, None, 0)


def test_normal_footage_alone_gives_a_threshold_of_false_alarms():
    time, rng = times_at(10, 20000), np.random.default_rng(1)
    clip = LabelledCurve(time, rng.random(20000).astype(np.float32), np.zeros(20000, int))
    point = find_operating_point([clip], "false_alarms", EventRule(0.0, gap=0.0), false_alarms_per_hour=20)
    assert point.measured["false_alarms"] == 11 and point.measured["recall"] is None  # 5/9 of an hour
    assert point.rule.threshold == pytest.approx(1 - 11 / 20000, abs=5e-4)


def test_a_limit_that_decides_nothing_leaves_the_best_mcc():
    """As in clips that all have an accident, which an alarm that never ends would all find."""
    time, label = times_at(10, 40), (np.arange(40) >= 20).astype(int)
    clips = [LabelledCurve(time, np.linspace(0.1, 0.8, 40) + 0.1 * label, label) for _ in range(3)]
    point = find_operating_point(clips, "false_alarms", EventRule(0.0), split="DoTA val")
    assert point.measured["mcc"] == 1 and point.criterion == "false_alarms"
    assert point.rule.source.startswith("best MCC, as no threshold gives more than 1 false alarm per hour, on DoTA val")
