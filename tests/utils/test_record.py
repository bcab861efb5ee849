import json

from utils.flags import finetune_parser
from utils.record import differing, write_run_record


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
