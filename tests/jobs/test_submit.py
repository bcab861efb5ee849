"""jobs/submit.py without Slurm: its flags, submitit's local and debug executors. With it: tests/jobs/test_slurm.py."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from background import assert_same_run, finetune, log
from helpers import ROOT, complete, run, tree

from jobs.submit import main, minutes, option, submit_parser
from utils.cli import ConfigError


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


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--cluster local --nodes 2", "--cluster local is this machine alone: leave out --nodes"),
        ("--cluster debug --nodes 2", "--cluster debug is this machine alone: leave out --nodes"),
        ("--cluster local --signal_delay 9 --name x", "--cluster local has no use for --signal_delay, --name"),
        ("--cluster debug --time 9 --sbatch a=b", "--cluster debug has no use for --time, --sbatch"),
        ("--cluster debug --cpus_per_node 9", "--cluster debug has no use for --cpus_per_node"),
    ],
)
def test_what_a_cluster_cannot_do_is_an_error(words, answer):
    with pytest.raises(ConfigError, match=re.escape(answer)):
        main([*words.split(), "run_finetune.py", "--", "--data_path", "x", "--output_dir", "y"])


SBATCH = f"""#!{sys.executable}
import os, sys
lines = [line[8:].strip() for line in open(sys.argv[1]) if line.startswith("#SBATCH ")]
with open(os.environ["TOLD"], "w") as f:
    f.write("\\n".join(lines + sorted(name for name in os.environ if name.startswith("SBATCH_"))))
print("Submitted batch job 1")
"""


def test_what_sbatch_is_told(tmp_path):
    """A stand-in of sbatch notes the options of the script and the variables it would prefer to them."""
    for name, content in (("sbatch", SBATCH), ("srun", "")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    names = ("TIMELIMIT", "SIGNAL", "GPUS_PER_NODE", "OPEN_MODE", "OUTPUT", "PARTITION", "QOS")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")}
    environment |= {f"SBATCH_{name}": "1" for name in names}

    def told(*words):
        words = [*words, "run_finetune.py", "--", "--data_path", "x", "--output_dir", tmp_path / "run"]
        done = run("jobs/submit.py", *words, env=environment)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "told").read_text().splitlines()
        return {line for line in lines if line.startswith("--")}, [x for x in lines if x.startswith("SBATCH_")]

    options, left = told("--time", "1:00:00", "--signal_delay", 60, "--gpus_per_node", 4, "--sbatch", "qos=high")
    assert {"--time=60", "--signal=USR2@60", "--gpus-per-node=4", "--cpus-per-task=64", "--qos=high"} <= options
    assert left == ["SBATCH_PARTITION"]
    options, left = told("--gpus_per_node", 2, "--cpus_per_node", 8, "--sbatch", "time=5")
    assert {"--time=5", "--signal=USR2@180", "--cpus-per-task=8"} <= options
    assert left == ["SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_SIGNAL"]
    options, left = told()
    assert {"--time=1440", "--job-name=run"} <= options and not any("cpus" in option for option in options)
    assert "SBATCH_TIMELIMIT" in left and "SBATCH_GPUS_PER_NODE" in left


def test_a_local_job_that_is_stopped_again_and_again(tmp_path):
    """A Python of the same packages whose torchrun stops on a signal, always."""
    venv, output_dir = Path(sys.executable).parents[1], tmp_path / "run"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "lib").symlink_to(venv / "lib")
    shutil.copy(venv / "pyvenv.cfg", tmp_path)
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.write_text(f'#!/bin/sh\n[ "$1" = --help ] && exit\necho stopped\ntouch {output_dir}/REQUEUE\nexit 1\n')
    torchrun.chmod(0o755)
    words = ["--cluster", "local", "run_finetune.py", "--", "--data_path", "x", "--output_dir", output_dir]
    words = [tmp_path / "bin" / "python", "jobs/submit.py", *words]
    output_dir.mkdir()
    debug = complete([*words[:3], "debug", *words[4:]], timeout=200)
    assert debug.returncode == 75 and debug.stdout.count("stopped\n") == 1 and not debug.stderr
    done = complete(words, timeout=200)
    assert done.returncode == 1 and Path(done.stdout.split("its log: ")[1].strip()).read_text().count("stopped\n") == 6
    assert done.stderr == "error: interrupted six times; the state is saved, the same command continues\n"


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
