"""Packs: what is in them, that windows, labels and numbers stay, and that a kill costs nothing but time."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import AsRead, rewrite_zip, run, window_of, write_video
from PIL import Image

from datasets import Clip, ClipTable, DataError, VideoScan, build_clips
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.chunks import ClipStream
from datasets.loader import EpochSampler, Source, WindowDataset
from datasets.readers import open_clip
from datasets.stream import SplitWindows
from datasets.tools.check import check
from datasets.tools.pack import Settings, file_of, pack
from datasets.tools.synthetic import render_dota
from datasets.windows import WindowIndex, index_clips

SMALL = Settings(short_side=48, fps=10, quality=92)
WINDOW = {"num_frames": 16, "view_fps": 10}


def fields(clip):
    """A clip but for its frames."""
    own = {k: v for k, v in asdict(clip).items() if k not in ("source", "pack_step")}
    return own | {"labels": None if clip.labels is None else clip.labels.tolist()}


def tree(root):
    """{path: content} of the files below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def copy(dota_root, tmp_path):
    shutil.copytree(dota_root, tmp_path / "DoTA")
    return tmp_path / "DoTA"


@pytest.fixture
def dada(tmp_path):
    """DADA-2000's layout at 30 fps: two clips of 61 and 60 frames; frame n has the grey value 3 n."""
    root = tmp_path / "DADA"
    (root / "annotation").mkdir(parents=True)
    (root / "DADA2K_my_split").mkdir()
    header = ["video", "light", "type", "abnormal start frame", "abnormal end frame", "total frames"]
    rows = [["001", 1, 1, 30, 50, 61], ["002", 2, 60, 10, 31, 60]]
    with (root / "annotation" / "full_anno.csv").open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    (root / "DADA2K_my_split" / "training.txt").write_text("1/001\n")
    (root / "DADA2K_my_split" / "validation.txt").write_text("60/002\n")
    for video, _, kind, *_, total in rows:
        folder = root / "frames" / str(kind) / video
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "images.zip", "w") as z:
            for number in range(1, total + 1):
                data = io.BytesIO()
                Image.new("RGB", (80, 60), (3 * number,) * 3).save(data, "PNG")
                z.writestr(f"{number:04d}.png", data.getvalue())
    return root


def test_a_packed_dota_is_the_same_data_set_in_less_space(dota_root, tmp_path):
    pack("DoTA", str(dota_root), tmp_path / "out", settings=SMALL, workers=2)
    for split in ("train", "val", "all"):
        original, packed = (build_clips("DoTA", str(root), split) for root in (dota_root, tmp_path / "out"))
        assert [fields(c) for c in packed] == [fields(c) for c in original]
        assert [c.filename(7) for c in packed] == [c.filename(7) for c in original]
        for a, b in zip(packed, original, strict=True):
            np.testing.assert_array_equal(a.ttc, b.ttc)
        indices = [index_clips(table, **WINDOW, stride=1) for table in (original, packed)]
        assert all(np.array_equal(*pair) for pair in zip(*(i.locations() for i in indices), strict=True))
    for clip, small in zip(original, packed, strict=True):
        with open_clip(clip) as reader, open_clip(small) as smaller:
            frames, own = reader.read([0, 20, 43]), smaller.read([0, 20, 43])
        assert own.shape == (3, 48, 85, 3)
        for a, b in zip(frames, own, strict=True):
            exact = np.asarray(Image.fromarray(a.numpy()).resize((85, 48), Image.Resampling.BICUBIC), dtype=float)
            assert np.abs(exact - b.numpy()).mean() < 6  # what JPEG loses of 4 grey levels of noise
    sizes = [sum(p.stat().st_size for p in Path(root).rglob("*.zip")) for root in (tmp_path / "out", dota_root)]
    assert sizes[0] < sizes[1]


