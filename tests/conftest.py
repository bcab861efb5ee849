import os
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import write_video

from datasets.tools.synthetic import render_dota


@pytest.fixture(scope="session")
def dota_root(tmp_path_factory):
    """A small synthetic data set in DoTA's layout: 8 training and 5 validation clips of 96 x 54 pixels, zipped."""
    root = tmp_path_factory.mktemp("dota")
    render_dota(root, train=8, val=5, seed=1, size=(96, 54))
    return root


@pytest.fixture(scope="session")
def data(dota_root, tmp_path_factory):
    """DoTA with two broken frames in a training clip, and a folder of videos."""
    root = tmp_path_factory.mktemp("survival")
    shutil.copytree(dota_root, root / "dota")
    path = root / "dota" / "frames" / "synthetictr_000003" / "images.zip"
    with zipfile.ZipFile(path) as z:
        frames = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for i, (name, content) in enumerate(frames.items()):
            z.writestr(name, content if i not in (20, 30) else b"no picture")
    for i in range(2):
        write_video(root / "videos" / f"{i}.mp4", frames=60, fps=10)
    return root


@pytest.fixture
def as_nobody():
    """A folder, and a context in which this process, root in a container, is held to permissions as a user is."""

    @contextmanager
    def drop():
        own = os.geteuid()
        if own == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(own)

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder), drop
