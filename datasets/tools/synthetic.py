"""A small data set in DoTA's layout, rendered: a road from behind a windscreen, traffic, one visible accident per clip.

    python -m datasets.tools.synthetic ROOT --train 48 --val 16 --videos 24

Three kinds of accident, under DoTA's names: a car swerves into the one beside it (lateral), an oncoming car crosses
into the camera's lane (oncoming, ego involved), a car skids off the road (leave_to_right). The anomaly begins with the
swerve, before the impact, and lasts while wreck, debris and smoke are ahead. For the demo and the tests: everything
that reads DoTA reads it. --videos adds unlabelled ones, ROOT/videos/*.mp4, of the same roads at 30 frames per second.
"""

import io
import json
import math
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.cli import Parser, from_to, natural

KINDS = {"lateral": 3, "oncoming": 4, "leave_to_right": 8}  # name -> DoTA's accident_id
LANE = 3.5  # metres
CAR = (1.8, 1.5)  # width and height in metres
CAMERA_HEIGHT = 1.4
FOCAL = 1.1  # in frame widths
SWERVE = 5  # frames from the first swerve to the impact
FPS = 10
VIDEO_FPS = 30


@dataclass
class Car:
    """A car on the road."""

    x: float  # metres right of the camera
    z: float  # metres ahead of it
    closing: float  # metres per frame that it comes nearer
    colour: tuple[int, int, int]
    oncoming: bool = False
    angle: float = 0.0  # of its roll, in radians


