"""Memory that loading processes write into and the training process reads: made once, used again and again.

It is anonymous, hence no file: the size of /dev/shm does not matter, that of the machine's memory does, or of the
container's.
"""

import logging
import math
import mmap
import os
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from utils.cli import ConfigError
from utils.distributed import barrier
from utils.memory import available_memory, in_bytes

logger = logging.getLogger("tad")

_TIGHT = 0.8  # share of the memory there is that leaves little for all else
_untouched: WeakSet["Slots"] = WeakSet()  # reserved, and no part of the memory in use yet


class Slots:
    """A number of uint8 tensors of one shape, shared with the processes forked once they are made.

    They are made when the first is asked for; ConfigError where there is no such memory.

    Args:
        count: how many.
        shape: of each.
        pin: whether to page-lock them, for copies by CUDA.
        what: what is in a slot, for messages: "a batch has".
        remedy: how its user makes do with less.
    """

    def __init__(self, count: int, shape: Sequence[int], *, pin: bool, what: str, remedy: str):
        self.count, self.shape, self.pin, self.what, self.remedy = count, tuple(shape), pin, what, remedy
        self._tensors: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.count * math.prod(self.shape)

    def __str__(self) -> str:
        one, total = in_bytes(math.prod(self.shape)), in_bytes(self.nbytes)
        return f"{self.what} {one}, {self.count} in the making: {total} of memory per process"

    def __getitem__(self, number: int) -> Tensor:
        self.make()
        _untouched.discard(self)
        return self._tensors[number]

    def make(self) -> None:
        """Make them now, if they are not made yet."""
        while len(self._tensors) < self.count:
            try:
                memory = mmap.mmap(-1, math.prod(self.shape))
            except (OSError, OverflowError, ValueError) as e:
                raise ConfigError(f"{self}, which cannot be had ({e}): {self.remedy}") from e
            self._tensors.append(torch.frombuffer(memory, dtype=torch.uint8).view(self.shape))
            if self.pin:
                _page_lock(self._tensors[-1])


def reserve(slots: Slots) -> None:
    """Compare what loading takes with the memory there is, log it, and make the slots; every process calls it.

    What was reserved before and is not in use yet counts too. Raises ConfigError where it is too much for all processes
    of this machine together; logs where it is nearly so.
    """
    logger.info(str(slots))
    _untouched.add(slots)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, (free, where) = processes * sum(each.nbytes for each in _untouched), available_memory()
    if needed > _TIGHT * free:
        text = f"{slots}; {in_bytes(needed)} are needed by all there is to load"
        text += f" in {processes} processes on this machine" * (processes > 1)
        text += f", and {in_bytes(free)} are there (by {where}): {slots.remedy}"
        if needed > free:
            raise ConfigError(text)
        logger.warning(f"memory is tight: {text}")
    barrier()  # what is made is no longer there for the others to count
    slots.make()
    if slots.pin:
        _untouched.discard(slots)


def _page_lock(tensor: Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
    if int(code):
        logger.warning(f"memory for batches cannot be page-locked (CUDA error {int(code)}): copies take longer")
