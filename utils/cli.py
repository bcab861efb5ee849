"""The command line: a parser whose refusals help, batch arithmetic, and the record of what a run used."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn


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
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists every flag)\n")


# ----------------------------------------------------------------------------------------------------------------------
# Resolving


def split_batch(
    total: int | None, per_process: int | None, *, default: int, world_size: int, update_freq: int
) -> tuple[int, int]:
    """(windows per process and forward pass, windows per step) from whichever is given; `default` per step otherwise.

    Raises ConfigError where both are given or the total does not divide, naming the nearest totals that do.
    """
    parts = world_size * update_freq
    if total is not None and per_process is not None:
        raise ConfigError("give --batch_size (per process) or --total_batch_size, not both")
    if per_process is not None:
        return per_process, per_process * parts
    total = default if total is None else total
    if total % parts:
        below, above = total // parts * parts, -(-total // parts) * parts
        raise ConfigError(
            f"a total batch of {total} does not divide over {world_size} processes x {update_freq} passes: "
            f"use --total_batch_size {' or '.join(str(n) for n in (below, above) if n)}"
        )
    return total // parts, total
