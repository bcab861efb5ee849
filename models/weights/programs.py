"""Exported programs as models: `load_program(path)` gives what `models.load` gives of a weights file, for evaluation.

A file of torch.export is unpickled in part and compiled by PyTorch, which trusts it. So its zip is looked through
first: what is not a tensor, a plain operator of PyTorch or a name is refused. ONNX holds no code; values that it would
take from other files are refused.
"""

import importlib
import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.registry import classifier_of
from models.vit import normalized
from models.weights.container import ONNX, kind_of, read_record, reads_elsewhere
from models.weights.file import CheckpointError, fetch, read_spec
from utils.text import first_few, short_reason

_ATEN = r"torch\.ops\.aten\.(?!from_file\b)\w+(\.\w+)?"
_BLOCKS = r"torch\.ops\.higher_order\.wrap_with_(autocast|set_grad_enabled)"
_ARITHMETIC = r"_operator\.(getitem|add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge)"
_OPERATOR = re.compile(f"{_ATEN}|{_BLOCKS}|{_ARITHMETIC}")
_SIZE = re.compile(r"(Symbol|Integer|Add|Mul|True|False|positive|nonnegative|integer|'?[su]\d+'?|-?\d+|[-(),=+* ])+")
_NAME = re.compile(r"[\w.\-:<>+ ]*")
_MEMBER = re.compile(
    r"\.data/(version|serialization_id)|\.format_version|\.storage_alignment|byteorder|(archive_)?(format|version)|"
    r"models/model\.json|extra/spec\.json|data/(weights|constants)/model_\w+_config\.json|data/weights/weight_\d+|"
    r"data/constants/tensor_\d+|data/(weights|constants|sample_inputs)/model\.pt|extra_files/spec\.json|"
    r"serialized_exported_program\.json|serialized_(state_dict|constants|example_inputs)\.pt"
)
_PROGRAMS = ("models/model.json", "serialized_exported_program.json")


