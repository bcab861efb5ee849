"""The votes of a single process; runs under torchrun are in tests/test_survival.py."""

import logging
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT

from utils import signals
from utils.distributed import Agreement, Process
from utils.signals import EXIT_CODE, Preempted, Preemption, remove_marker

ALONE = Process(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def arrivals(monkeypatch):
    """The signals noted so far."""
    noted = []
    monkeypatch.setattr(signals, "_arrivals", noted)
    return noted


def build(tmp_path, saved, **kwargs):
    options = {"is_main": True, "save_every_minutes": None} | kwargs
    return Preemption(tmp_path, Agreement(ALONE, 2), lambda: saved.append(time.monotonic()), **options)


def test_an_answer_is_given_once_and_only_to_what_was_asked():
    agreement = Agreement(ALONE, 2)
    assert agreement.answer() == (False, False)
    agreement.ask(False, True)
    assert agreement.answer() == (False, True) and agreement.answer() == (False, False)


def test_a_signal_stops_the_run_at_the_next_step_but_one_with_its_state_saved(tmp_path, arrivals):
    saved, marker = [], tmp_path / "REQUEUE"
    run = build(tmp_path, saved)
    run.after_step("step 1")
    arrivals.append((0.0, signal.SIGUSR2))
    run.after_step("step 2")
    assert not saved and not marker.exists()
    with pytest.raises(Preempted) as stopped:
        run.after_step("step 3")
    assert len(saved) == 1 and marker.read_text() == "SIGUSR2, step 3\n" and stopped.value.code == EXIT_CODE
    remove_marker(tmp_path)
    assert not marker.exists()
    remove_marker(tmp_path / "absent")


@pytest.mark.parametrize("already", [True, False])
def test_stopping_between_epochs_saves_what_is_not_saved(tmp_path, arrivals, already):
    saved = []
    run = build(tmp_path, saved)
    run.stop_if_asked("a", saved=already)
    arrivals.append((0.0, signal.SIGTERM))
    assert list(run.until_asked([1, 2])) == []
    with pytest.raises(Preempted):
        run.stop_if_asked("b", saved=already)
    assert len(saved) == (not already) and (tmp_path / "REQUEUE").exists()


def test_a_run_that_the_same_command_would_not_continue_leaves_no_marker(tmp_path, arrivals, caplog):
    saved = []
    run = build(tmp_path, saved, auto_resume=False)
    arrivals.append((0.0, signal.SIGTERM))
    logging.getLogger("tad").addHandler(caplog.handler)
    with caplog.at_level("INFO", "tad"), pytest.raises(Preempted):
        run.stop_if_asked("step 3", saved=False)
    logging.getLogger("tad").removeHandler(caplog.handler)
    assert len(saved) == 1 and not (tmp_path / "REQUEUE").exists()
    assert "the state is saved; the command without --no_auto_resume continues" in caplog.text


def test_saves_come_by_the_clock_of_the_main_process(tmp_path, arrivals):
    saved = []
    run = build(tmp_path, saved, save_every_minutes=0.1 / 60)
    until = time.monotonic() + 0.55
    while time.monotonic() < until:
        run.after_step("step")
        time.sleep(0.001)
    assert 2 <= len(saved) <= 5 and all(b - a >= 0.1 for a, b in zip(saved, saved[1:], strict=False))
    other = []
    run = build(tmp_path, other, save_every_minutes=1e-9, is_main=False)
    for _ in range(3):
        run.after_step("step")
    assert not other


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
