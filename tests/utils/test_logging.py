import io
import json
import logging
import sys

import torch

from utils.logging import Averages, append_json_line, drop_records_from, progress_bar, setup_logging


def test_log_lines_survive_a_kill_in_the_middle(tmp_path):
    path = tmp_path / "log.txt"
    drop_records_from(path, 0)
    assert not path.exists()
    for epoch in range(3):
        append_json_line(path, {"epoch": epoch, "train_loss": float("nan") if epoch else 0.1 + 0.2})
    with path.open("a") as f:
        f.write('{"epoch": 3, "trai')
    drop_records_from(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"epoch": 0, "train_loss": 0.1 + 0.2},
        {"epoch": 1, "train_loss": None},
    ]


def test_averages_are_exact_and_read_late():
    averages = Averages()
    assert averages.read_total() == {}
    for value in (1.0, 2.0, 6.0):
        averages.update({"loss": torch.tensor(value)})
    assert averages.read_window() == {"loss": 3.0}
    averages.update({"loss": torch.tensor(7.0)})
    assert averages.read_window() == {"loss": 7.0} and averages.read_total() == {"loss": 4.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_on_a_terminal_only(monkeypatch):
    items = [1, 2, 3]
    assert progress_bar(items, description="epoch 0") is items
    monkeypatch.setattr("sys.stdout", Terminal())
    assert progress_bar(items, description="epoch 0", enabled=False) is items
    setup_logging(rank=0)
    for item in progress_bar(iter(items), total=3, description="epoch 0"):
        logging.getLogger("tad").info(f"item {item}")
    shown = sys.stdout.getvalue()
    assert "epoch 0:" in shown and "/3" in shown and "item 2\n" in shown
    monkeypatch.undo()
    setup_logging(rank=0)
