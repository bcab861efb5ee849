"""The commands that `pip install -e .` gives: each runs its script of this checkout, as python run_predict.py does.

The script takes the place of the command, so that what Python puts before everything else is the checkout: packages of
other projects may be called datasets, models or utils, too.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent


def predict() -> NoReturn:
    """tad-predict is run_predict.py."""
    _become("run_predict.py")


def finetune() -> NoReturn:
    """tad-finetune is run_finetune.py."""
    _become("run_finetune.py")


def dapt() -> NoReturn:
    """tad-dapt is run_dapt.py."""
    _become("run_dapt.py")


def report() -> NoReturn:
    """tad-report is python -m engine.report."""
    as_started = "import runpy, sys; sys.path[0] = sys.argv.pop(1); sys.argv[0] = '-m'"  # as the package expects it
    run = "runpy.run_module('engine.report', run_name='__main__')"
    _become("engine/report/__main__.py", "-c", f"{as_started}; {run}", str(ROOT))


def _become(script: str, *instead: str) -> NoReturn:
    """Run a file of the checkout in place of this process, or what Python is told instead of its name."""
    if not (ROOT / script).is_file():
        sys.exit(f"error: {ROOT / script}: no such file; install the checkout where it lies, with pip install -e")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *(instead or [str(ROOT / script)]), *sys.argv[1:]])