class ExportedModel(nn.Module):
    """An exported program with the interface of the model it was made of: (B, 3, T, H, W) normalised -> (B, K) logits.

    It computes in float32 whatever the autocast, as it was proved, and is not trained.

    name, spec: of the weights it was exported from. input_shape: (3, T, H, W). one_by_one: it takes one clip at a time,
    so a batch is taken apart.
    """

    def __init__(self, spec: dict, *, one_by_one: bool):
        super().__init__()
        self.name, self.spec, self.one_by_one = spec["model"], dict(spec), one_by_one
        self.input_shape = (3, spec["num_frames"], spec["input_size"], spec["input_size"])
        self.register_buffer("mean", torch.tensor(spec["mean"], dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(spec["std"], dtype=torch.float32), persistent=False)
        self.training = False

    def normalize(self, video: Tensor) -> Tensor:
        """Map uint8 RGB (B, 3, T, H, W), on the model's device, to float32, as the program takes it."""
        return normalized(video, self.mean, self.std)

    def forward(self, video: Tensor) -> Tensor:
        """Map (B, 3, T, H, W) normalised to (B, K) logits, float32. Raises ValueError on another shape."""
        if tuple(video.shape[1:]) != self.input_shape:
            raise ValueError(f"expected a video of shape (B, {', '.join(map(str, self.input_shape))}), "
                             f"got {tuple(video.shape)}")  # fmt: skip
        with torch.no_grad(), torch.autocast(video.device.type, enabled=False):
            parts = video.float().split(1) if self.one_by_one else [video.float()]
            return torch.cat([self.run(part) for part in parts])

    def run(self, video: Tensor) -> Tensor:
        """Run the program. A subclass defines it."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor] | None:
        """Return what the program computes with, under the names of the model it was made of; None if it has others."""
        return None

    def train(self, mode: bool = True) -> nn.Module:
        """Return the model: it has one mode, that of evaluation."""
        return self


class OnnxModel(ExportedModel):
    """An ONNX file, run by onnxruntime on the CPU, whatever device the videos are on."""

    def __init__(self, content: bytes, spec: dict, *, one_by_one: bool):
        super().__init__(spec, one_by_one=one_by_one)
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def run(self, video: Tensor) -> Tensor:
        """Map (B, 3, T, H, W) float32 to (B, K)."""
        (logits,) = self.session.run(None, {self.input: video.cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(video.device)

    def __deepcopy__(self, memo: dict) -> "OnnxModel":
        """Return a model, to be moved elsewhere, that shares the session, which cannot be copied."""
        copy = self.__new__(type(self))
        copy.__dict__ = {**self.__dict__, "_buffers": {name: b.clone() for name, b in self._buffers.items()}}
        return copy


class ProgramModel(ExportedModel):
    """A program of torch.export; `.to(device)` moves it."""

    def __init__(self, program: "torch.export.ExportedProgram", spec: dict, *, one_by_one: bool):
        super().__init__(spec, one_by_one=one_by_one)
        self.program = program.module().requires_grad_(False)

    def run(self, video: Tensor) -> Tensor:
        """Map (B, 3, T, H, W) float32 to (B, K)."""
        return self.program(video)

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers, fixed position tables among them, under the names of the model."""
        return dict(self.program.named_parameters()) | dict(self.program.named_buffers())


def require(package: str) -> Any:
    """Import a package that requirements.txt leaves out. Raises CheckpointError where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise CheckpointError(f"this needs the package {package}: pip install {package} ({short_reason(e)})") from e


def load_program(path: str) -> tuple[ExportedModel, dict]:
    """Return (model, spec) of an exported program, ONNX or torch.export.

    Raises CheckpointError: a file that is damaged, has changed since it was exported, has no spec, or holds what is
    refused; a missing package; a program that PyTorch or onnxruntime cannot load.
    """
    file = Path(fetch(path))
    kind = kind_of(file)
    spec = read_spec(path)  # of the right form
    try:
        one_by_one = read_record(file, kind)["export"]["batch"] == "1"
        content = file.read_bytes()
        if kind == ONNX and reads_elsewhere(content):
            raise ValueError("it takes values from other files, which is refused; export it again")
        if kind != ONNX:
            check_harmless(io.BytesIO(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = str(e) if isinstance(e, ValueError) else f"damaged ({short_reason(e)}); export it again"
        raise CheckpointError(f"{path}: {reason}") from e
    if classifier_of_spec(spec) != spec["model"] or not spec["classes"]:
        raise CheckpointError(f"{path}: its spec is of {spec['model']} without classes; export a classifier")
    try:
        if kind == ONNX:
            return OnnxModel(content, spec, one_by_one=one_by_one), spec
        with quiet_export():
            program = torch.export.load(io.BytesIO(content))
            return ProgramModel(program, spec, one_by_one=one_by_one), spec
    except CheckpointError:
        raise
    except Exception as e:  # both raise a dozen types, depending on what they do not know
        runs = "onnxruntime" if kind == ONNX else f"PyTorch {torch.__version__}"
        raise CheckpointError(f"{path}: {runs} cannot load it ({short_reason(e)}); export it again here") from e


def classifier_of_spec(spec: dict) -> str:
    """Return the classifier that a spec is of, "" where its model is not known here."""
    try:
        return classifier_of(spec["model"])
    except ValueError:
        return ""


@contextmanager
def quiet_export() -> Iterator[None]:
    """Leave out what torch.export and torch.onnx print beside errors."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.export", "torch.onnx"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def check_harmless(file: io.BytesIO) -> None:
    """Raise ValueError unless a file of torch.export holds tensors and a graph of plain operators alone.

    PyTorch unpickles some parts, evaluates sizes and guards as Python, finds operators by any name within its package,
    and makes Python of the names in the graph: all are compared with what ours hold.
    """
    seen = set()
    with zipfile.ZipFile(file) as z:
        for name in z.namelist():
            inner = name if _MEMBER.fullmatch(name) else name.partition("/")[2]
            if inner in seen:  # PyTorch may take the other one
                raise ValueError(f"it holds {first_few([name])} twice: refused, it may hide code")
            seen.add(inner)
            if not _MEMBER.fullmatch(inner):
                raise ValueError(f"it holds {first_few([name])}, which no file of ours does: refused, it may be code")
            if inner.endswith(".pt"):
                _check_tensors(z.read(name), name)
            elif inner.endswith("_config.json"):
                _check_payloads(json.loads(z.read(name)))
            elif inner in _PROGRAMS:
                _check_program(json.loads(z.read(name)))


def _check_tensors(content: bytes, name: str) -> None:
    """Refuse a pickle of more than tensors and plain types; torch.export.load would unpickle all."""
    try:
        if content:
            torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as e:
        raise ValueError(f"{name} pickles more than tensors, which is refused because it can run code") from e


def _check_payloads(payloads: dict) -> None:
    """Refuse tensors that are pickled: ours are not."""
    if any(payload.get("use_pickle") is not False for payload in payloads["config"].values()):
        raise ValueError("it pickles a tensor, which is refused because unpickling can run code")


def _check_program(program: dict) -> None:
    if program.get("guards_code"):
        raise ValueError("it has guards in Python, which are refused because they are run")
    for key, value in _strings(program):
        if key == "expr_str":
            right = _SIZE.fullmatch(value)
        elif key in ("target", "as_operator"):
            right = _OPERATOR.fullmatch(value)
        else:
            right = _NAME.fullmatch(value)
        if not right:
            raise ValueError(f"its graph holds {first_few([value])!r}, which no graph of ours does: refused, as it may "
                             "be code")  # fmt: skip


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) of all texts in a value of JSON, keys too; what describes the structure is JSON in a text."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        if key in ("in_spec", "out_spec") and value:
            for _, text in _strings(json.loads(value)):
                if text in ("__enum__", "default_factory_module"):  # which import a module
                    yield "", "()"
                yield "", text
        elif key == "context":  # JSON again
            yield "", "" if value in ("null", "[]") else value
        else:
            yield key, value
