"""Writing exported files: ONNX, torch.export, safetensors. What they hold and how they are read: `container`."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.weights.container import (
    ONNX,
    PROGRAM,
    SAFETENSORS,
    add_program_record,
    export_record,
    sum_of,
    sum_of_tensors,
)
from models.weights.file import CheckpointError
from models.weights.programs import quiet_export

OPSET = 18  # of ONNX: what the exporter of PyTorch 2.6 and later writes without converting
INPUT, OUTPUT = "video", "logits"
_LARGEST_ONNX = 2**31  # bytes that a message of protobuf may have
_FROM_TRACING = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")


def write_onnx(path: Path, model: nn.Module, spec: dict, *, batch: str, tolerance: float) -> str:
    """Write a model as one ONNX file. Returns its record. Raises CheckpointError for a model that is too large.

    batch: "dynamic", or "1" for one clip at a time. tolerance: what the record says of it.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if weights >= _LARGEST_ONNX:
        raise CheckpointError(
            f"{spec['model']} has {weights / 1e9:.1f} GB of weights, and a single ONNX file takes 2 GB: export it --to "
            "torch_export or safetensors"
        )
    with quiet_export():
        program = torch.onnx.export(
            model,
            (_example(model, batch),),
            dynamo=True,
            dynamic_shapes=_dynamic(batch),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    message = program.model_proto
    graph = message.graph
    for part in (message, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # where the code lay that was traced
    path.write_bytes(message.SerializeToString())
    record = export_record(spec, kind=ONNX, batch=batch, tolerance=tolerance, sha256=sum_of(path, ONNX))
    entry = message.metadata_props.add()
    entry.key, entry.value = "spec", record
    path.write_bytes(message.SerializeToString())
    return record


def write_program(path: Path, model: nn.Module, spec: dict, *, batch: str, tolerance: float) -> str:
    """Write a model as a program of torch.export, see `write_onnx`. Returns its record."""
    with quiet_export(), torch.no_grad():
        program = torch.export.export(model, (_example(model, batch),), dynamic_shapes=_dynamic(batch), strict=False)
    _strip(program)
    content = io.BytesIO()  # on a disk that is full, PyTorch's writer would end the process
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    record = export_record(spec, kind=PROGRAM, batch=batch, tolerance=tolerance, sha256=sum_of(path, PROGRAM))
    add_program_record(path, record)
    return record


def _strip(program: "torch.export.ExportedProgram") -> None:
    """Take out of a program what ties it to this device and to this copy of the code, and what a loader would run."""
    for graph in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                graph.graph.erase_node(node)
            for key in _FROM_TRACING:
                node.meta.pop(key, None)
        graph.recompile()
    program.example_inputs = None
    if hasattr(program, "_guards_code"):
        program._guards_code = []


def write_safetensors(path: Path, model: nn.Module, spec: dict, *, batch: str, tolerance: float) -> str:
    """Write a model's weights under their published names. Returns the record. batch: has no effect; it is free."""
    tensors = contiguous(model.state_dict())
    about = {"kind": SAFETENSORS, "batch": "dynamic", "tolerance": tolerance, "sha256": sum_of_tensors(tensors)}
    record = export_record(spec, **about)
    path.write_bytes(save(tensors, {"format": "pt", "spec": record}))
    return record


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, each with memory of its own, as safetensors takes them."""
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}


def _example(model: nn.Module, batch: str) -> Tensor:
    """Return clips to trace with: two where their number is free, since one would be taken for a constant."""
    return torch.zeros(1 if batch == "1" else 2, *model.input_shape)


def _dynamic(batch: str) -> tuple[dict] | None:
    return None if batch == "1" else ({0: torch.export.Dim("batch", min=1)},)


WRITERS: dict[str, Callable[..., str]] = {
    ONNX: write_onnx,
    PROGRAM: write_program,
    SAFETENSORS: write_safetensors,
}
