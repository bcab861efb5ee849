"""Reads that hang or die: the process that reads is killed and replaced, the item is named, the work goes on."""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT

from datasets.clips import DataError
from datasets.parallel import Child, ReadFailure, alive, in_processes


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
