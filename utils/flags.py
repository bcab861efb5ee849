"""The flags of run_finetune.py and run_dapt.py, in groups. Defaults are the published recipes; None means "off" or that
the script finds the value by the model or the data set.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from utils.cli import Parser

LOSS_NAMES = ["crossentropy", "focal", "focal6x100", "focal2_6", "focal2_2", "smoothap", "exponential1", "2bce"]
ASSUME_FPS = "frame rate of clips whose annotations have none: DADA2K, CAP-DATA (default: 30), pictures of csv"

# Flags of simple-tad's commands that have no counterpart, and why.
_NO_EFFECT = "it had no effect in simple-tad either"
_TORCHRUN = "torchrun sets it"
_LISTS = ("data_set", "data_path", "batch_size", "sampling_rate")  # one value for each data set of a mix
_COMMON_RETIRED = {
    "--warmup_lr": "the warm-up starts at 0, as it did in simple-tad whatever was given",
    "--momentum": "optimizers of --opt use timm's own",
    "--imagenet_default_mean_and_std": "the model's mean and standard deviation are used",
    **dict.fromkeys(("--world_size", "--local_rank", "--dist_url", "--dist_on_itp"), _TORCHRUN),
    "--color_jitter": _NO_EFFECT,
}
FINETUNE_RETIRED = _COMMON_RETIRED | {
    "--nb_classes": "the task has two classes, safe and anomalous",
    "--enable_deepspeed": "DistributedDataParallel with bf16 is the one path",
    "--dist_eval": "evaluation always runs on every process",
    "--short_side_size": "use --short_side",
    "--num_segments": "a window is one segment",
    "--test_num_segment": "evaluation scores every window once",
    "--test_num_crop": "evaluation uses the whole frame",
    "--eval_data_path": "use --data_path with --eval_split",
    **dict.fromkeys(("--crop_pct", "--resplit", "--eval_option", "--smoothing"), _NO_EFFECT),
    **dict.fromkeys(("--mixup", "--cutmix", "--cutmix_minmax", "--mixup_prob", "--mixup_switch_prob"), _NO_EFFECT),
    "--mixup_mode": _NO_EFFECT,
}

DAPT_RETIRED = _COMMON_RETIRED | {
    "--mask_type": "tube masking is the one kind",
    "--normlize_target": "it is the default; --no_normalize_target turns it off",
    "--train_interpolation": _NO_EFFECT,
    **{f"--{n}{k}": f"--{n} takes a list" for n in _LISTS for k in (1, 2, 3)},
}


def positive(text: str) -> int:
    """A whole number above 0. Raises argparse's error for others."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A whole number, 0 or above. Raises argparse's error for others."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or above")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0. Raises argparse's error for others."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


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
    parser = Parser(description, FINETUNE_RETIRED)
    _finetune_data_flags(parser)
    _finetune_model_flags(parser)
    add = _epoch_flags(parser, epochs=50, nb_samples=50000, clips="windows")
    add("--stop_epoch", None, "stop after this many epochs of the schedule (default: --epochs)", type=positive)
    add("--total_batch_size", None, f"windows per step {_ALL} (default: 56 or by --batch_size)", type=positive)
    add("--batch_size", None, "windows per process and forward pass (default: by --total_batch_size)", type=positive)
    add("--num_sample", 1, "augmented views of each window; the learning rate does not count them", type=positive)
    add = _optimizer_flags(parser, min_lr=1e-6, warmup_epochs=5, betas=[0.9, 0.999])
    lr_help = "base learning rate, x total batch / 256 (default: 1e-3 for small models, else 5e-4)"
    add("--lr", None, lr_help, type=positive_float)
    add("--layer_decay", 0.6, "learning-rate factor per layer from the head down; 1: the same rate for all")
    add("--loss", "crossentropy", "training loss", choices=LOSS_NAMES)
    _average_flags(parser)
    _finetune_augmentation_flags(parser)
    _output_flags(parser, save_ckpt_freq=0)
    _evaluation_flags(parser)
    _runtime_flags(parser, seed=42)
    return parser


