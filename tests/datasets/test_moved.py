"""The commands of datasets.tools under their former names."""

import pytest
from helpers import run


@pytest.mark.parametrize("name", ["check", "pack", "prepare", "synthetic"])
def test_former_names_say_the_new_one(name):
    done = run("-m", f"datasets.{name}", "DoTA", "/data")
    message = f"error: datasets.{name} has moved: use python -m datasets.tools.{name}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
