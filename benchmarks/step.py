"""Clips per second and memory of training steps, on clips that are at hand: the table of a GPU is this one command.

    python -m benchmarks.step --device cuda --compile [--json]

Each model is fine-tuned and, under a mask, pre-trained, eager and with --compile also compiled, with and without
--use_checkpoint, by the loop and the objectives of the run scripts. "peak" is the share of the arithmetic that this
device reaches in the product of two large matrices, measured first; the operations of a step are counted without what
--use_checkpoint computes again. Memory of a clip is the difference between a batch and one half as large. From it come
the largest batches of 8, 24 and 80 GB, a tenth kept free, as commands; try them, fragmentation is not foreseen.

On a CPU tiny models in fp32 stand in, and memory is not measured.
"""

import gc
import itertools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._common import parser_of, print_results, table
from datasets.augment.device import NormalizeAndErase
from datasets.augment.masks import tube_mask
from engine.checkpoint import Progress, RunState
from engine.dapt import DaptObjective
from engine.finetune import FinetuneObjective
from engine.guard import NonFinite
from engine.loop import Objective, Reporting, train_one_epoch
from engine.losses import LOSSES
from engine.optim import DTYPES, Schedule, build_optimization
from engine.session import Session
from models import create_model, masked_autoencoder_of, model_defaults
from utils.cli import from_to, positive
from utils.distributed import Process
from utils.logging import TensorBoard

CARDS = (8, 24, 80)  # GB
SCRIPTS = {"finetune": "run_finetune.py", "dapt": "run_dapt.py"}
MODELS = {
    "cuda": ["vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"],
    "cpu": ["vit_tiny_patch16_64"],
}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product of two square matrices, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(name: str, task: str) -> tuple[nn.Module, Objective]:
    """Return a model and what it is trained on: "finetune" a classifier, or "dapt" its masked autoencoder."""
    if task == "dapt":
        model = create_model(masked_autoencoder_of(name))
        return model, DaptObjective(model)
    model = create_model(name)
    return model, FinetuneObjective(LOSSES["crossentropy"], NormalizeAndErase(model.normalize))


def batch_of(name: str, model: nn.Module, count: int, device: torch.device) -> dict[str, Any]:
    """Return count clips of noise as a loader hands them over: the video on the device, all else on the CPU."""
    video = model_defaults(name)
    shape = (count, 3, video.num_frames, video.input_size, video.input_size)
    batch = {"video": torch.randint(256, shape, dtype=torch.uint8, device=device), "weight": 1.0}
    masks = [tube_mask(model.grid, 0.75, np.random.default_rng(seed)) for seed in range(count)]
    batch["mask"] = torch.from_numpy(np.stack(masks))
    batch |= {"boxes": torch.zeros(count, 1, 4, dtype=torch.int64), "seed": torch.zeros(count, dtype=torch.int64)}
    labels = torch.arange(count) % 2
    return batch | {"label": labels, "soft_label": labels.float(), "ttc": torch.zeros(count)}


