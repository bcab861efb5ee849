"""How commands fail: one line, whatever is wrong, alone and under torchrun."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run

from utils.exits import explain

BAD_PATH = ["run_finetune.py", "--data_set", "DoTA", "--data_path", "/nowhere", "--device", "cpu", "--output_dir"]
CAUSE = "error: /nowhere/dataset/train_split.txt: split file not found"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModuleNotFoundError("No module", name="cv2.dnn"),
         "error: the package opencv-python-headless is missing: pip install -r requirements.txt"),
        (ModuleNotFoundError("No module", name="xlrd"), "error: the package xlrd is missing: pip install xlrd"),
        (ImportError("libGL.so.1: cannot open"), "error: libGL.so.1: cannot open: pip install -r requirements.txt"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.csv"), "error: a.csv: Disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only file system", b"a\xff"), "error: a\udcff: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (ModuleNotFoundError("No module named 'engine.nothing'", name="engine.nothing"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), None),
        (RuntimeError("operator torchvision::nms does not exist"),
         "error: torchvision is not of this torch (operator torchvision::nms does not exist): pip install both anew, "
         "from one place"),
        (KeyError("bug"), None),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_said_in_a_line(error, line):
    assert explain(error) == line


@pytest.fixture
def without(tmp_path):
    """An environment in which a package is missing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == os.environ['MISSING']:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return lambda package: {"PYTHONPATH": str(tmp_path), "MISSING": package}


@pytest.mark.parametrize(
    ("package", "name", "command"),
    [
        ("torch", "torch", ["run_finetune.py", "--data_path", ".", "--output_dir", "."]),
        ("torch", "torch", ["run_dapt.py", "--data_set", "videos", "--data_path", ".", "--output_dir", "."]),
        ("cv2", "opencv-python-headless", ["-m", "datasets.tools.check", "DoTA", "."]),
        ("torch", "torch", ["-m", "datasets.tools.synthetic", "."]),
        ("torch", "torch", ["-m", "models.weights", "a.pth"]),
        ("numpy", "numpy", ["-m", "benchmarks.data"]),
        ("numpy", "numpy", ["-c", "import tad; tad.report()", "scores.csv"]),
        ("msgpack", "msgpack", ["other_models/ViViT/ckpt_vivit.py", "a", "b"]),
    ],
)
def test_a_missing_package_is_named(without, package, name, command):
    done = run(*command, env=without(package))
    assert done.stderr == f"error: the package {name} is missing: pip install -r requirements.txt\n"
    assert done.returncode == 1 and not done.stdout


def said_once_at_the_end(output, cause):
    """Whether a cause stands once in what a torchrun printed, in its last lines."""
    return output.count(cause) == 1 and any(cause in line for line in output.splitlines()[-3:])


@pytest.mark.slow
def test_under_torchrun_the_cause_is_said_once_and_last(without, tmp_path):
    done = run(*BAD_PATH, tmp_path / "run", processes=2)
    assert said_once_at_the_end(done.stdout + done.stderr, CAUSE), done.stderr
    done = run(*BAD_PATH, tmp_path / "run", processes=2, env=without("timm"))
    cause = "error: the package timm is missing: pip install -r requirements.txt"
    assert said_once_at_the_end(done.stdout + done.stderr, cause), done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    done = run(*BAD_PATH, tmp_path / "run", "--bogus", 1, processes=2)
    assert said_once_at_the_end(done.stdout + done.stderr, "error: unknown flag --bogus"), done.stderr


RANKS = """
import os, signal, sys, time
from datetime import timedelta
from utils.cli import ConfigError
from utils.distributed import barrier, process_group
from utils.exits import report_uncaught
from utils.signals import catch_signals, stop_requested
report_uncaught()
catch_signals()
with process_group("cpu", timeout=timedelta(minutes=1), expected=(ConfigError,)) as process:
    barrier()
    if sys.argv[1] == "own" and process.rank == 1:
        raise ConfigError("of rank 1 alone")
    if sys.argv[1] == "bug":
        raise KeyError("a bug")
    if sys.argv[1] == "stopped":  # by Slurm, which ends torchrun too: it says nothing of errors then
        os.kill(os.getppid(), signal.SIGTERM)
        while not stop_requested():
            time.sleep(0.01)
        raise ConfigError("while it saved")
    if sys.argv[1] == "killed" and process.rank == 1:
        os.kill(os.getpid(), 9)
    barrier()
    barrier()
"""


