"""The flags of run_finetune.py, in groups. Defaults are the published recipe; None means "the model's own" or "off"."""

import argparse
from functools import partial
from typing import Any

from utils.config import Parser

LOSS_NAMES = ["crossentropy", "focal", "focal6x100", "focal2_6", "focal2_2", "smoothap", "exponential1", "2bce"]

# Flags of simple-tad's commands that have no counterpart, and why.
_NO_EFFECT = "it had no effect in simple-tad either"
_TORCHRUN = "torchrun sets it"
RETIRED = {
    "--nb_classes": "the task has two classes, safe and anomalous",
    "--enable_deepspeed": "DistributedDataParallel with bf16 is the one path",
    "--dist_eval": "evaluation always runs on every process",
    "--short_side_size": "use --train_short_side",
    "--warmup_lr": "the warm-up starts at 0, as it did in simple-tad whatever was given",
    "--momentum": "optimizers of --opt use timm's own",
    "--num_segments": "a window is one segment",
    "--test_num_segment": "evaluation scores every window once",
    "--test_num_crop": "evaluation uses the whole frame",
    "--imagenet_default_mean_and_std": "the model's mean and standard deviation are used",
    "--eval_data_path": "use --data_path with --eval_split",
    **dict.fromkeys(("--world_size", "--local_rank", "--dist_url", "--dist_on_itp"), _TORCHRUN),
    **dict.fromkeys(("--color_jitter", "--crop_pct", "--resplit", "--eval_option", "--smoothing"), _NO_EFFECT),
    **dict.fromkeys(("--mixup", "--cutmix", "--cutmix_minmax", "--mixup_prob", "--mixup_switch_prob"), _NO_EFFECT),
    "--mixup_mode": _NO_EFFECT,
}

# Arguments that may differ when a run is resumed: they change where or how fast it runs, not what it computes.
FREE_ON_RESUME = frozenset(
    (
        *("auto_resume", "resume", "start_epoch", "stop_epoch", "output_dir", "log_dir", "print_freq", "save_ckpt"),
        *("save_ckpt_freq", "data_path", "finetune", "model_key", "model_prefix", "device", "num_workers", "pin_mem"),
        *("compile", "no_flash_attn", "use_checkpoint", "batch_size", "update_freq", "eval", "eval_batch_size"),
        *("disable_eval_during_finetuning",),
    )
)


def positive(text: str) -> int:
    """A whole number above 0. Raises argparse's error for others."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _flag(group: argparse._ArgumentGroup, name: str, default: Any, help: str, **kwargs: Any) -> None:
    """A flag whose type is its default's and whose help names the default, unless it is None."""
    if default is not None:
        kwargs.setdefault("type", type(default))
        help += f" (default: {default})"
    group.add_argument(name, default=default, help=help, **kwargs)


def _switch(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    """--name, on by default, and --no_name."""
    group.add_argument(f"--{name}", action="store_true", default=True, help=f"{help} (default)")
    group.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"turn --{name} off")


def finetune_parser(description: str) -> Parser:
    """The command line of run_finetune.py."""
    parser = Parser(description, RETIRED)
    for add_flags in (
        _data_flags,
        _model_flags,
        _batch_flags,
        _optimizer_flags,
        _augmentation_flags,
        _output_flags,
        _evaluation_flags,
        _runtime_flags,
    ):
        add_flags(parser)
    return parser


def _data_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("data"))
    add("--data_set", "DoTA", "data set: DoTA or DoTA_half")
    add("--data_path", None, "root folder of the data set", required=True)
    add("--num_frames", None, "frames of a window (default: the model's)", type=positive)
    add("--view_fps", None, "frames per second of a window (default: the model's)", type=float)
    add("--sampling_rate", 1, "step between training windows, in frames of the source", type=positive)
    add("--nb_samples_per_epoch", 50000, "random windows per epoch; 0, or more than there are: all of them")


def _model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add = partial(_flag, group)
    add("--model", "vit_base_patch16_224", "vit_{small,base,large,huge}_patch16_224, or vit_tiny_patch16_64 for trials")
    add("--finetune", None, "weights to start from or, with --eval, to evaluate: path or URL (default: random weights)")
    add("--model_key", "model|module|state_dict|model_state", "where the weights are in the file: the first of these")
    add("--model_prefix", None, "read only the keys under this prefix, e.g. student. (default: all keys)")
    add("--input_size", None, "height and width in pixels (default: the model's)", type=positive)
    add("--tubelet_size", None, "frames per token (default: the model's)", type=positive)
    add("--final_reduction", "fc_norm", "pool by the mean of the tokens or take the first", choices=["fc_norm", "cls"])
    add("--init_scale", 0.001, "factor on the head's initial weights")
    add("--drop_path", 0.2, "stochastic depth: probability of the last block, growing linearly from 0 at the first")
    add("--drop", 0.0, "dropout after projections")
    add("--attn_drop_rate", 0.0, "dropout of attention weights")
    add("--fc_drop_rate", 0.0, "dropout before the head")
    add("--freeze_layers", None, "freeze the embedding and the first N blocks, norms excepted", type=int, metavar="N")
    group.add_argument("--use_checkpoint", action="store_true", help="recompute activations: less memory, slower")
    group.add_argument("--no_flash_attn", action="store_true", help="plain attention, not PyTorch's fused kernels")


