"""Live scores are those of the recorded path, and what does not come on time is repeated, left out and counted."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from datasets.augment.frames import EvalTransform
from datasets.clips import Clip, ClipTable
from datasets.stream import SplitWindows
from datasets.tools.synthetic import write_video
from datasets.video import Video
from datasets.windows import WindowIndex
from engine.evaluate import EvaluationError, Scorer
from engine.stream import RiskStream, Score, estimated_rate
from models import create_model

RATES = {"7": 7, "10": 10, "25": 25, "30": 30, "59.94": Fraction(60000, 1001)}
SIZE = 64


class Mean(nn.Module):
    """Its margin of risk is a sum that tells each frame of a window apart: frame k weighs 1 + k."""

    def __init__(self, num_frames=4):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, num_frames + 1))
        self.normalised = 0

    def normalize(self, video):
        self.normalised += video.shape[2]
        return video.float() / 255

    def forward(self, video):
        margin = (video.mean((1, 3, 4)) * self.weight).sum(1)
        return torch.stack([torch.zeros_like(margin), margin], 1)


def transform(frame):
    return EvalTransform(SIZE)([frame])[0]


def make_stream(model=None, **options):
    options = {"num_frames": 4, "view_fps": 10, "fps": 10} | options
    return RiskStream(model or Mean(options["num_frames"]), transform, **options)


def grey(value):
    return np.full((8, 10, 3), value, np.uint8)


def expected(*values):
    """The score of a window of grey frames."""
    margin = sum((k + 1) * value / 255 for k, value in enumerate(values))
    return pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-6)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", num_classes=2)
    nn.init.normal_(model.head.weight, std=1.0)  # scores that a frame more or less changes
    return model.eval()


@pytest.fixture(scope="module", params=RATES)
def video(request, tmp_path_factory):
    """(path, fps) of a video of noise that flickers."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    rng = np.random.default_rng(0)
    pictures = ((rng.integers(0, 256, (48, 80, 3)) // rng.integers(1, 5)).astype(np.uint8) for _ in range(90))
    write_video(path, pictures, size=(80, 48), fps=RATES[request.param], crf="30")
    return str(path), float(RATES[request.param])


def recorded(path, model, view_fps):
    """(frames, scores) of the recorded path, with every frame scored."""
    reader = Video(path)
    clips = ClipTable("videos", "all", [Clip("a", path, len(reader), reader.fps)])
    reader.close()
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=view_fps)
    predictions = Scorer(SplitWindows(clips, index, EvalTransform(SIZE), batch_size=16)).score(model)
    return predictions.frame, predictions.score


def pushed(path, stream, count=None):
    """The Scores of a stream that gets the first `count` frames of a file."""
    reader = Video(path)
    frames = reader.frames(range(count or len(reader)))
    scores = [stream.push(frame.numpy(), i / reader.fps) for i, frame in enumerate(frames)]
    reader.close()
    return [score for score in scores if score]


def test_scores_are_those_of_the_recorded_path_and_do_not_depend_on_what_comes(model, video):
    path, fps = video
    frames, scores = recorded(path, model, 5)
    assert scores.max() - scores.min() > 0.05 and np.abs(np.diff(scores)).max() > 1e-3  # they tell frames apart
    live = pushed(path, make_stream(model, view_fps=5, fps=fps))
    assert [score.frame for score in live] == frames.tolist()
    assert np.abs(np.array([score.score for score in live]) - scores).max() <= 1e-6
    assert [score.time for score in live] == pytest.approx((frames / fps).tolist())
    assert not any(score.warming_up or score.stretch for score in live)
    for count in (1, 7, 40, 61, 89):  # a prefix
        first = pushed(path, make_stream(model, view_fps=5, fps=fps), count)
        assert first == live[: len(first)] and len(first) == np.sum(frames < count)


@pytest.mark.parametrize("fps", [3, 7, 12.5, 59.94])
@pytest.mark.parametrize("stride", [1, 4, 50])
@pytest.mark.parametrize("warm_up", [False, True])
def test_windows_are_those_of_the_index(fps, stride, warm_up):
    values = np.random.default_rng(1).integers(0, 256, 120).tolist()
    stream = make_stream(view_fps=5, fps=fps, stride=stride, warm_up=warm_up)
    scores = [stream.push(grey(value), 3 + i / fps) for i, value in enumerate(values)]
    index = WindowIndex([len(values)], src_fps=fps, num_frames=4, view_fps=5)
    first = 0 if warm_up else index.spans[0] - 1
    assert [s.frame for s in scores if s] == list(range(first, len(values), stride))
    for i, score in enumerate(scores):
        if score:
            window = index.frames(0, i)
            assert score.frame == i and score.time == pytest.approx(3 + i / fps)
            assert score.score == expected(*(values[max(k, 0)] for k in window))
            assert score.warming_up == (window[0] < 0)
    assert stream.model.normalised == len(values) and not stream.counts.skipped


def test_a_frame_without_a_picture_shows_the_one_before():
    stream = make_stream()
    assert [stream.push(grey(10 * i), i / 10) is None for i in range(1, 6)] == [True, True, True, False, False]
    score = stream.push(grey(90), 0.9)  # 6, 7 and 8 are missing; frame 0 was at 0.1
    assert (score.frame, score.time) == (8, pytest.approx(0.9)) and score.score == expected(50, 50, 50, 90)
    assert (stream.counts.repeated, stream.counts.skipped, stream.counts.stretches) == (3, 3, 1)
    assert stream.push(grey(100), 1.0).score == expected(50, 50, 90, 100)


def test_a_due_frame_that_the_next_picture_passes_is_scored_late():
    stream = make_stream(stride=5)
    for i in range(8):
        last = stream.push(grey(i), i / 10)
    score = stream.push(grey(200), 0.9)
    assert last is None and (score.frame, score.score) == (8, expected(5, 6, 7, 7))
    assert stream.push(grey(210), 1.0) is None and stream.counts.skipped == 0


def test_of_two_pictures_of_a_frame_the_later_counts_until_it_is_scored():
    stream = make_stream()
    for value, at in [(1, 0), (2, 0.1), (3, 0.14), (4, 0.2), (5, 0.3)]:
        score = stream.push(grey(value), at)
    assert score.score == expected(1, 3, 4, 5) and stream.counts.replaced == 1
    assert stream.push(grey(9), 0.34) is None and stream.counts.replaced == 2
    assert stream.push(grey(6), 0.41).score == expected(3, 4, 5, 6)


def test_jitter_below_half_a_frame_changes_nothing():
    rng = np.random.default_rng(2)
    one, two = make_stream(fps=30), make_stream(fps=30)
    for i in range(60):
        late = rng.uniform(-0.49, 0.49) / 30 if i else 0
        a, b = one.push(grey(4 * i), i / 30), two.push(grey(4 * i), i / 30 + late)
        assert (a is None) == (b is None) and (a is None or a == b)


@pytest.mark.parametrize("at", [0.2, -5, 3.5, 1e6], ids=str)
def test_where_time_jumps_the_window_is_filled_anew(at):
    stream = make_stream()
    for i in range(6):
        stream.push(grey(i), i / 10)
    scores = [stream.push(grey(100 + i), at + i / 10) for i in range(6)]
    assert [score is None for score in scores] == [True, True, True, False, False, False]
    assert scores[3].score == expected(100, 101, 102, 103)
    assert (scores[3].stretch, stream.counts.stretches) == (1, 2) and scores[3].time == pytest.approx(at + 0.3)
    assert scores[3].frame > 5 and [s.frame - scores[3].frame for s in scores[3:]] == [0, 1, 2]
    assert at < 0.5 or scores[3].frame == round(scores[3].time * 10)


def test_a_pause_within_the_limit_is_filled_at_any_rate():
    stream = make_stream(fps=0.5, view_fps=0.5)  # 3 frames take 6 seconds
    for i in (0, 1, 2, 5):
        score = stream.push(grey(i), 2 * i)
    assert score.score == expected(2, 2, 2, 5) and stream.counts.stretches == 1


def test_a_long_pause_does_not_cost_memory_or_time():
    stream = make_stream(fps=1000, view_fps=1000, max_gap=1e6)
    stream.push(grey(7), 0)
    score = stream.push(grey(9), 9e5)
    assert score.score == expected(7, 7, 7, 9) and stream.counts.repeated == 9e8 - 1


@pytest.mark.parametrize("lost", [(), (4, 11, 12)])
def test_an_unknown_rate_is_taken_from_the_first_pictures(lost):
    stream = make_stream(fps=None)
    numbers = [i for i in range(60) if i not in lost]
    scores = [stream.push(grey(4 * i), round(i / 30, 3)) for i in numbers]  # of milliseconds, as in Matroska
    assert stream.fps == pytest.approx(30, rel=2e-3) and scores[:29] == [None] * 29 and all(scores[29:])
    assert [score.frame for score in scores[29:]] == numbers[29:]
    assert stream.counts.repeated == len(lost) and stream.counts.stretches == 1
    assert scores[-1].score == expected(*(4 * i for i in (50, 53, 56, 59)))


def test_a_rate_that_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="rate cannot be told"):
        estimated_rate([2.0] * 30)
    assert estimated_rate([0, 0.1, 0.2, 0.4, 0.5]) == pytest.approx(10)


