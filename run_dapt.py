"""Domain-adaptive pre-training (DAPT): masked video modelling on unlabelled driving video, from published weights.

One GPU, or the CPU where there is none; 800 clips per step as published, in forward passes of 100:
    python run_dapt.py --model pretrain_videomae_small_patch16_224 --from_ckpt videomae_vit_s_k400_1600e_pretrain.pth \\
        --data_set BDD100K --data_path /data/bdd100k/videos --batch_size 100 --update_freq 8 --output_dir runs/dapt_s

One machine, N GPUs, a mix of data sets, 240 clips of the first and 160 of the second per GPU and step:
    torchrun --standalone --nproc_per_node=N run_dapt.py --data_set BDD100K CAP-DATA \\
        --data_path /data/bdd100k/videos /data/CAP-DATA --batch_size 240 160 ...

Several machines, on each of them:
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 run_dapt.py ...
They share OUTPUT_DIR. GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: network interfaces, where they do not find each other.

Then fine-tune from it: run_finetune.py --finetune runs/dapt_s/checkpoint-11.pth ...

Probe the encoder on labelled clips between epochs, and keep the best weights by that: --probe_data_path /data/DoTA

The same command again continues an interrupted run from OUTPUT_DIR/checkpoint-last.
"""

from utils.exits import fail, report_uncaught

if __name__ == "__main__":  # first, so that what follows is answered in a line
    report_uncaught()

from utils.cli import ConfigError, config_errors
from utils.flags import dapt_parser
from utils.lock import end_with_torchrun, folder_lock
from utils.record import Changeable
from utils.resolve import (
    INPUT,
    common_flags,
    fill_from_config,
    fill_unset,
    keep_history,
    leave_gpus_alone,
    refuse_contradictions,
    resolve_probe,
    resolve_runtime,
    resolve_schedule,
    split_batch,
)
from utils.signals import catch_signals, remove_marker

if __name__ == "__main__":  # before torch is imported: --help and a misspelt flag answer at once
    ARGS = dapt_parser(__doc__).parse_args()
    leave_gpus_alone(ARGS.device)
    catch_signals()
    end_with_torchrun()

import logging
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import set_fused_attn
from torch import nn

from datasets import DataError, VideoScan, build_clips, find_data_set, find_data_sets
from datasets.augment.dapt import PretrainTransform
from datasets.augment.device import DeviceAugment, DeviceLoader
from datasets.augment.frames import EvalTransform
from datasets.augment.masks import masked_places
from datasets.batches import BatchLoader, example_batch
from datasets.faults import CountedBatches, read_bad_clips, warn_unmatched
from datasets.loader import EpochSampler, Source, WindowDataset
from datasets.probe import choose_windows
from datasets.slots import reserve
from datasets.stream import SplitWindows
from datasets.windows import index_clips
from engine.checkpoint import CheckpointWriteError, Progress, RunState, is_kept, save_weights
from engine.dapt import DaptObjective, Pictures
from engine.evaluate import EvaluationError
from engine.guard import TrainingError
from engine.health import BEST, Health
from engine.loop import Reporting, train_epochs
from engine.optim import DTYPES, Optimization, Schedule, build_optimization
from engine.resume import agreed_state, recorded_arguments
from engine.session import Session, start_session
from models import create_model, masked_autoencoder_of, model_defaults
from models.mae import MaskedAutoencoder
from models.weights import CheckpointError, fetch, load_pretrained, read_hints, read_spec
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
SPEC = ("model", *INPUT, "gelu", "decoder_depth", "normalize_target", "mean", "std")  # what a weights file answers
PICTURES = 4  # clips drawn after each epoch
logger = logging.getLogger("tad")


def main(args: Namespace) -> None:
    """Pre-train."""
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
        pretrain(args, process)


def resolve_spec(args: Namespace, process: Process) -> None:
    """Take what of SPEC was left open from the run to continue, else from what --from_ckpt says of itself.

    Raises ConfigError where a flag contradicts the weights file, unless --override_spec is given.
    """
    resuming = {"auto_resume": args.auto_resume, "resume": args.resume}
    recorded = from_main(lambda: recorded_arguments(args.output_dir, **resuming))
    fill_unset(args, recorded, SPEC)  # where there is none, what is no flag becomes None
    if recorded or not args.from_ckpt:
        return
    with local_main_first(process):  # one download per node
        path = fetch(args.from_ckpt)
    if (spec := read_spec(path)) is None:
        fill_from_config(args, read_hints(path), SPEC, args.from_ckpt)
        return
    try:
        spec["model"] = masked_autoencoder_of(spec["model"])
    except ValueError as e:
        raise CheckpointError(f"{args.from_ckpt}: its spec is for another version of this code: {e}") from e
    refuse_contradictions(args, spec, ("model", *INPUT, "gelu", "decoder_depth", "normalize_target"), args.from_ckpt)
    fill_unset(args, spec, SPEC)


