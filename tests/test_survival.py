"""Runs that are killed or signalled lose nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from background import USR2_PASSES, Run, assert_same_run, finetune, log, state
from helpers import ROOT, run
from kills import commands, killed, left_alone
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_finetune
from models import create_model
from utils.flags import finetune_parser

KILLS = 4  # of each run


def in_process(script, *words):
    assert script == "run_finetune.py"
    run_finetune.main(finetune_parser("").parse_args([str(w) for w in words]))


# ----------------------------------------------------------------------------------------------------------------------
# SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_kills_change_nothing(data, tmp_path, processes):
    """The short form of tests/kills.py."""
    words = commands(data, epochs=3)

    def survive(seed, script):
        left_alone(words[script], tmp_path / f"whole_{script}", processes=processes)
        killed(words[script], tmp_path / script, processes=processes, kills=KILLS, seed=seed)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(survive, range(2), words))
    for script in words:
        assert_same_run(tmp_path / f"whole_{script}", tmp_path / script)


def test_what_a_killed_save_leaves_is_removed(data, tmp_path, capsys):
    """Half checkpoints and temporary files of a killed process, and a run that was killed before its first save."""
    words = finetune(data, "--epochs", 1, "--warmup_epochs", 0, "--nb_samples_per_epoch", 4, "--output_dir", tmp_path)
    in_process(*words)
    shutil.rmtree(tmp_path / "checkpoint-last")
    (tmp_path / "checkpoint-last.new").mkdir()
    for name in ("checkpoint-last.new/state.pth", ".args.json.7.tmp", ".checkpoint-0.pth.7.tmp"):
        (tmp_path / name).write_bytes(b"half")
    in_process(*words)
    text = f"{tmp_path} holds a run that ended before a state was saved: starting from the beginning"
    assert text in capsys.readouterr().out
    assert not [p for p in tmp_path.iterdir() if p.name.endswith((".tmp", ".new"))] and len(log(tmp_path)) == 1


def test_what_a_run_started_from_stays_on_record(data, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save(create_model("vit_tiny_patch16_64").state_dict(), weights)
    words = finetune(data, "--warmup_epochs", 0, "--nb_samples_per_epoch", 4, "--disable_eval_during_finetuning")
    words += ["--output_dir", tmp_path]
    in_process(*words, "--stop_epoch", 1, "--finetune", weights)
    capsys.readouterr()
    in_process(*words, "--stop_epoch", 2, "--finetune", "other.pth")
    line = f"--finetune other.pth is not used: the run to continue started from {weights}\n"
    assert capsys.readouterr().out.count(line) == 1
    record, saved = json.loads((tmp_path / "args.json").read_text()), state(tmp_path)
    assert saved["epoch"] == 2 and saved["args"]["finetune"] == record["args"]["finetune"] == str(weights)


# ----------------------------------------------------------------------------------------------------------------------
# Signals


def steps_of(folder):
    """(epoch, steps done) of the saved state, after a look at whether all ranks stopped after the same step."""
    saved = state(folder)
    counts = {int(rank["statistics"]["total"][-1:].sum()) for rank in saved["ranks"]}
    assert counts == {saved["step"]}
    return saved["epoch"], saved["step"]


@pytest.mark.slow
def test_signals_under_torchrun_stop_all_ranks_at_one_step_and_nothing_is_lost(data, tmp_path):
    """USR2 to torchrun, then TERM, then INT to all processes, then USR1 to one rank alone, then the end."""
    folder, marker = tmp_path / "run", tmp_path / "run" / "REQUEUE"
    seen, places = [], [f"epoch {epoch}  step {step}/" for epoch, step in ((0, 14), (1, 14), (2, 14), (2, 56))]
    for number in [signal.SIGUSR2] * USR2_PASSES + [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]:
        attempt = Run(finetune(data), folder)
        attempt.until_said(places[len(seen)])
        assert not marker.exists()
        pids = {signal.SIGUSR1: attempt.ranks()[1:], signal.SIGINT: attempt.tree()}.get(number, [attempt.process.pid])
        for pid in pids:
            os.kill(pid, number)
        asked = time.monotonic()
        attempt.until(marker.exists, seconds=10)
        assert time.monotonic() - asked < 10 and marker.exists()
        assert attempt.end(30) != 0
        name = "a signal to another process" if number == signal.SIGUSR1 else number.name
        seen.append(steps_of(folder))
        place = f"epoch {seen[-1][0]}, {seen[-1][1]} of 96 steps"
        assert f"stopped on {name}: {place}; the state is saved; the same command continues" in attempt.output
        assert marker.read_text() == f"{name}, {place}\n"
        assert "Traceback" not in attempt.output.partition("torch/distributed")[0]
    assert seen == sorted(set(seen)) and all(14 <= step < 96 for _, step in seen)
    done = run(*finetune(data), "--output_dir", folder, processes=2)
    assert done.returncode == 0 and f"resuming at epoch {seen[-1][0]}, step {seen[-1][1]}" in done.stdout
    assert not marker.exists()
    whole = tmp_path / "whole"
    left_alone(finetune(data), whole, processes=2)
    assert_same_run(whole, folder)
    for tag in ("train/loss", "train/grad_norm", "val/auroc"):  # no point lost, none twice
        one, two = (EventAccumulator(str(f)).Reload().Scalars(tag) for f in (whole, folder))
        assert [(e.step, e.value) for e in one] == [(e.step, e.value) for e in two]


@pytest.mark.slow
def test_signals_to_a_single_process(data, tmp_path):
    """To the whole process group, as Slurm does it, loading processes included; while it starts; in an evaluation."""
    folder, marker = tmp_path / "run", tmp_path / "run" / "REQUEUE"
    words = finetune(data, "--num_workers", 2, "--sampling_rate_val", 1, "--eval_batch_size", 1)
    attempt = Run(words, folder, processes=0)
    attempt.until_said("DoTA train")
    os.kill(attempt.process.pid, signal.SIGUSR1)
    assert attempt.end(60) == 75 and steps_of(folder) == (0, 0)
    assert "stopped on SIGUSR1: epoch 0, 0 of 96 steps" in attempt.output and marker.exists()

    attempt = Run(words, folder, processes=0)
    attempt.until_said("epoch 0  step 21/")
    for number in 4 * [signal.SIGTERM] + [signal.SIGINT]:  # by Slurm itself, by srun, by torchrun, by an impatient user
        for pid in attempt.tree():
            os.kill(pid, number)
    assert attempt.end(60) == 75 and 21 <= steps_of(folder)[1] < 96 and marker.exists()

    attempt = Run(words, folder, processes=0)
    attempt.until_said("epoch 0  step 96/")
    attempt.until(lambda: state(folder)["step"] == 96)
    time.sleep(0.3)
    os.kill(attempt.process.pid, signal.SIGUSR2)
    assert attempt.end(60) == 75 and steps_of(folder) == (0, 96) and marker.exists()
    assert "stopped on SIGUSR2: in an evaluation, which will be repeated; the state is saved" in attempt.output

    attempt = Run(words, folder, processes=0)
    attempt.until_said("epoch 1  step 7/")
    assert not marker.exists() and [r["epoch"] for r in log(folder)] == [0]
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(attempt.process.pid, number)
        time.sleep(0.002)
    assert attempt.end(10) == 128 + signal.SIGTERM and not marker.exists()
    assert "the third signal within 5 seconds: leaving at once" in attempt.output


def test_another_signal_while_it_saves_does_no_harm(data, tmp_path):
    """USR2 comes in step 14, so that step 15 is the last; USR1 comes while torch.save waits for a line on its input."""
    script = """
