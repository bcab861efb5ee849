"""A user's own table: what it may hold, and what its mistakes are answered with."""

import logging
import re
import shutil
import zipfile

import numpy as np
import pytest
from helpers import write_video
from PIL import Image

from datasets import VideoScan, build_clips
from datasets.clips import DataError
from datasets.readers import open_clip
from datasets.tools.check import check
from datasets.tools.pack import Settings, pack
from utils.text import first_few


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """a.mp4 and b.mov of 20 frames at 25 fps, folder f of 12 PNGs, broken.mp4 and gap/ that miss something."""
    root = tmp_path_factory.mktemp("own")
    write_video(root / "a.mp4", frames=20, fps=25)
    write_video(root / "b.mov", frames=20, fps=25)
    for folder, numbers in (("f", range(8, 20)), ("gap", (1, 2, 4)), ("mixed", ())):
        (root / folder).mkdir()
        for i in numbers:
            Image.new("RGB", (8, 8), (i,) * 3).save(root / folder / f"frame-{i}.PNG")
    Image.new("RGB", (8, 8)).save(root / "mixed" / "a1.jpg")
    Image.new("RGB", (8, 8)).save(root / "mixed" / "b1.jpg")
    (root / "broken.mp4").write_bytes(b"no video")
    (root / "page.zip").write_text("<html>")
    (root / "notes.txt").write_text("no video")
    return root


@pytest.fixture
def table(sources, tmp_path):
    """table(text, fps=None, split="train") reads the text as own/<split>.csv."""

    def read(text, fps=None, split="train"):
        (sources / f"{split}.csv").write_text(text)
        return build_clips("csv", str(sources), split, VideoScan(tmp_path / "scan.json", workers=1), fps)

    return read


def test_everything_but_the_path_may_be_left_out(table):
    (clip,) = table("path\na.mp4\n")
    assert (clip.name, clip.num_frames, clip.fps, clip.labels, clip.category) == ("a.mp4", 20, 25.0, None, None)


def test_rows_of_a_clip_add_up(table, sources):
    text = "clip,Path ,fps,start_frame,end_frame,category,ego,night,remark\n"
    text += f"one,{sources}/a.mp4,,2,3,side,1,no,x\ntwo,f,10,,,,,,\n\none,,,10.0,10,,,,y\n"
    one, two = table(text)
    assert np.flatnonzero(one.labels).tolist() == [2, 3, 10] and one.labels.dtype == np.uint8
    assert (one.category, one.ego, one.night) == ("side", True, False)
    assert (two.fps, two.ego, two.night, two.labels.tolist()) == (10.0, None, None, [0] * 12)
    assert (two.filename(0), two.filename(11)) == ("frame-8.PNG", "frame-19.PNG")
    with open_clip(two) as reader:
        assert reader.read([0, 11])[:, 0, 0, 0].tolist() == [8, 19]


def test_other_columns_are_groups(table, caplog):
    caplog.set_level(logging.INFO, "tad")
    rows = [(i, clip) for i in range(20) for clip in ("a.mp4,Rain", "b.mov,None")]
    text = "".join(f"{clip},nan,{i},0,{i}\n" for i, clip in rows)
    one, two = table("path,weather,end_frames,frame,label,speed\n" + text)
    assert one.groups == {"weather": "Rain"} and two.groups == {}
    assert "other columns are groups to report by: weather" in caplog.text
    assert "taken for groups: end_frames (is end_frame meant?)" in caplog.text
    assert "not used, since they differ within a clip: speed" in caplog.text


def test_names_in_messages_are_few_and_short(table, caplog):
    caplog.set_level(logging.INFO, "tad")
    table("path," + ",".join(f"c{i}" for i in range(100_000)) + "\na.mp4\n")
    assert "c0, c1, c2, c3, c4, ... (100000 in all)" in caplog.text and len(caplog.text) < 1000
    assert len(first_few(["x" * 10**6])) < 1000


def test_pictures_need_a_frame_rate_and_videos_may_be_given_another(table):
    with pytest.raises(DataError, match="train.csv: row 2, column fps: empty; pictures do not .* give --assume_fps"):
        table("path\nf\n")
    assert [c.fps for c in table("path,fps\nf,\na.mp4,\nb.mov,5\n", fps=12.5)] == [12.5, 25.0, 5.0]
    with pytest.raises(DataError, match="row 2, column fps: 1000 is not a frame rate, above 0 and below 1000"):
        table("path\nf\n", fps=1000)


