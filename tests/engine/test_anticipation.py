import math

import numpy as np
import pytest
from golden_clips import CLIPS, GOLDEN, labels_of

from engine import anticipation as a
from engine.anticipation import ScoredClip
from engine.episodes import event_detection, false_alarms
from engine.metrics import frame_metrics
from engine.published import mtta_published, mtta_true_seconds

EXPECTED = GOLDEN["expected"]
RECIPE: dict = {}
exec(GOLDEN["recipe"], RECIPE)  # noqa: S102


def check(ours, expected, **names):
    for key, value in expected["formula"].items():
        got = ours[names.get(key, key)]
        if isinstance(value, dict):
            check(got, {"formula": value})
        elif value is None:
            assert math.isnan(got), key
        else:
            assert got == pytest.approx(value, abs=1e-9), key


def test_the_recipe_makes_the_clips_of_the_file():
    made = RECIPE["variable"](GOLDEN["seed"])
    assert [c["scores_1024"] for c in made] == [c["scores_1024"] for c in GOLDEN["clips"]]


@pytest.mark.parametrize("reduction", EXPECTED["clip_level"])
def test_clip_level(reduction):
    check(a.clip_level(CLIPS, reduction), EXPECTED["clip_level"][reduction])


def test_clips_without_a_score_are_0_where_asked():
    ours = a.clip_classification(CLIPS, 0.75, unscored=0.0)
    check(ours, EXPECTED["classification_at_0.75_unscored_as_0"])


def test_nexar():
    names = {f"ap_{k}": f"at_{k}" for k in ("0.5", "1", "1.5")}
    check(a.nexar_map_shared_negatives(CLIPS), EXPECTED["nexar_map_shared_negatives"], **names)
    for reduction, expected in EXPECTED["nexar_map_grouped"]["formula"].items():
        check(a.nexar_map_grouped(CLIPS, reduction), {"formula": expected})


@pytest.mark.parametrize("case", EXPECTED["sustained_alert"])
def test_sustained_alert(case):
    _, threshold, _, gap = case.split("_")
    check(a.sustained_alert(CLIPS, float(threshold), int(gap)), EXPECTED["sustained_alert"][case])


@pytest.mark.parametrize("case", EXPECTED["first_crossing"])
def test_first_crossing(case):
    kind, threshold = case.split("_")
    check(a.first_crossing(CLIPS, float(threshold), above=kind == "gt"), EXPECTED["first_crossing"][case])


@pytest.mark.parametrize("case", EXPECTED["stable_tta"])
def test_stable_tta(case):
    whole = case.endswith("with_event_frame")
    check(a.stable_tta(CLIPS, float(case.split("_")[1]), with_event_frame=whole), EXPECTED["stable_tta"][case])


@pytest.mark.parametrize("kind", ["at_false_alarm_rate", "at_recall"])
def test_conditioned(kind):
    for value, expected in EXPECTED[kind].items():
        check(getattr(a, kind)(CLIPS, float(value)), expected)


def numbers(case):
    parts = case.split("_")
    return [float(parts[i]) for i in range(1, len(parts), 2)]


@pytest.mark.parametrize("case", EXPECTED["false_alarms"])
def test_false_alarms(case):
    check(false_alarms(CLIPS, *numbers(case)), EXPECTED["false_alarms"][case])


@pytest.mark.parametrize("case", EXPECTED["event_detection"])
def test_event_detection(case):
    check(event_detection(CLIPS, *numbers(case)), EXPECTED["event_detection"][case])


def test_time_bins_and_brier():
    ours = a.time_bins(CLIPS)
    for name, expected in EXPECTED["time_bins"]["formula"].items():
        check(ours[name], {"formula": expected}, recall_05="recall")
    check(a.brier_per_second(CLIPS), EXPECTED["brier_bins"])


@pytest.mark.parametrize("group", EXPECTED["groups"])
def test_groups(group):
    column, value = group.split("=")
    chosen = [i for i, c in enumerate(GOLDEN["clips"]) if str(c[column]) == value]
    expected = EXPECTED["groups"][group]["formula"]
    score = np.concatenate([CLIPS[i].score for i in chosen])
    label = np.concatenate([labels_of(GOLDEN["clips"][i]) for i in chosen])
    check(frame_metrics(score, label), {"formula": expected["frame"]})
    check(a.clip_level([CLIPS[i] for i in chosen], "max_before"), {"formula": expected["clip_max_before"]})


def test_a_constant_has_the_longest_lead_and_only_false_alarms():
    constant = a.with_scores(CLIPS, lambda c: np.full(len(c.score), 522 / 1024))
    expected = EXPECTED["constant_0.51"]["formula"]
    check(a.clip_level(constant, "max_before"), {"formula": expected["clip_max_before"]})
    check(a.first_crossing(constant, 0.5), {"formula": expected["first_crossing_ge_0_5"]})
    check(a.stable_tta(constant, 0.5), {"formula": expected["stable_0_5"]})
    alarms = false_alarms(constant, 0.5, horizon=2)
    check(alarms, {"formula": expected["false_alarms"]})
    assert alarms["share_negative_under_alarm"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["dad", "random"])
def test_as_published(name):
    case = GOLDEN["fixed_sets"][name]
    k, y, toa = RECIPE["fixed"](case["seed"], name)
    scores, fps = k / 1024, case["fps"]
    check(mtta_published(scores, y, toa, fps), {"formula": case["formula_published"]})
    check(mtta_true_seconds(scores, y, toa, fps), {"formula": case["formula_true_seconds"]})
    check(mtta_published(scores, y, toa, fps, step=0.1), {"formula": case["formula_step_0_1"]})
    constant, expected = np.full(scores.shape, 0.51), case["constant_0.51"]
    check(mtta_published(constant, y, toa, fps), {"formula": expected["formula_published"]})
    check(mtta_true_seconds(constant, y, toa, fps), {"formula": expected["formula_true_seconds"]})
    zeros = scores.copy()
    zeros[2, :] = zeros[0, 0] = 0
    check(mtta_published(zeros, y, toa, fps), {"formula": case["with_zeros"]["formula_published"]})
    without = mtta_published(zeros, y, toa, fps, zero_bug=False)
    check(without, {"formula": case["with_zeros"]["formula_without_bug"]})
    assert mtta_true_seconds(zeros, y, toa, fps)["max_recall"] <= 1


def test_nothing_is_nan_and_never_0():
    none = [ScoredClip("x", np.zeros(0), np.zeros(0), 0.1, True, 3.0)]
    for figures in (
        a.first_crossing(none, 0.5),
        a.sustained_alert(none, 0.5, 0),
        a.at_false_alarm_rate(none, 0.1),
        a.at_recall(none, 0.5),
        a.clip_level(none, "max_all"),
        a.brier_per_second(none),
        false_alarms(none, 0.5),
        event_detection(none, 0.5),
    ):
        assert any(math.isnan(value) for value in figures.values())
        assert not any(v == 0 for k, v in figures.items() if "recall" in k or "lead" in k or "rate" in k or k == "mtta")
    assert a.counts(none)["unscored"] == 1