def test_the_manifest_tells_where_each_clip_came_from(copy, tmp_path):
    pack("DoTA", str(copy), tmp_path / "out", splits=["val"], settings=SMALL)
    lines = [json.loads(line) for line in (tmp_path / "out" / "clips.jsonl").read_text().splitlines()]
    source = copy / "frames" / "syntheticva_000000" / "images.zip"
    assert [line["clip"]["name"] for line in lines] == [f"syntheticva_{i:06d}" for i in range(5)]
    status = source.stat()
    assert lines[0]["original"] == {"path": str(source), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    assert lines[0]["settings"] == {"short_side": 48, "fps": 10, "quality": 92, "squash": 0}
    held = (tmp_path / "out" / lines[0]["file"]).read_bytes()
    assert (lines[0]["sha256"], lines[0]["bytes"]) == (hashlib.sha256(held).hexdigest(), len(held))
    with pytest.raises(DataError, match="split 'train' of DoTA is not packed, only val; .* --split train adds it"):
        build_clips("DoTA", str(tmp_path / "out"), "train")
    pack("DoTA", str(copy), tmp_path / "out", splits=["train"], settings=SMALL)
    assert len(build_clips("DoTA", str(tmp_path / "out"), "all")) == 13


def test_at_a_lower_rate_every_third_frame_is_there_under_its_number(dada, tmp_path):
    out = tmp_path / "out"
    pack("DADA2K", str(dada), out, settings=Settings(30, 10, 100), workers=2)
    for split, total in (("train", 61), ("val", 60)):
        (clip,), (packed,) = (build_clips("DADA2K", str(root), split) for root in (dada, out))
        assert fields(packed) == fields(clip) and (packed.pack_step, packed.filename(0)) == (3, "0001.png")
        kept = packed.stored_frames
        assert kept[-1] == total - 1 and set(np.diff(kept)) == {3} and kept[0] < 3
        with zipfile.ZipFile(f"{packed.source}.zip") as z:
            assert z.namelist() == [f"{number + 1:06d}.jpg" for number in kept]
        original, own = (
            index_clips(build_clips("DADA2K", str(root), split), **WINDOW, stride=3) for root in (dada, out)
        )
        assert len(own) == len(original) == (total - 46) // 3 + 1
        assert all(np.array_equal(own[i][1], original[i][1]) for i in range(len(own)))
        with open_clip(packed) as reader:
            grey = reader.read(own[0][1])[:, 15, 20, 0].numpy()
        assert np.abs(grey - 3.0 * (own[0][1] + 1)).max() <= 2  # frame i has the number i + 1
        assert packed.picture(45) == "000046.jpg" and packed.filename(45) == "0046.png"


def test_windows_that_a_pack_cannot_serve_are_refused_with_the_way_out(dada, tmp_path):
    out = str(tmp_path / "out")
    pack("DADA2K", str(dada), out, settings=Settings(30, 10, 92))
    table = build_clips("DADA2K", out, "train")
    with pytest.raises(DataError, match="holds 1 frame in 3, .* windows of 3 .*--sampling_rate_val.* --fps 0"):
        index_clips(table, **WINDOW, stride=1)
    with pytest.raises(DataError, match="use a step between windows of 15 "):
        index_clips(table, **WINDOW, stride=16)
    with pytest.raises(DataError, match="windows at 15 fps need frames .* 1 in 3 of the source's 30 .* --fps 15"):
        index_clips(table, num_frames=8, view_fps=15, stride=3)
    assert len(index_clips(table, num_frames=8, view_fps=5, stride=3)) == (61 - 43) // 3 + 1
    slow = replace(table[0], name="slow", fps=10.0, pack_step=1)  # a mix of rates: each clip keeps its own
    mixed = ClipTable("DADA2K", "train", [slow, table[0]])
    assert index_clips(mixed, **WINDOW, stride=3).counts.tolist() == [(61 - 16) // 3 + 1, (61 - 46) // 3 + 1]
    with pytest.raises(DataError, match="clips are drawn from all frames of a video; pack it with --fps 0"):
        index_clips(replace(table, one_clip_per_video=True), **WINDOW, stride=4)


@pytest.mark.parametrize(
    ("fps", "target", "step"),
    [(30, 10, 3), (29.97, 10, 3), (59.94, 10, 6), (25, 5, 5), (30, 0, 1), (10, 10, 1), (25, 10, 1), (8, 10, 1)],
)
def test_rates_that_are_no_multiple_keep_every_frame(fps, target, step):
    settings = Settings(0, target, 92)
    assert settings.step(fps) == step
    clip = Clip("a", "a", 300, fps, pack_step=step)
    if target:  # the frames of a window at the pack's rate are there, on every window that can end there
        index = WindowIndex([300], src_fps=fps, num_frames=16, view_fps=target, stride=step)
        assert set(index.needed_frames(0)) <= set(clip.stored_frames)


def test_readers_of_training_and_evaluation_take_a_pack(dada, tmp_path):
    pack("DADA2K", str(dada), tmp_path / "out", settings=Settings(30, 10, 92))
    clips = build_clips("DADA2K", str(tmp_path / "out"), "train")
    index = index_clips(clips, **WINDOW, stride=3)
    stream = ClipStream(clips, index, EvalTransform(32), chunk_frames=7)
    ids = np.concatenate([chunk.frame_ids for chunk in stream])
    assert ids.tolist() == clips[0].stored_frames.tolist()

    dataset = WindowDataset([Source(clips, index, AsRead(30, 40))], seed=0, targets=True)
    keys = [key for batch in EpochSampler([len(index)], batch_sizes=[1]) for key in batch]
    for key in keys:
        sample = window_of(dataset, key)
        last = index[key[3]][1][-1]
        assert abs(int(sample["video"][0, -1, 15, 20, 0]) - 3 * (last + 1)) <= 3
        assert int(sample["label"]) == int(30 <= last + 1 <= 50)
        assert float(sample["ttc"]) == pytest.approx(clips[0].ttc[last])


def test_folders_and_videos_are_packed_too(dota_root, tmp_path):
    render_dota(tmp_path / "folders", train=8, val=5, seed=1, size=(96, 54), packed=False)
    for name, root in (("zips", dota_root), ("folders2", tmp_path / "folders")):
        pack("DoTA", str(root), tmp_path / name, settings=SMALL, workers=2)
    zips, folders = (tree(tmp_path / name / "frames") for name in ("zips", "folders2"))
    assert zips == folders and len(zips) == 13  # the same pictures, the same bytes

    write_video(tmp_path / "v" / "a.mp4", frames=47, fps=30, size=(96, 64))
    write_video(tmp_path / "v" / "deep" / "b.mov", frames=20, fps=25, size=(96, 64))
    pack("videos", str(tmp_path / "v"), tmp_path / "pv", settings=Settings(32, 10, 95), workers=2)
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    a, b = build_clips("videos", str(tmp_path / "pv"), "all", scan)
    assert not (tmp_path / "scan.json").exists()  # nothing to count
    assert (a.name, a.num_frames, a.fps, a.pack_step) == ("a.mp4", 47, 30.0, 3)
    assert (b.name, b.num_frames, b.fps, b.pack_step) == ("deep/b.mov", 20, 25.0, 1)
    with open_clip(a) as small, open_clip(build_clips("videos", str(tmp_path / "v"), "all", scan)[0]) as full:
        ids = a.stored_frames
        own, original = small.read(ids), full.read(ids)
    assert own.shape == (16, 32, 48, 3)
    grey = [pictures.float().flatten(1).median(dim=1).values for pictures in (own, original)]
    assert (grey[0] - grey[1]).abs().max() < 2 and grey[0].diff().min() > 10  # frame i is brighter than frame i - 1
    with pytest.raises(DataError, match="all frames of a video; give --fps 0"):
        (tmp_path / "k" / "annotations").mkdir(parents=True)
        (tmp_path / "k" / "annotations" / "train.csv").write_text(
            "label,youtube_id,time_start,time_end,split\nx,abc,0,1,train\n"
        )
        write_video(tmp_path / "k" / "train" / "x" / "abc_000000_000001.mp4", frames=9, fps=30)
        pack("Kinetics", str(tmp_path / "k"), tmp_path / "pk", settings=SMALL)


def test_unreadable_clips_are_named_and_can_be_left_out(copy, tmp_path):
    names = ["synthetictr_000002", "syntheticva_000001", "syntheticva_000003"]
    (copy / "frames" / names[0] / "images.zip").write_bytes(b"<!DOCTYPE html><html>quota exceeded</html>")
    (copy / "frames" / names[1] / "images.zip").unlink()
    (copy / "dataset" / "annotations" / f"{names[2]}.json").unlink()
    out, command = tmp_path / "out", ["-m", "datasets.tools.pack", "DoTA", str(copy), str(tmp_path / "out")]
    done = run(*command, "--short_side", "48")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "3 clips cannot be packed" in done.stderr
        and "; 10 are. Repair" in done.stderr
        and "it is a web page" in done.stderr
    )
    assert sorted(line.split("\t")[0] for line in (out / "bad_clips.txt").read_text().splitlines()) == names
    with pytest.raises(
        DataError, match="packing is not finished; the same python -m datasets.tools.pack command again"
    ):
        build_clips("DoTA", str(out), "val")
    (tmp_path / "more.txt").write_text("absent\n")
    done = run(*command, "--short_side", "48", "--bad_clips", str(out / "bad_clips.txt"), str(tmp_path / "more.txt"))
    assert done.returncode == 0 and "10 clips, 10 of them packed already" in done.stdout, done.stderr
    assert "--bad_clips: 1 names are of no clip of DoTA train, DoTA val: absent\n" in done.stdout
    assert not (out / "bad_clips.txt").exists()
    table = build_clips("DoTA", str(out), "val")
    assert (len(table), table.listed, table.left_out) == (3, 5, names[1:])
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "broken.mov").write_bytes(b"no video")
    write_video(tmp_path / "v" / "whole.mov", frames=9, fps=30)
    with pytest.raises(DataError, match="1 clips cannot be packed: .*; 1 are. Repair them"):
        pack("videos", str(tmp_path / "v"), tmp_path / "pv", settings=SMALL)
    assert (tmp_path / "pv" / "bad_clips.txt").read_text().startswith("broken.mov\t")


