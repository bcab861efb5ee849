"""The command line: flags in groups, published defaults, refusals that help, and the record of what a run used."""

import argparse
import difflib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

# Flags of simple-tad's commands that have no counterpart, and why.
RETIRED = {
    "--nb_classes": "the task has two classes: safe and anomalous",
    "--enable_deepspeed": "DistributedDataParallel with bf16 is the one path",
    "--dist_eval": "evaluation always runs on every process",
    "--world_size": "torchrun sets it",
    "--local_rank": "torchrun sets it",
    "--dist_url": "torchrun sets it",
    "--dist_on_itp": "torchrun sets it",
    "--short_side_size": "use --train_short_side",
    "--warmup_lr": "the warm-up starts at 0, as it always did",
    "--num_segments": "a window is one segment",
    "--test_num_segment": "evaluation scores every window once",
    "--test_num_crop": "evaluation uses the whole frame",
}

LOSS_NAMES = ["crossentropy", "focal", "focal6x100", "focal2_6", "focal2_2", "smoothap", "exponential1", "2bce"]

# Arguments that may differ when a run is resumed: they change where or how fast it runs, not what it computes.
FREE_ON_RESUME = frozenset(
    {  # fmt: skip
        "auto_resume",
        "resume",
        "start_epoch",
        "stop_epoch",
        "output_dir",
        "log_dir",
        "print_freq",
        "save_ckpt",
        "save_ckpt_freq",
        "data_path",
        "finetune",
        "model_key",
        "model_prefix",
        "device",
        "num_workers",
        "pin_mem",
        "compile",
        "no_flash_attn",
        "use_checkpoint",
        "batch_size",
        "update_freq",
        "eval",
        "eval_batch_size",
        "disable_eval_during_finetuning",
    }
)


class ConfigError(ValueError):
    """Arguments that do not go together; the message names them and the way out."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; a misspelt flag is answered with the right one."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else args
        flags = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
        if unknown := [flag for flag in flags if flag not in self._option_string_actions]:
            self.error("; ".join(map(self._explain, unknown)))
        return super().parse_args(args, namespace)

    def _explain(self, flag: str) -> str:
        if flag in RETIRED:
            return f"{flag} is gone: {RETIRED[flag]}"
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"unknown flag {flag}" + (f", did you mean {close[0]}?" if close else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists every flag)\n")


def _flag(group: argparse._ArgumentGroup, name: str, default: Any, help: str, **kwargs: Any) -> None:
    """A flag whose type is its default's and whose help names the default, unless it is None or empty."""
    if default is not None:
        kwargs.setdefault("type", type(default))
    if default not in (None, ""):
        help += f" (default: {default})"
    group.add_argument(name, default=default, help=help, **kwargs)


def _switch(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    """--name, on by default, and --no_name."""
    group.add_argument(f"--{name}", action="store_true", default=True, help=f"{help} (default)")
    group.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"turn --{name} off")


def finetune_parser(description: str) -> Parser:
    """The flags of run_finetune.py. Defaults are the published recipe; None means "the model's own"."""
    parser = Parser(description)
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
    add("--num_frames", None, "frames of a window (default: the model's)", type=int)
    add("--view_fps", None, "frames per second of a window (default: the model's)", type=float)
    add("--sampling_rate", 1, "step between training windows, in frames of the source")
    add("--nb_samples_per_epoch", 50000, "random windows per epoch; 0, or more than there are: all")


def _model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add = partial(_flag, group)
    add("--model", "vit_base_patch16_224", "model name")
    add("--finetune", "", "weights to start from or, with --eval, to evaluate: path or URL (default: random weights)")
    add("--model_key", "model|module|state_dict|model_state", "where the weights are in the file, first of these")
    add("--model_prefix", "", "read only the keys under this prefix, e.g. student. (default: all)")
    add("--input_size", None, "height and width in pixels (default: the model's)", type=int)
    add("--tubelet_size", None, "frames per token (default: the model's)", type=int)
    add("--final_reduction", "fc_norm", "pool by the mean of the tokens or take the first", choices=["fc_norm", "cls"])
    add("--init_scale", 0.001, "factor on the head's initial weights")
    add("--drop_path", 0.2, "stochastic depth of the last block")
    add("--drop", 0.0, "dropout after projections")
    add("--attn_drop_rate", 0.0, "dropout of attention weights")
    add("--fc_drop_rate", 0.0, "dropout before the head")
    add("--freeze_layers", None, "freeze the embedding and the first N blocks, norms excepted", type=int, metavar="N")
    group.add_argument("--use_checkpoint", action="store_true", help="recompute activations: less memory, slower")
    group.add_argument("--no_flash_attn", action="store_true", help="plain attention, not PyTorch's fused kernels")


def _batch_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("epochs and batches"))
    add("--epochs", 50, "epochs the schedule is laid out for")
    add("--stop_epoch", None, "stop after this many epochs of the schedule (default: --epochs)", type=int)
    add("--total_batch_size", None, "windows per step over all processes (default: 56 or by --batch_size)", type=int)
    add("--batch_size", None, "windows per process and forward pass (default: by --total_batch_size)", type=int)
    add("--update_freq", 1, "forward passes per optimizer step")
    add("--num_sample", 1, "augmented views of each window; the batch grows, the learning rate does not")


