"""The rules of the house: which way imports go, where arguments may go, what a flag owes its user."""

import ast
import re
import runpy
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from utils.cli import Parser
from utils.flags import dapt_parser, finetune_parser

ROOMS = ("models", "datasets", "engine", "utils")
MAY_IMPORT = {
    "utils": {"utils"},
    "models": {"models"},
    "datasets": {"datasets", "utils"},
    "engine": {"engine", "utils"},
}
MODEL_LIBRARIES = {"torch", "timm", "einops", "models"}


MAKE_ARGUMENTS = ("utils/cli.py", "utils/flags.py", "utils/resolve.py")
PATHS = [p for room in ROOMS for p in sorted((ROOT / room).glob("**/*.py"))] + sorted(ROOT.glob("run_*.py"))
PATHS += sorted((ROOT / "jobs").glob("*.py"))
PATHS = [str(p.relative_to(ROOT)) for p in PATHS]
INSIDE = [p for p in PATHS if p.startswith(ROOMS)]
MODEL_FILES = [p for p in PATHS if p.startswith("models/") and not p.startswith("models/weights/")]


def tree(path):
    return ast.parse((ROOT / path).read_text())


def imports(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_there_is_a_house():
    assert len(INSIDE) > 20 and {"run_finetune.py", "run_dapt.py", "jobs/submit.py"} <= set(PATHS)


@pytest.mark.parametrize("path", INSIDE)
def test_imports_go_one_way(path):
    own = {name for name in imports(path) if name in ROOMS or name.startswith("run_")}
    assert own <= MAY_IMPORT[path.split("/")[0]]


@pytest.mark.parametrize("path", MODEL_FILES)
def test_model_files_are_pure(path):
    assert set(imports(path)) <= MODEL_LIBRARIES | set(sys.stdlib_module_names)
    assert not {"open", "print"} & {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", [p for p in INSIDE if p not in MAKE_ARGUMENTS])
def test_arguments_stay_in_the_run_scripts(path):
    """No function takes a parsed-arguments object; values travel by name. MAKE_ARGUMENTS make them."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                assert arg.arg not in ("args", "cfg", "config", "opts"), f"{path}:{node.lineno}"
                assert not arg.annotation or "Namespace" not in ast.unparse(arg.annotation), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", PATHS)
def test_modules_and_public_names_are_documented(path):
    assert ast.get_docstring(tree(path))
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


@pytest.mark.parametrize("path", PATHS)
def test_files_and_functions_stay_readable(path):
    assert (ROOT / path).read_text().count("\n") <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def flags(parser):
    return [a for a in parser._actions if a.option_strings and "--help" not in a.option_strings]


SCRIPTS = {"run_finetune.py": finetune_parser, "run_dapt.py": dapt_parser}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_groups_are_short(script):
    parser = SCRIPTS[script]("x")
    assert all(a.help and len(a.help) > 15 for a in flags(parser))
    assert all(len(g._group_actions) <= 15 for g in parser._action_groups)
    used = (ROOT / script).read_text() + (ROOT / "utils" / "resolve.py").read_text().split("SCHEDULE =")[1]
    for action in flags(parser):  # a flag that does nothing is a bug
        assert re.search(rf'args\.{action.dest}\b|"{action.dest}"', used), action.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_imports_nothing_heavy(script):
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / script, "--help"], capture_output=True, text=True)
    assert time.perf_counter() - started < 3
    assert done.returncode == 0 and "--weight_decay" in done.stdout and "torchrun --standalone" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "decord", "timm", "numpy"}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--layer_deca", "0.6"], "unknown flag --layer_deca, did you mean --layer_decay?"),
        (["--data-path=x"], "unknown flag --data-path, did you mean --data_path?"),
        (["--zzz"], "unknown flag --zzz\n"),
        (["--enable_deepspeed"], "--enable_deepspeed is gone: DistributedDataParallel"),
        (["--color_jitter", "0.4"], "--color_jitter is gone: it had no effect in simple-tad either"),
        (["--update_freq", "0"], "--update_freq: '0' is not a whole number above 0"),
        (["--model", "vit_small_patch16_224"], "required: --data_path, --output_dir"),
        (["--data_path", "x", "--output_dir", "y", "--loss", "hinge"], "invalid choice: 'hinge'"),
        (["--data_path", "x", "--output_dir", "y", "stray"], "unrecognized arguments: stray"),
        (["--data_path", "x", "--output_dir", "y", "--lr", "fast"], "--lr: 'fast' is not a number above 0"),
        (["--data_path", "x", "--output_dir", "y", "--clip_grad", "-1"], "--clip_grad: '-1' is not a number above 0"),
        (["--data_path", "x", "--output_dir", "y", "--view_fps", "inf"], "--view_fps: 'inf' is not a number above 0"),
        (["--data_path", "x", "--output_dir", "y", "--num_workers", "-1"], "'-1' is not a whole number, 0 or above"),
    ],
)
def test_mistakes_are_answered(words, answer, capsys):
    with pytest.raises(SystemExit) as exit_:
        finetune_parser("x").parse_args(words)
    assert exit_.value.code == 2 and answer in capsys.readouterr().err


def test_abbreviations_are_not_guessed():
    assert isinstance(finetune_parser("x"), Parser)
    with pytest.raises(SystemExit):
        finetune_parser("x").parse_args(["--data_path", "x", "--output_dir", "y", "--epoch", "3"])


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_start(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])  # scripts add to it
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    assert not exit_.value.code and f"python benchmarks/{script.name} " in capsys.readouterr().out
