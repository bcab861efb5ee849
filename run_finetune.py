"""Fine-tune and evaluate a Video ViT as a per-frame risk scorer of driving video.

One GPU, or the CPU where there is none (defaults are the published recipe for the model):
    python run_finetune.py --model vit_small_patch16_224 --finetune videomae_vit_s_k400_1600e_pretrain.pth \\
        --data_set DoTA --data_path /data/DoTA --output_dir runs/videomae_s_dota

One machine, N GPUs (the total batch stays 56, so N must divide it; Slurm: see jobs/finetune/):
    torchrun --standalone --nproc_per_node=N run_finetune.py ...the same flags...

Several machines, on each of them:
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 run_finetune.py ...

Evaluate a checkpoint: the same flags with --eval, on any number of processes:
    python run_finetune.py --eval --model vit_small_patch16_224 --data_set DoTA --data_path /data/DoTA \\
        --finetune runs/videomae_s_dota/checkpoint-best_auroc.pth --output_dir runs/videomae_s_dota/eval

The same command again continues an interrupted run from OUTPUT_DIR/checkpoint-last.
"""

import sys

from utils.cli import ConfigError, config_errors, split_batch
from utils.flags import finetune_parser
from utils.record import write_run_record
from utils.resolve import (
    FREE_ON_RESUME,
    OPTIMIZER,
    SCHEDULE,
    SESSION,
    fill,
    given,
    keep_origin,
    picked,
    resolve_runtime,
    resolve_schedule,
)
from utils.signals import Preemption, catch_signals, remove_marker

if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = finetune_parser(__doc__).parse_args()
    if not ARGS.eval:
        catch_signals()

import copy
import logging
import math
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.utils.data import DataLoader

from datasets import ClipTable, DataError, VideoScan, build_clips, find_data_sets
from datasets.augment.device import ToModelInput
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.faults import SkipBad, read_bad_clips, warn_unmatched
from datasets.loader import EpochSampler, Source, WindowDataset, train_loader
from datasets.stream import SplitWindows
from datasets.windows import index_clips
from engine.checkpoint import CheckpointWriteError, find_resume, keep_epoch, save_weights
from engine.evaluate import (
    EvaluationError,
    Predictions,
    coverage,
    gather_predictions,
    score_windows,
    summary,
    within,
    write_metrics,
    write_predictions,
)
from engine.finetune import FinetuneObjective
from engine.guard import Progress, TrainingError
from engine.loop import Reporting, train_epochs
from engine.losses import LOSSES
from engine.optim import DTYPES, Optimization, Schedule, build_optimization
from engine.plots import evaluation_figures, save_figures
from engine.session import Session, start
from models import create_model, model_defaults
from models.weights import CheckpointError, fetch, load_pretrained
from utils.distributed import (
    Process,
    broadcast,
    data_parallel,
    from_main,
    local_main_first,
    process_group,
    seed_everything,
)
from utils.logging import setup_logging

ERRORS = (CheckpointError, CheckpointWriteError, ConfigError, DataError, EvaluationError, TrainingError)
BEST = ("auroc", "auc_mcc")  # the metrics whose best weights are kept
logger = logging.getLogger("tad")


def main(args: Namespace) -> None:
    """Train, or evaluate with --eval."""
    resolve_runtime(args, cuda=torch.cuda.is_available())
    with process_group(args.device, timeout=timedelta(minutes=args.dist_timeout), expected=ERRORS) as process:
        setup_logging(process.rank)
        resolve(args, process.world_size)
        seed_everything(args.seed)
        set_fused_attn(not args.no_flash_attn)
        if args.eval:
            evaluate_checkpoint(args, process)
        else:
            train(args, process)


