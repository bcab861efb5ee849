"""Every planted fault is found, and nothing else; the list of bad clips does what it is for."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import run, write_video
from PIL import Image

from datasets import Clip, DataError, build_clips
from datasets.faults import read_bad_clips
from datasets.tools.check import Task, check, inspect_clip
from datasets.tools.pack import Settings, pack
from datasets.tools.synthetic import render_dota


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """34 clips in DoTA's layout and 6 videos in BDD100K's, without a fault."""
    root = tmp_path_factory.mktemp("forty")
    render_dota(root / "DoTA", train=24, val=10, seed=5, size=(64, 36))
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for i in range(count):
            write_video(root / "BDD" / split / f"{i}.mov", frames=60, fps=30)
    return root


@pytest.fixture
def forty(whole, tmp_path):
    """A copy to break."""
    shutil.copytree(whole, tmp_path / "forty")
    return tmp_path / "forty"


def images(root, clip):
    return root / "DoTA" / "frames" / clip / "images.zip"


def rewrite(path, change):
    """Replace a zip by one of change({name: bytes})."""
    with zipfile.ZipFile(path) as z:
        held = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for name, data in change(held).items():
            z.writestr(name, data)


def flip_bytes(path):
    """Change 20 bytes in the middle of the JPEG of frame 7, as a bad disk would."""
    with zipfile.ZipFile(path) as z:
        member = z.getinfo("000007.jpg")
    data = bytearray(path.read_bytes())
    middle = member.header_offset + 30 + len(member.filename) + member.file_size // 2
    data[middle : middle + 20] = bytes(b ^ 0xFF for b in data[middle : middle + 20])
    path.write_bytes(data)


def without(*frames):
    return lambda held: {name: data for name, data in held.items() if int(name[:6]) not in frames}


def shorten(root, clip, frames):
    """Cut annotation and zip of a clip to its first frames."""
    path = root / "DoTA" / "dataset" / "annotations" / f"{clip}.json"
    annotation = json.loads(path.read_text())
    annotation["labels"] = annotation["labels"][:frames]
    path.write_text(json.dumps(annotation))
    rewrite(images(root, clip), without(*range(frames, 100)))


def plant(root):
    """Break one clip in each way; {(split, clip): kind}."""
    train, val = "synthetictr_{:06d}".format, "syntheticva_{:06d}".format
    flip_bytes(images(root, train(1)))
    whole_zip = images(root, train(3)).read_bytes()
    images(root, train(3)).write_bytes(whole_zip[: 2 * len(whole_zip) // 3])
    images(root, val(4)).write_bytes(b"\n<!DOCTYPE html>\n<html><body>Quota exceeded</body></html>")
    rewrite(images(root, train(5)), without(20))
    rewrite(images(root, train(7)), lambda held: held | {f"{len(held):06d}.jpg": held["000000.jpg"]})
    (root / "DoTA" / "dataset" / "annotations" / f"{val(6)}.json").unlink()
    shorten(root, train(9), 15)
    labels = build_clips("DoTA", str(root / "DoTA"), "train")[11].labels
    rewrite(images(root, train(11)), without(*range(labels.nonzero()[0][-1], 100)))
    with (root / "DoTA" / "dataset" / "val_split.txt").open("a") as f:
        f.write(train(13) + "\n")
    moov = (root / "BDD" / "val" / "1.mov").read_bytes()
    (root / "BDD" / "val" / "1.mov").write_bytes(moov[: len(moov) // 2])
    return {
        ("train", train(1)): "unreadable",
        ("train", train(3)): "unreadable",
        ("val", val(4)): "unreadable",
        ("train", train(5)): "missing_frames",
        ("train", train(7)): "extra_frames",
        ("val", val(6)): "annotation",
        ("train", train(9)): "short",
        ("train", train(11)): "label_beyond_end",
        ("val", train(13)): "in_two_splits",
        ("val", "1.mov"): "unreadable",
    }


@pytest.mark.parametrize("deep", [False, True])
def test_forty_good_clips_have_no_fault(whole, deep):
    for name, folder, clips in (("DoTA", "DoTA", 34), ("BDD100K", "BDD", 6)):
        findings, numbers = check(name, str(whole / folder), deep=deep, workers=2)
        assert findings == [] and sum(own["clips"] for own in numbers.values()) == clips


@pytest.mark.parametrize("deep", [False, True])
def test_every_planted_fault_is_found_and_nothing_else(forty, deep):
    planted = plant(forty)
    found = [f for name, folder in (("DoTA", "DoTA"), ("BDD100K", "BDD"))
             for f in check(name, str(forty / folder), deep=deep, workers=2)[0]]  # fmt: skip
    assert {(f.split, f.clip.removeprefix("val/")): f.kind for f in found} == planted
    assert len(found) == len(planted) == 10
    messages = {f.clip: f.message for f in found}
    assert "000007.jpg: BadZipFile: Bad CRC-32" in messages["synthetictr_000001"]
    assert "not a readable zip (it is a web page)" in messages["syntheticva_000004"]
    assert "1 of" in messages["synthetictr_000005"] and "000020.jpg" in messages["synthetictr_000005"]
    assert "15 frames; a window of 16 frames at 10 fps spans 16" in messages["synthetictr_000009"]
    assert "in train too" in messages["synthetictr_000013"]
    assert "syntheticva_000006.json: cannot be read" in messages["syntheticva_000006"]


def test_the_command_reports_and_its_list_goes_into_training_and_evaluation(forty, tmp_path):
    planted = plant(forty)
    root = str(forty / "DoTA")
    done = run("-m", "datasets.tools.check", "DoTA", root, "--output_dir", tmp_path / "report")
    assert done.returncode == 1 and "7 errors, 2 warnings" in done.stdout, done.stderr
    assert "train: 24 clips (3275 are published)" in done.stdout and "error: unreadable, 3" in done.stdout
    report = json.loads((tmp_path / "report" / "DoTA_check.json").read_text())
    assert {(f["split"], f["clip"]): f["kind"] for f in report["errors"] + report["warnings"]} == {
        k: v for k, v in planted.items() if k[1] != "1.mov"
    }
    own = report["splits"]["train"]
    assert (own["clips"], own["published"]["frames"], own["fps"]) == (24, 334903, {"10": 24})
    table = build_clips("DoTA", root, "train")
    assert own["anomalous_frames"] == sum(int(c.labels.sum()) for c in table)
    assert own["windows"] == sum(max(c.num_frames - 15, 0) for c in table)

    bad = tmp_path / "report" / "DoTA_bad_clips.txt"
    names = {clip for (_, clip), kind in planted.items() if kind not in ("extra_frames", "short", "in_two_splits")}
    assert read_bad_clips([bad]) == names - {"1.mov"} and len(read_bad_clips([bad])) == 6
    with pytest.raises(DataError, match="syntheticva_000006.json"):
        build_clips("DoTA", root, "val")
    val = build_clips("DoTA", root, "val", leave_out=read_bad_clips([bad]))
    assert (len(val), val.listed, val.left_out) == (9, 11, ["syntheticva_000004", "syntheticva_000006"])

    common = ["--model", "vit_tiny_patch16_64", "--data_path", root, "--num_workers", "1", "--device", "cpu"]
    common += ["--bad_clips", bad]
    done = run("run_finetune.py", "--eval", *common, "--output_dir", tmp_path / "eval")
    assert done.returncode == 0, done.stderr
    assert "DoTA val: 2 of 11 clips are left out: syntheticva_000004, syntheticva_000006" in done.stdout
    assert "--bad_clips: 4 names are of no clip of DoTA val: synthetictr_000001, synthetictr_000003, " in done.stdout
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["coverage"] == "9 of 11 clips" and metrics["clips"] == 11
    assert metrics["left_out"] == ["syntheticva_000004", "syntheticva_000006"]
    done = run(
        "run_finetune.py", *common, "--output_dir", tmp_path / "run", "--epochs", "1", "--warmup_epochs", "0",
        "--nb_samples_per_epoch", "0", "--total_batch_size", "64", "--disable_eval_during_finetuning",
        "--max_bad_samples", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "DoTA train: 4 of 24 clips are left out" in done.stdout
    assert "2 names are of no clip of DoTA train: syntheticva_000004, syntheticva_000006" in done.stdout


def test_only_decoding_finds_a_picture_that_was_broken_before_it_was_zipped(forty):
    path = images(forty, "synthetictr_000002")
    rewrite(path, lambda held: held | {"000004.jpg": held["000004.jpg"][:900], "000030.jpg": b"no picture"})
    (finding,), _ = check("DoTA", str(forty / "DoTA"), workers=2)  # the headers show one of the two
    assert finding.kind == "unreadable" and "frame 000030.jpg" in finding.message and "more" not in finding.message
    (finding,), _ = check("DoTA", str(forty / "DoTA"), deep=True, workers=2)
    assert finding.kind == "unreadable" and "frame 000004.jpg" in finding.message and "1 more of its" in finding.message


@pytest.mark.parametrize("deep", [False, True])
def test_pictures_of_two_sizes_in_a_clip_are_found(forty, deep):
    def picture(size, orientation):
        exif, data = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.new("RGB", size).save(data, "JPEG", exif=exif)
        return data.getvalue()

    small, sideways = picture((32, 18), 1), picture((36, 64), 6)  # the second is 64 x 36 as it is shown
    names = {f"{i:06d}.jpg": small for i in (3, 5, 6, 7, 9)}
    rewrite(images(forty, "synthetictr_000002"), lambda held: held | {"__MACOSX/._000000.jpg": b"x"} | names)
    rewrite(images(forty, "synthetictr_000004"), lambda held: held | {"000004.jpg": sideways})
    (finding,), _ = check("DoTA", str(forty / "DoTA"), deep=deep, workers=2)
    assert (finding.kind, finding.clip, finding.is_error) == ("sizes", "synthetictr_000002", True)
    count = build_clips("DoTA", str(forty / "DoTA"), "train")[2].num_frames - 5
    others = "32 x 18: 5 (000003.jpg, 000005.jpg, 000006.jpg, ... 000009.jpg)"
    assert f"images.zip: pictures of 64 x 36: {count}, {others}; a window needs one size" in finding.message


def test_splits_that_cannot_be_read_do_not_hide_the_others(forty):
    (forty / "DoTA" / "dataset" / "train_split.txt").unlink()
    findings, numbers = check("DoTA", str(forty / "DoTA"), workers=1)
    assert [(f.split, f.clip, f.kind) for f in findings] == [("train", "", "annotation")] and list(numbers) == ["val"]
    assert check("DoTA", str(forty / "DoTA"), splits=["val"])[0] == []
    with pytest.raises(DataError, match="train_split.txt: split file not found"):
        check("DoTA", str(forty / "DoTA"), splits=["train"])
    with pytest.raises(DataError, match="unknown data set 'DOTA'"):
        check("DOTA", str(forty / "DoTA"))


def test_frames_under_other_names_are_shown(forty):
    rewrite(images(forty, "synthetictr_000000"), lambda held: {f"images/{name}": data for name, data in held.items()})
    (finding,), _ = check("DoTA", str(forty / "DoTA"), workers=2)
    assert finding.kind == "missing_frames" and "it holds images/000000.jpg" in finding.message


def test_clips_of_one_video_on_both_sides_are_counted(forty):
    """As in the published split of DoTA, where it is so for 1400 of 1402 validation clips."""
    old, new, root = "syntheticva_000002", "synthetictr_900000", forty / "DoTA"
    (root / "dataset" / "annotations" / f"{old}.json").rename(root / "dataset" / "annotations" / f"{new}.json")
    (root / "frames" / old).rename(root / "frames" / new)
    split = root / "dataset" / "val_split.txt"
    split.write_text(split.read_text().replace(old, new))
    for path in (root / "dataset").glob("metadata_*.json"):  # which would name a recording of its own for each clip
        path.unlink()
    findings, numbers = check("DoTA", str(root), workers=2)
    assert findings == []
    assert [numbers[s]["clips_of_videos_in_earlier_splits"] for s in ("train", "val")] == [0, 1]


def test_annotated_videos_are_held_against_their_annotation(whole, tmp_path):
    video = str(whole / "BDD" / "train" / "0.mov")  # 60 frames at 30 fps

    def kinds(frames, fps, anomalous=(), path=video, deep=False):
        labels = np.isin(np.arange(frames), anomalous).astype(np.uint8)
        return [kind for kind, _ in inspect_clip(Task("all", Clip("a", str(path), frames, fps, labels=labels), deep))]

    assert kinds(60, 30) == kinds(60, 30, deep=True) == kinds(50, 29.97) == []
    assert kinds(64, 30) == ["missing_frames"]
    assert kinds(64, 30, [20, 61]) == ["label_beyond_end"]
    assert kinds(60, 25) == ["rate"]
    damaged = bytearray(Path(video).read_bytes())
    start = damaged.index(b"mdat") + 400
    damaged[start : start + 1500] = bytes(1500)
    (tmp_path / "damaged.mov").write_bytes(damaged)
    assert kinds(60, 30, path=tmp_path / "damaged.mov", deep=True) == ["unreadable"]


def test_a_pack_is_checked_like_its_original(forty, tmp_path):
    pack("DoTA", str(forty / "DoTA"), tmp_path / "out", settings=Settings(32, 10, 90), workers=2)
    pack("BDD100K", str(forty / "BDD"), tmp_path / "bdd", settings=Settings(32, 10, 90), workers=2)
    assert check("DoTA", str(tmp_path / "out"), deep=True, workers=2)[0] == []
    assert check("BDD100K", str(tmp_path / "bdd"), deep=True, workers=2)[0] == []
    rewrite(tmp_path / "bdd" / "frames" / "train" / "2.mov.zip", without(32))
    (tmp_path / "out" / "frames" / "syntheticva_000003.zip").unlink()
    (size, frames), _ = check("BDD100K", str(tmp_path / "bdd"), workers=2)
    assert (size.kind, size.clip) == ("changed", "train/2.mov") and "when it was packed; pack it again" in size.message
    assert (frames.kind, frames.clip) == ("missing_frames", "train/2.mov") and "1 of 20" in frames.message
    (finding,), _ = check("DoTA", str(tmp_path / "out"), workers=2)
    assert (finding.kind, finding.clip) == ("unreadable", "syntheticva_000003")


def test_a_zip_of_a_pack_that_was_exchanged_for_one_as_long_is_found_by_its_sum(whole, tmp_path):
    pack("BDD100K", str(whole / "BDD"), tmp_path / "out", settings=Settings(32, 10, 90), workers=2)
    path = tmp_path / "out" / "frames" / "test" / "0.mov.zip"
    data = bytearray(path.read_bytes())
    data[12] ^= 1  # the date of the first picture
    path.write_bytes(data)
    assert check("BDD100K", str(tmp_path / "out"), workers=1)[0] == []
    (finding,), _ = check("BDD100K", str(tmp_path / "out"), deep=True, workers=1)
    assert (finding.kind, finding.clip) == ("changed", "test/0.mov") and "another SHA-256" in finding.message


def test_mistakes_in_a_csv_have_their_kind_and_names_are_of_one_clip(whole, tmp_path):
    for i in range(4):
        shutil.copy(whole / "BDD" / "train" / "0.mov", tmp_path / f"{i}.mov")  # 60 frames
    (tmp_path / "4.mov").write_bytes(b"no video")
    header = "clip,path,fps,start_frame,end_frame\n"
    (tmp_path / "train.csv").write_text(header + "a,0.mov,,10,20\nb,1.mov,,50,60\nc,2.mov,-1,,\nd,4.mov,,,\n")
    (tmp_path / "val.csv").write_text(header + "a,3.mov,,10,20\ne,0.mov,,10,20\n")
    findings, _ = check("csv", str(tmp_path), workers=1)
    assert {(f.split, f.clip): f.kind for f in findings} == {
        ("train", "b"): "label_beyond_end",
        ("train", "c"): "annotation",
        ("train", "d"): "unreadable",
        ("val", "a"): "in_two_splits",
        ("val", "e"): "in_two_splits",
    }
    messages = {f.clip: f.message for f in findings}
    assert messages["a"] == f"the name of {tmp_path}/0.mov in train too; give {tmp_path}/3.mov another"
    assert messages["e"] == f"in train too; take it out of one split file ({tmp_path}/0.mov)"


def test_what_cannot_be_written_is_known_before_the_work(as_nobody):
    root, drop = as_nobody
    (root / "file").touch()
    for folder in (root / "file", "/proc"):
        done = run("-m", "datasets.tools.check", "DoTA", "/absent", "--output_dir", folder)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {folder}: cannot be written, choose another --output_dir (")
    for folder, why in ((root / "file", "File exists"), (root / "new", "Permission denied")):
        with drop(), pytest.raises(DataError, match=rf"{folder}: cannot be written, choose another folder \({why}"):
            pack("DoTA", "/absent", folder, settings=Settings(32, 10, 90))


def test_a_root_that_may_not_be_entered_is_said(as_nobody):
    root, drop = as_nobody
    (root / "DoTA").mkdir(mode=0)
    with drop(), pytest.raises(DataError, match=r"DoTA: cannot be read \(.*Permission denied: .*DoTA/pack.json"):
        build_clips("DoTA", str(root / "DoTA"), "train")


def test_a_report_that_cannot_be_written_has_been_shown(whole, tmp_path):
    (tmp_path / "BDD100K_check.json").mkdir()
    done = run("-m", "datasets.tools.check", "BDD100K", whole / "BDD", "--output_dir", tmp_path)
    assert done.returncode == 1 and "0 errors, 0 warnings" in done.stdout
    assert done.stderr.startswith("error: ") and "Is a directory" in done.stderr and "Traceback" not in done.stderr