def test_a_later_run_does_what_is_new_alone(copy, tmp_path):
    out = tmp_path / "out"
    pack("DoTA", str(copy), out, settings=SMALL)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}
    changed = copy / "frames" / "syntheticva_000000" / "images.zip"
    os.utime(changed, ns=(1, 1))
    annotation = copy / "dataset" / "annotations" / "synthetictr_000001.json"
    content = json.loads(annotation.read_text())
    for row in content["labels"]:
        row["accident_id"] = 0
    annotation.write_text(json.dumps(content))
    pack("DoTA", str(copy), out, settings=SMALL)
    assert [p.stem for p, t in times.items() if p.stat().st_mtime_ns != t] == ["syntheticva_000000"]
    assert not build_clips("DoTA", str(out), "train")[1].labels.any()
    with pytest.raises(
        DataError, match="a pack of DoTA; python -m datasets.tools.pack DoTA_half ROOT .* adds DoTA_half"
    ):
        build_clips("DoTA_half", str(out), "train")
    pack("DoTA_half", str(copy), out, settings=SMALL)
    assert [len(build_clips(name, str(out), "train")) for name in ("DoTA", "DoTA_half")] == [8, 4]


def test_what_does_not_fit_is_refused(copy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack("DoTA", str(copy), out, splits=["val"], settings=SMALL)
    with pytest.raises(DataError, match="out: a pack with --short_side 48 --fps 10 --quality 92 --squash 0; choose"):
        pack("DoTA", str(copy), out, splits=["val"], settings=replace(SMALL, fps=5))
    with pytest.raises(DataError, match="a pack already; pack the original again"):
        pack("DoTA", str(out), tmp_path / "again", settings=SMALL)
    with pytest.raises(DataError, match="neither empty nor a pack"):
        pack("DoTA", str(copy), copy, settings=SMALL)
    assert not (copy / "clips.jsonl").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="are needed, 1e-06 GB are free"):
        pack("DoTA", str(copy), tmp_path / "full", settings=SMALL)
    done = run("-m", "datasets.tools.pack", "DoTA", str(copy), str(tmp_path / "x"), "--fps", "-1")
    assert done.returncode == 2 and "--fps: '-1' is not a number from 0 to 1000" in done.stderr


