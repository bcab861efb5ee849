"""Data sets for the benchmarks: clips of a road as zips of JPEGs, as an H.264 video, and packs of both."""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from datasets.tools.pack import Settings, pack
from datasets.tools.synthetic import VIDEO_FPS, Scene, annotation, write_video
from datasets.video import Video


@dataclass(frozen=True)
class Recipe:
    """What is made.

    video: a file whose pictures are enlarged or shrunk to `size`; "": roads are rendered.
    size: (width, height) of the pictures.
    clips: zips, in DoTA's layout.
    clip_frames: pictures of each.
    video_frames: pictures of the video, at 30 per second; zips take theirs from among these.
    """

    video: str = ""
    size: tuple[int, int] = (1280, 720)
    clips: int = 4
    clip_frames: int = 100
    video_frames: int = 221


@dataclass(frozen=True)
class _Recorded:
    """What an annotation tells of a clip."""

    num_frames: int
    kind: str = "lateral"
    night: bool = False

    @property
    def start(self) -> int:
        return self.num_frames // 3

    @property
    def end(self) -> int:
        return 2 * self.num_frames // 3

    def labels(self) -> list[bool]:
        return [self.start <= t < self.end for t in range(self.num_frames)]


def make(root: Path, recipe: Recipe) -> dict[str, str]:
    """Make the data sets below root, unless they are there; return their roots by name.

    These are "zips" (DoTA), "pack" of them with a short side of 320 and "squashed", 224 x 320; "mp4" (videos) and its
    "dapt_pack" and "dapt_squashed", 320 x 320, at 10 frames per second. Raises DataError where a pack of other data is
    in the way.
    """
    done = root / "recipe.json"
    text = json.dumps(asdict(recipe))
    if not done.is_file() or done.read_text() != text:
        root.mkdir(parents=True, exist_ok=True)
        pictures = list(islice(_pictures(recipe), recipe.video_frames))
        _write_zips(root / "zips", pictures, recipe)
        options = {"crf": "23", "g": "30", "threads": "1"}  # else as x264 has it: with B frames
        write_video(root / "mp4" / "road.mp4", pictures, size=recipe.size, fps=VIDEO_FPS, **options)
    roots = {"zips": "DoTA", "mp4": "videos"}
    packs = [("pack", "zips", 0), ("squashed", "zips", 224), ("dapt_pack", "mp4", 0), ("dapt_squashed", "mp4", 320)]
    for name, original, width in packs:
        pack(roots[original], str(root / original), root / name, settings=Settings(320, 10, 92, width))
        roots[name] = roots[original]
    done.write_text(text)
    return {name: str(root / name) for name in roots}


def _pictures(recipe: Recipe) -> Iterator[np.ndarray]:
    """Yield pictures, uint8 (H, W, 3), without end; a video that is too short begins again."""
    scenes = 0
    while True:
        if recipe.video:
            video = Video(recipe.video)
            for frame in video.frames(range(len(video))):
                yield cv2.resize(frame.numpy(), recipe.size, interpolation=cv2.INTER_CUBIC)
            video.close()
        else:
            scene = Scene(np.random.default_rng(scenes), recipe.size)
            yield from (np.asarray(scene.frame(t)) for t in range(scene.num_frames))
            scenes += 1


def _write_zips(root: Path, pictures: list[np.ndarray], recipe: Recipe) -> None:
    """Write clips in DoTA's layout; they overlap where there are too few pictures."""
    (root / "dataset" / "annotations").mkdir(parents=True, exist_ok=True)
    firsts = np.linspace(0, len(pictures) - recipe.clip_frames, recipe.clips).astype(int)
    names = [f"road_{number:06d}" for number in range(recipe.clips)]
    for name, first in zip(names, firsts, strict=True):
        folder = root / "frames" / name
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "images.zip", "w") as z:
            for t, picture in enumerate(pictures[first : first + recipe.clip_frames]):
                data = io.BytesIO()
                Image.fromarray(picture).save(data, "JPEG", quality=92)
                z.writestr(f"{t:06d}.jpg", data.getvalue())
        about = annotation(name, _Recorded(recipe.clip_frames))
        (root / "dataset" / "annotations" / f"{name}.json").write_text(json.dumps(about))
    for split, share in (("train", names[:-1]), ("val", names[-1:])):
        (root / "dataset" / f"{split}_split.txt").write_text("".join(f"{name}\n" for name in share))
