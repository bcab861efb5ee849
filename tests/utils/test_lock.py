"""One run in a folder: real processes hold it, are killed, and try to get it. None of them needs torch."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from utils import lock
from utils.cli import ConfigError
from utils.lock import folder_lock

HOLD = """
import os, sys
from utils import lock
lock._ENDING, lock._TOUCHED_EVERY = 0.5, 0.1
try:
    with lock.folder_lock(sys.argv[1]):
        child = os.fork() if "fork" in sys.argv else 1
        if child:
            print("held", flush=True)
        sys.stdin.read()
except lock.ConfigError as e:
    print(e, flush=True)
"""


class Holder:
    """A process that holds a folder, if it gets it, until it is told to end; what it said first is `said`."""

    def __init__(self, folder, *more):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *more], cwd=ROOT, **pipes)

    @property
    def said(self):
        return self.process.stdout.readline().strip()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def take(folder):
    with folder_lock(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """Starts Holders of tmp_path / "run", which end with the test. This process is less patient than usual."""
    monkeypatch.setattr(lock, "_ENDING", 1.0)
    holders = []

    def start(*more):
        holders.append(Holder(tmp_path / "run", *more))
        return holders[-1]

    yield start
    for holder in holders:
        holder.process.stdin.close()
        holder.kill()


@pytest.fixture(params=["with locks", "without"])
def file_system(request, monkeypatch):
    """A file system with POSIX locks and one without; of other processes, which lock all the same."""
    if request.param == "without":

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "lockf", refuse)


def test_a_folder_in_use_is_refused_by_the_name_of_its_run(tmp_path, hold, file_system):
    holder = hold()
    assert holder.said == "held"
    since = json.loads((tmp_path / "run" / ".lock").read_text())["since"]
    with pytest.raises(ConfigError) as refused:
        take(tmp_path / "run")
    assert (
        f"run is in use by the run of process {holder.process.pid} on {os.uname().nodename} since {since}: wait"
        in str(refused.value)
    )
    holder.process.stdin.close()
    holder.process.wait()
    take(tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing was written


def test_what_a_killed_run_leaves_is_taken_over_at_once(tmp_path, hold, file_system):
    """Even while a process that it had forked lives on with all its open files."""
    holder = hold("fork")
    assert holder.said == "held"
    holder.kill()
    assert (tmp_path / "run" / ".lock").exists()
    take(tmp_path / "run")


def test_of_many_at_once_one_gets_it(hold):
    said = [holder.said for holder in [hold() for _ in range(5)]]
    assert said.count("held") == 1
    assert sum("is in use by the run of process" in text for text in said) == 4


def leave(folder, **changes):
    """Write the lock file of another process."""
    folder.mkdir()
    content = {"host": "far", "pid": os.getppid(), "since": "2026-01-01 10:00:00", "machine": "far", "started": 1}
    (folder / ".lock").write_text(json.dumps(content | changes))
    return folder / ".lock"


def test_a_process_id_that_is_used_again_is_another_process(tmp_path, monkeypatch, file_system):
    leave(tmp_path / "run", machine=lock._machine())
    take(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"pid": "x"}', "\0" * 300])
def test_a_lock_file_that_says_nothing_holds_nothing(tmp_path, content):
    leave(tmp_path / "run").write_text(content)
    take(tmp_path / "run")


def test_a_run_on_another_host_is_known_by_its_signs_of_life(tmp_path, monkeypatch):
    path = leave(tmp_path / "run")
    toucher = f"import os, time\nwhile True: os.utime({str(path)!r}); time.sleep(0.1)"
    with subprocess.Popen([sys.executable, "-c", toucher]) as alive:
        with pytest.raises(ConfigError, match="in use by the run of process .* on far since 2026-01-01 10:00:00"):
            take(tmp_path / "run")
        alive.kill()
    monkeypatch.setattr(lock, "_STALE", 3.0)
    os.utime(path)
    started = time.monotonic()
    with folder_lock(tmp_path / "run"):
        assert time.monotonic() - started >= 2


def test_a_run_on_another_host_without_a_sign_for_long_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("it waits"))
    os.utime(leave(tmp_path / "run"), (1, 1))
    take(tmp_path / "run")


@pytest.mark.parametrize("anew", [False, True])
def test_a_run_whose_folder_is_taken_over_ends(tmp_path, hold, anew):
    """As it may be where it was suspended, or its lock file was removed, and locks are not seen on other hosts."""
    holder = hold()
    assert holder.said == "held"
    path = tmp_path / "run" / ".lock"
    if anew:
        path.unlink()
    path.write_text(json.dumps({"host": "far", "pid": 7, "since": "now"}))
    assert holder.process.wait(60) == 1
    assert f"error: {tmp_path}/run was taken over by another run; leaving at once" in holder.process.stderr.read()
    assert path.exists()


def test_a_folder_is_free_after_an_error_and_one_that_cannot_be_written_is_named(tmp_path, as_nobody):
    with pytest.raises(KeyError), folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
        raise KeyError
    assert os.listdir(tmp_path / "a") == ["file"]
    folder, drop = as_nobody
    with drop(), pytest.raises(ConfigError, match="run: cannot be written .Permission denied.; choose another"):
        take(folder / "run")


def test_a_disk_that_fails_at_the_end_hides_no_error(tmp_path, monkeypatch):
    """As one that is mounted read-only when the first write fails: what failed is heard."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch, pytest.raises(KeyError), folder_lock(tmp_path / "run"):
        patch.setattr("pathlib.Path.unlink", refuse)
        raise KeyError
    assert (tmp_path / "run" / ".lock").exists()
