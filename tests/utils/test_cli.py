import json

import pytest

from utils.cli import ConfigError, split_batch
from utils.flags import dapt_parser, finetune_parser
from utils.record import differing, write_run_record
from utils.resolve import FREE_ON_RESUME, resolve_runtime


@pytest.mark.parametrize("parser", [dapt_parser, finetune_parser])
def test_saving_more_often_needs_saving(parser):
    words = ["--data_path", "x", "--output_dir", "y", "--save_every_minutes", "5"]
    resolve_runtime(parser("").parse_args(words), cuda=False)
    with pytest.raises(ConfigError, match="--save_every_minutes needs checkpoints: leave out --no_save_ckpt"):
        resolve_runtime(parser("").parse_args([*words, "--no_save_ckpt"]), cuda=False)


@pytest.mark.parametrize(
    ("given", "world_size", "update_freq", "result"),
    [
        ((None, None), 1, 1, (56, 56)),
        ((None, None), 4, 2, (7, 56)),
        ((64, None), 8, 1, (8, 64)),
        ((None, 10), 4, 2, (10, 80)),
    ],
)
def test_split_batch(given, world_size, update_freq, result):
    assert split_batch(*given, default=56, world_size=world_size, update_freq=update_freq) == result


def test_batches_that_do_not_divide_name_the_nearest_that_do():
    with pytest.raises(ConfigError, match="56 does not divide over 3 processes x 1 passes: .* 54 or 57"):
        split_batch(None, None, default=56, world_size=3, update_freq=1)
    with pytest.raises(ConfigError, match="use --total_batch_size 16$"):
        split_batch(8, None, default=56, world_size=16, update_freq=1)
    with pytest.raises(ConfigError, match="not both"):
        split_batch(56, 56, default=56, world_size=1, update_freq=1)


def test_what_may_differ_on_resume():
    base = vars(finetune_parser("x").parse_args(["--data_path", "a", "--output_dir", "b"]))
    free = base | {"num_workers": 1, "data_path": "c", "stop_epoch": 3, "batch_size": 7}
    assert differing(base, free, FREE_ON_RESUME) == []
    other = base | {"lr": 1.0, "model": "m"}
    assert differing(base, other, FREE_ON_RESUME) == ["lr: None -> 1.0", "model: vit_base_patch16_224 -> m"]
    assert differing(base, base | {"flag_of_a_newer_version": 1}, FREE_ON_RESUME) == []
    dapt = vars(dapt_parser("x").parse_args(["--data_path", "a", "--output_dir", "b"]))
    assert base.keys() | dapt.keys() > FREE_ON_RESUME


def test_defaults_are_the_published_recipe():
    args = finetune_parser("x").parse_args(["--data_path", "a", "--output_dir", "b"])
    assert (args.epochs, args.warmup_epochs, args.layer_decay, args.drop_path) == (50, 5, 0.6, 0.2)
    assert (args.min_lr, args.weight_decay, args.opt, args.opt_betas) == (1e-6, 0.05, "adamw", [0.9, 0.999])
    assert (args.nb_samples_per_epoch, args.aa, args.reprob) == (50000, "rand-m6-n3-mstd0.5-inc1", 0.25)
    assert (args.loss, args.seed, args.init_scale, args.clip_grad) == ("crossentropy", 42, 0.001, None)


def test_run_record(tmp_path):
    write_run_record(tmp_path / "args.json", {"lr": 1e-3, "opt_betas": [0.9, 0.999]}, world_size=2)
    record = json.loads((tmp_path / "args.json").read_text())
    assert record["args"] == {"lr": 1e-3, "opt_betas": [0.9, 0.999]} and record["world_size"] == 2
    assert record["versions"]["torch"].startswith("2.") and record["git"]
