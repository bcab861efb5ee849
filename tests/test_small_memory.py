"""Runs where memory is small: a /dev/shm of a megabyte does not matter, too little of all else is said at once."""

import json
import os
import subprocess
import sys

import pytest
from helpers import complete

import run_dapt
import run_finetune
from datasets import slots
from utils.cli import ConfigError
from utils.flags import dapt_parser, finetune_parser

TINY = ["--data_set", "DoTA", "--device", "cpu", "--num_workers", "2"]
FINETUNE = [*TINY, "--model", "vit_tiny_patch16_64", "--nb_samples_per_epoch", "64", "--total_batch_size", "32"]
FINETUNE += ["--epochs", "1", "--warmup_epochs", "0", "--aa", "none", "--eval_batch_size", "128"]
SMALL_SHM = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "-"]


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode != 0,
    reason="needs to mount a file system",
)
def test_training_and_evaluation_need_no_dev_shm(dota_root, tmp_path):
    """Batches and chunks of frames are larger than it is."""
    command = [sys.executable, "run_finetune.py", *FINETUNE, "--data_path", dota_root, "--output_dir", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = complete([*SMALL_SHM, *command], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "a batch has 1.57 MB, 3 in the making: 4.72 MB of memory per process" in done.stdout
    assert "128 frames in evaluation have 1.57 MB, 4 in the making: 6.29 MB of memory per process" in done.stdout
    (record,) = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert record["train_samples"] == 64 and record["val_n"] > 100 and not done.stderr


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (4, "a batch has 1.57 MB, 3 .*; 4.72 MB are needed .* 4 MB are there .*: use a smaller --batch_size, with a"),
        (
            9,
            "128 frames in evaluation have 1.57 MB, 4 .*; 11 MB are needed .*: use a smaller --eval_batch_size, or few",
        ),
    ],
    ids=["training", "evaluation"],
)
def test_too_little_memory_is_said_before_training(dota_root, tmp_path, monkeypatch, free, message):
    refused(run_finetune, finetune_parser, dota_root, tmp_path, monkeypatch, free, message, FINETUNE)


def test_too_little_memory_is_said_before_an_evaluation(dota_root, tmp_path, monkeypatch):
    message = "128 frames in evaluation have 1.57 MB, 4 .* use a smaller --eval_batch_size, or fewer --num_workers"
    words = [*TINY, "--model", "vit_tiny_patch16_64", "--eval", "--eval_batch_size", "128"]
    refused(run_finetune, finetune_parser, dota_root, tmp_path, monkeypatch, 5, message, words)


def test_too_little_memory_is_said_before_dapt(dota_root, tmp_path, monkeypatch):
    words = [*TINY, "--model", "pretrain_videomae_tiny_patch16_64", "--total_batch_size", "8"]
    message = "a batch has .*, 3 in the making: .* use a smaller --batch_size"
    refused(run_dapt, dapt_parser, dota_root, tmp_path, monkeypatch, 0.1, message, words)


def refused(script, parser, data, folder, monkeypatch, free, message, words):
    """A run that must not begin with so many megabytes free."""
    monkeypatch.setattr(slots, "_untouched", type(slots._untouched)())
    monkeypatch.setattr(slots, "available_memory", lambda: (int(free * 10**6), "/a/limit"))
    with pytest.raises(ConfigError, match=message) as raised:
        script.main(parser("").parse_args([*words, "--data_path", str(data), "--output_dir", str(folder / "run")]))
    assert "\n" not in str(raised.value) and not (folder / "run" / "log.txt").exists()
