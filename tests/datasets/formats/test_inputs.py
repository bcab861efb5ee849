"""Whatever a person wants scored: what becomes a clip, what it is called, and what is said of the rest."""

import codecs
import logging
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import write_video
from PIL import Image

from datasets import DataError, VideoScan, load_inputs, open_clip
from datasets.formats.inputs import _Found, _names
from datasets.tools.pack import Settings, pack


def picture(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 32, 3), level, np.uint8)).save(path, quality=95)


def pictures(folder, numbers, name="{:06d}.jpg"):
    for number in numbers:
        picture(folder / name.format(number), number)
    return folder


def zipped(path, folder):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for file in sorted(folder.iterdir()):
            z.write(file, file.name)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path, frames=12, fps=10)
    return path


@pytest.fixture
def found(tmp_path):
    """Returns what loads inputs: {name of a clip: (frames, fps)}, and the table."""
    scan = VideoScan(tmp_path / "scan" / "scan.json", workers=2)

    def load(*paths, fps=30.0):
        table = load_inputs([str(path) for path in paths], scan, fps)
        assert all(clip.labels is None for clip in table)
        for name in [*(clip.name for clip in table), *table.unreadable]:
            assert not os.path.isabs(name) and ".." not in Path(name).parts and name.encode().decode() == name
        return {clip.name: (clip.num_frames, round(clip.fps, 3)) for clip in table}, table

    return load


def copy(video, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, path)


def test_a_folder_that_mixes_everything(tmp_path, video, found, caplog):
    root = tmp_path / "in"
    copy(video, root / "b.mp4", root / "day1" / "0004.mp4", root / "day1" / "0004.MOV", root / ".trash" / "x.mp4")
    pictures(root / "clips" / "one" / "images", range(5))
    zipped(root / "clips" / "two" / "images.zip", pictures(tmp_path / "p", range(3, 9), "f{:03d}.png"))
    pictures(root / "both", range(4))
    zipped(root / "both.zip", root / "both")  # which is what a reader takes
    picture(root / "day1" / "0004.jpg", 9)  # the thumbnail of a video
    (root / "notes.txt").write_text("no list, in a folder")
    (root / "a.mp4").write_bytes(b"no video")
    copy(video, root / "old" / "a.mp4" / "overlay.mp4")
    (root / "old" / "predict_args.json").write_text("{}")
    with caplog.at_level(logging.INFO, "tad"):
        clips, table = found(root, fps=7)
    assert clips == {
        "b.mp4": (12, 10.0),
        "both.zip": (4, 7.0),
        "clips/one/images": (5, 7.0),
        "clips/two/images.zip": (6, 7.0),
        "day1/0004.MOV": (12, 10.0),
        "day1/0004.mp4": (12, 10.0),
    }
    assert list(clips) == sorted(clips) and list(table.unreadable) == ["a.mp4"]
    assert "3 zips and folders of pictures do not know their rate: 7 per second is assumed" in caplog.text
    assert "1 folders of predictions are passed over" in caplog.text and "1 of 7 clips cannot be read" in caplog.text
    with open_clip(next(clip for clip in table if clip.name == "clips/two/images.zip")) as reader:
        assert [int(frame[0, 0, 0]) for frame in reader.frames(range(6))] == list(range(3, 9))


def test_what_cannot_be_opened_stops_no_other(as_nobody, video):
    folder, drop = as_nobody
    root = folder / "in"
    copy(video, root / "a.mp4", root / "closed.mp4", root / "closed.bin")
    for closed in root.glob("closed.*"):
        closed.chmod(0)
    (root / "nowhere.mp4").symlink_to(folder / "gone.mp4")
    os.mkfifo(root / "pipe.mp4")
    (root / "list.txt").write_text("a.mp4\nclosed.mp4\nclosed.bin\npipe.mp4\n")
    (folder / "scan").mkdir()
    (folder / "scan").chmod(0o777)
    scan = VideoScan(folder / "scan" / "scan.json", workers=1)
    codecs.lookup("utf-8-sig")  # from the library of Python, which only root may read here
    with drop():
        searched, listed = (load_inputs([str(path)], scan, 30.0) for path in (root, root / "list.txt"))
    assert [clip.name for clip in searched] == [clip.name for clip in listed] == ["a.mp4"]
    assert {name: reason.partition(": ")[2] for name, reason in searched.unreadable.items()} == {
        "closed.mp4": "Permission denied",
        "nowhere.mp4": "a link to a file that is not there, or that may not be read",
        "pipe.mp4": "neither a file nor a folder",
    }
    assert list(listed.unreadable) == ["closed.mp4", "closed.bin", "pipe.mp4"]


