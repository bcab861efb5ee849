import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import make_data, render_small


@pytest.fixture(scope="session")
def dota_root(tmp_path_factory):
    """The data of `render_small`."""
    return render_small(tmp_path_factory.mktemp("dota"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The data of `make_data`."""
    return make_data(tmp_path_factory.mktemp("survival"))


@pytest.fixture(autouse=True)
def ordinary_process():
    """No test leaves real-time priority behind: what is started then starves all else, and processes wait for ever."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before


@pytest.fixture
def as_nobody():
    """A folder, and a context in which this process, root in a container, is held to permissions as a user is."""

    @contextmanager
    def drop():
        own = os.geteuid()
        if own == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(own)

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder), drop
