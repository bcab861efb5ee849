"""Signals that ask a run to stop; `engine.session` stops it without losing anything.

The contract with whatever started the run (a Slurm job file, say):
- USR1, USR2, TERM or INT (Ctrl-C) asks a run to stop. All processes stop after the same optimizer step, write
  checkpoint-last/, and only then OUTPUT_DIR/REQUEUE. They leave the evaluation after an epoch unfinished; it is
  repeated after the restart. A run that has not begun to train stops before its first step. One with --eval keeps no
  state: it does not catch these signals, which end it.
- OUTPUT_DIR/REQUEUE exists exactly when the run stopped that way and the same command continues it. A run that starts
  takes the file away; one that fails, that finishes although a signal came, or that the same command would not
  continue (--no_auto_resume, --no_save_ckpt), does not write it.
- Each process then exits with code 75 (EX_TEMPFAIL of sysexits.h: try again). torchrun exits with 1 in any case, so
  the file tells, not the code.
- More signals while it saves change nothing, but the third within 5 seconds ends the process at once. The same signal
  within half a second of one that counted does not count: Slurm, srun and torchrun may each deliver it.

torchrun passes TERM and INT on; for USR1 and USR2 it needs
--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
MARKER = "REQUEUE"
EXIT_CODE = 75
_THIRD_WITHIN = 5.0  # seconds within which the third signal counts as "now"
_SAME_WITHIN = 0.5  # seconds within which the same signal has come by several ways
logger = logging.getLogger("tad")
_arrivals: list[tuple[float, int]] = []  # (time, signal) of each in this process


class Preempted(SystemExit):
    """The end of a run that was asked to stop; the process exits with EXIT_CODE."""


def stop_requested() -> bool:
    """Return whether one of the SIGNALS has come to this process since `catch_signals`."""
    return bool(_arrivals)


def first_signal() -> str:
    """Return the name of the signal that came first, or say that it came to another process."""
    return signal.Signals(_arrivals[0][1]).name if _arrivals else "a signal to another process"


def catch_signals() -> None:
    """Note the SIGNALS of this process from now on, in place of dying from them.

    They are blocked in this thread and, since that is inherited, in all threads and processes started after it: Slurm
    and terminals send them to every process, and a compiler that dies of one would fail the step that waits for it.
    A thread of its own reads them, so that the third is obeyed even while the main thread waits inside a library.
    """
    for number in SIGNALS:  # also where a thread from before lets one through, or a shell has them ignored
        signal.signal(number, lambda number, _frame: _note(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_listen, daemon=True).start()


def _listen() -> None:
    while True:
        _note(signal.sigwait(SIGNALS))


def _note(number: int) -> None:
    now = time.monotonic()
    if now - max((when for when, which in _arrivals if which == number), default=-_SAME_WITHIN) <= _SAME_WITHIN:
        return
    _arrivals.append((now, number))
    if len(_arrivals) > 2 and _arrivals[-1][0] - _arrivals[-3][0] <= _THIRD_WITHIN:
        os.write(2, b"the third signal within 5 seconds: leaving at once\n")
        os._exit(128 + number)
    if len(_arrivals) == 1 and os.isatty(2):
        text = f"{first_signal()}: this stops as soon as what is done is kept; the third within 5 seconds ends it\n"
        os.write(2, text.encode())


@contextmanager
def marked_if_stopped(output_dir: str | Path, rest: str) -> Iterator[None]:
    """Write the marker where a signal stops the body. rest: what the same command goes on with, for the log."""
    try:
        yield
    except Preempted:
        logger.info(f"stopped on {first_signal()}; the same command goes on with {rest}")
        Path(output_dir, MARKER).write_text(f"{first_signal()}\n")
        raise


def remove_marker(output_dir: str | Path) -> None:
    """Remove the marker of an earlier run; a run calls this first, so that failing is not taken for a preemption."""
    if (marker := Path(output_dir, MARKER)).exists():
        marker.unlink(missing_ok=True)  # another process may have done it
