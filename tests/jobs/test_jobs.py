"""Each job file, run with a torchrun that prints what it was given."""

import os
import subprocess

import pytest
from helpers import ROOT

from utils.config import finetune_parser

JOBS = sorted((ROOT / "jobs" / "finetune").glob("*.sh"))


def launched(job, tmp_path, *more, **env):
    """The words after run_finetune.py, or the finished process where there are none."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    environment = clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
    done = subprocess.run(["bash", str(job), *more], cwd=ROOT, env=environment, capture_output=True, text=True)
    words = done.stdout.splitlines()
    return words[words.index("run_finetune.py") + 1 :] if done.returncode == 0 else done


@pytest.mark.parametrize("job", JOBS, ids=lambda j: j.stem)
def test_job_files_hold_the_published_settings(job, tmp_path):
    words = launched(job, tmp_path, "--stop_epoch", "3", DATA_PATH="/data/Do TA", MODEL_PATH="w.pth")
    args = finetune_parser("").parse_args(words)
    assert (args.data_path, args.finetune, args.output_dir) == ("/data/Do TA", "w.pth", f"runs/{job.stem}")
    assert args.stop_epoch == 3  # flags after the file's name reach the run
    half = job.stem.endswith("half")
    assert args.data_set == ("DoTA_half" if half else "DoTA")
    assert args.total_batch_size * args.num_sample == 56
    assert args.nb_samples_per_epoch * args.num_sample == 50000
    assert args.lr == (1e-3 if job.stem == "VideoMAE-S_DoTA" else 5e-4)
    text = job.read_text()
    assert "MODEL_ZOO.md" in text and f"#SBATCH --job-name={job.stem}\n" in text and os.access(job, os.X_OK)
    published = {"VideoMAE-S_DoTA": "AUC_ROC 83.7, AUC_MCC 46.9", "VideoMAE-B_DoTA": "AUC_ROC 86.3, AUC_MCC 54.8"}
    assert published.get(job.stem, "no row") in text


@pytest.mark.parametrize("job", JOBS, ids=lambda j: j.stem)
def test_job_files_say_which_path_is_missing(job, tmp_path):
    done = launched(job, tmp_path, MODEL_PATH="w.pth")
    assert done.returncode != 0 and "DATA_PATH: the root folder of DoTA" in done.stderr


def test_processes_follow_the_allocated_gpus(tmp_path):
    fake = tmp_path / "torchrun"
    launched(JOBS[0], tmp_path, DATA_PATH="d", MODEL_PATH="w")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA_PATH": "d", "MODEL_PATH": "w"}
    for gpus, count in (("4", "4"), ("", "1")):
        done = subprocess.run(
            ["bash", str(JOBS[0])], cwd=ROOT, capture_output=True, text=True,
            env=environment | {"SLURM_GPUS_ON_NODE": gpus},
        )  # fmt: skip
        assert f"--nproc_per_node={count}\n" in done.stdout, (fake, done.stderr)
