"""One run in a folder at a time, and no rank of a run without its torchrun.

A run holds OUTPUT_DIR/.lock, which says who it is. The kernel, or the server of a network file system, holds a POSIX
lock on it for the process, and gives that up with the process, however it ends. Where file systems do not pass such
locks from host to host, or have none, the run's sign of life counts: it touches the file every few seconds. So after a
kill the next run on the same host starts at once; on another host, which cannot see whether the process is gone, it
starts at the latest _STALE seconds after the last sign of life.
"""

import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from utils.cli import ConfigError

LOCK = ".lock"
_TOUCHED_EVERY = 5.0  # seconds between signs of life
_STALE = 60.0  # seconds without one after which a run on another host is taken for dead
_ENDING = 5.0  # seconds that a killed process may take to end
_POLL = 0.2
logger = logging.getLogger("tad")


@contextmanager
def folder_lock(output_dir: str | Path) -> Iterator[None]:
    """Hold output_dir, which is made, for the body; the process ends where another run takes it over.

    Raises ConfigError where another run holds it, by name, or where it cannot be written.
    """
    folder = Path(output_dir)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
    except OSError as e:
        raise ConfigError(f"{folder}: cannot be written ({e.strerror}); choose another --output_dir") from e
    try:
        yield
    finally:
        lock.release()
        for path in absent:  # a command that fails before it writes leaves nothing behind
            try:
                path.rmdir()
            except OSError:  # it has written
                break


class _Lock:
    """A lock file that is held, and the thread that shows that its holder lives."""

    def __init__(self, path: Path, descriptor: int):
        self._path, self._descriptor, self._over = path, descriptor, threading.Event()
        self._content = json.dumps(_this_process()).encode()
        os.pwrite(descriptor, self._content, 0)
        os.ftruncate(descriptor, len(self._content))
        os.fsync(descriptor)
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def _touch(self) -> None:
        while not self._over.wait(_TOUCHED_EVERY):
            try:
                os.utime(self._descriptor)
                content = os.pread(self._descriptor, 4096, 0)
                taken = content != self._content or not _is_at(self._path, self._descriptor)
                if taken and self._path.exists():  # never opened: closing it would give up the lock
                    _leave(f"{self._path.parent} was taken over by another run")
            except OSError:  # a file system that does not answer: the run's own files will tell
                continue

    def release(self) -> None:
        """Free the folder; where the file cannot be removed from it, it is free once this process has ended."""
        self._over.set()
        self._thread.join()
        with suppress(OSError):  # of a disk that fails: what else failed for that is to be heard
            if _is_at(self._path, self._descriptor):
                self._path.unlink(missing_ok=True)  # before another can have it
        with suppress(OSError):
            os.close(self._descriptor)


def _acquire(folder: Path) -> _Lock:
    path = folder / LOCK
    _wait_for_signs_of_life(path)
    deadline = time.monotonic() + _ENDING
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        content = os.pread(descriptor, 4096, 0)
        if _locked(descriptor) and not _is_alive(content) and _is_at(path, descriptor):
            return _Lock(path, descriptor)
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise ConfigError(_refusal(path, content))
        time.sleep(_POLL)


def _wait_for_signs_of_life(path: Path) -> None:
    """Return once the run that left a lock file is known to be of this host or dead. Raises ConfigError if it lives."""
    deadline, first = None, None
    while (found := _read(path)) and not _is_of_here(found[0]):
        content, touched, age = found
        if first is None:
            patience = min(max(_STALE - age, 0), _STALE)
            first, deadline = touched, time.monotonic() + patience
            if patience:
                logger.info(
                    f"{path.parent} was left by {_named(content)}, without a sign of its end: looking for up to "
                    f"{patience:.0f} s whether it lives"
                )
        if touched != first:
            raise ConfigError(_refusal(path, content))
        if time.monotonic() > deadline:
            return
        time.sleep(1)


def _read(path: Path) -> tuple[bytes, int, float] | None:
    """Return content, time of the last sign of life (ns), and its age in seconds by the file system's clock."""
    try:
        with path.open("rb") as f, tempfile.TemporaryFile(dir=path.parent) as now:
            status = os.fstat(f.fileno())
            return f.read(4096), status.st_mtime_ns, os.fstat(now.fileno()).st_mtime - status.st_mtime
    except FileNotFoundError:
        return None


def _locked(descriptor: int) -> bool:
    """Try to lock the file; True where the file system has no locks. One of POSIX: no child process inherits it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        logger.debug(f"no locks on this file system: {e}")
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether the open file is still the one at path: its holder removes it at the end."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:  # not there, or, over NFS, "stale"
        return False


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _machine(),
        "started": _start_time(os.getpid()),
    }


def _machine() -> str:
    """Return what process ids here are unique in, until it is started again: this boot, and the container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> int | None:
    """Return when a process started, in ticks since the boot, by which it is told from others with its id.

    None if it has ended.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in "ZX" else int(words[19])


def _holder(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
        return holder if isinstance(holder, dict) else {}
    except ValueError:  # killed while it wrote
        return {}


def _is_of_here(content: bytes) -> bool:
    return _holder(content).get("machine", _machine()) == _machine()


def _is_alive(content: bytes) -> bool:
    """Tell whether the holder is another process of this machine that lives, where file systems have no locks."""
    holder = _holder(content)
    pid, started = holder.get("pid"), holder.get("started")
    if pid in (None, os.getpid()) or started is None or holder.get("machine") != _machine():
        return False
    return _start_time(pid) == started


def _named(content: bytes) -> str:
    holder = _holder(content)
    if not {"host", "pid", "since"} <= holder.keys():
        return "a run that has not said who it is"
    return f"the run of process {holder['pid']} on {holder['host']} since {holder['since']}"


def _refusal(path: Path, content: bytes) -> str:
    return (
        f"{path.parent} is in use by {_named(content)}: wait for its end or stop it, or choose another --output_dir "
        f"(if there is no such process, remove {path})"
    )


def end_with_torchrun() -> None:
    """End this process, if torchrun started it, once torchrun is gone without having ended it, as after a SIGKILL."""
    names = ("TORCHELASTIC_RUN_ID", "RANK", "MASTER_PORT")
    own = {f"{name}={os.environ[name]}".encode() for name in names if name in os.environ}
    if len(own) < len(names):
        return
    torchrun = os.getppid()
    while own <= _environment(torchrun):  # a script or a profiler between the two has them from torchrun, too
        torchrun = int(Path(f"/proc/{torchrun}/stat").read_text().rpartition(")")[2].split()[1])
    started = _start_time(torchrun)

    def watch() -> None:
        while _start_time(torchrun) == started:
            time.sleep(1)
        _leave("torchrun has ended without ending this process")

    threading.Thread(target=watch, daemon=True).start()


def _environment(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:  # of another user, or gone
        return set()


def _leave(why: str) -> NoReturn:
    os.write(2, f"error: {why}; leaving at once\n".encode())
    os._exit(1)
