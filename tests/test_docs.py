"""README.md, docs/ and their neighbours: commands run, paths, flags, links and headings exist, figures agree.

Blocks that begin with ```bash run are run in order, with rendered data, tiny models and tiny settings for what is named
there. Of other bash blocks the command lines are read by the parsers that would read them.
"""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import ROOT, render_small, write_video

from engine.checkpoint import save_weights
from jobs.submit import submit_parser
from models import create_model
from utils.cli import Parser
from utils.flags import dapt_parser, finetune_parser
from utils.predict_flags import predict_parser

PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")), "other_models/README.md"]
PAGES += [name for name in ("CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()]
HISTORY = ("docs/simple-tad.md", "CHANGELOG.md")  # name flags and scripts that are gone
ROOMS = ("benchmarks", "datasets", "docs", "engine", "jobs", "models", "other_models", "tests", "utils")
PARSERS = {"run_finetune.py": finetune_parser, "run_dapt.py": dapt_parser, "run_predict.py": predict_parser}
TOOLS = [f"datasets.tools.{name}" for name in ("check", "pack", "prepare", "synthetic")]
TOOLS += ["engine.report", "models.export", "models.weights"]
TOOLS += [f"benchmarks.{p.stem}" for p in sorted((ROOT / "benchmarks").glob("[a-z]*.py"))]
FOREIGN = set(  # of torchrun, sbatch, scancel, TensorBoard, ruff and tests/kills.py, and every command's
    re.split(
        " ",
        "--standalone --nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --signals-to-handle --shutdown-timeout "
        "--nodes --gpus-per-node --cpus-per-task --time --signal --logdir --check --kills --signals --processes --help",
    )
)

BLOCK = re.compile(r"^( *)```(\w*)( run)?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
STAND_INS = {  # what a page names -> what the test has, below its folder
    "/data/DoTA": "data/dota",
    "build/demo/data": "data/dota",
    "build/demo/dapt/checkpoint-3.pth": "weights.pth",
    "/data/CAP-DATA": "data/dota",
    "CAP-DATA": "DoTA",
    "/data/bdd100k/videos": "data/bdd",
    "/data/trips": "data/bdd/val",
    "/data/DoTA_320": "data/packed",
    "dashcam.mp4": "data/dashcam.mp4",
    "videomae_vit_s_k400_1600e_pretrain.pth": "weights.pth",
    "videomae_vit_b_k400_1600e_pretrain.pth": "weights.pth",
    "vit_small_patch16_224": "vit_tiny_patch16_64",
    "vit_base_patch16_224": "vit_tiny_patch16_64",
    "pretrain_videomae_small_patch16_224": "pretrain_videomae_tiny_patch16_64",
    "runs/dapt_s/checkpoint-11.pth": "runs/dapt_s/checkpoint-0.pth",
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return BLOCK.sub("", text_of(page))


def blocks(page: str, *, run: bool = False) -> list[str]:
    """Its bash blocks, or those that are to be run."""
    return [body for _, kind, marked, body in BLOCK.findall(text_of(page)) if kind == "bash" and (marked or not run)]


def statements(block: str) -> list[str]:
    """The commands of a block, each with its continued lines and its here-document."""
    found, lines = [], iter(block.replace("\\\n", " ").splitlines())
    for line in lines:
        if heredoc := re.search(r"<<(\w+)", line):
            for more in lines:
                line += "\n" + more
                if more == heredoc[1]:
                    break
        if line.strip() and not line.lstrip().startswith("#"):
            found.append(line.strip())
    return found


def python_command(statement: str) -> tuple[str, list[str]] | None:
    """The script or module that a statement starts with Python or torchrun, and its words; None for others."""
    words = [w for w in shlex.split(statement, comments=True) if w != "..."]
    for i, word in enumerate(words):
        if word == "-m" and words[i - 1] == "python":
            return words[i + 1], words[i + 2 :]
        if word.endswith(".py") and words[0] != "sbatch" and not word.startswith("--"):
            rest = words[i + 1 :]
            return word, rest
    return None


def tiny(script: str, words: list[str]) -> list[str]:
    """The words with stand-ins, and settings that take a second. Of epochs a quarter is left."""
    words = [STAND_INS.get(word, word) for word in words]
    small = ["--device", "cpu", "--num_workers", "0"]
    if script != "run_predict.py" and "--eval" not in words:
        epochs = int(words[words.index("--epochs") + 1]) if "--epochs" in words else 4
        sets = 2 if script == "run_dapt.py" else 1
        small += ["--epochs", str(-(-epochs // 4)), "--warmup_epochs", "0", "--nb_samples_per_epoch", str(8 * sets)]
        small += ["--total_batch_size", *["8"] * sets]
    if script == "run_finetune.py":
        small += ["--sampling_rate_val", "5"]
    return words + small


def run_in_process(program: str, words: list[str], monkeypatch) -> None:
    """Run a script or module of the house in this process, which has torch at hand."""
    if program in PARSERS:
        arguments = PARSERS[program]("").parse_args(tiny(program, words))
        importlib.import_module(program.removesuffix(".py")).main(arguments)
        return
    monkeypatch.setattr(sys, "argv", [program, *(STAND_INS.get(word, word) for word in words)])
    module_of(program).main()


def module_of(program: str):
    """The module that `python -m PROGRAM` runs."""
    module = importlib.import_module(program)
    return importlib.import_module(f"{program}.__main__") if hasattr(module, "__path__") else module


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with all that STAND_INS name, the current one."""
    render_small(tmp_path / "data" / "dota")
    for i, split in enumerate(("train", "val", "test")):
        write_video(tmp_path / "data" / "bdd" / split / f"{i}.mov", frames=40, fps=10)
    write_video(tmp_path / "data" / "dashcam.mp4", frames=20, fps=10)
    torch.manual_seed(0)
    save_weights(tmp_path / "weights.pth", create_model("vit_tiny_patch16_64", init_scale=30.0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_marked_commands_run(workspace, monkeypatch):
    """In one go, since later pages go on with what earlier ones made."""
    done = 0
    for page in PAGES:
        for statement in [s for block in blocks(page, run=True) for s in statements(block)]:
            try:
                if command := python_command(statement):
                    run_in_process(*command, monkeypatch)
                else:
                    subprocess.run(["bash", "-c", statement], check=True, timeout=60)
            except (Exception, SystemExit) as e:
                if not (isinstance(e, SystemExit) and not e.code):
                    pytest.fail(f"{page}: {statement}: {e}")
            done += 1
    assert done >= 15
    assert {p.name for p in Path("runs").iterdir()} >= {"videomae_s_dota", "dapt_s", "dapt_s_dota", "risk", "eval"}


class _Captured(Exception):
    """Carries the parser that a command has made."""


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of a script or module of the house."""
    if program in PARSERS:
        return PARSERS[program]("")
    if program == "jobs/submit.py":
        return submit_parser()

    def capture(parser, *_):
        raise _Captured(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        patch.setattr(Parser, "parse_args", capture)
        try:
            module_of(program).main()
        except _Captured as e:
            return e.args[0]
    raise AssertionError(f"{program} reads no command line")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of its commands."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags = flags.union(*map(flags_of, action.choices.values()))
    return flags


def read_by_its_parser(statement: str) -> bool:
    """Whether a statement is a command of the house; fails unless its command line is one that its parser takes."""
    program, words = python_command(statement) or ("", [])
    if statement.startswith(("sbatch", "DRY_RUN", "DATA_PATH")) and (
        job := re.search(r"(jobs/\S+\.sh)(.*)", statement)
    ):
        script = re.search(r"run_\w+\.py", text_of(job[1]))[0]
        program, words = script, ["--data_path", "x", "--output_dir", "y", *shlex.split(job[2], comments=True)]
        words.remove("--") if "--" in words else None
    if program == "jobs/submit.py":
        split = words.index("--")
        read_by_its_parser(shlex.join([words[split - 1], *words[split + 1 :]]))
        words = words[:split]
    if not (program in PARSERS or program == "jobs/submit.py" or program.split(".")[0] in ROOMS and "/" not in program):
        return False
    parser_of(program).parse_args(words)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_are_those_of_the_commands(page, capsys):
    read = 0
    lines = [s for block in blocks(page) for s in statements(block)]
    for line in lines:
        try:
            read += read_by_its_parser(line)
        except SystemExit:
            pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
        for word in re.split(r"[\s=]+", line):
            if word.split("/")[0] in ROOMS and "/" in word:
                assert (ROOT / word).exists(), f"{page}: {line}: no {word}"
    assert read or not any("run_" in line for line in lines)


def known_flags(page: str) -> set[str]:
    """The flags that a page may name."""
    parsers = [parser_of(name) for name in (*PARSERS, "jobs/submit.py", *TOOLS)]
    known = FOREIGN.union(*map(flags_of, parsers))
    if page in HISTORY:
        known |= {flag.split()[0] for parser in parsers for flag in getattr(parser, "retired", ())}
    return known


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    named = set(re.findall(r"(?<![\w/-])--[a-zA-Z][\w-]*", text_of(page)))
    assert not named - known_flags(page)


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """Of inline code: what lies in a room of the house, modules that are run, and scripts by their bare name."""
    scripts = {p.name for p in ROOT.rglob("*.py") if ".venv" not in p.parts}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for word in code.split():
            if re.fullmatch(rf"({'|'.join(ROOMS)})/[\w./*-]*", word):
                assert list(ROOT.glob(word.rstrip("/"))), f"{page}: no {word}"
            if re.fullmatch(r"\w+\.py", word) and page not in HISTORY:
                assert word in scripts, f"{page}: no {word}"
        for module in re.findall(r"python -m (\w+(?:\.\w+)+)", code):
            assert importlib.util.find_spec(module), f"{page}: no module {module}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in [t for t in targets if not t.startswith("http")]:
        path, _, anchor = target.partition("#")
        to = (ROOT / page).parent / path if path else ROOT / page
        assert to.exists(), f"{page}: {target}"
        assert not anchor or anchor in headings(to), f"{page}: {target}; {to.name} has {sorted(headings(to))}"


def test_every_page_is_found_from_the_front_page():
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text_of("README.md"))}
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


@cache
def measured() -> dict[str, list[float]]:
    """{first cell: numbers} of the tables of BENCHMARKS.md."""
    rows = [line.strip("| \n").split(" | ") for line in text_of("BENCHMARKS.md").splitlines() if line.startswith("|")]
    return {cells[0]: [float(n) for n in re.findall(r"\d+(?:\.\d+)?", " ".join(cells[1:]))] for cells in rows}


def test_figures_agree_with_benchmarks():
    """Of a table's row with a cell `name of a row there`: each number after that cell stands in that row."""
    compared = 0
    for page in PAGES:
        for name, rest in re.findall(r"^\|.*?\| `(\w+)` \|(.*)\|$", prose(page), re.MULTILINE):
            for number in re.findall(r"\d+(?:\.\d+)?", rest) if name in measured() else ():
                digits = len(number.partition(".")[2])
                assert float(number) in [round(n, digits) for n in measured()[name]], f"{page}: {name}: {number}"
                compared += 1
    assert compared >= 30


def test_published_figures_agree_with_the_job_files():
    """Of a table's row that links a job file: AUC_ROC / AUC_MCC stand in that file's header, too."""
    rows = [row for page in PAGES for row in re.findall(r"^\|.*\.sh\) \|$", prose(page), re.MULTILINE)]
    assert len(rows) >= 13
    for row in rows:
        auroc, mcc = re.search(r"\| (\d+\.\d|–) / (\d+\.\d) \|", row).groups()
        header = text_of(re.search(r"\((?:\.\./)?(jobs/\S+\.sh)\)", row)[1]).partition("#SBATCH")[0]
        assert mcc in header and (auroc == "–" or auroc in header), row


def test_the_front_page_can_be_read_at_once():
    text = text_of("README.md")
    assert text.count("\n") <= 175
    lines = [line for line in prose("README.md").splitlines() if not re.match(r"\||#|!", line)]
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))
    for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text):
        assert len(sentence.split()) <= 25, sentence
