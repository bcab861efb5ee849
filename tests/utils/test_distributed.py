import os
import re
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from helpers import ROOT

from utils.cli import ConfigError
from utils.distributed import interface_towards, process_group


@pytest.mark.parametrize(("device", "precision"), [("cuda", "high"), ("cpu", "highest")])
def test_float32_is_multiplied_in_tf32_on_cuda_alone(device, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    try:
        with process_group(device, timeout=timedelta(minutes=1)):
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_interface_towards_a_host_is_found():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("::1") is None  # gloo looks for itself then


WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
WHOLE |= {"MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": None}, "RANK is ''"),
        ({"WORLD_SIZE": "", "LOCAL_WORLD_SIZE": None}, "WORLD_SIZE is '', LOCAL_WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_RANK": "9" * 5000}, "LOCAL_RANK is '999"),
        ({"RANK": "2"}, "RANK is 2, WORLD_SIZE is 2"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_PORT is '', MASTER_ADDR is ''"),
    ],
)
def test_a_group_that_cannot_be_is_refused(change, said, monkeypatch):
    """As images of clusters leave a variable or two of it."""
    for name, value in (WHOLE | change).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=f"WORLD_SIZE, which torchrun sets, but {said}"),
        process_group("cpu", timeout=timedelta(minutes=1)),
    ):
        pass


def test_a_rank_without_a_group_is_no_rank(monkeypatch):
    """The only process writes the files, whatever a variable says."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    with process_group("cpu", timeout=timedelta(minutes=1)) as process:
        assert process.is_main and process.world_size == 1


ENDS = """
import os, sys
from datetime import timedelta
from utils.distributed import barrier, ended_together, from_main, process_group
with process_group("cpu", timeout=timedelta(minutes=30)) as process:
    barrier()
    if process.rank == 1:
        os._exit(3)
    with ended_together():
        from_main(int)
"""


def test_a_process_that_ends_is_missed_by_one_that_would_wait_for_a_day_without_a_torchrun_to_end_it():
    """As on another node, whose torchrun knows nothing of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENDS]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    try:
        said = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 3]
    assert re.search("^error: lost the other processes: one has ended", said[0], re.MULTILINE), said[0]
