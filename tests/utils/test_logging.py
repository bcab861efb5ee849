import io
import json
import logging
import os
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.averages import Averages
from utils.cli import ConfigError
from utils.logging import TensorBoard, append_json_line, drop_records_from, progress_bar, setup_logging


def test_tensorboard_takes_no_folder_whose_name_is_not_in_utf8(tmp_path):
    with pytest.raises(ConfigError, match=r"--log_dir \S+a\\udcff: cannot be written \(its name is not in UTF-8; give"):
        TensorBoard(tmp_path / os.fsdecode(b"a\xff"))


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


DAMAGED = [b"\xff", b"\0", b"[]", b"{}", b"null", b"[" * 9999]
DAMAGED += [b'{"epoch": "0"}', b'{"epoch": NaN}', b'{"epoch": -1}', b'{"epoch": 0, "step": []}']


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:20]))
def test_a_damaged_line_is_left_out_and_said(tmp_path, line, caplog):
    path, records = tmp_path / "log.txt", [b'{"epoch": 0, "lr": 1}\n', b'{"epoch": 1, "lr": 2}\n']
    path.write_bytes(records[0] + line + b"\n" + records[1] + b'{"epoch": 2}\n')
    drop_records_from(path, 2)
    assert path.read_bytes() == b"".join(records)
    assert "log.txt: lines that are damaged are left out: 2" in caplog.text


def test_averages_are_exact_and_read_late():
    averages = Averages()
    assert averages.read_total() == {}
    for value in (1.0, 2.0, 6.0):
        averages.update({"loss": torch.tensor(value)})
    assert averages.read_window() == {"loss": 3.0}
    averages.update({"loss": torch.tensor(7.0)})
    assert averages.read_window() == {"loss": 7.0} and averages.read_total() == {"loss": 4.0}


def test_what_is_written_again_stands_once_in_tensorboard(tmp_path):
    for steps_done in (0, 0, 2):  # begun, begun again, continued
        time.sleep(1)  # files are read in the order of their second
        board = TensorBoard(tmp_path, steps_done)
        for step in range(steps_done + 1, 5):
            board.scalars("train", {"loss": 10 * steps_done + step}, step)
        board.close()
    points = [(e.step, e.value) for e in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")]
    assert points == [(1, 1), (2, 2), (3, 23), (4, 24)]


def averages_of(*values):
    averages = Averages()
    for value in values:
        averages.update({"loss": torch.tensor(value)})
    return averages


def test_averages_go_on_from_a_checkpoint_of_any_number_of_ranks(monkeypatch):
    averages = averages_of(1.0, 2.0)
    averages.read_window()
    averages.update({"loss": torch.tensor(6.0)})
    resumed = Averages()
    resumed.load_state_dicts([averages.state_dict()])
    assert resumed.read_window() == {"loss": 6.0} and resumed.read_total() == {"loss": 3.0}

    with monkeypatch.context() as patch:  # two ranks saved two steps, one rank does the third
        patch.setattr("engine.averages.world_size", lambda: 2)
        states = [averages_of(1.0, 3.0).state_dict(), averages_of(2.0, 4.0).state_dict()]
    resumed.load_state_dicts(states)
    resumed.update({"loss": torch.tensor(8.5)})
    assert resumed.read_total() == {"loss": (1.5 + 3.5 + 8.5) / 3}
    resumed.load_state_dicts([])
    assert resumed.read_total() == {}


def test_averages_leave_out_what_they_are_told_to():
    averages = averages_of(1.0)
    averages.update({"loss": torch.tensor(float("nan"))}, leave_out=torch.tensor(True))
    averages.update({"loss": torch.tensor(2.0)}, leave_out=torch.tensor(False))
    assert averages.read_window() == averages.read_total() == {"loss": 1.5}


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


def test_lines_can_go_elsewhere_than_to_standard_output(capsys):
    setup_logging(0, sys.stderr)
    logging.getLogger("tad").info("hello")
    setup_logging(0)
    out, err = capsys.readouterr()
    assert not out and err.endswith(" hello\n")
