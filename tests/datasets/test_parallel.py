"""Reads that hang or die: the process that reads is killed and replaced, the item is named, the work goes on."""

import ctypes
import errno
import faulthandler
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress

import pytest
import torch
from helpers import ROOT

from datasets import parallel, readers
from datasets.clips import DataError
from datasets.parallel import Child, ReadFailure, alive, in_processes
from datasets.tools import check, pack


def misbehave(item):
    """Yield what an item asks for, or hang, crash, fail."""
    if item == "hang":
        time.sleep(60)
    if item == "native hang":  # holds the interpreter's lock, so that no signal handler would run
        ctypes.PyDLL(None).sleep(60)
    if item == "crash":
        faulthandler.disable()  # a trace of the child would only confuse
        ctypes.string_at(0)
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "wrong":
        raise DataError("not a picture")
    yield item
    yield torch.arange(3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("hang", "nothing could be read of it for 0.5 seconds"),
        ("native hang", "nothing could be read of it for 0.5 seconds"),
        ("crash", "the process that read it was killed by SIGSEGV"),
        ("killed", r"the process that read it was killed by SIGKILL \(of too little memory\?\)"),
        ("wrong", "not a picture"),
    ],
)
def test_a_child_that_fails_is_replaced(item, message):
    child = Child(misbehave, limit=0.5)
    started = time.monotonic()
    with pytest.raises(DataError, match=message):
        list(child.results(item))
    assert time.monotonic() - started < 5
    for number in (1, 2):
        first, tensor = child.results(number)
        assert first == number and torch.equal(tensor, torch.arange(3))
    child.kill()


def test_a_child_killed_between_two_items_is_replaced():
    child = Child(lambda item: [os.getpid()], limit=5)
    (first,) = child.results(0)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    (second,) = child.results(1)
    assert second != first
    child.kill()


def test_items_in_line_do_not_put_off_the_end_of_one_that_hangs():
    child = Child(misbehave, limit=0.6)
    started = time.monotonic()
    child.send("hang")
    for number in range(4):
        time.sleep(0.1)
        child.send(number)
    with pytest.raises(ReadFailure, match="nothing could be read of it for 0.6 seconds"):
        child.receive()
    assert time.monotonic() - started < 0.9
    assert [child.receive()[1] for _ in range(12)][::3] == [0, 1, 2, 3]  # the others are done
    child.kill()


def test_an_error_in_a_child_says_where_it_arose():
    child = Child(misbehave, limit=5)
    with pytest.raises(DataError) as raised:
        list(child.results("wrong"))
    assert 'raise DataError("not a picture")' in str(raised.value.__cause__)
    child.kill()


def test_a_child_that_is_slow_but_alive_is_waited_for(monkeypatch):
    monkeypatch.setattr("datasets.parallel._ALIVE_EVERY", 0.05)

    def slowly(item):
        for _ in range(12):
            time.sleep(0.1)
            alive()
        yield item

    child = Child(slowly, limit=0.5)
    assert list(child.results(7)) == [7]
    child.kill()


def test_one_bad_item_of_many_is_told_and_the_rest_is_done():
    items = [1, "hang", 2, "crash", 3, "killed", 4, 5, 6]
    started = time.monotonic()
    found = dict(
        in_processes(
            lambda item: next(misbehave(item)),
            items,
            workers=2,
            description="",
            failed=lambda item, error: f"{item}: {error}",
            limit=1.0,
        )
    )
    assert {k: v for k, v in found.items() if isinstance(k, int)} == {i: i for i in range(1, 7)}
    assert "for 1 seconds" in found["hang"] and "SIGSEGV" in found["crash"] and "SIGKILL" in found["killed"]
    assert time.monotonic() - started < 10
    with pytest.raises(ReadFailure, match="hang: nothing could be read"):
        list(in_processes(lambda item: next(misbehave(item)), ["hang"], workers=1, description="", limit=0.3))


