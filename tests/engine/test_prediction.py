"""What was left of a video counts as long as it is what was written."""

import json

import pytest
from curves import RULE, bumpy

from engine.prediction import EVENTS, VideoResult, load_result, save_result
from utils.damage import parse_json, with_sum

OF = {"source": "a.mp4"}


@pytest.mark.parametrize("change", [{"fps": None}, {"fps": 0}, {"fps": -5.0}, {"num_frames": "x"}, {"gaps": [{}]}])
def test_a_record_without_its_sum_is_as_good_as_none(tmp_path, change):
    save_result(tmp_path, VideoResult("a", bumpy(60)), OF)
    record = parse_json((tmp_path / EVENTS).read_bytes())
    assert load_result(tmp_path, "a", OF, RULE).curve.events()
    (tmp_path / EVENTS).write_text(json.dumps(with_sum(record)))
    assert load_result(tmp_path, "a", OF, RULE).curve.events()
    (tmp_path / EVENTS).write_text(json.dumps(record | change))
    assert load_result(tmp_path, "a", OF, RULE) is None
