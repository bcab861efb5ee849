import logging
from argparse import Namespace

import pytest

from utils.cli import ConfigError
from utils.flags import dapt_parser, finetune_parser
from utils.resolve import fill_unset, refuse_contradictions, resolve_runtime, split_batch, without_other_head


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


def test_what_was_left_open_is_filled_and_what_was_given_stays():
    args = Namespace(num_frames=None, view_fps=5.0, gelu=None)
    fill_unset(args, {"num_frames": 8, "view_fps": 10}, ("num_frames", "view_fps", "gelu"))
    assert args == Namespace(num_frames=8, view_fps=5.0, gelu=None)


def test_a_flag_that_contradicts_a_weights_file_is_an_error_that_names_both():
    spec = {"num_frames": 8, "view_fps": 10}
    names = ("num_frames", "view_fps", "gelu")
    agreeing = Namespace(num_frames=8, view_fps=10.0, gelu="tanh", override_spec=False)  # an older spec has no gelu
    refuse_contradictions(agreeing, spec, names, "w.pth")
    args = Namespace(num_frames=None, view_fps=5.0, gelu=None, override_spec=False)
    match = "--view_fps 5.0 contradicts w.pth, which was made with 10: leave the flag out, or add --override_spec"
    with pytest.raises(ConfigError, match=match):
        refuse_contradictions(args, spec, names, "w.pth")


def test_a_contradiction_that_is_meant_is_logged(caplog):
    args = Namespace(num_frames=4, override_spec=True)
    logging.getLogger("tad").addHandler(caplog.handler)
    refuse_contradictions(args, {"num_frames": 8}, ("num_frames",), "w.pth")
    logging.getLogger("tad").removeHandler(caplog.handler)
    assert (
        args.num_frames == 4
        and "--num_frames 4 contradicts w.pth, which was made with 8; going on with 4" in caplog.text
    )


@pytest.mark.parametrize(
    ("head", "final_reduction", "said", "kept"),
    [
        (None, None, {"head": "attentive", "final_reduction": "attentive"}, True),
        ("linear", None, {"head": "attentive", "final_reduction": "attentive"}, False),
        ("attentive", None, {"final_reduction": "cls"}, False),
        ("linear", None, {"final_reduction": "cls"}, True),
        (None, "cls", {"head": "linear", "final_reduction": "fc_norm"}, False),
        ("attentive", None, {"head": "linear"}, False),
        (None, None, {}, True),
    ],
)
def test_training_takes_the_head_of_the_file_it_starts_from_unless_asked_for_another(head, final_reduction, said, kept):
    args = Namespace(head=head, final_reduction=final_reduction)
    said = {"model": "m"} | said
    assert without_other_head(args, said) == (said if kept else {"model": "m"})
