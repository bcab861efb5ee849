"""The command line: a parser whose refusals help, the types of its values, and the error for what does not fit."""

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from utils.exits import fail
from utils.text import closest


class ConfigError(ValueError):
    """Arguments that do not go together; the message names them and the way out."""


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn a ValueError of the body, whose values come from the command line, into a ConfigError."""
    try:
        yield
    except ValueError as e:
        raise ConfigError(str(e)) from e


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; a misspelt flag is answered with the right one, a retired one with the reason.

    retired: {flag: why it is gone}, or {"flag value": why} where a value has another answer.
    most: destinations of the flags that most runs need, which --help puts first.
    """

    def __init__(self, description: str, retired: Mapping[str, str] = MappingProxyType({}), most: Sequence[str] = ()):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)
        self.retired, self.most = retired, most
        self.free_on_resume: set[str] = set()  # destinations of flags that may change when a run is resumed
        self.overridable: dict[str, bool] = {}  # those --override may change; whether windows come in another order

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = [*(sys.argv[1:] if args is None else args), "--"]
        flags = words[: words.index("--")]  # what follows is none, such as a file -a.mp4
        answers = [self._answer(*pair) for pair in zip(flags, [*flags[1:], ""], strict=False)]  # of no words, too
        if answers := list(dict.fromkeys(filter(None, answers))):
            self.error(answers[0] if len(answers) == 1 else "\n  ".join(["flags that are not known here:", *answers]))
        return super().parse_args(args, namespace)

    def _answer(self, word: str, following: str) -> str | None:
        """Return what is wrong with a word of the command line if it is a flag; None if nothing is."""
        if not re.match(r"--?[A-Za-z]", word):
            return None
        flag, equals, value = word.partition("=")
        value = value if equals else following
        for name in (f"{flag} {value}", flag):
            if name in self.retired:
                return f"{name} is gone: {self.retired[name]}"
        if flag in self._option_string_actions:
            return None
        return f"unknown flag {flag}{closest(flag, self._option_string_actions)}"

    def format_help(self) -> str:
        """Return sentences first, then what must be given, what most runs need, and everything else by subject."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        formatter.add_usage(None, [a for a in self._actions if a.required or not a.option_strings], [])
        most = [action for name in self.most for action in self._actions if action.dest == name]
        groups = [(g.title, [a for a in g._group_actions if a not in most]) for g in self._action_groups]
        groups.insert(1, ("what most runs need", most))  # after what has no flag
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: error: {message}\n(--help lists every flag)", code=2)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with one letter for a number."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, Number):
            return "N" if action.type.whole else "X"
        return super()._get_default_metavar_for_optional(action)


@dataclass(frozen=True)
class Number:
    """The type of a flag: a finite number of a range.

    low, high: the smallest and the largest; high None: of whole numbers the largest that C takes, else that of floats.
    whole: whether it is a whole number, an int then, else a float.
    above, below: whether low, or high, is itself outside.
    """

    low: float = 0
    high: float | None = None
    whole: bool = False
    above: bool = False
    below: bool = False

    def __call__(self, text: str) -> float:
        """Return the number. Raises argparse's error, which says the range, for anything else."""
        try:
            value = int(text) if self.whole else float(text) + 0.0  # -0.0 becomes 0.0
        except ValueError:
            value = math.nan
        if self.includes(value):
            return value
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {self}")

    def includes(self, value: float) -> bool:
        """Return whether a number is in the range."""
        high = self._highest if self.high is None else self.high
        inside = self.low <= value <= high
        return inside and not (self.above and value == self.low) and not (self.below and value == high)

    @property
    def _highest(self) -> float:
        return 2**31 - 1 if self.whole else sys.float_info.max

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high is None:
            return f"{kind} above {self.low}" if self.above else f"{kind}, {self.low} or above"
        if self.below:
            return f"{kind} {'above' if self.above else 'from'} {self.low} and below {self.high}"
        return f"{kind} {f'above {self.low}, up' if self.above else f'from {self.low}'} to {self.high}"


def from_to(low: float, high: float) -> Number:
    """Return the type of whole numbers from low to high."""
    return Number(low, high, whole=True)


def folder(text: str) -> str:
    """Return the name of a folder. Raises argparse's error for none, as of a variable of a shell that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a folder; . is the current one")
    return text


positive = Number(whole=True, above=True)
natural = Number(whole=True)
positive_float = Number(above=True)
rate = Number(0, 1000)  # of learning or decay, or a scale: larger ones make NaN of any weights
positive_rate = Number(0, 1000, above=True)
share = Number(0, 1)
share_below_1 = Number(0, 1, below=True)
frame_rate = Number(0, 1000, above=True, below=True)
frame_rate_or_0 = Number(0, 1000)
pixels = from_to(1, 4096)
pixels_or_0 = from_to(0, 4096)
frame_count = from_to(1, 4096)
processes = from_to(1, 1024)
percent = from_to(1, 100)
wait = Number(0, 10**6, above=True)
