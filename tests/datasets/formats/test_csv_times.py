"""A user's own table that speaks of seconds, labels of whole clips, stretches of files, ids and sources."""

import shutil

import numpy as np
import openpyxl
import pytest
from helpers import write_video
from PIL import Image

from datasets import VideoScan, build_clips
from datasets.clips import DataError
from datasets.readers import open_clip
from datasets.tools.check import check
from datasets.tools.pack import Settings, pack
from datasets.windows import kept_frames
from tests.datasets.video_files import FFMPEG, X264, burned, ffmpeg, number_of, shown_at


def runs(labels):
    """[(value, frames)] of the stretches of equal labels."""
    return [(int(part[0]), len(part)) for part in np.split(labels, np.flatnonzero(np.diff(labels)) + 1)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """00822.mp4 of 40 frames at 10 fps, whose frame i is grey 4 i; a copy, b.mov; a folder f of 40 pictures."""
    root = tmp_path_factory.mktemp("own")
    write_video(root / "00822.mp4", frames=40, fps=10)
    shutil.copy(root / "00822.mp4", root / "b.mov")
    (root / "f").mkdir()
    for i in range(40):
        Image.new("RGB", (8, 8), (i,) * 3).save(root / "f" / f"{i:06d}.png")
    return root


@pytest.fixture
def table(sources, tmp_path):
    """table(text, split="train") reads the text as own/<split>.csv."""

    def read(text, split="train"):
        (sources / f"{split}.csv").write_text(text)
        return build_clips("csv", str(sources), split, VideoScan(tmp_path / "scan.json", workers=1))

    return read


def test_seconds_become_frames_by_the_stated_rules(table, caplog):
    header = "path,clip,fps,start_time,end_time,event_time,alert_time,clip_start\n"
    rows = ["b.mov,interval,,1.05,2,1.5,,0", "b.mov,interval,,3.0,3.2,,,0", "b.mov,alert,,,,3,2.5,0",
            "b.mov,event,,,,3,,0", "b.mov,cut,,,,5.0,,0", "b.mov,far,,,,9,8.5,0", "b.mov,safe,,,nan,None,,0",
            "b.mov,nominal,30,,,3,2.5,0"]  # fmt: skip
    caplog.set_level("INFO", "tad")
    clips = {clip.name: clip for clip in table(header + "\n".join(rows))}
    expected = {
        "interval": [(0, 11), (1, 9), (0, 10), (1, 2), (0, 8)],
        "alert": [(0, 25), (1, 5), (2, 10)],
        "event": [(0, 15), (1, 15), (2, 10)],
        "cut": [(0, 35), (1, 5)],
        "far": [(0, 40)],
        "safe": [(0, 40)],
        "nominal": [(0, 25), (1, 5), (2, 10)],  # the file's own clock tells seconds
    }
    assert {name: runs(clip.labels) for name, clip in clips.items()} == expected
    assert (clips["cut"].event_time, clips["cut"].alert_time, clips["safe"].event_time) == (5.0, None, None)
    assert "3 from alert to event, 2 as the table has them, 2 from 1.5 s before the event" in caplog.text
    assert "contradicts 1 videos, and windows are laid out by it: nominal (fps 30, shown at 10)" in caplog.text


def test_a_rate_that_stands_for_the_true_one_is_no_contradiction(table, caplog):
    assert [clip.fps for clip in table("path,fps\nb.mov,10.05\n822,9.95\nf,25\n")] == [10.05, 9.95, 25]
    assert "contradicts" not in caplog.text


def test_a_label_is_of_a_clip_without_times(table, sources):
    one, none, unknown = table("path,label,fps\nb.mov,1,\n822,no,\nf,,10\n")
    assert one.labels.all() and not none.labels.any() and unknown.labels is None
    assert (one.is_positive, none.is_positive, unknown.is_positive) == (True, False, None)
    assert check("csv", str(sources), splits=["train"], num_frames=4)[1]["train"]["unlabelled_clips"] == 1
    timed, untimed, safe = table("path,label,event_time,fps\nb.mov,1,3,\n822,1,,\nf,0,,10\n")
    assert runs(timed.labels) == [(0, 15), (1, 15), (2, 10)] and runs(untimed.labels) == [(2, 40)]
    assert untimed.is_positive and not safe.labels.any()


def test_two_clips_of_a_file_are_stretches_of_it(table, sources, tmp_path):
    text = "path,clip,clip_start,clip_end,event_time,label,source,fps\n"
    text += "b.mov,early,,1.25,,0,,\nb.mov,late,1.95,,3,1,,\nf,mine,0.5,3.5,2,1,rec,10\n"
    early, late, mine = clips = table(text)
    assert [(c.num_frames, c.offset, c.recording) for c in clips] == [
        (13, 0, "b.mov"),
        (20, 20, "b.mov"),
        (30, 5, "rec"),
    ]
    assert (late.event_time, runs(late.labels)) == (1.0, [(1, 10), (2, 10)]) and not early.labels.any()
    for clip, grey in ((early, 0), (late, 80)):
        with open_clip(clip) as reader:
            assert reader.mismatch() == "" and reader.usable_frames() == clip.num_frames
            sound = list(reader.sound_frames([2, 5], range(clip.num_frames)))
            assert all((a == b).all() for a, b in zip(sound, reader.read([2, 5]), strict=True))
            levels = np.median(reader.read([0, 5]).numpy(), axis=(1, 2, 3))
            assert levels == pytest.approx([grey, grey + 20], abs=3)
    assert mine.filename(0) == "000005.png"
    findings, numbers = check("csv", str(sources), splits=["train"], num_frames=4, deep=True)
    assert findings == [] and numbers["train"]["ignored_frames"] == 10 + 15
    pack("csv", str(sources), tmp_path / "pack", splits=["train"], settings=Settings(0, 0, 95))
    assert check("csv", str(tmp_path / "pack"), splits=["train"], num_frames=4)[0] == []
    packed = build_clips("csv", str(tmp_path / "pack"), "train")
    assert kept_frames(packed).keys() == kept_frames(clips).keys() == {1, 2}
    for clip, other in zip(packed, clips, strict=True):
        assert clip.labels.tolist() == other.labels.tolist() and clip.recording == other.recording
        assert (clip.event_time, clip.positive, clip.offset) == (other.event_time, other.positive, other.offset)
        with open_clip(clip) as reader, open_clip(other) as original:
            assert reader.mismatch() == ""
            assert np.abs(reader.read([7]).numpy().astype(int) - original.read([7]).numpy()).max() < 9


def test_frames_are_ignored_where_their_label_is_empty(table):
    rows = "".join(f"f,10,{i},{'' if i > 30 else int(i > 20)}\n" for i in range(40))
    (clip,) = table("path,fps,frame,label\n" + rows)
    assert runs(clip.labels) == [(0, 21), (1, 10), (2, 9)]


def test_ids_without_suffix_or_zeros(table, sources):
    for written in ("822", "00822", "822.0", "822.mp4", "0822"):
        (clip,) = table(f"path\n{written}\n")
        assert (clip.name, clip.source) == (written, str(sources / "00822.mp4"))
    assert table("path\nb\n")[0].source.endswith("b.mov")
    assert "no such file" in table("path\nb\n82\n").unreadable["82"]
    with pytest.raises(DataError, match="row 3, column path: '822' belongs to clip 00822 already; clip_start and"):
        table("path\n00822\n822\n")
    shutil.copy(sources / "b.mov", sources / "b.mkv")
    with pytest.raises(DataError, match="row 2, column path: 'b' may be b.mkv or b.mov: name one"):
        table("path\nb\n")
    (sources / "b.mkv").unlink()


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_separators(table, separator):
    point = "," if separator == ";" else "."
    rows = [["path", '"a,b"', "event_time"], ["b.mov", '"x,y;z"', f"3{point}05"]]
    (clip,) = table("\n\n" + "\n".join(separator.join(row) for row in rows))
    assert clip.groups == {"a,b": "x,y;z"} and clip.event_time == 3.05


def test_a_workbook_is_answered_with_the_command_that_reads_it(table, sources):
    book = openpyxl.Workbook()
    book.active.append(["path"])
    book.save(sources / "val.xlsx")
    scan = VideoScan(sources / "scan.json", workers=1)
    with pytest.raises(DataError, match=r"val.csv: not found; .*prepare sheet \S+/val.xlsx \S+/val.csv makes it"):
        build_clips("csv", str(sources), "val", scan)
    with pytest.raises(DataError, match="val.xlsx: a workbook, not a csv file; python -m datasets.tools.prepare sheet"):
        build_clips("csv", str(sources / "val.xlsx"), "all", scan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,start_time\nb.mov,1\n", "row 1 has one of the columns start_time and end_time; both are needed"),
        ("path,start_time,end_time,frame,label\n", "use one pair"),
        ("path,alert_time\nb.mov,1\n", "row 1 has a column alert_time and no event_time"),
        ("path,start_time,end_time\nb.mov,2,1\n", "row 2, column end_time: 1 s is not after start_time, 2 s"),
        ("path,start_time,end_time\nb.mov,2,\n", "row 2, column end_time: '' is not a time in seconds"),
        (
            "path,start_time,end_time\nb.mov,2,4.5\n",
            "column end_time: 4.5 s, but clip b.mov is of a file of 4 s",
        ),
        ("path,event_time\nb.mov,0:03\n", "row 2, column event_time: '0:03' is not a time in seconds from the file's"),
        ("path,event_time\nb.mov,-1\n", "row 2, column event_time: '-1' is not a time in seconds"),
        ("path,event_time\nb.mov,inf\n", "row 2, column event_time: 'inf' is not a time in seconds"),
        ("path,event_time,alert_time\nb.mov,1,2\n", "row 2, column alert_time: 2 s, but event_time is 1 s"),
        ("path,event_time,alert_time\nb.mov,,2\n", "row 2, column alert_time: 2 s, but event_time is empty"),
        ("path,event_time,label\nb.mov,1,0\n", "row 2, column label: 0, but the rows of clip b.mov say when"),
        ("path,label\nb.mov,2\n", "row 2, column label: '2' is neither 1 nor 0"),
        (
            "path,clip_start,clip_end\nb.mov,1,4.2\n",
            "column clip_end: 4.2 s, but clip b.mov is of a file of 4 s",
        ),
        ("path,clip_start\nb.mov,4\n", "row 2, column clip_start: 4 s leaves nothing of the clip; clip b.mov is of"),
        ("path,clip_start,clip_end\nb.mov,2,1\n", "row 2, column clip_start: 2 s leaves nothing of the clip; clip_end"),
        (
            "path,clip,clip_end\nb.mov,x,1\nb.mov,y,\n",
            "row 3, column path: 'b.mov' belongs to clip x already;",
        ),
        (
            "path,start_frame,end_frame,start_time,end_time\nb.mov,1,2,1,2\n",
            "row 2, column start_time: filled in beside start_frame",
        ),
        (
            "path,clip_end,frame,label\n" + "".join(f"b.mov,1,{i},0\n" for i in range(11)),
            "row 2, column frame: frame 10 of clip b.mov has a label, but the clip is frames 0 to 9",
        ),
    ],
)
def test_mistakes_name_row_and_column(table, text, message):
    with pytest.raises(DataError) as caught:
        table(text)
    assert message in str(caught.value)