import itertools, os, runpy, signal, sys, time, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from utils.signals import stop_requested
save, steps = torch.save, itertools.count(1)
def stop_at_14(*_):
    if next(steps) == 14:
        os.kill(os.getpid(), signal.SIGUSR2)
        while not stop_requested():
            time.sleep(0.01)
register_optimizer_step_post_hook(stop_at_14)
torch.save = lambda *a: (print("saving", flush=True), sys.stdin.readline(), save(*a))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    command = [sys.executable, "-c", script, *finetune(data, "--num_workers", 0, "--output_dir", tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(word) for word in command], cwd=ROOT, **pipes) as attempt:
        assert any("saving" in line for line in iter(attempt.stdout.readline, ""))
        attempt.send_signal(signal.SIGUSR1)
        time.sleep(0.7)
        assert attempt.poll() is None and not (tmp_path / "checkpoint-last" / "state.pth").exists()
        said, _ = attempt.communicate("\n" * 9)
    assert attempt.returncode == 75 and (tmp_path / "REQUEUE").read_text() == "SIGUSR2, epoch 0, 15 of 96 steps\n"
    assert said.count("stopped on SIGUSR2: epoch 0, 15 of 96 steps") == 1 and steps_of(tmp_path) == (0, 15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "kept"),
    [
        ("--no_save_ckpt", "nothing is saved (--no_save_ckpt)"),
        ("--no_auto_resume", "the state is saved; the command without --no_auto_resume continues"),
    ],
)
def test_a_run_that_its_command_would_not_continue_writes_no_marker(data, tmp_path, flag, kept):
    attempt = Run(finetune(data, flag), tmp_path / "run", processes=0)
    attempt.until_said("epoch 0  step 7/")
    os.kill(attempt.process.pid, signal.SIGTERM)
    assert attempt.end(60) == 75 and not (tmp_path / "run" / "REQUEUE").exists()
    assert kept in attempt.output


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_batches(data, dota_root, tmp_path):
    words = finetune(data, "--drop", 0, "--drop_path", 0, "--epochs", 1, "--warmup_epochs", 0)
    words += ["--data_path", dota_root]
    attempt = Run(words, tmp_path / "two")
    attempt.until_said("epoch 0  step 49/")
    os.kill(attempt.process.pid, signal.SIGTERM)
    attempt.end(30)
    _, step = steps_of(tmp_path / "two")
    done = run(*words, "--output_dir", tmp_path / "two")
    assert f"resuming at epoch 0, step {step}; best so far" in done.stdout
    assert "2 processes saved it, 1 go on: with the same batches in other shares" in done.stdout
    run(*words, "--output_dir", tmp_path / "one")
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=2e-3)
    one, two = (state(tmp_path / name)["model"] for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=2e-5, rtol=1e-3)
