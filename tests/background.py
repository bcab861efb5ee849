"""Runs in the background, to be killed, signalled, or robbed of a process: real torchrun, tiny models."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from helpers import ROOT, tree
from torch.distributed.launcher.api import LaunchConfig

FINETUNE = ["run_finetune.py", "--model", "vit_tiny_patch16_64", "--data_set", "DoTA", "--device", "cpu"]
FINETUNE += ["--nb_samples_per_epoch", 400, "--total_batch_size", 4, "--epochs", 3, "--warmup_epochs", 1]
FINETUNE += ["--num_workers", 1, "--model_ema", "--model_ema_decay", 0.9, "--drop", 0.1, "--aa", "none"]
FINETUNE += ["--sampling_rate_val", 4, "--print_freq", 7]
DAPT = [
    "run_dapt.py",
    "--model",
    "pretrain_videomae_tiny_patch16_64",
    "--data_set",
    "DoTA",
    "videos",
    "--device",
    "cpu",
]
DAPT += ["--nb_samples_per_epoch", 480, "--sampling_rate", 1, 1, "--total_batch_size", 4, 2, "--epochs", 3]
DAPT += ["--num_workers", 0, "--drop_path", 0.2, "--clip_grad", 1, "--aa", "none", "--print_freq", 7]
EVERY_STEP = ["--save_every_minutes", 1e-6]
USR2_PASSES = "signals_to_handle" in LaunchConfig.__dataclass_fields__  # torchrun of this torch can pass it on


def finetune(data, *more):
    return [*FINETUNE, "--data_path", data / "dota", "--max_bad_samples", 1000, *more]


def dapt(data, *more):
    return [*DAPT, "--data_path", data / "dota", data / "videos", "--max_bad_samples", 1000, *more]


class Run:
    """A run of a script in the background, under torchrun if processes > 0; its output goes to OUTPUT_DIR.out."""

    def __init__(self, words, folder, *, processes=2, **environment):
        self.folder, self.log = folder, folder.with_suffix(".out")
        launcher = [sys.executable]
        if processes:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            if USR2_PASSES:
                launcher += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_SHUTDOWN_TIMEOUT": "5"} | environment
        self.since = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as out:
            command = [*launcher, *map(str, words), "--output_dir", str(folder)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    @property
    def output(self):
        return self.log.read_text()[self.since :]

    def tree(self):
        """Process ids of the launcher and everything below it."""
        return tree(self.process.pid)

    def ranks(self):
        """Process ids of the training processes, by rank."""
        children = [pid for pid in self.tree() if pid != self.process.pid]
        pids = {}
        for pid in children:
            with suppress(OSError):  # it has ended
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((int(w[5:]) for w in words if w.startswith(b"RANK=")), None)
                pids.setdefault(rank, pid)  # before its loading processes
        pids.pop(None, None)  # one that is about to be a rank, or has ended
        return [pids[rank] for rank in sorted(pids)]

    def kill(self, tree):
        """SIGKILL to every process of a `tree` of the run."""
        for number in (signal.SIGSTOP, signal.SIGKILL):  # first stopped, so that none acts on the end of another
            for pid in tree:
                with suppress(ProcessLookupError):  # a loading process that has ended by itself
                    os.kill(pid, number)
        self.process.wait()

    def until(self, condition, seconds=120):
        """Wait; True once condition() holds, False if the run ended first."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)
        return True

    def until_said(self, text, seconds=120):
        assert self.until(lambda: text in self.output, seconds), self.output

    def end(self, seconds=120):
        return self.process.wait(seconds)


def state(folder):
    return torch.load(folder / "checkpoint-last" / "state.pth", weights_only=True)


def log(folder):
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(a, b):
    """Whether two nested states are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Everything two finished runs leave is bit-identical, times and arguments aside."""
    assert log(a) == log(b)
    one, two = state(a), state(b)
    one.pop("args"), two.pop("args")
    for key in one:
        assert same(one[key], two[key]), key
    assert same(one, two)
    weights = sorted(path.name for path in a.glob("*.pth"))
    assert weights == sorted(path.name for path in b.glob("*.pth")) and weights
    for name in weights:
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (a, b))), name
    assert not [p.name for p in b.iterdir() if p.name.endswith((".tmp", ".new", ".old"))]
