import io
import shutil
import sys
import zipfile
import zlib

import av
import numpy as np
import pytest
import torch
from helpers import SHARED
from PIL import Image

from datasets.clips import Clip, DataError
from datasets.readers import FolderReader, VideoReader, ZipReader, open_clip
from datasets.scan import VideoScan
from datasets.tools.synthetic import write_video


def picture(i, size=(32, 18)):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)


def encoded(i, kind="JPEG", **kwargs):
    buffer = io.BytesIO()
    picture(i, **kwargs).save(buffer, kind)
    return buffer.getvalue()


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in files.items():
            z.writestr(name, data)


def clip(source, n=4, **kwargs):
    return Clip("clip", str(source), n, 10.0, **kwargs)


def decoded(i):
    return np.asarray(Image.open(io.BytesIO(encoded(i))).convert("RGB"))


@pytest.fixture
def packed(tmp_path):
    write_zip(tmp_path / "images.zip", {f"{i:06d}.jpg": encoded(i) for i in range(4)})
    return clip(tmp_path / "images")


def test_zip_and_folder_give_the_same_pixels_as_pil(packed, tmp_path):
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip") as z:
        z.extractall(tmp_path / "folder")
    with open_clip(packed) as zipped, open_clip(clip(tmp_path / "folder")) as folder:
        assert isinstance(zipped, ZipReader) and isinstance(folder, FolderReader)
        frames = zipped.read([2, 0, 0, 3])
        assert frames.shape == (4, 18, 32, 3) and frames.dtype == torch.uint8
        assert torch.equal(frames, folder.read([2, 0, 0, 3]))
    np.testing.assert_array_equal(frames.numpy(), np.stack([decoded(i) for i in (2, 0, 0, 3)]))


def test_numbered_from_one_and_png(tmp_path):
    pictures = {f"{i + 1:04d}.png": encoded(i, "PNG") for i in range(3)}
    write_zip(tmp_path / "images.zip", pictures)
    with open_clip(clip(tmp_path / "images", frame_name="{:04d}.png", first_frame=1)) as reader:
        np.testing.assert_array_equal(reader.read([2])[0].numpy(), np.asarray(picture(2)))


def test_zip_wins_over_folder_and_absence_is_named(packed, tmp_path):
    (tmp_path / "images").mkdir()
    with open_clip(packed) as reader:
        assert isinstance(reader, ZipReader)
    with pytest.raises(DataError, match=r"clip: no frames: expected .*absent.zip, a folder .*absent/ or a video"):
        open_clip(clip(tmp_path / "absent"))


