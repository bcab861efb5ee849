"""Packs whose frames are squashed to a width: sizes, pixels, the aspect that clips remember, what stays as it is."""

import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import run, write_video
from PIL import Image

from datasets import DataError, build_clips, open_clip
from datasets.augment.frames import resize
from datasets.formats.packed import read_manifest
from datasets.tools.check import check
from datasets.tools.pack import Settings, pack

SQUASHED = Settings(short_side=48, fps=10, quality=92, squash=32)
SIZES = {  # {clip: (width, height) as filmed, in the pack}
    "wide": ((160, 90), (32, 48)),
    "wider": ((144, 48), (32, 48)),
    "square": ((64, 64), (32, 48)),
    "portrait": ((90, 160), (48, 85)),
    "small": ((30, 20), (30, 20)),
}
ASPECTS = [160 / 90, 3.0, 1.0, None, None]  # of the packed clips


def picture(seed, size):
    """A picture with slopes and edges, but no noise that a JPEG would lose."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(256, size=(4, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BILINEAR)


@pytest.fixture
def mixed(tmp_path):
    """A csv of clips of several sizes, of 4 PNGs each."""
    root = tmp_path / "mixed"
    for clip, (size, _) in SIZES.items():
        (root / clip).mkdir(parents=True)
        for i in range(4):
            picture(i, size).save(root / clip / f"{i:03d}.png")
    (root / "train.csv").write_text("path,fps\n" + "".join(f"{clip},10\n" for clip in SIZES))
    return root


def squashed(image, size):
    """A picture's width squashed as OpenCV does it, its height shrunk as Pillow does it."""
    image = Image.fromarray(cv2.resize(np.asarray(image), (size[0], image.height), interpolation=cv2.INTER_CUBIC))
    return image.resize(size, Image.Resampling.BICUBIC)


def images(clip):
    """The JPEGs of a packed clip."""
    with zipfile.ZipFile(f"{clip.source}.zip") as z:
        return [Image.open(io.BytesIO(z.read(name))) for name in z.namelist()]


def packed(root, out, settings, **options):
    pack("csv", str(root), out, splits=["train"], settings=settings, **options)
    return build_clips("csv", str(out), "train")


def test_every_clip_is_squashed_by_its_own_size_in_one_resampling(mixed, tmp_path):
    clips = packed(mixed, tmp_path / "out", SQUASHED, workers=2)
    assert [c.name for c in clips] == list(SIZES) and [c.aspect for c in clips] == ASPECTS
    for clip in clips:
        filmed, size = SIZES[clip.name]
        with open_clip(clip) as reader:
            frames = reader.read(range(4)).numpy().astype(float)
        assert frames.shape == (4, size[1], size[0], 3)
        for i, frame in enumerate(frames):
            exact = squashed(picture(i, filmed), size) if clip.aspect else picture(i, filmed).resize(size)
            data = io.BytesIO()
            exact.save(data, "JPEG", quality=92)
            assert np.array_equal(frame, np.asarray(Image.open(data)))
            assert np.abs(frame - np.asarray(exact)).mean() < 6  # of saturated colours JPEG keeps half
    assert check("csv", str(tmp_path / "out"), splits=["train"], deep=True, workers=1)[0] == [
        f for f in check("csv", str(mixed), splits=["train"], workers=1)[0] if f.kind == "short"
    ]


def test_a_width_of_the_short_side_makes_squares_and_a_rate_of_none_squashes_videos(tmp_path):
    write_video(tmp_path / "v" / "a.mp4", frames=40, fps=30, size=(96, 64))
    pack("videos", str(tmp_path / "v"), tmp_path / "out", settings=replace(SQUASHED, short_side=0, squash=64))
    (clip,) = build_clips("videos", str(tmp_path / "out"), "all")
    assert (clip.aspect, clip.pack_step, {image.size for image in images(clip)}) == (1.5, 3, {(64, 64)})


def test_evaluation_squashes_to_what_it_would_of_the_original(dota_root, tmp_path):
    """At the width of the input the picture is nearer to the original's than an unsquashed pack's, in fewer bytes."""

    def inputs(clips):
        for clip in clips:
            with open_clip(clip) as reader:
                yield from (resize(frame.numpy(), 32, 32).astype(float) for frame in reader.frames([0, 20, 40]))

    originals = list(inputs(build_clips("DoTA", str(dota_root), "val")))
    differences, sizes = [], []
    for squash in (0, 32):
        out = tmp_path / str(squash)
        pack("DoTA", str(dota_root), out, splits=["val"], settings=replace(SQUASHED, squash=squash, quality=100))
        pairs = zip(originals, inputs(build_clips("DoTA", str(out), "val")), strict=True)
        differences.append(np.mean([np.abs(a - b).mean() for a, b in pairs]))
        sizes.append(sum(entry.bytes for entry in read_manifest(out)))
    assert 0 < differences[1] < differences[0] and sizes[1] < 0.6 * sizes[0]


