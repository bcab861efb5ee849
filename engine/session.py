"""What accompanies the training of a run, begun afresh or continued: records, saving and stopping."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine.averages import Averages
from engine.checkpoint import Part, claim, restore, save_last
from engine.guard import NonFinite, Progress
from engine.optim import Optimization
from utils.distributed import Agreement, Process
from utils.logging import TensorBoard
from utils.signals import Preemption


@dataclass(frozen=True)
class Session:
    """statistics: of the epoch in progress. log_file: gets a line of JSON for each epoch; None: no file."""

    progress: Progress
    statistics: Averages
    tensorboard: TensorBoard
    guard: NonFinite
    preemption: Preemption
    log_file: Path | None = None


def start(
    output_dir: Path,
    process: Process,
    model: nn.Module,
    optimization: Optimization,
    progress: Progress,
    samples: Part,
    *,
    resumed: Mapping[str, Any] | None,
    record: Mapping[str, Any],
    log_dir: str,
    auto_resume: bool,
    save_ckpt: bool,
    save_every_minutes: float | None,
    max_nonfinite: int,
) -> Session:
    """Continue from `resumed`, if there is such a state, and make output_dir this run's; every rank calls it.

    Args:
        model: unwrapped; it, optimization, progress and samples are set to the state. samples: counts of this rank.
        resumed: of `find_resume`. record: the run's arguments. log_dir: of TensorBoard.
        auto_resume: whether the same command would continue the run. save_ckpt: whether to keep states.
        save_every_minutes: how often, beside after each epoch. max_nonfinite: steps in a row that end the run.

    Raises ConfigError where the data is not that of the state, or a folder cannot be written.
    """
    parts = {"statistics": Averages(), "samples": samples}
    if resumed:
        restore(resumed, model, optimization, progress, parts=parts, rank=process.rank, world_size=process.world_size)
    if process.is_main:  # only now: a command that fails before it trains leaves its folder free
        claim(output_dir, progress, record=record, world_size=process.world_size)
    tensorboard = TensorBoard(log_dir if process.is_main else None, progress.steps_done)
    guard = NonFinite(progress, output_dir / "nonfinite.jsonl" if process.is_main else None, limit=max_nonfinite)

    def save() -> None:
        guard.read()
        save_last(output_dir, model, optimization, progress, parts=parts, record=record)

    preemption = Preemption(
        output_dir,
        Agreement(process, questions=2),
        save if save_ckpt else None,
        is_main=process.is_main,
        auto_resume=auto_resume,
        save_every_minutes=save_every_minutes,
    )
    log_file = output_dir / "log.txt" if process.is_main else None
    return Session(progress, parts["statistics"], tensorboard, guard, preemption, log_file)
