"""Batches out of reading processes: nothing lost, nothing mixed up, whatever becomes of the processes."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from datasets.augment.device import DeviceLoader
from datasets.batches import BatchLoader
from datasets.faults import Fault


class Numbers:
    """Stands for a WindowDataset: the video of key (_, _, _, n) is full of n; what it does else is told by n."""

    shape = (1, 2, 8, 8, 3)

    def __init__(self, misbehave=lambda number: None):
        self.misbehave = misbehave

    def fill_together(self, keys, outs):
        samples = []
        for key, out in zip(keys, outs, strict=True):
            self.misbehave(key[3])
            out.fill_(key[3])
            samples.append({"window": torch.tensor([key[3]]), "sample": f"window {key[3]}", "notes": []})
        return samples

    def fault(self, key, reason):
        return Fault(key[3], f"clip {key[3]}", reason)


def sampled(batches, size, first=0):
    return [[(0, 0, i, first + b * size + i) for i in range(size)] for b in range(batches)]


def collected(loader):
    """[(windows, skipped)] of the batches; each video is that of its windows."""
    found = []
    for batch in loader:
        windows = batch["window"].tolist()
        expected = torch.tensor(windows, dtype=torch.uint8)[:, None].expand(-1, 2 * 8 * 8 * 3)
        assert torch.equal(batch["video"].flatten(1), expected) and batch["video"].shape[1:] == (2, 8, 8, 3)
        assert batch["samples"] == [f"window {w}" for w in windows] and batch["weight"] == 1
        found.append((windows, batch["skipped"]))
    return found


@pytest.mark.parametrize(("workers", "size"), [(0, 3), (1, 3), (3, 3), (5, 1), (2, 40)])
def test_batches_come_in_order_whoever_is_fast(workers, size):
    loader = BatchLoader(Numbers(lambda n: time.sleep(0.002 * (n % 7 == 0))), sampled(6, size), num_workers=workers)
    for _ in range(2):
        assert [w for w, _ in collected(loader)] == [[size * b + i for i in range(size)] for b in range(6)]
    loader.close()


def test_a_process_that_dies_or_hangs_costs_one_window():
    def misbehave(number):
        if number in (4, 5):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 9:
            time.sleep(3600)

    loader = BatchLoader(Numbers(misbehave), sampled(5, 4), num_workers=2, read_timeout=1.0)
    found = collected(loader)
    loader.close()
    assert [w for w, _ in found] == [[0, 1, 2, 3], [6, 7], [8, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    skipped = {fault.name: fault.reason for _, faults in found for fault in faults}
    assert skipped.keys() == {"clip 4", "clip 5", "clip 9"}
    assert "killed by SIGKILL" in skipped["clip 4"] and "nothing could be read of it for 1 seconds" in skipped["clip 9"]


def test_a_run_that_is_to_stop_does_not_wait_for_one_window_after_the_other(monkeypatch):
    """All that is to be read hangs, as of a file system that is gone; eight windows of a process wait in line."""
    monkeypatch.setattr("datasets.batches.stop_requested", lambda: True)
    loader = BatchLoader(Numbers(lambda n: time.sleep(3600)), sampled(1, 16), num_workers=2, read_timeout=0.5)
    loader.dataset.fill_black = lambda key, out: {"window": torch.zeros(1), "sample": "", "notes": []}
    started = time.monotonic()
    (batch,) = loader
    assert time.monotonic() - started < 8 * 0.5  # 2 x 0.5 and the start of processes
    reasons = [fault.reason for fault in batch["skipped"]]
    assert sum(reason.startswith("nothing could be read of it for") for reason in reasons) == 4 and len(reasons) == 16
    assert sum(reason.startswith("not tried, since the run is to stop") for reason in reasons) == 12


def test_a_run_that_is_to_stop_reads_what_can_be_read(monkeypatch):
    monkeypatch.setattr("datasets.batches.stop_requested", lambda: True)
    hang = Numbers(lambda n: time.sleep(3600 * (n in (1, 5))))
    found = collected(BatchLoader(hang, sampled(2, 4), num_workers=1, read_timeout=0.5))
    assert [windows for windows, _ in found] == [[0, 2, 3], [4, 6, 7]]


def test_a_training_process_that_is_busy_kills_nobody():
    """Longer than the limit between two batches, as in an evaluation: the readers have done their work by then."""
    loader = BatchLoader(Numbers(), sampled(6, 2), num_workers=2, read_timeout=0.3)
    windows = []
    for batch in loader:
        windows += batch["window"].tolist()
        time.sleep(0.5)
    loader.close()
    assert windows == list(range(12))


def test_a_fault_of_the_code_reaches_the_training_process():
    def fail(number):
        if number == 5:
            raise ZeroDivisionError("a fault of the code")

    loader = BatchLoader(Numbers(fail), sampled(4, 2), num_workers=2)
    with pytest.raises(ZeroDivisionError) as raised:
        collected(loader)
    assert "in fail" in str(raised.value.__cause__)


@pytest.mark.parametrize("slow", range(3, 9))
def test_an_iteration_that_is_left_does_not_disturb_the_next(slow):
    """Windows 3 to 8 are in the making when it is left; one of them would be written late, over what came after."""
    loader = BatchLoader(Numbers(lambda n: time.sleep(0.3 * (n == slow))), sampled(8, 3), num_workers=2)
    next(iter(loader))
    loader.sampler = sampled(4, 3, first=100)
    assert [w for w, _ in collected(loader)] == [[100 + 3 * b + i for i in range(3)] for b in range(4)]
    loader.close()


def test_memory_is_kept_and_is_no_file():
    before = set(os.listdir("/dev/shm"))
    loader = BatchLoader(Numbers(), sampled(12, 4), num_workers=2)
    places = [batch["video"].data_ptr() for batch in loader]
    assert len(set(places)) == 3 and len(places) == 12
    assert set(os.listdir("/dev/shm")) <= before
    again = {batch["video"].data_ptr() for batch in loader}
    assert again == set(places)
    loader.close()


def test_readers_that_cannot_keep_up_do_not_block_the_training_process():
    """More messages than a pipe holds, both ways."""
    size = 600
    loader = BatchLoader(Numbers(), [[(0, 0, i, i % 200) for i in range(size)]] * 3, num_workers=1)
    for batch in loader:
        time.sleep(0.3)
        assert np.array_equal(batch["window"].numpy(), np.arange(size) % 200)
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_says_for_how_long_it_was_waited_for(workers):
    """Half a second for the first; the second is read, by a process, while this one does something else."""
    loader = BatchLoader(Numbers(lambda n: time.sleep(0.5 * (n % 4 == 0))), sampled(2, 4), num_workers=workers)
    seconds = []
    for _ in DeviceLoader(loader, torch.device("cpu"), lambda video, batch: video):
        seconds.append(loader.waited)
        time.sleep(1.5)
    loader.close()
    second = seconds[1] - seconds[0]
    assert seconds[0] >= 0.4 and (second >= 0.4 if workers == 0 else second < 0.25)  # a process begins before the wait