def resolve(args: Namespace, world_size: int) -> None:
    """Replace what was left open by the value it stands for, so that args.json holds what was used."""
    with config_errors():
        defaults = model_defaults(args.model)
    if args.model.startswith("pretrain_"):
        raise ConfigError(f"--model {args.model} is for run_dapt.py; fine-tuning takes a classifier, see --help")
    fill(args, defaults, ("num_frames", "view_fps", "input_size", "tubelet_size"))
    (data_set,) = find_data_sets([args.data_set], args.assume_fps)
    if not data_set.labelled:
        raise ConfigError(f"{args.data_set} has no labels to fine-tune on; it is for run_dapt.py")
    args.scan_cache = args.scan_cache or str(Path(args.output_dir, "videos.json"))
    args.sampling_rate_val = args.sampling_rate_val or (1 if args.eval else data_set.val_stride)
    if args.eval:
        return
    args.lr = defaults.finetune_lr if args.lr is None else args.lr
    resolve_schedule(args)
    args.batch_size, args.total_batch_size = split_batch(
        args.total_batch_size, args.batch_size, default=56, world_size=world_size, update_freq=args.update_freq
    )


def train(args: Namespace, process: Process) -> None:
    """The fine-tuning recipe, top to bottom."""
    output_dir = Path(args.output_dir)
    remove_marker(output_dir)
    resumed = find_resume(
        output_dir, auto_resume=args.auto_resume, resume=args.resume, record=vars(args), free=FREE_ON_RESUME
    )
    keep_origin(args, resumed)
    loader, sampler = training_data(args, process)
    batches = SkipBad(loader, limit=args.max_bad_samples)
    validation = None if args.disable_eval_during_finetuning else Validation(args, process)
    warn_unmatched(read_bad_clips(args.bad_clips or ()), [p.clips for p in (*loader.dataset.sources, validation) if p])
    model = build_model(args, process, resumed=resumed)
    seed_everything(args.seed + process.rank)  # ranks share their weights, not their dropout
    if args.freeze_layers is not None:
        with config_errors():
            model.freeze_blocks(args.freeze_layers)
    ddp_model = data_parallel(model, process)
    defaults = model_defaults(args.model)
    to_input = ToModelInput(defaults.mean, defaults.std, args.remode)

    optimization = run_optimization(args, model, sampler.steps_per_epoch)
    progress = Progress(
        epoch=args.start_epoch,
        best=dict.fromkeys(BEST, -math.inf),
        num_windows=sampler.num_windows,
        steps_per_epoch=sampler.steps_per_epoch,
    )
    session = start(
        output_dir, process, model, optimization, progress, batches,
        resumed=resumed, record=vars(args), **picked(args, SESSION),
    )  # fmt: skip
    del resumed  # three times the weights
    eval_model = optimization.ema.module if optimization.ema else model

    def after_epoch() -> dict[str, float]:
        metrics = {}
        if validation:
            metrics = validation.evaluate(eval_model, session)
            save_best(args, process, eval_model, metrics, progress)
        if args.save_ckpt and process.is_main:
            keep_epoch(output_dir, eval_model, progress.epoch, stop_epoch=args.stop_epoch, every=args.save_ckpt_freq)
        return batches.end_epoch() | {f"val_{k}": v for k, v in metrics.items()}

    train_epochs(
        ddp_model,
        batches,
        sampler.set_epoch,
        FinetuneObjective(LOSSES[args.loss], to_input, process.device),
        optimization,
        session,
        Reporting(args.total_batch_size * args.num_sample, args.print_freq, process.is_main),
        stop_epoch=args.stop_epoch,
        device=process.device,
        after_epoch=after_epoch,
    )
    session.tensorboard.close()
    batches.log_summary()
    best = ", ".join(f"{name} {100 * value:.2f}" for name, value in progress.best.items() if value > -math.inf)
    logger.info(f"{progress.epoch} of {args.epochs} epochs done{f'; best {best}' * bool(best)}; see {output_dir}")


