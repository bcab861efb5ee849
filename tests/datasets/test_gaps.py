"""Damage in the middle of a clip: what cannot be used is a gap; each frame handed out is that of the intact file."""

import random
import shutil
import time
import zipfile
from collections import Counter, defaultdict
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from helpers import DRIVING, rewrite_zip
from PIL import Image

from datasets import VideoScan, load_inputs
from datasets.augment.frames import EvalTransform
from datasets.chunks import ClipStream
from datasets.faults import ClipEnd, Fault
from datasets.readers import FolderReader, open_clip
from datasets.stream import SplitWindows, _Gatherer
from datasets.video_index import forget
from datasets.windows import WindowIndex
from tests.datasets.video_files import FFMPEG, X264, ffmpeg

needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="needs ffmpeg, which writes the files")
RECIPES = {
    "plain.mp4": f"{X264} -g 24",
    "pyramid.mp4": f"{X264} -bf 4 -x264-params keyint=32:b-pyramid=normal:open-gop=1",
    "plain.ts": f"{X264} -g 24",
    "plain.mkv": f"{X264} -g 24",
    "mjpeg.avi": "-c:v mjpeg -q:v 5 -pix_fmt yuvj420p",
    "mjpeg.mov": "-c:v mjpeg -q:v 5 -pix_fmt yuvj420p",
    "mpeg2.ts": "-c:v mpeg2video -g 12 -bf 2 -q:v 5",
    "counted.avi": f"{X264} -g 24",
}
FRAMES, SIZE = 120, (480, 270)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of videos of a textured scene that moves, no two pictures alike."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    width, height = SIZE
    scene = cv2.GaussianBlur(rng.integers(0, 255, (2 * height, 2 * width, 3), dtype=np.uint8), (7, 7), 0)
    scene = cv2.normalize(scene, None, 0, 255, cv2.NORM_MINMAX)
    pictures = (scene[i : i + height, 3 * i : 3 * i + width] for i in range(FRAMES))
    (folder / "s.rgb").write_bytes(b"".join(picture.tobytes() for picture in pictures))
    for name, options in RECIPES.items():
        ffmpeg(folder, f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 30 -i s.rgb {options} {name}")
    return folder


def damaged(path, where, *, at, size, kind):
    """Overwrite `size` bytes of a copy of a file; `at` is a share of it."""
    data, rng = bytearray(path.read_bytes()), random.Random(at)
    first = int(at * len(data)) // 512 * 512
    data[first : first + size] = bytes(size) if kind == "zeros" else rng.randbytes(size)
    where.mkdir(exist_ok=True)
    (where / path.name).write_bytes(data)
    return where / path.name


def table_of(path, tmp_path, fps=30.0):
    return load_inputs([str(path)], VideoScan(tmp_path / "scan.json", workers=1), fps)


def windows_of(table, *, stride=1, view_fps=10, num_frames=4, size=32, warm_up=False, **options):
    """(index, {(clip, last frame): frames of the window}, {clip: ClipEnd}); nothing of a clip follows its end."""
    options = {"batch_size": 16, "allow_missing": True, "gaps": True, "across_clips": False} | options
    sizes = {"num_frames": num_frames, "view_fps": view_fps, "stride": stride, "warm_up": warm_up}
    index = WindowIndex(table.frame_counts, src_fps=table.fps, forward=True, **sizes)
    windows, ends, latest = {}, {}, defaultdict(lambda: -1)
    for item in SplitWindows(table, index, EvalTransform(size), **options).batches(lambda frames: frames):
        if isinstance(item, ClipEnd):
            assert item.clip not in ends
            ends[item.clip] = item
            continue
        for clip, last, video in zip(item.clip.tolist(), item.last.tolist(), item.video, strict=False):
            assert clip not in ends and last > latest[clip]
            latest[clip] = last
            windows[clip, last] = video.clone()
    assert set(ends) == set(np.flatnonzero(index.counts).tolist())
    return index, windows, ends


def check_gaps(index, windows, end):
    """Assert that a window was left out exactly where it needs a frame of a gap, and that gaps are apart."""
    assert all(a.end < b.first for a, b in pairwise(end.gaps)) and all(gap.reason for gap in end.gaps)
    lost = {frame for gap in end.gaps for frame in range(gap.first, gap.end)}
    for last in index.last_frames(end.clip).tolist():
        needs = lost & set(index.frames(end.clip, last).tolist())
        assert ((end.clip, last) in windows) == (not needs), last
    return lost


DAMAGE = [(at, size, kind) for at in (0.35, 0.5, 0.63) for size, kind in ((4096, "zeros"), (6000, "noise"))]


@needs_ffmpeg
@pytest.mark.parametrize("name", RECIPES)
def test_no_picture_is_wrong_and_none_is_shifted(made, tmp_path, name):
    """Each frame handed out is a picture of the intact file, of the same time to a frame; some come after the gap."""
    intact = table_of(made / name, tmp_path)
    with open_clip(intact[0]) as reader:
        expected = [frame.numpy().tobytes() for frame in reader.frames(range(FRAMES))]
    with open_clip(intact[0]) as reader:
        assert [frame.numpy().tobytes() for frame in reader.sound_frames(range(FRAMES), range(FRAMES))] == expected
    times = {picture: i / 30 for i, picture in enumerate(expected)}
    assert len(times) == FRAMES
    later = 0
    for at, size, kind in DAMAGE:
        (clip,) = table_of(damaged(made / name, tmp_path / "d", at=at, size=size, kind=kind), tmp_path)
        with open_clip(clip) as reader:
            count = reader.usable_frames()
            came = list(reader.sound_frames(range(count), range(count)))
        lost = [i for i, frame in enumerate(came) if isinstance(frame, str)]
        assert lost or clip.num_frames < FRAMES
        assert clip.fps == intact[0].fps, "what comes before would be other pictures"
        for i in set(range(count)) - set(lost):
            picture = came[i].numpy().tobytes()
            assert picture in times, (at, size, kind, i)
            assert abs(times[picture] - i / clip.fps) < 1.1 / 30, (at, size, kind, i)
        later += bool(lost) and max(set(range(count)) - set(lost)) > max(lost)
    assert later or name.endswith(".avi")  # of which pictures are counted once some are lost


@needs_ffmpeg
@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"num_workers": 1, "batch_size": 7, "warm_up": True}], ids=str)
def test_windows_that_need_a_lost_frame_are_left_out_and_no_others(made, tmp_path, options):
    path = damaged(made / "plain.mp4", tmp_path / "d", at=0.5, size=4096, kind="zeros")
    index, windows, ends = windows_of(table_of(path, tmp_path), **options)
    _, whole, whole_ends = windows_of(table_of(made / "plain.mp4", tmp_path), **options)
    assert whole_ends[0] == ClipEnd(0) and len(whole) == len(index)
    lost = check_gaps(index, windows, ends[0])
    assert 5 < len(lost) < 60 and ends[0].fault is None and ends[0].gaps[-1].end < FRAMES
    assert "up to the next key frame" in ends[0].gaps[0].reason
    assert all(torch.equal(windows[key], whole[key]) for key in windows)


