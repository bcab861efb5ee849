"""Tensors out of a PyTorch file that also pickles things of no harm, which stay unread: nothing in it is called.

torch.load(weights_only=True) refuses a file for a date or a path beside its weights. Here the pickle is read by
Python's own unpickler, which finds tensors and dictionaries alone; what else is named as harmless becomes `Passed`, an
object that takes everything and does nothing. Any other name is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.pickles import HARMLESS, named_in

_STORAGES = {f"{name}Storage": dtype for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "Untyped": torch.uint8,
}.items()}  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Passed:
    """Stands for an object that is not read. It takes everything that unpickling does to one."""

    def __new__(cls, *arguments: Any, **options: Any) -> "Passed":
        """Make one of whatever."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Take an item."""

    def extend(self, items: Any) -> None:
        """Take items."""

    def add(self, item: Any) -> None:
        """Take an item of a set."""


def is_harmless(file: Path) -> bool:
    """Tell whether a zip of torch.save names nothing but tensors and what is known to do no harm.

    Raises what reading a damaged file raises.
    """
    return zipfile.is_zipfile(file) and all(_known(*name.rpartition(".")[::2]) for name in named_in(file))


def read_plain(file: Path) -> Any:
    """Return the content of a zip of torch.save, with Passed for what is harmless. Raises pickle.UnpicklingError for
    another name, and what reading a damaged file raises.
    """
    with zipfile.ZipFile(file) as z:
        member = next(name for name in z.namelist() if name.rpartition("/")[2] == "data.pkl")
        folder = member.removesuffix("data.pkl")
        if f"{folder}byteorder" in z.namelist() and z.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine; save it with safetensors there")
        with z.open(member) as stream:
            return _Unpickler(stream, z, folder).load()


def _known(module: str, name: str) -> bool:
    full = f"{module}.{name}"
    return bool(HARMLESS.fullmatch(full)) or _of_tensors(module, name) is not None


def _of_tensors(module: str, name: str) -> Any:
    """Return what a name stands for that tensors are pickled with, or None."""
    full = f"{module}.{name}"
    if full == "collections.OrderedDict":
        return OrderedDict
    if full in ("torch.Size", "torch.device"):
        return getattr(torch, name)
    if full == "torch._utils._rebuild_tensor_v2":
        return _tensor
    if full == "torch._utils._rebuild_tensor_v3":
        return _tensor_of_bytes
    if full in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return _parameter
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if full == "torch.storage.UntypedStorage" or (module == "torch" and name in _STORAGES):
        return _STORAGES.get(name, torch.uint8)
    return None


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """Return a view of a flat tensor. Raises RuntimeError where it would reach beyond it."""
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _tensor_of_bytes(
    storage: Tensor, offset: int, size: tuple, stride: tuple, grad: bool, hooks: Any, dtype: torch.dtype, *_: Any
) -> Tensor:
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Finds what `_known` knows; storages become flat tensors."""

    def __init__(self, stream: BinaryIO, z: zipfile.ZipFile, folder: str):
        super().__init__(stream, encoding="utf-8")
        self.zip, self.folder, self.storages = z, folder, {}

    def find_class(self, module: str, name: str) -> Any:
        if (found := _of_tensors(module, name)) is not None:
            return found
        if HARMLESS.fullmatch(f"{module}.{name}"):
            return Passed
        raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")

    def persistent_load(self, reference: Any) -> Tensor:
        kind, dtype, key, *_ = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("refers to something else than the values of a tensor")
        if key not in self.storages:
            content = bytearray(self.zip.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]
