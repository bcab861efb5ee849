"""The command line: a parser whose refusals help, the types of its values, and the error for what does not fit."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from utils.exits import fail


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

    retired: {flag: why it is gone}.
    """

    def __init__(self, description: str, retired: Mapping[str, str]):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.retired = retired
        self.free_on_resume: set[str] = set()  # destinations of flags that may change when a run is resumed

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else args
        flags = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
        if unknown := [flag for flag in flags if flag not in self._option_string_actions]:
            self.error("; ".join(map(self._explain, unknown)))
        return super().parse_args(args, namespace)

    def _explain(self, flag: str) -> str:
        if flag in self.retired:
            return f"{flag} is gone: {self.retired[flag]}"
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.75)
        return f"unknown flag {flag}" + (f", did you mean {close[0]}?" if close else "")

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: error: {message}\n(--help lists every flag)", code=2)


def positive(text: str) -> int:
    """Return a whole number above 0. Raises argparse's error for anything else."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """Return a whole number, 0 or above. Raises argparse's error for anything else."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or above")
    return int(text)


def positive_float(text: str) -> float:
    """Return a finite number above 0. Raises argparse's error for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