def test_what_a_row_names_is_what_is_read(table, sources, tmp_path):
    for name in ("both", "folder", "h"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    for name in ("both.zip", "h.ZIP", "a.mp4.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            z.write(tmp_path / "h" / "1.png", "1.png")
            z.write(tmp_path / "h" / "1.png", "2.png")
    (tmp_path / "a.mp4").write_bytes((sources / "a.mp4").read_bytes())
    for name in ("both", "a.mp4"):
        with pytest.raises(DataError, match=rf"row 2, column path: \S+/{name}.zip is there too; name that, or move it"):
            table(f"path,fps\n{tmp_path}/{name},10\n")
    (clip,) = table(f"path,fps\n{tmp_path}/both.zip,10\n")
    assert clip.num_frames == 2
    clips = table(f"path,fps\na.mp4,10\n{tmp_path}/h.ZIP,10\n{tmp_path}/folder.zip,10\n")
    reasons = list(clips.unreadable.values())
    assert "suffix .ZIP is not read: rename it to .zip" in reasons[0]
    assert reasons[1].endswith("folder.zip: no such file")


def test_zips_with_folders_inside(table, sources):
    with zipfile.ZipFile(sources / "z.zip", "w") as z:
        for i in range(3):
            z.write(sources / "f" / f"frame-{i + 10}.PNG", f"in/frame_{i:03d}.png")
        z.writestr("in/Thumbs.db", "x")
        z.writestr("__MACOSX/._frame_000.png", "x")
    (clip,) = table("path,fps\nz.zip,10\n")
    assert clip.num_frames == 3
    with open_clip(clip) as reader:
        assert reader.read([2])[0, 0, 0, 0] == 12


def test_a_csv_in_place_of_the_folder_is_all_there_is(table, sources, tmp_path):
    table("path\na.mp4\n", split="own")
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    assert len(build_clips("csv", str(sources / "own.csv"), "all", scan)) == 1
    with pytest.raises(DataError, match="own.csv is one file, without splits: give the folder of train.csv"):
        build_clips("csv", str(sources / "own.csv"), "train", scan)
    with pytest.raises(DataError, match="val.csv: not found; the data set csv has a table for each split"):
        build_clips("csv", str(sources), "val", scan)


def test_clips_without_readable_frames_are_named_and_kept_apart(table, caplog):
    clips = table("path,fps\na.mp4,\nbroken.mp4,\ngone.mp4,\ngap,10\nmixed,10\npage.zip,10\nnowhere,10\nnotes.txt,10\n")
    assert [c.name for c in clips] == ["a.mp4"] and clips.listed == 8
    reasons = {
        "broken.mp4": "Invalid data found",
        "gone.mp4": "no such file",
        "gap": "picture frame-3.PNG is missing; restore or renumber them, or leave the clip out with --bad_clips",
        "mixed": "not one numbered sequence of pictures: a1.jpg, b1.jpg",
        "page.zip": "File is not a zip file",
        "nowhere": "no such file",
        "notes.txt": "Invalid data found when processing input; no zip by its suffix, .zip, and no folder either",
    }
    assert clips.unreadable.keys() == reasons.keys()
    for i, (name, reason) in enumerate(reasons.items()):
        assert reason in clips.unreadable[name]
        assert (f"{name} ({clips.unreadable[name]})" in caplog.text) == (i < 5)  # the log names the first
    assert "7 of 8 clips cannot be read" in caplog.text
    with pytest.raises(DataError, match="1 of 1 clips cannot be read: gone.mp4"):
        table("path\ngone.mp4\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip\nx\n", "row 1 has no column path"),
        ("", "row 1 has no column path"),
        ("path,path\na.mp4,b.mov\n", "row 1 has the column path twice"),
        ("path,start_frame\na.mp4,1\n", "row 1 has one of the columns start_frame and end_frame; both are needed"),
        ("path,start_frame,end_frame,frame,label\n", "use one pair"),
        ("path\n", "no rows"),
        ("path,category\na.mp4,x\nb\0.mov,x\n", "train.csv: line 3 has a NUL character"),
        ("path,start_frame,end_frame\na.mp4,1e400,1e400\n", "start_frame: '1e400' is not a whole number"),
        ("path,start_frame,end_frame\na.mp4,1,1e300\n", "but clip a.mp4 has 20 frames"),
        ("path,fps\na.mp4,1e400\n", "row 2, column fps: '1e400' is not a frame rate"),
        ('path,category\na.mp4,x\nb.mov,"side\nf,x\n', "train.csv: in the row that begins in line 3: unexpected end"),
        ('path,category\na.mp4,"x\nb.mov,"side"\n', "in the row that begins in line 2: ',' expected after"),
        ('path\n"a\nb.mp4"\n', r"row 3, column path: 'a\nb.mp4' has a line break or another control character in it"),
        ("path,clip\na.mp4,\x1b[1m\n", r"row 2, column clip: '\x1b[1m' has a line break or another control"),
        ("path\na.mp4,1\n", "row 2 has 2 cells, the header 1"),
        ("path,start_frame,end_frame\na.mp4,1,x\n", "row 2, column end_frame: 'x' is not a whole number, 0 or above"),
        ("path,start_frame,end_frame\na.mp4,-1,3\n", "row 2, column start_frame: '-1' is not a whole number"),
        ("path,start_frame,end_frame\na.mp4,1.5,3\n", "row 2, column start_frame: '1.5' is not a whole number"),
        ("path,start_frame,end_frame\na.mp4,3,\n", "row 2, column end_frame: '' is not a whole number"),
        ("path,start_frame,end_frame\na.mp4,5,4\n", "row 2, column end_frame: 4 is before start_frame 5"),
        (
            "path,start_frame,end_frame\nb.mov,,\na.mp4,5,20\n",
            "row 3, column end_frame: 20, but clip a.mp4 has 20 frames, 0 to 19",
        ),
        ("clip,path\nx,a.mp4\nx,b.mov\n", "row 3, column path: 'b.mov' for clip x, 'a.mp4' in row 2 or after"),
        ("clip,path\nx,a.mp4\ny,./a.mp4\n", "row 3, column path: './a.mp4' belongs to clip x already"),
        ("clip,path\nx,\n", "row 2, column path: empty, in every row of clip x"),
        ("clip,path\n,\nx,a.mp4\n,\n", None),
        ("path,fps\na.mp4,fast\n", "row 2, column fps: 'fast' is not a frame rate"),
        ("path,fps\na.mp4,-3\n", "row 2, column fps: '-3' is not a frame rate"),
        ("path,step\na.mp4,2.5\n", "row 2, column step: '2.5' is not a whole number, 0 or above"),
        ("path,step\na.mp4,0\n", "row 2, column step: 0 is below 1"),
        ("path,step\na.mp4,3\n", "row 2, column step: a video has no numbered pictures; leave it empty"),
        ("path,ego\na.mp4,maybe\n", "row 2, column ego: 'maybe' is neither 1 nor 0"),
        ("path,frame,label\na.mp4,0,2\n", "row 2, column label: 2 is neither 0 nor 1"),
        ("path,frame,label\na.mp4,0,1\na.mp4,0,1\n", "row 3, column frame: frame 0 of clip a.mp4 has a label already"),
        ("path,frame,label\na.mp4,0,1\n", "row 2, column frame: frame 1 of clip a.mp4 has no label"),
        (
            "path,frame,label\n" + "".join(f"a.mp4,{i},1\n" for i in range(21)),
            "row 2, column frame: frame 20 of clip a.mp4 has a label, but there are 20 frames",
        ),
    ],
)
def test_mistakes_name_row_and_column(table, text, message):
    if message is None:
        assert len(table(text)) == 1
        return
    with pytest.raises(DataError) as caught:
        table(text)
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Numbered pictures


