"""Files that are whole or absent, and why they cannot be written."""

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STARTED = os.urandom(8)  # tells this process, and those forked from it, from those with their ids on other hosts


def temporary_beside(path: str | Path) -> Path:
    """Return the path, in the folder of `path`, under which this process alone writes what is to replace it.

    Hosts that share a file system, or containers of one image, often have processes of the same id.
    """
    path, process = Path(path), zlib.crc32(_STARTED + str(os.getpid()).encode())
    return path.with_name(f".{path.name}.{process:08x}.tmp")


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` at the end, atomically.

    After an exception the temporary file is removed and `path` is as it was. Raises OSError, which names `path`, where
    it cannot be written, also where a library raised RuntimeError for that.
    """
    path, temporary = Path(path), temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as e:
        if e.errno is None or e.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    except RuntimeError as e:
        if not (why := disk_error(temporary)):
            raise
        raise OSError(why.errno, why.strerror, str(path)) from e
    finally:
        with suppress(OSError):  # where its folder is gone or read-only, which is said already
            temporary.unlink(missing_ok=True)


def disk_error(path: Path) -> OSError | None:
    """Return why nothing can be added to a half-written file, or None where something can.

    For a library, such as torch.save, that says no more than that it failed.
    """
    try:
        with path.open("ab") as f:
            f.write(bytes(2**20))
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        return e
    return None


def check_writable(folder: str | Path, size: int = 0) -> None:
    """Make a folder, and find out whether `size` bytes can be written into it now. Raises OSError, which names it."""
    folder = Path(folder)
    probe = temporary_beside(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(2**16))
            if shutil.disk_usage(folder).free + 2**16 < size:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: about {size / 1e6:.3g} MB are needed")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(folder)) from e


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
