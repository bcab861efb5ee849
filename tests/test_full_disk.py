"""Disks that are full, read-only or gone: what is lost is said in a line, and what is there is kept."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import ROOT, load_weights, run

import run_dapt
import run_finetune
from datasets import DataError
from datasets.tools.pack import Settings, pack
from datasets.tools.pack_clip import pack_clip
from engine.checkpoint import CheckpointWriteError, save_weights
from engine.evaluate import EvaluationError
from engine.plots import FIGURES
from engine.report import Options, write_report
from models import create_model
from models.weights import CheckpointError, fetch
from utils.cli import ConfigError
from utils.files import check_writable, replaced, temporary_beside
from utils.flags import dapt_parser, finetune_parser
from utils.logging import TensorBoard, append_json_line

FULL = "No space left on device"
TINY = ["--model", "vit_tiny_patch16_64", "--device", "cpu", "--num_workers", "0", "--aa", "none"]


def finetune(root, output, *more):
    words = ["--data_set", "DoTA", "--data_path", root, "--output_dir", output, *TINY, *more]
    run_finetune.main(finetune_parser("").parse_args([str(word) for word in words]))


def fill_up(path):
    """Let what this process writes to `path`, in one rename, find the disk full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_beside(path).symlink_to("/dev/full")


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_weights(path, create_model("vit_tiny_patch16_64", init_scale=30.0))
    return path


