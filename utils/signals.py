"""Signals that ask a run to stop; `engine.session` stops it without losing anything.

The contract with whatever started the run (a Slurm job file, say):
- USR1, USR2 or TERM asks a run to stop. All processes stop after the same optimizer step, write checkpoint-last/, and
  only then OUTPUT_DIR/REQUEUE. They leave the evaluation after an epoch unfinished; it is repeated after the restart.
  A run with --eval keeps no state: it does not catch these signals, which end it.
- OUTPUT_DIR/REQUEUE exists exactly when the run stopped that way and the same command continues it. A run that starts
  takes the file away; one that fails, that finishes although a signal came, or that the same command would not
  continue (--no_auto_resume, --no_save_ckpt), does not write it.
- Each process then exits with code 75 (EX_TEMPFAIL of sysexits.h: try again). torchrun exits with 1 in any case, so
  the file tells, not the code.
- More signals while it saves change nothing, but the third within 5 seconds ends the process at once. The same signal
  within half a second of one that counted does not count: Slurm, srun and torchrun may each deliver it.

torchrun passes TERM on; for USR1 and USR2 it needs --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2.
"""

import os
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
MARKER = "REQUEUE"
EXIT_CODE = 75
_THIRD_WITHIN = 5.0  # seconds within which the third signal counts as "now"
_SAME_WITHIN = 0.5  # seconds within which the same signal has come by several ways
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
        now, before = time.monotonic(), latest.get(number[0], -_SAME_WITHIN)
        if now - before > _SAME_WITHIN:
            latest[number[0]] = now
            _arrivals.append((now, number[0]))
            if len(_arrivals) > 2 and _arrivals[-1][0] - _arrivals[-3][0] <= _THIRD_WITHIN:
                os.write(2, b"the third signal within 5 seconds: leaving at once\n")
                os._exit(128 + number[0])


def remove_marker(output_dir: str | Path) -> None:
    """Remove the marker of an earlier run; a run calls this first, so that failing is not taken for a preemption."""
    if (marker := Path(output_dir, MARKER)).exists():
        marker.unlink(missing_ok=True)  # another process may have done it
