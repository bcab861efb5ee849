import io
import shutil
import struct
import tracemalloc
import zipfile
import zlib

import av
import numpy as np
import pytest
import torch
from helpers import SHARED
from PIL import Image

from datasets import readers
from datasets.clips import Clip, DataError
from datasets.readers import FolderReader, VideoReader, ZipReader, open_clip, picture_size
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
        with pytest.raises(DataError, match=r"frame 000001.jpg: no such file; the folder holds 000000.jpg$"):
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


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("claim", [None, 1000])
def test_a_member_that_unpacks_to_more_than_a_picture_costs_little_memory(tmp_path, monkeypatch, method, claim):
    """Of 16 MB, said or hidden behind a smaller size, where up to 1 MB is read."""
    monkeypatch.setattr(readers, "LARGEST_FILE", 1 << 20)
    path = tmp_path / "images.zip"
    write_zip(path, {"000000.jpg": bytes(1 << 24)}, method)
    if claim:
        data = bytearray(path.read_bytes())
        for at in (data.index(b"PK\3\4") + 22, data.rindex(b"PK\1\2") + 24):
            data[at : at + 4] = claim.to_bytes(4, "little")
        path.write_bytes(data)
    tracemalloc.start()
    try:
        with open_clip(clip(tmp_path / "images", 1)) as reader, pytest.raises(DataError, match="images.zip: frame 0"):
            reader.read([0])
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_a_file_larger_than_a_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_FILE", 1 << 20)
    (tmp_path / "000000.jpg").write_bytes(bytes(1 << 21))
    with open_clip(clip(tmp_path, 1)) as reader, pytest.raises(DataError, match="000000.jpg: .*2097152 bytes.* no pic"):
        reader.read([0])


def test_frames_of_different_sizes_are_refused(tmp_path):
    write_zip(tmp_path / "images.zip", {"000000.jpg": encoded(0), "000001.jpg": encoded(1, size=(16, 18))})
    with open_clip(clip(tmp_path / "images")) as reader, pytest.raises(DataError, match=" x .* of 000001.jpg$"):
        reader.read([0, 1])


def test_a_picture_that_is_none_is_said_without_an_address(tmp_path):
    write_zip(tmp_path / "images.zip", {"000000.jpg": b"no picture"})
    with open_clip(clip(tmp_path / "images")) as reader, pytest.raises(DataError) as caught:
        reader.read([0])
    assert str(caught.value).endswith("frame 000000.jpg: UnidentifiedImageError: cannot identify image file")


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
        with pytest.raises(DataError, match="0.jpg: not in the zip, which holds 000001.jpg, images/000000.jpg$"):
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


@pytest.mark.parametrize("side", [60_000, 12_000])  # Pillow refuses the first, and warns of the second
def test_a_picture_that_claims_to_be_huge_is_a_damaged_one(tmp_path, side):
    png = bytearray(encoded(0, "PNG"))
    png[16:24] = side.to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    write_zip(tmp_path / "images.zip", {"0.png": bytes(png)})
    huge, reason = clip(tmp_path / "images", frame_name="{}.png"), r"frame 0.png: DecompressionBomb\w+: Image size"
    with open_clip(huge) as reader, pytest.raises(DataError, match=reason):
        reader.read([0])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures of other kinds than 8-bit RGB