def dapt_parser(description: str) -> Parser:
    """The command line of run_dapt.py."""
    parser = Parser(description, DAPT_RETIRED)
    _dapt_data_flags(parser)
    _dapt_model_flags(parser)
    add = _epoch_flags(parser, epochs=20, nb_samples=1_000_000, clips="clips of all sets together")
    add("--stop_epoch", None, "stop after this many epochs (default: 12 as published, or --epochs)", type=positive)
    add("--total_batch_size", None, f"clips per step {_ALL}, for each set (default: 800 for one)", **_list_of(positive))
    add("--batch_size", None, "clips per process and forward pass, for each set", **_list_of(positive))
    add = _optimizer_flags(parser, min_lr=3e-5, warmup_epochs=1, betas=[0.9, 0.95])
    add("--lr", 3e-4, "base learning rate, x total batch / 256", type=positive_float)
    _dapt_augmentation_flags(parser)
    _output_flags(parser, save_ckpt_freq=1)
    _runtime_flags(parser, seed=0)
    return parser


_ALL = "over all processes"


def _list_of(kind: Callable[[str], Any]) -> dict[str, Any]:
    """Options of a flag with one value for each data set."""
    return {"type": kind, "nargs": "+", "metavar": "N" if kind is positive else "X"}


# ----------------------------------------------------------------------------------------------------------------------
# Both


def _epoch_flags(parser: Parser, *, epochs: int, nb_samples: int, clips: str) -> Callable:
    add = partial(_flag, parser.add_argument_group("epochs and batches"))
    add("--epochs", epochs, "epochs the schedule is laid out for", type=positive)
    add(
        "--nb_samples_per_epoch",
        nb_samples,
        f"random {clips} per epoch; 0, or more than there are: all of them",
        type=natural,
    )
    add("--update_freq", 1, "forward passes per optimizer step", type=positive)
    return add


def _optimizer_flags(parser: Parser, *, min_lr: float, warmup_epochs: int, betas: list[float]) -> Callable:
    add = partial(_flag, parser.add_argument_group("optimization"))
    add("--min_lr", min_lr, "final base learning rate, scaled as --lr")
    add("--warmup_epochs", warmup_epochs, "epochs of linear warm-up from 0", type=natural)
    add("--warmup_steps", -1, "steps of warm-up instead of --warmup_epochs; -1: off")
    add("--opt", "adamw", "optimizer, by timm's name")
    add("--opt_eps", 1e-8, "epsilon of Adam")
    add("--opt_betas", betas, "betas of Adam", type=float, nargs=2)
    add("--weight_decay", 0.05, "weight decay")
    add("--weight_decay_end", None, "weight decay at the end of its cosine (default: constant)", type=float)
    add("--clip_grad", None, "largest gradient norm (default: no clipping)", type=positive_float, metavar="NORM")
    return add


def _output_flags(parser: Parser, *, save_ckpt_freq: int) -> None:
    group = parser.add_argument_group("output and resuming")
    add = partial(_flag, group)
    add("--output_dir", None, "folder for checkpoints, logs and results", required=True)
    add("--log_dir", None, "folder for TensorBoard events (default: --output_dir)")
    _switch(group, "auto_resume", "continue from --output_dir/checkpoint-last if there is one")
    add("--resume", None, "start from this checkpoint-last folder if --output_dir has none", metavar="DIR")
    add("--start_epoch", 0, "epoch of the schedule a fresh run starts at", type=natural)
    _switch(group, "save_ckpt", "write checkpoints")
    help = "keep checkpoint-<epoch>.pth every N epochs, and of the last; 0: of the last only"
    add("--save_ckpt_freq", save_ckpt_freq, help, type=natural, metavar="N")
    add("--save_every_minutes", None, "also save checkpoint-last when so many minutes have passed since it was saved",
        type=positive_float, metavar="M")  # fmt: skip
    add("--print_freq", 20, "optimizer steps between log lines", type=positive)


