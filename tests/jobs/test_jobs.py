"""Each job file, run with a torchrun that prints what it was given."""

import os
import subprocess

import pytest
from helpers import ROOT

from utils.flags import finetune_parser

JOBS = sorted((ROOT / "jobs" / "finetune").glob("*.sh"))
PATHS = {"DATA_PATH": "/data/Do TA", "MODEL_PATH": "w.pth"}
PUBLISHED = {"VideoMAE-S_DoTA": "AUC_ROC 83.7, AUC_MCC 46.9", "VideoMAE-B_DoTA": "AUC_ROC 86.3, AUC_MCC 54.8"}
every_job = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)


@pytest.fixture
def launch(tmp_path):
    """Run a job file outside Slurm, with a torchrun that prints its words, one on a line."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def launch(job, *words, **environment):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
        return subprocess.run(["bash", job, *words], cwd=ROOT, env=environment, capture_output=True, text=True)

    return launch


def run_flags(done):
    words = done.stdout.splitlines()
    return finetune_parser("").parse_args(words[words.index("run_finetune.py") + 1 :])


@every_job
def test_settings_are_the_published_ones(job, launch):
    args = run_flags(launch(job, **PATHS))
    assert (args.data_path, args.finetune, args.output_dir) == ("/data/Do TA", "w.pth", f"runs/{job.stem}")
    assert args.data_set == ("DoTA_half" if job.stem.endswith("half") else "DoTA")
    assert args.total_batch_size * args.num_sample == 56
    assert args.nb_samples_per_epoch * args.num_sample == 50000
    assert args.lr == (1e-3 if job.stem == "VideoMAE-S_DoTA" else 5e-4)


@every_job
def test_file_says_what_it_is(job):
    text = job.read_text()
    assert f"#SBATCH --job-name={job.stem}\n" in text and "MODEL_ZOO.md" in text and os.access(job, os.X_OK)
    assert PUBLISHED.get(job.stem, "no published row") in text


@every_job
def test_more_flags_and_other_paths_reach_the_run(job, launch):
    args = run_flags(launch(job, "--stop_epoch", "3", **PATHS, OUTPUT_DIR="/scratch/a b"))
    assert args.stop_epoch == 3 and args.output_dir == "/scratch/a b"


@every_job
def test_missing_path_is_named(job, launch):
    done = launch(job, MODEL_PATH="w.pth")
    assert done.returncode != 0 and "DATA_PATH: the root folder of DoTA" in done.stderr


@every_job
@pytest.mark.parametrize(("allocated", "processes", "workers"), [({}, "1", 15), ({"SLURM_GPUS_ON_NODE": "4"}, "4", 3)])
def test_processes_and_workers_follow_the_allocation(job, launch, allocated, processes, workers):
    done = launch(job, **PATHS, **allocated)
    assert f"--nproc_per_node={processes}\n" in done.stdout and run_flags(done).num_workers == workers