def test_a_pack_is_of_one_root_and_a_name_in_it_of_one_clip(copy, dota_root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack("DoTA", str(copy), out, splits=["val"], settings=SMALL)
    before = tree(out)
    with pytest.raises(DataError, match=f"out: a pack of DoTA of {copy}; pack that of {dota_root} into another folder"):
        pack("DoTA", str(dota_root), out, splits=["train"], settings=SMALL)
    with pytest.raises(DataError, match=f"holds syntheticva_000000 of DoTA, {copy}.*; pack DoTA_half into another"):
        pack("DoTA_half", str(dota_root), out, splits=["val"], settings=SMALL)
    pack("DoTA_half", str(dota_root), out, splits=["train"], settings=SMALL)  # other names
    now = tree(out)
    assert all(now[path] == data for path, data in before.items() if path.startswith("frames/"))
    assert [c.source for c in build_clips("DoTA", str(out), "val")][0] == str(out / "frames" / "syntheticva_000000")
    monkeypatch.chdir(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}
    pack("DoTA", copy.name, "out", splits=["val"], settings=SMALL)  # the same root, typed in another way
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}


def test_all_of_a_pack_is_every_split(copy, tmp_path):
    out = tmp_path / "out"
    pack("DoTA", str(copy), out, splits=["val"], settings=SMALL)
    with pytest.raises(DataError, match="split 'all' of DoTA is not packed, only val; .* --split train adds train"):
        build_clips("DoTA", str(out), "all")
    pack("DoTA", str(copy), tmp_path / "every", splits=["all"], settings=SMALL)
    assert len(build_clips("DoTA", str(tmp_path / "every"), "all")) == 13


