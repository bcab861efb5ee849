"""Fine-tune and evaluate a Video ViT as a per-frame risk scorer of driving video.

One GPU, or the CPU where there is none (defaults are the published recipe for the model):
    python run_finetune.py --model vit_small_patch16_224 --finetune videomae_s_k400.pth \\
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

from utils.config import ConfigError, config_errors, split_batch, write_run_record
from utils.flags import FREE_ON_RESUME, finetune_parser

if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = finetune_parser(__doc__).parse_args()

import copy
import logging
import math
import time
from argparse import Namespace
from pathlib import Path

import torch
from timm.layers import set_fused_attn
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from datasets import DataError, build_clips
from datasets.loader import ClipStream, EpochSampler, WindowDataset, checked, eval_loader, train_loader, window_batches
from datasets.transforms import EvalTransform, FinetuneTransform, ToModelInput
from datasets.windows import index_clips
from engine.checkpoint import find_resume, restore, save_last, save_weights
from engine.evaluate import (
    EvaluationError,
    Predictions,
    gather_predictions,
    score_windows,
    summary,
    write_metrics,
    write_predictions,
)
from engine.finetune import FinetuneObjective
from engine.loop import Optimization, Progress, Reporting, TrainingError, train_one_epoch
from engine.losses import LOSSES
from engine.optim import build_optimizer, cosine, parameter_groups
from engine.plots import evaluation_figures, save_figures
from models import create_model, model_defaults
from models.weights import CheckpointError, fetch, load_pretrained
from utils.distributed import (
    Process,
    barrier,
    broadcast,
    data_parallel,
    local_main_first,
    process_group,
    seed_everything,
)
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


def resolve(args: Namespace, world_size: int) -> None:
    """Replace what was left open by the value it stands for, so that args.json holds what was used."""
    with config_errors():
        defaults = model_defaults(args.model)
    for name in ("num_frames", "view_fps", "input_size", "tubelet_size"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    args.log_dir = args.log_dir or args.output_dir
    args.pin_mem = args.pin_mem and args.device == "cuda"
    if args.eval:
        return
    args.lr = defaults.finetune_lr if args.lr is None else args.lr
    args.weight_decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    args.stop_epoch = args.epochs if args.stop_epoch is None else args.stop_epoch
    if not args.start_epoch < args.stop_epoch <= args.epochs:
        raise ConfigError(
            f"--start_epoch {args.start_epoch} < --stop_epoch {args.stop_epoch} <= --epochs {args.epochs} must hold"
        )
    args.batch_size, args.total_batch_size = split_batch(
        args.total_batch_size, args.batch_size, world_size=world_size, update_freq=args.update_freq
    )


def train(args: Namespace, process: Process) -> None:
    """The fine-tuning recipe, top to bottom."""
    output_dir = Path(args.output_dir)
    resumed = find_resume(
        output_dir, auto_resume=args.auto_resume, resume=args.resume, record=vars(args), free=FREE_ON_RESUME
    )
    barrier()  # every rank has looked at the folder before it changes
    if process.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_run_record(output_dir / "args.json", vars(args), process.world_size)

    loader, sampler = training_data(args, process)
    validation = None if args.disable_eval_during_finetuning else Validation(args, process)

    model = build_model(args, process, pretrained=resumed is None)
    if args.freeze_layers is not None:
        with config_errors():
            model.freeze_blocks(args.freeze_layers)
    ddp_model = data_parallel(model, process)
    defaults = model_defaults(args.model)
    to_input = ToModelInput(defaults.mean, defaults.std, args.remode)
    objective = FinetuneObjective(LOSSES[args.loss], to_input, process.device)

    steps_per_epoch = sampler.steps_per_epoch
    optimization = build_optimization(args, process, model, steps_per_epoch)
    progress = Progress(epoch=args.start_epoch, best=dict.fromkeys(BEST, -math.inf))
    if resumed:
        restore(resumed, model, optimization, progress, process.rank)
        logger.info(f"resuming at epoch {progress.epoch}, step {progress.step}; best so far: {progress.best}")
    if process.is_main:
        drop_epochs_from(output_dir / "log.txt", progress.epoch)
    eval_model = optimization.ema.module if optimization.ema else model

    tensorboard = TensorBoard(args.log_dir if process.is_main else None)
    reporting = Reporting(tensorboard, args.total_batch_size * args.num_sample, args.print_freq, process.is_main)
    while progress.epoch < args.stop_epoch:
        started = time.perf_counter()
        if progress.step < steps_per_epoch:  # else a kill during the evaluation left a trained epoch behind
            sampler.set_epoch(progress.epoch, progress.step)
            progress.means = train_one_epoch(
                ddp_model,
                checked(loader),
                objective,
                optimization,
                progress,
                reporting,
                steps_per_epoch=steps_per_epoch,
                device=process.device,
            )
            save_run(args, model, optimization, progress)
        record = {"epoch": progress.epoch} | {f"train_{k}": v for k, v in progress.means.items()}
        if validation:
            metrics = validation.evaluate(eval_model, tensorboard, (progress.epoch + 1) * steps_per_epoch)
            save_best(args, process, eval_model, metrics, progress)
            record |= {f"val_{k}": v for k, v in metrics.items()}
        if process.is_main:
            append_json_line(output_dir / "log.txt", record | {"seconds": round(time.perf_counter() - started, 1)})
        save_epoch(args, process, eval_model, progress.epoch)
        progress.epoch, progress.step = progress.epoch + 1, 0
        save_run(args, model, optimization, progress)
    tensorboard.close()
    best = ", ".join(f"{name} {100 * value:.2f}" for name, value in progress.best.items() if value > -math.inf)
    logger.info(f"{progress.epoch} of {args.epochs} epochs done{f'; best {best}' * bool(best)}; see {output_dir}")


def evaluate_checkpoint(args: Namespace, process: Process) -> None:
    """--eval: score --finetune on the evaluation split and write everything about it."""
    output_dir = Path(args.output_dir)
    if (output_dir / "predictions.csv").exists():
        raise ConfigError(f"{output_dir}/predictions.csv exists: choose another --output_dir or remove it")
    if process.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_run_record(output_dir / "eval_args.json", vars(args), process.world_size)
    validation = Validation(args, process)
    predictions = validation.predict(build_model(args, process, pretrained=True, trained_head=True))
    if predictions is None:
        return
    metrics = predictions.metrics()
    about = {
        "checkpoint": args.finetune,
        "data_set": args.data_set,
        "split": args.eval_split,
        "clips": len(validation.clips),
        "clips_scored": int((validation.index.counts > 0).sum()),
        "frames": int(validation.index.frame_counts.sum()),
    }
    write_predictions(output_dir / "predictions.csv", predictions, validation.clips)
    write_metrics(output_dir / "metrics.json", about | metrics)
    save_figures(output_dir / "plots", evaluation_figures(predictions.score, predictions.label, metrics))
    logger.info(summary(metrics))
    logger.info(f"predictions.csv, metrics.json and plots/ are in {output_dir}")


def training_data(args: Namespace, process: Process) -> tuple[DataLoader, EpochSampler]:
    """Batches of augmented windows of the train split, and the sampler that orders them."""
    clips = build_clips(args.data_set, args.data_path, "train")
    with config_errors():
        index = index_clips(clips, num_frames=args.num_frames, view_fps=args.view_fps, stride=args.sampling_rate)
        transform = FinetuneTransform(
            args.input_size,
            views=args.num_sample,
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
    dataset = WindowDataset(clips, index, transform, seed=args.seed)
    return train_loader(dataset, sampler, num_workers=args.num_workers, pin_memory=args.pin_mem), sampler


class Validation:
    """The evaluation split, ready to score a model as often as asked."""

    def __init__(self, args: Namespace, process: Process):
        self.args, self.process = args, process
        self.clips = build_clips(args.data_set, args.data_path, args.eval_split)
        with config_errors():
            self.index = index_clips(
                self.clips, num_frames=args.num_frames, view_fps=args.view_fps, stride=args.sampling_rate_val
            )
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
        loader = eval_loader(self.stream, num_workers=args.num_workers, pin_memory=args.pin_mem)
        total = self.stream.num_chunks
        chunks = progress_bar(loader, total=total, description="evaluation", enabled=self.process.is_main)
        batches = window_batches(chunks, self.index, batch_size=args.eval_batch_size, device=device)
        local = score_windows(model, batches, self.to_input, dtype=DTYPES[args.precision])
        return gather_predictions(local, self.index.locations(), lambda clip: self.clips[clip].labels)

    def evaluate(self, model: nn.Module, tensorboard: TensorBoard, step: int) -> dict[str, float]:
        """Metrics, on every rank; scalars and figures to TensorBoard."""
        predictions, metrics = self.predict(model), None
        if predictions:
            metrics = predictions.metrics()
            logger.info(summary(metrics))
            tensorboard.scalars("val", metrics, step)
            tensorboard.figures("val", evaluation_figures(predictions.score, predictions.label, metrics), step)
        return broadcast(metrics)


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
        report = load_pretrained(model, path, model_key=args.model_key, model_prefix=args.model_prefix or "")
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
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"the warm-up ({warmup_steps} steps) must be shorter than --epochs {args.epochs} ({total_steps} steps): "
            "lower --warmup_epochs"
        )
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
    decay, decay_end = args.weight_decay, args.weight_decay_end
    return Optimization(
        optimizer=optimizer,
        lr=lambda step: cosine(step, base=lr, final=min_lr, total_steps=total_steps, warmup_steps=warmup_steps),
        weight_decay=lambda step: cosine(step, base=decay, final=decay_end, total_steps=total_steps),
        accumulate=args.update_freq,
        clip_grad=args.clip_grad,
        dtype=DTYPES[args.precision],
        scaler=torch.amp.GradScaler(args.device) if args.precision == "fp16" else None,
        ema=ema,
    )


def save_run(args: Namespace, model: nn.Module, optimization: Optimization, progress: Progress) -> None:
    """Write checkpoint-last/."""
    if args.save_ckpt:
        save_last(args.output_dir, model, optimization, progress, record=vars(args))


def save_best(args: Namespace, process: Process, model: nn.Module, metrics: dict, progress: Progress) -> None:
    """Write checkpoint-best_<metric>.pth for each metric that improved."""
    for name in BEST:
        if metrics[name] > progress.best[name]:
            progress.best[name] = metrics[name]
            if args.save_ckpt and process.is_main:
                save_weights(Path(args.output_dir, f"checkpoint-best_{name}.pth"), model)


def save_epoch(args: Namespace, process: Process, model: nn.Module, epoch: int) -> None:
    """Write checkpoint-<epoch>.pth after the last epoch and every --save_ckpt_freq."""
    due = epoch + 1 == args.stop_epoch or (args.save_ckpt_freq and (epoch + 1) % args.save_ckpt_freq == 0)
    if due and args.save_ckpt and process.is_main:
        save_weights(Path(args.output_dir, f"checkpoint-{epoch}.pth"), model)


if __name__ == "__main__":
    try:
        main(ARGS)
    except (CheckpointError, ConfigError, DataError, EvaluationError, TrainingError) as e:
        sys.exit(f"error: {e}")
