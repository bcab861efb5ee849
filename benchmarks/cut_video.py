"""Cut a real video into a data set for benchmarks/packing.py and packed_scores.py, at 1280x720.

    python -m benchmarks.cut_video VIDEO build/cut

VIDEO has 25 frames per second and at least 219 frames. ROOT gets DoTA's layout: 4 clips of 22 frames at 10 fps, zips
of JPEG at quality 92, the last 3 frames of every second one "anomalous". ROOT/videos/cut.mp4 gets all frames as H.264
(crf 23), declared to be 30 fps, with a key frame every second.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.tools.synthetic import write_video
from datasets.video import Video

SIZE = (1280, 720)


def cut_dota(video: Path, root: Path, *, clips: int, frames: int) -> None:
    """Cut a video of 25 fps into clips at 10 fps in DoTA's layout, the last 2 of them for validation.

    Their pictures are zips of JPEG; in every second clip the last 3 frames are "anomalous".
    """
    (root / "dataset" / "annotations").mkdir(parents=True)
    names = [f"solidWhiteRi_{i * frames:06d}" for i in range(clips)]
    for i, name in enumerate(names):
        (root / "frames" / name).mkdir(parents=True)
        pictures = Video(str(video)).read([round((i * frames + t) * 25 / 10) for t in range(frames)])
        with zipfile.ZipFile(root / "frames" / name / "images.zip", "w") as z:
            for t, picture in enumerate(pictures):
                data = io.BytesIO()
                Image.fromarray(picture.numpy()).resize(SIZE).save(data, "JPEG", quality=92)
                z.writestr(f"{t:06d}.jpg", data.getvalue())
        rows = [
            {"image_path": f"frames/{name}/images/{t:06d}.jpg", "accident_id": 3 * (i % 2 and t >= frames - 3)}
            for t in range(frames)
        ]
        annotation = {"labels": rows, "ego_involve": False, "night": False, "accident_id": 3}
        (root / "dataset" / "annotations" / f"{name}.json").write_text(json.dumps(annotation))
    for split, part in (("train", names[:-2]), ("val", names[-2:])):
        (root / "dataset" / f"{split}_split.txt").write_text("\n".join(part) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="video file to cut")
    parser.add_argument("root", type=Path, help="folder to make")
    args = parser.parse_args()
    cut_dota(args.video, args.root, clips=4, frames=22)
    video = Video(str(args.video))
    pictures = (np.asarray(Image.fromarray(video.read([i])[0].numpy()).resize(SIZE)) for i in range(len(video)))
    write_video(args.root / "videos" / "cut.mp4", pictures, size=SIZE, fps=30, crf="23", g="30")


if __name__ == "__main__":
    main()