def test_children_end_with_their_parent():
    script = (
        "import os, time\nfrom datasets.parallel import Child\n"
        "def work(item):\n    yield os.getpid()\n    time.sleep(60)\n"
        "print(next(Child(work, 60).results(0)), flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            with open(f"/proc/{child}/stat") as f:
                if f.read().split()[2] == "Z":
                    break
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child outlived its parent")


@pytest.fixture
def hanging(dota_root, tmp_path, monkeypatch):
    """The data set, one of whose clips hangs its reader, and a limit of two seconds for it."""
    original = readers.ZipReader._bytes

    def hang(self, name):
        if self.clip.name == "synthetictr_000003":
            time.sleep(3600)
        return original(self, name)

    monkeypatch.setattr(readers.ZipReader, "_bytes", hang)
    monkeypatch.setattr(parallel.in_processes, "__kwdefaults__", parallel.in_processes.__kwdefaults__ | {"limit": 2.0})
    return str(dota_root)


def test_check_names_a_clip_that_hangs(hanging):
    findings, _ = check.check("DoTA", hanging, splits=["train"], deep=True, workers=2)
    (bad,) = [finding for finding in findings if finding.kind == "unreadable"]
    assert bad.clip == "synthetictr_000003" and "nothing could be read of it for 2 seconds" in bad.message


def test_pack_names_a_clip_that_hangs_and_packs_the_others(hanging, tmp_path):
    with pytest.raises(DataError, match="1 clips cannot be packed: nothing could be read of it for 2 seconds; 7 are"):
        pack.pack("DoTA", hanging, tmp_path / "out", splits=["train"], settings=pack.Settings(54, 10, 90), workers=2)
    assert (tmp_path / "out" / "bad_clips.txt").read_text().startswith("synthetictr_000003\t")


# ----------------------------------------------------------------------------------------------------------------------
# Nothing in a child is lost, and nothing waits for one without a limit


class NeedsTwo(Exception):
    """Pickles, but is not unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class LeavesOnArrival:
    def __reduce__(self):
        return os.strerror, ("no number",)


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda item: raise_(NeedsTwo("this", "that")), "this and that"),
        (lambda item: raise_(Unpicklable("with a lock")), "with a lock"),
        (lambda item: raise_(SystemExit("given up")), "given up"),
        (lambda item: raise_(KeyboardInterrupt("stopped")), "stopped"),
        (lambda item: raise_(type("Local", (BaseException,), {})("from here")), "from here"),
        (lambda item: [threading.Lock()], "pickle"),
        (lambda item: [item], "str"),
    ],
    ids=["two arguments", "unpicklable", "exit", "interrupt", "local", "result", "item"],
)
def test_whatever_is_raised_in_a_child_arrives(function, text):
    child = Child(function, limit=20)
    with pytest.raises(Exception, match=text) as raised:  # no SystemExit
        list(child.results(LeavesOnArrival() if text == "str" else 0))
    assert "Traceback" in str(raised.value.__cause__)
    child.kill()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_child_that_cannot_be_forked_is_explained(monkeypatch, number):
    monkeypatch.setattr(os, "fork", lambda: raise_(OSError(number, os.strerror(number))))
    child, files = Child(misbehave, limit=5), len(os.listdir("/proc/self/fd"))
    message = rf"cannot start \({os.strerror(number)}\): use fewer workers \(--num_workers\), or allow more processes"
    with pytest.raises(DataError, match=message):
        child.send(0)
    assert len(os.listdir("/proc/self/fd")) == files
    child.kill()


def test_too_many_open_files_are_explained():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    children = [Child(misbehave, limit=20) for _ in range(40)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 9, hard))
    try:
        with pytest.raises(DataError, match=r"cannot start \(Too many open files\)"):
            for child in children:
                child.send(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for child in children:
            child.kill()


def half_a_message(item):
    """Say that more is to come than does."""
    if item == "half":
        os.write(parallel._to_parent.fileno(), (1000).to_bytes(4, "big") + b"half")
        time.sleep(60)
    yield item


def test_a_message_that_breaks_off_is_not_waited_for():
    child = Child(half_a_message, limit=0.5)
    child.send("half")
    child.send("whole")
    with pytest.raises(ReadFailure, match="nothing could be read of it for 0.5 seconds"):
        child.receive()
    assert child.receive() == ("result", "whole")
    child.kill()


def test_a_child_that_takes_nothing_is_not_waited_for():
    """Its pipe is full of items."""
    child = Child(misbehave, limit=1.0)
    child.send("hang")
    for number in range(5):
        child.send(number * b"x" * 100_000)
    with pytest.raises(ReadFailure):
        child.receive()
    lengths = [len(value) for kind, value in (child.receive() for _ in range(15)) if isinstance(value, bytes)]
    assert lengths == [100_000 * number for number in range(5)]
    child.kill()


def close_and_stay(item):
    parallel._to_parent.close()
    time.sleep(60)
    yield item


def test_a_child_that_has_closed_its_end_is_ended(monkeypatch):
    monkeypatch.setattr(parallel, "_TO_END", 0.3)
    child = Child(close_and_stay, limit=20)
    with pytest.raises(ReadFailure, match="was killed by SIGKILL"):
        list(child.results(0))


def test_a_child_that_cannot_be_killed_is_left_to_itself(monkeypatch):
    """As one that waits for a disk or a file system over the network."""
    child = Child(misbehave, limit=0.5)
    child.send("hang")
    pid, kill = child._pid, os.kill
    monkeypatch.setattr(parallel, "_TO_END", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: None)
        with pytest.raises(ReadFailure, match="nothing could be read of it for 0.5 seconds"):
            child.receive()
    assert list(child.results(1))[0] == 1  # in another process
    child.kill()
    kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_ended_children_may_be_ignored():
    """As a launcher leaves it to the programs it starts."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        child = Child(misbehave, limit=20)
        with pytest.raises(ReadFailure, match="the process that read it"):
            list(child.results("killed"))
        assert list(child.results(1))[0] == 1
        child.kill()
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("limit", [1e-9, 3e6, 1e30])
def test_limits_beyond_what_the_system_can_wait(limit):
    child = Child(lambda item: [item], limit)
    with suppress(ReadFailure) if limit < 1 else nullcontext():
        assert list(child.results(1)) == [1]
    child.kill()
