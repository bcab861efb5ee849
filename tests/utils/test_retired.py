"""The way over from simple-tad: each of its flags is still there or answered, and docs/simple-tad.md says which."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

from utils import retired
from utils.flags import dapt_parser, finetune_parser

DOC = (ROOT / "docs" / "simple-tad.md").read_text()
SCRIPTS = {
    "run_finetune.py": (finetune_parser, retired.FINETUNE, "## Flags of fine-tuning"),
    "run_dapt.py": (dapt_parser, retired.DAPT, "## Flags of DAPT"),
}
FLAGS = [line.split() for line in (Path(__file__).parent / "simple_tad_flags.txt").read_text().splitlines()]


def section(title):
    return DOC.split(title + "\n")[1].split("\n## ")[0]


def refusal(parser, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        parser("x").parse_args(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_simple_tad_is_there_or_answered(script, capsys):
    parser, gone, title = SCRIPTS[script]
    there, gone_flags = parser("x")._option_string_actions, {name for name in gone if " " not in name}
    assert not gone_flags & there.keys()
    of_this = {flag for name, flag in FLAGS if name == script}
    assert of_this == gone_flags | (of_this & there.keys()) and len(of_this) > 45
    documented = set(re.findall(r"`(--\w+(?: [\w-]+)?)`", section(title)))
    new = {"--no_transforms_finetune_align", "--stop_epoch"}
    assert documented - new == of_this | gone.keys(), "each flag stands in docs/simple-tad.md"
    for name, reason in gone.items():
        assert re.search(rf"^\| .*`{re.escape(name)}`.* \| {re.escape(reason)} \|$", section(title), re.M), name
        answer = refusal(parser, name.split(), capsys)
        assert f"error: {name} is gone: {reason}\n" in answer and len(max(answer.splitlines(), key=len)) < 160


def test_the_command_line_of_a_job_file_is_answered_as_documented(capsys, monkeypatch):
    before, answer, after = (block.split("\n", 1)[1].replace("\\\n", "") for block in DOC.split("```")[1:6:2])
    words = shlex.split(before)
    monkeypatch.setattr("sys.argv", words[1:])
    assert refusal(finetune_parser, words[2:], capsys) == answer
    gone = {"--nb_classes": 2, "--short_side_size": 2, "--dist_eval": 1, "--enable_deepspeed": 1}
    for flag, count in gone.items():
        del words[words.index(flag) : words.index(flag) + count]
    then, short = (vars(finetune_parser("x").parse_args(w[2:])) for w in (words, shlex.split(after)))
    open_ = {"batch_size", "num_frames", "input_size", "view_fps", "sampling_rate_val", "lr", "log_dir", "num_workers"}
    assert {name for name in then if then[name] != short[name]} == open_  # that the model and the data set fill in


def test_answers_are_a_line_each_and_said_once(capsys):
    words = [
        "--zero_stage",
        "0",
        "--short_side_size=224",
        "--layer_deca",
        "1",
        "--zero_stage=1",
        "--sampling_rate_val=-1",
    ]
    lines = refusal(finetune_parser, words, capsys).splitlines()
    assert [line.split(" is gone")[0] for line in lines[1:5]] == [
        "  --zero_stage",
        "  --short_side_size 224",
        "  unknown flag --layer_deca, did you mean --layer_decay?",
        "  --sampling_rate_val -1",
    ]
    assert len(lines) == 6
    words = ["--data_path", "x", "--output_dir=--dist_eval", "--model_prefix=--x"]
    assert finetune_parser("x").parse_args(words).model_prefix == "--x"  # no flag but a value