@pytest.fixture(scope="module")
def evaluated(dota_root, weights, tmp_path_factory):
    """The folder of an evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(dota_root, folder, weights)
    return folder


def evaluate(root, output, weights, *more):
    finetune(root, output, "--eval", "--sampling_rate_val", 4, "--finetune", weights, *more)


@pytest.fixture
def no_scoring(monkeypatch):
    """Lets what scores fail."""

    def score(*_):
        raise AssertionError("scored again")

    return lambda: monkeypatch.setattr(run_finetune.Scorer, "score", score)


@pytest.mark.parametrize("name", ["metrics.json", "plots/roc.png", "plots/confusion.png"])
def test_what_cannot_be_written_is_made_again_from_the_scores(
    dota_root, weights, evaluated, tmp_path, name, no_scoring
):
    fill_up(tmp_path / name)
    with pytest.raises(EvaluationError, match=rf"{tmp_path / name}: cannot be written \({FULL}\); predictions.csv is"):
        evaluate(dota_root, tmp_path, weights)
    assert not (tmp_path / name).exists() and (tmp_path / "predictions.csv").exists()
    no_scoring()
    with pytest.raises(ConfigError, match=r"exists: .* other arguments: sampling_rate_val: 4 -> 2"):
        evaluate(dota_root, tmp_path, weights, "--sampling_rate_val", 2)
    other = shutil.copy(weights, tmp_path.with_suffix(".pth"))
    with pytest.raises(ConfigError, match=r"exists: .* other arguments: finetune: "):
        evaluate(dota_root, tmp_path, other)
    evaluate(dota_root, tmp_path, weights, "--num_workers", 1)
    for same in ("metrics.json", "predictions.csv"):
        assert (tmp_path / same).read_text() == (evaluated / same).read_text()
    assert files(tmp_path) == files(evaluated)
    with pytest.raises(ConfigError, match=r"predictions.csv exists: choose another --output_dir or remove it$"):
        evaluate(dota_root, tmp_path, weights)


def test_an_evaluation_ends_with_its_report(dota_root, evaluated):
    (made,) = json.loads((evaluated / "report.json").read_text())["models"]
    trivial = made["baselines"]["of"]
    train = len((dota_root / "dataset" / "train_split.txt").read_text().split())
    assert trivial["position"]["how"] == f"learned on the labels of DoTA train, {train} clips"
    assert made["data"]["sources"] == made["data"]["clips"] == 5  # of the column source: the names would say 1
    assert made["data"]["clip_list"] == json.loads((evaluated / "metrics.json").read_text())["clip_list"]
    shown = sum(len(c["shown"]) for c in (*made["clips"]["best"], *made["clips"]["worst"], *made["false_alarms"]))
    assert (evaluated / "report.html").read_text().count("<img") == shown >= 8


def test_a_report_that_cannot_be_written_loses_nothing(dota_root, weights, evaluated, tmp_path, no_scoring, capsys):
    page = tmp_path / "report.html"
    fill_up(page)
    evaluate(dota_root, tmp_path, weights)
    said = capsys.readouterr().out
    assert f"there is no report: {page}: cannot be written ({FULL}); metrics.json and plots/ are whole" in said
    assert not page.exists()
    assert (tmp_path / "metrics.json").read_text() == (evaluated / "metrics.json").read_text()
    no_scoring()
    evaluate(dota_root, tmp_path, weights)  # as was said
    said = capsys.readouterr().out
    assert re.search("The model .* a prior that knows nothing but where in its clip", said)
    assert f"report: {page}" in said and files(tmp_path) == files(evaluated)
    assert page.read_text().count("<img") == (evaluated / "report.html").read_text().count("<img")


def test_a_report_of_scores_with_another_digit_says_so(evaluated, tmp_path):
    """As after a flipped bit: it is a score like any other."""
    scores = shutil.copytree(evaluated, tmp_path / "run") / "predictions.csv"
    whole, said = scores.read_bytes(), []
    at = re.search(rb"\n[^,]+,[^,]+,\d+,[^,]+,[^,]+,[^,]+,0\.\d\d(\d)", whole).start(1)
    for damaged in (whole, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        scores.write_bytes(damaged)
        text, _ = write_report({"a": [scores]}, tmp_path, Options(replicates=20))
        said.append(f"note: {scores} is not as the evaluation wrote it" in text)
    assert said == [False, True]


def test_a_report_without_the_data_at_hand_says_so(dota_root, weights, evaluated, tmp_path, no_scoring, capsys):
    """The scores are there, the pictures and the labels are not any more."""
    shutil.copytree(dota_root, tmp_path / "data")
    evaluate(tmp_path / "data", tmp_path / "run", weights)
    for made in ("report.json", "report.html"):
        (tmp_path / "run" / made).unlink()
    shutil.rmtree(tmp_path / "data")
    no_scoring()
    evaluate(tmp_path / "data", tmp_path / "run", weights)
    said = capsys.readouterr().out
    assert "no pictures in the report, since DoTA val is not at hand" in said
    (made,) = json.loads((tmp_path / "run" / "report.json").read_text())["models"]
    assert "each tenth from the others: DoTA train is not at hand (" in made["baselines"]["of"]["position"]["how"]
    assert "<img" not in (tmp_path / "run" / "report.html").read_text() and files(tmp_path / "run") == files(evaluated)


def test_a_weights_file_without_room_stays_as_it_is(dota_root, tmp_path, capsys):
    """The operating point is in metrics.json, and nothing is lost."""
    torch.manual_seed(0)
    mine = tmp_path / "w.pth"
    save_weights(mine, create_model("vit_tiny_patch16_64", init_scale=30.0))
    content = mine.read_bytes()
    fill_up(mine)
    evaluate(dota_root, tmp_path / "out", mine)
    said = rf"w.pth: cannot be written \({FULL}\); what was there before is intact: the operating point is in"
    assert re.search(said, capsys.readouterr().out) and mine.read_bytes() == content
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["operating_point"]["criterion"] == "mcc"
    assert files(tmp_path / "out") and not list(tmp_path.glob(".*.tmp"))


def test_scores_of_weights_that_have_changed_are_refused(dota_root, weights, evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "plots")
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(ConfigError, match="it is of weights that have changed since"):
        evaluate(dota_root, tmp_path / "run", weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    evaluate(dota_root, tmp_path / "run", weights)
    assert files(tmp_path / "run") == files(evaluated)


def test_scores_of_weights_that_change_meanwhile_are_not_those_of_the_new(dota_root, weights, tmp_path, when_scored):
    """As those of a run do that trains on, or they are gone: what is scored is kept."""
    mine = shutil.copy(weights, tmp_path / "w.pth")
    when_scored(lambda: (fill_up(tmp_path / "a" / "metrics.json"), mine.write_bytes(weights.read_bytes())))
    with pytest.raises(EvaluationError, match="metrics.json: cannot be written"):
        evaluate(dota_root, tmp_path / "a", mine)
    with pytest.raises(ConfigError, match="it is of weights that have changed since"):
        evaluate(dota_root, tmp_path / "a", mine)
    when_scored(mine.unlink)
    evaluate(dota_root, tmp_path / "b", mine)
    assert (tmp_path / "b" / "metrics.json").exists()


def test_scores_that_were_cut_or_changed_are_refused(dota_root, weights, evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    path = tmp_path / "run" / "predictions.csv"
    lines = path.read_text().splitlines(keepends=True)
    cases = [("".join(lines[:-1]), "66 rows, 67 were written"), ("a,b\n1,2\n", "not the scores of an")]
    cases.append(("".join(lines).replace("0.", "1.", 1), "predictions.csv is not as it was written: remove it"))
    for text, reason in cases:
        path.write_text(text)
        with pytest.raises(EvaluationError, match=reason):
            evaluate(dota_root, tmp_path / "run", weights)


@pytest.fixture
def when_scored(monkeypatch):
    """Lets something happen before scores are written."""
    keep = run_finetune.outputs.keep_scores
    return lambda happens: monkeypatch.setattr(run_finetune.outputs, "keep_scores", lambda *v: (happens(), keep(*v))[1])


@pytest.mark.parametrize("name", ["predictions.csv", "eval_args.json", None])
def test_scores_without_a_place_go_to_another(
    dota_root, weights, evaluated, tmp_path, name, no_scoring, monkeypatch, when_scored
):
    """The disk fills up while the windows are scored, or the folder goes."""
    (tmp_path / "refuge").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "refuge"))
    folder, reason = tmp_path / "run", FULL if name else "No such file or directory"
    when_scored(lambda: fill_up(folder / name) if name else shutil.rmtree(folder))
    with pytest.raises(EvaluationError, match=rf"predictions.csv: cannot be written \({reason}\); the scores are in"):
        evaluate(dota_root, folder, weights)
    (refuge,) = (tmp_path / "refuge").iterdir()
    assert files(refuge) == ["eval_args.json", "predictions.csv"]
    assert not folder.exists() if name is None else files(folder) == ["eval_args.json"]
    folder.mkdir(exist_ok=True)
    for path in refuge.iterdir():
        shutil.move(path, folder / path.name)
    no_scoring()
    evaluate(dota_root, folder, weights)
    assert files(folder) == files(evaluated)
    assert (folder / "metrics.json").read_text() == (evaluated / "metrics.json").read_text()


def test_a_folder_without_room_is_refused_before_it_is_needed(dota_root, weights, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        evaluate(dota_root, weights / "below", weights)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))
    with pytest.raises(ConfigError, match=rf"run: cannot be written \({FULL}: about 11.9 MB are needed\); choose"):
        finetune(dota_root, tmp_path / "run", "--epochs", 1, "--warmup_epochs", 0)
    assert files(tmp_path) == []


def test_a_disk_that_is_tried(tmp_path):
    check_writable(tmp_path / "new", 10)
    assert files(tmp_path) == []
    with pytest.raises(OSError, match=r"needed: '.*new'") as full:
        check_writable(tmp_path / "new", 10**18)
    assert full.value.errno == errno.ENOSPC


# ----------------------------------------------------------------------------------------------------------------------
# What else is written


def test_a_pack_goes_on_once_there_is_room(dota_root, tmp_path, monkeypatch):
    def full(job):
        if job.clip.name.endswith("va_000003"):
            raise OSError(errno.ENOSPC, FULL)
        return pack_clip(job)

    settings = Settings(short_side=32, fps=0, quality=50)
    with monkeypatch.context() as patch:
        patch.setattr("datasets.tools.pack.pack_clip", full)
        with pytest.raises(DataError, match=rf"pack: cannot be written \(.*{FULL}.*\); what is packed is kept"):
            pack("DoTA", str(dota_root), tmp_path / "pack", settings=settings)
    done = len((tmp_path / "pack" / "clips.jsonl").read_text().splitlines())
    pack("DoTA", str(dota_root), tmp_path / "pack", settings=settings)
    assert 0 < done < len((tmp_path / "pack" / "clips.jsonl").read_text().splitlines()) == 13


def test_processes_of_one_id_on_two_hosts_write_files_of_their_own(tmp_path, monkeypatch):
    """As in containers of one image, where each first process is number 1, say."""
    with replaced(tmp_path / "features.pth") as one:
        one.write_text("one")
        monkeypatch.setattr("utils.files._STARTED", b"another", raising=False)
        with replaced(tmp_path / "features.pth") as other:
            other.write_text("other, longer")
        assert (tmp_path / "features.pth").read_text() == "other, longer"
    assert (tmp_path / "features.pth").read_text() == "one" and files(tmp_path) == ["features.pth"]


def test_a_download_that_finds_no_room_is_no_failed_download(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("models.weights.file.urlopen", lambda *_, **__: weights.open("rb"))
    for path, reason in ((tmp_path / "checkpoints", "File exists"), (tmp_path / "checkpoints", FULL)):
        if reason == FULL:
            path.unlink()
            path.mkdir()
            digest = hashlib.sha256(b"http://host/w.pth").hexdigest()[:8]
            fill_up(path / f"{digest}-w.pth")
        else:
            path.touch()
        with pytest.raises(CheckpointError, match=rf"w.pth: cannot be written \({reason}\); set TORCH_HOME to another"):
            fetch("http://host/w.pth")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "command",
    [
        ["datasets.tools.synthetic", "OUT", "--train", "1", "--val", "1"],
        ["datasets.tools.prepare", "half", "DoTA", "ROOT", "--out", "OUT"],
    ],
)
def test_commands_say_in_a_line_that_they_cannot_write(dota_root, command):
    """Below /proc, where no file can be made."""
    places = {"ROOT": dota_root, "OUT": "/proc/out"}
    done = run("-m", *(places.get(word, word) for word in command))
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "/proc/out" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_whoever_writes_a_file_hears_why_it_cannot_be(tmp_path):
    path = tmp_path / "w.pth"
    fill_up(path)
    with pytest.raises(CheckpointWriteError, match=rf"{path}: cannot be written \({FULL}\); what was there"):
        save_weights(path, create_model("vit_tiny_patch16_64"))
    fill_up(path)
    with pytest.raises(OSError, match=rf"{FULL}: '{path}'"), replaced(path) as temporary:
        temporary.write_text("text")
    with pytest.raises(RuntimeError, match="no fault of the disk"), replaced(path) as temporary:
        temporary.touch()
        raise RuntimeError("no fault of the disk")
    assert files(tmp_path) == []


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    script = (
        "import json, resource, sys\nfrom utils.logging import append_json_line\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for i in range(9):\n append_json_line(sys.argv[1], {'number': i, 'text': 15 * 'x'})\n"
    )
    path = tmp_path / "log.txt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert f"File too large: '{path}'" in done.stderr
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1]
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"{FULL}: '{tmp_path / 'full'}'"):
        append_json_line(tmp_path / "full", {})


def test_a_log_that_is_full_ends_a_run_with_its_epoch_saved(dota_root, tmp_path, monkeypatch):
    words = ["--nb_samples_per_epoch", 8, "--total_batch_size", 4, "--epochs", 2, "--warmup_epochs", 0]
    words += ["--disable_eval_during_finetuning"]
    finetune(dota_root, tmp_path / "whole", *words)

    def full(path, record):
        if record["epoch"] == 1:
            raise OSError(errno.ENOSPC, FULL, str(path))
        append_json_line(path, record)

    with monkeypatch.context() as patch:
        patch.setattr("engine.session.append_json_line", full)
        with pytest.raises(CheckpointWriteError, match=rf"log.txt: cannot be written \({FULL}\)"):
            finetune(dota_root, tmp_path / "run", *words)
    monkeypatch.setattr("engine.loop.train_one_epoch", None)  # nothing is to be trained again
    finetune(dota_root, tmp_path / "run", *words)
    one, two = ((tmp_path / name / "log.txt").read_text().splitlines() for name in ("whole", "run"))
    for a, b in zip(one, two, strict=True):
        assert json.loads(a) | {"seconds": 0} == json.loads(b) | {"seconds": 0}
    one, two = (load_weights(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_pictures_are_no_reason_to_end_a_run(data, tmp_path, capsys):
    (tmp_path / "pictures").write_text("in the way")
    words = ["--data_set", "videos", "--data_path", data / "videos", "--output_dir", tmp_path, *TINY]
    words += ["--model", "pretrain_videomae_tiny_patch16_64", "--nb_samples_per_epoch", 4, "--total_batch_size", 4]
    words += ["--epochs", 1, "--warmup_epochs", 0]
    run_dapt.main(dapt_parser("").parse_args([str(word) for word in words]))
    assert f"{tmp_path}/pictures: cannot be written (File exists); the run goes on" in capsys.readouterr().out
    assert (tmp_path / "log.txt").exists() and (tmp_path / "checkpoint-0.pth").exists()


@pytest.fixture
def board(tmp_path, monkeypatch):
    """TensorBoard in a folder, and what it warns of."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    warned = []
    monkeypatch.setattr("logging.Logger.warning", lambda _self, text: warned.append(text))
    return TensorBoard(tmp_path / "events"), warned