def evaluate_checkpoint(args: Namespace, process: Process) -> None:
    """--eval: score --finetune on the evaluation split and write everything about it."""
    output_dir = Path(args.output_dir)
    if (output_dir / "predictions.csv").exists():
        raise ConfigError(f"{output_dir}/predictions.csv exists: choose another --output_dir or remove it")
    if process.is_main:
        write_run_record(output_dir / "eval_args.json", vars(args), process.world_size)
    validation = Validation(args, process)
    warn_unmatched(read_bad_clips(args.bad_clips or ()), [validation.clips])
    predictions = validation.predict(build_model(args, process, trained_head=True))
    if predictions is None:
        return
    metrics = predictions.metrics()
    about = {"checkpoint": args.finetune, "data_set": args.data_set, "split": args.eval_split}
    about |= coverage(predictions, validation.clips, validation.windows.faults)
    write_predictions(output_dir / "predictions.csv", predictions, validation.clips)
    write_metrics(output_dir / "metrics.json", about | metrics)
    save_figures(output_dir / "plots", evaluation_figures(predictions.score, predictions.label, metrics))
    logger.info(f"{summary(metrics)}  {about['coverage']}")
    logger.info(f"predictions.csv, metrics.json and plots/ are in {output_dir}")


def build_split(args: Namespace, split: str) -> ClipTable:
    """The clips of a split, read once for all ranks."""
    scan, bad = VideoScan(args.scan_cache, workers=args.num_workers), read_bad_clips(args.bad_clips or ())
    options = (args.data_set, args.data_path, split, scan, args.assume_fps)
    clips = from_main(lambda: build_clips(*options, leave_out=bad))
    clips.require_labels()
    return clips


def training_data(args: Namespace, process: Process) -> tuple[DataLoader, EpochSampler]:
    """Batches of augmented windows of the train split, and the sampler that orders them."""
    clips = build_split(args, "train")
    with config_errors():
        index = index_clips(clips, num_frames=args.num_frames, view_fps=args.view_fps, stride=args.sampling_rate)
        transform = FinetuneTransform(
            args.input_size,
            views=args.num_sample,
            aa=args.aa,
            interpolation=args.train_interpolation,
            short_side=args.short_side,
            erase_prob=args.reprob,
            erase_count=args.recount,
            erase_max_area=args.erase_max_area,
        )
    sampler = EpochSampler(
        [len(index)],
        batch_sizes=[args.batch_size],
        accumulate=args.update_freq,
        rank=process.rank,
        world_size=process.world_size,
        samples_per_epoch=args.nb_samples_per_epoch,
        seed=args.seed,
    )
    dataset = WindowDataset([Source(clips, index, transform)], seed=args.seed, targets=True)
    return train_loader(dataset, sampler, num_workers=args.num_workers, pin_memory=args.pin_mem), sampler


class Validation:
    """The evaluation split, ready to score a model as often as asked."""

    def __init__(self, args: Namespace, process: Process):
        self.args, self.process = args, process
        self.clips = build_split(args, args.eval_split)
        with config_errors():
            self.index = index_clips(
                self.clips, num_frames=args.num_frames, view_fps=args.view_fps, stride=args.sampling_rate_val
            )
        defaults = model_defaults(args.model)
        self.to_input = ToModelInput(defaults.mean, defaults.std)
        self.windows = SplitWindows(
            self.clips,
            self.index,
            EvalTransform(args.input_size),
            batch_size=args.eval_batch_size,
            rank=process.rank,
            world_size=process.world_size,
            num_workers=args.num_workers,
            pin_memory=args.pin_mem,
            allow_missing=args.allow_missing,
        )

    def predict(self, model: nn.Module, preemption: Preemption | None = None) -> Predictions | None:
        """Scores of every window on rank 0, None on the others; preemption may end it."""
        device = self.process.device
        if next(model.parameters()).device != device:  # an average kept on the CPU
            model = copy.deepcopy(model).to(device)
        batches = self.windows.batches(device)
        if preemption:
            batches = preemption.until_asked(batches)
        local = score_windows(model, batches, self.to_input, dtype=DTYPES[self.args.precision])
        if preemption:
            preemption.stop_if_asked("in an evaluation, which will be repeated", saved=True)
        usable = self.windows.settle()
        local, expected = (within(windows, usable) for windows in (local, self.index.locations()))
        return gather_predictions(local, expected, lambda clip: self.clips[clip].labels)

    def evaluate(self, model: nn.Module, session: Session) -> dict[str, float]:
        """Metrics, on every rank; scalars and figures to TensorBoard."""
        predictions, metrics = self.predict(model, session.preemption), None
        tensorboard, step = session.tensorboard, session.progress.steps_done
        if predictions:
            metrics = predictions.metrics()
            logger.info(f"{summary(metrics)}  {coverage(predictions, self.clips, self.windows.faults)['coverage']}")
            tensorboard.scalars("val", metrics, step)
            tensorboard.figures("val", evaluation_figures(predictions.score, predictions.label, metrics), step)
        return broadcast(metrics)


