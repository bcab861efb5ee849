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

from datasets import build_clips, parallel, readers
from datasets.augment.frames import EvalTransform
from datasets.clips import DataError
from datasets.parallel import Child, ReadFailure, alive, in_processes
from datasets.stream import SplitWindows
from datasets.tools import check, pack
from datasets.windows import WindowIndex


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


def test_a_worker_that_is_killed_is_said(dota_root):
    """The process of the DataLoader itself, which only waits for its child; the run ends with a reason."""
    with pytest.raises(DataError, match="a loading process died, killed from"):
        load_with(dota_root, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_fault_of_the_code_in_a_worker_is_not_taken_for_its_death(dota_root):
    def fail():
        raise RuntimeError("a fault of the code")

    with pytest.raises(RuntimeError, match="a fault of the code") as raised:
        load_with(dota_root, fail)
    assert not isinstance(raised.value, DataError)


def load_with(dota_root, start):
    """Read a split through a loading process that calls start() as it starts."""
    clips = build_clips("DoTA", str(dota_root), "val")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.stream.shield_worker", lambda _number: start())
        list(SplitWindows(clips, index, EvalTransform(32), num_workers=1).batches(lambda frames: frames))
