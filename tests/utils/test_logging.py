import json

import torch

from utils.logging import Averages, append_json_line, drop_epochs_from


def test_log_lines_survive_a_kill_in_the_middle(tmp_path):
    path = tmp_path / "log.txt"
    drop_epochs_from(path, 0)
    assert not path.exists()
    for epoch in range(3):
        append_json_line(path, {"epoch": epoch, "train_loss": float("nan") if epoch else 0.1 + 0.2})
    with path.open("a") as f:
        f.write('{"epoch": 3, "trai')
    drop_epochs_from(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"epoch": 0, "train_loss": 0.1 + 0.2},
        {"epoch": 1, "train_loss": None},
    ]


def test_averages_are_exact_and_read_late():
    averages = Averages(torch.device("cpu"))
    assert averages.read_total() == {}
    for value in (1.0, 2.0, 6.0):
        averages.update({"loss": torch.tensor(value)})
    assert averages.read_window() == {"loss": 3.0}
    averages.update({"loss": torch.tensor(7.0)})
    assert averages.read_window() == {"loss": 7.0} and averages.read_total() == {"loss": 4.0}
