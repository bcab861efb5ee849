"""Two-process runs that lose one of them, or whose loss is not finite."""

import json
import os
import shutil
import signal
import time

import pytest
from background import Run, finetune, log, state
from helpers import ROOT


def fails(words, folder, **kwargs):
    """A run that must fail; its output."""
    attempt = Run(words, folder, **kwargs)
    assert attempt.end(120) not in (0, 75), attempt.output
    assert not (folder / "REQUEUE").exists()
    return attempt.output


LOST = "error: lost the other processes: one has ended, or did not come within --dist_"


@pytest.mark.slow
def test_the_error_of_one_rank_ends_all_and_is_said_last(data, tmp_path):
    words = [w if w != 1000 else 0 for w in finetune(data)]
    output = fails(words, tmp_path / "run")
    message = "error: more than --max_bad_samples 0 samples skipped in an epoch, the last of synthetictr_000003"
    assert output.count(message) == 1 and message in "".join(output.splitlines()[-3:])  # torchrun's
    assert LOST not in output


@pytest.mark.slow
def test_the_death_of_one_rank_ends_all(data, tmp_path):
    attempt = Run(finetune(data), tmp_path / "run")
    attempt.until_said("epoch 0  step 7/")
    os.kill(attempt.ranks()[1], signal.SIGKILL)
    killed = time.monotonic()
    assert attempt.end(60) not in (0, 75) and time.monotonic() - killed < 30
    assert LOST in attempt.output and not (tmp_path / "run" / "REQUEUE").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_in_loading_ends_all_within_the_timeout(data, dota_root, tmp_path):
    """A named pipe nobody writes to, in place of a clip's frames: opening it never returns."""
    root = tmp_path / "dota"
    shutil.copytree(dota_root, root)
    path = root / "frames" / "synthetictr_000003" / "images.zip"
    path.unlink()
    os.mkfifo(path)
    words = [w if w != data / "dota" else root for w in finetune(data, "--num_workers", 0, "--dist_timeout", 0.25)]
    started = time.monotonic()
    output = fails(words, tmp_path / "run")
    assert time.monotonic() - started < 90
    assert LOST + "timeout 0.25 minutes" in output


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


PLANT = """
import os, sys
import run_finetune
from utils.flags import finetune_parser

steps, rank, calls = {int(s) for s in os.environ["STEPS"].split()}, os.environ["RANK"], iter(range(10**9))
original = run_finetune.FinetuneObjective.__call__

def planted(self, model, batch):
    loss, statistics = original(self, model, batch)
    if next(calls) in steps and rank == "1":
        loss = loss * float("nan")
    return loss, statistics | {"loss": loss}

run_finetune.FinetuneObjective.__call__ = planted
try:
    run_finetune.main(finetune_parser("").parse_args(sys.argv[1:]))
except run_finetune.ERRORS as e:
    sys.exit(f"error: {e}")
"""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_on_all(data, tmp_path):
    script = tmp_path / "plant.py"
    script.write_text(PLANT)
    words = [script, *finetune(data, "--epochs", 1, "--warmup_epochs", 0)[1:]]
    environment = {"PYTHONPATH": str(ROOT)}
    attempt = Run(words, tmp_path / "one", STEPS="3 50 51 52 53", **environment)
    assert attempt.end(120) == 0, attempt.output
    lines = [json.loads(line) for line in (tmp_path / "one" / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, step) for step in (3, 50, 51, 52, 53)]
    for line in lines:
        assert 0 < line["losses"][0] < 10 and line["losses"][1] == "nan"
        assert line["samples"] and all(sample.startswith("DoTA synthetictr_") for sample in line["samples"])
    assert sum(len(line["samples"]) for line in lines) > len(lines)  # those of rank 1: two, less unreadable ones
    saved = state(tmp_path / "one")
    assert {int(rank["statistics"]["total"][-1]) for rank in saved["ranks"]} == {91}  # left out on both ranks
    assert all(v.isfinite().all() for v in saved["model"].values())
    assert log(tmp_path / "one")[0]["train_loss"] < 1
    output = fails(words, tmp_path / "two", STEPS="20 21 22 23 24 25 26", **environment)
    assert "error: loss or gradient not finite in 5 steps in a row, up to epoch 0, step 24" in output
    assert LOST not in output  # all ranks stop by themselves
