import hashlib
import json

import numpy as np
import pytest
from helpers import SHARED, golden

from datasets.windows import RandomClipIndex, WindowIndex


def windows(frame_count, **kwargs):
    index = WindowIndex([frame_count], **kwargs)
    return [index[i][1].tolist() for i in range(len(index))]


@pytest.mark.parametrize(
    "case", [c for c in golden("windows")["grid"] if c["sequencer"] == "RegularSequencer"], ids=str
)
def test_golden_grid(case):
    ours = windows(
        case["timesteps_nb"],
        src_fps=case["input_fps"],
        view_fps=case["view_fps"],
        num_frames=case["num_frames"],
        stride=case["step"],
    )
    assert len(ours) == case["count"]
    if ours:
        assert (ours[0], ours[-1]) == (case["first"], case["last"])
        assert [w[0] for w in ours] == case["first_indices"] and [w[-1] for w in ours] == case["last_indices"]
        assert hashlib.sha1(json.dumps(ours, separators=(",", ":")).encode()).hexdigest() == case["sha1_all"]


def test_golden_with_start_is_ours_plus_the_window_we_leave_out():
    """The reference's pre-training lists append a window at frame 0 to the same windows (DESIGN section 5)."""
    grid = [c for c in golden("windows")["grid"] if c["sequencer"] == "RegularSequencerWithStart"]
    cases = [(c, None) for c in grid] + [(c, c["extra_start_window"]) for c in golden("windows")["with_start_extra"]]
    assert len(cases) > 600
    for case, extra in cases:
        ours = windows(
            case["timesteps_nb"],
            src_fps=case["input_fps"],
            view_fps=case["view_fps"],
            num_frames=case["num_frames"],
            stride=case["step"],
        )
        left_out = case["count"] - len(ours)
        assert left_out in (0, 1) and extra in (None, left_out)
        if case["count"]:
            assert case["first"] == ours[0]
            assert case["last"] == ours[-1] if not left_out else case["last"][0] == 0


def test_golden_misc():
    sixteen, nine, fifteen, third, _ = (case["windows"] for case in golden("windows")["misc"])
    assert windows(18, src_fps=10, view_fps=10, num_frames=16) == sixteen
    assert windows(9, src_fps=10, view_fps=10, num_frames=4, stride=2) == nine
    assert windows(15, src_fps=30, view_fps=10, num_frames=4, stride=2) == fifteen
    assert windows(15, src_fps=30, view_fps=10, num_frames=4, stride=3) == third


def test_rates_that_do_not_divide_take_the_nearest_frame():
    """Where the reference stops with an assertion."""
    for case in golden("windows")["errors"]:
        if case["input_fps"] <= 0:
            with pytest.raises(ValueError, match="src_fps"):
                windows(100, src_fps=case["input_fps"], view_fps=case["view_fps"], num_frames=16)
            continue
        ratio = case["input_fps"] / case["view_fps"]
        for frames in windows(100, src_fps=case["input_fps"], view_fps=case["view_fps"], num_frames=16):
            ideal = frames[-1] - ratio * np.arange(16)[::-1]
            assert np.abs(frames - ideal).max() <= 0.5
    assert windows(14, src_fps=25, view_fps=10, num_frames=6)[1] == [1, 3, 6, 8, 11, 13]


def test_slow_sources_repeat_frames():
    assert windows(3, src_fps=5, view_fps=10, num_frames=4) == [[0, 0, 1, 1], [1, 1, 2, 2]]


def test_clips_are_concatenated_in_order():
    index = WindowIndex([20, 3, 46, 16], src_fps=[10, 10, 30, 10], view_fps=10, num_frames=16, stride=2)
    assert index.counts.tolist() == [3, 0, 1, 1] and len(index) == 5
    assert [index[i][0] for i in range(5)] == [0, 0, 0, 2, 3]
    clips, last = index.locations()
    assert clips.tolist() == [0, 0, 0, 2, 3]
    assert last.tolist() == [index[i][1][-1] for i in range(5)] == [15, 17, 19, 45, 15]
    assert index.last_frames(0).tolist() == [15, 17, 19] and index.last_frames(1).tolist() == []
    assert index.short_clips.tolist() == [1]
    assert index.needed_frames(2).tolist() == list(range(0, 46, 3))
    for i in (-1, 5):
        with pytest.raises(IndexError):
            index[i]
    assert len(WindowIndex([], src_fps=10, view_fps=10, num_frames=16)) == 0


