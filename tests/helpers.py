"""What several tests need: the recipe of the golden checkpoints, commands run as a user would run them."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.clips import Clip
from datasets.readers import VideoReader
from engine.averages import Averages
from engine.guard import NonFinite
from engine.session import Session
from utils.distributed import Agreement, Process
from utils.logging import TensorBoard
from utils.signals import Preemption

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real data beside the checkout; tests that need it skip where it is absent
DRIVING = SHARED / "data" / "driving" / "solidWhiteRight.mp4"
NORM_WEIGHT = re.compile(r"(^|\.)[A-Za-z_]*norm\d*\.weight$")


def golden(name: str):
    """Content of tests/golden/<name>.json."""
    return json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())


def recipe(key: str, shape) -> torch.Tensor:
    """The golden weights of a state-dict key: normal(0, 0.02) seeded by the key, around 1 for norm weights."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape)) * 0.02
    return torch.from_numpy((values + bool(NORM_WEIGHT.search(key))).astype(np.float32))


def other_recipe(key: str, shape, *, scale: float = 0.02) -> torch.Tensor:
    """The weights of models_other.json; its variants called strong have scale 0.05."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape)) * scale
    ones = (key.endswith(".weight") and len(shape) == 1) or key.endswith("/scale")
    return torch.from_numpy((values + (ones or (scale == 0.05 and key.endswith(".gamma")))).astype(np.float32))


def other_input(fixture: dict) -> torch.Tensor:
    """The input of a fixture of models_other.json."""
    video = np.random.Generator(np.random.PCG64(0)).standard_normal(fixture["input_shape"])
    return torch.from_numpy(video.astype(np.float32))


def fill_head(model: torch.nn.Module, keys, fill) -> None:
    """Set the tensors of these keys to fill(key, shape)."""
    with torch.no_grad():
        for key in keys:
            model.state_dict()[key].copy_(fill(key, model.state_dict()[key].shape))


def golden_input() -> torch.Tensor:
    """(1, 3, 16, 224, 224), treated as normalised already."""
    rng = np.random.Generator(np.random.PCG64(0))
    return torch.from_numpy(rng.standard_normal((1, 3, 16, 224, 224)).astype(np.float32))


def published_file(path: Path, fixture: dict) -> Path:
    """Write the checkpoint of a golden fixture with its authentic keys and nesting."""
    checkpoint = fixture["checkpoint"]
    state = {key: recipe(key, shape) for key, shape in checkpoint["keys"]}
    top = checkpoint["top_level_key"]
    torch.save({top: state, "epoch": 1} if top else state, path)
    return path


def run(
    *command: str, processes: int = 0, timeout: float = 300, env: dict | None = None
) -> subprocess.CompletedProcess:
    """Run a script of the repository with this Python, under torchrun where processes > 0."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        launcher + [str(c) for c in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def session(progress, *, guard=None, save=None, log_file=None) -> Session:
    """A run of one process without files."""
    vote = Agreement(Process(0, 0, 1, torch.device("cpu")), questions=2)
    preemption = Preemption(os.devnull, vote, save, is_main=True, save_every_minutes=None)
    return Session(progress, Averages(), TensorBoard(None), guard or NonFinite(progress), preemption, log_file)


def write_video(path: Path, *, frames: int, fps: int, size: tuple[int, int] = (64, 48)) -> None:
    """Write an H.264 video of moving bars; frame i is brighter than frame i - 1. size: (width, height)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mov" if path.suffix == ".mov" else "mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 4 * i % 200, dtype=np.uint8)
            pixels[:, (3 * i) % size[0] :][:, :8] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def cut_dota(root, *, clips, frames, size=(1280, 720), quality=92):
    """Cut DRIVING (25 fps) into clips at 10 fps: zips of JPEG, every second clip "anomalous" in its second half."""
    (root / "dataset" / "annotations").mkdir(parents=True)
    names = [f"solidWhiteRi_{i * frames:06d}" for i in range(clips)]
    for i, name in enumerate(names):
        source = [round((i * frames + t) * 25 / 10) for t in range(frames)]
        (root / "frames" / name).mkdir(parents=True)
        reader = VideoReader(Clip("video", str(DRIVING), 221, 25.0), str(DRIVING))
        with zipfile.ZipFile(root / "frames" / name / "images.zip", "w") as z:
            for t, frame in enumerate(reader.read(source)):
                data = io.BytesIO()
                Image.fromarray(frame.numpy()).resize(size).save(data, "JPEG", quality=quality)
                z.writestr(f"{t:06d}.jpg", data.getvalue())
        rows = [
            {"image_path": f"frames/{name}/images/{t:06d}.jpg", "accident_id": 3 * (i % 2 and t >= frames - 3)}
            for t in range(frames)
        ]
        annotation = {"labels": rows, "ego_involve": False, "night": False, "accident_id": 3}
        (root / "dataset" / "annotations" / f"{name}.json").write_text(json.dumps(annotation))
    for split, own in (("train", names[:-2]), ("val", names[-2:])):
        (root / "dataset" / f"{split}_split.txt").write_text("\n".join(own) + "\n")


def rewrite_zip(path, *, drop=(), add=None) -> None:
    """Write a zip anew without the members `drop`, and with members {new name: name of the one it copies}."""
    with zipfile.ZipFile(path) as z:
        content = {name: z.read(name) for name in z.namelist()}
    content |= {new: content[name] for new, name in (add or {}).items()}
    with zipfile.ZipFile(path, "w") as z:
        for name in sorted(content.keys() - set(drop)):
            z.writestr(name, content[name])
