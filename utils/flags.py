"""The flags of run_finetune.py and run_dapt.py, in groups. Defaults are the published recipes; None means "off", or
that the script finds the value by the weights file, the model or the data set.

`FlagGroup.fixed` declares a flag that a resumed run must repeat, `FlagGroup.overridable` one that it must repeat unless
--override names it, `FlagGroup.free` one that may change whenever it resumes.
"""

from typing import Any

from utils import names, retired
from utils.cli import (
    Number,
    Parser,
    folder,
    frame_count,
    frame_rate,
    from_to,
    natural,
    pixels,
    pixels_or_0,
    positive,
    positive_float,
    positive_rate,
    rate,
    share,
    share_below_1,
    wait,
)
from utils.event_rule import seconds
from utils.head_flags import add_augment_flag, add_head_flags
from utils.probe_flags import add_probe_flags

ASSUME_FPS = "frame rate of clips whose annotations have none: DADA2K, CAP-DATA (default: 30), pictures of csv"


class FlagGroup:
    """A titled group of flags of a parser."""

    def __init__(self, parser: Parser, title: str):
        self._parser, self._group = parser, parser.add_argument_group(title)

    def fixed(self, name: str, default: Any, help: str, **options: Any) -> None:
        """Declare a flag that a run must be resumed with as it was started.

        Its help names the range of a number where that has an upper end, the default unless that is None, and whether
        it is required. A default of False makes a switch; of True, a switch and its opposite, --no_<name>.
        """
        if isinstance(default, bool):
            self._switch(name, default, help)
            return
        if isinstance(options.get("type"), Number) and options["type"].high is not None:
            help += f"; {options['type']}"
        if options.get("required"):
            help += " (required)"
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            help += f" (default: {shown})"
        self._group.add_argument(f"--{name}", default=default, help=help, **options)

    def overridable(self, name: str, default: Any, help: str, *, reorders: bool = False, **options: Any) -> None:
        """Declare a flag as `fixed` does, but one that --override may change.

        reorders: whether that changes which windows an epoch has, or their order, so that it has to wait for its start.
        """
        self.fixed(name, default, help, **options)
        self._parser.overridable[options.get("dest", name)] = reorders

    def free(self, name: str, default: Any, help: str, **options: Any) -> None:
        """Declare a flag as `fixed` does, but one that may change when a run is resumed."""
        self.fixed(name, default, help, **options)
        self._parser.free_on_resume.add(name)

    def pair(self, name: str, help: str, opposite: str, *, overridable: bool = False) -> None:
        """Declare --<name> and --no_<name>, of which neither is the default, as `fixed` or `overridable` does."""
        declare = self.overridable if overridable else self.fixed
        declare(name, None, help, action="store_true")
        declare(f"no_{name}", None, opposite, dest=name, action="store_false")

    def _switch(self, name: str, default: bool, help: str) -> None:
        self._group.add_argument(
            f"--{name}", action="store_true", default=default, help=f"{help} (default)" if default else help
        )
        if default:
            self._group.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"turn --{name} off")


