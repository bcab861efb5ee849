"""Fine-tune and evaluate a Video ViT as a per-frame risk scorer of driving video.

One GPU, or the CPU where there is none (defaults are the published recipe for the model):
    python run_finetune.py --model vit_small_patch16_224 --finetune videomae_vit_s_k400_1600e_pretrain.pth \\
        --data_set DoTA --data_path /data/DoTA --output_dir runs/videomae_s_dota

One machine, N GPUs (the total batch stays 56, so N must divide it; Slurm: see jobs/finetune/):
    torchrun --standalone --nproc_per_node=N run_finetune.py ...the same flags...

Several machines, on each of them:
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 run_finetune.py ...
They share OUTPUT_DIR. GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: network interfaces, where they do not find each other.

Evaluate a checkpoint, on any number of processes; the file says which model it is of and how that is fed:
    python run_finetune.py --eval --finetune runs/videomae_s_dota/checkpoint-best_auroc.pth \\
        --data_set DoTA --data_path /data/DoTA --output_dir runs/videomae_s_dota/eval

The same command again continues an interrupted run from OUTPUT_DIR/checkpoint-last.
"""

from utils.exits import fail, report_uncaught

if __name__ == "__main__":  # first, so that what follows is answered in a line
    report_uncaught()

from utils.cli import ConfigError, config_errors
from utils.files import check_writable
from utils.flags import finetune_parser
from utils.lock import end_with_torchrun, folder_lock
from utils.record import Changeable
from utils.resolve import (
    INPUT,
    WEIGHTS_SOURCE,
    common_flags,
    fill_from_config,
    fill_unset,
    keep_history,
    leave_gpus_alone,
    refuse_contradictions,
    resolve_head,
    resolve_runtime,
    resolve_schedule,
    split_batch,
    without_other_head,
)
from utils.signals import catch_signals, remove_marker

if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = finetune_parser(__doc__).parse_args()
    leave_gpus_alone(ARGS.device)
    if not ARGS.eval:
        catch_signals()
    end_with_torchrun()

import logging
import math
from argparse import Namespace
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import set_fused_attn
from torch import nn

from datasets import ClipTable, DataError, VideoScan, build_clips, find_data_sets
from datasets.at_hand import DataAtHand, read_pictures
from datasets.augment.device import DeviceAugment, DeviceLoader, NormalizeAndErase
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.batches import BatchLoader
from datasets.faults import CountedBatches, read_bad_clips, warn_unmatched
from datasets.features import FeatureBatches
from datasets.loader import EpochSampler, Source, WindowDataset
from datasets.slots import reserve
from datasets.splits import hold_out, require_both_classes
from datasets.stream import SplitWindows
from datasets.windows import WindowIndex, index_clips
from engine import outputs
from engine.checkpoint import CheckpointWriteError, Progress, RunState
from engine.evaluate import EvaluationError, Scorer, coverage
from engine.events import EventRule
from engine.feature_cache import FeatureCache
from engine.finetune import FinetuneObjective
from engine.guard import TrainingError
from engine.loop import Reporting, train_epochs
from engine.losses import LOSSES
from engine.optim import DTYPES, Optimization, Schedule, build_optimization
from engine.resume import agreed_state, recorded_arguments, require_same_selection
from engine.session import start_session
from engine.validation import keep_weights, validate
from models import create_model, head_of, model_defaults
from models.weights import CheckpointError, classifier_spec, fetch, load_pretrained, read_hints, read_spec
from utils.distributed import (
    Process,
    data_parallel,
    from_main,
    local_main_first,
    process_group,
    require_same,
    require_same_weights,
    seed_everything,
)
from utils.logging import setup_logging

ERRORS = (CheckpointError, CheckpointWriteError, ConfigError, DataError, EvaluationError, TrainingError)
BEST = ("auroc", "auc_mcc")  # the metrics whose best weights are kept
SPEC = ("model", *INPUT, "gelu", "final_reduction", "head", "mean", "std")  # what a weights file answers
logger = logging.getLogger("tad")


