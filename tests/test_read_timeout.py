"""Runs whose reader hangs or whose reading process is killed: the clip is named, the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run, tree

LIMIT = 8  # a loaded machine needs a while for its first picture
TINY = ["--data_set", "DoTA", "--model", "vit_tiny_patch16_64", "--device", "cpu", "--read_timeout", str(LIMIT)]
SHORT = ["--nb_samples_per_epoch", "24", "--total_batch_size", "8", "--epochs", "1", "--warmup_epochs", "0"]

PATCHED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from datasets import readers

original = readers.ZipReader._bytes

def misbehave(self, name):
    if self.clip.name.startswith({clip!r}):
        {how}
    return original(self, name)

readers.ZipReader._bytes = misbehave
import run_finetune
from utils.flags import finetune_parser
from utils.signals import catch_signals
catch_signals()
run_finetune.main(finetune_parser("").parse_args(sys.argv[1:]))
"""
HANG, KILLED = "time.sleep(3600)", "os.kill(os.getpid(), signal.SIGKILL)"
SAYS = {
    HANG: f"nothing could be read of it for {LIMIT} seconds",
    KILLED: "the process that read it was killed by SIGKILL",
}


def patched(folder, clip, how):
    path = folder / "patched.py"
    path.write_text(PATCHED.format(root=str(ROOT), clip=clip, how=how))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "how"), [(0, HANG), (2, HANG), (2, KILLED)])
def test_training_names_the_clip_and_goes_on(dota_root, tmp_path, processes, how):
    script = patched(tmp_path, "synthetictr_000003", how)
    words = [*TINY, *SHORT, "--data_path", dota_root, "--output_dir", tmp_path / "run", "--num_workers", "2"]
    done = run(script, *words, "--disable_eval_during_finetuning", processes=processes, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"skipped a sample of synthetictr_000003: {SAYS[how]}" in done.stdout
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert record["train_samples"] + record["train_skipped"] == 24 and record["train_skipped"] > 0
    assert list(record["train_bad_clips"]) == ["synthetictr_000003"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_evaluation_refuses_or_leaves_the_clip_out(dota_root, tmp_path, processes):
    script = patched(tmp_path, "syntheticva_000002", HANG)
    words = ["--eval", *TINY, "--data_path", dota_root, "--num_workers", "2"]
    done = run(script, *words, "--output_dir", tmp_path / "a", processes=processes, timeout=240)
    assert done.returncode == 1
    assert "1 of 5 clips cannot be read; repair them, or evaluate the others with --allow_missing" in done.stderr
    assert f"syntheticva_000002: {SAYS[HANG]}" in done.stderr
    done = run(script, *words, "--allow_missing", "--output_dir", tmp_path / "b", processes=processes, timeout=240)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["coverage"] == "4 of 5 clips" and metrics["unreadable"] == ["syntheticva_000002"]


def test_one_signal_ends_a_run_that_can_read_nothing(dota_root, tmp_path):
    """All of a batch hangs, 16 windows in line: a limit of 4 seconds for each would be a minute."""
    script = patched(tmp_path, "synthetictr_", HANG)
    words = [*TINY, "--data_path", dota_root, "--output_dir", tmp_path / "run", "--num_workers", "1"]
    words += ["--nb_samples_per_epoch", "64", "--total_batch_size", "16", "--epochs", "1", "--warmup_epochs", "0"]
    words += ["--max_bad_samples", "1000", "--disable_eval_during_finetuning", "--read_timeout", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run_ = subprocess.Popen([sys.executable, script, *map(str, words)], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(tree(run_.pid)) < 2:  # until there is a process that reads
            assert run_.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        run_.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        assert run_.wait(120) == 75
        assert time.monotonic() - signalled < 32  # 8, and for a slow machine
        assert (tmp_path / "run" / "REQUEUE").read_text().startswith("SIGTERM, epoch 0, ")
    finally:
        run_.kill()