def finetune_parser(description: str) -> Parser:
    """Return the command line of run_finetune.py."""
    most = ("data_set", "data_path", "output_dir", "finetune", "eval", "batch_size", "num_workers", "model")
    parser = Parser(description, retired.FINETUNE, most)
    group = FlagGroup(parser, "data")
    group.overridable(
        "data_set",
        "DoTA",
        f"one of {', '.join(names.LABELLED_SETS)} (csv is for your own); docs/data.md: where to get each",
        reorders=True,
        metavar="NAME",
    )
    help = "labels of the frames: own, or BADAS' consensus (consensus_ego: accidents of the recording car)"
    group.overridable("labels", "own", help, choices=names.LABELS, reorders=True)
    help = "root folder of the data set, or of a pack of it; of csv the folder of train.csv and val.csv"
    group.free("data_path", None, help, required=True, metavar="PATH")
    group.overridable(
        "sampling_rate", 1, "step between training windows, in frames of the source", type=positive, reorders=True
    )
    _add_clip_flags(group)
    _add_finetune_model_flags(parser)
    group = _add_epoch_flags(parser, epochs=50, nb_samples=50000, clips="windows")
    group.free("stop_epoch", None, "stop after this many epochs of the schedule (default: --epochs)", type=positive)
    help = "windows per step over all processes (default: 56 or by --batch_size)"
    group.overridable("total_batch_size", None, help, type=positive, reorders=True)
    help = "windows per process and forward pass (default: by --total_batch_size)"
    group.free("batch_size", None, help, type=positive)
    help = "augmented views of each window; the learning rate does not count them"
    group.overridable("num_sample", 1, help, type=from_to(1, 100))
    group = _add_optimizer_flags(parser, min_lr=1e-6, warmup_epochs=5, betas=[0.9, 0.999])
    help = "base learning rate, x total batch / 256 (default: 1e-3 for small models, else 5e-4)"
    group.overridable("lr", None, help, type=positive_rate)
    group.overridable(
        "layer_decay",
        0.6,
        "learning-rate factor per layer from the head down; 1: the same rate for all",
        type=Number(0, 1, above=True),
    )
    group.overridable("loss", "crossentropy", "training loss", choices=names.LOSSES)
    group = FlagGroup(parser, "average of the weights")
    group.overridable("model_ema", False, "average the weights; evaluate and keep the average")
    group.overridable("model_ema_decay", 0.9999, "decay of the average", type=share_below_1)
    group.free("model_ema_force_cpu", False, "keep the average on the CPU")
    _add_finetune_augmentation_flags(parser)
    _add_output_flags(parser, save_ckpt_freq=0)
    _add_evaluation_flags(parser)
    _add_runtime_flags(parser, seed=42)
    return parser


def dapt_parser(description: str) -> Parser:
    """Return the command line of run_dapt.py."""
    most = ("data_set", "data_path", "output_dir", "from_ckpt", "batch_size", "update_freq", "num_workers", "model")
    parser = Parser(description, retired.DAPT, most)
    _add_dapt_data_flags(parser)
    _add_dapt_model_flags(parser)
    group = _add_epoch_flags(parser, epochs=20, nb_samples=1_000_000, clips="clips of all sets together")
    help = "stop after this many epochs (default: 12 as published, or --epochs)"
    group.free("stop_epoch", None, help, type=positive)
    help = "clips per step over all processes, for each set (default: 800 for one)"
    group.overridable("total_batch_size", None, help, **_ONE_FOR_EACH_SET, reorders=True)
    group.free("batch_size", None, "clips per process and forward pass, for each set", **_ONE_FOR_EACH_SET)
    group = _add_optimizer_flags(parser, min_lr=3e-5, warmup_epochs=1, betas=[0.9, 0.95])
    group.overridable("lr", 3e-4, "base learning rate, x total batch / 256", type=positive_rate)
    _add_dapt_augmentation_flags(parser)
    add_probe_flags(FlagGroup(parser, "linear probe between epochs"))
    _add_output_flags(parser, save_ckpt_freq=1)
    _add_runtime_flags(parser, seed=0)
    return parser


_ONE_FOR_EACH_SET = {"type": positive, "nargs": "+", "metavar": "N"}


# ----------------------------------------------------------------------------------------------------------------------
# Both scripts


def _add_clip_flags(group: FlagGroup) -> None:
    help = "lists of clips to leave out, as python -m datasets.tools.check writes; a name per line, for every data set"
    group.overridable("bad_clips", None, help, type=str, nargs="+", metavar="FILE", reorders=True)
    group.overridable("assume_fps", None, ASSUME_FPS, reorders=True, type=frame_rate)
    help = "file that keeps the frame counts of videos (default: videos.json in --output_dir)"
    group.free("scan_cache", None, help, metavar="FILE")
    by = "(default: the weights file's, else the model's)"
    group.fixed("num_frames", None, f"frames of a window {by}", type=frame_count)
    group.fixed("view_fps", None, f"frames per second of a window {by}", type=frame_rate)
    group.fixed("input_size", None, f"height and width in pixels {by}", type=pixels)
    group.fixed("tubelet_size", None, f"frames per token {by}", type=frame_count)