@pytest.mark.skipif(not FFMPEG, reason="needs ffmpeg")
def test_seconds_sit_on_the_right_pictures_of_a_variable_rate(tmp_path):
    (tmp_path / "source.rgb").write_bytes(b"".join(burned(i).tobytes() for i in range(120)))
    ffmpeg(tmp_path, f"source -vf select='lt(n\\,60)+not(mod(n\\,4))' -vsync vfr {X264} -g 20 v.mkv")
    (tmp_path / "train.csv").write_text("path,start_time,end_time\nv.mkv,1.0,3.0\n")
    (clip,) = build_clips("csv", str(tmp_path), "train", VideoScan(tmp_path / "scan.json", workers=1))
    times, step = shown_at(tmp_path / "v.mkv"), 4 / 30  # between pictures, at most
    assert len(times) == clip.num_frames and not np.allclose(np.diff(times), times[1])
    with open_clip(clip) as reader:
        pictures = [number_of(picture.numpy()) for picture in reader.frames(range(clip.num_frames))]
    seconds = np.array(pictures) / 30  # at which the picture that a frame shows was taken
    assert (seconds[clip.labels == 1] >= 1.0 - step).all() and (seconds[clip.labels == 1] < 3.0 + step).all()
    assert ((seconds <= 1.0 + step) | (seconds >= 3.0 - step))[clip.labels == 0].all()