@pytest.mark.parametrize("fps", [10, 0])
def test_a_source_that_ends_early_is_packed_as_it_is_read(dada, tmp_path, fps, caplog):
    """The zip of a clip of 61 frames lacks its last four: what can be read of it is the same in the pack."""
    rewrite_zip(dada / "frames" / "1" / "001" / "images.zip", drop=[f"{number:04d}.png" for number in range(58, 62)])
    out = tmp_path / "out"
    pack("DADA2K", str(dada), out, settings=Settings(30, fps, 92))
    kept = 19 if fps else 57
    assert f"1/001: its source ends after {kept} of the {21 if fps else 61} frames to pack" in caplog.text
    seen = []
    for root in (dada, out):
        clips = build_clips("DADA2K", str(root), "train")
        index = index_clips(clips, **WINDOW, stride=3)
        *batches, fault = SplitWindows(clips, index, EvalTransform(32), batch_size=4).batches(lambda frames: frames)
        assert "ends after" in fault.reason and fault.number == 0 < fault.frames < 61
        seen.append((fields(clips[0]), [n for batch in batches for n in batch.last.tolist() if n < fault.frames]))
        dataset = WindowDataset([Source(clips, index, FinetuneTransform(32))], seed=0, targets=True)
        samples = [window_of(dataset, (0, 0, i, i)) for i in range(len(index))]
        seen[-1] += ([s.get("label") if isinstance(s, dict) else "skipped" for s in samples],)
    assert seen[0] == seen[1] and len(seen[0][1]) == len(index) - 2 and seen[0][2][-1] == "skipped"
    (finding,) = [f for f in check("DADA2K", str(out))[0] if f.is_error]
    assert finding.kind == "missing_frames" and "before them are trained on and evaluated" in finding.message


