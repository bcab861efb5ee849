"""One process or many: torchrun's environment in, a `Process` out. The collectives are no-ops in a single process."""

import fcntl
import inspect
import json
import os
import random
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from utils.text import first_few

_PATIENCE = timedelta(days=1)  # of ranks that wait for one that scans or downloads
_patient: dist.ProcessGroup | None = None  # all ranks; formed where they meet, since that waits for its timeout, too
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
def process_group(
    device: str,
    *,
    timeout: timedelta,
    expected: tuple[type[Exception], ...] = (),
    same: Mapping[str, Any] | None = None,
) -> Iterator[Process]:
    """Join the group that torchrun announces in the environment (NCCL on CUDA, gloo on the CPU); leave it at the end.

    Without torchrun: a single process. An exception is reported before the group ends, because that makes the others
    fail; then the process exits with code 1, and torchrun ends the others. On CUDA, float32 matrices are multiplied in
    TF32 from here on.

    Args:
        device: "cuda" or "cpu". timeout: of every wait for the others. expected: exceptions whose message says all.
        same: what every process must have been started with, by name, in plain types.

    Raises ConfigError where CUDA is asked for and absent, the environment announces no group that can be, or processes
    differ in `same`.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    rank, local_rank, world_size = _announced()
    cuda_or_cpu = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    process = Process(rank, local_rank, world_size, cuda_or_cpu, timeout)
    if device == "cuda":
        torch.cuda.set_device(cuda_or_cpu)
        torch.set_float32_matmul_precision("high")  # TF32
    if "WORLD_SIZE" not in os.environ:
        yield process
        return
    try:
        _join(process, same or {})
    except RuntimeError as e:
        _report(e, process, expected)
        sys.exit(1)
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


def _announced() -> tuple[int, int, int]:
    """Return the global rank, that on the node and the number of processes, by the environment; 0, 0, 1 without them.

    Raises ConfigError where some of what torchrun sets is missing, or no such number.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    said = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "MASTER_ADDR": "", **os.environ}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    odd = [f"{name} is {said.get(name, '')!r}" for name in names if not re.fullmatch("[0-9]{1,9}", said.get(name, ""))]
    odd += ["MASTER_ADDR is ''"] if not said["MASTER_ADDR"] else []
    rank, size, local_rank, local_size = (0, 1, 0, 1) if odd else (int(said[name]) for name in names[:4])
    if not odd and not (rank < size and local_rank < local_size <= size):
        odd = [f"{name} is {said[name]}" for name in names[:4]]
    if odd:
        raise ConfigError(
            f"the environment has WORLD_SIZE, which torchrun sets, but {', '.join(odd)}: start this by torchrun, or "
            "unset WORLD_SIZE for a single process"
        )
    return rank, local_rank, size


def _join(process: Process, same: Mapping[str, Any]) -> None:
    """Meet the others, compare `same` with theirs before anything depends on it, and form the group."""
    if process.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size)):
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface and interface != "lo":  # else gloo takes that of the host's name, which may be lo
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=process.timeout))
    store.set(f"same/{rank}", json.dumps((socket.gethostname(), dict(same))))
    if rank == 0:
        rows = [json.loads(store.get(f"same/{other}")) for other in range(world_size)]
        store.set("same", _difference(rows) or "")
    if difference := store.get("same").decode():
        raise ConfigError(difference)
    backend, bound = ("nccl", process.device) if process.device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=process.timeout, device_id=bound
    )
    global _patient
    _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)


