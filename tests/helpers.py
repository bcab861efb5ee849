"""What several tests need: the recipe of the golden checkpoints, commands run as a user would run them."""

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import cut_video
from datasets.tools import synthetic
from engine.checkpoint import RunState
from engine.guard import NonFinite
from engine.session import Session
from utils.distributed import Process
from utils.logging import TensorBoard

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
    return complete([*launcher, *command], timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))


def complete(words: Sequence, *, timeout: float, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run a command at the repository's root to its end, as subprocess.run does, for one that starts others.

    Too late, all of its processes are killed: one that is left would hold the pipes open, and this would wait for ever.
    """
    words, pipes = [str(word) for word in words], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, env=env, text=True, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            for pid in reversed(tree(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def tree(pid: int) -> list[int]:
    """Process ids of a process and everything below it, parents first."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def load_weights(path) -> dict[str, torch.Tensor]:
    """The state dict in one of our weights files."""
    return torch.load(path, weights_only=True)["model"]


ALONE = Process(0, 0, 1, torch.device("cpu"))


def window_of(dataset, key):
    """What a WindowDataset makes of a key: a Fault, or its sample with "video" uint8 (V, T, H, W, 3)."""
    out = torch.zeros(dataset.shape, dtype=torch.uint8)
    sample = dataset.fill(key, out)
    return sample | {"video": out} if isinstance(sample, dict) else sample


class AsRead:
    """Stands for an augmentation: hands over the frames of a window as they are read, in their size."""

    def __init__(self, height: int, width: int):
        self.size = height, width

    def shape(self, frames: int) -> tuple[int, ...]:
        return 1, frames, *self.size, 3

    def __call__(self, read, rng, out, *, aspect=None) -> dict:
        for frame, place in zip(read(None), out[0], strict=True):
            place.copy_(frame)
        return {}


def session(optimization, progress, *, guard=None, output_dir=Path(os.devnull), **options) -> Session:
    """A run of one process, which keeps no state and, unless epochs end, writes no files."""
    state = RunState(None, optimization, progress)
    options = {"save_ckpt": False} | options
    return Session(output_dir, state, ALONE, TensorBoard(None), guard or NonFinite(progress), **options)


def write_video(path: Path, *, frames: int, fps: int, size: tuple[int, int] = (64, 48)) -> None:
    """Write an H.264 video of moving bars; frame i is brighter than frame i - 1. size: (width, height)."""

    def picture(i):
        pixels = np.full((size[1], size[0], 3), 4 * i % 200, dtype=np.uint8)
        pixels[:, (3 * i) % size[0] :][:, :8] = 255
        return pixels

    synthetic.write_video(path, map(picture, range(frames)), size=size, fps=fps)


def render_small(root: Path) -> Path:
    """Make a small synthetic data set in DoTA's layout: 8 training and 5 validation clips of 96 x 54 pixels, zipped."""
    synthetic.render_dota(root, train=8, val=5, seed=1, size=(96, 54))
    return root


def make_data(root: Path) -> Path:
    """Make dota, the data of `render_small` with two broken frames in a training clip, and videos, a folder of them."""
    render_small(root / "dota")
    path = root / "dota" / "frames" / "synthetictr_000003" / "images.zip"
    with zipfile.ZipFile(path) as z:
        frames = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for i, (name, content) in enumerate(frames.items()):
            z.writestr(name, content if i not in (20, 30) else b"no picture")
    for i in range(2):
        write_video(root / "videos" / f"{i}.mp4", frames=60, fps=10)
    return root


cut_dota = partial(cut_video.cut_dota, DRIVING)


def rewrite_zip(path, *, drop=(), add=None) -> None:
    """Write a zip anew without the members `drop`, and with members {new name: name of the one it copies}."""
    with zipfile.ZipFile(path) as z:
        content = {name: z.read(name) for name in z.namelist()}
    content |= {new: content[name] for new, name in (add or {}).items()}
    with zipfile.ZipFile(path, "w") as z:
        for name in sorted(content.keys() - set(drop)):
            z.writestr(name, content[name])