def flops_of_clip(name: str, task: str, device: torch.device) -> int:
    """Return the operations of a clip, forward and backward; 2 for a multiplication and an addition."""
    model, objective = build(name, task)
    batch = batch_of(name, model.to(device), 1, device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not see into other kernels
        objective(model, batch)[0].backward()
    return counter.get_total_flops()


class Reports(TensorBoard):
    """Keeps what the loop last reported of its performance."""

    def __init__(self):
        super().__init__(None)
        self.performance: dict[str, float] = {}

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        if group == "perf":
            self.performance = dict(values)


class Trainer:
    """A model in training on one batch, again and again.

    Args:
        count: clips of the batch.
        compiled: whether the model is compiled.
        recompute: whether blocks are computed again in the backward pass (--use_checkpoint).
    """

    def __init__(
        self, name: str, task: str, count: int, device: torch.device, precision: str, *, compiled: bool, recompute: bool
    ):
        self.model, self.objective = build(name, task)
        self.model.set_grad_checkpointing(recompute)
        self.model.to(device)
        if compiled:
            self.model.compile()
        self.count, self.device, self.batch = count, device, batch_of(name, self.model, count, device)
        schedule = Schedule(epochs=1, steps_per_epoch=1000, lr=1e-4, min_lr=1e-6, warmup_epochs=0, warmup_steps=1,
                            weight_decay=0.05, weight_decay_end=0.05)  # fmt: skip
        optimization = build_optimization(
            self.model, schedule, clips_per_step=count, opt="adamw", opt_eps=1e-8, opt_betas=(0.9, 0.95),
            dtype=DTYPES[precision],
        )  # fmt: skip
        progress = Progress()
        state, process = RunState(self.model, optimization, progress), Process(0, 0, 1, device)
        self.reports = Reports()
        self.session = Session(Path(), state, process, self.reports, NonFinite(progress), save_ckpt=False)

    def seconds(self, steps: int) -> float:
        """Return the wall seconds of so many steps."""
        progress = self.session.progress
        progress.step, progress.steps_per_epoch = 0, steps
        started = time.perf_counter()
        batches = itertools.repeat(self.batch)
        train_one_epoch(self.model, batches, self.objective, self.session, Reporting(self.count, log_every=steps))
        _wait(self.device)
        return time.perf_counter() - started


def measure(
    name: str, task: str, count: int, device: torch.device, precision: str, *, steps: int, **how: bool
) -> tuple[float, int] | None:
    """Return clips per second, the best of three, and the bytes of the largest moment (CUDA, else 0).

    None where memory does not do. how: of Trainer.
    """
    gc.collect()
    torch.compiler.reset()  # else what was compiled for other models counts against a limit
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        trainer = Trainer(name, task, count, device, precision, **how)
        trainer.seconds(3)  # compiles, chooses kernels
        rate = count * steps / min(trainer.seconds(steps) for _ in range(3))
    except torch.OutOfMemoryError:
        return None
    return rate, int(trainer.reports.performance.get("mem_gib", 0) * 2**30)


def largest_batch(count: int, peak: int, half_peak: int, gigabytes: int) -> int:
    """Return the clips that fit into a card, a tenth of it kept free, from the peaks of count and count // 2 clips."""
    of_clip = (peak - half_peak) / (count - count // 2)
    return max(0, int((0.9e9 * gigabytes - (peak - count * of_clip)) / of_clip))


def command(name: str, task: str, count: int, *, compiled: bool, recompute: bool) -> str:
    """Return the command line that trains with such a batch; a data set is to be added."""
    model = name if task == "finetune" else masked_autoencoder_of(name)
    flags = " --compile" * compiled + " --use_checkpoint" * recompute
    return f"python {SCRIPTS[task]} --model {model} --batch_size {count}{flags}"


def rows_of(name: str, task: str, arguments: Mapping[str, Any], peak: float, compiled: bool) -> list[dict[str, Any]]:
    """Return what is printed of a model and a task: a row without and one with --use_checkpoint."""
    rows, flops, count = [], flops_of_clip(name, task, arguments["device"]), arguments["count"]
    for recompute in (False, True):
        how = {"compiled": compiled, "recompute": recompute}
        full = measure(name, task, **arguments, **how)
        half = measure(name, task, **arguments | {"count": count // 2, "steps": 1}, **how) if full and full[1] else None
        row = {"model": name, "task": task, "batch": count} | how
        row |= {"clips/s": full and round(full[0], 3), "peak %": full and round(100 * full[0] * flops / peak, 1)}
        row |= {"GB": full[1] / 1e9, "MB a clip": (full[1] - half[1]) / 1e6 / (count - count // 2)} if half else {}
        row = dict.fromkeys(("model", "task", "batch", *how, "clips/s", "peak %", "GB", "MB a clip")) | row
        fits = [largest_batch(count, full[1], half[1], card) if half else None for card in CARDS]
        rows.append(row | {f"batch in {card} GB": fit for card, fit in zip(CARDS, fits, strict=True)})
        print(rows[-1], file=sys.stderr, flush=True)  # the table of large models takes long
    return rows


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=MODELS, default=default, help="(default: cuda where there is one)")
    parser.add_argument("--models", nargs="+", help="classifiers (default: S, B, L on CUDA, a tiny one on the CPU)")
    parser.add_argument("--precision", choices=DTYPES, help="(default: bf16 on CUDA, fp32 on the CPU)")
    parser.add_argument("--batch_size", type=from_to(2, 4096), default=16, help="clips of a step (default: 16)")
    parser.add_argument("--steps", type=positive, default=10, help="of a measurement (default: 10)")
    parser.add_argument("--compile", action="store_true", help="measure compiled models, too")
    args = parser.parse_args()
    device, precision = torch.device(args.device), args.precision or {"cuda": "bf16", "cpu": "fp32"}[args.device]
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as the run scripts have it
    peak, rows = matmul_peak(device, DTYPES[precision]), []
    arguments = {"count": args.batch_size, "device": device, "precision": precision, "steps": args.steps}
    for name in args.models or MODELS[args.device]:
        for task in SCRIPTS:
            for compiled in (False, True) if args.compile else (False,):
                rows += rows_of(name, task, arguments, peak, compiled)
    text = f"Steps in {precision}; matrices multiply at {peak / 1e12:.4g} TFLOP/s:\n\n{table(rows)}"
    for row in rows:
        for card in CARDS:
            if count := row[f"batch in {card} GB"]:
                flags = {flag: row[flag] for flag in ("compiled", "recompute")}
                text += f"\n\n    {command(row['model'], row['task'], count, **flags)}  # {card} GB"
    if device.type == "cpu":
        text += "\n\nNo GPU: memory, and so the largest batches, are not measured."
    print_results(text, {"matmul_flops": peak, "precision": precision, "steps": rows}, as_json=args.json)


if __name__ == "__main__":
    main()