def test_arguments_keep_their_order_and_a_file_is_used_once(tmp_path, video, found, caplog, monkeypatch):
    copy(video, tmp_path / "z.mp4", tmp_path / "in" / "a.mp4", tmp_path / "plain")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "z.mp4")
    with caplog.at_level(logging.INFO, "tad"):
        clips, _ = found(
            tmp_path / "z.mp4", tmp_path / "in", tmp_path / "plain", tmp_path / "in", tmp_path / "link.mp4"
        )
    assert list(clips) == ["z.mp4", "a.mp4", "plain"]  # the last is known by its first bytes
    assert "2 of 5 inputs are named twice, and used once" in caplog.text
    folder = pictures(tmp_path / "frames", range(3))
    monkeypatch.chdir(folder)
    assert found(".")[0] == {"frames": (3, 30.0)} and found("../z.mp4")[0] == {"z.mp4": (12, 10.0)}


def test_lists(tmp_path, video, found):
    copy(video, tmp_path / "l" / "day" / "a.mp4", tmp_path / "other" / "a.mp4", tmp_path / "l" / "odd.bin")
    pictures(tmp_path / "l" / "frames", range(4))
    content = f"day\n\nframes\n../other/a.mp4\r\n{tmp_path}/l/odd.bin\ngone.mp4\nlist.txt\n"
    (tmp_path / "l" / "list.txt").write_text(content, encoding="utf-8-sig")
    clips, table = found(tmp_path / "l" / "list.txt")
    assert list(clips) == ["day/a.mp4", "frames", "a.mp4", "odd.bin"]
    assert "no such file or folder" in table.unreadable["gone.mp4"] and list(table.unreadable)[1] == "list.txt"


def test_files_of_the_same_name_keep_enough_of_their_folders(tmp_path, video, found):
    copy(video, *(tmp_path / day / "cam" / "a.mp4" for day in ("mon", "tue")), tmp_path / "tue" / "b.mp4")
    clips, _ = found(tmp_path / "mon" / "cam", tmp_path / "tue" / "cam" / "a.mp4", tmp_path / "tue" / "b.mp4")
    assert list(clips) == ["mon/cam/a.mp4", "tue/cam/a.mp4", "b.mp4"]


def test_names_are_good_for_folders(tmp_path, video, found):
    """Not one of a file beside them, not too long, in Unicode, and none within another's."""
    odd = os.fsdecode(b"b\xff.mp4")
    copy(video, tmp_path / "in" / "Summary.csv" / "a.mp4", tmp_path / "in" / odd)
    pictures(tmp_path / "in" / "day", range(3))
    copy(video, tmp_path / "in" / "day" / "overlay.mp4")
    clips, table = found(tmp_path / "in")
    assert set(clips) == {"Summary.csv_/a.mp4", "b\\udcff.mp4", "day/pictures", "day/overlay.mp4"}
    for clip in table:
        (tmp_path / "out" / clip.name).mkdir(parents=True)
        with open_clip(clip) as reader:
            assert len(reader.read([0, 2])) == 2
    long = "é" * 127  # 254 bytes
    paths = [f"/{'/'.join(['d' * 250] * 8)}/{long}.mp4", f"/{'/'.join(['e' * 250] * 8)}/{long}.mp4", "/x/\udcff" * 60]
    names = _names([_Found(path, 8, "video") for path in paths])
    assert len(set(names)) == 3
    for name in names:
        assert len(name.encode()) <= 1024 and all(len(part.encode()) <= 255 for part in name.split("/"))


