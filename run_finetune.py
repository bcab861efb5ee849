"""Fine-tune and evaluate a Video ViT as a per-frame risk scorer of driving video.

One GPU, or the CPU where there is none (defaults are the published recipe for the model):
    python run_finetune.py --model vit_small_patch16_224 --finetune videomae_s_k400.pth \\
        --data_set DoTA --data_path /data/DoTA --output_dir runs/videomae_s_dota

One machine, N GPUs (the total batch stays 56; --total_batch_size must divide by N):
    torchrun --standalone --nproc_per_node=N run_finetune.py ...the same flags...

Several machines, on each of them (Slurm: see jobs/finetune/):
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 run_finetune.py ...

Evaluate a checkpoint: the same flags with --eval, any number of processes:
    python run_finetune.py --eval --model vit_small_patch16_224 --data_set DoTA --data_path /data/DoTA \\
        --finetune runs/videomae_s_dota/checkpoint-best_auroc.pth --output_dir runs/videomae_s_dota/eval

The same command again continues an interrupted run from OUTPUT_DIR/checkpoint-last.
"""

import sys

from utils.config import ConfigError, differing, finetune_parser, split_batch, write_run_record

if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = finetune_parser(__doc__).parse_args()

import copy
import logging
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.layers import set_fused_attn
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from datasets import ClipTable, DataError, build_clips
from datasets.loader import ClipStream, EpochSampler, WindowDataset, checked, eval_loader, train_loader, window_batches
from datasets.transforms import EvalTransform, FinetuneTransform, ToModelInput
from datasets.windows import WindowIndex
from engine.checkpoint import find_last, load_last, restore, save_last, save_weights
from engine.evaluate import (
    EvaluationError,
    Predictions,
    gather_predictions,
    score_windows,
    write_metrics,
    write_predictions,
)
from engine.finetune import FinetuneStep
from engine.loop import Optimization, Progress, Reporting, TrainingError, train_one_epoch
from engine.losses import LOSSES
from engine.optim import build_optimizer, cosine, parameter_groups
from engine.plots import evaluation_figures, save_figures
from models import create_model, model_defaults
from models.weights import CheckpointError, fetch, load_pretrained
from utils.distributed import Process, broadcast, data_parallel, local_main_first, process_group, seed_everything
from utils.logging import TensorBoard, append_json_line, drop_epochs_from, progress_bar, setup_logging

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BEST = ("auroc", "auc_mcc")  # the metrics whose best weights are kept
logger = logging.getLogger("tad")


