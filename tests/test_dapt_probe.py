"""The linear probe of run_dapt.py, as a user runs it: what it leaves, that it changes nothing, and that it goes on."""

import json
import shutil

import pytest
import torch
from helpers import load_weights, run, write_video
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_dapt
import run_finetune
from datasets.clips import DataError
from utils.cli import ConfigError
from utils.flags import dapt_parser, finetune_parser


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for i, fps in enumerate((30, 25)):
        write_video(root / f"{i}.mp4", frames=40, fps=fps)
    return root


@pytest.fixture(scope="module")
def words(videos, dota_root):
    """The command without its output folder: with stochastic depth, so that random states count."""

    def command(folder, *more):
        line = ["--model", "pretrain_videomae_tiny_patch16_64", "--device", "cpu", "--num_workers", 0, "--aa", "none"]
        line += ["--data_set", "videos", "--data_path", videos, "--sampling_rate", 2, "--total_batch_size", 4]
        line += ["--nb_samples_per_epoch", 8, "--epochs", 3, "--warmup_epochs", 1, "--drop_path", 0.5]
        return [str(word) for word in (*line, "--output_dir", folder, *more)]

    return command


@pytest.fixture(scope="module")
def probe(dota_root):
    return ["--probe_data_path", dota_root, "--probe_windows", 60]


def in_process(words):
    run_dapt.main(dapt_parser("").parse_args(words))


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def state(folder):
    return torch.load(folder / "checkpoint-last" / "state.pth", weights_only=True)