def png_of_16_bit(values):
    """Write a PNG of (H, W) or (H, W, 3) uint16 by hand, since Pillow writes 16 bit in grey alone."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read_one(folder, data, name="000000.png"):
    """Write one picture into a zip and a folder; returns the (H, W, 3) of both, which are the same."""
    write_zip(folder / "z.zip", {name: data})
    (folder / "f").mkdir(exist_ok=True)
    (folder / "f" / name).write_bytes(data)
    frames = []
    for source in ("z", "f"):
        with open_clip(clip(folder / source, frame_name=name)) as reader:
            frames.append(reader.read([0])[0].numpy())
    np.testing.assert_array_equal(*frames)
    return frames[0]


def test_of_16_bit_the_upper_8_count(tmp_path):
    values = np.arange(0, 65536, 37, dtype=np.uint16)[:1750].reshape(35, 50)
    grey = read_one(tmp_path, png_of_16_bit(values))
    np.testing.assert_array_equal(grey, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1))
    assert len(np.unique(grey)) == 253  # clipped it had been white but for the first seven values
    colour = np.stack([values, values[::-1], 65535 - values], axis=-1)
    np.testing.assert_array_equal(read_one(tmp_path, png_of_16_bit(colour)), colour >> 8)
    for byte_order in ("<u2", ">u2"):  # TIFFs under another suffix
        image = Image.fromarray(values.astype(byte_order))
        np.testing.assert_array_equal(read_one(tmp_path, saved(image, "TIFF")), grey)


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integer"), (np.float32, "float")])
def test_pictures_of_32_bits_are_refused_by_name(tmp_path, dtype, kind):
    image = Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8))
    with pytest.raises(DataError, match=rf"z.zip: frame 000000.png: .*a {kind} picture, .*: convert it to 8 or 16 bit"):
        read_one(tmp_path, saved(image, "TIFF"))


def test_palettes_grey_and_alpha_become_rgb(tmp_path):
    rgb = picture(3)
    for image in (rgb.convert("P"), rgb.convert("L"), rgb.convert("RGBA"), rgb.convert("LA"), rgb.convert("1")):
        np.testing.assert_array_equal(read_one(tmp_path, saved(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "I;16")])
def test_pictures_are_turned_as_their_exif_asks(tmp_path, kind, mode):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :8], upright[:8, -8:], upright[-8:, :8] = 200, 120, 60  # no two corners alike
    sideways = upright.swapaxes(0, 1)
    stored = {  # where the first row and the first column of the file are to be seen, by the standard
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: sideways,  # left, top
        6: sideways[::-1],  # right, top
        7: sideways[::-1, ::-1],  # right, bottom
        8: sideways[:, ::-1],  # left, bottom
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
        data = saved(image, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
        frame = read_one(tmp_path, data, f"0.{kind.lower()}")
        assert picture_size(data) == frame.shape[:2] == (24, 40)
        np.testing.assert_allclose(frame.astype(int), upright, atol=6, err_msg=str(orientation))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_a_picture_as_it_is_stored(tmp_path):
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01", b"Exif\0\0"):
        data = saved(picture(0), "JPEG", exif=exif)
        np.testing.assert_array_equal(read_one(tmp_path, data), np.asarray(Image.open(io.BytesIO(data))))
        assert picture_size(data) == (18, 32)


def test_hidden_files_are_no_part_of_a_zip_or_folder(tmp_path):
    hidden = ("__MACOSX/._000000.jpg", "a/.DS_Store", ".000003.jpg", "a/.thumbs/1.jpg", "a/__MACOSX/2.jpg")
    write_zip(tmp_path / "z.zip", dict.fromkeys(hidden, b"x") | {"000000.jpg": encoded(0), "./a/1.jpg": b"", "b/": b""})
    (tmp_path / "f" / "__MACOSX").mkdir(parents=True)
    for name in (".DS_Store", "._000000.jpg", "000000.jpg"):
        (tmp_path / "f" / name).touch()
    for source, names in (("z", ["./a/1.jpg", "000000.jpg"]), ("f", ["000000.jpg"])):
        with open_clip(clip(tmp_path / source)) as reader:
            assert sorted(reader.file_names()) == names
            with pytest.raises(DataError, match=f"which holds {names[0]}|the folder holds {names[0]}"):
                reader.read([3])


def test_pictures_of_other_suffixes_and_a_zip_in_capitals_are_said(tmp_path):
    (tmp_path / "f").mkdir()
    picture(0).save(tmp_path / "f" / "000000.webp")
    reason = "no such file; the folder holds 000000.webp; .webp pictures are not read, convert them"
    with open_clip(clip(tmp_path / "f")) as reader, pytest.raises(DataError, match=reason):
        reader.read([0])
    write_zip(tmp_path / "capitals.ZIP", {"000000.jpg": encoded(0)})
    with pytest.raises(DataError, match=r"capitals.ZIP is not read: rename it to \S+/capitals.zip"):
        open_clip(clip(tmp_path / "capitals"))


def jpeg(picture, mode="RGB", **options):
    data = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(data, "JPEG", quality=92, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}], ids=str
)
def test_jpegs_are_pillow_s_pixels(options):
    y, x = np.mgrid[:101, :203]
    data = jpeg(np.stack([x, 2 * y, (x * y) // 80], -1).astype(np.uint8), **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(readers._decode(data, None).numpy(), expected)
    full = readers._decode(data, lambda height, width: (height, width)).numpy().astype(int)
    assert np.square(full - expected).mean() < 1  # 48 dB: the exact DCT, if not the colours between the samples
    half = readers._decode(data, lambda height, width: (height // 2, width // 2))
    assert half.shape == ((101, 203, 3) if options.get("mode") == "CMYK" else (51, 102, 3))
    if len(half) == 51:
        small = np.asarray(Image.fromarray(expected).resize((102, 51), Image.BOX), dtype=int)
        assert np.abs(half.numpy() - small).mean() < 2


def test_a_jpeg_that_claims_to_be_huge_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for fit in (None, lambda height, width: (1, 1)):
        with pytest.raises(Image.DecompressionBombError):
            readers._decode(jpeg(np.zeros((101, 203, 3), np.uint8)), fit)


def test_pictures_are_read_as_small_as_the_reader_is_told(tmp_path):
    """Not smaller in either direction; of the size that is asked for if that is what was filmed."""
    Image.fromarray(np.full((90, 160, 3), 9, np.uint8)).save(tmp_path / "000000.jpg")
    Image.fromarray(np.full((45, 80, 3), 9, np.uint8)).save(tmp_path / "000001.jpg")
    clip = Clip("a", str(tmp_path), 2, 10.0)
    sizes = []
    for least, expected in (((20, 30), (23, 40)), ((23, 41), (45, 80)), ((46, 10), (90, 160)), ((90, 160), (90, 160))):
        with open_clip(clip) as reader:
            (frame,) = reader.frames([0], lambda h, w, least=least: sizes.append((h, w)) or least)
            assert frame.shape == (*expected, 3)
            (whole,) = reader.frames([1], lambda h, w: (h, w))
            assert whole.shape == (45, 80, 3) and (whole == whole[0, 0]).all()
    assert sizes == [(90, 160)] * 4