@pytest.mark.parametrize(
    "content",
    [
        "path,event_time\nb.mov,3\n".encode("utf-16"),
        b"sep=;\npath;event_time\nb.mov;3,0\n",
        "\ufeffPath ,Event Time\nb.mov,3\n".encode(),
        b'path,note,event_time\r\nb.mov,"two\r\nlines",3\r\n',
        b"path,label,event_time\nb.mov,1.0,3\n",  # as pandas writes a column that is empty somewhere
        b"path\tevent-time\nb.mov\t3\n",
    ],
)
def test_tables_as_programs_write_them(sources, content):
    (sources / "train.csv").write_bytes(content)
    (clip,) = build_clips("csv", str(sources), "train", VideoScan(sources / "scan.json", workers=1))
    assert (runs(clip.labels), clip.event_time) == ([(0, 15), (1, 15), (2, 10)], 3.0)


def test_a_table_of_another_name_and_a_path_of_windows(table, sources):
    (sources / "sub").mkdir()
    shutil.copy(sources / "b.mov", sources / "sub" / "c.mov")
    assert table("path\nsub\\c.mov\n")[0].source == str(sources / "sub" / "c.mov")
    (sources / "other.tsv").write_text("path\nb.mov\n")
    with pytest.raises(DataError, match="other.csv: not found; .*; call .*other.tsv so, if it is the table"):
        build_clips("csv", str(sources), "other", VideoScan(sources / "scan.json", workers=1))