def full(*_):
    raise OSError(errno.ENOSPC, FULL)


NO_ROOM_FOR_EVENTS = ("tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem._write", full)


@pytest.mark.parametrize("cause", ["gone", "full"])
def test_tensorboard_warns_once_and_the_run_goes_on(tmp_path, board, monkeypatch, capfd, cause):
    (board, warned), reason = board, FULL if cause == "full" else "No such file or directory"
    board.scalars("train", {"loss": 1.0}, 1)
    if cause == "gone":
        shutil.rmtree(tmp_path / "events")
    else:
        monkeypatch.setattr(*NO_ROOM_FOR_EVENTS)
    if board._writer:
        board._writer.file_writer.event_writer._async_writer._worker._next_flush_time = 0  # as every two minutes
    deadline = time.monotonic() + 60
    while not warned:  # what its thread raises comes later
        board.scalars("train", {"loss": 1.0}, 2)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    board.scalars("train", {"loss": 1.0}, 3)
    board.picture("picture", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy(), 3)
    board.close()
    assert warned == [f"TensorBoard: {tmp_path / 'events'} cannot be written ({reason}); the run goes on without it"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_board_that_fails_at_its_end_warns_too(board, monkeypatch):
    board, warned = board
    board.scalars("train", {"loss": 1.0}, 1)
    monkeypatch.setattr(*NO_ROOM_FOR_EVENTS)
    board.scalars("train", {"loss": 1.0}, 2)
    board.close()
    assert len(warned) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_run_on_a_small_disk_ends_with_one_line(dota_root, tmp_path):
    """Room for the state, none for weights beside it."""
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=13m", "tmpfs", tmp_path / "disk"], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        words = ["--data_set", "DoTA", "--data_path", dota_root, "--output_dir", tmp_path / "disk" / "run", *TINY]
        words += ["--nb_samples_per_epoch", 4, "--total_batch_size", 4, "--epochs", 1, "--warmup_epochs", 0]
        done = run("run_finetune.py", *words, "--disable_eval_during_finetuning")
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)
    reason = f"cannot be written ({FULL}); what was there before is intact"
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path}/disk/run/checkpoint-0.pth: {reason}\n"


def test_figures_are_those_that_are_looked_for(evaluated):
    assert {p.stem for p in (evaluated / "plots").iterdir()} == set(FIGURES)
