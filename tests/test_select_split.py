"""run_finetune.py --select_split: the best checkpoint is chosen on recordings held out from train."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import load_weights

import run_finetune
from datasets import build_clips
from datasets.splits import draw_sources, hold_out, sources_of
from datasets.tools.prepare import prepare_split
from run_finetune import ConfigError, DataError
from utils.flags import finetune_parser

FED = ["--data_set", "DoTA", "--device", "cpu", "--num_workers", "0"]
SHORT = ["--nb_samples_per_epoch", "16", "--total_batch_size", "4", "--epochs", "2", "--warmup_epochs", "1"]
TINY = [*FED, "--model", "vit_tiny_patch16_64", *SHORT]


def command(root, output, *words):
    words = [*words, "--data_path", root, "--output_dir", output]
    run_finetune.main(finetune_parser("").parse_args([str(word) for word in words]))


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(dota_root, tmp_path_factory):
    """Training clips of four recordings, two of each, and no other split."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "dataset" / "annotations").mkdir(parents=True)
    (root / "frames").mkdir()
    names = (dota_root / "dataset" / "train_split.txt").read_text().split()
    for i, name in enumerate(names):
        own = f"video{i // 2}_{i:06d}"
        shutil.copy(
            dota_root / "dataset" / "annotations" / f"{name}.json", root / "dataset" / "annotations" / f"{own}.json"
        )
        (root / "frames" / own).symlink_to(dota_root / "frames" / name)
        with (root / "dataset" / "train_split.txt").open("a") as f:
            f.write(f"{own}\n")
    return root


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The folder of a run that held out a quarter of them."""
    folder = tmp_path_factory.mktemp("finished")
    command(root, folder, *TINY, "--select_split", 0.3)
    return folder


def spec(path):
    return torch.load(path, weights_only=True)["spec"]


def test_the_best_is_chosen_on_what_is_held_out(root, finished, tmp_path, capsys):
    """The clips are those that `prepare split` lists; scored as a split, they give what the run has logged."""
    text = prepare_split("DoTA", str(root), split="train", by="source", val=0.3, seed=0, names=("fit", "select"),
                         assume_fps=None, workers=1)  # fmt: skip
    try:
        fit, select = (build_clips("DoTA", str(root), split) for split in ("fit", "select"))
        assert "select: 2 clips" in text and len(fit) == 6 and len({c.recording for c in select}) == 1
        best = finished / "checkpoint-best_auroc.pth"
        command(root, tmp_path / "eval", "--eval", "--finetune", best, *FED, "--eval_split", "select")
    finally:
        shutil.rmtree(root / "splits")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["auroc"] == pytest.approx(max(record["val_auroc"] for record in log(finished)), abs=1e-6)
    chosen = json.loads((finished / "args.json").read_text())["args"]["selected_on"]
    assert chosen == spec(best)["selected_on"] == metrics["selected_on"]
    assert chosen.startswith("0.3 of DoTA train by source: 2 of 8 clips, 1 of 4 sources, SHA-256 ")
    assert "selected_on" not in spec(finished / "checkpoint-1.pth")


def test_training_sees_nothing_of_it(root, tmp_path, monkeypatch, capsys):
    seen, original = set(), run_finetune.WindowDataset

    def recording(sources, **options):
        seen.update(clip.recording for source in sources for clip in source.clips)
        return original(sources, **options)

    monkeypatch.setattr(run_finetune, "WindowDataset", recording)
    monkeypatch.setattr(run_finetune, "train_epochs", lambda *_, **__: None)
    command(root, tmp_path, *TINY, "--select_split", 0.6)
    out = capsys.readouterr().out
    held = draw_sources(sources_of(build_clips("DoTA", str(root), "train")), 0.6)
    assert len(seen) == len(held) == 2 and not seen & held
    assert "the best checkpoint is chosen on 0.6 of DoTA train by source: 4 of 8 clips, 2 of 4 sources" in out
    assert "DoTA train, held out: 4 clips" in out


def test_a_run_in_parts_is_the_run_in_one(root, finished, tmp_path):
    for stop in (1, 2):
        command(root, tmp_path, *TINY, "--select_split", 0.3, "--stop_epoch", stop)
    for name in ("checkpoint-1.pth", "checkpoint-best_auroc.pth", "checkpoint-best_auc_mcc.pth"):
        whole, parts = (load_weights(folder / name) for folder in (finished, tmp_path))
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name
    for a, b in zip(log(finished), log(tmp_path), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    with pytest.raises(ConfigError, match=r"other arguments \(select_split: 0.3 -> 0.6\)"):
        command(root, tmp_path, *TINY, "--select_split", 0.6)
    with pytest.raises(ConfigError, match=r"other arguments \(select_split: 0.3 -> None\)"):
        command(root, tmp_path, *TINY)


def test_other_clips_of_the_same_number_are_no_way_to_go_on(root, finished, tmp_path):
    shutil.copytree(root, tmp_path / "data", symlinks=True)
    names = tmp_path / "data" / "dataset" / "train_split.txt"
    names.write_text(names.read_text().replace("video", "drive"))
    for path in [*(tmp_path / "data" / "frames").iterdir(), *(tmp_path / "data" / "dataset" / "annotations").iterdir()]:
        path.rename(path.with_name(path.name.replace("video", "drive")))
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(
        ConfigError, match="the run to continue (had|chose its best checkpoint on) .* the data has changed"
    ):
        command(tmp_path / "data", tmp_path / "run", *TINY, "--select_split", 0.3, "--stop_epoch", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--select_split", 0.2], "0.2 of 8 clips is less than any source has, the smallest 2: give 0.25 at least"),
        (["--select_split", 0.3, "--disable_eval_during_finetuning"], "leave out --disable_eval_during_finetuning"),
    ],
)
def test_what_cannot_be_held_out_is_refused(root, tmp_path, words, message):
    with pytest.raises((ConfigError, DataError), match=message):
        command(root, tmp_path, *TINY, *words)
    assert not (tmp_path / "args.json").exists()


def test_train_of_a_single_recording_is_refused(root):
    clips = build_clips("DoTA", str(root), "train")
    one = replace(clips, clips=[replace(clip, recording="one") for clip in clips])
    with pytest.raises(DataError, match="DoTA train: 8 clips of 1 source, and --select_split holds out whole sources"):
        hold_out(one, 0.3)


@pytest.mark.parametrize(("safe", "what"), [("held", "DoTA train, held out"), ("rest", "DoTA train")])
def test_a_part_without_anomalous_frames_is_refused(root, tmp_path, safe, what):
    shutil.copytree(root / "dataset", tmp_path / "data" / "dataset")
    (tmp_path / "data" / "frames").symlink_to(root / "frames")
    held = draw_sources(sources_of(build_clips("DoTA", str(root), "train")), 0.3)
    for path in (tmp_path / "data" / "dataset" / "annotations").iterdir():
        if (path.stem.split("_")[0] in held) == (safe == "held"):
            annotation = json.loads(path.read_text())
            annotation["labels"] = [label | {"accident_id": 0} for label in annotation["labels"]]
            path.write_text(json.dumps(annotation))
    with pytest.raises(
        DataError, match=f"{what}: no window of its . clips ends on an anomalous frame: .* another share"
    ):
        command(tmp_path / "data", tmp_path / "run", *TINY, "--select_split", 0.3)


def test_clips_without_recordings_count_alone(root, caplog):
    caplog.set_level("INFO")
    clips = build_clips("DoTA", str(root), "train")
    bare = replace(clips, clips=[replace(clip, recording=None) for clip in clips])
    fit, held, words = hold_out(bare, 0.26)
    assert (len(fit), len(held)) == (6, 2) and words.startswith("0.26 of DoTA train by clip: 2 of 8 clips")
    assert "the recordings of the clips are not known; each clip counts as a source of its own" in caplog.text


def test_the_draw_hardly_depends_on_what_else_there_is():
    sources = {f"video {i}": [f"{i}-{j}" for j in range(1 + i % 7)] for i in range(200)}
    drawn = draw_sources(sources, 0.1)
    total = sum(map(len, sources.values()))
    assert 0.095 * total <= sum(len(sources[source]) for source in drawn) <= 0.1 * total
    assert draw_sources(dict(reversed(sources.items())), 0.1) == drawn != draw_sources(sources, 0.1, seed=1)
    for gone in ("video 3", min(drawn)):
        rest = {source: clips for source, clips in sources.items() if source != gone}
        assert len(draw_sources(rest, 0.1) ^ drawn) <= 4
