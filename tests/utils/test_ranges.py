"""Every numeric flag of every command has a range, and a number outside is refused at once, by the flag's name."""

import argparse
import importlib
import sys

import pytest
from helpers import ROOT, run

from utils.cli import Number, Parser

COMMANDS = [
    "run_finetune.py",
    "run_dapt.py",
    "jobs/submit.py",
    "other_models/ViViT/ckpt_vivit.py",
    "models/weights/__main__.py",
]
COMMANDS += sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "datasets" / "tools").glob("[a-z]*.py") if "def main" in p.read_text()
)
COMMANDS += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks").glob("[a-z]*.py"))
OUTSIDE = ["nan", "inf", "-inf", "1e400", "-1e400", "-1", "1" + "0" * 30, "1" + "0" * 5000, "-0.5", "", "x"]
OFF = {"--warmup_steps -1"}
# A share has no value above 1. What is no share is named here, so that a new flag is a decision.
ABOVE_1 = {"--lr", "--min_lr", "--weight_decay", "--weight_decay_end", "--clip_grad", "--init_scale"}
ABOVE_1 |= {"--view_fps", "--assume_fps", "--fps", "--read_timeout", "--dist_timeout", "--save_every_minutes"}
ABOVE_1 |= {"--alert_after", "--event_gap", "--event_min_duration", "--smooth_rise", "--smooth_fall", "--stream_fps"}
ABOVE_1 |= {"--report_every", "--stream_timeout", "--reconnect", "--outage", "--seconds", "--kill_every", "--max_delay"}
ABOVE_1 |= {"--false_alarms_per_hour"}
HUGE = {"--clip_grad", "--save_every_minutes"}  # 1e30 harms nobody


class Built(Exception):
    """Carries a parser that is about to parse."""


def parsers(path, monkeypatch):
    """The parsers of a command, those of its subcommands too."""

    def built(self, *_):
        raise Built(self)

    if path.startswith("run_"):
        module = importlib.import_module("utils.predict_flags" if path == "run_predict.py" else "utils.flags")
        return [getattr(module, f"{path[4:-3]}_parser")("x")]
    if path == "jobs/submit.py":
        return [importlib.import_module("jobs.submit").submit_parser()]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", built)
    monkeypatch.setattr(Parser, "parse_args", built)
    monkeypatch.setattr(sys, "argv", [path])
    name = path.removesuffix(".py").replace("/", ".")
    with pytest.raises(Built) as caught:
        importlib.import_module(name).main()
    (parser,) = caught.value.args
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(p for action in subparsers for p in action.choices.values())]


def taken(parser, action, text):
    """Whether a parser takes a text as the value of a flag; the value."""
    try:
        value = parser._get_value(action, text)
        parser._check_value(action, value)
    except argparse.ArgumentError as e:
        assert e.argument_name == "/".join(action.option_strings), "the flag is named"
        return False, None
    return True, value


def a_number(parser, action):
    values = (taken(parser, action, text)[1] for text in ("7", "0.7"))
    return isinstance(action.type, Number) or any(isinstance(value, (int, float)) for value in values)


@pytest.mark.parametrize("path", COMMANDS)
def test_numbers_outside_their_range_are_refused(path, monkeypatch):
    for parser in parsers(path, monkeypatch):
        for action in parser._actions:
            defaults = action.default if isinstance(action.default, (list, tuple)) else [action.default]
            numeric = any(isinstance(d, (int, float)) and not isinstance(d, bool) for d in defaults)
            takes_numbers = action.nargs != 0 and callable(action.type) and a_number(parser, action)
            assert action.nargs == 0 or takes_numbers or not numeric, f"{action.option_strings}: a number of no type"
            if not takes_numbers:
                continue
            flag = action.option_strings[0]
            for text in OUTSIDE:
                if f"{flag} {text}" in OFF or (text.startswith("1" + "0" * 30) and len(text) < 100 and flag in HUGE):
                    continue
                assert not taken(parser, action, text)[0], f"{flag} {text}"
            assert taken(parser, action, "1.5")[0] == (flag in ABOVE_1), flag
            for default in defaults if numeric else ():
                assert taken(parser, action, str(default)) == (True, default), f"{flag}: its default"
            assert taken(parser, action, "-0.0")[0] is False or str(taken(parser, action, "-0.0")[1]) == "0.0", flag


def test_every_command_is_gone_over():
    assert len(COMMANDS) >= 18 and {"datasets/tools/pack.py", "benchmarks/step.py"} <= set(COMMANDS)


@pytest.mark.parametrize(
    ("number", "inside", "outside", "words"),
    [
        (Number(0, 1, below=True), ["0", "0.999", "-0", "1e-400"], ["1", "1.0"], "a number from 0 and below 1"),
        (Number(0, 1, above=True), ["1e-300", "1"], ["0", "-0.0", "1e-400", "1.0000001"], "a number above 0, up to 1"),
        (Number(above=True), ["1e300"], ["0", "1e309"], "a number above 0"),
        (Number(-1, whole=True), ["-1", "2147483647"], ["-2", "2147483648", "0.0"], "a whole number, -1 or above"),
    ],
)  # fmt: skip
def test_ends_of_a_range(number, inside, outside, words):
    assert str(number) == words
    for text in inside:
        assert number(text) == float(text)
    for text in outside:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r} is not {words}$"):
            number(text)


@pytest.mark.parametrize(
    ("script", "words", "answer"),
    [
        ("run_finetune.py", ["--drop_path", "1.5"], "--drop_path: '1.5' is not a number from 0 and below 1"),
        ("run_dapt.py", ["--opt_betas", "0.9", "1"], "--opt_betas: '1' is not a number from 0 and below 1"),
        ("datasets/tools/prepare.py", ["half", "DoTA", "x", "--seed", "-1"], "--seed: '-1' is not a whole number, 0"),
    ],
)
def test_a_number_outside_its_range_is_answered_in_a_line(script, words, answer):
    command = ["-m", script.removesuffix(".py").replace("/", ".")] if "/" in script else [script]
    done = run(*command, *words)
    assert done.returncode == 2 and answer in done.stderr and "Traceback" not in done.stderr