def main(args: Namespace) -> None:
    """Train, or evaluate with --eval."""
    resolve_runtime(args, cuda=torch.cuda.is_available())
    timeout = timedelta(minutes=args.dist_timeout)
    joined = process_group(args.device, timeout=timeout, expected=ERRORS, same=common_flags(args))
    with joined as process, ExitStack() as held:
        setup_logging(process.rank)
        from_main(lambda: held.enter_context(folder_lock(args.output_dir)))
        resolve_spec(args, process)
        resolve(args, process.world_size)
        require_same(common_flags(args))
        seed_everything(args.seed)
        set_fused_attn(not args.no_flash_attn)
        if args.eval:
            evaluate_checkpoint(args, process)
        else:
            train(args, process)


def resolve_spec(args: Namespace, process: Process) -> None:
    """Take what of SPEC was left open from the run to continue, else from what --finetune says of itself.

    Raises ConfigError where a flag contradicts the weights file, unless --override_spec is given.
    """
    resuming = {"auto_resume": args.auto_resume, "resume": args.resume}
    recorded = {} if args.eval else from_main(lambda: recorded_arguments(args.output_dir, **resuming))
    fill_unset(args, recorded, SPEC)  # where there is none, what is no flag becomes None
    if recorded or not args.finetune:
        return
    with local_main_first(process):  # one download per node
        path = fetch(args.finetune)
    if (spec := read_spec(path)) is None:
        fill_from_config(args, without_other_head(args, read_hints(path)), SPEC, args.finetune)
        if args.eval:
            logger.warning(f"{args.finetune} has no spec: --model, --view_fps and the like, left out, are the defaults")
        return
    trained = classifier_spec(spec, args.finetune)
    compared = ("model", *INPUT, "gelu", *(("final_reduction", "head", "pos_embed") if args.eval else ()))
    refuse_contradictions(args, trained, compared, args.finetune)
    fill_unset(args, without_other_head(args, trained), SPEC)


def resolve(args: Namespace, world_size: int) -> None:
    """Replace what was left open by the value it stands for, so that args.json holds what was used."""
    args.model = args.model or "vit_base_patch16_224"
    with config_errors():
        defaults = model_defaults(args.model)
    if args.model.startswith("pretrain_"):
        raise ConfigError(f"{args.model} is for run_dapt.py; fine-tuning takes a classifier: give another --model, or, "
                          f"if {args.output_dir} holds a run of DAPT, another --output_dir")  # fmt: skip
    pixels = {"mean": list(defaults.mean), "std": list(defaults.std)}
    fill_unset(args, vars(defaults) | pixels, (*INPUT, *pixels))
    (data_set,) = find_data_sets([args.data_set], args.assume_fps)
    if not data_set.labelled:
        what = "evaluate against; run_predict.py scores it" if args.eval else "fine-tune on; it is for run_dapt.py"
        raise ConfigError(f"{args.data_set} has no labels to {what}")
    with config_errors():
        args.head = head_of(args.model, args.head, args.final_reduction)
    args.scan_cache = args.scan_cache or str(Path(args.output_dir, "videos.json"))
    args.sampling_rate_val = args.sampling_rate_val or (1 if args.eval else data_set.val_stride)
    if args.eval:
        return
    resolve_head(args)
    args.lr = defaults.finetune_lr if args.lr is None else args.lr
    resolve_schedule(args)
    args.batch_size, args.total_batch_size = split_batch(
        args.total_batch_size, args.batch_size, default=56, world_size=world_size, update_freq=args.update_freq
    )


