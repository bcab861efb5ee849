"""One process or many: torchrun's environment in, a `Process` out. The collectives are no-ops in a single process."""

import inspect
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.cli import ConfigError
from utils.exits import report, say_cause

# What gloo and NCCL say when another process is gone or late.
_LOST = r"timed out|timeout|connection (closed|reset)|broken pipe|ncclRemoteError"


@dataclass(frozen=True)
class Process:
    """This process among `world_size`: its global rank, its rank on the node, its device.

    timeout: for how long it waits for the others.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)

    @property
    def is_main(self) -> bool:
        """Rank 0, the one that writes files."""
        return self.rank == 0


@contextmanager
def process_group(device: str, *, timeout: timedelta, expected: tuple[type[Exception], ...] = ()) -> Iterator[Process]:
    """Join the group that torchrun announces in the environment (NCCL on CUDA, gloo on the CPU); leave it at the end.

    Without torchrun: a single process. An exception is reported before the group ends, because that makes the others
    fail; then the process exits with code 1, and torchrun ends the others. On CUDA, float32 matrices are multiplied in
    TF32 from here on.

    Args:
        device: "cuda" or "cpu". timeout: of every wait for the others. expected: exceptions whose message says all.

    Raises ConfigError where CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    cuda_or_cpu = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    process = Process(rank, local_rank, world_size, cuda_or_cpu, timeout)
    if device == "cuda":
        torch.cuda.set_device(cuda_or_cpu)
        torch.set_float32_matmul_precision("high")  # TF32
    if "WORLD_SIZE" not in os.environ:
        yield process
        return
    backend, bound = ("nccl", cuda_or_cpu) if device == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timeout, device_id=bound)
    together = False  # whether the others leave now, too
    try:
        yield process
        together = True
    except SystemExit:  # agreed upon
        together = True
        raise
    except Exception as e:
        _report(e, process, expected)
        sys.exit(1)
    finally:
        _leave(together)


def _report(error: Exception, process: Process, expected: tuple[type[Exception], ...]) -> None:
    """Say why this process ends: an expected error, the loss of the others, or a traceback."""
    prefix = "" if process.is_main else f"[rank {process.rank}] "
    if isinstance(error, expected):
        say_cause(f"error: {error}")
    elif isinstance(error, RuntimeError) and re.search(_LOST, str(error), re.IGNORECASE):
        reason = str(error).strip().splitlines()[0]
        say_cause(
            "error: lost the other processes: one has ended, or did not come within --dist_timeout "
            f"{process.timeout.total_seconds() / 60:g} minutes ({reason})",
            consequence=True,
        )
    else:
        report(error, prefix)


def _leave(together: bool) -> None:
    """End the process group. Alone, NCCL's is aborted: destroying it would wait for the others, and they for this one.

    That of gloo ends without waiting.
    """
    if together or dist.get_backend() == "gloo":
        dist.destroy_process_group()
    elif abort := getattr(dist.distributed_c10d, "_abort_process_group", None):  # experimental, not in every torch
        abort()


def data_parallel(model: nn.Module, process: Process) -> nn.Module:
    """Return DistributedDataParallel over the process group, or the model itself in a single process.

    Buffers are not sent around at every pass: ours are constants. Nor are inputs moved: they are where they should be.
    """
    if process.world_size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.15
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{option: False})


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list | None:
    """Return [value of rank 0, of rank 1, ...] on rank 0, None on the others. Values are pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's value, on every rank. Values are pickled. group: of all ranks, if not the usual one."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def from_main(build: Callable[[], Any], timeout: timedelta = timedelta(days=1)) -> Any:
    """Return what build() returns on rank 0, on every rank; where it raises there, every rank raises it.

    The others wait for up to `timeout`, longer than collectives do elsewhere.
    """
    if not dist.is_initialized():
        return build()
    group = dist.new_group(backend="gloo", timeout=timeout)
    outcome: tuple[Any, Exception | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (build(), None)
        except Exception as e:
            outcome = (None, e)
    value, error = broadcast(outcome, group)
    if error:
        raise error
    return value


class Agreement:
    """Yes-no questions to all processes: asked at one point of a run, answered at a later one.

    They travel through the CPU, between the steps of a GPU: whoever asks does not wait, and the answer has usually
    arrived when it is fetched. Every process must ask and fetch at the same points. A single process agrees with
    itself.
    """

    def __init__(self, process: Process, questions: int):
        self._votes = torch.zeros(questions, dtype=torch.int32)
        self._group = dist.new_group(backend="gloo", timeout=process.timeout) if dist.is_initialized() else None
        self._work: dist.Work | None = None

    def ask(self, *votes: bool) -> None:
        """Give this process's vote on each question."""
        self._votes = torch.tensor(votes, dtype=torch.int32)
        if self._group:
            self._work = dist.all_reduce(self._votes, dist.ReduceOp.MAX, self._group, async_op=True)

    def answer(self) -> tuple[bool, ...]:
        """Return whether any process voted yes, for each question last asked, once; all no if none is open.

        Waits for processes that have not asked yet; raises RuntimeError where they do not within the timeout.
        """
        if self._work:
            self._work.wait()
            self._work = None
        answers = tuple(bool(vote) for vote in self._votes)
        self._votes = torch.zeros_like(self._votes)
        return answers


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def local_main_first(process: Process) -> Iterator[None]:
    """Let the first process of each node do the body (a download, say) before the others."""
    if process.local_rank != 0:
        barrier()
    yield
    if process.local_rank == 0:
        barrier()
