import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import complete

STARTS = "import subprocess, sys; p = subprocess.Popen(['sleep', '600'], start_new_session=True); "


def test_what_a_late_command_has_started_does_not_keep_its_caller_waiting(tmp_path):
    """As torchrun's ranks, in a session of their own: they hold the pipes open when torchrun alone is killed."""
    code = f"{STARTS}open(sys.argv[1], 'w').write(str(p.pid)); p.wait()"
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        complete([sys.executable, "-c", code, tmp_path / "pid"], timeout=3)
    assert time.monotonic() - started < 60
    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() - started < 60 and state_of(pid) not in ("", "Z"):
        time.sleep(0.1)
    assert state_of(pid) in ("", "Z")


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it is gone
        return ""
