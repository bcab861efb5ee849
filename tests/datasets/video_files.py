"""Video files as people make them, with the number of each frame burned in, and how to read it back; needs ffmpeg."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np

FFMPEG = shutil.which("ffmpeg")
SIZE = (96, 64)  # width, height
FRAMES = 180

X264 = "-c:v libx264 -preset veryfast -pix_fmt yuv420p"
X265 = "-c:v libx265 -preset ultrafast -x265-params log-level=none:keyint=30:bframes=4:open-gop=1"
ORDER = "-disposition:v:0 0 -disposition:v:1 default"

# name: arguments of one ffmpeg command or several; "source" is the raw input, of 30 fps unless the name says otherwise.
# Later commands read what earlier ones wrote.
RECIPES = {
    "plain.mp4": [f"source {X264} -g 30 plain.mp4"],
    "pyramid.mp4": [f"source {X264} -g 60 -bf 8 -x264-params b-pyramid=normal:ref=5 pyramid.mp4"],
    "open_gop.mp4": [f"source {X264} -x264-params keyint=25:bframes=3:open-gop=1:scenecut=0 open_gop.mp4"],
    "refresh.mp4": [f"source {X264} -x264-params intra-refresh=1:keyint=30:scenecut=0 refresh.mp4"],
    "high10.mp4": ["source -c:v libx264 -preset veryfast -pix_fmt yuv420p10le -g 40 high10.mp4"],
    "interlaced.mp4": [f"source {X264} -flags +ilme+ildct -x264opts tff=1 -g 30 interlaced.mp4"],
    "fields.ts": ["source -c:v mpeg2video -flags +ilme+ildct -g 15 -bf 2 -q:v 2 fields.ts"],
    "cut.mp4": ["-ss 2.7 -i plain.mp4 -t 2.5 -c copy cut.mp4"],
    "cut_far.mov": [f"source {X264} far.mp4", "-ss 2.9 -i far.mp4 -t 2 -c copy cut_far.mov"],
    "cut_open.mp4": ["-ss 2.7 -i open_gop.mp4 -t 2.5 -c copy cut_open.mp4"],
    "cut_open.mkv": ["-ss 2.7 -i open_gop.mp4 -t 2.5 -c copy cut_open.mkv"],
    "cut_hevc.mkv": ["-ss 2.7 -i hevc.mp4 -t 2.5 -c copy cut_hevc.mkv"],
    "cut_hevc.mp4": ["-ss 2.7 -i hevc.mp4 -t 2.5 -c copy cut_hevc.mp4"],
    "cut_copied.ts": ["-i plain.ts -c copy -copyinkf -ss 2.3 cut_copied.ts"],
    "fragmented.mp4": ["-i plain.mp4 -c copy -movflags frag_keyframe+empty_moov+default_base_moof fragmented.mp4"],
    "late.mkv": ["-i plain.mp4 -c copy -output_ts_offset 7.3 late.mkv"],
    "late.mp4": ["-itsoffset 3 -i plain.mp4 -f lavfi -i sine=d=5 -map 0 -map 1 -c:v copy -c:a aac late.mp4"],
    "h264.avi": [f"source {X264} -g 250 h264.avi"],
    "copied.avi": ["-i plain.mp4 -c copy copied.avi"],
    "mpeg4.avi": ["source -c:v mpeg4 -bf 2 -g 30 -q:v 2 mpeg4.avi"],
    "packed.avi": ["source -c:v libxvid -bf 2 -g 30 -q:v 2 packed.avi"],
    "mpeg4.mp4": ["source -c:v mpeg4 -bf 2 -g 30 -q:v 2 mpeg4.mp4"],
    "mpeg4.mkv": ["-fflags +genpts -i mpeg4.avi -c copy mpeg4.mkv"],
    "mjpeg.avi": ["source -c:v mjpeg -q:v 2 -pix_fmt yuvj420p mjpeg.avi"],
    "lost.avi": [],
    "mjpeg.mov": ["source -c:v mjpeg -q:v 2 -pix_fmt yuvj444p mjpeg.mov"],
    "prores.mov": ["source -c:v prores_ks prores.mov"],
    "plain.ts": [f"source {X264} -g 45 plain.ts"],
    "plain.m2ts": [f"source {X264} -g 45 -f mpegts -mpegts_m2ts_mode 1 plain.m2ts"],
    "joined.ts": [],
    "small.mpg": ["source -c:v mpeg1video -bf 2 -g 5 -q:v 10 small.mpg"],
    "mpeg1.mpg": ["source -c:v mpeg1video -bf 2 -g 15 -q:v 2 mpeg1.mpg"],
    "mpeg2.mpg": ["source -c:v mpeg2video -bf 2 -g 15 -q:v 2 mpeg2.mpg"],
    "mpeg2.ts": ["source -c:v mpeg2video -bf 2 -g 15 -q:v 2 mpeg2.ts"],
    "wmv2.wmv": ["source -c:v wmv2 -q:v 2 wmv2.wmv"],
    "h264.flv": [f"source {X264} -g 30 h264.flv"],
    "theora.ogv": ["source -c:v libtheora -q:v 9 -g 30 theora.ogv"],
    "mpeg4.3gp": ["source -c:v mpeg4 -g 30 -q:v 2 -s 96x64 mpeg4.3gp"],
    "raw.h264": [f"source {X264} -g 30 -bsf:v h264_mp4toannexb raw.h264"],
    "vp8.webm": ["source -c:v libvpx -g 60 -auto-alt-ref 1 -lag-in-frames 16 -b:v 1M -deadline realtime vp8.webm"],
    "vp9.webm": ["source -c:v libvpx-vp9 -g 60 -lag-in-frames 16 -b:v 0 -crf 20 -deadline good -cpu-used 5 vp9.webm"],
    "av1.mp4": ["source -c:v libsvtav1 -preset 12 -g 60 -crf 25 -pix_fmt yuv420p av1.mp4"],
    "av1.mkv": ["-i av1.mp4 -c copy av1.mkv"],
    "hevc.mp4": [f"source {X265} -pix_fmt yuv420p hevc.mp4"],
    "hevc10.mkv": [f"source {X265} -pix_fmt yuv420p10le hevc10.mkv"],
    "hevc.ts": ["-i hevc.mp4 -c copy hevc.ts"],
    "ntsc.mp4": [f"-r 60000/1001 source {X264} -g 30 ntsc.mp4"],
    "fast.mkv": [f"-r 240 source {X264} -g 60 fast.mkv"],
    "rotated.mp4": [
        f"source -vf transpose=1 {X264} lying.mp4",
        "-i lying.mp4 -c copy -metadata:s:v rotate=90 rotated.mp4",
    ],
    "turned.mov": [
        f"source -vf vflip,hflip {X264} head.mp4",
        "-i head.mp4 -c copy -metadata:s:v rotate=180 turned.mov",
    ],
    "cover.mp4": [
        "source -frames:v 1 cover.png",
        "-i cover.png -i plain.mp4 -map 0 -map 1 -c copy -disposition:v:0 attached_pic cover.mp4",
    ],
    "audio_first.mp4": ["-f lavfi -i sine=d=6 -i plain.mp4 -map 0 -map 1 -c:v copy -c:a aac audio_first.mp4"],
    "two.mkv": [
        f"source -filter_complex [0]split[a][b];[a]scale=48:32,negate[c] -map [c] -map [b] {X264} {ORDER} two.mkv"
    ],
    "variable.mp4": [f"source -vf select='gt(mod(n\\,7)\\,1)*lt(mod(n\\,50)\\,40)' -vsync vfr {X264} variable.mp4"],
    "variable.mkv": [f"source -vf select='lt(n\\,60)+not(mod(n\\,4))' -vsync vfr {X264} -g 20 variable.mkv"],
    "short.mp4": [],
    "short.mkv": [],
    "short.ts": [],
}
SHORTENED = {"short.mp4": "fast_start.mp4", "short.mkv": "plain.mkv", "short.ts": "plain.ts"}


def burned(number: int) -> np.ndarray:
    """A uint8 (H, W, 3) picture of a number below 1024: red and blue on top, below 2 rows of 5 bits."""
    width, height = SIZE
    picture = np.zeros((height, width, 3), np.uint8)
    top = height // 4
    picture[:top, : width // 2], picture[:top, width // 2 :] = (220, 30, 30), (30, 30, 220)
    for bit in range(10):
        row, column = divmod(bit, 5)
        rows = slice(top + row * (height - top) // 2, top + (row + 1) * (height - top) // 2)
        picture[rows, column * width // 5 : (column + 1) * width // 5] = 235 * (number >> bit & 1)
    return picture


def number_of(picture: np.ndarray) -> int:
    """Read the number of a uint8 (H, W, 3) picture of any size; -1 where it is not upright or not in colour."""
    height, width = picture.shape[:2]
    left, right = (picture[height // 16 : height // 6, x : x + width // 4] for x in (width // 8, 5 * width // 8))
    (red, _, little), (few, _, blue) = left.reshape(-1, 3).mean(0), right.reshape(-1, 3).mean(0)
    if not (red > 130 > 100 > little and blue > 130 > 100 > few):
        return -1
    number, top = 0, height // 4
    for bit in range(10):
        row, column = divmod(bit, 5)
        y, x = top + (2 * row + 1) * (height - top) // 4, (2 * column + 1) * width // 10
        number |= int(picture[y - 3 : y + 4, x - 3 : x + 4].mean() > 120) << bit
    return number


def ffmpeg(folder: Path, arguments: str) -> None:
    """Run ffmpeg in a folder; "source" among the arguments stands for the raw input."""
    words = []
    for word in arguments.split():
        raw = f"-f rawvideo -pix_fmt rgb24 -s {SIZE[0]}x{SIZE[1]}".split()
        rate = [] if "-r" in words else ["-r", "30"]
        words += [*raw, *rate, "-i", "source.rgb"] if word == "source" else [word]
    subprocess.run([FFMPEG, "-v", "error", "-y", "-threads", "1", *words], cwd=folder, check=True, capture_output=True)


def make(folder: Path) -> dict[str, str]:
    """Write the files into a folder; returns {name of one that could not be: why}."""
    pictures = [burned(i).tobytes() for i in range(FRAMES)]
    (folder / "source.rgb").write_bytes(b"".join(pictures))
    failed = {}
    ffmpeg(folder, f"source {X264} -g 30 -movflags faststart fast_start.mp4")
    ffmpeg(folder, "-i fast_start.mp4 -c copy plain.mkv")
    order = sorted(RECIPES, key=lambda name: name.startswith("cut") + 2 * (name in ("mpeg4.mkv", "av1.mkv", "hevc.ts")))
    for name in order:
        try:
            for arguments in RECIPES[name]:
                ffmpeg(folder, arguments)
        except subprocess.CalledProcessError as e:
            failed[name] = e.stderr.decode(errors="replace").strip().splitlines()[-1][:150]
    for name, whole in SHORTENED.items():
        data = (folder / whole).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 6 // 10])
    one = (folder / "plain.ts").read_bytes()
    (folder / "joined.ts").write_bytes(one + one)
    motion = (folder / "mjpeg.avi").read_bytes()
    *before, after = motion.split(b"00dc", 51)  # the last of them begins picture 50
    (folder / "lost.avi").write_bytes(b"00dc".join(before) + b"JUNK" + after)
    return failed


@cache
def decoded(path: Path) -> list[int]:
    """Numbers of the pictures that ffmpeg, from the system, shows from beginning to end."""
    options = ["-vsync", "passthrough", "-an", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    command = [FFMPEG, "-v", "quiet", "-i", path, *options]
    data = subprocess.run(command, capture_output=True, check=False).stdout
    numbers = []
    while data:
        kind, size, depth, rest = data.split(b"\n", 3)
        width, height = map(int, size.split())
        assert (kind, depth) == (b"P6", b"255")
        numbers.append(number_of(np.frombuffer(rest, np.uint8, width * height * 3).reshape(height, width, 3)))
        data = rest[width * height * 3 :]
    return numbers


def shown_at(path: Path) -> list[float]:
    """Seconds at which ffprobe says that pictures are shown."""
    command = f"-v quiet -select_streams V:0 -show_entries frame=pts_time -of csv=p=0 {path}"
    lines = subprocess.run(["ffprobe", *command.split()], capture_output=True, text=True, check=True).stdout.split()
    return [float(line.strip(",")) for line in lines if line.strip(",") != "N/A"]


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