class Scene:
    """One clip: everything random is drawn at the start, frame by frame it only moves."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng, (self.width, self.height) = rng, size
        self.num_frames = int(rng.integers(44, 64))
        self.kind = str(rng.choice(list(KINDS)))
        self.start = int(rng.integers(18, self.num_frames - 20))
        self.end = min(self.start + int(rng.integers(14, 24)), self.num_frames)  # one past the last anomalous frame
        self.night = bool(rng.random() < 0.2)
        self.speed = rng.uniform(0.8, 1.6)  # metres per frame
        self.travelled = rng.uniform(0, 20)
        self.horizon = rng.uniform(0.38, 0.46)
        self.brightness = rng.uniform(0.5, 0.65) if self.night else rng.uniform(0.8, 1.1)
        side = rng.choice([-1, 1])
        self.cars = [
            self._car(0, rng.uniform(8, 12), rng.uniform(-0.05, 0.05)),
            self._car(LANE, rng.uniform(9.5, 13), rng.uniform(-0.05, 0.05)),
            self._car(-LANE, rng.uniform(30, 60), rng.uniform(1.0, 1.8), oncoming=True),
            self._car(-LANE, rng.uniform(70, 130), rng.uniform(1.0, 1.8), oncoming=True),
        ]
        self.turn = side * rng.uniform(1.0, 2.2)
        debris = int(rng.integers(14, 24))
        self.debris = rng.normal(0, 1, (debris, 3)) * (0.12, 0.09, 0.05)  # metres per frame
        self.smoke = rng.normal(0, 0.25, (10, 2))
        if self.kind == "oncoming":
            culprit = self.cars[2]
            culprit.z = 10 + culprit.closing * (self.start + SWERVE)
            self.cars[0].z = rng.uniform(26, 34)
        self.impact = None

    def _car(self, x: float, z: float, closing: float, oncoming: bool = False) -> Car:
        colour = tuple(int(v) for v in self.rng.integers(40, 220, 3))
        return Car(x + self.rng.uniform(-0.3, 0.3), z, closing, colour, oncoming)

    def labels(self) -> np.ndarray:
        """Return (num_frames,) uint8, 1 = anomalous."""
        frame = np.arange(self.num_frames)
        return ((frame >= self.start) & (frame < self.end)).astype(np.uint8)

    def frame(self, t: int) -> Image.Image:
        """Draw the picture at frame t; call it for 0, 1, 2, ... in order."""
        self._move(t)
        crashed = self.start + SWERVE <= t < self.end
        image = Image.new("RGB", (self.width, self.height))
        draw = ImageDraw.Draw(image)
        self._road(draw)
        for car in sorted(self.cars, key=lambda c: -c.z):
            if 2 < car.z < 150:
                self._draw_car(draw, car)
        if crashed:
            self._draw_wreckage(draw, t - self.start - SWERVE)
        shake = int(crashed and t < self.start + SWERVE + 6) * (3 if self.kind == "oncoming" else 1)
        pixels = np.roll(np.asarray(image, dtype=np.float32), self.rng.integers(-shake, shake + 1, 2), axis=(0, 1))
        pixels = pixels * self.brightness + self.rng.normal(0, 4, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def _move(self, t: int) -> None:
        involved = {"lateral": (1, 0), "oncoming": (2,), "leave_to_right": (0,)}[self.kind]
        stopped = self.start + SWERVE <= t < self.end
        self.travelled += self.speed * (0.15 if stopped else 1.0)
        for i, car in enumerate(self.cars):
            if i in involved and t >= self.start:
                continue
            car.z -= car.closing * (0.6 if stopped and car.oncoming else 1.0)
            if car.z < 3 and car.oncoming:
                car.z = self.rng.uniform(60, 110)
        if not self.start <= t < self.end:
            if t >= self.end:  # the wreck has been passed
                for i in involved:
                    self.cars[i].z = -1.0
            return
        share = min((t - self.start + 1) / SWERVE, 1.0)
        culprit = self.cars[involved[0]]
        if self.kind == "lateral":
            culprit.x = LANE - (LANE - CAR[0]) * share
            culprit.z += (self.cars[0].z - culprit.z) * 0.4
        elif self.kind == "oncoming":
            culprit.x, culprit.z = -LANE * (1 - share), max(culprit.z - culprit.closing, 6.5)
        else:
            culprit.x, culprit.z = 1.4 * LANE * share, culprit.z + 0.2 * (share < 1)
        culprit.angle = self.turn * min((t - self.start) / (1.5 * SWERVE), 1.0)
        self.impact = (culprit.x, culprit.z)

    def _project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Turn metres right of the camera, above the road, and ahead of the camera into pixels."""
        scale = FOCAL * self.width / z
        return self.width / 2 + x * scale, self.horizon * self.height + (CAMERA_HEIGHT - y) * scale

    def _road(self, draw: ImageDraw.ImageDraw) -> None:
        w, h, horizon = self.width, self.height, int(self.horizon * self.height)
        draw.rectangle([0, 0, w, horizon], fill=(30, 35, 60) if self.night else (150, 185, 225))
        draw.rectangle([0, horizon, w, h], fill=(60, 90, 50))
        draw.polygon([self._project(x, 0, z) for x, z in ((-6, 200), (6, 200), (6, 1.5), (-6, 1.5))], fill=(85, 85, 90))
        for k in range(12):
            near = 6.0 * k + 2.0 - self.travelled % 6.0
            if near < 1.5:
                continue
            for x in (-LANE / 2, LANE / 2):
                line = [(x - 0.1, near), (x + 0.1, near), (x + 0.1, near + 2.5), (x - 0.1, near + 2.5)]
                draw.polygon([self._project(a, 0, z) for a, z in line], fill=(225, 225, 215))
            if k % 2:
                for x in (-8, 8):
                    top, foot = self._project(x, 2.5, near), self._project(x, 0, near)
                    draw.line([top, foot], fill=(120, 110, 100), width=max(1, int(20 / near)))

    def _draw_car(self, draw: ImageDraw.ImageDraw, car: Car) -> None:
        width, height = CAR

        def box(left: float, right: float, bottom: float, top: float, fill: tuple[int, int, int]) -> None:
            corners = []
            for x, y in ((left, bottom), (right, bottom), (right, top), (left, top)):
                y -= height / 2
                turned = (x * math.cos(car.angle) - y * math.sin(car.angle)) * width / 2
                lifted = x * math.sin(car.angle) * width / 2 + y * math.cos(car.angle) + height / 2
                corners.append(self._project(car.x + turned, max(lifted, 0.0), car.z))
            draw.polygon(corners, fill=fill)

        lights = (255, 250, 200) if car.oncoming else (200, 30, 30)
        box(-1, 1, 0.2, 1.0, car.colour)
        box(-0.75, 0.75, 1.0, 1.5, tuple(v // 2 for v in car.colour))
        box(-0.6, 0.6, 1.05, 1.4, (40, 50, 60))
        for left in (-0.95, 0.6):
            box(left, left + 0.35, 0.0, 0.25, (20, 20, 20))
            box(left, left + 0.35, 0.65, 0.85, lights)

    def _draw_wreckage(self, draw: ImageDraw.ImageDraw, age: int) -> None:
        x, z = self.impact
        for k, (dx, dy) in enumerate(self.smoke):
            radius = 0.2 + 0.12 * min(age, 6)
            cx, cy = x + dx * (1 + 0.2 * age), 1.0 + abs(dy) + 0.08 * age
            left, top = self._project(cx - radius, cy + radius, z)
            right, bottom = self._project(cx + radius, cy - radius, z)
            shade = 150 + 8 * k
            draw.ellipse([left, top, right, bottom], fill=(shade, shade, shade))
        for k, (vx, vy, vz) in enumerate(self.debris):
            flown = min(age, 7) + 1
            y = max(0.8 + (abs(vy) + 0.1) * flown - 0.03 * flown**2, 0.02)
            cx, cy = self._project(x + vx * flown, y, max(z + vz * flown, 3.0))
            r = 0.05 * self.width / z
            draw.rectangle([cx - r, cy - r, cx + r, cy + r], fill=(255, 170, 40) if k % 3 else (250, 250, 250))


def render_clip(frames_dir: Path, scene: Scene, *, packed: bool, name: str = "{:06d}.jpg", first: int = 0) -> None:
    """Write the frames of a scene as frames_dir/images.zip, or as files in frames_dir/images/, numbered from first."""
    frames_dir.mkdir(parents=True)
    encoded = {}
    for t in range(scene.num_frames):
        buffer = io.BytesIO()
        scene.frame(t).save(buffer, "PNG" if name.endswith(".png") else "JPEG", quality=90)
        encoded[name.format(first + t)] = buffer.getvalue()
    if packed:
        with zipfile.ZipFile(frames_dir / "images.zip", "w") as z:
            for file, data in encoded.items():
                z.writestr(file, data)
    else:
        (frames_dir / "images").mkdir()
        for file, data in encoded.items():
            (frames_dir / "images" / file).write_bytes(data)


def annotation(name: str, scene: Scene) -> dict:
    """Return the content of dataset/annotations/<clip>.json."""
    accident = KINDS[scene.kind]
    rows = [
        {
            "frame_id": t,
            "image_path": f"frames/{name}/images/{t:06d}.jpg",
            "accident_id": accident if anomalous else 0,
            "accident_name": scene.kind if anomalous else "normal",
            "objects": [],
        }
        for t, anomalous in enumerate(scene.labels())
    ]
    return {
        "video_name": name,
        "num_frames": scene.num_frames,
        "anomaly_start": scene.start,
        "anomaly_end": scene.end,
        "accident_id": accident,
        "accident_name": scene.kind,
        "ego_involve": scene.kind == "oncoming",
        "night": scene.night,
        "labels": rows,
    }


def render_dota(
    root: str | Path, *, train: int, val: int, seed: int = 0, size: tuple[int, int] = (160, 90), packed: bool = True
) -> None:
    """Render train + val clips under `root`, with splits, metadata and annotations. size: (width, height) in pixels.

    Raises FileExistsError where root/dataset exists.
    """
    root = Path(root)
    (root / "dataset" / "annotations").mkdir(parents=True)
    for subset, count in (("train", train), ("val", val)):
        names, metadata = [], {}
        for i in range(count):
            scene = Scene(np.random.default_rng([seed, subset == "val", i]), size)
            name = f"synthetic{subset[:2]}_{i:06d}"
            names.append(name)
            involved = "ego" if scene.kind == "oncoming" else "other"
            metadata[name] = {
                "video_start": 0,
                "video_end": scene.num_frames - 1,
                "anomaly_start": scene.start,
                "anomaly_end": scene.end,
                "anomaly_class": f"{involved}: {scene.kind}",
                "num_frames": scene.num_frames,
                "subset": subset,
                "recording": name,  # each scene is a road of its own
            }
            (root / "dataset" / "annotations" / f"{name}.json").write_text(json.dumps(annotation(name, scene)))
            render_clip(root / "frames" / name, scene, packed=packed)
        (root / "dataset" / f"metadata_{subset}.json").write_text(json.dumps(metadata))
        (root / "dataset" / f"{subset}_split.txt").write_text("".join(f"{name}\n" for name in names))
        if subset == "train":
            (root / "dataset" / "half_train_split.txt").write_text("".join(f"{name}\n" for name in names[::2]))


def render_videos(folder: str | Path, *, count: int, seed: int = 0, size: tuple[int, int] = (160, 90)) -> None:
    """Write count unlabelled H.264 videos, folder/000000.mp4, ..., at 30 fps: each frame of a scene three times.

    size: (width, height) in pixels, even. Raises ImportError without PyAV, FileExistsError where the folder exists.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    for i in range(count):
        scene = Scene(np.random.default_rng([seed, 2, i]), size)
        pictures = (np.asarray(scene.frame(t)) for t in range(scene.num_frames))
        repeated = (picture for picture in pictures for _ in range(VIDEO_FPS // FPS))
        write_video(folder / f"{i:06d}.mp4", repeated, size=size, fps=VIDEO_FPS, crf="18", threads="1")


def write_video(path: Path, pictures: Iterable[np.ndarray], *, size: tuple[int, int], fps: int, **options: str) -> None:
    """Write pictures, uint8 (H, W, 3) of even size (W, H), as an H.264 video. Raises ImportError without PyAV.

    The suffix of path, mp4, mov or ts, tells the container; options are those of libx264.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix[1:].lower()
    with av.open(str(path), "w", format={"ts": "mpegts"}.get(suffix, suffix)) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Run the command line."""
    parser = Parser(__doc__)
    parser.add_argument("root", help="folder to create; must not hold a data set yet")
    parser.add_argument("--train", type=natural, default=48, help="training clips (default: 48)")
    parser.add_argument("--val", type=natural, default=16, help="validation clips (default: 16)")
    parser.add_argument("--videos", type=natural, default=0, help="unlabelled videos, in ROOT/videos (default: 0)")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the scenes (default: 0)")
    help = "frame width, 32 to 4096; the height follows, 16:9 (default: 160)"
    parser.add_argument("--width", type=from_to(32, 4096), default=160, help=help)
    parser.add_argument("--folders", action="store_true", help="frames as files in folders instead of zips")
    args = parser.parse_args()
    size = (args.width, args.width * 9 // 32 * 2)  # even, for H.264
    try:
        render_dota(args.root, train=args.train, val=args.val, seed=args.seed, size=size, packed=not args.folders)
        if args.videos:
            render_videos(Path(args.root, "videos"), count=args.videos, seed=args.seed, size=size)
    except FileExistsError as e:
        parser.error(f"{e.filename} exists already; remove it or choose another folder")
    except OSError as e:
        sys.exit(f"error: {e.filename or args.root}: {e.strerror}")
    except ImportError as e:
        parser.error(f"--videos needs PyAV ({e}): pip install av")
    counts = f"{args.train} training and {args.val} validation clips and {args.videos} videos"
    print(f"{counts} of {size[0]} x {size[1]} pixels in {args.root}")


if __name__ == "__main__":
    main()