def _runtime_flags(parser: Parser, *, seed: int) -> None:
    group = parser.add_argument_group("runtime")
    add = partial(_flag, group)
    add("--device", None, "where to run (default: cuda if PyTorch finds it, else cpu)", choices=["cuda", "cpu"])
    add("--precision", None, "number format (default: bf16 on CUDA, fp32 on the CPU)", choices=["bf16", "fp16", "fp32"])
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument("--use_checkpoint", action="store_true", help="recompute activations: less memory, slower")
    group.add_argument("--no_flash_attn", action="store_true", help="plain attention, not PyTorch's fused kernels")
    add("--seed", seed, "seed of weights, data order and augmentation", type=natural)
    add("--num_workers", 8, "loading processes per training process", type=natural)
    _switch(group, "pin_mem", "pin host memory for faster copies to the GPU")
    add("--dist_timeout", 30.0, "minutes a process waits for the others before the run ends", type=positive_float)
    add(
        "--max_nonfinite", 5, "steps in a row with a loss or gradient not finite, at which the run stops", type=positive
    )
    help = "unreadable training samples a process may skip in an epoch before the run stops"
    add("--max_bad_samples", 100, help, type=natural)


def _file_flags(add: Callable) -> None:
    add("--model_key", "model|module|state_dict|model_state", "where the weights are in the file: the first of these")
    add("--model_prefix", None, "read only the keys under this prefix, e.g. student. (default: all keys)")


def _encoder_flags(add: Callable) -> None:
    help = (
        "position table: trained, from the weights' own or else the model's (learned), or the model's fixed one "
        "(default: learned if the weights come with one)"
    )
    add("--pos_embed", None, help, choices=["learned", "sincos"])
    help = "GELU of the encoder, exact or approximated (default: tanh for InternVideo2, else erf)"
    add("--gelu", None, help, choices=["erf", "tanh"])


def _clip_flags(add: Callable) -> None:
    help = "lists of clips to leave out, as python -m datasets.tools.check writes; a name per line, for every data set"
    add("--bad_clips", None, help, type=str, nargs="+", metavar="FILE")
    add("--assume_fps", None, ASSUME_FPS, type=positive_float)
    add("--scan_cache", None, "file that keeps the frame counts of videos (default: videos.json in --output_dir)")
    add("--num_frames", None, "frames of a window (default: the model's)", type=positive)
    add("--view_fps", None, "frames per second of a window (default: the model's)", type=positive_float)
    add("--input_size", None, "height and width in pixels (default: the model's)", type=positive)
    add("--tubelet_size", None, "frames per token (default: the model's)", type=positive)


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def _finetune_data_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("data"))
    add("--data_set", "DoTA", "data set: DoTA(_half), DADA2K(_half), CAP-DATA, or csv: your own")
    add(
        "--data_path",
        None,
        "root folder of the data set, or of a pack of it; of csv the folder of train.csv and val.csv",
        required=True,
    )
    add("--sampling_rate", 1, "step between training windows, in frames of the source", type=positive)
    _clip_flags(add)


def _finetune_model_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("model"))
    add(
        "--model",
        "vit_base_patch16_224",
        "[mvd_|umt_]vit_{small,base,large}_patch16_224, vit_huge_patch16_224, "
        "internvideo2_{small,base,large}_patch14_224; vit_tiny_patch16_64 for trials",
    )
    add("--finetune", None, "weights to start from or, with --eval, to evaluate: path or URL (default: random weights)")
    _file_flags(add)
    _encoder_flags(add)
    add("--final_reduction", None, "pool by the mean of the tokens or take the first (default: the mean; InternVideo2 "
        "pools by attention alone)", choices=["fc_norm", "cls"])  # fmt: skip
    add("--init_scale", 0.001, "factor on the head's initial weights")
    add("--drop_path", 0.2, "stochastic depth: probability of the last block, growing linearly from 0 at the first")
    add("--drop", 0.0, "dropout after projections")
    add("--attn_drop_rate", 0.0, "dropout of attention weights")
    add("--fc_drop_rate", 0.0, "dropout before the head")
    add("--freeze_layers", None, "freeze the embedding and the first N blocks, norms excepted", type=int, metavar="N")


def _average_flags(parser: Parser) -> None:
    group = parser.add_argument_group("average of the weights")
    group.add_argument("--model_ema", action="store_true", help="average the weights; evaluate and keep the average")
    _flag(group, "--model_ema_decay", 0.9999, "decay of the average")
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the average on the CPU")


