"""args.json: the record of what a run used, how another run differs from it, and what may differ when it goes on."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from utils.cli import ConfigError, Parser
from utils.damage import parse_json, with_sum
from utils.files import replaced
from utils.resolve import OVERRIDABLE

# Arguments that --override changes together with another: by default they follow it.
_FOLLOWING = {"weight_decay": ("weight_decay_end",), "data_set": ("data_split", "sampling_rate", "sampling_rate_val")}
_IN_SHAPES = {"model", "tubelet_size", "decoder_depth"}  # arguments that the shapes of weights depend on


def changed(saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str]) -> dict[str, list[Any]]:
    """Return the arguments both know, not among `free`, that differ: {name: [saved, current]}."""
    keys = sorted((saved.keys() & current.keys()) - free)
    return {k: [saved[k], current[k]] for k in keys if saved[k] != current[k]}


def differing(saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str]) -> list[str]:
    """Return the arguments both know, not among `free`, that differ: ["name: saved -> current", ...]."""
    return in_words(changed(saved, current, free))


def in_words(changes: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return what `changed` found as ["name: saved -> current", ...]."""
    return [f"{name}: {before} -> {now}" for name, (before, now) in changes.items()]


@dataclass(frozen=True)
class Changeable:
    """Which arguments of a run may be others when it is continued.

    free: those that always may.
    overridable: those that may where `override` names them, and whether the windows of an epoch are others then, or
        come in another order.
    override: the names that --override gives.
    """

    free: Set[str] = frozenset()
    overridable: Mapping[str, bool] = field(default_factory=dict)
    override: Sequence[str] = ()

    @classmethod
    def by(cls, parser: Parser, override: Sequence[str] | None) -> "Changeable":
        """Return what a command line declares, and what its --override names."""
        return cls(parser.free_on_resume, parser.overridable, override or ())

    def check(self, resume: str | None) -> None:
        """Raise ConfigError where --override comes without --resume, or names what it cannot change."""
        if self.override and not resume:
            raise ConfigError(
                "--override needs --resume DIR, the checkpoint-last folder of the run to go on with, and another "
                "--output_dir"
            )
        for name in self.override:
            if name in self.free:
                raise ConfigError(f"--override {name}: --{name} may change without it, leave it out")
            if name not in self.overridable:
                raise ConfigError(
                    f"--override {name}: not among what it can change, which is {', '.join(sorted(self.overridable))}; "
                    "for another model start from the weights of the run, with --finetune or --from_ckpt"
                )

    def unlike(self, saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return what `changed` does of arguments that are not free. Precision may follow a device that changes."""
        moved = saved.get("device") != current.get("device") and "precision" not in self.override
        return changed(saved, current, self.free | ({"precision"} if moved else set()))

    def same(self, where: str | Path, saved: Mapping[str, Any], current: Mapping[str, Any], state: Path | None) -> None:
        """Raise ConfigError where the run in the folder `where` has other arguments; state: its checkpoint-last."""
        if changes := self.unlike(saved, current):
            what = f"{where} belongs to a run with other arguments ({'; '.join(in_words(changes))})"
            raise ConfigError(f"{what}: use those or another --output_dir{self._way_on(changes, state)}")

    def overridden(self, folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return what --override changes of the run whose checkpoint-last is `folder`: {name: [before, now]}.

        Raises ConfigError where more differs, or a name that it gives does not.
        """
        changes = self.unlike(saved, current)
        named = set(self.override).union(*(_FOLLOWING.get(name, ()) for name in self.override))
        if others := {name: change for name, change in changes.items() if name not in named}:
            what = f"{folder} is of a run with other arguments ({'; '.join(in_words(others))}): use those"
            raise ConfigError(what + self._way_on(changes, folder))
        for name in self.override:
            if name not in changes:
                raise ConfigError(
                    f"--override {name}: it is {saved.get(name)} in {folder}, too; give --{name} another value, or "
                    "leave the name out"
                )
        return changes

    def reorders(self, changes: Mapping[str, Any]) -> list[str]:
        """Return those of the changes by which the windows of an epoch are others, or come in another order."""
        return [name for name in changes if self.overridable.get(name)]

    def _way_on(self, changes: Mapping[str, Any], state: Path | None) -> str:
        """Say how a run goes on with other arguments, if it can."""
        if lasting := [name for name in changes if name not in self.overridable]:
            refusal = f"; no run is continued with another {', '.join(lasting)}"
            if set(lasting) & _IN_SHAPES:
                return f"{refusal}, nor are its weights of that: start one from others, in another --output_dir"
            meant = " with --override_spec" if set(lasting) & set(OVERRIDABLE) else ""
            return (
                f"{refusal}: start one from the weights of this one, --finetune or --from_ckpt its "
                f"checkpoint-<epoch>.pth{meant}"
            )
        words, sooner = " ".join(changes), ""
        if "epochs" in changes and changes["epochs"][1] < changes["epochs"][0]:
            before, now = changes["epochs"]
            sooner = f"; to end its schedule of {before} epochs after {now}, --epochs {before} --stop_epoch {now}"
        return sooner + (
            f"; or go on with the new ones in another --output_dir: --resume {state} --override {words}"
            if state
            else ""
        )


def write_run_record(path: Path, arguments: Mapping[str, Any], world_size: int, **more: Any) -> dict[str, Any]:
    """Write args.json: resolved arguments, command line, git revision, versions, and what `more` names; return it.

    Raises ConfigError where its folder cannot be written.
    """
    record = {
        "args": dict(arguments),
        "command": shlex.join(sys.argv),
        "world_size": world_size,
        "git": _git_revision(),
        "versions": {"python": sys.version.split()[0]} | {p: _version(p) for p in ("torch", "torchvision", "timm")},
        **more,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written ({e.strerror}); choose another --output_dir") from e
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object, with its sum, in one rename. Raises OSError, which names path."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(with_sum(record), indent=2) + "\n")


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
