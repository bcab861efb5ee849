"""How a command fails: the cause in one line, last and once; a traceback only where nobody knows a remedy.

Under torchrun the cause stands at the end of torchrun's own report, which reads it from an error file of each process.
Processes of a machine that fail alike, or because another has failed, leave it to the first.
"""

import errno
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

if sys.version_info < (3, 10):  # noqa: UP036  (the first of our files that any command reads)
    sys.exit(f"error: Python 3.10 or newer is needed; this is {'.'.join(map(str, sys.version_info[:3]))}")

_DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "pillow"}  # package -> where its name is another
_EXTRAS = ("decord", "openpyxl", "xlrd", "xlwt")  # that single commands need and requirements.txt leaves out
_OWN = ("benchmarks", "datasets", "engine", "jobs", "models", "utils")
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EPIPE}
_OF_THE_DISK |= {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
_SAME_WITHIN = 0.5  # seconds within which an interrupt has come by several ways, from a terminal and by torchrun
_interrupted_at: float | None = None


def report_uncaught() -> None:
    """Let this command end with one line where `explain` knows the cause, a package is missing say, and on Ctrl-C.

    A command calls it before it imports what may be missing; for `python -m datasets....` the package does. The second
    Ctrl-C ends it at once.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # one was closed: the next file would get what is printed
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")  # noqa: SIM115
    sys.excepthook, sys.unraisablehook = _report, _report_unraisable
    signal.signal(signal.SIGINT, _interrupt)


def explain(error: BaseException) -> str | None:
    """Return what an error says in one line, with the remedy, where that is all there is to say; else None."""
    if isinstance(error, ImportError):
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if package in _OWN:
            return None
        if isinstance(error, ModuleNotFoundError) and package:
            name = _DISTRIBUTIONS.get(package, package)
            remedy = package if package in _EXTRAS else "-r requirements.txt"
            return f"error: the package {name} is missing: pip install {remedy}"
        return f"error: {error}: pip install -r requirements.txt"
    if isinstance(error, RuntimeError) and "operator torchvision::" in str(error):  # of another build than torch
        return f"error: torchvision is not of this torch ({error}): pip install both anew, from one place"
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"error: {place}{error.strerror}"
    return None


def fail(cause: str, code: int = 1) -> NoReturn:
    """End this process with a cause that says all."""
    say_cause(cause)
    sys.exit(code)


def say_cause(cause: str, *, consequence: bool = False) -> None:
    """Say why this process ends, unless another on this machine has said the same.

    consequence: of the end of another process; it is said only where no other has said why.
    """
    file = _error_file()
    if file and not _first_to_say(file.parent.parent, cause, consequence):
        return
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    if not (file and _torchrun_reports() and _leave_to_torchrun(file, cause, consequence)):
        with suppress(OSError, ValueError):  # a full disk, a closed pipe
            print(cause, file=sys.stderr, flush=True)


def report(error: BaseException, prefix: str = "") -> None:
    """Say why this process ends with an error: in a line where `explain` knows it, else with its traceback.

    prefix: of each line of the traceback.
    """
    if cause := explain(error):
        say_cause(cause)
        return
    kind, file = type(error).__name__, _error_file()
    lines = "".join(traceback.format_exception(error)).splitlines(keepends=True)
    if not file:
        sys.stderr.write("".join(prefix + line for line in lines))
    elif _first_to_say(file.parent.parent, f"traceback of {kind}: {error}", consequence=False):
        sys.stderr.write("".join(prefix + line for line in lines))
        say_cause(f"{kind}: {error} (its traceback stands above)")


def _report(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """Take the place of sys.excepthook."""
    if isinstance(error, KeyboardInterrupt):
        _leave_interrupted()
    report(error)


def _report_unraisable(unraisable) -> None:  # noqa: ANN001  (sys.UnraisableHookArgs is of type checkers alone)
    if isinstance(unraisable.exc_value, KeyboardInterrupt):  # it came in a callback that cannot pass it on
        _leave_interrupted()
    sys.__unraisablehook__(unraisable)


def _interrupt(_number: int, _frame: object) -> None:
    global _interrupted_at
    now = time.monotonic()
    if _interrupted_at is None:
        _interrupted_at = now
        raise KeyboardInterrupt
    if now - _interrupted_at > _SAME_WITHIN:
        _leave_interrupted()


def _leave_interrupted() -> NoReturn:
    """Say so and die as an interrupted command does, so that a shell knows."""
    say_cause("interrupted")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)


def _first_to_say(folder: Path, cause: str, consequence: bool) -> bool:
    """Return whether no process of this torchrun, which made the folder, has said a cause before.

    consequence: whether any other cause counts.
    """
    if consequence and any(folder.glob("said-*")):
        return False
    try:
        (folder / f"said-{hashlib.sha256(cause.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _error_file() -> Path | None:
    """Return the file from which the torchrun that started this process takes a cause; each process has a folder."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).absolute() if file and "TORCHELASTIC_RUN_ID" in os.environ else None


def _torchrun_reports() -> bool:
    """Return whether torchrun reports what fails now: it is not going to start again, nor ended by a signal."""
    from utils.signals import stop_requested  # not before it is needed: this module comes first

    tries, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return tries >= limit and _interrupted_at is None and not stop_requested()


def _leave_to_torchrun(file: Path, cause: str, consequence: bool) -> bool:
    """Write the file from which torchrun takes the cause for its report. Returns whether it could be written.

    Of several failures torchrun takes the one with the earliest time, in seconds, for the root.
    """
    moment = int(time.time()) + (1 if consequence else -1)
    text = cause.replace("\n  ", "\n")  # torchrun indents what follows the first line
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(moment)}}
    try:
        file.write_text(json.dumps({"message": message}))
    except OSError:
        return False
    return True
