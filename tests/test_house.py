"""The rules of the house: which way imports go, where arguments may go, what a flag owes its user."""

import ast
import runpy
import sys

import pytest
from helpers import ROOT

ROOMS = ("models", "datasets", "engine", "utils")
MAY_IMPORT = {
    "utils": {"utils"},
    "models": {"models", "utils"},  # utils for models/weights and commands alone, see test_model_files_are_pure
    "datasets": {"datasets", "utils"},
    "engine": {"engine", "utils"},
}
MODEL_LIBRARIES = {"torch", "timm", "einops", "models"}


MAKE_ARGUMENTS = ("utils/cli.py", "utils/flags.py", "utils/resolve.py")
PATHS = [p for room in ROOMS for p in sorted((ROOT / room).glob("**/*.py"))] + sorted(ROOT.glob("run_*.py"))
PATHS += [ROOT / "tad.py"]
PATHS += sorted((ROOT / "jobs").glob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))
PATHS = [str(p.relative_to(ROOT)) for p in PATHS]
INSIDE = [p for p in PATHS if p.startswith(ROOMS)]
COMMANDS = ("models/export.py",)
MODEL_FILES = [p for p in PATHS if p.startswith("models/") and not p.startswith(("models/weights/", *COMMANDS))]


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
    command = {"utils"} if path == "models/__init__.py" else set()  # which is a command's first file, too
    assert set(imports(path)) <= MODEL_LIBRARIES | set(sys.stdlib_module_names) | command
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
    assert (ROOT / path).read_text().count("\n") <= (450 if path.startswith("run_") else 400)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            names = [arg.arg for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name} is long"
            assert len([name for name in names if name not in ("self", "cls")]) <= 12, f"{path}: {node.name} takes many"


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "benchmarks").glob("[a-z]*.py")))
def test_benchmarks_start(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert not exit_.value.code and f"python -m benchmarks.{name} " in capsys.readouterr().out