@pytest.fixture
def pictures(tmp_path):
    """pictures(folder, name, ...) writes pictures, each of the grey value that is the first number in its name."""

    def write(folder, *names):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (int(re.findall(r"\d+", name)[0]) % 256,) * 3).save(path)
        return tmp_path / folder

    return write


def test_every_third_picture_is_a_clip_where_its_row_says_so(table, pictures, tmp_path, caplog):
    folder = pictures("third", *(f"f_{i:03d}.png" for i in range(1, 60, 3)))
    shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    text = f"path,fps,step,start_frame,end_frame\n{folder},10,3,4,6\n{tmp_path}/zipped.zip,10,3,,\na.mp4,,,,\n"
    thin, zipped, video = table(text)
    assert (thin.num_frames, thin.fps, thin.filename(0), thin.filename(19)) == (20, 10, "f_001.png", "f_058.png")
    assert np.flatnonzero(thin.labels).tolist() == [4, 5, 6] and video.num_frames == 20
    for clip in (thin, zipped):
        with open_clip(clip) as reader:
            assert reader.read([0, 5, 19])[:, 0, 0, 0].tolist() == [1, 16, 58] and not reader.mismatch()

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text(text.split("a.mp4")[0])
    (tmp_path / "data" / "val.csv").write_text("path,fps,step,start_frame,end_frame\n")
    pack("csv", str(tmp_path / "data"), tmp_path / "packed", splits=["train"], settings=Settings(0, 5, 95))
    assert check("csv", str(tmp_path / "packed"), splits=["train"], num_frames=4, deep=True)[0] == []
    packed = build_clips("csv", str(tmp_path / "packed"), "train")[0]
    assert [packed.filename(i) for i in range(20)] == [thin.filename(i) for i in range(20)]
    with open_clip(packed) as reader:
        assert reader.read([1, 19])[:, 0, 0, 0].tolist() == [4, 58]

    message = "the numbers of its pictures go up by 3, not {}: if none is missing, put 3 into the column step"
    for stated in (1, 2):
        clips = table(f"path,fps,step\na.mp4,,\n{folder},10,{stated}\n")
        assert message.format(stated) in clips.unreadable[str(folder)]


