"""Videos as people make them: every frame is the one that was asked for, wherever frames are read."""

import random
import time
import zipfile
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from helpers import window_of
from PIL import Image

from datasets import VideoScan, build_clips, video_index
from datasets.augment.dapt import PretrainTransform
from datasets.augment.finetune import FinetuneTransform
from datasets.chunks import ClipStream
from datasets.clips import Clip, DataError
from datasets.loader import Source, WindowDataset
from datasets.readers import open_clip
from datasets.tools import synthetic
from datasets.tools.check import check
from datasets.tools.check_video import look_deep
from datasets.tools.pack import Settings, pack
from datasets.video import Video, probe
from datasets.video_index import frame_times
from datasets.windows import WindowIndex, index_clips
from tests.datasets import video_files
from tests.datasets.video_files import FFMPEG, FRAMES, RECIPES, SHORTENED, decoded, number_of, shown_at

pytestmark = pytest.mark.skipif(FFMPEG is None, reason="needs ffmpeg, which writes the files")

SEQUENCE = ("h264.avi", "copied.avi", "lost.avi", "mpeg4.avi", "packed.avi", "joined.ts", "raw.h264")
VARIABLE = ("variable.mp4", "variable.mkv")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, {name of a file that ffmpeg here cannot write: why})."""
    folder = tmp_path_factory.mktemp("videos")
    return folder, video_files.make(folder)


def path_of(made, name):
    folder, failed = made
    if name in failed:
        pytest.skip(f"ffmpeg cannot write it: {failed[name]}")
    return folder / name


def expected_numbers(path):
    """The number burned into the picture of each frame, by another FFmpeg: ffmpeg and ffprobe of the system."""
    numbers, info = decoded(path), probe(str(path))
    assert numbers and -1 not in numbers and (info.constant != (path.name in VARIABLE))
    if info.constant:
        return numbers
    times = shown_at(path)
    assert len(times) == len(numbers)
    grid = [times[0] + i / info.fps for i in range(info.frames)]
    nearest = [min(range(len(times)), key=lambda j: (round(abs(times[j] - at), 5), j)) for at in grid]
    return [numbers[j] for j in nearest]


def numbers_in(frames):
    return [number_of(frame.numpy()) for frame in frames]


@pytest.mark.parametrize("name", RECIPES)
def test_windows_and_the_sequential_pass_are_the_frames_asked_for(made, name):
    path, info = str(path_of(made, name)), probe(str(path_of(made, name)))
    expected = expected_numbers(path_of(made, name))
    assert (info.frames, info.problem) == (len(expected), "")
    assert info.method == ("sequence" if name in SEQUENCE else "timestamps") and bool(info.note) == (name in SEQUENCE)
    assert bool(info.short) == (name in ("short.mp4", "short.mkv", "lost.avi"))
    assert name in ("ntsc.mp4", "fast.mkv", *VARIABLE) or info.fps == pytest.approx(30, abs=0.01)
    video = Video(path)
    assert numbers_in(video.frames(range(info.frames))) == expected
    rng, step = random.Random(0), max(1, round(info.fps / 10))
    for _ in range(30):
        first = rng.randrange(max(info.frames - 15 * step, 1))
        ids = list(range(first, info.frames, step))[:16]
        if rng.random() < 0.5:  # a process that never saw the file
            video_index.forget()
            video.close()
            video = Video(path)
        assert numbers_in(video.read(ids)) == [expected[i] for i in ids]
    ids = [5, 5, 40, 3, info.frames - 1, 40]
    assert numbers_in(video.read(ids)) == numbers_in(video.frames(ids)) == [expected[i] for i in ids]
    with pytest.raises(DataError, match=f"frame {info.frames} asked for, the video has {info.frames}"):
        video.read([0, info.frames])
    video.close()


@pytest.mark.parametrize("name", RECIPES)
def test_seeking_gives_the_same_pixels_as_the_sequential_pass(made, name):
    path = str(path_of(made, name))
    found = list(look_deep(path, probe(path).frames))
    assert [kind for kind, _ in found] == (["damaged"] if name == "short.mp4" else [])


@pytest.fixture(scope="module")
def table(made, tmp_path_factory):
    """All files as clips of data set videos, named in a list."""
    folder, failed = made
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in RECIPES if name not in failed))
    scan = VideoScan(tmp_path_factory.mktemp("scan") / "scan.json", workers=2)
    return build_clips("videos", str(folder / "list.txt"), "all", scan)


AUGMENTATIONS = {
    "fine-tuning": FinetuneTransform(64),
    "DAPT": PretrainTransform(64, grid=(8, 4, 4), mask_ratio=0.75, short_side=64),
}


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_training_reads_the_frames_asked_for(made, table, augment):
    class Numbers:
        shape = augment.shape

        def __call__(self, read, rng, out, aspect):
            frames = list(read(None))
            augment(lambda _: frames, rng, out)
            return {"numbers": torch.tensor([numbers_in(frames)])}

    index = index_clips(table, num_frames=16, view_fps=10, stride=5)
    dataset = WindowDataset([Source(table, index, Numbers())], seed=0, targets=False)
    rng = random.Random(0)
    for window in rng.sample(range(len(index)), 100):
        clip, ids = index[window]
        expected = expected_numbers(made[0] / table[clip].name)
        sample = window_of(dataset, (0, 0, window, window))
        assert sample["numbers"].tolist() == [[expected[i] for i in ids]] and not sample["notes"], table[clip].name


class NumbersInTwoBytes:
    """Stands for the transform of evaluation: writes the numbers that are burned in."""

    def shape(self, frames):
        return frames, 2

    def __call__(self, frames, out):
        for place, number in zip(out, numbers_in(frames), strict=False):
            place.copy_(torch.tensor(divmod(number, 256)))


@pytest.mark.parametrize("stride", [1, 2, 5, 10])
def test_evaluation_reads_the_frames_asked_for_and_returns(made, table, stride):
    started = time.monotonic()
    index = WindowIndex(table.frame_counts, src_fps=table.fps, num_frames=16, view_fps=10, stride=stride)
    seen = {clip.name: 0 for clip in table}
    for chunk in ClipStream(table, index, NumbersInTwoBytes(), chunk_frames=24):
        name = table[chunk.clip].name
        expected = expected_numbers(made[0] / name)
        numbers = (chunk.frames.long() @ torch.tensor([256, 1])).tolist()
        assert numbers == [expected[i] for i in chunk.frame_ids], name
        seen[name] += len(chunk.frame_ids)
    assert [n for n, count in seen.items() if not count] == ["fast.mkv"]  # shorter than a window
    assert time.monotonic() - started < 60


def test_a_pack_holds_the_frames_of_their_names(made, table, tmp_path):
    pack("videos", str(made[0] / "list.txt"), tmp_path / "out", settings=Settings(0, 0, 95), workers=2)
    clips = build_clips("videos", str(tmp_path / "out"), "all", VideoScan(tmp_path / "s.json", workers=1))
    assert [c.name for c in clips] == [c.name for c in table]
    for clip in clips:
        with zipfile.ZipFile(f"{clip.source}.zip") as z:
            numbers = {n: number_of(np.asarray(Image.open(BytesIO(z.read(n))))) for n in z.namelist()}
        assert numbers == {f"{i:06d}.jpg": n for i, n in enumerate(expected_numbers(made[0] / clip.name))}, clip.name


def test_check_names_what_is_damaged_and_what_is_shorter_than_it_says(made, tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    for name in ("plain.mp4", *SHORTENED):
        (folder / name).symlink_to(made[0] / name)
    data = bytearray((made[0] / "plain.mp4").read_bytes())
    for i in range(len(data) // 3, len(data) // 3 + 400):
        data[i] ^= 0x5A
    (folder / "broken.mp4").write_bytes(data)
    findings, _ = check("videos", str(folder), deep=True)
    found = {(f.clip, f.kind): f.message for f in findings}
    assert "the decoder reports damage" in found.pop(("broken.mp4", "damaged"))
    assert "frames cannot be decoded: " in found.pop(("broken.mp4", "unreadable"))
    found.pop(("broken.mp4", "seek"), None)
    assert f"of the {FRAMES} pictures that its container states" in found.pop(("short.mp4", "truncated"))
    assert "its container states 6.0 s" in found.pop(("short.mkv", "truncated"))
    assert list(found) == [("short.mp4", "damaged")]


def test_a_seek_that_lands_elsewhere_is_found(made, monkeypatch):
    path = str(made[0] / "plain.mp4")
    honest = Video._rgb
    monkeypatch.setattr(Video, "_rgb", lambda self, frame: honest(self, frame) + (self._index.may_skip and self._lies))
    monkeypatch.setattr(Video, "_lies", property(lambda self: len(self._wanted) == 16), raising=False)
    (found,) = look_deep(path, FRAMES)
    assert found[0] == "seek" and "frames are others by seeking than in sequence" in found[1]


def test_notes_are_logged_once_for_a_data_set(made, table, tmp_path, caplog):
    build_clips("videos", str(made[0] / "list.txt"), "all", VideoScan(tmp_path / "scan.json", workers=2))
    texts = [r.message for r in caplog.records]
    assert sum("have a variable frame rate" in t and f"2 of {len(table)} videos" in t for t in texts) == 1
    assert sum("decoded from the beginning at each read" in t for t in texts) == 1
    assert sum("shorter than they claim" in t for t in texts) == 1


def test_a_file_that_lost_its_end_since_the_scan_is_named(made, tmp_path):
    path = tmp_path / "raw.h264"
    path.write_bytes((made[0] / "raw.h264").read_bytes())
    clip = Clip("c", str(path), FRAMES, 25.0)
    path.write_bytes(path.read_bytes()[:2000])
    with open_clip(clip) as reader, pytest.raises(DataError, match=r"frame 179 asked for, the video has \d+"):
        reader.read([179])
    with open_clip(replace(clip, num_frames=3)) as reader:
        assert reader.read([2]).shape == (1, 64, 96, 3)


@pytest.mark.parametrize(
    ("shown", "rates", "expected"),
    [
        ([0, 100, 200, 300], [10.0], (10.0, True, [0, 100, 200, 300])),
        ([5, 38, 72, 105, 138], [30.0], (30.0, True, [5, 38, 72, 105, 138])),  # in whole milliseconds
        ([7], [24.0], (24.0, True, [7])),
        ([0, 100, 200, 700, 800], [], (5.0, False, [0, 200, 200, 700, 800])),  # 400 is as near to 200 as it may be
        (
            [0, 100, 200, 300, 750, 850],
            [],
            (5.882353, False, [0, 200, 300, 300, 750, 850]),
        ),  # 510: 300
        (
            [0, 100, 200, 300, 1400, 1500],
            [],
            (3.333333, False, [0, 300, 300, 300, 1400, 1500]),
        ),  # 900: 300
        # No frames are made up for a hole so long.
        ([*range(0, 4000, 100), 10**9], [10.0], (4e-5, False, [0, *[3900] * 38, 10**9, 10**9])),
        ([0, 100, 300, 400], [], (7.5, True, [0, 100, 300, 400])),  # within half a frame
        ([*range(0, 3900, 100), 4000], [10.0], (10.0, True, [*range(0, 3900, 100), 4000])),  # the cut end
        (  # of 10 per second four are lost
            [*range(0, 2000, 100), *range(2400, 4500, 100)],
            [10.0],
            (10.0, False, [*range(0, 2000, 100), 1900, 1900, 2400, 2400, *range(2400, 4500, 100)]),
        ),
    ],
)
def test_frame_times(shown, rates, expected):
    fps, constant, times = frame_times(np.array(shown), 0.001, rates)
    assert (round(fps, 6), constant, times.tolist()) == expected


@pytest.mark.parametrize(
    "name",
    ["fast_start.mp4", "fragmented.mp4", "plain.ts", "fields.ts", "h264.flv", "mjpeg.avi", "wmv2.wmv", "mpeg1.mpg"],
)
def test_a_file_cut_anywhere_ends_with_its_last_whole_picture(made, tmp_path, name):
    data, rng = path_of(made, name).read_bytes(), random.Random(1)
    for number in range(8):
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(data[: rng.randrange(len(data) // 3, len(data))])
        shown, info = decoded(path), probe(str(path))
        if not shown:  # cut within a header
            assert info.problem
            continue
        assert len(shown) - 2 <= info.frames <= len(shown)
        video = Video(str(path))
        assert numbers_in(video.frames(range(info.frames))) == shown[: info.frames]
        ids = range(max(info.frames - 46, 0), info.frames, 3)
        assert numbers_in(video.read(ids)) == [shown[i] for i in ids]
        damaged = [damaged for _, _, damaged in video.pictures()]
        assert not damaged[info.frames - 1]
        video.close()


def test_a_name_with_a_colon_is_no_address(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30.mp4").symlink_to(made[0] / "plain.mp4")
    assert probe("12:30.mp4").frames == FRAMES


def test_avi_whose_gaps_have_no_known_place_is_refused(made):
    video_files.ffmpeg(made[0], "-i variable.mp4 -c copy uneven.avi")
    assert "AVI with pictures left out in places" in probe(str(made[0] / "uneven.avi")).problem


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a video")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n")
    for path in tmp_path.iterdir():
        assert probe(str(path)).problem, path
        with pytest.raises(DataError, match=f"{path.name}: not a readable video"):
            Video(str(path))


def test_pictures_of_a_size_that_takes_gigabytes_are_refused(tmp_path, monkeypatch):
    """As stated by the container, and where the size changes on the way."""
    synthetic.write_video(tmp_path / "a.ts", [np.zeros((48, 64, 3), np.uint8)] * 10, size=(64, 48), fps=10)
    monkeypatch.setattr(video_index, "_MOST_PIXELS", 64 * 48)
    assert probe(str(tmp_path / "a.ts")).frames == 10
    monkeypatch.setattr(video_index, "_MOST_PIXELS", 64 * 48 - 1)
    assert "pictures of 64 x 48 pixels, up to 3071 are read" in probe(str(tmp_path / "a.ts")).problem