@pytest.fixture(scope="module")
def finished(words, probe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    in_process(words(folder, *probe))
    return folder


def test_what_a_probe_leaves_behind(finished, dota_root, tmp_path):
    records = log(finished)
    health = state(finished)["health"]
    assert [r["epochs"] for r in health["history"]] == [0, 1, 2, 3]
    assert [r["auroc"] for r in health["history"][1:]] == [r["probe_auroc"] for r in records]
    assert [r["loss"] for r in health["history"][1:]] == [r["train_loss"] for r in records]
    assert {r["probe_first_auroc"] for r in records} == {health["history"][0]["auroc"]}
    for r in records:
        assert 0 <= r["probe_auroc"] <= 1 and 1 <= r["probe_effective_rank"] <= 60 and r["probe_windows"] == 60
    events = EventAccumulator(str(finished)).Reload()
    steps = [e.step for e in events.Scalars("probe/auroc")]
    assert steps == [e.step for e in events.Scalars("probe/effective_rank")] == [0, 2, 4, 6]
    assert {"train/loss", "train/trivial_loss"} <= set(events.Tags()["scalars"])
    assert "probe/history" in events.Tags()["images"]
    assert Image.open(finished / "pictures" / "probe.png").size[0] > 300

    best = max(health["history"], key=lambda r: r["auroc"])["epochs"]
    kept = torch.load(finished / "checkpoint-best_probe.pth", weights_only=True)
    assert kept["spec"].get("epoch", -1) == best - 1 and state(finished)["best"] == {
        "probe": records[-1]["probe_best_auroc"]
    }
    if best:
        assert same(kept["model"], load_weights(finished / f"checkpoint-{best - 1}.pth"))
    line = ["--data_path", dota_root, "--output_dir", tmp_path, "--device", "cpu", "--num_workers", 0, "--epochs", 1]
    line += ["--finetune", finished / "checkpoint-best_probe.pth", "--nb_samples_per_epoch", 4, "--warmup_epochs", 0]
    line += ["--total_batch_size", 4, "--disable_eval_during_finetuning"]
    run_finetune.main(finetune_parser("").parse_args([str(word) for word in line]))


def same(x, y):
    """Whether nested plain values and tensors are equal, to the bit, NaN too."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    return x == y or (x != x and y != y)


def assert_same_run(a, b, *, epochs, probed=True):
    for epoch in range(epochs):
        x, y = (load_weights(folder / f"checkpoint-{epoch}.pth") for folder in (a, b))
        assert same(x, y), epoch
    x, y = state(a), state(b)
    for part in ("optimizer", "ranks", *(("health", "best") if probed else ())):  # ranks: random states, statistics
        assert same(x[part], y[part]), part


def test_a_run_ends_in_the_same_bits_without_it(finished, words, tmp_path):
    in_process(words(tmp_path / "run"))
    assert_same_run(finished, tmp_path / "run", epochs=3, probed=False)
    assert not any(name.startswith("probe_") for r in log(tmp_path / "run") for name in r)
    assert state(tmp_path / "run")["health"] == {} and not (tmp_path / "run" / "checkpoint-best_probe.pth").exists()


def test_a_resumed_run_forgets_nothing_and_probes_nothing_twice(finished, words, probe, tmp_path, capsys):
    folder = tmp_path / "run"
    for stop in (1, 2, 3, 3):
        in_process(words(folder, *probe, "--stop_epoch", stop))
    out = capsys.readouterr().out
    assert out.count("probe before the first epoch") == 1 and out.count(": AUC_ROC ") == 4
    assert_same_run(finished, folder, epochs=3)
    assert same(*(load_weights(f / "checkpoint-best_probe.pth") for f in (finished, folder)))


def test_a_kill_in_the_middle_of_a_probe_repeats_that_one(finished, words, probe, tmp_path, monkeypatch, capsys):
    folder, real, calls = tmp_path / "run", run_dapt.Health.measure, []

    def killed(self, *rest):
        calls.append(1)
        if len(calls) in (2, 3):
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(run_dapt.Health, "measure", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            in_process(words(folder, *probe))
    in_process(words(folder, *probe))
    assert capsys.readouterr().out.count(": AUC_ROC ") == 4 and len(calls) == 6
    assert_same_run(finished, folder, epochs=3)


def test_a_kill_in_the_first_epoch_does_not_repeat_the_first_probe(words, probe, tmp_path, monkeypatch, capsys):
    def killed(*rest, **options):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_dapt, "train_epochs", killed)
        in_process(words(folder, *probe))
    first = load_weights(folder / "checkpoint-best_probe.pth")
    in_process(words(folder, *probe, "--stop_epoch", 1))
    assert capsys.readouterr().out.count("probe before the first epoch") == 1
    assert same(first, state(folder)["model"]) is False and len(log(folder)) == 1


def test_every_other_epoch_the_last_and_no_files(words, probe, tmp_path):
    in_process(words(tmp_path / "run", *probe, "--probe_every", 2, "--no_save_ckpt"))
    assert ["probe_auroc" in r for r in log(tmp_path / "run")] == [False, True, True]
    assert not list((tmp_path / "run").glob("*.pth"))


def test_it_can_be_turned_on_and_off_between(words, probe, tmp_path, capsys):
    """A run of before there was a probe, whose state says nothing of it, goes on with one."""
    folder = tmp_path / "run"
    in_process(words(folder, "--stop_epoch", 1))
    content = state(folder)
    del content["health"]
    torch.serialization.set_crc32_options(True)
    torch.save(content, folder / "checkpoint-last" / "state.pth")
    in_process(words(folder, *probe, "--stop_epoch", 2))
    in_process(words(folder, *probe, "--probe_every", 0))
    assert [r["epochs"] for r in state(folder)["health"]["history"]] == [1, 2]
    assert ["probe_auroc" in r for r in log(folder)] == [False, True, False]
    assert "probe after 1 epoch: AUC_ROC" in capsys.readouterr().out


def test_a_run_goes_on_in_another_folder(finished, words, probe, tmp_path):
    """Its best file stayed where it was, so the next probe writes one here; the history goes on."""
    other = words(
        tmp_path / "run", *probe, "--resume", finished / "checkpoint-last", "--override", "epochs", "--epochs", 4
    )
    in_process([*other, "--stop_epoch", "4"])
    assert [r["epochs"] for r in state(tmp_path / "run")["health"]["history"]] == [0, 1, 2, 3, 4]
    assert torch.load(tmp_path / "run" / "checkpoint-best_probe.pth", weights_only=True)["spec"]["epoch"] == 3


def test_a_clip_that_cannot_be_read_is_named_and_left_out(words, dota_root, tmp_path, capsys):
    root = tmp_path / "dota"
    shutil.copytree(dota_root, root)
    (root / "frames" / "synthetictr_000003" / "images.zip").write_bytes(b"no zip")
    in_process(words(tmp_path / "run", "--probe_data_path", root, "--probe_windows", 60, "--stop_epoch", 1))
    (record,) = log(tmp_path / "run")
    assert 40 < record["probe_windows"] < 60
    assert "DoTA train: 1 of 8 clips cannot be read and go unscored: synthetictr_000003" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--probe_every", 1], "--probe_every needs labelled data: give --probe_data_path"),
        (["--probe_data_path", "absent"], "absent"),
        (["--probe_data_path", "DOTA", "--probe_split", "test"], "no split 'test'"),
        (["--probe_data_path", "DOTA", "--assume_fps", 10], "the frame rate of videos and DoTA is known"),
    ],
    ids=range(4),
)
def test_mistakes_are_explained_before_the_folder_is_taken(words, dota_root, tmp_path, more, message):
    with pytest.raises((ConfigError, DataError)) as caught:
        in_process(words(tmp_path / "run", *(dota_root if word == "DOTA" else word for word in more)))
    assert message in str(caught.value) and not (tmp_path / "run" / "args.json").exists()


@pytest.mark.slow
def test_two_processes_probe_as_one_does_and_train_as_one_without(finished, words, probe, tmp_path):
    folder = tmp_path / "two"
    done = run("run_dapt.py", *words(folder, *probe, "--drop_path", 0), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": AUC_ROC ") == 4
    first, one = (state(f)["health"]["history"][0] for f in (folder, finished))
    assert first == pytest.approx(one, rel=1e-4, nan_ok=True)
    in_process(words(tmp_path / "one", "--drop_path", 0))
    a, b = (load_weights(f / "checkpoint-2.pth") for f in (folder, tmp_path / "one"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-4)
