"""`pip install -e .` gives commands that run the scripts of the checkout, from any folder."""

import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from helpers import ROOT

SCRIPTS = {"tad-predict": "run_predict.py", "tad-finetune": "run_finetune.py", "tad-dapt": "run_dapt.py"}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The folder of the commands of a checkout, installed without a network into an environment of its own."""
    checkout, env = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("env")
    for name in ("tad.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", *SCRIPTS.values()):
        shutil.copy(ROOT / name, checkout)  # installing writes beside them
    for name in ("datasets", "engine", "models", "utils"):
        (checkout / name).symlink_to(ROOT / name)
    venv.create(env, symlinks=True)
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [env / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    done = subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", checkout], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return env / "bin"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder whose own packages are called as those of the checkout, with a torch that must not be imported."""
    for name in ("datasets", "engine", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    return tmp_path


def answer(words, folder):
    return subprocess.run(words, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_is_its_script(commands, command, elsewhere):
    same, own = (answer(words, elsewhere) for words in (
        [commands / command, "--help"], [sys.executable, ROOT / SCRIPTS[command], "--help"]
    ))  # fmt: skip
    assert (same.returncode, same.stdout) == (0, own.stdout) and "what most runs need" in own.stdout
    refused = answer([commands / command, "--color_jitter"], elsewhere)
    assert refused.returncode == 2 and "--color_jitter" in refused.stderr and not refused.stdout


def test_the_report_is_a_command(commands, elsewhere):
    (elsewhere / "torch.py").unlink()
    assert "predictions.csv" in answer([commands / "tad-report", "--help"], elsewhere).stdout
    refused = answer([commands / "tad-report", "nothing"], elsewhere)
    assert refused.returncode == 1 and refused.stderr.startswith("error: nothing: cannot be read")


def test_a_command_without_its_checkout_says_so(tmp_path):
    shutil.copy(ROOT / "tad.py", tmp_path)
    done = answer([sys.executable, "-c", "import tad; tad.dapt()"], tmp_path)
    remedy = "no such file; install the checkout where it lies, with pip install -e"
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path}/run_dapt.py: {remedy}\n"