def _finetune_augmentation_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("augmentation"))
    add("--aa", "rand-m6-n3-mstd0.5-inc1", "RandAugment policy over the driving operations, or none")
    add("--train_interpolation", "bicubic", "of RandAugment's rotations and shears", choices=["bilinear", "bicubic"])
    help = "resize training frames to this short side before padding, in pixels; 0: full size"
    add("--short_side", 0, help, type=natural)
    add("--reprob", 0.25, "probability that a clip is partly erased (random erasing)")
    add("--remode", "pixel", "fill of erased boxes: noise, one colour, zeros", choices=["pixel", "rand", "const"])
    add("--recount", 1, "largest number of boxes erased from a clip", type=positive)
    add("--erase_max_area", 0.1, "largest erased share of the frame, 0 to 1")


def _evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    add = partial(_flag, group)
    group.add_argument("--eval", action="store_true", help="evaluate only: predictions.csv, metrics.json, plots/")
    add("--eval_split", "val", "split to evaluate, during training too: val, train or all")
    step = "step between evaluated windows, in frames of the source (default: 1; during training 3 for DADA2K)"
    add("--sampling_rate_val", None, step, type=positive)
    add("--eval_batch_size", 64, "windows per process and forward pass", type=positive)
    help = "score the clips that can be read and say how many they are, instead of refusing"
    group.add_argument("--allow_missing", action="store_true", help=help)
    group.add_argument("--disable_eval_during_finetuning", action="store_true", help="train without evaluating")


# ----------------------------------------------------------------------------------------------------------------------
# DAPT


def _dapt_data_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("data, a value for each data set of the mix"))
    sets = "BDD100K, CAP-DATA, Kinetics, DoTA(_half), DADA2K(_half), csv, or videos: any folder of them"
    add("--data_set", ["BDD100K"], f"data sets to mix: {sets}", type=str, nargs="+", metavar="NAME")
    help = "root folder, list file or pack of each data set"
    add("--data_path", None, help, nargs="+", required=True, metavar="PATH")
    help = (
        "step between windows, in frames of the source; for Kinetics between frames of a clip (default: as published)"
    )
    add("--sampling_rate", None, help, **_list_of(positive))
    add(
        "--data_split",
        None,
        "split of each data set (default: all of BDD100K and videos, else train)",
        nargs="+",
        metavar="SPLIT",
    )
    _clip_flags(add)


def _dapt_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add = partial(_flag, group)
    names = (
        "pretrain_{videomae,mvd_vit,umt_vit}_{small,base,large}_patch16_224, pretrain_videomae_huge_patch16_224, "
        "pretrain_internvideo2_{small,base,large}_patch14_224; pretrain_videomae_tiny_patch16_64 for trials"
    )
    add("--model", "pretrain_videomae_base_patch16_224", names)
    add("--from_ckpt", None, "weights to start from: path or URL (default: random weights)")
    _file_flags(add)
    _encoder_flags(add)
    add("--decoder_depth", None, "blocks of the decoder (default: the model's, 4 for small and base)", type=positive)
    add("--mask_ratio", 0.75, "masked share of each frame, 0 to 1")
    add("--drop_path", 0.0, "stochastic depth: probability of the last block, growing linearly from 0 at the first")
    _switch(group, "normalize_target", "predict pixels less their cube's mean, over its standard deviation")


def _dapt_augmentation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation")
    add = partial(_flag, group)
    help = "pad or squash, RandAugment and crop as fine-tuning sees clips (default, but for Kinetics)"
    group.add_argument("--transforms_finetune_align", action="store_true", default=None, help=help)
    help = "VideoMAE's multi-scale crop of the wide frame alone"
    group.add_argument(
        "--no_transforms_finetune_align", dest="transforms_finetune_align", action="store_false", help=help
    )
    add("--aa", "rand-m3-n3-mstd0.5-inc1", "RandAugment policy of aligned clips, or none")
    add("--short_side", None, "short side of frames before the crop, in pixels (default: 320 at --input_size 224)",
        type=positive)  # fmt: skip