def test_padding_knows_the_width_an_unsquashed_pack_would_have_had(mixed, tmp_path):
    plain = packed(mixed, tmp_path / "plain", replace(SQUASHED, squash=0))
    for clip, other in zip(packed(mixed, tmp_path / "out", SQUASHED), plain, strict=True):
        (width, height), (own, same) = (images(c)[0].size for c in (other, clip))
        assert (round(height * clip.aspect) if clip.aspect else own, height) == (width, same)
        assert other.aspect is None


def test_pictures_of_two_shapes_cannot_be_squashed_and_are_packed_without(mixed, tmp_path):
    picture(0, (160, 120)).save(mixed / "wide" / "002.png")
    picture(0, (320, 180)).save(mixed / "wider" / "003.png")
    picture(0, (28, 20)).save(mixed / "small" / "003.png")  # not squashed, so as before
    with pytest.raises(DataError, match="2 clips cannot .*wide: frames of 64 x 48 and 85 x 48 once shrunk; "):
        packed(mixed, tmp_path / "out", SQUASHED)
    assert (tmp_path / "out" / "bad_clips.txt").read_text().startswith("wide\t")
    for image in packed(mixed, tmp_path / "plain", replace(SQUASHED, squash=0)):
        assert image.aspect is None


def test_another_width_is_another_pack(mixed, tmp_path):
    """Zips of one width never stand beside those of another: the pack is refused, finished or not."""
    out = tmp_path / "out"
    before = [len(images(clip)) for clip in packed(mixed, out, SQUASHED)]
    other = replace(SQUASHED, squash=40)
    held = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for _ in range(2):
        with pytest.raises(DataError, match="a pack with --short_side 48 --fps 10 --quality 92 --squash 32; choose an"):
            packed(mixed, out, other)
        assert held == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} | {
            p: data for p, data in held.items() if p.name == "pack.json"
        }
        (out / "pack.json").unlink(missing_ok=True)  # as if it had been stopped
    assert [len(images(clip)) for clip in packed(mixed, out, SQUASHED)] == before  # goes on
    shutil.rmtree(out)
    assert images(packed(mixed, out, other)[0])[0].size == (40, 48)


def test_a_later_run_keeps_the_aspect_of_what_it_does_not_pack_again(mixed, tmp_path):
    out = tmp_path / "out"
    packed(mixed, out, SQUASHED)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}
    shutil.copy(mixed / "train.csv", mixed / "val.csv")
    pack("csv", str(mixed), out, settings=SQUASHED)
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}
    assert [c.aspect for c in build_clips("csv", str(out), "val")] == ASPECTS


def test_a_pack_from_before_the_squash_is_read_and_gone_on_with(mixed, tmp_path):
    out = tmp_path / "out"
    plain = replace(SQUASHED, squash=0)
    packed(mixed, out, plain)
    lines = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    for line in lines:
        del line["clip"]["aspect"], line["settings"]["squash"], line["crc32"]
    (out / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = json.loads((out / "pack.json").read_text())
    del index["settings"]["squash"], index["crc32"]
    (out / "pack.json").write_text(json.dumps(index) + "\n")
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}
    assert [c.aspect for c in build_clips("csv", str(out), "train")] == [None] * len(SIZES)
    assert [f.kind for f in check("csv", str(out), splits=["train"], deep=True, workers=1)[0]] == ["short"] * len(SIZES)
    with pytest.raises(DataError, match="a pack with .* --squash 0; choose another folder"):
        packed(mixed, out, SQUASHED)
    packed(mixed, out, plain)
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*.zip")}


def test_pictures_of_another_size_in_a_squashed_pack_are_found(mixed, tmp_path):
    out = tmp_path / "out"
    packed(mixed, out, SQUASHED)
    path = Path(out, "frames", "wide.zip")
    with zipfile.ZipFile(path) as z:
        content = {name: z.read(name) for name in z.namelist()}
    data = io.BytesIO()
    picture(2, (85, 48)).save(data, "JPEG")
    with zipfile.ZipFile(path, "w") as z:
        for name, old in content.items():
            z.writestr(name, data.getvalue() if name == "000002.jpg" else old)
    kinds = [f.kind for f in check("csv", str(out), splits=["train"], workers=1)[0] if f.clip == "wide"]
    assert sorted(kinds) == ["changed", "short", "sizes"]


def test_the_command_says_what_it_made(mixed, tmp_path):
    command = ["-m", "datasets.tools.pack", "csv", mixed, tmp_path / "out", "--split", "train", "--short_side", "48"]
    done = run(*command, "--squash", "32", "--quality", "80")
    assert done.returncode == 0, done.stderr
    assert "kB a frame; --short_side 48 --fps 10 --quality 80 --squash 32" in done.stdout
    assert "3 of 5 clips are squashed, the others narrower or higher than wide" in done.stdout
    settings = {"short_side": 48, "fps": 10, "quality": 80, "squash": 32}
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["settings"] == settings
    assert {json.dumps(entry.settings) for entry in read_manifest(tmp_path / "out")} == {json.dumps(settings)}
    assert run(*command, "--squash", "-1").returncode == 2