@needs_ffmpeg
def test_a_long_stretch_costs_no_more_than_the_rest(made, tmp_path):
    """Decoding goes on from packet to packet: fewer pictures are decoded than the file has."""
    intact, broken = made / "plain.mp4", damaged(made / "plain.mp4", tmp_path / "d", at=0.3, size=60_000, kind="noise")
    seconds = []
    for path in (intact, broken):
        (clip,) = table_of(path, tmp_path)
        forget()
        started = time.process_time()
        with open_clip(clip) as reader:
            came = list(reader.sound_frames(range(FRAMES), range(FRAMES)))
        seconds.append(time.process_time() - started)
    assert sum(isinstance(frame, str) for frame in came) > 40 and not isinstance(came[-1], str)
    assert seconds[1] < 3 * seconds[0] + 0.5


@needs_ffmpeg
def test_a_reader_may_begin_in_the_middle(made, tmp_path):
    """As a process does that takes the place of one that was killed."""
    (clip,) = table_of(damaged(made / "pyramid.mp4", tmp_path / "d", at=0.5, size=4096, kind="zeros"), tmp_path)

    def came(*chunks):
        with open_clip(clip) as reader:
            frames = [frame for ids in chunks for frame in reader.sound_frames(ids, range(FRAMES))]
        return [frame if isinstance(frame, str) else frame.numpy().tobytes() for frame in frames]

    whole = came(range(FRAMES))
    assert came(range(50), range(50, 51), range(51, FRAMES)) == whole
    for first in (30, 57, 64, 80, 100):
        part = came(range(first, FRAMES))
        assert all(
            a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in zip(part, whole[first:], strict=True)
        )