def train(args: Namespace, process: Process) -> None:
    """Run the fine-tuning recipe, top to bottom."""
    output_dir = Path(args.output_dir)
    remove_marker(output_dir)
    changeable = Changeable.by(finetune_parser(""), args.override)
    resuming = {"auto_resume": args.auto_resume, "resume": args.resume}
    resumed = agreed_state(output_dir, **resuming, record=vars(args), changeable=changeable)
    keep_history(args, resumed)
    model = build_model(args, process, resumed=resumed)
    seed_everything(args.seed + process.rank)  # ranks share their weights, not their dropout
    clips, held_out = training_clips(args, resumed)
    loader, sampler = training_data(args, process, clips, model)
    batches = CountedBatches(loader, limit=args.max_bad_samples)
    validation = validation_windows(args, process, model, held_out)
    warn_unmatched(read_bad_clips(args.bad_clips or ()), [clips, *([validation.clips] if validation else [])])
    ddp_model = data_parallel(model, process)
    progress = Progress(
        epoch=args.start_epoch,
        best=dict.fromkeys(BEST, -math.inf),
        num_windows=sampler.num_windows,
        steps_per_epoch=sampler.steps_per_epoch,
    )
    optimization = optimization_of(args, model, sampler.steps_per_epoch)
    session = start_session(
        output_dir,
        RunState(model, optimization, progress, record=vars(args), samples=batches),
        process,
        resumed=resumed,
        log_dir=args.log_dir,
        max_nonfinite=args.max_nonfinite,
        save_ckpt=args.save_ckpt,
        auto_resume=args.auto_resume,
        save_every_minutes=args.save_every_minutes,
    )
    del resumed  # three times the weights
    if optimization.ema and args.compile:
        optimization.ema.module.compile()  # a copy is not

    def after_epoch() -> dict[str, float]:
        evaluated = optimization.ema.module if optimization.ema else model
        metrics = validate(validation, evaluated, session, DTYPES[args.precision], args.model) if validation else {}
        how = {"stop_epoch": args.stop_epoch, "every": args.save_ckpt_freq, "data_set": args.data_set}
        keep_weights(session, evaluated, metrics, selected_on=args.selected_on, **how)
        return batches.end_epoch() | {f"val_{name}": value for name, value in metrics.items()}

    train_epochs(
        ddp_model,
        batches,
        sampler.set_epoch,
        FinetuneObjective(LOSSES[args.loss], NormalizeAndErase(model.normalize, args.remode)),
        session,
        Reporting(args.total_batch_size * args.num_sample, args.print_freq, process.is_main),
        stop_epoch=args.stop_epoch,
        after_epoch=after_epoch,
    )
    session.tensorboard.close()
    batches.log_summary()
    best = ", ".join(f"{name} {100 * value:.2f}" for name, value in progress.best.items() if value > -math.inf)
    logger.info(f"{progress.epoch} of {args.epochs} epochs done{f'; best {best}' * bool(best)}; see {output_dir}")


def evaluate_checkpoint(args: Namespace, process: Process) -> None:
    """Score --finetune on the evaluation split, for --eval, and write everything about it."""
    rule = EventRule(0.5, args.alert_after, args.event_gap, args.event_min_duration)
    criterion = args.operating_point, args.false_alarms_per_hour
    wanted = outputs.WantedPoint(*criterion, rule, weights=args.finetune, as_trained=not args.override_spec)
    output_dir, weights = Path(args.output_dir), fetch(args.finetune) if args.finetune else None
    free = finetune_parser("").free_on_resume - set(WEIGHTS_SOURCE)
    known = from_main(lambda: outputs.unfinished_evaluation(output_dir, vars(args), free, weights))
    known, clips = (known, None) if known else score_checkpoint(args, process, output_dir, weights)
    if process.is_main:
        outputs.finish_evaluation(output_dir, known, wanted)
        report(args, output_dir, clips)


def report(args: Namespace, output_dir: Path, clips: ClipTable | None) -> None:
    """Write the report of an evaluation, with what is at hand of the data set. clips: of the split, where known."""
    data = DataAtHand(args.data_set, args.data_path, args.scan_cache, args.assume_fps, args.labels)
    clips = clips or data.clips(args.eval_split)
    listed = clips.listed_names if clips else None
    windows = {"num_frames": args.num_frames, "view_fps": args.view_fps, "stride": args.sampling_rate_val}
    train = data.train_labels(listed or (), **windows)
    pictures = clips and partial(read_pictures, clips, workers=args.num_workers, read_timeout=args.read_timeout)
    outputs.report_evaluation(output_dir, train.columns, train.words, listed, pictures)


def score_checkpoint(
    args: Namespace, process: Process, output_dir: Path, weights: str | None
) -> tuple[dict[str, Any] | None, ClipTable]:
    """Write predictions.csv; returns what is known of it, on rank 0, and the clips."""
    record = from_main(lambda: outputs.begin_evaluation(output_dir, vars(args), weights, process.world_size))
    model = build_model(args, process, trained_head=True)
    windows = evaluation_windows(args, process)
    from_main(lambda: check_writable(output_dir, outputs.BYTES_OF_A_ROW * len(windows.locations()[0])))
    warn_unmatched(read_bad_clips(args.bad_clips or ()), [windows.clips])
    predictions = Scorer(windows, DTYPES[args.precision]).score(model)
    if predictions is None:
        return None, windows.clips
    about = {"checkpoint": args.finetune, "model": args.model, "data_set": args.data_set, "split": args.eval_split}
    about["selected_on"] = weights and (read_spec(weights) or {}).get("selected_on")
    about |= coverage(predictions, windows.clips)
    return outputs.keep_scores(output_dir, predictions, windows.clips, about, record), windows.clips