def test_a_negative_stretch_may_name_the_event_of_another(table, caplog):
    rows = "b.mov,early,0,1.4,0,3\nb.mov,late,1.4,,1,3\nb.mov,after,3.2,,,3\n"
    early, late, after = table("path,clip,clip_start,clip_end,label,event_time\n" + rows)
    assert (runs(early.labels), early.event_time, early.is_positive) == ([(0, 14)], None, False)
    assert (runs(late.labels), late.event_time) == ([(0, 1), (1, 15), (2, 10)], pytest.approx(1.6))
    assert (runs(after.labels), after.event_time) == ([(2, 8)], None)
    with pytest.raises(DataError, match="row 2, column label: 0, but the rows of clip early say when"):
        table("path,clip,clip_start,clip_end,label,event_time\nb.mov,early,0,1.6,0,3\n")
    with pytest.raises(
        DataError, match="row 3, column clip_start: .*; two clips of one file have a name each, in colum"
    ):
        table("path,clip_start\nb.mov,0\nb.mov,2\n")
    assert "no frame is anomalous" not in caplog.text
    table("path,event_time\nb.mov,30\n")
    assert "1 clips end so long before their event that no frame is anomalous; are the times in seconds?" in caplog.text


def test_a_table_without_val_is_told_what_to_do(tmp_path):
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    (tmp_path / "train.csv").write_text("path\nb.mov\n")
    with pytest.raises(
        DataError, match=r"val.csv: not found; .*; --select_split 0.1 chooses the best checkpoint on a p"
    ):
        build_clips("csv", str(tmp_path), "val", scan)
    with pytest.raises(
        DataError, match=r"train.csv is one file, .*: python -m datasets.tools.prepare split csv \S+train"
    ):
        build_clips("csv", str(tmp_path / "train.csv"), "train", scan)
