"""Cut the real clip of the tests for benchmarks/packing.py and packed_scores.py, at 1280x720.

    python benchmarks/cut_video.py build/cut

ROOT in DoTA's layout: 4 clips of 22 frames at 10 fps, zips of JPEG at quality 92, the last 3 frames of every second one
"anomalous". ROOT/videos/cut.mp4: all 221 frames as H.264 (crf 23), declared to be 30 fps, a key frame every second.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import av
import numpy as np
from helpers import DRIVING, cut_dota
from PIL import Image

from datasets.clips import Clip
from datasets.readers import VideoReader

SIZE, FRAMES = (1280, 720), 221


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to make")
    root = parser.parse_args().root
    cut_dota(root, clips=4, frames=22, size=SIZE)
    (root / "videos").mkdir()
    reader = VideoReader(Clip("driving", str(DRIVING), FRAMES, 25.0), str(DRIVING))
    with av.open(str(root / "videos" / "cut.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23", "g": "30"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(FRAMES):
            pixels = np.asarray(Image.fromarray(reader.read([i])[0].numpy()).resize(SIZE))
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


if __name__ == "__main__":
    main()
