"""One process or many: torchrun's environment in, a `Process` out. The collectives are no-ops in a single process."""

import inspect
import os
import random
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

from utils.config import ConfigError


@dataclass(frozen=True)
class Process:
    """This process among `world_size`: its global rank, its rank on the node, its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0, the one that writes files."""
        return self.rank == 0


@contextmanager
def process_group(device: str, timeout: timedelta = timedelta(minutes=30)) -> Iterator[Process]:
    """Join the group that torchrun announces in the environment (NCCL on CUDA, gloo on the CPU); leave it at the end.

    Without torchrun: a single process. device: "cuda" or "cpu". Raises ConfigError where CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    launched = "WORLD_SIZE" in os.environ
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    own = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(own)
    if launched:
        backend, bound = ("nccl", own) if device == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    yield Process(rank, local_rank, world_size, own)
    if launched:  # not after an exception: leaving could wait for ranks that wait for this one
        dist.destroy_process_group()


def data_parallel(model: nn.Module, process: Process) -> nn.Module:
    """DistributedDataParallel over the process group, or the model itself in a single process.

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


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list | None:
    """[value of rank 0, of rank 1, ...] on rank 0, None on the others. Values are pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value, on every rank. Values are pickled. group: of all ranks, if not the usual one."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def from_main(build: Callable[[], Any], timeout: timedelta = timedelta(days=1)) -> Any:
    """What build() returns on rank 0, on every rank; where it raises there, every rank raises it.

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