def test_the_same_command_mends_a_damaged_manifest_or_index(copy, tmp_path, caplog):
    out = tmp_path / "out"
    pack("DoTA", str(copy), out, settings=SMALL)
    held = tree(out)
    manifest = held["clips.jsonl"].splitlines(keepends=True)
    for line in (manifest[2].replace(b'"num_frames": ', b'"num_frames": 1'), b"\xff\n", b"[]\n", b"[" * 9999 + b"\n"):
        (out / "clips.jsonl").write_bytes(b"".join([*manifest[:2], line, *manifest[3:]]))
        with pytest.raises(DataError, match=r"clips.jsonl: line 3 is damaged \(.*; run python -m datasets.tools.pack"):
            build_clips("DoTA", str(out), "train")
        pack("DoTA", str(copy), out, settings=SMALL)
        assert tree(out) == held and "line 3 is damaged" in caplog.text
    other = held["pack.json"].replace(b"synthetictr_000001", b"synthetictr_000002")
    for content in (other, b"\xff", b"[]", b"", b"[" * 9999):
        (out / "pack.json").write_bytes(content)
        reason = r"pack.json: damaged \(.*; remove it and run python -m datasets.tools.pack again"
        with pytest.raises(DataError, match=reason):
            build_clips("DoTA", str(out), "train")
        with pytest.raises(DataError, match=reason):
            pack("DoTA", str(copy), out, settings=SMALL)
    (out / "pack.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.zip")}
    pack("DoTA", str(copy), out, settings=SMALL)
    assert tree(out) == held and times == {path: path.stat().st_mtime_ns for path in times}


def test_packs_keep_their_frame_rates(dada, tmp_path):
    pack("DADA2K", str(dada), tmp_path / "out", settings=Settings(30, 10, 92), assume_fps=25)
    assert build_clips("DADA2K", str(tmp_path / "out"), "train")[0].fps == 25
    with pytest.raises(DataError, match="out: the pack keeps its frame rates; leave out --assume_fps"):
        build_clips("DADA2K", str(tmp_path / "out"), "train", assume_fps=30)


def test_names_stay_below_the_root():
    assert file_of("1/001") == "frames/1/001.zip"
    assert file_of("train/a b.mov") == "frames/train/a b.mov.zip"
    for name in ("../../etc/x", "/data/../x", "a/../../b", "./x", "..", "Überfahrt/中..文"):
        path = Path(os.path.normpath(Path("/root", file_of(name))))
        assert path.is_relative_to("/root/frames") and path == Path("/root", file_of(name)), name


@pytest.fixture
def start(tmp_path):
    """start(out): a process that packs, with everything imported, so that kills fall on the work."""
    root = tmp_path / "data"
    render_dota(root, train=24, val=8, seed=3, size=(160, 90))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets.tools.pack"])
    how = {"settings": SMALL, "workers": 2}

    def start(out):
        process = context.Process(target=pack, args=("DoTA", str(root), str(out)), kwargs=how)
        process.start()
        return process

    start(tmp_path / "first").join()
    return start


def test_one_process_at_a_time(tmp_path, start):
    process = start(tmp_path / "out")
    while not list(tmp_path.glob("out/frames/*.zip")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="out: another process is packing into it"):
        pack("DoTA", str(tmp_path / "data"), tmp_path / "out", settings=SMALL)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0 and tree(tmp_path / "out") == tree(tmp_path / "first")