@pytest.mark.parametrize("wrong", [{"num_frames": 0}, {"view_fps": 0}, {"stride": 0}, {"src_fps": -1}])
def test_numbers_must_be_positive(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WindowIndex([100], **({"src_fps": 10, "view_fps": 10, "num_frames": 16} | wrong))


def test_memory_grows_with_clips_not_windows():
    index = WindowIndex(np.full(100_000, 1200), src_fps=30, view_fps=10, num_frames=16)
    assert len(index) == 100_000 * (1200 - 46 + 1)
    assert sum(a.nbytes for a in vars(index).values() if isinstance(a, np.ndarray)) < 10_000_000
    clip, frames = index[len(index) - 1]
    assert clip == 99_999 and frames[-1] == 1199


@pytest.mark.skipif(not (SHARED / "data" / "dota").is_dir(), reason="needs ../shared/data/dota")
@pytest.mark.parametrize(("split", "windows16", "windows8"), [("train", 285_778, 289_053), ("val", 121_717, 123_119)])
def test_real_dota_counts(split, windows16, windows8):
    folder = SHARED / "data" / "dota"
    metadata = json.loads((folder / f"metadata_{split}.json").read_text())
    counts = [metadata[name]["num_frames"] for name in (folder / f"{split}_split.txt").read_text().split()]
    assert len(WindowIndex(counts, src_fps=10, view_fps=10, num_frames=16)) == windows16
    assert len(WindowIndex(counts, src_fps=10, view_fps=5, num_frames=8)) == windows8


@pytest.mark.parametrize("case", golden("kinetics_indices"), ids=lambda c: f"{c['duration']}-{c['start']}")
def test_kinetics_clips_are_the_reference_s(case):
    index = RandomClipIndex([case["duration"]], num_frames=case["num_frames"], step=case["step"])
    assert index.frames(0, case["start"]).tolist() == case["frame_ids"]
    starts = {int(index.sample(0, np.random.default_rng(s))[1][0]) for s in range(50)}
    assert min(starts) >= 0 and max(starts) <= max(case["duration"] - 64, 0)


def test_random_clips_refuse_what_is_not_positive():
    with pytest.raises(ValueError, match="num_frames and step must be positive, not 16 and 0"):
        RandomClipIndex([50], num_frames=16, step=0)


@pytest.mark.parametrize("fps", [7, 10, 25, 30, 59.94])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("warm_up", [False, True])
def test_forward_windows_of_a_clip_are_the_first_of_a_longer_one(fps, stride, warm_up):
    options = {"src_fps": fps, "num_frames": 8, "view_fps": 10, "stride": stride, "forward": True, "warm_up": warm_up}
    longest = windows(200, **options)
    for count in (1, 20, 50, 51, 199):
        shorter = windows(count, **options)
        assert shorter == [window for window in longest if window[-1] < count]
    backward = windows(200, src_fps=fps, num_frames=8, view_fps=10)  # each window that there is
    full = [window for window in longest if window in backward]
    assert full == [window for window in backward if (window[-1] - longest[0][-1]) % stride == 0]
    if not warm_up:
        assert full == longest and longest[0][0] == 0


def test_a_warm_up_begins_on_the_first_frame_and_repeats_it():
    index = WindowIndex([12, 3], src_fps=20, num_frames=3, view_fps=10, stride=2, warm_up=True)
    lasts = index.last_frames(0)
    assert lasts.tolist() == [0, 2, 4, 6, 8, 10] and index.last_frames(1).tolist() == [0, 2]
    assert index.frames(0, lasts)[:3].tolist() == [[0, 0, 0], [0, 0, 2], [0, 2, 4]]
    assert index.warming_up(0, lasts).tolist() == [True, True, False, False, False, False]
    assert len(index.short_clips) == 0 and index.needed_frames(0).tolist() == [0, 2, 4, 6, 8, 10]