def _batch_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("epochs and batches"))
    add("--epochs", 50, "epochs the schedule is laid out for", type=positive)
    add("--stop_epoch", None, "stop after this many epochs of the schedule (default: --epochs)", type=positive)
    add(
        "--total_batch_size",
        None,
        "windows per step over all processes (default: 56 or by --batch_size)",
        type=positive,
    )
    add("--batch_size", None, "windows per process and forward pass (default: by --total_batch_size)", type=positive)
    add("--update_freq", 1, "forward passes per optimizer step", type=positive)
    add("--num_sample", 1, "augmented views of each window; the learning rate does not count them", type=positive)


def _optimizer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("optimization")
    add = partial(_flag, group)
    add("--lr", None, "base learning rate, x total batch / 256 (default: 1e-3 for small models, else 5e-4)", type=float)
    add("--min_lr", 1e-6, "final base learning rate, scaled likewise")
    add("--warmup_epochs", 5, "epochs of linear warm-up from 0")
    add("--warmup_steps", -1, "steps of warm-up instead of --warmup_epochs; -1: off")
    add("--layer_decay", 0.6, "learning-rate factor per layer from the head down; 1: the same rate for all")
    add("--loss", "crossentropy", "training loss", choices=LOSS_NAMES)
    add("--opt", "adamw", "optimizer, by timm's name")
    add("--opt_eps", 1e-8, "epsilon of Adam")
    add("--opt_betas", [0.9, 0.999], "betas of Adam", type=float, nargs=2)
    add("--weight_decay", 0.05, "weight decay")
    add("--weight_decay_end", None, "weight decay at the end of its cosine (default: constant)", type=float)
    add("--clip_grad", None, "largest gradient norm (default: no clipping)", type=float, metavar="NORM")
    group.add_argument("--model_ema", action="store_true", help="average the weights; evaluate and keep the average")
    add("--model_ema_decay", 0.9999, "decay of the average")
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the average on the CPU")


def _augmentation_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("augmentation"))
    add("--aa", "rand-m6-n3-mstd0.5-inc1", "RandAugment policy over the driving operations, or none")
    add("--train_interpolation", "bicubic", "of RandAugment's rotations and shears", choices=["bilinear", "bicubic"])
    add("--train_short_side", 0, "resize training frames to this short side before padding, in pixels; 0: full size")
    add("--reprob", 0.25, "probability that a clip is partly erased (random erasing)")
    add("--remode", "pixel", "fill of erased boxes: noise, one colour, zeros", choices=["pixel", "rand", "const"])
    add("--recount", 1, "largest number of boxes erased from a clip", type=positive)
    add("--erase_max_area", 0.1, "largest erased share of the frame, 0 to 1")


def _output_flags(parser: Parser) -> None:
    group = parser.add_argument_group("output and resuming")
    add = partial(_flag, group)
    add("--output_dir", None, "folder for checkpoints, logs and results", required=True)
    add("--log_dir", None, "folder for TensorBoard events (default: --output_dir)")
    _switch(group, "auto_resume", "continue from --output_dir/checkpoint-last if there is one")
    add("--resume", None, "start from this checkpoint-last folder if --output_dir has none", metavar="DIR")
    add("--start_epoch", 0, "epoch of the schedule a fresh run starts at")
    _switch(group, "save_ckpt", "write checkpoints")
    add("--save_ckpt_freq", 0, "keep checkpoint-<epoch>.pth every N epochs; 0: of the last only", metavar="N")
    add("--print_freq", 20, "optimizer steps between log lines", type=positive)


def _evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    add = partial(_flag, group)
    group.add_argument("--eval", action="store_true", help="evaluate only: predictions.csv, metrics.json, plots/")
    add("--eval_split", "val", "split to evaluate, during training too: val, train or all")
    add("--sampling_rate_val", 1, "step between evaluated windows, in frames of the source", type=positive)
    add("--eval_batch_size", 64, "windows per process and forward pass", type=positive)
    group.add_argument("--disable_eval_during_finetuning", action="store_true", help="train without evaluating")


def _runtime_flags(parser: Parser) -> None:
    group = parser.add_argument_group("runtime")
    add = partial(_flag, group)
    add("--device", None, "where to run (default: cuda if PyTorch finds it, else cpu)", choices=["cuda", "cpu"])
    add("--precision", None, "number format (default: bf16 on CUDA, fp32 on the CPU)", choices=["bf16", "fp16", "fp32"])
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    add("--seed", 42, "seed of weights, data order and augmentation")
    add("--num_workers", 8, "loading processes per training process")
    _switch(group, "pin_mem", "pin host memory for faster copies to the GPU")