def labelled_clips(args: Namespace, split: str) -> ClipTable:
    """Return the clips of a split, read once for all ranks."""
    scan = VideoScan(args.scan_cache, workers=args.num_workers, read_timeout=args.read_timeout)
    arguments = (args.data_set, args.data_path, split, scan, args.assume_fps)
    bad = read_bad_clips(args.bad_clips or ())
    clips = from_main(lambda: build_clips(*arguments, leave_out=bad, labels=args.labels))
    clips.require_labels()
    return clips


def training_clips(args: Namespace, resumed: dict[str, Any] | None) -> tuple[ClipTable, ClipTable | None]:
    """Return the clips to train on, and those held out to choose the best checkpoint on; None: the evaluation split.

    args.selected_on becomes what the best is chosen on, in words.
    """
    clips, held_out = labelled_clips(args, "train"), None
    args.selected_on = args.data_set + f" {args.eval_split}" + f", {args.labels} labels" * (args.labels != "own")
    if args.select_split is not None:
        clips, held_out, args.selected_on = hold_out(clips, args.select_split)
        require_same_selection(resumed, args.selected_on)
    if not args.disable_eval_during_finetuning:
        hint = "" if held_out else ", as published; --select_split chooses within train"
        logger.info(f"the best checkpoint is chosen on {args.selected_on}{hint}")
    return clips, held_out


def training_data(
    args: Namespace, process: Process, clips: ClipTable, model: nn.Module
) -> tuple[DeviceLoader | FeatureBatches, EpochSampler]:
    """Return batches of windows of clips, and the sampler that orders them."""
    with config_errors():
        index = index_clips(clips, num_frames=args.num_frames, view_fps=args.view_fps, stride=args.sampling_rate)
        transform = FinetuneTransform(
            args.input_size, views=args.num_sample, aa=args.aa, interpolation=args.train_interpolation,
            short_side=args.short_side, erase_prob=args.reprob, erase_count=args.recount,
            erase_max_area=args.erase_max_area, decoding=args.decoding, here=args.augment_on == "worker",
        )  # fmt: skip
    if not args.augment:
        transform = FinetuneTransform.plain(args.input_size)
    if args.select_split is not None:
        require_both_classes(clips, index)
    sampler = EpochSampler(
        [len(index)], batch_sizes=[args.batch_size], accumulate=args.update_freq, rank=process.rank,
        world_size=process.world_size, samples_per_epoch=args.nb_samples_per_epoch, seed=args.seed,
    )  # fmt: skip
    if args.cache_features:
        cache = cached(args, process, model, split_windows(args, process, clips, index, allow_missing=True))
        return FeatureBatches(clips, index, sampler, cache.read, cache.missing(), process.device), sampler
    loader = BatchLoader(
        WindowDataset([Source(clips, index, transform)], seed=args.seed, targets=True),
        sampler,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        read_timeout=args.read_timeout,
    )
    reserve(loader.slots)
    augment = DeviceAugment(args.input_size, args.train_interpolation)
    return DeviceLoader(loader, process.device, augment), sampler


def cached(args: Namespace, process: Process, model: nn.Module, windows: SplitWindows) -> FeatureCache:
    """Return the features of windows, on disk."""
    return FeatureCache(args.cache_features, windows, model, DTYPES[args.precision], process)


def validation_windows(
    args: Namespace, process: Process, model: nn.Module, held_out: ClipTable | None
) -> SplitWindows | FeatureCache | None:
    """Return the windows that the best weights are chosen on, or their features; None where nothing is evaluated."""
    if args.disable_eval_during_finetuning:
        return None
    windows = evaluation_windows(args, process, held_out)
    return cached(args, process, model, windows) if args.cache_features else windows


