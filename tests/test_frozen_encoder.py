"""run_finetune.py with a frozen encoder: its head alone is trained, from video or from features on disk."""

import json
import shutil
import zipfile

import pytest
import torch
from helpers import load_weights, run

import engine.session
import run_finetune
from datasets import DataError
from models import create_model
from utils.cli import ConfigError
from utils.flags import finetune_parser
from utils.signals import Preempted

MODEL = "vit_tiny_patch16_64"
FLAGS = ["--data_set", "DoTA", "--device", "cpu", "--num_workers", "0", "--freeze_encoder", "--lr", "0.5"]
FLAGS += ["--nb_samples_per_epoch", "32", "--total_batch_size", "8", "--epochs", "2", "--warmup_epochs", "1"]
FLAGS += ["--sampling_rate_val", "4", "--fc_drop_rate", "0.2", "--drop_path", "0.5", "--model_ema"]
HEADS = ("attentive", "linear")


def in_process(*words):
    run_finetune.main(finetune_parser("").parse_args([str(word) for word in words]))


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def same_state(first, second):
    a, b = (torch.load(folder / "checkpoint-last" / "state.pth", weights_only=True) for folder in (first, second))
    for name in ("model", "model_ema"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    return a["epoch"] == b["epoch"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("weights") / "w.pth", create_model(MODEL)
    torch.save({"model": model.state_dict(), "spec": model.spec}, path)
    return path


@pytest.fixture(scope="module")
def words(dota_root, weights):
    return [*FLAGS, "--data_path", dota_root, "--finetune", weights]


@pytest.fixture(scope="module")
def cached(words, tmp_path_factory):
    """Folders of a run from features on disk, one for each head, and the features."""
    root = tmp_path_factory.mktemp("cached")
    for head in HEADS:
        in_process(*words, "--head", head, "--cache_features", root / "features", "--output_dir", root / head)
    return root


@pytest.mark.parametrize("head", HEADS)
def test_training_from_features_is_training_from_video_that_is_not_augmented(cached, words, weights, tmp_path, head):
    in_process(*words, "--head", head, "--no_augment", "--output_dir", tmp_path / "video")
    runs = log(cached / head), log(tmp_path / "video")
    for features, video in zip(*runs, strict=True):
        assert features["train_samples"] == video["train_samples"] == 32
        for name in ("train_loss", "val_auroc", "val_loss"):
            assert features[name] == pytest.approx(video[name], abs=1e-6)
    trained = [load_weights(folder / "checkpoint-1.pth") for folder in (cached / head, tmp_path / "video")]
    before = load_weights(weights)
    for key, value in trained[0].items():
        if key.split(".")[0] in ("head", "pooler"):
            torch.testing.assert_close(value, trained[1][key], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, before[key.replace("norm", "fc_norm") if key.startswith("norm") else key])


def test_a_run_that_is_stopped_in_the_middle_of_an_epoch_goes_on_to_the_bit(cached, words, tmp_path, monkeypatch):
    command = [*words, "--cache_features", cached / "features", "--output_dir", tmp_path / "run"]
    asked = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(engine.session, "stop_requested", lambda: next(asked) > 0)
        with pytest.raises(Preempted):
            in_process(*command)
    stopped = torch.load(tmp_path / "run" / "checkpoint-last" / "state.pth", weights_only=True)
    assert (stopped["epoch"], stopped["step"]) != (0, 0) and stopped["step"] not in (0, 4)
    in_process(*command)
    assert same_state(tmp_path / "run", cached / "linear")
    assert [r["val_auroc"] for r in log(tmp_path / "run")] == [r["val_auroc"] for r in log(cached / "linear")]


@pytest.mark.slow
def test_two_processes_make_the_features_and_go_on_to_the_bit(words, cached, tmp_path):
    command = ["run_finetune.py", *words, "--cache_features", tmp_path / "features", "--head", "attentive"]
    for stop in (1, 2):
        done = run(*command, "--output_dir", tmp_path / "run", "--stop_epoch", stop, processes=2)
        assert done.returncode == 0, done.stderr
        assert ("are made now" in done.stdout) == (stop == 1)
    done = run(*command, "--output_dir", tmp_path / "whole", processes=2)
    assert done.returncode == 0, done.stderr
    assert same_state(tmp_path / "run", tmp_path / "whole")
    names = {path.name for path in tmp_path.glob("features/*/*.pth")}
    assert names <= {path.name for path in cached.glob("features/*/*.pth")}, "as one process makes them"


def test_an_evaluation_takes_the_head_from_the_file(cached, dota_root, tmp_path):
    words = ["--eval", "--data_set", "DoTA", "--data_path", dota_root, "--device", "cpu", "--num_workers", "0"]
    words += ["--sampling_rate_val", "4", "--finetune", cached / "attentive" / "checkpoint-1.pth"]
    with pytest.raises(ConfigError, match=r"--head linear contradicts .*-1.pth, which was made with attentive"):
        in_process(*words, "--head", "linear", "--output_dir", tmp_path / "refused")
    in_process(*words, "--output_dir", tmp_path / "eval")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["auroc"] == pytest.approx(log(cached / "attentive")[-1]["val_auroc"], abs=1e-6)


def test_windows_of_a_clip_that_cannot_be_read_are_skipped_and_counted(words, dota_root, tmp_path):
    root = shutil.copytree(dota_root, tmp_path / "dota")
    path = sorted((root / "frames").glob("*tr_*/images.zip"))[2]
    with zipfile.ZipFile(path) as z:
        frames = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for i, (name, content) in enumerate(frames.items()):
            z.writestr(name, content if i != 20 else b"no picture")
    command = [*words, "--data_path", root, "--cache_features", tmp_path / "features", "--output_dir", tmp_path / "run"]
    in_process(*command, "--nb_samples_per_epoch", "0", "--max_bad_samples", "1000")
    for record in log(tmp_path / "run"):
        assert record["train_skipped"] > 10 and record["train_samples"] + record["train_skipped"] == 384
    with pytest.raises(DataError, match="more than --max_bad_samples 0 samples skipped in an epoch, the last of synth"):
        in_process(*command[:-1], tmp_path / "strict", "--nb_samples_per_epoch", "0", "--max_bad_samples", "0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--cache_features", "x"],
            "--cache_features keeps what a frozen encoder makes of windows: add --freeze_encoder",
        ),
        (["--cache_features", "x", "--freeze_encoder", "--augment"], "one view of each window: leave out --augment"),
        (["--no_augment", "--num_sample", "2"], "--num_sample 2: windows that are not augmented have one view"),
        (["--freeze_encoder", "--freeze_layers", "2"], "give --freeze_encoder, which freezes all layers, or"),
        (
            ["--head", "attentive", "--final_reduction", "cls"],
            "final_reduction cls goes with linear head, not attentive",
        ),
    ],
    ids=["not frozen", "augmented", "views", "layers", "head"],
)
def test_flags_that_contradict_each_other_are_refused(flags, message, tmp_path):
    base = ["--data_set", "DoTA", "--data_path", tmp_path, "--output_dir", tmp_path / "run", "--device", "cpu"]
    with pytest.raises(ConfigError, match=message):
        in_process(*base, "--model", MODEL, *flags)
