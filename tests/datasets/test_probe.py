"""datasets.probe: which windows a probe looks at."""

import numpy as np
import pytest

from datasets.clips import Clip, ClipTable, DataError
from datasets.labels import IGNORED
from datasets.probe import choose_windows

WINDOW = {"num_frames": 4, "view_fps": 5}


def table(*labels, **more):
    clips = [Clip(f"c{i}", "", len(x), 10.0, labels=np.array(x, np.uint8), **more) for i, x in enumerate(labels)]
    return ClipTable("csv", "train", clips)


def chosen(clips, count):
    clip, last = choose_windows(clips, count, **WINDOW).locations()
    return [(c, f, int(clips[c].labels[f])) for c, f in zip(clip.tolist(), last.tolist(), strict=True)]


RARE = [[0] * 40 + [1] * 5 + [0] * 55, [0] * 100, [0] * 6]


@pytest.mark.parametrize(("count", "anomalous"), [(10, 5), (7, 3), (60, 5), (10_000, 5)])
def test_half_are_anomalous_where_there_are_so_many(count, anomalous):
    windows = chosen(table(*RARE), count)
    total = 2 * (100 - 6)  # of clips as long as a window, 7 frames, at least
    assert len(windows) == len(set(windows)) == min(count, total) and sum(x[2] for x in windows) == anomalous
    assert windows == sorted(windows) == chosen(table(*RARE), count)


def test_safe_windows_may_be_the_rare_ones():
    windows = chosen(table([1] * 50 + [0] * 2 + [1] * 50), 20)
    assert len(windows) == 20 and [x[2] for x in windows].count(0) == 2


def test_each_window_of_a_class_has_the_same_chance():
    windows = chosen(table(*([[0] * 500 + [1] * 500] * 4)), 800)
    for c in range(4):
        of_clip = [x for x in windows if x[0] == c]
        assert 150 < len(of_clip) < 250
        assert 25 < len([x for x in of_clip if x[1] < 250]) < 75


def test_ignored_frames_and_frames_that_a_pack_left_out_end_no_window():
    labels = [0] * 30 + [1] * 10 + [IGNORED] * 20
    assert {x[2] for x in chosen(table(labels, labels), 1000)} == {0, 1}
    packed = table([0] * 30 + [1] * 31, pack_step=2)
    assert {f % 2 for _, f, _ in chosen(packed, 1000)} == {0}  # it holds every other one, back from the last, 60


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 50, "none of its 44 windows ends on an anomalous frame"),
        ([1] * 50, "none of its 44 windows ends on a safe frame"),
        ([1, 0], "no clip is long enough"),
    ],
)
def test_a_class_that_is_absent_is_said(labels, message):
    with pytest.raises(DataError, match=message):
        chosen(table(labels), 10)
