"""Ranks agree before the first step, add up in the same order in every step, and end with their torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from background import Run, dapt, finetune, log
from helpers import ROOT, run

import run_dapt
import run_finetune
from utils import lock
from utils.cli import ConfigError
from utils.flags import dapt_parser, finetune_parser

SHORT = ["--epochs", 2, "--warmup_epochs", 0, "--nb_samples_per_epoch", 40, "--disable_eval_during_finetuning"]


def cases(folder, *names, processes):
    """What each rank says of cases of tests/ranks.py."""
    done = run("tests/ranks.py", folder, *names, processes=processes, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_a_run_that_is_stopped_after_any_step_sums_as_if_it_were_not(tmp_path, processes):
    """With one pass for each step, and with two."""
    assert cases(tmp_path, "sums", processes=processes) == [{"sums": {"equal": True}}] * processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the cases on two ranks, and what each says."""
    folder = tmp_path_factory.mktemp("two")
    return folder, cases(folder, "states", "weights", "download", "memory", processes=2)


@pytest.mark.slow
def test_no_rank_starts_with_another_state_than_rank_0(two):
    folder, ranks = two
    said, again = (rank["states"] for rank in ranks)
    assert said == again
    host = os.uname().nodename
    shared = "must be a folder that all nodes share"
    none = f"rank 1 on {host} finds no state in {folder}/1"
    continues = f"rank 0 on {host} continues {folder}/0/one/checkpoint-last"
    assert said["none"] is None
    assert said["rank 0 alone"] == f"{none}/one, {continues}: --output_dir {shared}"
    assert said["rank 0 alone, --resume"] == f"{none}/new, {continues}: --output_dir and --resume {shared}"
    other = f"rank 1 on {host} finds another state in {folder}/1/{{}}/checkpoint-last"
    assert said["rank 1 alone"] == f"{other.format('other')}, rank 0 on {host} finds none: --output_dir {shared}"
    assert said["two states"] == f"{other.format('one')}, {continues}: --output_dir {shared}"
    assert said["late"][0] == 3 and said["late"][1] > 0
    assert "belongs to a run with other arguments (lr: 1 -> 2)" in said["other arguments"]
    assert "state.pth is damaged" in said["damaged"]


@pytest.mark.slow
def test_weights_that_differ_between_ranks_are_refused_and_roundings_are_not(two):
    one, again = (rank["weights"] for rank in two[1])
    host = os.uname().nodename
    assert one == again and one["rounding"] is None and one["keys"] == one["step"]
    assert one["step"].startswith(f"--finetune x.pth holds other weights on {host}, for rank 1, than on {host}")
    assert one["values"].startswith(f"rank 0 on {host} has epoch 0, but rank 1 on {host} has epoch 1: start every")


@pytest.mark.slow
def test_a_download_may_take_longer_than_ranks_wait_for_each_other(two):
    assert [rank["download"] for rank in two[1]] == [{"after": False}, {"after": True}]


@pytest.mark.slow
def test_ranks_share_the_memory_of_the_state_they_read(two):
    for rank in two[1]:
        assert rank["memory"]["read"] and rank["memory"]["MiB"] < 16  # of 32


def unlike(tmp_path, first, second, *words):
    """The output of two ranks, the first of which gets some flags more, the second others."""
    script = tmp_path / "rank.sh"
    more = [" ".join(map(str, m)) for m in (first, second)]
    script.write_text(f'more=("{more[0]}" "{more[1]}")\n"$@" ${{more[RANK]}}\n')  # bash stays between torchrun and rank
    return Run(["--no-python", "bash", script, sys.executable, *words], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        (["--lr", 0.01], ["--lr", 0.02], "--lr 0.01, but rank 1 on {host} has --lr 0.02"),
        (["--resume", "x"], ["--eval"], "--resume x, --eval False, but rank 1 on {host} has no --resume, --eval True"),
    ],
)
def test_a_rank_with_other_flags_is_refused_by_their_name(data, tmp_path, first, second, names):
    attempt = unlike(tmp_path, first, second, *finetune(data))
    host = os.uname().nodename
    assert attempt.end(120) == 1
    assert f"error: rank 0 on {host} has {names.format(host=host)}" in attempt.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_end_with_a_torchrun_that_is_killed_and_the_same_command_goes_on_at_once(data, tmp_path):
    """Although a script stands between the two, and loading processes below."""
    words = finetune(data, *SHORT)
    attempt = unlike(tmp_path, [], [], *words, "--save_every_minutes", 1e-6)
    attempt.until_said("epoch 0  step 7/")
    orphans = [pid for pid in attempt.tree() if "python" in Path(f"/proc/{pid}/cmdline").read_text()][1:]
    assert len(orphans) >= 4
    attempt.process.kill()
    attempt.process.wait()
    again = Run(words, tmp_path / "run")
    assert again.end(240) == 0, again.output
    assert "resuming at epoch" in again.output and [record["epoch"] for record in log(tmp_path / "run")] == [0, 1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)
    assert "error: torchrun has ended without ending this process; leaving at once" in attempt.output


@pytest.mark.parametrize("script", ["training", "DAPT", "evaluation"])
def test_no_run_starts_in_the_folder_of_another(data, tmp_path, monkeypatch, script):
    monkeypatch.setattr(lock, "_ENDING", 0.0)
    words = dapt(data) if script == "DAPT" else finetune(data, *["--eval"][: script == "evaluation"])
    (main, parser) = (run_dapt.main, dapt_parser) if script == "DAPT" else (run_finetune.main, finetune_parser)
    code = "import sys\nfrom utils.lock import folder_lock\nwith folder_lock(sys.argv[1]): print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        (tmp_path / "REQUEUE").touch()
        with pytest.raises(ConfigError, match=f"{tmp_path} is in use by the run of process {other.pid} on .* since 20"):
            main(parser("").parse_args([str(word) for word in words[1:]] + ["--output_dir", str(tmp_path)]))
        assert sorted(os.listdir(tmp_path)) == [".lock", "REQUEUE"]  # all of it is the other's
        other.kill()
