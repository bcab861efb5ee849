"""jobs/submit.py without Slurm: its flags, submitit's local and debug executors. With it: tests/jobs/test_slurm.py."""

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from background import assert_same_run, finetune, log, tree
from helpers import ROOT, run

from jobs.submit import minutes, option, submit_parser


def submit(*words, timeout=300):
    return run("jobs/submit.py", *words, timeout=timeout)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:01", 91),
        ("24:00:00", 1440),
        ("0:00:01", 1),
        ("2-12", 3600),
        ("1-0:30", 1470),
        ("1-1:1:0", 1501),
    ],
)
def test_times_are_those_of_sbatch(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "x", "1:2:3:4", "1-", "-5", "1.5"])
def test_other_times_are_refused(text):
    with pytest.raises(ArgumentTypeError, match="is not a time like"):
        minutes(text)


def test_options_of_sbatch():
    assert option("constraint=a=b") == ("constraint", "a=b")
    with pytest.raises(ArgumentTypeError, match="is not NAME=VALUE"):
        option("exclusive")
    assert all(action.help for action in submit_parser()._actions)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["run_dapt.py", "--epochs", "3"], "unknown flag --epochs"),
        (["run_eval.py"], "invalid choice: 'run_eval.py'"),
        (
            ["run_finetune.py", "--", "--layer_deca", "1"],
            "run_finetune.py: error: unknown flag --layer_deca, did you mean",
        ),
        (["--node", "2", "run_finetune.py"], "unknown flag --node, did you mean --nodes?"),
    ],
)
def test_mistakes_are_answered_before_the_queue(words, answer):
    done = submit(*words)
    assert done.returncode == 2 and answer in done.stderr


def test_what_a_cluster_cannot_do_is_an_error(data, tmp_path):
    words = ["run_finetune.py", "--", *finetune(data)[1:], "--output_dir", tmp_path]
    done = submit("--cluster", "local", "--nodes", 2, *words)
    assert (
        done.returncode == 1
        and done.stderr == "error: --cluster local: LocalExecutor can use only one node. Use nodes=1\n"
    )


@pytest.mark.slow
def test_local_job_goes_on_after_a_signal(data, tmp_path):
    words = finetune(data, "--epochs", 2)
    command = ["jobs/submit.py", "--cluster", "local", "--nproc_per_node", 2, words[0], "--", *words[1:]]
    command = [sys.executable, *map(str, command), "--output_dir", str(tmp_path / "job")]
    whole = run(*words, "--output_dir", tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    ) as job:
        number, _, path = job.stdout.readline().strip().removeprefix("job ").partition(", its log: ")
        path = Path(path)
        deadline = time.monotonic() + 200
        while "epoch 0  step 21/" not in (said := path.read_text() if path.exists() else ""):
            assert time.monotonic() < deadline and job.poll() is None, said
            time.sleep(0.1)
        os.kill(tree(int(number))[1], signal.SIGUSR2)  # submitit's process of the job
        assert job.wait(300) == 0
    said = path.read_text()
    assert "stopped on SIGUSR2: epoch 0, " in said and "resuming at epoch 0, step " in said
    assert_same_run(tmp_path / "whole", tmp_path / "job")


@pytest.mark.slow
def test_debug_job_runs_in_the_foreground_and_its_failure_is_told(data, tmp_path):
    flags = ["--epochs", 1, "--warmup_epochs", 0, "--nb_samples_per_epoch", 8]
    words = ["--cluster", "debug", "run_finetune.py", "--", *finetune(data, *flags)[1:], "--output_dir", tmp_path]
    done = submit(*words)
    assert done.returncode == 0 and "1 of 1 epochs done" in done.stdout + done.stderr and len(log(tmp_path)) == 1
    done = submit(*words, "--lr", 1)
    assert done.returncode == 1 and "lr: " in done.stderr
    assert done.stderr.endswith("error: the run failed with code 1; its own message stands above\n")