def _add_weights_flags(group: FlagGroup) -> None:
    help = "where the weights are in the file: the first of these"
    group.free("model_key", "model|module|state_dict|model_state", help, metavar="KEYS")
    group.free(
        "model_prefix", None, "read only the keys under this prefix, e.g. student. (default: all keys)", metavar="P"
    )
    help = (
        "slots x rows x columns of the tokens that the weights' position table is for, e.g. 8x14x14, where neither the "
        "file nor its config.json says it; a fixed table is resampled from there, too, and trained (default: as said)"
    )
    group.free("table_grid", None, help, metavar="TxHxW")
    help = "go on with flags that contradict what the weights file says of itself, instead of ending"
    group.free("override_spec", False, help)


def _add_encoder_flags(group: FlagGroup) -> None:
    help = (
        "position table: trained, from the weights' own or else the model's (learned), or the model's fixed one "
        "(default: learned if the weights come with one)"
    )
    group.fixed("pos_embed", None, help, choices=["learned", "sincos"])
    help = "GELU of the encoder (default: the weights file's, else tanh for InternVideo2, else erf)"
    group.fixed("gelu", None, help, choices=["erf", "tanh"])


def _add_epoch_flags(parser: Parser, *, epochs: int, nb_samples: int, clips: str) -> FlagGroup:
    group = FlagGroup(parser, "epochs and batches")
    group.overridable("epochs", epochs, "epochs the schedule is laid out for", type=positive)
    help = f"random {clips} per epoch; 0, or more than there are: all of them"
    group.overridable("nb_samples_per_epoch", nb_samples, help, type=natural, reorders=True)
    group.free("update_freq", 1, "forward passes per optimizer step", type=positive)
    return group


def _add_optimizer_flags(parser: Parser, *, min_lr: float, warmup_epochs: int, betas: list[float]) -> FlagGroup:
    group = FlagGroup(parser, "optimization")
    group.overridable("min_lr", min_lr, "final base learning rate, scaled as --lr", type=rate)
    group.overridable("warmup_epochs", warmup_epochs, "epochs of linear warm-up from 0", type=natural)
    group.overridable(
        "warmup_steps", -1, "steps of warm-up instead of --warmup_epochs; -1: off", type=Number(-1, whole=True)
    )
    help = "optimizer, by timm's name; adam, adamw, momentum and sgd are the fastest"
    group.fixed("opt", "adamw", help, metavar="NAME")
    group.overridable("opt_eps", 1e-8, "epsilon of Adam", type=share)
    group.overridable("opt_betas", betas, "betas of Adam", nargs=2, type=share_below_1)
    group.overridable("weight_decay", 0.05, "weight decay", type=rate)
    group.overridable("weight_decay_end", None, "weight decay at the end of its cosine (default: constant)", type=rate)
    help = "largest gradient norm (default: no clipping)"
    group.overridable("clip_grad", None, help, type=positive_float, metavar="NORM")
    return group


def _add_output_flags(parser: Parser, *, save_ckpt_freq: int) -> None:
    group = FlagGroup(parser, "output and resuming")
    help = "folder for checkpoints, logs and results"
    group.free("output_dir", None, help, required=True, type=folder, metavar="DIR")
    group.free("log_dir", None, "folder for TensorBoard events (default: --output_dir)", metavar="DIR")
    group.free("auto_resume", True, "continue from --output_dir/checkpoint-last if there is one")
    group.free("resume", None, "start from this checkpoint-last folder if --output_dir has none", metavar="DIR")
    help = "settings of that run to change, e.g. epochs lr, to what the command gives for them"
    group.free("override", None, help, nargs="+", metavar="NAME")
    group.free("start_epoch", 0, "epoch of the schedule a fresh run starts at", type=natural)
    group.free("save_ckpt", True, "write checkpoints")
    help = "keep checkpoint-<epoch>.pth every N epochs, and of the last; 0: of the last only"
    group.free("save_ckpt_freq", save_ckpt_freq, help, type=natural, metavar="N")
    help = "also save checkpoint-last when so many minutes have passed since it was saved"
    group.free("save_every_minutes", None, help, type=positive_float, metavar="M")
    group.free("print_freq", 20, "optimizer steps between log lines", type=positive)


