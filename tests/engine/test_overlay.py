"""The video with its risk curve, decoded again: pictures, times, size, sound."""

import os
import shutil
from itertools import repeat
from pathlib import Path

import av
import numpy as np
import pytest
from curves import bumpy

from datasets.video import Video
from engine.curve import Gap, read_scores
from engine.overlay import NARROWEST, OverlayError, write_overlay
from engine.overlay_panel import ALERT, AT_RISK, BELOW, NO_PICTURE, SCORED, STATES, WARMING_UP, Panel, frame_states
from tests.datasets.video_files import FFMPEG, SIZE, X264, burned, ffmpeg, number_of
from utils.files import temporary_beside

FPS, FRAMES = 30, 105


def decode(path):
    """(pictures as uint8 (n, H, W, 3), their times, duration of the file) as a player sees them."""
    with av.open(str(path)) as container:
        frames = [(f.to_ndarray(format="rgb24"), f.time) for f in container.decode(video=0)]
    with av.open(str(path)) as container:
        return np.stack([p for p, _ in frames]), [t for _, t in frames], container.duration / av.time_base


def sound(path):
    """(times of samples, their size) of the sound; None where there is none."""
    times, samples = [], []
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        for frame in container.decode(audio=0):
            data = np.abs(frame.to_ndarray().astype(np.float64)).max(axis=0)
            times.append(frame.time + np.arange(frame.samples) / frame.sample_rate)
            samples.append(data[: frame.samples])
    return np.concatenate(times), np.concatenate(samples)


def flat(shape, count, grey=100):
    return repeat(np.full((*shape, 3), grey, np.uint8), count)


def curve_for(frames, fps=FPS, **more):
    return bumpy(frames, fps=fps, first=min(15, frames - 1), **more)


@pytest.mark.parametrize(
    ("shape", "fps", "size"),
    [
        ((540, 960), 60000 / 1001, (540, 960)),
        ((271, 481), 25, (272, 482)),  # odd
        ((640, 360), 7, (854, 480)),  # portrait, too narrow for words
        ((965, 1930), 23.976, (960, 1920)),
    ],
)
def test_size_count_and_times(tmp_path, shape, fps, size):
    frames = 8
    write_overlay(tmp_path / "o.mp4", curve_for(frames, fps), None, flat(shape, frames), preset="ultrafast")
    pictures, times, duration = decode(tmp_path / "o.mp4")
    assert len(pictures) == frames and pictures.shape[2] == size[1]
    assert 72 <= pictures.shape[1] - size[0] <= 160  # the panel
    assert np.allclose(times, np.arange(frames) / fps, atol=1e-3)
    assert abs(duration - frames / fps) < 1 / fps
    assert np.abs(pictures[:, : size[0]].astype(int) - 100).max() < 6
    with av.open(str(tmp_path / "o.mp4")) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.sample_aspect_ratio in (None, 0, 1)


def test_a_long_video_keeps_its_time(tmp_path):
    frames, fps = 2000, 29.97002997
    write_overlay(tmp_path / "o.mp4", curve_for(frames, fps), None, flat((16, 120), frames), preset="ultrafast")
    _, times, _ = decode(tmp_path / "o.mp4")
    assert len(times) == frames and abs(times[-1] - (frames - 1) / fps) < 0.1 / fps


def test_colours_stay(tmp_path):
    picture = np.zeros((360, 640, 3), np.uint8)
    picture[:, :213], picture[:, 213:426], picture[:, 426:] = (200, 40, 40), (40, 180, 60), (50, 60, 190)
    write_overlay(tmp_path / "o.mp4", curve_for(20), None, repeat(picture, 20), crf=10)
    pictures, _, _ = decode(tmp_path / "o.mp4")
    for column in (100, 320, 530):
        assert np.abs(pictures[5, 100, column].astype(int) - picture[100, column]).max() < 12


