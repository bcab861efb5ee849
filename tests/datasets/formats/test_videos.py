"""Video files: the scan that counts their frames, and the data sets made of them."""

import json
import logging
import os
import shutil
import time
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from helpers import SHARED, run, write_video

from datasets import VideoScan, build_clips
from datasets.clips import DataError
from datasets.faults import read_bad_clips
from datasets.readers import open_clip
from datasets.scan import VERSION, VideoInfo, probe
from datasets.windows import RandomClipIndex, index_clips


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of videos: 30 frames at 30 fps, 20 at 25, 12 at 10, two that cannot be read, and something else."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "a.mp4", frames=30, fps=30)
    write_video(root / "deep" / "er" / "b.mov", frames=20, fps=25)
    write_video(root / "c.MP4", frames=12, fps=10)
    (root / "empty.mov").touch()
    (root / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (root / "notes.txt").write_text("not a video")
    return root


@pytest.fixture
def opened(monkeypatch):
    """Paths that were probed; in this process, so that they can be counted."""
    paths = []

    def here(function, items, **options):
        assert function is probe
        for item in items:
            paths.append(os.path.basename(item))
            yield item, probe(item)

    monkeypatch.setattr("datasets.scan.in_processes", here)
    return paths


def test_frames_and_rates_are_those_of_the_files(videos, tmp_path):
    table = build_clips("videos", str(videos), "all", VideoScan(tmp_path / "scan.json", workers=2))
    assert {c.name: (c.num_frames, round(c.fps, 3)) for c in table} == {
        "a.mp4": (30, 30.0),
        "c.MP4": (12, 10.0),
        "deep/er/b.mov": (20, 25.0),
    }
    for clip in table:
        with open_clip(clip) as reader:
            assert reader.read([0, clip.num_frames - 1]).shape == (2, 48, 64, 3)


def test_what_cannot_be_read_is_counted_and_named_once(videos, tmp_path, caplog):
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    with caplog.at_level(logging.WARNING, "tad"):
        assert len(build_clips("videos", str(videos), "all", scan)) == 3
    (record,) = caplog.records
    assert "videos all: 2 of 5 clips cannot be read: empty.mov (" in record.message and "noise.mp4 (" in record.message


def test_a_file_whose_name_is_not_utf8_is_one_that_cannot_be_read(tmp_path, caplog):
    """Wherever its name is printed or written, on a terminal that is strict about it too."""
    write_video(tmp_path / "v" / "a.mp4", frames=30, fps=10)
    odd = tmp_path / "v" / os.fsdecode(b"b\xff.mp4")
    for other in (odd, tmp_path / "v" / "b\\udcff.mp4"):  # which is called as the first is written
        shutil.copy(tmp_path / "v" / "a.mp4", other)
    table = build_clips("videos", str(tmp_path / "v"), "all", VideoScan(tmp_path / "scan.json", workers=1))
    assert [clip.name for clip in table] == ["a.mp4"] and list(table.unreadable) == ["b\\udcff.mp4"]
    assert "its name is not in UTF-8" in caplog.text
    words = ["-m", "datasets.tools.check", "videos", tmp_path / "v", "--output_dir", tmp_path / "out"]
    done = run(*words, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 1 and not done.stderr
    assert "b\\udcff.mp4\tunreadable: " in (tmp_path / "out" / "videos_bad_clips.txt").read_text()
    (tmp_path / "v").rename(tmp_path / os.fsdecode(b"v\xff"))  # a folder above is as good as any
    odd = tmp_path / os.fsdecode(b"v\xff")
    words[3] = os.fsencode(odd)
    assert len(build_clips("videos", str(odd), "all", VideoScan(tmp_path / "scan.json", workers=1))) == 1


def test_names_that_break_lines_stand_in_no_list_and_all_others_do(tmp_path):
    """Of the clips with errors; a space before a name and the longest name that a file can have do no harm."""
    good = [" a.mp4", "\u3000b.mp4", "c" * 251 + ".mp4", "\u0645\u06cc\u200c.mp4"]
    breaking = ["a\nb.mp4", "a\tb.mp4", "a\r.mp4", "a\u2028b.mp4", "\x1b[31m.mp4"]
    write_video(tmp_path / "v" / "x.mp4", frames=30, fps=10)
    for name in good + breaking:
        shutil.copy(tmp_path / "v" / "x.mp4", tmp_path / "v" / name)
    (tmp_path / "v" / " damaged.mp4").write_bytes(b"nothing")
    words = ["-m", "datasets.tools.check", "videos", tmp_path / "v", "--output_dir", tmp_path / "out"]
    done = run(*words)
    assert "error: unreadable, 6\n" in done.stdout and done.stdout.count("\n    all ") == 6, done.stdout
    assert "all a\\nb.mp4: a\\nb.mp4: its name is not in UTF-8, or has a line break or" in done.stdout
    bad = tmp_path / "out" / "videos_bad_clips.txt"
    assert len(bad.read_text().splitlines()) == 6
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    table = build_clips("videos", str(tmp_path / "v"), "all", scan, leave_out=read_bad_clips([bad]))
    assert {clip.name for clip in table} == {"x.mp4", *good} and not table.unreadable and len(table.left_out) == 6
    for clip in table:
        with open_clip(clip) as reader:
            assert len(reader.read([0])) == 1


def test_a_second_scan_opens_nothing_and_a_changed_video_is_opened_alone(videos, tmp_path, opened):
    root = tmp_path / "own"
    shutil.copytree(videos, root)
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    first = build_clips("videos", str(root), "all", scan)
    assert sorted(opened) == ["a.mp4", "b.mov", "c.MP4", "empty.mov", "noise.mp4"]
    opened.clear()
    again = build_clips("videos", str(root), "all", VideoScan(tmp_path / "scan.json", workers=1))
    assert [(c.name, c.num_frames) for c in again] == [(c.name, c.num_frames) for c in first] and not opened

    os.utime(root / "c.MP4", ns=(0, 0))
    build_clips("videos", str(root), "all", scan)
    assert opened == ["c.MP4"]  # the same size, written at another time
    opened.clear()
    write_video(root / "a.mp4", frames=17, fps=30)
    write_video(root / "new.mp4", frames=9, fps=30)
    changed = build_clips("videos", str(root), "all", scan)
    assert sorted(opened) == ["a.mp4", "new.mp4"]
    assert {c.name: c.num_frames for c in changed} == {"a.mp4": 17, "c.MP4": 12, "deep/er/b.mov": 20, "new.mp4": 9}


def test_a_scan_that_is_killed_keeps_what_it_had(videos, tmp_path, monkeypatch, opened):
    monkeypatch.setattr("datasets.scan.SAVE_EVERY", 0.0)
    original = probe

    def dies_at_the_third(path):
        if len(opened) == 3:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr("datasets.scan.probe", dies_at_the_third)
    monkeypatch.setitem(globals(), "probe", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_clips("videos", str(videos), "all", VideoScan(tmp_path / "scan.json", workers=1))
    assert len(json.loads((tmp_path / "scan.json").read_text())["videos"]) == 2


def test_nothing_readable_is_an_error(tmp_path):
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    with pytest.raises(DataError, match="no such folder or list file"):
        build_clips("videos", str(tmp_path / "absent"), "all", scan)
    with pytest.raises(DataError, match="no video below it; known suffixes: .3gp .avi"):
        build_clips("videos", str(tmp_path), "all", scan)
    (tmp_path / "a.mov").touch()
    with pytest.raises(DataError, match=r"videos all: 1 of 1 clips cannot be read: a.mov \(the file is empty\)"):
        build_clips("videos", str(tmp_path), "all", scan)


def test_a_list_file_stands_for_a_folder(videos, tmp_path):
    (videos / "list.txt").write_text("a.mp4\n./a.mp4\n")
    with pytest.raises(DataError, match="video a.mp4 is listed twice"):
        build_clips("videos", str(videos / "list.txt"), "all", VideoScan(tmp_path / "scan.json", workers=1))
    (videos / "list.txt").write_text("deep/er/b.mov\n\na.mp4\ngone.mp4\n")
    table = build_clips("videos", str(videos / "list.txt"), "all", VideoScan(tmp_path / "scan.json", workers=1))
    assert [c.name for c in table] == ["deep/er/b.mov", "a.mp4"]


def test_a_video_and_any_file_of_a_list_may_stand_for_a_folder(videos, tmp_path):
    shutil.copy(videos / "a.mp4", tmp_path / "a.dat")
    (tmp_path / "list.txt").write_text(f"a.dat\n{videos}/notes.txt\n")
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    for root, name in ((videos / "a.mp4", "a.mp4"), (tmp_path / "a.dat", "a.dat"), (tmp_path / "list.txt", "a.dat")):
        (clip,) = build_clips("videos", str(root), "all", scan)
        assert (clip.name, clip.num_frames, clip.fps) == (name, 30, 30.0)


def test_links_back_up_are_not_followed_twice(videos, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(videos, root)
    (root / "deep" / "up").symlink_to(root)
    assert len(build_clips("videos", str(root), "all", VideoScan(tmp_path / "scan.json", workers=1))) == 3


def test_folders_that_cannot_be_read_are_named(videos, tmp_path, caplog):
    """One that root cannot read either: its path is longer than the system takes."""
    top = shutil.copytree(videos, tmp_path / "own")
    here = os.open(top, os.O_RDONLY)
    for _ in range(17):  # of 250 letters, beyond 4096
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert len(build_clips("videos", str(top), "all", VideoScan(tmp_path / "scan.json", workers=1))) == 3
    assert "1 folders cannot be read and are left out" in caplog.text and "File name too long" in caplog.text


def test_two_runs_may_share_a_cache(videos, tmp_path):
    first, second = (VideoScan(tmp_path / "scan.json", workers=1) for _ in range(2))
    known = first._load()
    second([str(videos / "c.MP4")])
    first._probe_all({str(videos / "a.mp4"): [1, 2]}, known)
    assert len(json.loads((tmp_path / "scan.json").read_text())["videos"]) == 2


def test_bdd100k(tmp_path, caplog):
    for name in ("train/x.mov", "val/y.mov", "test/z.mov", "other/w.mov"):
        write_video(tmp_path / name, frames=5, fps=30)
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    names = {s: [c.name for c in build_clips("BDD100K", str(tmp_path), s, scan)] for s in ("train", "val", "all")}
    assert names == {"train": ["train/x.mov"], "val": ["val/y.mov"], "all": ["train/x.mov", "val/y.mov", "test/z.mov"]}
    (tmp_path / "all.txt").write_text("val/y.mov\ntrain/x.mov\n")
    listed = build_clips("BDD100K", str(tmp_path / "all.txt"), "train", scan)
    assert [c.name for c in listed] == ["train/x.mov"] and "1 of 2 lines are not of this split" in caplog.text
    (tmp_path / "all.txt").write_text(f"./val/y.mov\r\n{tmp_path}/other/w.mov\n", encoding="utf-8-sig")
    listed = build_clips("BDD100K", str(tmp_path / "all.txt"), "all", scan)
    assert [c.name for c in listed] == ["val/y.mov", f"{tmp_path}/other/w.mov"]
    with pytest.raises(DataError, match="BDD100K has no split 'nights'; it has train, val, test, all"):
        build_clips("BDD100K", str(tmp_path), "nights", scan)


def test_windows_of_videos_are_at_the_view_s_rate(videos, tmp_path):
    table = build_clips("videos", str(videos), "all", VideoScan(tmp_path / "scan.json", workers=1))
    index = index_clips(table, num_frames=4, view_fps=10, stride=1)
    spans = {table[c].name: index.spans[c] for c in range(3)}
    assert spans == {"a.mp4": 10, "c.MP4": 4, "deep/er/b.mov": 8}  # at 25 fps: 0, 2, 5, 7


def test_kinetics(tmp_path, caplog):
    write_video(tmp_path / "train" / "driving car" / "abcdefghijk_000003_000013.mp4", frames=80, fps=30)
    (tmp_path / "annotations").mkdir()
    sheet = tmp_path / "annotations" / "train.csv"
    sheet.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "driving car,abcdefghijk,3,13,train\n"
        "driving car,gonegonegon,0,10,train\n"
    )
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    with caplog.at_level(logging.WARNING, "tad"):
        table = build_clips("Kinetics", str(tmp_path), "train", scan)
    missing = "train/driving car/gonegonegon_000000_000010.mp4 (no such file, or no permission to read it)"
    assert f"1 of 2 clips cannot be read: {missing}" in caplog.text
    index = index_clips(table, num_frames=16, view_fps=10, stride=4)
    assert isinstance(index, RandomClipIndex) and len(index) == 1
    starts = {int(index.sample(0, np.random.default_rng(s))[1][0]) for s in range(200)}
    assert starts == set(range(17))
    sheet.write_text("label,youtube_id,time_start\n")
    with pytest.raises(DataError, match="train.csv: no column time_end"):
        build_clips("Kinetics", str(tmp_path), "train", scan)
    sheet.write_text("label,youtube_id,time_start,time_end\na,b,1\n")
    for row, reason in (
        ("a,b,1", "line 2 has 3 cells, the header 4"),
        ("a,b,x,2", "line 2: invalid literal for int"),
        ('a,b,1,2\n"a,b,1,2\na,b,3,4', "in the row that begins in line 3: unexpected end of data; check its quotes"),
    ):
        sheet.write_text(f"label,youtube_id,time_start,time_end\n{row}\n")
        with pytest.raises(DataError, match=f"train.csv: {reason}"):
            build_clips("Kinetics", str(tmp_path), "train", scan)
    sheet.write_text("label,youtube_id,time_start,time_end\n")
    with pytest.raises(DataError, match="Kinetics train: no videos"):
        index_clips(build_clips("Kinetics", str(tmp_path), "train", scan), num_frames=16, view_fps=10, stride=4)
    sheet.write_text("label,youtube_id,time_start,time_end\na,b,soon,1\n")
    with pytest.raises(DataError, match="train.csv: line 2: invalid literal"):
        build_clips("Kinetics", str(tmp_path), "train", scan)


def test_twenty_thousand_videos_are_indexed_in_a_moment_and_40_mb(tmp_path):
    (tmp_path / "train").mkdir()
    known = {}
    for i in range(20_000):
        path = tmp_path / "train" / f"{i:08x}-{i:08x}.mov"
        path.touch()
        status = os.stat(path)
        known[str(path)] = [[status.st_size, status.st_mtime_ns], *astuple(VideoInfo(1200, 30.0, codec="h264"))]
    (tmp_path / "scan.json").write_text(json.dumps({"version": VERSION, "videos": known}))
    del known
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    seconds = []
    for _ in range(3):  # the best of three, in CPU time: others may be busy on this machine
        started = time.process_time()
        index = index_clips(build_clips("BDD100K", str(tmp_path), "all", scan), num_frames=16, view_fps=10, stride=16)
        seconds.append(time.process_time() - started)
    assert len(index) == 20_000 * ((1200 - 46) // 16 + 1)
    assert min(seconds) < 0.8, seconds  # 0.3 where nothing else runs
    tracemalloc.start()
    index_clips(build_clips("BDD100K", str(tmp_path), "all", scan), num_frames=16, view_fps=10, stride=16)
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()


def test_probing_says_why(videos):
    assert "No such file" in probe("/nowhere.mov").problem
    assert probe(str(videos / "a.mp4")) == VideoInfo(30, 30.0, codec="h264")


def dies(path):
    os._exit(1)


def test_a_video_that_crashes_the_decoder_is_named_and_tried_again(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.scan.probe", dies)
    scan = VideoScan(tmp_path / "scan.json", workers=2)
    (info,) = scan([str(videos / "a.mp4")])
    assert "the process that read it ended with code 1" in info.problem
    monkeypatch.undo()
    assert scan([str(videos / "a.mp4")]) == [VideoInfo(30, 30.0, codec="h264")]


def test_what_an_earlier_version_kept_is_found_out_anew(videos, tmp_path):
    path = str(videos / "a.mp4")
    status = os.stat(path)
    entry = [[status.st_size, status.st_mtime_ns], 99, 30.0, ""]
    for content in ({path: entry}, {}, {"version": VERSION - 1, "videos": {path: entry}}):
        (tmp_path / "scan.json").write_text(json.dumps(content))
        assert VideoScan(tmp_path / "scan.json", workers=1)([path])[0].frames == 30


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"a": 3}', '{"a": [1]}', f'{{"version": {VERSION}, "videos": {{"a": [1]}}}}']
)
def test_a_damaged_cache_is_named(videos, tmp_path, content):
    (tmp_path / "scan.json").write_text(content)
    with pytest.raises(DataError, match="scan.json: not a scan of videos .* remove it to scan again"):
        build_clips("videos", str(videos), "all", VideoScan(tmp_path / "scan.json", workers=1))


def test_a_cache_that_cannot_be_written_is_named(videos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="scan.json: cannot be written .*; choose another --scan_cache"):
        build_clips("videos", str(videos), "all", VideoScan(tmp_path / "file" / "scan.json", workers=1))


@pytest.mark.skipif(not (SHARED / "data" / "driving").exists(), reason="needs ../shared/data/driving")
def test_real_driving_video(tmp_path):
    (clip,) = build_clips(
        "videos", str(SHARED / "data" / "driving"), "all", VideoScan(tmp_path / "scan.json", workers=1)
    )
    assert (clip.num_frames, clip.fps) == (221, 25.0)
