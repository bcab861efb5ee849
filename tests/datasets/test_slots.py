"""Memory of loading: counted before it is taken, refused in one line, and no file."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from datasets import slots
from datasets.parallel import Child
from datasets.slots import Slots, reserve
from utils.cli import ConfigError

MB = 10**6


def of(megabytes, count=3):
    return Slots(count, (megabytes, 1000, 1000), pin=False, what="a batch has", remedy="use a smaller --batch_size")


@pytest.fixture
def machine(monkeypatch):
    """Returns what sets how much memory there is; nothing is reserved yet."""
    monkeypatch.setattr(slots, "_untouched", type(slots._untouched)())
    return lambda megabytes: monkeypatch.setattr(slots, "available_memory", lambda: (megabytes * MB, "/a/limit"))


def test_what_is_needed_is_logged(machine, caplog):
    machine(100)
    caplog.set_level(logging.INFO, "tad")
    reserve(of(2))
    assert [r.message for r in caplog.records] == ["a batch has 2 MB, 3 in the making: 6 MB of memory per process"]


def test_too_little_memory_is_refused(machine):
    machine(5)
    message = (
        r"^a batch has 2 MB, 3 in the making: 6 MB of memory per process; 6 MB are needed by all there is to load, and "
        r"5 MB are there \(by /a/limit\): use a smaller --batch_size$"
    )
    with pytest.raises(ConfigError, match=message):
        reserve(of(2))


def test_the_processes_of_a_machine_share_its_memory(machine, monkeypatch):
    machine(23)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="24 MB are needed by all there is to load in 4 processes on this machine"):
        reserve(of(2))


def test_little_that_is_left_is_said(machine, caplog):
    machine(7)
    reserve(of(2))
    assert "memory is tight: a batch has 2 MB" in caplog.text and "use a smaller --batch_size" in caplog.text


def test_what_is_reserved_and_not_in_use_counts_and_what_is_in_use_does_not(machine):
    machine(11)
    first = of(2)
    reserve(first)
    with pytest.raises(ConfigError, match="12 MB are needed"):
        reserve(of(2))
    assert first[0].shape == (2, 1000, 1000)  # from here on it is in use
    reserve(of(2))


def test_memory_that_the_system_refuses_is_explained():
    """A limit on the address space, as of `ulimit -v`; in one line."""
    script = (
        "import resource, sys\nfrom datasets.slots import Slots\nfrom utils.cli import ConfigError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)\n"
        "try:\n    Slots(2, (1 << 20, 1 << 20), pin=False, what='a batch has', remedy='use less').make()\n"
        "except ConfigError as e:\n    sys.exit(str(e))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(1 << 36)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == (
        "a batch has 1.1 TB, 2 in the making: 2.2 TB of memory per process, which cannot be had "
        "([Errno 12] Cannot allocate memory): use less\n"
    )


def test_numbers_beyond_the_system_are_explained():
    with pytest.raises(ConfigError, match="which cannot be had"):
        Slots(1, (1 << 40, 1 << 40), pin=False, what="a batch has", remedy="use less").make()


def test_slots_are_shared_with_processes_and_are_no_files():
    before = set(os.listdir("/dev/shm"))
    two = of(1, count=2)
    two.make()

    def write(number):
        two[number].fill_(number + 7)
        yield number

    child = Child(write, limit=20)
    assert [list(child.results(n)) for n in (0, 1)] == [[0], [1]]
    child.kill()
    assert all(torch.equal(two[n], torch.full((1, 1000, 1000), n + 7, dtype=torch.uint8)) for n in (0, 1))
    assert set(os.listdir("/dev/shm")) <= before and two[0].data_ptr() == two[0].data_ptr() != two[1].data_ptr()