@needs_ffmpeg
def test_a_file_that_ends_early_has_a_gap_at_its_end(made, tmp_path):
    short = tmp_path / "plain.mkv"
    table = table_of(shutil.copy(made / "plain.mkv", short), tmp_path)
    short.write_bytes(short.read_bytes()[: short.stat().st_size * 6 // 10])  # after its frames were counted
    index, windows, ends = windows_of(table)
    last = ends[0].gaps[-1]
    assert 40 < last.first < 90 and last.end == FRAMES and "the file ends before" in last.reason
    assert check_gaps(index, windows, ends[0])


@needs_ffmpeg
def test_recordings_that_were_joined_go_on_after_the_place(made, tmp_path):
    one = (made / "plain.ts").read_bytes()
    (tmp_path / "two.ts").write_bytes(one + one)
    index, windows, ends = windows_of(table_of(tmp_path / "two.ts", tmp_path))
    (gap,) = ends[0].gaps
    assert gap.first > FRAMES - 24 and gap.end < FRAMES + 50 and check_gaps(index, windows, ends[0])
    assert all(torch.equal(windows[0, last], windows[0, last - FRAMES]) for last in range(FRAMES + 60, FRAMES + 95, 7))


@pytest.mark.skipif(not DRIVING.is_file() or FFMPEG is None, reason="needs ../shared/data/driving")
def test_a_real_video_with_a_lost_sector(tmp_path):
    intact = table_of(DRIVING, tmp_path)
    path = damaged(DRIVING, tmp_path / "d", at=0.5, size=65536, kind="zeros")
    index, windows, ends = windows_of(table_of(path, tmp_path))
    _, whole, _ = windows_of(intact)
    assert check_gaps(index, windows, ends[0]) and all(torch.equal(windows[key], whole[key]) for key in windows)


@needs_ffmpeg
@pytest.mark.parametrize("rate", ["60000/1001", "25", "7", "variable"])
def test_any_rate_with_sound(made, tmp_path, rate):
    """All frames come, those that evaluation reads."""
    sound = "-f lavfi -i sine=d=4 -map 0 -map 1 -c:a aac -shortest"
    raw = f"-f rawvideo -pix_fmt rgb24 -s {SIZE[0]}x{SIZE[1]} -r {'30' if rate == 'variable' else rate} -i {made}/s.rgb"
    vary = "-vf select='lt(n\\,60)+not(mod(n\\,4))' -vsync vfr" if rate == "variable" else ""
    ffmpeg(tmp_path, f"{raw} {sound} {vary} {X264} -g 24 a.mp4")
    table = table_of(tmp_path / "a.mp4", tmp_path)
    index, windows, ends = windows_of(table, num_frames=3, view_fps=5)
    assert ends[0] == ClipEnd(0) and len(windows) == len(index) > 40
    plain = SplitWindows(table, index, EvalTransform(32)).batches(lambda frames: frames.clone())
    for batch in plain:
        for last, video in zip(batch.last.tolist(), batch.video, strict=True):
            assert torch.equal(video, windows[0, last])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture
def pictures(tmp_path):
    """A folder of 40 pictures, and the same as a zip."""
    folder, rng = tmp_path / "p" / "f", np.random.default_rng(0)
    folder.mkdir(parents=True)
    scene = cv2.resize(rng.integers(0, 255, (30, 60, 3), dtype=np.uint8), (480, 120))
    for i in range(40):
        Image.fromarray(scene[:, 4 * i : 4 * i + 160]).save(folder / f"{i:04d}.jpg", quality=92)
    with zipfile.ZipFile(tmp_path / "p" / "z.zip", "w") as z:
        for file in sorted(folder.iterdir()):
            z.write(file, file.name)
    return folder


def test_pictures_that_are_missing_or_broken_are_gaps_of_one_frame(pictures, tmp_path):
    (pictures / "0010.jpg").unlink()
    (pictures / "0020.jpg").write_bytes(b"no picture")
    data = bytearray((pictures / "0021.jpg").read_bytes())
    data[1200:1300] = random.Random(0).randbytes(100)  # which Pillow would show, with stripes
    (pictures / "0021.jpg").write_bytes(data)
    Image.new("RGB", (20, 30)).save(pictures / "0030.jpg")  # of another size: squashed as all are
    index, windows, ends = windows_of(table_of(pictures, tmp_path, fps=10), num_frames=2)
    assert [(gap.first, gap.end) for gap in ends[0].gaps] == [(10, 11), (20, 22)]
    assert "0010.jpg: no such file" in ends[0].gaps[0].reason and "0020.jpg" in ends[0].gaps[1].reason
    check_gaps(index, windows, ends[0])
    assert ends[0].fault is None and len(windows) == len(index) - 5


@needs_ffmpeg
def test_two_sizes_in_a_video_are_squashed_to_one(pictures, tmp_path):
    with (tmp_path / "two.mjpeg").open("wb") as f:
        for i in range(40):
            image = Image.open(pictures / f"{i:04d}.jpg")
            (image if i < 20 else image.resize((80, 48))).save(f, "JPEG")
    ffmpeg(tmp_path, "-f mjpeg -framerate 10 -i two.mjpeg -c copy two.mov")
    index, windows, ends = windows_of(table_of(tmp_path / "two.mov", tmp_path), num_frames=2)
    assert not ends[0].gaps and len(windows) == len(index) == 39


def test_a_folder_that_ends_early_has_a_gap_at_its_end(pictures, tmp_path):
    table = table_of(pictures, tmp_path, fps=10)
    for i in (20, *range(33, 40)):
        (pictures / f"{i:04d}.jpg").unlink()
    index, windows, ends = windows_of(table, num_frames=2)
    assert [(gap.first, gap.end) for gap in ends[0].gaps] == [(20, 21), (33, 40)] and ends[0].fault.frames == 33
    assert "ends after 33 of 40 frames" in ends[0].gaps[1].reason and check_gaps(index, windows, ends[0])


def test_members_of_a_zip_that_are_missing_or_broken_are_gaps_of_one_frame(pictures, tmp_path):
    path = pictures.parent / "z.zip"
    table = table_of(path, tmp_path, fps=10)
    rewrite_zip(path, drop=["0005.jpg"])
    content = bytearray(path.read_bytes())
    place = content.index((pictures / "0025.jpg").read_bytes()[600:700])
    content[place : place + 10] = bytes(10)  # of a JPEG that may look well: its sum does not match
    path.write_bytes(content)
    index, windows, ends = windows_of(table, num_frames=2)
    assert [(gap.first, gap.end) for gap in ends[0].gaps] == [(5, 6), (25, 26)]
    assert "CRC" in ends[0].gaps[1].reason and check_gaps(index, windows, ends[0]) == {5, 25}
    path.write_bytes(b"no zip")
    _, windows, ends = windows_of(table, num_frames=2)
    assert not windows and [(gap.first, gap.end) for gap in ends[0].gaps] == [(1 - 1, 40)]
    assert ends[0].fault.frames == 0 and "not a readable zip" in ends[0].fault.reason


def test_frames_between_those_that_windows_need_are_part_of_a_gap(pictures, tmp_path):
    for i in (12, 15):  # at 30 fps, windows of 10 that end on every third frame need every third
        (pictures / f"{i:04d}.jpg").unlink()
    _, _, ends = windows_of(table_of(pictures, tmp_path), num_frames=2, stride=3)
    assert [(gap.first, gap.end) for gap in ends[0].gaps] == [(12, 16)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_read_that_hangs_is_a_gap_to_the_end_and_others_go_on(pictures, tmp_path, monkeypatch, workers):
    shutil.copytree(pictures, tmp_path / "in" / "a")
    shutil.copytree(pictures, tmp_path / "in" / "b")
    original = FolderReader._bytes

    def hang(self, name):
        if self.clip.name == "a" and name == "0020.jpg":
            time.sleep(3600)
        return original(self, name)

    table = table_of(tmp_path / "in", tmp_path, fps=10)
    monkeypatch.setattr(FolderReader, "_bytes", hang)
    options = {"num_frames": 2, "num_workers": workers, "batch_size": 8, "read_timeout": 3.0}
    index, windows, ends = windows_of(table, **options)
    assert [(gap.first, gap.end) for gap in ends[0].gaps] == [(16, 40)] and not ends[1].gaps
    assert "nothing could be read of it for 3 seconds" in ends[0].gaps[0].reason
    assert ends[0].fault.frames == 0 and ends[1].fault is None
    assert Counter(clip for clip, _ in windows) == {0: 15, 1: 39}


def test_what_is_kept_for_later_windows_is_bounded_and_batches_may_be_filled_across_clips(pictures, tmp_path):
    for name in "ab":
        shutil.copytree(pictures, tmp_path / "in" / name)
    for i in (*range(3, 9), 17, *range(20, 33)):
        (tmp_path / "in" / "a" / f"{i:04d}.jpg").unlink()
    table = table_of(tmp_path / "in", tmp_path)
    index, windows, ends = windows_of(table, num_workers=2, across_clips=True, batch_size=8)
    assert check_gaps(index, windows, ends[0]) and len(windows) > 30
    stream = ClipStream(table, index, EvalTransform(32), chunk_frames=8, gaps=True)
    gatherer = _Gatherer(index, lambda frames: frames, torch.device("cpu"), batch_size=8, across_clips=False)
    for item in stream:
        if isinstance(item, ClipEnd):
            assert item.clip not in gatherer.kept or len(gatherer.kept.pop(item.clip)[0]) < index.spans[item.clip]
            continue
        list(gatherer.add(item))
        assert all(len(ids) < index.spans[clip] for clip, (ids, _) in gatherer.kept.items())


def test_without_gaps_a_broken_frame_ends_its_clip_as_ever(pictures, tmp_path):
    table = table_of(pictures, tmp_path, fps=10)
    (pictures / "0020.jpg").write_bytes(b"no picture")
    index = WindowIndex(table.frame_counts, src_fps=10, num_frames=2, view_fps=10)
    items = list(SplitWindows(table, index, EvalTransform(32), batch_size=8, allow_missing=True).batches(lambda f: f))
    assert isinstance(items[-1], Fault) and items[-1].frames == 0 and items[-2].last[-1] == 15
