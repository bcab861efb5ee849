"""Signals of one process; runs under torchrun are in tests/test_survival.py."""

import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT


@pytest.fixture
def stuck():
    """A process that catches signals, while its main thread waits in C for a lock that it holds itself."""
    script = (
        "import ctypes\nfrom utils.signals import catch_signals\ncatch_signals()\nprint('ready', flush=True)\n"
        "libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "while True: libc.pthread_mutex_lock(lock)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()


def test_a_third_signal_ends_a_process_that_waits_inside_a_library(stuck):
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        stuck.send_signal(number)
        time.sleep(0.2)
        assert stuck.poll() is None
    stuck.send_signal(signal.SIGTERM)
    assert stuck.wait(3) == 128 + signal.SIGTERM and "third signal within 5 seconds" in stuck.stderr.read()


def test_a_signal_repeated_quickly_counts_every_half_second(stuck):
    started = time.monotonic()
    while stuck.poll() is None and time.monotonic() < started + 4:
        stuck.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert stuck.wait(1) == 128 + signal.SIGTERM and time.monotonic() - started > 1