@pytest.mark.parametrize(
    ("names", "step", "reason"),
    [
        ("0.png 3.png 6.png 12.png 18.png", "", "picture 9.png is missing, and 1 more; restore or renumber them"),
        ("0.png 3.png 6.png 12.png", "3", "picture 9.png is missing; restore"),
        ("0.png 3.png 4.png 6.png", "3", "picture 4.png is not among the numbers that go up by 3"),
        ("1.png 1620000000000.png 1620000000001.png", "", "picture 2.png is missing, and 1619999999997 more"),
        ("1.png 01.png 2.png", "", "the number 1 is there twice"),
        ("1.png 02.png", "", "numbers with and without zeros in front: expected 2.png; rename"),
        ("1.png 2.jpg 3.jpg", "", "pictures of mixed suffixes: 2 .jpg, 1 .png; convert or rename them alike"),
        ("1.png 2.PNG", "", "pictures of mixed suffixes: 1 .PNG, 1 .png"),
        ("1.png 2.png 3.webp", "", "pictures of mixed suffixes: 2 .png, 1 .webp"),
        ("1.webp 2.webp", "", ".webp pictures are not read, only .jpg .jpeg .png: convert them"),
        ("1.bmp", "", ".bmp pictures are not read"),
        ("1.tif", "", ".tif pictures are not read"),
        ("a1.png b2.png", "", "not one numbered sequence of pictures: a1.png, b2.png"),
        ("deeper/1.png", "", "no pictures; it holds deeper"),
        (".1.png", "", "no pictures; it holds nothing"),
    ],
)
def test_other_pictures_get_a_plain_reason(table, pictures, names, step, reason):
    folder = pictures("folder", *names.split())
    clips = table(f"path,fps,step\na.mp4,,\n{folder},10,{step}\n")
    assert reason in clips.unreadable[str(folder)]


def test_a_picture_is_no_clip(table, pictures):
    picture = pictures("folder", "1.png") / "1.png"
    clips = table(f"path,fps\na.mp4,\n{picture},10\n")
    assert "a single picture; a clip is a folder or zip of them" in clips.unreadable[str(picture)]


def test_hidden_files_anywhere_are_ignored(table, pictures, tmp_path):
    folder = pictures("folder", *("1.png", "2.png", ".3.png", "._1.png"))
    (folder / "preview.gif").touch()
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        for name in (
            "in/1.png",
            "in/2.png",
            "in/._1.png",
            "in/.thumbs/9.jpg",
            "in/__MACOSX/1.png",
            "__MACOSX/in/._2.png",
        ):
            z.write(folder / "1.png", name)
    clips = table(f"path,fps\n{folder},10\n{tmp_path}/z.zip,10\n")
    assert [(c.num_frames, c.filename(1)) for c in clips] == [(2, "2.png"), (2, "in/2.png")]
