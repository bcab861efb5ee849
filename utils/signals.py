"""Stopping on a signal without losing anything.

The contract with whatever started the run (a Slurm job file, say):
- USR1, USR2 or TERM asks a run to stop. All processes stop after the same optimizer step, write checkpoint-last/, and
  only then OUTPUT_DIR/REQUEUE. During an evaluation they leave it unfinished; it is repeated after the restart.
- OUTPUT_DIR/REQUEUE exists exactly when the run stopped that way and the same command continues it. A run that starts
  takes the file away; one that fails, that finishes although a signal came, or that the same command would not
  continue (--no_auto_resume, --no_save_ckpt), does not write it.
- Each process then exits with code 75 (EX_TEMPFAIL of sysexits.h: try again). torchrun exits with 1 in any case, so
  the file tells, not the code.
- More signals while it saves change nothing, but the third within 5 seconds ends the process at once. The same signal
  within half a second of one that counted does not count: Slurm, srun and torchrun may each deliver it.

torchrun passes TERM on; for USR1 and USR2 it needs --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol

logger = logging.getLogger("tad")

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
MARKER = "REQUEUE"
EXIT_CODE = 75
_IMPATIENT = 5.0  # seconds within which the third signal counts as "now"
_ECHO = 0.5  # seconds within which the same signal has come by several ways
_arrivals: list[tuple[float, int]] = []  # (time, signal) of each in this process


class Preempted(SystemExit):
    """The end of a run that was asked to stop; the process exits with EXIT_CODE."""


class Vote(Protocol):
    """What `utils.distributed.Agreement` does."""

    def ask(self, *votes: bool) -> None:
        """Put the votes of this process to all of them."""

    def answer(self) -> tuple[bool, ...]:
        """For each vote last asked for, whether any process said yes."""


def catch_signals() -> None:
    """Note the SIGNALS of this process from now on, in place of dying from them.

    A thread of its own reads them, so that the third is obeyed even while the main thread waits inside a library.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading,), daemon=True).start()


def _listen(pipe: int) -> None:
    latest: dict[int, float] = {}  # of each signal: when it counted last
    while number := os.read(pipe, 1):
        if number[0] not in SIGNALS:
            continue
        now, before = time.monotonic(), latest.get(number[0], -_ECHO)
        if now - before > _ECHO:
            latest[number[0]] = now
            _arrivals.append((now, number[0]))
            if len(_arrivals) > 2 and _arrivals[-1][0] - _arrivals[-3][0] <= _IMPATIENT:
                os.write(2, b"the third signal within 5 seconds: leaving at once\n")
                os._exit(128 + number[0])


def shield_worker(_number: int = 0) -> None:
    """Called first in a loading process: the SIGNALS end it only if they come from its own training process.

    Slurm sends them to every process of a job, and a run whose workers die cannot reach the end of its step.
    """
    training = multiprocessing.parent_process()
    signal.set_wakeup_fd(-1)  # that of the training process
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != training.pid and training.is_alive():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def remove_marker(output_dir: str | Path) -> None:
    """To be called first by a run that starts, so that its own failure is not taken for a preemption."""
    if (marker := Path(output_dir, MARKER)).exists():
        marker.unlink(missing_ok=True)  # another process may have done it


class Preemption:
    """When all processes of a run save, and when they stop.

    Args:
        output_dir: where the marker goes. vote: how the processes agree.
        save: writes checkpoint-last; None if the run keeps no state, and then there is no marker either.
        auto_resume: whether the same command would continue the run; there is no marker if not.
        is_main: whether this process writes the marker, and its clock tells when save_every_minutes have passed.
    """

    def __init__(
        self,
        output_dir: str | Path,
        vote: Vote,
        save: Callable[[], None] | None,
        *,
        is_main: bool,
        auto_resume: bool = True,
        save_every_minutes: float | None = None,
    ):
        self.marker, self._vote, self._save, self._is_main = Path(output_dir, MARKER), vote, save, is_main
        self._auto_resume = auto_resume
        self._interval = 60 * save_every_minutes if save_every_minutes and is_main and save else None
        self._saved = time.monotonic()

    def save(self) -> None:
        """Write checkpoint-last."""
        if self._save:
            self._save()
        self._saved = time.monotonic()

    def after_step(self, where: str) -> None:
        """Save, or save and stop, if a process asked for it at the step before; nothing waits for a device.

        where: the place in the run, for the message. Raises Preempted.
        """
        stop, save = self._vote.answer()
        if stop or save:
            self.save()
        if stop:
            self._leave(where)
        due = self._interval is not None and time.monotonic() - self._saved >= self._interval
        self._vote.ask(bool(_arrivals), due)

    def stop_if_asked(self, where: str, *, saved: bool) -> None:
        """Stop now if any process was asked to; waits for all of them.

        saved: whether checkpoint-last holds the present state already. Raises Preempted.
        """
        asked = any(self._vote.answer()[:1])
        self._vote.ask(asked or bool(_arrivals), False)
        if self._vote.answer()[0]:
            if not saved:
                self.save()
            self._leave(where)

    def until_asked(self, items: Iterable) -> Iterator:
        """Pass items on until this process is asked to stop; `stop_if_asked` must follow."""
        for item in items:
            if _arrivals:
                return
            yield item

    def _leave(self, where: str) -> NoReturn:
        name = signal.Signals(_arrivals[0][1]).name if _arrivals else "a signal to another process"
        if self._is_main and self._save and self._auto_resume:
            self.marker.write_text(f"{name}, {where}\n")
        self._vote.ask(False, False)
        self._vote.answer()  # nobody leaves, and so ends the others, before the marker is written
        command = "the same command" if self._auto_resume else "the command without --no_auto_resume"
        kept = f"the state is saved; {command} continues" if self._save else "nothing is saved (--no_save_ckpt)"
        logger.info(f"stopped on {name}: {where}; {kept}")
        raise Preempted(EXIT_CODE)