def _add_runtime_flags(parser: Parser, *, seed: int) -> None:
    group = FlagGroup(parser, "runtime")
    help = "where to run (default: cuda if PyTorch finds it, else cpu)"
    group.free("device", None, help, choices=["cuda", "cpu"])
    help = "number format (default: bf16 on CUDA, fp32 on the CPU); CUDA multiplies fp32 matrices in TF32"
    group.overridable("precision", None, help, choices=["bf16", "fp16", "fp32"])
    group.free("compile", False, "compile the model with torch.compile")
    group.free("use_checkpoint", False, "recompute activations: less memory, slower")
    group.free("no_flash_attn", False, "plain attention, not PyTorch's fused kernels")
    group.overridable("seed", seed, "seed of weights, data order and augmentation", type=natural, reorders=True)
    group.free("num_workers", 8, "loading processes per training process", type=from_to(0, 1024))
    help = "seconds without a picture read after which a clip counts as unreadable; none with --num_workers 0"
    group.free("read_timeout", 60.0, help, type=wait)
    group.free("pin_mem", True, "pin host memory for faster copies to the GPU")
    help = "where RandAugment is done: on the device, which leaves workers free to decode, or in them (auto: on a GPU)"
    group.free("augment_on", "auto", help, choices=["auto", "device", "worker"])
    help = "how training JPEGs are decoded: at a half or less where that is enough, fast at full size, or exactly"
    group.overridable("decoding", "small", help, choices=names.DECODINGS)
    help = "minutes a process waits for the others before the run ends"
    group.free("dist_timeout", 30.0, help, type=wait)
    help = "steps in a row with a loss or gradient not finite, at which the run stops"
    group.free("max_nonfinite", 5, help, type=positive)
    help = "unreadable training samples a process may skip in an epoch before the run stops"
    group.free("max_bad_samples", 100, help, type=natural)


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def _add_finetune_model_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "model")
    help = f"{', '.join(names.CLASSIFIERS)}; the tiny ones are for trials (default: the weights file's, else ViT-B)"
    group.fixed("model", None, help, metavar="NAME")
    help = "weights to start from or, with --eval, to evaluate: path or URL (default: random weights)"
    group.free("finetune", None, help, metavar="FILE")
    _add_weights_flags(group)
    _add_encoder_flags(group)
    help = (
        "pool by the mean of the tokens or take the first (default: the weights file's, else the mean; InternVideo2 "
        "pools by attention alone)"
    )
    group.fixed("final_reduction", None, help, choices=["fc_norm", "cls"])
    add_head_flags(FlagGroup(parser, "head and frozen encoder"))
    group.fixed("init_scale", 0.001, "factor on the head's initial weights", type=rate)
    help = "stochastic depth: probability of the last block, growing linearly from 0 at the first"
    group.overridable("drop_path", 0.2, help, type=share_below_1)
    group.overridable("drop", 0.0, "dropout after projections", type=share_below_1)
    group.overridable("attn_drop_rate", 0.0, "dropout of attention weights", type=share_below_1)
    group.overridable("fc_drop_rate", 0.0, "dropout before the head", type=share_below_1)


def _add_finetune_augmentation_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "augmentation")
    add_augment_flag(group)
    group.overridable(
        "aa", "rand-m6-n3-mstd0.5-inc1", "RandAugment policy over the driving operations, or none", metavar="POLICY"
    )
    help = "of RandAugment's rotations and shears"
    group.overridable("train_interpolation", "bicubic", help, choices=["bilinear", "bicubic"])
    help = "resize training frames to this short side before padding, in pixels; 0: full size"
    group.overridable("short_side", 0, help, type=pixels_or_0)
    group.overridable("reprob", 0.25, "probability that a clip is partly erased (random erasing)", type=share)
    help = "fill of erased boxes: noise, one colour, zeros"
    group.overridable("remode", "pixel", help, choices=["pixel", "rand", "const"])
    group.overridable("recount", 1, "largest number of boxes erased from a clip", type=from_to(1, 100))
    group.overridable("erase_max_area", 0.1, "largest erased share of the frame", type=Number(0.02, 1))