def build_model(
    args: Namespace, process: Process, *, resumed: dict | None = None, trained_head: bool = False
) -> nn.Module:
    """The model on its device, with --finetune loaded, head included if trained_head; ready for a resumed state."""
    with config_errors():
        model = create_model(
            args.model,
            num_frames=args.num_frames,
            input_size=args.input_size,
            tubelet_size=args.tubelet_size,
            init_scale=args.init_scale,
            drop_path_rate=args.drop_path,
            drop_rate=args.drop,
            attn_drop_rate=args.attn_drop_rate,
            fc_drop_rate=args.fc_drop_rate,
            **given(args, ("final_reduction", "gelu")),
        )
    if args.pos_embed == "sincos" and model.pos_embed_kind == "learned":
        raise ConfigError(f"--pos_embed sincos: {args.model} has a learned position table alone")
    if args.finetune and not resumed:
        with local_main_first(process):  # one download per node
            path = fetch(args.finetune)
        report = load_pretrained(
            model,
            path,
            model_key=args.model_key,
            model_prefix=args.model_prefix or "",
            stored_table=args.pos_embed != "sincos",
        )
        logger.info(report)
        if trained_head and report.missing:
            raise CheckpointError(f"{args.finetune}: no head trained on two classes; fine-tune it before --eval")
    elif not resumed:
        logger.info(f"no --finetune: {args.model} has random weights")
    if args.pos_embed == "learned" or (resumed and "pos_embed" in resumed["model"]):
        model.learn_pos_embed()
    model.set_grad_checkpointing(args.use_checkpoint)
    model.to(process.device)
    if args.compile:
        model.compile()
    return model


def run_optimization(args: Namespace, model: nn.Module, steps_per_epoch: int) -> Optimization:
    """The Optimization of the command line."""
    with config_errors():
        return build_optimization(
            model,
            Schedule(steps_per_epoch=steps_per_epoch, **picked(args, SCHEDULE)),
            clips_per_step=args.total_batch_size,
            layer_decay=args.layer_decay,
            accumulate=args.update_freq,
            dtype=DTYPES[args.precision],
            ema_decay=args.model_ema_decay if args.model_ema else None,
            ema_on_cpu=args.model_ema_force_cpu,
            **picked(args, OPTIMIZER),
        )


def save_best(args: Namespace, process: Process, model: nn.Module, metrics: dict, progress: Progress) -> None:
    """Write checkpoint-best_<metric>.pth for each metric that improved."""
    for name in BEST:
        if metrics[name] > progress.best[name]:
            progress.best[name] = metrics[name]
            if args.save_ckpt and process.is_main:
                save_weights(Path(args.output_dir, f"checkpoint-best_{name}.pth"), model)


if __name__ == "__main__":
    try:
        main(ARGS)
    except ERRORS as e:
        sys.exit(f"error: {e}")