def main(args: Namespace) -> None:
    """Train, or evaluate with --eval."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with process_group(args.device) as process:
        setup_logging(process.rank)
        resolve(args, process.world_size)
        seed_everything(args.seed + process.rank)
        set_fused_attn(not args.no_flash_attn)
        if args.eval:
            evaluate_checkpoint(args, process)
        else:
            train(args, process)


def train(args: Namespace, process: Process) -> None:
    """The fine-tuning recipe, top to bottom."""
    output_dir = Path(args.output_dir)
    saved = find_resume(args)
    if process.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_run_record(output_dir / "args.json", vars(args), process.world_size)

    loader, sampler = training_data(args, process)
    validation = None if args.disable_eval_during_finetuning else Validation(args, process)

    model = build_model(args, process, pretrained=saved is None)
    if args.freeze_layers is not None:
        with config_errors():
            model.freeze_blocks(args.freeze_layers)
    if saved:
        model.load_state_dict(saved["model"])
    wrapped = data_parallel(model, process)
    steps_per_epoch = sampler.steps_per_epoch
    optimization = build_optimization(args, process, model, steps_per_epoch)
    progress = Progress(epoch=args.start_epoch, best=dict.fromkeys(BEST, -math.inf))
    if saved:
        restore(saved, optimization, progress)
        logger.info(f"continuing at epoch {progress.epoch}, step {progress.step}; best so far {progress.best}")
    if process.is_main:
        drop_epochs_from(output_dir / "log.txt", progress.epoch)

    defaults = model_defaults(args.model)
    step = FinetuneStep(LOSSES[args.loss], ToModelInput(defaults.mean, defaults.std, args.remode), process.device)
    tensorboard = TensorBoard(args.log_dir if process.is_main else None)
    reporting = Reporting(tensorboard, args.total_batch_size * args.num_sample, args.print_freq, process.is_main)
    kept = optimization.ema.module if optimization.ema else model  # what is evaluated and written
    while progress.epoch < args.stop_epoch:
        started = time.perf_counter()
        if progress.step < steps_per_epoch:
            sampler.set_epoch(progress.epoch, progress.step)
            progress.means = train_one_epoch(
                wrapped,
                checked(loader),
                step,
                optimization,
                progress,
                reporting,
                steps_per_epoch=steps_per_epoch,
                device=process.device,
            )
            if args.save_ckpt:  # a kill during the evaluation costs no training
                save_last(output_dir, model, optimization, progress, record=vars(args))
        record = {"epoch": progress.epoch} | {f"train_{k}": v for k, v in progress.means.items()}
        if validation:
            metrics = validation.run(kept, tensorboard, (progress.epoch + 1) * steps_per_epoch)
            keep_best(args, process, kept, metrics, progress)
            record |= {f"val_{k}": v for k, v in metrics.items()}
        if process.is_main:
            append_json_line(output_dir / "log.txt", record | {"seconds": round(time.perf_counter() - started, 1)})
        keep_epoch(args, process, kept, progress.epoch)
        progress.epoch, progress.step = progress.epoch + 1, 0
        if args.save_ckpt:
            save_last(output_dir, model, optimization, progress, record=vars(args))
    tensorboard.close()
    logger.info(f"{progress.epoch} of {args.epochs} epochs done; best {progress.best}; results in {output_dir}")


def evaluate_checkpoint(args: Namespace, process: Process) -> None:
    """--eval: score --finetune on the evaluation split and write everything about it."""
    output_dir = Path(args.output_dir)
    if (output_dir / "predictions.csv").exists():
        raise ConfigError(f"{output_dir}/predictions.csv exists: choose another --output_dir or remove it")
    validation = Validation(args, process)
    predictions = validation.predict(build_model(args, process, pretrained=True, trained_head=True))
    if predictions is None:
        return
    metrics = predictions.metrics()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_run_record(output_dir / "eval_args.json", vars(args), process.world_size)
    write_predictions(output_dir / "predictions.csv", predictions, validation.clips)
    about = {
        "checkpoint": args.finetune or None,
        "data_set": args.data_set,
        "split": args.eval_split,
        "clips": len(validation.clips),
        "clips_scored": int((validation.index.counts > 0).sum()),
        "frames": int(validation.index.frame_counts.sum()),
    }
    write_metrics(output_dir / "metrics.json", about | metrics)
    save_figures(output_dir / "plots", evaluation_figures(predictions.score, predictions.label, metrics))
    logger.info(summary(metrics))
    logger.info(f"predictions.csv, metrics.json and plots/ are in {output_dir}")


class Validation:
    """The evaluation split, ready to score a model as often as asked."""

    def __init__(self, args: Namespace, process: Process):
        self.args, self.process = args, process
        self.clips = build_clips(args.data_set, args.data_path, args.eval_split)
        self.index = window_index(self.clips, args, args.sampling_rate_val)
        defaults = model_defaults(args.model)
        self.to_input = ToModelInput(defaults.mean, defaults.std)
        self.stream = ClipStream(
            self.clips,
            self.index,
            EvalTransform(args.input_size),
            chunk_frames=args.eval_batch_size,
            rank=process.rank,
            world_size=process.world_size,
        )

    def predict(self, model: nn.Module) -> Predictions | None:
        """Scores of every window on rank 0, None on the others."""
        args, device = self.args, self.process.device
        if next(model.parameters()).device != device:  # an average kept on the CPU
            model = copy.deepcopy(model).to(device)
        loader = eval_loader(self.stream, num_workers=args.num_workers, pin_memory=pin_memory(args))
        total = self.stream.num_chunks
        chunks = progress_bar(loader, total=total, description="evaluation", enabled=self.process.is_main)
        batches = window_batches(chunks, self.index, batch_size=args.eval_batch_size, device=device)
        local = score_windows(model, batches, self.to_input, dtype=DTYPES[args.precision])
        return gather_predictions(local, self.index.locations(), lambda clip: self.clips[clip].labels)

    def run(self, model: nn.Module, tensorboard: TensorBoard, step: int) -> dict[str, float]:
        """Metrics, on every rank; scalars and figures to TensorBoard."""
        predictions, metrics = self.predict(model), None
        if predictions:
            metrics = predictions.metrics()
            logger.info(summary(metrics))
            tensorboard.scalars("val", metrics, step)
            tensorboard.figures("val", evaluation_figures(predictions.score, predictions.label, metrics), step)
        return broadcast(metrics)


def training_data(args: Namespace, process: Process) -> tuple[DataLoader, EpochSampler]:
    """Batches of augmented windows of the train split, and the sampler that orders them."""
    clips = build_clips(args.data_set, args.data_path, "train")
    index = window_index(clips, args, args.sampling_rate)
    with config_errors():
        transform = FinetuneTransform(
            args.input_size,
            aa=args.aa,
            interpolation=args.train_interpolation,
            short_side=args.train_short_side,
            erase_prob=args.reprob,
            erase_count=args.recount,
            erase_max_area=args.erase_max_area,
        )
    sampler = EpochSampler(
        len(index),
        batch_size=args.batch_size,
        accumulate=args.update_freq,
        rank=process.rank,
        world_size=process.world_size,
        samples_per_epoch=args.nb_samples_per_epoch,
        seed=args.seed,
    )
    dataset = WindowDataset(clips, index, transform, seed=args.seed, views=args.num_sample)
    return train_loader(dataset, sampler, num_workers=args.num_workers, pin_memory=pin_memory(args)), sampler


def build_model(args: Namespace, process: Process, *, pretrained: bool, trained_head: bool = False) -> nn.Module:
    """The model on its device, with --finetune loaded if pretrained, head included if trained_head."""
    with config_errors():
        model = create_model(
            args.model,
            num_frames=args.num_frames,
            input_size=args.input_size,
            tubelet_size=args.tubelet_size,
            final_reduction=args.final_reduction,
            init_scale=args.init_scale,
            drop_path_rate=args.drop_path,
            drop_rate=args.drop,
            attn_drop_rate=args.attn_drop_rate,
            fc_drop_rate=args.fc_drop_rate,
        )
    if pretrained and args.finetune:
        with local_main_first(process):  # one download per node
            path = fetch(args.finetune)
        report = load_pretrained(model, path, model_key=args.model_key, model_prefix=args.model_prefix)
        logger.info(report)
        if trained_head and report.missing:
            raise CheckpointError(f"{args.finetune}: no head trained on two classes; fine-tune it before --eval")
    elif pretrained:
        logger.info(f"no --finetune: {args.model} has random weights")
    model.set_grad_checkpointing(args.use_checkpoint)
    model.to(process.device)
    if args.compile:
        model.compile()
    return model


def build_optimization(args: Namespace, process: Process, model: nn.Module, steps_per_epoch: int) -> Optimization:
    """Optimizer, schedules, precision and weight average; logs the learning rate and where it comes from."""
    scale = args.total_batch_size / 256
    lr, min_lr = args.lr * scale, args.min_lr * scale
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = args.warmup_steps if args.warmup_steps > 0 else args.warmup_epochs * steps_per_epoch
    decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    logger.info(
        f"batch {args.total_batch_size} = {args.batch_size} windows x {process.world_size} processes x "
        f"{args.update_freq} passes; learning rate {lr:.4g} = {args.lr:g} x {args.total_batch_size} / 256, "
        f"down to {min_lr:.4g}; {steps_per_epoch} steps per epoch, {warmup_steps} of warm-up"
    )
    groups = parameter_groups(model, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    with config_errors():
        optimizer = build_optimizer(
            groups, name=args.opt, lr=lr, eps=args.opt_eps, betas=args.opt_betas, fused=args.device == "cuda"
        )
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    return Optimization(
        optimizer=optimizer,
        lr=lambda step: cosine(step, base=lr, final=min_lr, total_steps=total_steps, warmup_steps=warmup_steps),
        weight_decay=lambda step: cosine(step, base=args.weight_decay, final=decay_end, total_steps=total_steps),
        accumulate=args.update_freq,
        clip_grad=args.clip_grad,
        dtype=DTYPES[args.precision],
        scaler=torch.amp.GradScaler(args.device) if args.precision == "fp16" else None,
        ema=ema,
    )


def resolve(args: Namespace, world_size: int) -> None:
    """Replace every None by the value it stands for, so that args.json holds what was used."""
    with config_errors():
        defaults = model_defaults(args.model)
    for name in ("num_frames", "view_fps", "input_size", "tubelet_size"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))
    if args.lr is None:
        args.lr = defaults.finetune_lr
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    args.batch_size, args.total_batch_size = split_batch(
        args.total_batch_size, args.batch_size, world_size=world_size, update_freq=args.update_freq
    )
    args.eval_batch_size = args.eval_batch_size or 2 * args.batch_size
    args.stop_epoch = args.epochs if args.stop_epoch is None else args.stop_epoch
    args.log_dir = args.log_dir or args.output_dir


@contextmanager
def config_errors() -> Iterator[None]:
    """A value that models, transforms or optimizers refuse came from the command line."""
    try:
        yield
    except ValueError as e:
        raise ConfigError(str(e)) from e


def pin_memory(args: Namespace) -> bool:
    """Pinned memory is of use to CUDA alone."""
    return args.pin_mem and args.device == "cuda"


def find_resume(args: Namespace) -> dict | None:
    """The state to continue from, if any. Raises ConfigError where it belongs to other arguments."""
    folder = find_last(args.output_dir) if args.auto_resume else None
    if folder is None and args.resume:  # after an interruption the run's own checkpoint is the later one
        folder = Path(args.resume)
        if not folder.is_dir():
            raise ConfigError(f"--resume {folder}: no such folder; it takes a checkpoint-last folder")
    if folder is None:
        return None
    saved = load_last(folder)
    if changes := differing(saved["args"], vars(args)):
        raise ConfigError(
            f"{folder} was written with other arguments ({'; '.join(changes)}): "
            "use those, another --output_dir, or --no_auto_resume to start over"
        )
    logger.info(f"resuming from {folder}")
    return saved


def window_index(clips: ClipTable, args: Namespace, stride: int) -> WindowIndex:
    """The windows of a split; logs how many there are and which clips are too short for one."""
    with config_errors():
        index = WindowIndex(
            clips.frame_counts, src_fps=clips.fps, num_frames=args.num_frames, view_fps=args.view_fps, stride=stride
        )
    split = f"{clips.name} {clips.split}"
    logger.info(f"{split}: {len(clips)} clips, {clips.frame_counts.sum()} frames, {len(index)} windows")
    if len(short := index.short_clips):
        names = ", ".join(clips[i].name for i in short[:5])
        logger.warning(f"{split}: {len(short)} clips are shorter than a window and go unused: {names}")
    if not len(index):
        raise DataError(f"{split}: no clip is long enough for a window")
    return index


def keep_best(args: Namespace, process: Process, model: nn.Module, metrics: dict, progress: Progress) -> None:
    """Write checkpoint-best_<metric>.pth for each metric that improved."""
    for name in BEST:
        if metrics[name] > progress.best[name]:
            progress.best[name] = metrics[name]
            if args.save_ckpt and process.is_main:
                save_weights(Path(args.output_dir, f"checkpoint-best_{name}.pth"), model)


def keep_epoch(args: Namespace, process: Process, model: nn.Module, epoch: int) -> None:
    """Write checkpoint-<epoch>.pth after the last epoch and every --save_ckpt_freq."""
    due = epoch + 1 == args.stop_epoch or (args.save_ckpt_freq and (epoch + 1) % args.save_ckpt_freq == 0)
    if due and args.save_ckpt and process.is_main:
        save_weights(Path(args.output_dir, f"checkpoint-{epoch}.pth"), model)


def summary(metrics: dict[str, float]) -> str:
    """The figures of the published tables, in percent."""
    names = {"auroc": "AUC_ROC", "ap": "AP", "auc_mcc": "AUC_MCC", "mcc_05": "MCC@0.5", "accuracy": "accuracy"}
    return "  ".join(f"{shown} {100 * metrics[name]:.2f}" for name, shown in names.items()) + f"  n {metrics['n']}"


if __name__ == "__main__":
    try:
        main(ARGS)
    except (CheckpointError, ConfigError, DataError, EvaluationError, TrainingError) as e:
        sys.exit(f"error: {e}")