def test_pictures_that_are_missing_are_frames_all_the_same(tmp_path, found):
    folder = pictures(tmp_path / "every", [7, 8, 11, 12])
    pictures(tmp_path / "third", [0, 3, 9, 12])
    clips, table = found(folder, tmp_path / "third")
    assert clips == {"every": (6, 30.0), "third": (5, 30.0)}
    with open_clip(table[1]) as reader:
        came = list(reader.sound_frames(range(5), range(5)))
    assert [frame if isinstance(frame, str) else int(frame[0, 0, 0]) for frame in came[:2]] == [0, 3]
    assert "000006.jpg: no such file" in came[2]


@pytest.mark.parametrize(
    ("numbers", "name", "reason"),
    [
        ([1, 2, 3, 5000], "{:04d}.jpg", "4 pictures whose numbers leave out 4996: renumber them"),
        ([1, 2, 3], "{:02d}.bmp", ".bmp pictures are not read, only .jpg .jpeg .png: convert them"),
    ],
)
def test_pictures_that_are_no_clip(tmp_path, found, numbers, name, reason):
    folder = tmp_path / "in" / "p"
    folder.mkdir(parents=True)
    for number in numbers:
        (folder / name.format(number)).touch()
    with pytest.raises(DataError, match=f"1 of 1 clips cannot be read: p .*{reason}"):
        found(folder)


def test_what_leads_to_nothing_is_an_error(tmp_path, video, found):
    (tmp_path / "empty").mkdir()
    (tmp_path / "prose.txt").write_text("It rained.\nThe road was wet.\n")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("über\n".encode("latin-1"))
    os.mkfifo(tmp_path / "pipe")
    picture(tmp_path / "one.png", 3)
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    (tmp_path / "a.mp4").touch()
    for name, message in (
        ("gone.mp4", "gone.mp4: no such file or folder; expected is a video, a zip or folder of pictures"),
        ("empty", "empty: no video and no numbered pictures in it or below; videos end in .3gp"),
        ("prose.txt", "prose.txt: a text file, none of its lines names a file, the first is 'It rained.'; expected"),
        ("blank.txt", "blank.txt: a text file, empty; expected"),
        ("latin.txt", "latin.txt: not a text file in UTF-8"),
        ("pipe", "pipe: neither a file nor a folder; --stream takes a camera"),
        ("one.png", "1 of 1 clips cannot be read: one.png .*a single picture; a clip is a folder or zip of them"),
        ("bad.zip", "1 of 1 clips cannot be read: bad.zip .*not a zip file"),
        ("a.mp4", "1 of 1 clips cannot be read: a.mp4 .*the file is empty"),
    ):
        with pytest.raises(DataError, match=message):
            found(tmp_path / name)
    copy(video, tmp_path / "b.mp4")
    clips, table = found(tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "bad.zip")
    assert list(clips) == ["b.mp4"] and list(table.unreadable) == ["a.mp4", "bad.zip"]
    with pytest.raises(DataError, match="0 is not a frame rate of pictures"):
        found(tmp_path / "b.mp4", fps=0)


def test_a_pack_gives_its_clips_with_their_rate(tmp_path, dota_root, found):
    for fps, name in ((0, "whole"), (5, "half")):
        pack("DoTA", str(dota_root), tmp_path / name, splits=["val"], settings=Settings(24, fps, 90), workers=2)
    clips, table = found(tmp_path / "whole")
    assert len(clips) == 5 and {fps for _, fps in clips.values()} == {10.0}
    with open_clip(table[0]) as reader:
        assert len(list(reader.frames(range(table[0].num_frames)))) == table[0].num_frames
    with pytest.raises(DataError, match="a pack of 1 frame in 2; score the original"):
        found(tmp_path / "half")


def test_ten_thousand_files_are_named_apart_in_a_second_or_so(tmp_path):
    found = [_Found(f"/data/{day}/{i:04d}.mp4", 1, "video") for day in range(10) for i in range(1000)]
    names = _names(found)
    assert len(set(names)) == 10_000 and names[-1] == "9/0999.mp4"
