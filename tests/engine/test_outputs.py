"""What an evaluation left behind, of which its rest is to be made."""

import json

import pytest

from engine.outputs import unfinished_evaluation
from utils.cli import ConfigError

RECORD = {"args": {"lr": 1}, "weights": None, "scores": {"about": {"coverage": "1 of 1"}, "windows": 1, "crc32": 1}}


@pytest.mark.parametrize("change", [{"args": "lr"}, {"args": None}, {"amended": True}, {"scores": []}, {"weights": ()}])
def test_a_record_of_another_form_does_not_tell_what_the_scores_are_of(tmp_path, change):
    """As versions wrote it that did not write its sum."""
    (tmp_path / "predictions.csv").touch()
    (tmp_path / "eval_args.json").write_text(json.dumps(RECORD))
    assert unfinished_evaluation(tmp_path, {"lr": 1}, set(), None) == RECORD["scores"]
    (tmp_path / "eval_args.json").write_text(json.dumps(RECORD | change))
    with pytest.raises(ConfigError, match="predictions.csv exists: choose another --output_dir or remove it \\("):
        unfinished_evaluation(tmp_path, {"lr": 1}, set(), None)
