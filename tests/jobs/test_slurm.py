"""Job files and jobs/submit.py on a real Slurm: preempted, requeued, finished; crashed or cancelled and not requeued.

All jobs go in at once and share the machine; each test looks at its own.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from background import EVERY_STEP, assert_same_run, dapt, finetune, log
from slurm import Slurm, missing

from models import create_model

pytestmark = pytest.mark.slow
DAPT, FINETUNE = "jobs/dapt/pretrain_capdata_large.sh", "jobs/finetune/VideoMAE-S_DoTA.sh"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A published file, as far as the job files can tell: a tiny masked autoencoder's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({"model": create_model("pretrain_videomae_tiny_patch16_64").state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := missing():
        pytest.skip(f"no Slurm here: {reason}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Jobs:
    """Submits job files with tiny settings, and knows where each writes."""

    def __init__(self, slurm, folder, data, weights):
        self.slurm, self.folder, self.data = slurm, folder, data
        self.environment = {"MODEL_PATH": weights, "DATA_PATH": data / "dota", "BDD_PATH": data, "CAP_PATH": data}
        self.words = {FINETUNE: finetune(data)[1:], DAPT: [*dapt(data)[1:], "--decoder_depth", 1, "--stop_epoch", 2]}

    def submit(self, job, name, *more):
        here = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder}/{name}.out"]
        words = ["sbatch", "--parsable", *here, job, "--", *self.words[job], *more]
        return self.slurm.call(*words, **self.environment, OUTPUT_DIR=self.folder / name).strip()

    def said(self, name):
        path = self.folder / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def preempt(self, number, name, text):
        """Once the job has said text, send USR2 as Slurm does; wait for its end."""
        self.slurm.until(number, lambda job: text in self.said(name) or job["JobState"] in ("COMPLETED", "FAILED"))
        self.slurm.call("scancel", "--signal=USR2", number)
        return self.slurm.end(number)

    def cancel(self, number, name, text):
        """Once the job has said text, cancel it; wait for its end."""
        self.slurm.until(number, lambda job: text in self.said(name) or job["JobState"] in ("COMPLETED", "FAILED"))
        self.slurm.call("scancel", number)
        return self.slurm.end(number)

    def submitit(self, name):
        """A job of jobs/submit.py with a time limit of a minute, which it must not end in; then with more."""
        words = finetune(self.data, "--epochs", 10, "--output_dir", self.folder / name)
        here = ["--nodes", 2, "--cpus_per_node", 1, "--time", "0:01:00", "--signal_delay", 30, "--sbatch", "chdir=/"]
        said = self.slurm.call(sys.executable, "jobs/submit.py", *here, words[0], "--", *words[1:])
        number, path = re.fullmatch(r"job (\d+), its log: (.+)\n", said).groups()
        assert Path(path).parent == self.folder / name / "submitit"
        self.slurm.until(number, lambda job: job["Restarts"] == "1" or job["JobState"] in ("COMPLETED", "FAILED"))
        self.slurm.call("scontrol", "update", f"JobId={number}", "TimeLimit=60")
        return self.slurm.end(number)


@pytest.fixture(scope="module")
def jobs(slurm, tmp_path_factory, data, weights):
    return Jobs(slurm, tmp_path_factory.mktemp("runs"), data, weights)


@pytest.fixture(scope="module")
def ended(jobs):
    """{name: future of what Slurm knows of the job once it has ended}."""
    with ThreadPoolExecutor(max_workers=7) as pool:
        ends = {"submitit": pool.submit(jobs.submitit, "submitit")}
        for name, job in (("d", DAPT), ("f", FINETUNE)):
            ends[f"{name} whole"] = pool.submit(jobs.slurm.end, jobs.submit(job, f"{name} whole"))
            number = jobs.submit(job, f"{name} preempted")
            ends[f"{name} preempted"] = pool.submit(jobs.preempt, number, f"{name} preempted", "epoch 0  step 21/")
        number = jobs.submit(FINETUNE, "crash", "--max_bad_samples", 3, *EVERY_STEP)
        ends["crash"] = pool.submit(jobs.slurm.end, number)
        number = jobs.submit(FINETUNE, "cancelled")
        ends["cancelled"] = pool.submit(jobs.cancel, number, "cancelled", "epoch 0  step 21/")
        yield ends


@pytest.mark.parametrize("name", ["d", "f"])
def test_preempted_job_requeues_itself_and_ends_as_if_left_alone(name, jobs, ended):
    whole, preempted = (ended[f"{name} {how}"].result() for how in ("whole", "preempted"))
    for job in (whole, preempted):
        assert (job["JobState"], job["ExitCode"], job["NodeList"]) == ("COMPLETED", "0:0", "n[1-2]"), jobs.said(name)
    assert (whole["Restarts"], preempted["Restarts"]) == ("0", "1")
    said = jobs.said(f"{name} preempted")
    place = re.search(r"stopped on SIGUSR2: epoch (\d), (\d+) of", said)
    assert place and f"requeueing job {preempted['JobId']}" in said
    assert f"resuming at epoch {place[1]}, step {place[2]}" in said
    assert_same_run(jobs.folder / f"{name} whole", jobs.folder / f"{name} preempted")


def test_crashed_job_fails_once(jobs, ended):
    job, said = ended["crash"].result(), jobs.said("crash")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    folder = jobs.folder / "crash"  # it saves at each step, so that it may have been killed between two renames
    assert any((folder / name / "state.pth").exists() for name in ("checkpoint-last", "checkpoint-last.old")), said
    assert not (folder / "REQUEUE").exists()
    assert "--max_bad_samples" in said and "requeueing" not in said


def test_cancelled_job_saves_its_state_and_is_not_requeued(jobs, ended):
    job, said = ended["cancelled"].result(), jobs.said("cancelled")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), said
    assert "stopped on SIGTERM: epoch 0, " in said and "requeueing" not in said
    assert (jobs.folder / "cancelled" / "REQUEUE").exists()


def test_submitit_job_is_requeued_at_its_time_limit(jobs, ended):
    job, folder = ended["submitit"].result(), jobs.folder / "submitit"
    said = Path(folder / "submitit" / f"{job['JobId']}_0_log.out").read_text()
    assert (job["JobState"], job["Restarts"], job["NodeList"]) == ("COMPLETED", "1", "n[1-2]"), said
    assert re.search(r"stopped on SIG(USR2|TERM): ", said) and said.count("requeueing job") == 1
    assert "resuming at epoch " in said and [record["epoch"] for record in log(folder)] == list(range(10))
