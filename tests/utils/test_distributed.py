from datetime import timedelta

import pytest
import torch

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