def test_twenty_kills_change_nothing(tmp_path, start):
    """SIGKILL at random moments: no zip is ever incomplete, and in the end every byte is as without the kills."""
    started = time.monotonic()
    start(tmp_path / "whole").join()
    seconds, whole = time.monotonic() - started, tree(tmp_path / "whole")
    assert len(whole) == 32 + 3 and whole == tree(tmp_path / "first")
    rng, out = random.Random(0), tmp_path / "out"
    kills, half_written, partial = 0, 0, 0
    while kills < 20:
        process = start(out)
        process.join(rng.uniform(0.1, 0.6) * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        held = tree(out) if out.exists() else {}
        zips = [name for name in held if name.endswith(".zip")]
        half_written += any(name.endswith(".tmp") for name in held)
        partial += 0 < len(zips) < 32
        assert all(held[name] == whole[name] for name in zips), f"after kill {kills}"
        if "pack.json" in held:  # finished before it could be killed, or before it could exit: once more
            assert held == whole
            shutil.rmtree(out)
    assert half_written and partial > 5, (half_written, partial)
    start(out).join()
    assert tree(out) == whole


@pytest.mark.slow
def test_dapt_runs_on_a_pack_with_a_step_of_its_frames(tmp_path):
    for name in "abc":
        write_video(tmp_path / "v" / f"{name}.mp4", frames=70, fps=30, size=(96, 64))
    pack("videos", str(tmp_path / "v"), tmp_path / "packed", settings=Settings(64, 10, 92), workers=2)
    (tmp_path / "bad.txt").write_text("b.mp4\tunreadable: for a trial\nB.mp4\n")
    common = ["run_dapt.py", "--model", "pretrain_videomae_tiny_patch16_64", "--data_set", "videos", "--data_path"]
    common += [tmp_path / "packed", "--output_dir", tmp_path / "run", "--device", "cpu", "--num_workers", "1"]
    common += ["--epochs", "1", "--nb_samples_per_epoch", "8", "--total_batch_size", "4", "--warmup_epochs", "0"]
    done = run(*common, "--bad_clips", tmp_path / "bad.txt")
    assert done.returncode == 1 and "use a step between windows of 15" in done.stderr, done.stderr
    done = run(*common, "--bad_clips", tmp_path / "bad.txt", "--sampling_rate", "3", "--max_bad_samples", "0")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 clips are left out: b.mp4" in done.stdout
    assert "--bad_clips: 1 names are of no clip of videos all: B.mp4" in done.stdout
    assert f"2 clips, 140 frames, {2 * ((70 - 19) // 3 + 1)} windows" in done.stdout  # 4 frames at 5 fps
    assert (tmp_path / "run" / "pictures" / "epoch-000.png").exists()


@pytest.mark.slow
def test_predictions_from_a_pack_stand_beside_those_of_the_original(dota_root, tmp_path):
    pack("DoTA", str(dota_root), tmp_path / "packed", settings=Settings(0, 10, 95), workers=2)
    rows = {}
    for name, root in (("original", dota_root), ("packed", tmp_path / "packed")):
        done = run(
            "run_finetune.py", "--eval", "--model", "vit_tiny_patch16_64", "--data_path", root, "--num_workers", "1",
            "--device", "cpu", "--output_dir", tmp_path / name, "--init_scale", "1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with (tmp_path / name / "predictions.csv").open() as f:
            rows[name] = list(csv.DictReader(f))
    for a, b in zip(rows["original"], rows["packed"], strict=True):
        assert [a[k] for k in ("clip", "filename", "frame", "label", "ttc")] == [
            b[k] for k in ("clip", "filename", "frame", "label", "ttc")
        ]
    scores = np.array([[float(row["score"]) for row in rows[name]] for name in rows])
    assert scores.std(axis=1).min() > 10 * np.abs(scores[0] - scores[1]).mean() > 0
