"""Saving and stopping in a single process; runs under torchrun are in tests/test_survival.py."""

import logging
import signal
import time
from dataclasses import replace

import pytest
from helpers import ALONE, session

from engine.checkpoint import Progress
from utils import signals
from utils.distributed import Agreement
from utils.signals import EXIT_CODE, Preempted, remove_marker


@pytest.fixture
def arrivals(monkeypatch):
    """The signals noted so far."""
    noted = []
    monkeypatch.setattr(signals, "_arrivals", noted)
    return noted


@pytest.fixture
def saved(monkeypatch):
    """The times of the saves so far."""
    times = []
    monkeypatch.setattr("engine.session.save_last", lambda folder, state: times.append(time.monotonic()))
    return times


def build(tmp_path, **options):
    return session(None, Progress(steps_per_epoch=9), output_dir=tmp_path, **{"save_ckpt": True} | options)


def step(run):
    run.progress.step += 1
    run.after_step()


def test_an_answer_is_given_once_and_only_to_what_was_asked():
    agreement = Agreement(ALONE, 2)
    assert agreement.answer() == (False, False)
    agreement.ask(False, True)
    assert agreement.answer() == (False, True) and agreement.answer() == (False, False)


def test_a_signal_stops_the_run_at_the_next_step_but_one_with_its_state_saved(tmp_path, arrivals, saved):
    run, marker = build(tmp_path), tmp_path / "REQUEUE"
    step(run)
    arrivals.append((0.0, signal.SIGUSR2))
    step(run)
    assert not saved and not marker.exists()
    with pytest.raises(Preempted) as stopped:
        step(run)
    assert len(saved) == 1 and stopped.value.code == EXIT_CODE
    assert marker.read_text() == "SIGUSR2, epoch 0, 3 of 9 steps\n"
    remove_marker(tmp_path)
    assert not marker.exists()
    remove_marker(tmp_path / "absent")


@pytest.mark.parametrize("already", [True, False])
def test_stopping_between_epochs_saves_what_is_not_saved(tmp_path, arrivals, saved, already):
    run = build(tmp_path)
    run.stop_if_asked()
    run.save()
    run.progress.step += not already
    arrivals.append((0.0, signal.SIGTERM))
    with pytest.raises(Preempted):
        run.stop_if_asked("in an evaluation")
    assert len(saved) == 1 + (not already) and (tmp_path / "REQUEUE").read_text() == "SIGTERM, in an evaluation\n"


def test_a_run_that_the_same_command_would_not_continue_leaves_no_marker(tmp_path, arrivals, saved, caplog):
    run = build(tmp_path, auto_resume=False)
    arrivals.append((0.0, signal.SIGTERM))
    logging.getLogger("tad").addHandler(caplog.handler)
    with caplog.at_level("INFO", "tad"), pytest.raises(Preempted):
        run.stop_if_asked()
    logging.getLogger("tad").removeHandler(caplog.handler)
    assert len(saved) == 1 and not (tmp_path / "REQUEUE").exists()
    assert "the state is saved; the command without --no_auto_resume continues" in caplog.text


def test_a_run_without_checkpoints_stops_without_a_state_or_a_marker(tmp_path, arrivals, saved):
    arrivals.append((0.0, signal.SIGTERM))
    with pytest.raises(Preempted):
        build(tmp_path, save_ckpt=False, save_every_minutes=1e-9).stop_if_asked()
    assert not saved and not list(tmp_path.iterdir())


def test_saves_come_by_the_clock_of_the_main_process(tmp_path, arrivals, saved):
    run = build(tmp_path, save_every_minutes=0.1 / 60)
    until = time.monotonic() + 0.55
    while time.monotonic() < until:
        step(run)
        time.sleep(0.001)
    assert 2 <= len(saved) <= 5 and all(b - a >= 0.1 for a, b in zip(saved, saved[1:], strict=False))
    saved.clear()
    run = build(tmp_path, save_every_minutes=1e-9)
    run.process = replace(ALONE, rank=1)
    for _ in range(3):
        step(run)
    assert not saved
