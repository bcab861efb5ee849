"""The command line: what a flag owes its user."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from datasets.formats import DATA_SETS
from engine.losses import LOSSES
from models import list_models
from utils import names
from utils.cli import Parser
from utils.flags import dapt_parser, finetune_parser
from utils.predict_flags import predict_parser


def flags(parser):
    return [a for a in parser._actions if a.option_strings and "--help" not in a.option_strings]


SCRIPTS = {"run_finetune.py": finetune_parser, "run_dapt.py": dapt_parser, "run_predict.py": predict_parser}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_groups_are_short(script):
    parser = SCRIPTS[script]("x")
    assert all(a.help and len(a.help) > 15 for a in flags(parser))
    assert all(len(g._group_actions) <= 15 for g in parser._action_groups)
    assert len(parser.most) <= 8 and set(parser.most) <= {a.dest for a in flags(parser)}
    text = parser.format_help()  # where no flag is lost or said twice
    assert all(len(re.findall(rf"^  {a.option_strings[0]}\b", text, re.M)) == 1 for a in flags(parser))
    used = (ROOT / script).read_text() + (ROOT / "utils" / "resolve.py").read_text()
    for action in flags(parser):  # a flag that does nothing is a bug
        assert re.search(rf'args\.{action.dest}\b|"{action.dest}"', used), action.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_imports_nothing_heavy(script):
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / script, "--help"], capture_output=True, text=True)
    assert time.perf_counter() - started < 15  # on a machine that is busy
    assert done.returncode == 0 and "--output_dir" in done.stdout and "torchrun --standalone" in done.stdout
    sentence, usage, most = (done.stdout.index(text) for text in (".\n", "usage:", "what most runs need:"))
    assert sentence < usage < most < done.stdout.index("\noptions:") and done.stdout[usage:most].count("\n") < 8
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "av", "timm", "numpy"}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "required: --data_path, --output_dir\n(--help lists every flag)"),
        (["--layer_deca", "0.6"], "unknown flag --layer_deca, did you mean --layer_decay?"),
        (["--data-path=x"], "unknown flag --data-path, did you mean --data_path?"),
        (["--zzz"], "unknown flag --zzz\n"),
        (["--enable_deepspeed"], "--enable_deepspeed is gone: DistributedDataParallel"),
        (["--color_jitter", "0.4"], "--color_jitter is gone: it had no effect in simple-tad either"),
        (["--update_freq", "0"], "--update_freq: '0' is not a whole number above 0"),
        (["--model", "vit_small_patch16_224"], "required: --data_path, --output_dir"),
        (["--data_path", "x", "--output_dir", "y", "--loss", "hinge"], "invalid choice: 'hinge'"),
        (["--data_path", "x", "--output_dir", ""], "--output_dir: it is empty: give a folder; . is the current one"),
        (["--data_path", "x", "--output_dir", "y", "stray"], "unrecognized arguments: stray"),
        (["--data_path", "x", "--output_dir", "y", "--lr", "fast"], "--lr: 'fast' is not a number above 0"),
        (["--data_path", "x", "--output_dir", "y", "--clip_grad", "-1"], "--clip_grad: '-1' is not a number above 0"),
        (["--data_path", "x", "--output_dir", "y", "--view_fps", "inf"], "--view_fps: 'inf' is not a number above 0"),
        (["--data_path", "x", "--output_dir", "y", "--num_workers", "-1"], "'-1' is not a whole number from 0 to 1024"),
    ],
)
def test_mistakes_are_answered(words, answer, capsys):
    with pytest.raises(SystemExit) as exit_:
        finetune_parser("x").parse_args(words)
    assert exit_.value.code == 2 and answer in capsys.readouterr().err


def test_a_file_may_be_called_like_a_flag():
    words = ["--weights", "w", "--output_dir", "o", "--", "-dash.mp4", "--threshold"]
    assert predict_parser("x").parse_args(words).inputs == words[-2:]


def rule(parser, name):
    """What a resumed run may do with a flag."""
    return "free" if name in parser.free_on_resume else "override" if name in parser.overridable else "fixed"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_flag_is_a_decision(script):
    """The flags, and whether a resumed run may change them, are those of frozen_flags.txt."""
    parser = SCRIPTS[script]("x")
    now = {
        f"{script} {option} {rule(parser, action.dest)}" for action in flags(parser) for option in action.option_strings
    }
    lines = (Path(__file__).parent / "frozen_flags.txt").read_text().splitlines()
    frozen = {line for line in lines if line.startswith(script)}
    assert now == frozen, "add or remove the flag in tests/utils/frozen_flags.txt if you mean it"


def test_names_on_the_command_line_are_those_there_are():
    """utils/names.py imports nothing, so nothing else keeps it true."""
    assert sorted((*names.CLASSIFIERS, *names.MASKED_AUTOENCODERS)) == list_models()
    labelled = [name for name, data_set in DATA_SETS.items() if data_set.labelled]
    assert list(names.LABELLED_SETS) == labelled
    assert list(names.UNLABELLED_SETS) == [name for name in DATA_SETS if name not in labelled]
    assert list(names.LOSSES) == list(LOSSES)


def test_abbreviations_are_not_guessed():
    assert isinstance(finetune_parser("x"), Parser)
    with pytest.raises(SystemExit):
        finetune_parser("x").parse_args(["--data_path", "x", "--output_dir", "y", "--epoch", "3"])


def test_defaults_are_the_published_recipe():
    args = finetune_parser("x").parse_args(["--data_path", "a", "--output_dir", "b"])
    assert (args.epochs, args.warmup_epochs, args.layer_decay, args.drop_path) == (50, 5, 0.6, 0.2)
    assert (args.min_lr, args.weight_decay, args.opt, args.opt_betas) == (1e-6, 0.05, "adamw", [0.9, 0.999])
    assert (args.nb_samples_per_epoch, args.aa, args.reprob) == (50000, "rand-m6-n3-mstd0.5-inc1", 0.25)
    assert (args.loss, args.seed, args.init_scale, args.clip_grad) == ("crossentropy", 42, 0.001, None)