def interface_towards(host: str) -> str | None:
    """Return the name of the network interface by which a host is reached; None where IPv4 does not tell."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 1))  # sends nothing
        except OSError:
            return None
        address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR, netdevice(7)
                if request[20:24] == address:
                    return name
    return None


def require_same(values: Mapping[str, Any]) -> None:
    """Compare values, in plain types, with those of the other ranks; every rank calls it.

    Raises ConfigError, on every rank, that names what differs, and where.
    """
    rows = gather((socket.gethostname(), dict(values)))
    if difference := broadcast(_difference(rows) if rows else None):
        raise ConfigError(difference)


def _difference(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
    """Say in what the first rank that differs from rank 0 does so. rows: (host, values by name) of each rank."""
    host, values = rows[0]
    for rank, (other_host, others) in enumerate(rows):
        names = [name for name in {**values, **others} if repr(values.get(name)) != repr(others.get(name))]
        if names:
            has, other_has = (
                first_few((f"no {n}" if row.get(n) is None else f"{n} {row[n]}" for n in names), 3)
                for row in (values, others)
            )
            return (
                f"rank 0 on {host} has {has}, but rank {rank} on {other_host} has {other_has}: start every process "
                "with the same flags on the same files"
            )
    return None


def require_same_weights(model: nn.Module, loaded: Sequence[str], source: str) -> None:
    """Compare what of a model, on the CPU, was loaded from a file with that on the other ranks; every rank calls it.

    loaded: keys of its state dict. A rounding more or less, of tables fitted by other kinds of CPU, does not count.

    Raises ConfigError, on every rank, that names the source and where it differs.
    """
    state = model.state_dict()
    norms = {key: float(torch.linalg.vector_norm(state[key], 1, dtype=torch.float64)) for key in loaded}
    rows, message = gather((socket.gethostname(), norms)), None
    for rank, (host, others) in enumerate(rows or ()):
        if norms.keys() != others.keys() or not np.allclose(
            [norms[key] for key in others], list(others.values()), rtol=1e-6, atol=0
        ):
            message = (
                f"{source} holds other weights on {host}, for rank {rank}, than on {rows[0][0]}, for rank 0: give "
                "every node the same file"
            )
            break
    if message := broadcast(message):
        raise ConfigError(message)


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
    Every step sums gradients in the same order, the first one too, so a run that is continued sums as it did before.
    """
    if process.world_size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.15
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **{option: False})
    _settle_buckets(parallel)
    return parallel


def _settle_buckets(parallel: DistributedDataParallel) -> None:
    """Make DDP lay out its buckets before the first step, by a pass that gives every parameter a gradient of zero.

    A position in a bucket decides in which order a ring adds up the ranks' gradients. DDP lays the buckets out anew
    after its first backward pass, in the order in which gradients came: here from the last parameter to the first.
    """
    model, parallel.module = parallel.module, _Zero([p for p in parallel.parameters() if p.requires_grad])
    parallel().backward()
    parallel.module = model
    parallel.zero_grad(set_to_none=True)


class _Zero(nn.Module):
    """Stands for a model in one pass: 0, which depends on its parameters, first to last, and on nothing else."""

    def __init__(self, trained: list[nn.Parameter]):
        super().__init__()
        self.forward = lambda: sum(0 * parameter.sum() for parameter in trained)


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


def from_main(build: Callable[[], Any]) -> Any:
    """Return what build() returns on rank 0, on every rank; where it raises there, every rank raises it.

    The others wait for up to _PATIENCE, longer than collectives do elsewhere.
    """
    if not dist.is_initialized():
        return build()
    outcome: tuple[Any, Exception | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (build(), None)
        except Exception as e:
            outcome = (None, e)
    value, error = broadcast(outcome, _patient)
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
    """Let the first process of each node do the body (a download, say) before the others.

    They wait for up to _PATIENCE, longer than collectives do elsewhere.
    """
    if dist.is_initialized() and process.local_rank != 0:
        dist.barrier(_patient)
    yield
    if dist.is_initialized() and process.local_rank == 0:
        dist.barrier(_patient)


@contextmanager
def ended_together() -> Iterator[None]:
    """Do the body, whose length differs from process to process, and wait for the others: for up to _PATIENCE."""
    yield
    if dist.is_initialized():
        dist.barrier(_patient)