@pytest.mark.slow
def test_what_follows_from_a_failure_is_not_said_beside_its_cause(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    outputs = {}
    for how in ("own", "bug", "killed", "stopped"):
        done = run(tmp_path / "ranks.py", how, processes=2, env={"PYTHONPATH": str(ROOT)})
        outputs[how] = done.stdout + done.stderr
        assert done.returncode == 1
    assert said_once_at_the_end(outputs["own"], "error: of rank 1 alone") and "lost the other" not in outputs["own"]
    assert outputs["bug"].count("KeyError: 'a bug'\n") == 1 and "ranks.py" in outputs["bug"]
    assert said_once_at_the_end(outputs["bug"], "KeyError: 'a bug' (its traceback stands above)")
    assert outputs["stopped"].count("error: while it saved") == 1
    assert outputs["killed"].count("error: lost the other processes: one has ended") == 1
    assert "Signal 9 (SIGKILL) received" in "".join(outputs["killed"].splitlines()[-3:])


def test_output_that_cannot_be_written_ends_nothing():
    script = (
        "import logging, os, sys\nfrom utils.exits import report_uncaught\nreport_uncaught()\n"
        "from utils.logging import progress_bar, setup_logging\nsetup_logging(0)\n"
        "for i in range(3): logging.getLogger('tad').info('line %d', i)\n"
        "assert list(progress_bar(range(3), description='')) == [0, 1, 2]\n"
        "assert os.open(os.devnull, os.O_RDONLY) >= 3\n"
    )
    command = f"{sys.executable} -c '{script.replace(chr(39), chr(34))}'"
    warning = "lines of the log are missing: they cannot be written ([Errno 28] No space left on device)\n"
    for redirection, stderr in ((">/dev/full", warning), (">&-", ""), (">/dev/full 2>&1", ""), (">&- 2>&-", "")):
        done = subprocess.run(["bash", "-c", f"{command} {redirection}"], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, stderr), redirection
    done = subprocess.run(["bash", "-c", f"{command} | true"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C of what keeps no state


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "datasets.tools.check", "DoTA", "ROOT", "--output_dir", "OUT"],
        ["-m", "datasets.tools.pack", "DoTA", "ROOT", "OUT", "--workers", "1"],
        ["run_finetune.py", "--eval", "--model", "vit_tiny_patch16_64", "--data_path", "ROOT", "--output_dir", "OUT",
         "--device", "cpu", "--eval_split", "train", "--num_workers", "1"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["imports", "works"])
def test_ctrl_c_ends_a_command_with_one_line(dota_root, tmp_path, command, when):
    """A terminal's, which goes to all processes of the group; work never ends: a clip's frames are a named pipe."""
    root = tmp_path / "dota"
    shutil.copytree(dota_root, root)
    pipe = root / "frames" / "synthetictr_000000" / "images.zip"
    pipe.unlink()
    os.mkfifo(pipe)
    places = {"ROOT": str(root), "OUT": str(tmp_path / "out")}
    words = [sys.executable, "-X", "importtime", *(places.get(word, word) for word in command)]
    log, deadline = tmp_path / "log", time.monotonic() + 100
    with log.open("w") as out, subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out, start_new_session=True) as run:
        while not (re.search(r"\| +torch\.", log.read_text()) if when == "imports" else opened(pipe)):
            assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == -signal.SIGINT
    said = [line for line in log.read_text().splitlines() if not line.startswith("import time:")]
    assert said[-1] == "interrupted" and not any("Traceback" in line or "Error" in line for line in said), said


def opened(pipe):
    """Whether a process waits for what a pipe brings; it goes on waiting, for this process holds the other end."""
    try:
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    return True


def test_the_second_ctrl_c_ends_a_command_at_once(tmp_path):
    script = (
        "import time\nfrom utils.exits import report_uncaught\nreport_uncaught()\n"
        "try:\n print('ready', flush=True)\n time.sleep(99)\nfinally:\n print('ready', flush=True)\n time.sleep(99)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) as run:
        for _ in range(2):
            assert run.stdout.readline() == "ready\n"
            time.sleep(0.6)  # sooner, it would count as the same
            run.send_signal(signal.SIGINT)
        assert run.wait(60) == -signal.SIGINT and run.stderr.read() == "interrupted\n"


@pytest.mark.parametrize("script", ["run_dapt.py", "run_finetune.py", "run_predict.py"])
def test_an_old_python_is_told_in_a_line(script):
    begin = f"import sys, runpy; sys.version_info = (3, 9, 18); sys.argv[0] = {script!r}; runpy.run_path({script!r})"
    done = subprocess.run([sys.executable, "-c", begin], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: Python 3.10 or newer is needed; this is 3.9.18\n")