BEEPS = "-f lavfi -i aevalsrc=0.8*sin(6283*t)*lt(mod(t\\,1)\\,0.1):d="  # at each whole second
HOLE = r"aselect=not(between(t\,1.3\,1.8))"
INTO = "-map 0:v -map 1:a -c:v copy"
SOURCES = {  # name: commands, seconds by which the pictures come late beside the sound
    "plain.mp4": ([f"-i video.mp4 {BEEPS}4 {INTO} -c:a aac plain.mp4"], 0),
    "cut.mp4": ([f"-i video.mp4 {BEEPS}4 {INTO} -c:a aac whole.mp4", "-ss 0.7 -i whole.mp4 -c copy cut.mp4"], 0),
    "adts.ts": ([f"-i video.mp4 {BEEPS}4 {INTO} -c:a aac adts.ts"], 0),
    "late.mp4": ([f"-itsoffset 0.75 -i video.mp4 {BEEPS}5 {INTO} -c:a aac late.mp4"], 0.75),
    "early.mkv": ([f"-i video.mp4 -itsoffset 0.5 {BEEPS}4 {INTO} -c:a libmp3lame early.mkv"], -0.5),
    "shifted.mkv": ([f"-i video.mp4 {BEEPS}4 {INTO} -output_ts_offset 7.3 -c:a pcm_s16le shifted.mkv"], 0),
    "late.mov": ([f"-itsoffset 0.75 -i video.mp4 {BEEPS}5 {INTO} -c:a pcm_mulaw -ar 8000 late.mov"], 0.75),
    "vorbis.mkv": ([f"-i video.mp4 -itsoffset 0.5 {BEEPS}3 {INTO} -c:a libvorbis vorbis.mkv"], -0.5),
    "motion.avi": ([f"-i video.mp4 {BEEPS}4 -map 0:v -map 1:a -c:v mjpeg -q:v 2 -c:a adpcm_ms motion.avi"], 0),
    "mp2.ts": ([f"-i video.mp4 {BEEPS}4 {INTO} -c:a mp2 mp2.ts"], 0),  # decoded to another form than it states
    "holes.mkv": ([f"-i video.mp4 {BEEPS}4 {INTO} -af {HOLE} -c:a pcm_s16le holes.mkv"], 0),
    "short.mkv": ([f"-i video.mp4 {BEEPS}1.5 {INTO} -c:a libopus short.mkv"], 0),
    "long.mp4": ([f"-i video.mp4 {BEEPS}9 {INTO} -c:a aac long.mp4"], 0),
}
ENCODED = {"shifted.mkv", "late.mov", "vorbis.mkv", "motion.avi", "mp2.ts", "holes.mkv"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not FFMPEG:
        pytest.skip("needs ffmpeg")
    folder = tmp_path_factory.mktemp("sources")
    (folder / "source.rgb").write_bytes(b"".join(burned(i).tobytes() for i in range(FRAMES)))
    ffmpeg(folder, f"source {X264} -g 15 video.mp4")
    return folder


def pictures_of(path):
    video = Video(str(path))
    return len(video), (picture.numpy() for picture in video.frames(range(len(video))))


@pytest.mark.parametrize("name", SOURCES)
def test_sound_is_kept_in_time(folder, tmp_path, name):
    commands, late = SOURCES[name]
    for command in commands:
        ffmpeg(folder, command)
    frames, pictures = pictures_of(folder / name)
    write_overlay(tmp_path / "o.mp4", curve_for(frames), folder / name, pictures)
    shown, times, duration = decode(tmp_path / "o.mp4")
    assert abs(duration - frames / FPS) < 1 / FPS and abs(times[0]) < 1e-3
    first = number_of(shown[0, : NARROWEST * SIZE[1] // SIZE[0]])
    assert [number_of(p[: NARROWEST * SIZE[1] // SIZE[0]]) for p in shown] == list(range(first, first + frames))
    time, loud = sound(tmp_path / "o.mp4")
    offset = first / FPS + late  # time in the sound of frame 0
    end = 1.5 if name == "short.mkv" else duration
    beeps = [beep - offset for beep in range(9) if 0 <= beep - offset < end - 0.2]
    assert len(beeps) >= 2
    for beep in beeps:
        assert loud[(time > beep + 0.02) & (time < beep + 0.08)].max() > 0.4, f"no beep at {beep}"
        for quiet in (beep - 0.06, beep + 0.14):
            assert loud[(time > quiet) & (time < quiet + 0.03)].max(initial=0) < 0.1, f"a beep at {quiet}"
    with av.open(str(tmp_path / "o.mp4")) as made, av.open(str(folder / name)) as source:
        codecs = [c.streams.audio[0].codec_context.codec.canonical_name for c in (made, source)]
        assert codecs[0] == ("aac" if name in ENCODED else codecs[1])
    if name in ENCODED:
        assert np.diff(time).max() < 0.001  # silence in holes, which not every player keeps


def test_packets_are_those_of_the_source(folder, tmp_path):
    ffmpeg(folder, SOURCES["plain.mp4"][0][0])
    frames, pictures = pictures_of(folder / "plain.mp4")
    write_overlay(tmp_path / "o.mp4", curve_for(frames), folder / "plain.mp4", pictures)

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    assert len(packets(tmp_path / "o.mp4")) > 100
    assert packets(tmp_path / "o.mp4") == packets(folder / "plain.mp4")[: len(packets(tmp_path / "o.mp4"))]


def test_no_sound_and_pixels_that_are_not_square(folder, tmp_path):
    ffmpeg(folder, f"-i video.mp4 -vf setsar=2 {X264} wide.mp4")
    ffmpeg(folder, f"-i video.mp4 -vf transpose=1,setsar=2 {X264} lying.mp4")
    ffmpeg(folder, "-i lying.mp4 -c copy -metadata:s:v rotate=90 turned.mp4")
    for name, height in (("video.mp4", 320), ("wide.mp4", 160), ("turned.mp4", 640)):
        frames, pictures = pictures_of(folder / name)
        write_overlay(tmp_path / "o.mp4", curve_for(frames), folder / name, pictures)
        shown, _, _ = decode(tmp_path / "o.mp4")
        assert sound(tmp_path / "o.mp4") is None and len(shown) == frames
        assert number_of(shown[77, :height]) == 77 and shown.shape[2] == NARROWEST
        assert 72 <= shown.shape[1] - height <= 160


def test_damaged_sound_ends_and_is_told(folder, tmp_path, caplog):
    ffmpeg(folder, f"-i video.mp4 {BEEPS}4 {INTO} -c:a aac one.ts")
    ffmpeg(folder, f"-i video.mp4 {BEEPS}1 {INTO} -c:a aac two.ts")
    (folder / "joined.ts").write_bytes((folder / "two.ts").read_bytes() + (folder / "one.ts").read_bytes())
    write_overlay(tmp_path / "o.mp4", curve_for(FRAMES), folder / "joined.ts", flat((64, 96), FRAMES))
    pictures, _, duration = decode(tmp_path / "o.mp4")
    assert len(pictures) == FRAMES and abs(duration - FRAMES / FPS) < 1 / FPS
    assert sound(tmp_path / "o.mp4")[0].max() < FRAMES / FPS


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_states_of_frames():
    gap = Gap(2.0, 3.0, "damaged")
    curve = bumpy(100, first=10, warming_up=True, peaks=(0.7,), gaps=(gap,), step=2)
    state, score = frame_states(curve)
    (event,) = curve.events()
    assert (state[:10] == WARMING_UP).all() and (state[10:20] == BELOW).all()
    assert (state[20:30] == NO_PICTURE).all() and np.isnan(score[20:30]).all()
    resumed = curve.frame[curve.frame >= 30][0]
    assert resumed > 30 and (state[30:resumed] == WARMING_UP).all() and np.isnan(score[30:resumed]).all()
    first, alert, last = (round(t * 10) for t in (event.start, event.alert, event.end))
    assert first < alert < last
    assert (state[first:alert] == AT_RISK).all() and (state[alert : last + 1] == ALERT).all()
    assert state[first - 1] == BELOW and state[last + 3] == BELOW
    assert score[11] == score[10] == curve.score[curve.frame == 10]  # the last one at or before a frame
    assert set(frame_states(bumpy(100, rule=None))[0]) == {WARMING_UP, SCORED}


def test_panel_shows_the_state(tmp_path):
    curve = bumpy(100, first=10, gaps=(Gap(2.0, 3.0, "damaged"),))
    pictures = [None if 20 <= i < 30 else np.full((360, 640, 3), 200, np.uint8) for i in range(100)]
    write_overlay(tmp_path / "o.mp4", curve, None, pictures, crf=10)
    shown, _, _ = decode(tmp_path / "o.mp4")
    assert (shown[:, :360].mean(axis=(1, 2, 3)) < 110).tolist() == [20 <= i < 30 for i in range(100)]
    state, score = frame_states(curve)
    tall = shown.shape[1] - 360
    for frame in (3, 15, 25, 60, 64, 72):
        words = shown[frame, 360 + int(0.6 * tall), tall // 6]
        assert np.abs(words.astype(int) - STATES[state[frame]][1]).max() < 20, frame
    bar = shown[:, 360 + tall // 12 : 360 + tall - tall // 12, int(2.5 * tall) + 4]
    filled = (np.abs(bar.astype(int) - 46).max(axis=2) > 25).mean(axis=1)
    assert np.allclose(filled, np.nan_to_num(score), atol=0.06)


@pytest.mark.parametrize(("width", "height"), [(480, 72), (480, 138), (960, 86), (1080, 160), (1920, 160)])
def test_score_and_time_stand_apart(width, height):
    """The panel of a portrait video is tall and narrow."""
    panel = Panel(bumpy(100), width, height)
    nothing, score, time = (panel._draw_words(BELOW, *words) for words in (("", ""), ("0.88", ""), ("", "59.99 s")))
    columns = [np.flatnonzero((words != nothing).any(axis=(0, 2))) for words in (score, time)]
    assert columns[0].max() + 2 < columns[1].min() and np.ptp(columns[0]) > 50


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("count", [9, 11])
def test_another_number_of_pictures(tmp_path, count):
    with pytest.raises(OverlayError, match=f"{tmp_path}/o.mp4: .*pictures"):
        write_overlay(tmp_path / "o.mp4", curve_for(10), None, flat((64, 96), count))
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_reader_passes_and_leaves_nothing(tmp_path):
    def pictures():
        yield np.zeros((64, 96, 3), np.uint8)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_overlay(tmp_path / "o.mp4", curve_for(10), None, pictures())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("frames", [10, 400])
def test_full_disk(tmp_path, frames):
    rng = np.random.default_rng(0)
    temporary_beside(tmp_path / "o.mp4").symlink_to("/dev/full")
    noise = (rng.integers(0, 255, (240, 480, 3), np.uint8) for _ in range(frames))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/o.mp4'"):
        write_overlay(tmp_path / "o.mp4", curve_for(frames), None, noise, preset="ultrafast")
    assert not list(tmp_path.iterdir())


def test_names_what_cannot_be_read_or_written(tmp_path):
    with pytest.raises(OSError, match="absent.mp4"):
        write_overlay(tmp_path / "o.mp4", curve_for(3), tmp_path / "absent.mp4", flat((64, 96), 3))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(OverlayError, match="o.mp4: not written: .*text.mp4 cannot be read"):
        write_overlay(tmp_path / "o.mp4", curve_for(3), tmp_path / "text.mp4", flat((64, 96), 3))
    with pytest.raises(OSError, match="gone/o.mp4"):
        write_overlay(tmp_path / "gone" / "o.mp4", curve_for(3), None, flat((64, 96), 3))


def test_odd_names(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Path("a:b %03d \udcff ü$x$.mp4")
    place.mkdir()
    shutil.copy(folder / "video.mp4", place / "s:%d\udcff.mp4")
    curve = curve_for(FRAMES, name="odd \udcff")
    write_overlay(place / "overlay.mp4", curve, place / "s:%d\udcff.mp4", flat((64, 96), FRAMES))
    curve.plot(place / "curve.png")
    curve.write_csv(place / "scores.csv")
    assert len(list(place.iterdir())) == 4 and len(read_scores(place / "scores.csv")[0]) == len(curve.frame)


def test_sizes_that_change_and_no_picture_at_all(tmp_path):
    mixed = [None, *(np.full((60 + i, 100 + 3 * i, 3), 90, np.uint8) for i in range(4)), None]
    write_overlay(tmp_path / "o.mp4", curve_for(6), None, mixed)
    assert len(decode(tmp_path / "o.mp4")[0]) == 6
    write_overlay(tmp_path / "o.mp4", curve_for(6), None, [None] * 6)
    assert len(decode(tmp_path / "o.mp4")[0]) == 6