def test_damage_is_named(packed, tmp_path):
    with open_clip(packed) as reader, pytest.raises(DataError, match=r"images.zip: frame 000009.jpg: not in the zip"):
        reader.read([0, 9])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "000000.jpg").write_bytes(encoded(0)[:200])
    with open_clip(clip(tmp_path / "folder")) as reader:
        with pytest.raises(DataError, match=r"folder: frame 000000.jpg: OSError: .*[Tt]runcated"):
            reader.read([0])
        with pytest.raises(DataError, match=r"frame 000001.jpg: no such file"):
            reader.read([1])
    whole = (tmp_path / "images.zip").read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>not a zip</html>"):
        (tmp_path / "images.zip").write_bytes(content)
        with pytest.raises(DataError, match=r"images.zip: not a readable zip"):
            open_clip(packed)
    at = whole.index(encoded(1)) + 100
    (tmp_path / "images.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with open_clip(packed) as reader:
        reader.read([0])
        with pytest.raises(DataError, match=r"frame 000001.jpg: BadZipFile: Bad CRC"):
            reader.read([1])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_damaged_byte_anywhere_gives_the_right_pixels_or_a_data_error(tmp_path, compression, kind):
    path, name = tmp_path / "images.zip", f"0.{kind.lower()}"
    write_zip(path, {name: encoded(0, kind)}, compression)
    whole, expected = path.read_bytes(), np.asarray(Image.open(io.BytesIO(encoded(0, kind))).convert("RGB"))
    refused = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            with open_clip(clip(tmp_path / "images", frame_name="{}." + kind.lower())) as reader:
                np.testing.assert_array_equal(reader.read([0])[0].numpy(), expected)
        except DataError:
            refused += 1
    assert refused > len(whole) / 6


def test_frames_of_different_sizes_are_refused(tmp_path):
    write_zip(tmp_path / "images.zip", {"000000.jpg": encoded(0), "000001.jpg": encoded(1, size=(16, 18))})
    with open_clip(clip(tmp_path / "images")) as reader, pytest.raises(DataError, match="different sizes"):
        reader.read([0, 1])


def write_grey_video(path):
    """H.264 with B frames, so that decoding order is not display order; frame i of 30 is of brightness 8 i."""
    pictures = (np.full((48, 64, 3), 8 * i, np.uint8) for i in range(30))
    write_video(path, pictures, size=(64, 48), fps=10, bf="2", g="12")


def test_video_frames_are_the_ones_asked_for(tmp_path):
    write_grey_video(tmp_path / "a.mp4")
    with open_clip(clip(tmp_path / "a.mp4", n=30)) as reader:
        assert isinstance(reader, VideoReader)
        frames = reader.read([29, 0, 13, 14, 14])
        assert frames.shape == (5, 48, 64, 3)
        np.testing.assert_allclose(frames.float().mean((1, 2, 3)), [232, 0, 104, 112, 112], atol=3)
        assert torch.equal(torch.stack(list(reader.frames([3, 5]))), reader.read([3, 5]))
        with pytest.raises(DataError, match="frame 30 asked for, the video has 30"):
            reader.read([30])


def test_unreadable_video_is_named(tmp_path):
    write_grey_video(tmp_path / "a.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:400])
    (tmp_path / "empty.mov").write_bytes(b"")
    for name in ("cut.mp4", "empty.mov"):
        with pytest.raises(DataError, match=f"{name}: not a readable video"):
            open_clip(clip(tmp_path / name))


def test_without_decord_the_remedy_is_named(tmp_path, monkeypatch):
    write_grey_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(DataError, match=r"video files need decord .*: pip install -r requirements.txt"):
        open_clip(clip(tmp_path / "a.mp4"))
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    with pytest.raises(DataError, match="pip install -r requirements.txt"):  # and no video is remembered as broken
        scan([str(tmp_path / "a.mp4")])
    assert (tmp_path / "scan.json").read_text() == "{}"


@pytest.mark.skipif(not (SHARED / "data" / "driving").is_dir(), reason="needs ../shared/data/driving")
def test_real_driving_video(tmp_path):
    source = SHARED / "data" / "driving" / "solidWhiteRight.mp4"
    shutil.copy(source, tmp_path / "a.mp4")
    with open_clip(clip(tmp_path / "a.mp4", n=221)) as reader:
        frames = reader.read([0, 100, 220])
    assert frames.shape == (3, 540, 960, 3)
    with av.open(str(source)) as container:
        truth = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(truth) == 221
    for ours, theirs in zip(frames, (truth[0], truth[100], truth[220]), strict=True):
        assert np.abs(ours.numpy().astype(int) - theirs).mean() < 1


def test_what_a_zip_holds_instead_is_said(tmp_path):
    write_zip(tmp_path / "images.zip", {"images/000000.jpg": encoded(0), "000001.jpg": b""})
    with open_clip(clip(tmp_path / "images")) as reader:
        with pytest.raises(DataError, match="000000.jpg: not in the zip, whose 2 files begin with images/000000.jpg"):
            reader.read([0])
        with pytest.raises(DataError, match="000001.jpg: ValueError: the picture is empty, 0 bytes"):
            reader.read([1])


@pytest.mark.parametrize("what", ["clip.zip", "clip", "clip/000001.jpg", "clip.mp4", "."])
def test_what_may_not_be_read_is_said_with_the_reason(as_nobody, what):
    root, drop = as_nobody
    if what == "clip.zip":
        write_zip(root / what, {"000000.jpg": encoded(0)})
    elif what == "clip.mp4":
        (root / what).touch()
    else:
        (root / "clip").mkdir()
        for i in range(4):
            (root / "clip" / f"{i:06d}.jpg").write_bytes(encoded(i))
    source = root / what.removesuffix(".zip") if what.startswith("clip.") else root / "clip"
    (root / what).chmod(0)
    reason = f"{root / what}.*Permission denied|Permission denied: '{root / what}"
    with drop(), pytest.raises(DataError, match=reason), open_clip(clip(source)) as reader:
        reader.read([1])


def test_a_folder_that_may_be_entered_but_not_listed_is_named(as_nobody):
    root, drop = as_nobody
    for mode in (0o444, 0o111):
        (root / f"{mode}").mkdir(mode=mode)
        with drop(), pytest.raises(DataError, match=rf"{mode}: cannot be read \(Permission denied\)"):
            open_clip(clip(root / f"{mode}"))


def test_a_picture_that_claims_to_be_huge_is_a_damaged_one(tmp_path):
    png = bytearray(encoded(0, "PNG"))
    png[16:24] = (60000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    write_zip(tmp_path / "images.zip", {"0.png": bytes(png)})
    huge, reason = clip(tmp_path / "images", frame_name="{}.png"), "frame 0.png: DecompressionBombError: Image size"
    with open_clip(huge) as reader, pytest.raises(DataError, match=reason):
        reader.read([0])