def resolve(args: Namespace, world_size: int) -> None:
    """Replace what was left open by the value it stands for, so that args.json holds what was used."""
    args.model = args.model or "pretrain_videomae_base_patch16_224"
    with config_errors():
        defaults = model_defaults(args.model)
    if not args.model.startswith("pretrain_"):
        raise ConfigError(f"{args.model} is a classifier; DAPT takes a pretrain_ model: give another --model, or, "
                          f"if {args.output_dir} holds a run of fine-tuning, another --output_dir")  # fmt: skip
    pixels = {"mean": list(defaults.mean), "std": list(defaults.std)}
    fill_unset(args, vars(defaults) | pixels, (*INPUT, *pixels))
    args.normalize_target = args.normalize_target is not False
    if args.stop_epoch is None:
        args.stop_epoch = min(12, args.epochs)
    resolve_schedule(args)
    args.short_side = args.short_side or round(args.input_size * 320 / 224)
    args.scan_cache = args.scan_cache or str(Path(args.output_dir, "videos.json"))
    resolve_probe(args)
    args.probe_split = args.probe_split or find_data_set(args.probe_data_set).splits[0]
    probed = [args.probe_data_set] if args.probe_every else []
    sets = find_data_sets([*args.data_set, *probed], args.assume_fps)[: len(args.data_set)]
    args.sampling_rate = args.sampling_rate or [s.dapt_stride for s in sets]
    args.data_split = args.data_split or [s.dapt_split for s in sets]
    per_set = ("data_path", "sampling_rate", "data_split", "batch_size", "total_batch_size")
    for name in (name for name in per_set if getattr(args, name)):
        if len(getattr(args, name)) != len(sets):
            raise ConfigError(f"--{name} has {len(getattr(args, name))} values for {len(sets)} data sets")
    if len(sets) > 1 and not args.batch_size and not args.total_batch_size:
        raise ConfigError("a mix needs the share of each data set: --batch_size or --total_batch_size")
    parts = {"default": 800, "world_size": world_size, "update_freq": args.update_freq}
    unset = [None] * len(sets)
    batches = [
        split_batch(total, per_process, **parts)
        for total, per_process in zip(args.total_batch_size or unset, args.batch_size or unset, strict=True)
    ]
    args.batch_size, args.total_batch_size = ([batch[i] for batch in batches] for i in (0, 1))
    shares = " + ".join(f"{size} of {name}" for size, name in zip(args.total_batch_size, args.data_set, strict=True))
    logger.info(f"clips per step: {shares}")


