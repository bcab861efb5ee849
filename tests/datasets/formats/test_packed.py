"""Packs of older versions: those of videos are refused, those of pictures stay as they are."""

import json
import shutil

import pytest
from helpers import write_video
from PIL import Image

from datasets import DataError, VideoScan, build_clips, open_clip
from datasets.tools.check import check
from datasets.tools.pack import Settings, pack

SMALL = Settings(short_side=32, fps=10, quality=92)
REASON = "made before frames were counted by timestamp; .*: pack the original again into another folder"


def make_old(out):
    """Write pack.json and clips.jsonl of a pack as version 1 did, which had no word of versions."""
    lines = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("version") == 2 and line.pop("crc32") and line.pop("ignored") == []
        assert line["clip"].pop("aspect") is None and line["settings"].pop("squash") == 0
        assert list(line) == ["clip", "anomalous", "original", "settings", "file", "bytes", "sha256", "frames"]
    (out / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = json.loads((out / "pack.json").read_text())
    assert index["settings"].pop("squash") == 0
    assert index.pop("version") == 2 and index.pop("crc32") and list(index) == ["settings", "tables"]
    (out / "pack.json").write_text(json.dumps(index) + "\n")


def versions(out):
    return {entry["clip"]["name"]: entry.get("version") for entry in map(json.loads, (out / "clips.jsonl").open())}


@pytest.fixture
def mixed(tmp_path):
    """A csv of a video, a folder of pictures and a zip of them."""
    root = tmp_path / "mixed"
    write_video(root / "a.mp4", frames=40, fps=30, size=(96, 64))
    (root / "b").mkdir()
    for i in range(20):
        Image.new("RGB", (96, 64), (i,) * 3).save(root / "b" / f"{i:03d}.png")
    shutil.make_archive(str(root / "c"), "zip", root / "b")
    (root / "train.csv").write_text("path,fps\na.mp4,\nb,10\nc.zip,10\n")
    return root


def test_an_old_pack_of_videos_is_refused_wherever_it_is_met(tmp_path):
    root, out = tmp_path / "v", tmp_path / "out"
    for name in ("a.mp4", "deep/b.mov"):
        write_video(root / name, frames=40, fps=30, size=(96, 64))
    pack("videos", str(root), out, settings=SMALL)
    assert len(build_clips("videos", str(out), "all")) == 2 and set(versions(out).values()) == {2}
    make_old(out)
    held = (out / "clips.jsonl").read_bytes()

    def is_refused():
        with pytest.raises(DataError, match=rf"out: a pack {REASON}") as caught:
            build_clips("videos", str(out), "all")
        assert "the pictures of 2 videos in it may stand under wrong numbers (a.mp4, deep/b.mov)" in str(caught.value)
        with pytest.raises(DataError, match=REASON):
            check("videos", str(out), workers=1)

    is_refused()
    with pytest.raises(DataError, match=REASON):
        pack("videos", str(root), out, settings=SMALL)
    (out / "pack.json").rename(tmp_path / "pack.json")  # as if it had been stopped
    with pytest.raises(DataError, match=REASON):
        pack("videos", str(root), out, settings=SMALL)
    (tmp_path / "pack.json").rename(out / "pack.json")
    shutil.rmtree(root)  # the pack has been taken to another machine
    is_refused()
    assert (out / "clips.jsonl").read_bytes() == held


@pytest.mark.parametrize("gone", [False, True])
def test_of_an_old_pack_the_clips_of_pictures_can_be_used(mixed, tmp_path, gone):
    out, scan = tmp_path / "out", VideoScan(tmp_path / "scan.json", workers=1)
    pack("csv", str(mixed), out, splits=["train"], settings=SMALL)
    make_old(out)
    if gone:
        shutil.rmtree(mixed)
    with pytest.raises(DataError, match=rf"the pictures of 1 videos in it may stand .* \(a.mp4\).*{REASON[-20:]}"):
        build_clips("csv", str(out), "train", scan)
    clips = build_clips("csv", str(out), "train", scan, leave_out={"a.mp4"})
    assert [c.name for c in clips] == ["b", "c.zip"]
    for clip in clips:
        with open_clip(clip) as reader:
            assert abs(int(reader.read([19])[0, 0, 0, 0]) - 19) <= 1


def test_an_old_pack_of_pictures_is_gone_on_with(dota_root, tmp_path):
    out = tmp_path / "out"
    pack("DoTA", str(dota_root), out, splits=["val"], settings=SMALL)
    make_old(out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}
    assert len(build_clips("DoTA", str(out), "val")) == len(before)
    assert check("DoTA", str(out), splits=["val"], deep=True, workers=2)[0] == []
    pack("DoTA", str(dota_root), out, settings=SMALL)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # none is packed again
    assert {name[9:11]: version for name, version in versions(out).items()} == {"tr": 2, "va": 1}
    assert len(build_clips("DoTA", str(out), "all")) == len(versions(out)) > len(before)