def evaluation_windows(args: Namespace, process: Process, held_out: ClipTable | None = None) -> SplitWindows:
    """Return the windows of held-out clips, or of the evaluation split, ready to be scored as often as asked."""
    clips = labelled_clips(args, args.eval_split) if held_out is None else held_out
    with config_errors():
        index = index_clips(clips, num_frames=args.num_frames, view_fps=args.view_fps, stride=args.sampling_rate_val)
    if held_out is not None:
        require_both_classes(clips, index)
    return split_windows(args, process, clips, index, allow_missing=args.allow_missing)


def split_windows(
    args: Namespace, process: Process, clips: ClipTable, index: WindowIndex, *, allow_missing: bool
) -> SplitWindows:
    """Return windows as evaluation makes them."""
    windows = SplitWindows(
        clips, index, EvalTransform(args.input_size), device=process.device, batch_size=args.eval_batch_size,
        rank=process.rank, world_size=process.world_size, num_workers=args.num_workers, pin_memory=args.pin_mem,
        allow_missing=allow_missing, read_timeout=args.read_timeout,
    )  # fmt: skip
    reserve(windows.slots)
    return windows


def build_model(
    args: Namespace, process: Process, *, resumed: dict[str, Any] | None = None, trained_head: bool = False
) -> nn.Module:
    """Return the model on its device, with --finetune loaded (if trained_head with its head) or ready to be resumed."""
    with config_errors():
        model = create_model(
            args.model, num_frames=args.num_frames, view_fps=args.view_fps, input_size=args.input_size,
            tubelet_size=args.tubelet_size, gelu=args.gelu, final_reduction=args.final_reduction, head=args.head,
            init_scale=args.init_scale, drop_path_rate=args.drop_path, drop_rate=args.drop,
            attn_drop_rate=args.attn_drop_rate, fc_drop_rate=args.fc_drop_rate, mean=args.mean, std=args.std,
        )  # fmt: skip
    if args.pos_embed == "sincos" and model.pos_embed_kind == "learned":
        raise ConfigError(f"--pos_embed sincos: {args.model} has a learned position table alone")
    if args.finetune and not resumed:
        with local_main_first(process):  # one download per node
            path = fetch(args.finetune)
        where = {"model_key": args.model_key, "model_prefix": args.model_prefix or "", "table_grid": args.table_grid}
        report = load_pretrained(model, path, stored_table=args.pos_embed != "sincos", **where)
        require_same_weights(model, report.loaded, f"--finetune {args.finetune}")
        logger.info(report)
        if trained_head and report.missing:
            raise CheckpointError(f"{args.finetune}: no head trained on two classes; fine-tune it before --eval")
    elif not resumed:
        logger.info(f"no --finetune: {args.model} has random weights")
    with config_errors():
        if args.pos_embed == "learned" or (resumed and "pos_embed" in resumed["model"]):
            model.learn_pos_embed()
        if args.freeze_layers is not None:
            model.freeze_blocks(args.freeze_layers)
    if args.freeze_encoder:
        if resumed:
            model.load_state_dict(resumed["model"])  # now, since features are made before the session restores the rest
        model.freeze_encoder()
    model.set_grad_checkpointing(args.use_checkpoint)
    model.to(process.device)
    if args.compile:
        model.compile()
    return model


def optimization_of(args: Namespace, model: nn.Module, steps_per_epoch: int) -> Optimization:
    """Return the Optimization of the command line."""
    with config_errors():
        schedule = Schedule(
            epochs=args.epochs, steps_per_epoch=steps_per_epoch, warmup_epochs=args.warmup_epochs,
            warmup_steps=args.warmup_steps, lr=args.lr, min_lr=args.min_lr,
            weight_decay=args.weight_decay, weight_decay_end=args.weight_decay_end,
        )  # fmt: skip
        return build_optimization(
            model, schedule, clips_per_step=args.total_batch_size, opt=args.opt, opt_eps=args.opt_eps,
            opt_betas=args.opt_betas, layer_decay=args.layer_decay, accumulate=args.update_freq,
            clip_grad=args.clip_grad, dtype=DTYPES[args.precision],
            ema_decay=args.model_ema_decay if args.model_ema else None, ema_on_cpu=args.model_ema_force_cpu,
        )  # fmt: skip


if __name__ == "__main__":
    try:
        main(ARGS)
    except ERRORS as e:
        fail(f"error: {e}")