def _add_evaluation_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "evaluation")
    group.free("eval", False, "evaluate only: predictions.csv, metrics.json, plots/, report.html")
    group.overridable("eval_split", "val", "split to evaluate, during training too: val, train or all", metavar="SPLIT")
    help = "share of the train split, in whole recordings, to choose the best checkpoint on instead of --eval_split"
    group.fixed("select_split", None, help, type=Number(0, 1, above=True, below=True), metavar="SHARE")
    help = "step between evaluated windows, in frames of the source (default: 1; during training 3 for DADA2K)"
    group.overridable("sampling_rate_val", None, help, type=positive)
    group.free("eval_batch_size", 64, "windows per process and forward pass", type=from_to(1, 65536))
    group.free(
        "allow_missing", False, "score the clips that can be read and say how many they are, instead of refusing"
    )
    group.free("disable_eval_during_finetuning", False, "train without evaluating")
    help = (
        "with --eval: how the threshold of alerts is found, which goes into metrics.json and the weights file, instead "
        "of one that it has (default: mcc, and the file keeps one that it has)"
    )
    group.free("operating_point", None, help, choices=["mcc", "f1", "false_alarms", "none"])
    help = "wanted of --operating_point false_alarms, in an hour of footage without anomaly (default: 1)"
    group.free("false_alarms_per_hour", None, help, type=Number(0, 10**6), metavar="N")
    group.free("alert_after", 0.0, "seconds every score must be risky before an event counts", type=seconds)
    group.free("event_gap", 0.5, "seconds scores may stay below the threshold within an event", type=seconds)
    group.free("event_min_duration", 0.0, "shortest event that counts, in seconds", type=seconds)


# ----------------------------------------------------------------------------------------------------------------------
# DAPT


def _add_dapt_data_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "data, a value for each data set of the mix")
    known = ", ".join((*names.UNLABELLED_SETS, *names.LABELLED_SETS))
    help = f"data sets to mix, of {known} (videos is any folder of them); docs/data.md: where to get each"
    group.overridable("data_set", ["BDD100K"], help, type=str, nargs="+", metavar="NAME", reorders=True)
    group.free("data_path", None, "root folder, list file or pack of each data set", nargs="+", required=True,
               metavar="PATH")  # fmt: skip
    help = "step between windows, in source frames; for Kinetics between frames of a clip (default: as published)"
    group.overridable("sampling_rate", None, help, **_ONE_FOR_EACH_SET, reorders=True)
    help = "split of each data set (default: all of BDD100K and videos, else train)"
    group.overridable("data_split", None, help, nargs="+", metavar="SPLIT", reorders=True)
    help = "windows read together, each half a window later: less decoding, but kin windows in a batch; not of Kinetics"
    group.overridable("windows_per_read", 1, help, reorders=True, type=from_to(1, 1024))
    _add_clip_flags(group)


def _add_dapt_model_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "model")
    help = (
        f"{', '.join(names.MASKED_AUTOENCODERS)} (default: the weights file's, else pretrain_videomae_base_patch16_224)"
    )
    group.fixed("model", None, help, metavar="NAME")
    group.free("from_ckpt", None, "weights to start from: path or URL (default: random weights)", metavar="FILE")
    _add_weights_flags(group)
    _add_encoder_flags(group)
    help = "blocks of the decoder (default: the weights file's, else the model's, 4 for small and base)"
    group.fixed("decoder_depth", None, help, type=from_to(1, 100))
    group.overridable("mask_ratio", 0.75, "masked share of each frame", type=Number(0, 1, above=True, below=True))
    help = "stochastic depth: probability of the last block, growing linearly from 0 at the first"
    group.overridable("drop_path", 0.0, help, type=share_below_1)
    help = "predict pixels less their cube's mean, over its standard deviation (default, or the weights file's)"
    group.pair("normalize_target", help, "predict the pixels themselves")


def _add_dapt_augmentation_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "augmentation")
    help = "pad or squash, RandAugment and crop as fine-tuning sees clips (default, but for Kinetics)"
    opposite = "VideoMAE's multi-scale crop of the wide frame alone"
    group.pair("transforms_finetune_align", help, opposite, overridable=True)
    group.overridable("aa", "rand-m3-n3-mstd0.5-inc1", "RandAugment policy of aligned clips, or none", metavar="POLICY")
    help = "short side of frames before the crop, in pixels (default: 320 at --input_size 224)"
    group.overridable("short_side", None, help, type=from_to(16, 4096))