def pretrain(args: Namespace, process: Process) -> None:
    """Run the DAPT recipe, top to bottom."""
    output_dir = Path(args.output_dir)
    remove_marker(output_dir)
    changeable = Changeable.by(dapt_parser(""), args.override)
    resuming = {"auto_resume": args.auto_resume, "resume": args.resume}
    resumed = agreed_state(output_dir, **resuming, record=vars(args), changeable=changeable)
    keep_history(args, resumed)
    model = build_model(args, process, resumed)
    seed_everything(args.seed + process.rank)  # ranks share their weights, not their dropout
    dataset = build_dataset(args, model)
    sampler = build_sampler(args, dataset, process.rank, process.world_size)
    batches = CountedBatches(build_loader(args, dataset, sampler, process.device), limit=args.max_bad_samples)
    health = build_health(args, process) if args.probe_every else None
    tables = [source.clips for source in dataset.sources] + ([health.windows.clips] if health else [])
    warn_unmatched(read_bad_clips(args.bad_clips or ()), tables)
    ddp_model = data_parallel(model, process)
    progress = Progress(
        epoch=args.start_epoch, num_windows=sampler.num_windows, steps_per_epoch=sampler.steps_per_epoch
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
    train_epochs(
        ddp_model,
        batches,
        sampler.set_epoch,
        DaptObjective(model),
        session,
        Reporting(sum(args.total_batch_size), args.print_freq, process.is_main),
        stop_epoch=args.stop_epoch,
        after_epoch=epoch_end(args, model, dataset, batches, health, session),
    )
    session.tensorboard.close()
    batches.log_summary()
    early = ", as --stop_epoch says" if args.stop_epoch < args.epochs else ""
    logger.info(f"{progress.epoch} of {args.epochs} epochs done{early}; see {output_dir}")
    if args.save_ckpt:
        best = f", or checkpoint-best_{BEST}.pth there" if health else ""
        last = f"{output_dir}/checkpoint-{progress.epoch - 1}.pth"
        logger.info(f"to fine-tune it: run_finetune.py --finetune {last}{best}")


def epoch_end(
    args: Namespace,
    model: MaskedAutoencoder,
    dataset: WindowDataset,
    batches: CountedBatches,
    health: Health | None,
    session: Session,
) -> Callable[[], dict[str, Any]]:
    """Return what is done at the end of each epoch; probe the weights that the run starts from."""
    process, progress, output_dir = session.process, session.progress, session.output_dir
    pictures = None
    if process.is_main:
        reading = {"num_workers": args.num_workers, "read_timeout": args.read_timeout}
        batch, names = example_batch(dataset, PICTURES, **reading)
        video = DeviceAugment(args.input_size)(batch["video"], batch)
        pictures = Pictures(output_dir / "pictures", session.tensorboard, names, video=video, mask=batch["mask"])

    def keep(name: str, **about: Any) -> None:
        if args.save_ckpt and process.is_main:
            save_weights(output_dir / f"checkpoint-{name}.pth", model, data_set=args.data_set, **about)

    def due(every: int) -> bool:
        return is_kept(progress.epoch, stop_epoch=args.stop_epoch, every=every)

    def after_epoch() -> dict[str, Any]:
        if pictures:
            pictures.draw(model, process.device, progress.epoch, step=progress.steps_done)
        if due(args.save_ckpt_freq):
            keep(str(progress.epoch), epoch=progress.epoch)
        record: dict[str, Any] = {}
        if health:
            record, is_best = health.after_epoch(model.encoder, session, due=due(args.probe_every))
            if is_best:
                keep(f"best_{BEST}", epoch=progress.epoch)
        return batches.end_epoch() | record

    if health and health.before_training(model.encoder, session):
        keep(f"best_{BEST}")
        session.save()  # so that no run that goes on probes them again
    return after_epoch


def build_model(args: Namespace, process: Process, resumed: dict[str, Any] | None) -> MaskedAutoencoder:
    """Return the masked autoencoder on its device, with --from_ckpt loaded or ready for a resumed state."""
    with config_errors():
        model = create_model(
            args.model,
            num_frames=args.num_frames,
            view_fps=args.view_fps,
            input_size=args.input_size,
            tubelet_size=args.tubelet_size,
            gelu=args.gelu,
            decoder_depth=args.decoder_depth,
            drop_path_rate=args.drop_path,
            normalize_target=args.normalize_target,
            mean=args.mean,
            std=args.std,
        )
        masked_places(model.grid, args.mask_ratio)
    if args.pos_embed == "sincos" and model.pos_embed_kind == "learned":
        raise ConfigError(f"--pos_embed sincos: {args.model} has a learned position table alone")
    if args.from_ckpt and not resumed:
        with local_main_first(process):  # one download per node
            path = fetch(args.from_ckpt)
        where = {"model_key": args.model_key, "model_prefix": args.model_prefix or "", "table_grid": args.table_grid}
        report = load_pretrained(model, path, stored_table=args.pos_embed != "sincos", **where)
        require_same_weights(model, report.loaded, f"--from_ckpt {args.from_ckpt}")
        logger.info(report)
        if report.missing:
            logger.warning(f"{args.from_ckpt} has no decoder that predicts pixels: it starts from random weights")
    elif not resumed:
        logger.warning(f"no --from_ckpt: {args.model} starts from random weights")
    if args.pos_embed == "learned" or (resumed and "encoder.pos_embed" in resumed["model"]):
        with config_errors():
            model.encoder.learn_pos_embed()
    model.set_grad_checkpointing(args.use_checkpoint)
    model.to(process.device)
    if args.compile:
        model.compile()
    return model


def build_dataset(args: Namespace, model: MaskedAutoencoder) -> WindowDataset:
    """Return the windows of every data set of the mix, each with its augmentation."""
    scan = VideoScan(args.scan_cache, workers=args.num_workers, read_timeout=args.read_timeout)
    bad_clips = read_bad_clips(args.bad_clips or ())
    sources = []
    for name, path, split, stride in zip(
        args.data_set, args.data_path, args.data_split, args.sampling_rate, strict=True
    ):
        clips = from_main(partial(build_clips, name, path, split, scan, args.assume_fps, leave_out=bad_clips))
        defaults = find_data_set(name)
        aligned = args.transforms_finetune_align
        aligned = defaults.dapt_aligned if aligned is None else aligned
        if not aligned and any(clip.aspect for clip in clips):
            logger.warning(f"{clips}: unaligned clips are cropped from frames as filmed, and this pack holds them "
                           "squashed, so they are stretched and blurred: pack them without --squash")  # fmt: skip
        with config_errors():
            window = {"num_frames": args.num_frames, "view_fps": args.view_fps, "stride": stride}
            index = index_clips(clips, **window, unlabelled=True)
            transform = PretrainTransform(
                args.input_size,
                grid=model.grid,
                mask_ratio=args.mask_ratio,
                short_side=args.short_side,
                enlarge=defaults.dapt_enlarge,
                aligned=aligned,
                aa=args.aa,
                decoding=args.decoding,
                here=args.augment_on == "worker",
            )
        sources.append(Source(clips, index, transform))
    return WindowDataset(sources, seed=args.seed, targets=False)


def build_health(args: Namespace, process: Process) -> Health:
    """Return the linear probe on a few windows of labelled clips."""
    scan = VideoScan(args.scan_cache, workers=args.num_workers, read_timeout=args.read_timeout)
    source = (args.probe_data_set, args.probe_data_path, args.probe_split, scan, args.assume_fps)
    bad = read_bad_clips(args.bad_clips or ())
    clips = from_main(partial(build_clips, *source, leave_out=bad))
    clips.require_labels()
    with config_errors():
        index = choose_windows(clips, args.probe_windows, num_frames=args.num_frames, view_fps=args.view_fps)
    windows = SplitWindows(
        clips,
        index,
        EvalTransform(args.input_size),
        device=process.device,
        batch_size=args.eval_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        allow_missing=True,
        read_timeout=args.read_timeout,
    )
    reserve(windows.slots)
    return Health(windows, Path(args.output_dir, "pictures"), DTYPES[args.precision])


def build_sampler(args: Namespace, dataset: WindowDataset, rank: int, world_size: int) -> EpochSampler:
    """Return the order of the clips, with each data set's share of every batch."""
    return EpochSampler(
        [len(source.index) for source in dataset.sources],
        batch_sizes=args.batch_size,
        accumulate=args.update_freq,
        rank=rank,
        world_size=world_size,
        samples_per_epoch=args.nb_samples_per_epoch,
        seed=args.seed,
        together=args.windows_per_read,
        apart=[source.index.windows_apart for source in dataset.sources],
    )


def build_loader(args: Namespace, dataset: WindowDataset, sampler: EpochSampler, device: torch.device) -> DeviceLoader:
    """Return the batches of the sampler, augmented on the device, with the memory that they take."""
    loader = BatchLoader(
        dataset,
        sampler,
        num_workers=args.num_workers,
        together=args.windows_per_read > 1,
        pin_memory=args.pin_mem,
        read_timeout=args.read_timeout,
    )
    reserve(loader.slots)
    return DeviceLoader(loader, device, DeviceAugment(args.input_size))


def optimization_of(args: Namespace, model: nn.Module, steps_per_epoch: int) -> Optimization:
    """Return the Optimization of the command line."""
    with config_errors():
        schedule = Schedule(
            epochs=args.epochs,
            steps_per_epoch=steps_per_epoch,
            lr=args.lr,
            min_lr=args.min_lr,
            warmup_epochs=args.warmup_epochs,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            weight_decay_end=args.weight_decay_end,
        )
        return build_optimization(
            model,
            schedule,
            clips_per_step=sum(args.total_batch_size),
            opt=args.opt,
            opt_eps=args.opt_eps,
            opt_betas=args.opt_betas,
            accumulate=args.update_freq,
            clip_grad=args.clip_grad,
            dtype=DTYPES[args.precision],
        )


if __name__ == "__main__":
    try:
        main(ARGS)
    except ERRORS as e:
        fail(f"error: {e}")
