"""args.json: the record of what a run used, and how another run differs from it."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Set
from importlib import metadata
from pathlib import Path
from typing import Any

from utils.cli import ConfigError
from utils.damage import parse_json, with_sum
from utils.files import replaced


def differing(saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str]) -> list[str]:
    """Return the arguments both know, not among `free`, that differ: ["name: saved -> current", ...]."""
    keys = sorted((saved.keys() & current.keys()) - free)
    return [f"{k}: {saved[k]} -> {current[k]}" for k in keys if saved[k] != current[k]]


def write_run_record(path: Path, arguments: Mapping[str, Any], world_size: int) -> None:
    """Write args.json: resolved arguments, command line, git revision, versions. Raises ConfigError where its folder
    cannot be written.
    """
    record = {
        "args": dict(arguments),
        "command": shlex.join(sys.argv),
        "world_size": world_size,
        "git": _git_revision(),
        "versions": {"python": sys.version.split()[0]} | {p: _version(p) for p in ("torch", "torchvision", "timm")},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(with_sum(record), indent=2) + "\n")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written ({e.strerror}); choose another --output_dir") from e


def read_run_record(path: Path) -> dict[str, Any]:
    """Return the arguments in an args.json. Raises ConfigError where it is damaged."""
    try:
        arguments = parse_json(path.read_bytes())["args"]
        if not isinstance(arguments, dict):
            raise TypeError("its arguments are no dictionary")
        return arguments
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