def test_only_the_newest_of_the_frames_added_is_scored():
    stream = make_stream()
    for i in range(10):
        stream.add(stream.prepare(grey(i)), i / 10)
    assert stream.due and stream.score() == Score(0.9, 9, expected(6, 7, 8, 9))
    assert not stream.due and stream.score() is None
    assert (stream.counts.scores, stream.counts.skipped) == (1, 6)


def test_memory_is_bounded():
    stream, picture = make_stream(fps=30), grey(3)
    for i in range(200):
        stream.push(picture, i / 30)
    size, tracked = stream._frames.untyped_storage().nbytes(), stream._frames.data_ptr()
    tracemalloc.start()
    for i in range(200, 5000):
        stream.push(picture, i / 30)
        if i == 1000:
            before = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2**16 and stream._frames.data_ptr() == tracked
    assert size == stream._frames.untyped_storage().nbytes() == stream.span * 3 * SIZE * SIZE * 4


@pytest.mark.parametrize(
    "picture", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8),
                np.zeros((0, 8, 3), np.uint8)], ids=lambda p: str((p.shape, p.dtype)),
)  # fmt: skip
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        make_stream().push(picture, 0)


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": np.nan}, {"stride": 0}, {"view_fps": -1}, {"fps": 90000}])
def test_numbers_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="must be positive|cannot be"):
        make_stream(**options)


def test_times_and_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="nan"):
        make_stream().push(grey(0), np.nan)
    stream = make_stream(warm_up=True)
    nn.init.constant_(stream.model.weight, np.inf)
    with pytest.raises(EvaluationError, match="frame 0: logits"):
        stream.push(grey(9), 0)


def test_bfloat16():
    stream = make_stream(dtype=torch.bfloat16)
    assert [stream.push(grey(50), i / 10) for i in range(4)][3].score == pytest.approx(0.877, abs=0.01)
    assert stream._frames.dtype == torch.bfloat16
