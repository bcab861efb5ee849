"""The command line: a parser whose refusals help, batch arithmetic, and the record of what a run used."""

import argparse
import difflib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from utils.files import replaced


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


def differing(saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str]) -> list[str]:
    """The arguments both know, not among `free`, that differ: ["name: saved -> current", ...]."""
    keys = sorted((saved.keys() & current.keys()) - free)
    return [f"{k}: {saved[k]} -> {current[k]}" for k in keys if saved[k] != current[k]]


def write_run_record(path: Path, args: Mapping[str, Any], world_size: int) -> None:
    """args.json: resolved arguments, command line, git revision, versions. Raises ConfigError where path's folder
    cannot be written.
    """
    record = {
        "args": dict(args),
        "command": shlex.join(sys.argv),
        "world_size": world_size,
        "git": _git_revision(),
        "versions": {"python": sys.version.split()[0]} | {p: _version(p) for p in ("torch", "torchvision", "timm")},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written ({e.strerror}); choose another --output_dir") from e


def read_run_record(path: Path) -> dict[str, Any]:
    """The arguments in an args.json. Raises ConfigError where it is damaged."""
    try:
        return json.loads(path.read_text())["args"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is damaged ({type(e).__name__}: {e}); remove it or choose another folder") from e


def _git_revision() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
