"""A training run as its loop sees it: records, saving, and stopping when asked."""

import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from engine.checkpoint import Progress, RunState, check_room, explained, restore, rewind_folder, save_last
from engine.guard import NonFinite
from utils.distributed import Agreement, Process, require_same
from utils.logging import TensorBoard, append_json_line
from utils.signals import EXIT_CODE, MARKER, Preempted, first_signal, stop_requested

logger = logging.getLogger("tad")


@dataclass
class Session:
    """What accompanies the training of a run.

    output_dir: the run's folder.
    state: what a checkpoint keeps.
    process: this process among the others.
    tensorboard: where scalars and pictures go.
    guard: records the steps that were left out, and ends the run after too many in a row.
    save_ckpt: whether the run keeps checkpoint-last/.
    auto_resume: whether the same command would continue the run; without it, or without checkpoints, no marker asks
        for that.
    save_every_minutes: minutes after which the main process has the state saved again within an epoch; None: never.
    """

    output_dir: Path
    state: RunState
    process: Process
    tensorboard: TensorBoard
    guard: NonFinite
    save_ckpt: bool = True
    auto_resume: bool = True
    save_every_minutes: float | None = None
    _agreement: Agreement = field(init=False)
    _saved_at: float = field(init=False, default_factory=time.monotonic)
    _saved_place: tuple[int, int] | None = field(init=False, default=None)

    def __post_init__(self):
        self._agreement = Agreement(self.process, questions=2)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.state.progress

    def save(self) -> None:
        """Write checkpoint-last/; every rank calls it."""
        if self.save_ckpt:
            self.guard.read()
            save_last(self.output_dir, self.state)
        self._saved_at, self._saved_place = time.monotonic(), (self.progress.epoch, self.progress.step)

    def after_step(self) -> None:
        """Save, or save and stop, if a process asked for it at the step before; nothing waits for a device.

        Every rank calls it at the same steps. Raises Preempted.
        """
        stop, save = self._agreement.answer()
        if stop or save:
            self.save()
        if stop:
            self._leave(str(self.progress))
        limit = 60 * self.save_every_minutes if self.save_every_minutes and self.process.is_main else None
        due = self.save_ckpt and limit is not None and time.monotonic() - self._saved_at >= limit
        self._agreement.ask(stop_requested(), due)

    def stop_if_asked(self, where: str = "") -> None:
        """Stop now, with the present state saved, if any process was asked to; waits for all of them.

        where: what the message says of the place; left out: epoch and step. Raises Preempted.
        """
        asked = self._agreement.answer()[0]
        self._agreement.ask(asked or stop_requested(), False)
        if self._agreement.answer()[0]:
            if self._saved_place != (self.progress.epoch, self.progress.step):
                self.save()
            self._leave(where or str(self.progress))

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        """Add a line of JSON to log.txt and go on to the next epoch.

        Raises CheckpointWriteError where it cannot be added; the epoch, trained and not evaluated, is saved by then.
        """
        if self.process.is_main:
            with explained(self.output_dir / "log.txt"):
                append_json_line(self.output_dir / "log.txt", {"epoch": self.progress.epoch} | dict(record))
        self.progress.epoch, self.progress.step = self.progress.epoch + 1, 0

    def _leave(self, where: str) -> NoReturn:
        name = first_signal()
        if self.process.is_main and self.save_ckpt and self.auto_resume:
            with explained(self.output_dir / MARKER):
                (self.output_dir / MARKER).write_text(f"{name}, {where}\n")
        self._agreement.ask(False, False)
        self._agreement.answer()  # nobody leaves, and so ends the others, before the marker is written
        command = "the same command" if self.auto_resume else "the command without --no_auto_resume"
        kept = f"the state is saved; {command} continues" if self.save_ckpt else "nothing is saved (--no_save_ckpt)"
        logger.info(f"stopped on {name}: {where}; {kept}")
        raise Preempted(EXIT_CODE)


def start_session(
    output_dir: Path,
    state: RunState,
    process: Process,
    *,
    resumed: Mapping[str, Any] | None,
    log_dir: str,
    max_nonfinite: int,
    **options: Any,
) -> Session:
    """Continue from `resumed`, if there is such a state, and make output_dir this run's; every rank calls it.

    Args:
        state: the run as it was built; it is set to what `resumed` holds.
        resumed: what `find_resume` returned.
        log_dir: the folder of TensorBoard's events.
        max_nonfinite: steps in a row, with a loss or gradient that is not finite, that end the run.
        options: save_ckpt, auto_resume and save_every_minutes of Session.

    Raises ConfigError where the data is not that of the state, ranks stand at different places, or a folder cannot be
    written.
    """
    if resumed:
        restore(resumed, state, process)
    progress = state.progress
    require_same({name: getattr(progress, name) for name in ("epoch", "step", "num_windows", "steps_per_epoch")})
    if process.is_main:  # only now: a command that fails before it trains leaves its folder free
        if options.get("save_ckpt", True):
            check_room(output_dir, state)
        rewind_folder(output_dir, state, world_size=process.world_size)
    tensorboard = TensorBoard(log_dir if process.is_main else None, state.progress.steps_done)
    logger.info(f"to watch it: tensorboard --logdir {shlex.quote(str(log_dir))}")
    nonfinite_file = output_dir / "nonfinite.jsonl" if process.is_main else None
    precise = state.optimization.dtype == torch.float32
    guard = NonFinite(state.progress, nonfinite_file, limit=max_nonfinite, precise=precise)
    return Session(output_dir, state, process, tensorboard, guard, **options)