def _optimizer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("optimization")
    add = partial(_flag, group)
    add("--lr", None, "base learning rate, x total batch / 256 (default: 1e-3 for small models, else 5e-4)", type=float)
    add("--min_lr", 1e-6, "final base learning rate, scaled likewise")
    add("--warmup_epochs", 5, "epochs of linear warm-up from 0")
    add("--warmup_steps", -1, "the same in steps; above 0 it wins")
    add("--layer_decay", 0.6, "learning-rate factor per layer from the head down; 1 is none")
    add("--loss", "crossentropy", "training loss", choices=LOSS_NAMES)
    add("--opt", "adamw", "optimizer, by timm's name")
    add("--opt_eps", 1e-8, "epsilon of Adam")
    add("--opt_betas", [0.9, 0.999], "betas of Adam", type=float, nargs=2)
    add("--weight_decay", 0.05, "weight decay")
    add("--weight_decay_end", None, "its final value, by a cosine (default: constant)", type=float)
    add("--clip_grad", None, "largest gradient norm (default: no clipping)", type=float, metavar="NORM")
    group.add_argument("--model_ema", action="store_true", help="average the weights; evaluate and keep the average")
    add("--model_ema_decay", 0.9999, "decay of the average")
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the average on the CPU")


def _augmentation_flags(parser: Parser) -> None:
    add = partial(_flag, parser.add_argument_group("augmentation"))
    add("--aa", "rand-m6-n3-mstd0.5-inc1", "RandAugment policy over the driving operations, or none")
    add("--train_interpolation", "bicubic", "of its rotations and shears", choices=["bilinear", "bicubic"])
    add("--train_short_side", 0, "resize training frames to this short side before padding; 0: full size")
    add("--reprob", 0.25, "probability of random erasing")
    add("--remode", "pixel", "fill of erased boxes: noise, one colour, zeros", choices=["pixel", "rand", "const"])
    add("--recount", 1, "most boxes erased")
    add("--erase_max_area", 0.1, "largest share of the frame erased")


def _output_flags(parser: Parser) -> None:
    group = parser.add_argument_group("output and resuming")
    add = partial(_flag, group)
    add("--output_dir", None, "folder for checkpoints, logs and results", required=True)
    add("--log_dir", None, "folder for TensorBoard events (default: --output_dir)")
    _switch(group, "auto_resume", "continue from --output_dir/checkpoint-last if there is one")
    add("--resume", "", "start from this checkpoint-last folder if --output_dir has none", metavar="DIR")
    add("--start_epoch", 0, "epoch a fresh run starts at")
    _switch(group, "save_ckpt", "write checkpoints")
    add("--save_ckpt_freq", 0, "keep checkpoint-<epoch>.pth every N epochs; 0: of the last only", metavar="N")
    add("--print_freq", 20, "steps between log lines")


def _evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    add = partial(_flag, group)
    group.add_argument("--eval", action="store_true", help="evaluate only: predictions.csv, metrics.json, plots/")
    add("--eval_split", "val", "split to evaluate, during training too: val, train or all")
    add("--sampling_rate_val", 1, "step between evaluated windows, in frames of the source; 1 scores every frame")
    add("--eval_batch_size", None, "windows per process and forward pass (default: twice --batch_size)", type=int)
    group.add_argument("--disable_eval_during_finetuning", action="store_true", help="train without evaluating")


def _runtime_flags(parser: Parser) -> None:
    group = parser.add_argument_group("runtime")
    add = partial(_flag, group)
    add("--device", None, "default: cuda where PyTorch finds it, else cpu", choices=["cuda", "cpu"])
    add("--precision", None, "of autocast (default: bf16 on CUDA, fp32 on the CPU)", choices=["bf16", "fp16", "fp32"])
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    add("--seed", 42, "seed of weights, data order and augmentation")
    add("--num_workers", 8, "loading processes per training process")
    _switch(group, "pin_mem", "pin host memory for faster copies to the GPU")


# ----------------------------------------------------------------------------------------------------------------------
# Resolving


def split_batch(total: int | None, per_process: int | None, *, world_size: int, update_freq: int) -> tuple[int, int]:
    """(windows per process and forward pass, windows per step) from whichever is given; 56 in all by default.

    Raises ConfigError where both are given or the total does not divide, naming the nearest totals that do.
    """
    parts = world_size * update_freq
    if total and per_process:
        raise ConfigError("give --batch_size (per process) or --total_batch_size, not both")
    if per_process:
        return per_process, per_process * parts
    total = total or 56
    if total % parts:
        below, above = total // parts * parts, -(-total // parts) * parts
        raise ConfigError(
            f"a total batch of {total} does not divide over {world_size} processes x {update_freq} passes: "
            f"use --total_batch_size {' or '.join(str(n) for n in (below, above) if n)}"
        )
    return total // parts, total


def differing(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The arguments both know, that matter to the result and differ: ["name: saved -> current", ...]."""
    keys = sorted((saved.keys() & current.keys()) - FREE_ON_RESUME)
    return [f"{k}: {saved[k]} -> {current[k]}" for k in keys if saved[k] != current[k]]


def write_run_record(path: Path, args: Mapping[str, Any], world_size: int) -> None:
    """args.json: resolved arguments, command line, git revision, versions."""
    record = {
        "args": dict(args),
        "command": " ".join(sys.argv),
        "world_size": world_size,
        "git": _git_revision(),
        "versions": {"python": sys.version.split()[0]} | {p: _version(p) for p in ("torch", "torchvision", "timm")},
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _git_revision() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
