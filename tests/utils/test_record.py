import json

import pytest

from utils.cli import ConfigError
from utils.flags import finetune_parser
from utils.record import differing, read_run_record, write_run_record


def test_what_may_differ_on_resume():
    parser = finetune_parser("x")
    free = parser.free_on_resume
    base = vars(parser.parse_args(["--data_path", "a", "--output_dir", "b"]))
    assert differing(base, base | {"num_workers": 1, "data_path": "c", "stop_epoch": 3, "batch_size": 7}, free) == []
    other = base | {"lr": 1.0, "model": "m"}
    assert differing(base, other, free) == ["lr: None -> 1.0", "model: None -> m"]
    assert differing(base, base | {"flag_of_a_newer_version": 1}, free) == []
    assert free < base.keys() and parser.overridable.keys() < base.keys() and not free & parser.overridable.keys()


def test_run_record(tmp_path):
    write_run_record(tmp_path / "args.json", {"lr": 1e-3, "opt_betas": [0.9, 0.999]}, world_size=2)
    record = json.loads((tmp_path / "args.json").read_text())
    assert record["args"] == {"lr": 1e-3, "opt_betas": [0.9, 0.999]} and record["world_size"] == 2
    assert record["versions"]["torch"].startswith("2.") and record["git"]


def test_damage_to_the_record_is_found(tmp_path):
    path = tmp_path / "args.json"
    write_run_record(path, {"lr": 1e-3}, world_size=1)
    assert read_run_record(path) == {"lr": 1e-3}
    whole = path.read_text()
    for damaged in (whole.replace("0.001", "0.003"), whole.replace("0.001", "NaN"), "[" * 9999, "\0", '{"args": 1}'):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="args.json is damaged .*; remove it"):
            read_run_record(path)
