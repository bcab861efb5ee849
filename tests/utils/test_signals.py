"""Signals of one process; runs under torchrun are in tests/test_survival.py."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, tree

from utils.signals import SIGNALS


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


def test_what_a_process_starts_does_not_die_of_its_signals():
    """A compiler, say; nor do threads hear them."""
    script = (
        "import subprocess, threading, time\nfrom utils.signals import catch_signals, first_signal, stop_requested\n"
        "catch_signals()\nthread = threading.Thread(target=time.sleep, args=(99,), daemon=True)\nthread.start()\n"
        "shell = subprocess.Popen(['bash', '-c', 'echo ready; read; exit 7'], stdin=subprocess.PIPE)\n"
        "while not stop_requested(): time.sleep(0.01)\n"
        "shell.communicate(b'\\n')\nprint(first_signal(), shell.returncode, flush=True)"
    )
    for number in SIGNALS:
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stdout.readline() == "ready\n"
            os.killpg(process.pid, number)
            assert process.stdout.read() == f"{number.name} 7\n"


COMPILES = """
import os, sys, torch
from utils.signals import catch_signals, first_signal
catch_signals()
compiled = torch.compile(lambda x: (x.sin() * 2 + x.cos()).sum(dim=1))
x = torch.randn(64, 64)
print(torch.allclose(compiled(x), (x.sin() * 2 + x.cos()).sum(dim=1), atol=1e-4), first_signal(), flush=True)
os._exit(0)
"""


def compilers(pid):
    """Programs below a process that compile its kernels."""
    names = [Path(f"/proc/{child}/comm").read_text().strip() for child in tree(pid) if Path(f"/proc/{child}").exists()]
    return {"g++", "cc1plus", "as", "ld", "collect2"} & set(names)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiler_at_work_does_not_die_of_a_signal(tmp_path):
    """TERM to the whole group, as Slurm sends it, while each of the programs runs that torch.compile starts."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", COMPILES], cwd=ROOT, env=environment, start_new_session=True, **pipes
    ) as process:
        seen, sent, deadline = set(), 0.0, time.monotonic() + 200
        while process.poll() is None:
            assert time.monotonic() < deadline
            if compilers(process.pid) and time.monotonic() - sent > 2.6:  # not a third within 5 seconds
                seen, sent = seen | compilers(process.pid), time.monotonic()
                os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.005)
        assert seen and process.stdout.read().splitlines()[-1] == "True SIGTERM"


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
