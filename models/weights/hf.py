"""Folders that Hugging Face's transformers reads: VideoMAE's classifier, its published architecture alone.

    config.json  model.safetensors  preprocessor_config.json  spec.json (the spec, which models.load would need)

Keys and their history, from transformers 4.57 to 5.24: the biases of query and value are `q_bias` and `v_bias` in all
published files. Versions from about 5.6 to 5.17 read `query.bias`, `value.bias` and `key.bias` alone, and take zeros,
without an error, where a file has the published names.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.vit import VideoViT
from models.weights.container import export_record, sum_of_tensors
from models.weights.file import CheckpointError
from models.weights.programs import require
from models.weights.write import contiguous
from utils.text import short_reason

HF = "hf"
PUBLISHED, LINEAR = "q_bias and v_bias", "query.bias and value.bias"  # how the biases are named
_BICUBIC = 3  # of Pillow
_NAMES = {  # ours -> theirs
    r"patch_embed\.proj": "videomae.embeddings.patch_embeddings.projection",
    r"blocks\.(\d+)\.attn\.proj": r"videomae.encoder.layer.\1.attention.output.dense",
    r"blocks\.(\d+)\.mlp\.fc1": r"videomae.encoder.layer.\1.intermediate.dense",
    r"blocks\.(\d+)\.mlp\.fc2": r"videomae.encoder.layer.\1.output.dense",
    r"blocks\.(\d+)\.norm1": r"videomae.encoder.layer.\1.layernorm_before",
    r"blocks\.(\d+)\.norm2": r"videomae.encoder.layer.\1.layernorm_after",
    r"norm": "videomae.layernorm",
    r"fc_norm": "fc_norm",
    r"head": "classifier",
}


def check_architecture(model: nn.Module, path: str) -> None:
    """Raise CheckpointError where transformers' VideoMAE cannot be this model, whose weights file is `path`."""
    if not isinstance(model, VideoViT):
        reason = "it is of another architecture than VideoMAE"
    elif model.head_kind == "attentive":
        reason = "its head is attentive, and VideoMAE's there is linear"
    elif isinstance(model.pos_embed, nn.Parameter):
        reason = "its position table is learned, and VideoMAE's there is fixed"
    elif model.pos_embed_kind != "sinusoid":
        reason = f"its position table is {model.pos_embed_kind}, and VideoMAE's there is the sinusoid"
    else:
        return
    raise CheckpointError(
        f"{path}: transformers has no model for {model.name}: {reason}; export it --to onnx, torch_export or "
        "safetensors"
    )


def hf_state(state: Mapping[str, Tensor], biases: str) -> dict[str, Tensor]:
    """Return the state dict of a Video ViT under transformers' keys. biases: PUBLISHED or LINEAR."""
    result = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        if attention := re.fullmatch(r"blocks\.(\d+)\.attn(\.qkv)?", module):
            prefix = f"videomae.encoder.layer.{attention.group(1)}.attention.attention"
            if kind == "weight":
                parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
                result |= {f"{prefix}.{name}.weight": part for name, part in parts}
            elif biases == PUBLISHED:
                result[f"{prefix}.{kind}"] = tensor
            else:
                result[f"{prefix}.{'query' if kind == 'q_bias' else 'value'}.bias"] = tensor
                result[f"{prefix}.key.bias"] = torch.zeros_like(tensor)
            continue
        theirs = next(re.sub(ours, name, module) for ours, name in _NAMES.items() if re.fullmatch(ours, module))
        result[f"{theirs}.{kind}"] = tensor
    return result


def hf_config(model: VideoViT) -> dict[str, Any]:
    """Return the content of config.json."""
    spec, block = model.spec, model.blocks[0]
    return {
        "architectures": ["VideoMAEForVideoClassification"],
        "model_type": "videomae",
        "image_size": spec["input_size"],
        "patch_size": model.patch_embed.cube[1],
        "num_channels": 3,
        "num_frames": spec["num_frames"],
        "tubelet_size": spec["tubelet_size"],
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu" if spec["gelu"] == "erf" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": True,
        "use_mean_pooling": spec["final_reduction"] == "fc_norm",
        "id2label": {str(i): name for i, name in enumerate(spec["classes"])},
        "label2id": {name: i for i, name in enumerate(spec["classes"])},
        "dtype": "float32",
    }


def hf_processor(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of preprocessor_config.json: the whole frame in the model's size, bicubic."""
    side = spec["input_size"]
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": _BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec["mean"],
        "image_std": spec["std"],
    }


def write_hf(folder: Path, model: VideoViT, spec: dict, *, biases: str, tolerance: float) -> str:
    """Write a folder, which is there, for transformers. Returns the record. biases: PUBLISHED or LINEAR."""
    tensors = contiguous(hf_state(model.state_dict(), biases))
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    for name, content in (("config.json", hf_config(model)), ("preprocessor_config.json", hf_processor(spec))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    record = export_record(spec, kind=HF, batch="dynamic", tolerance=tolerance, sha256=sum_of_tensors(tensors))
    (folder / "spec.json").write_text(record)
    return record


class HfModel(nn.Module):
    """(B, 3, T, H, W) normalised -> (B, K): what transformers makes of a folder.

    Raises CheckpointError where transformers is missing or cannot read the folder.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.transformers = require("transformers")
        self.transformers.logging.set_verbosity_error()
        self.transformers.logging.disable_progress_bar()
        try:
            read = self.transformers.VideoMAEForVideoClassification.from_pretrained
            self.model = read(folder, local_files_only=True).eval()
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as e:
            version = self.transformers.__version__
            raise CheckpointError(f"transformers {version} cannot read what was written ({short_reason(e)})") from e

    def forward(self, video: Tensor) -> Tensor:
        """Map (B, 3, T, H, W) normalised to (B, K) logits."""
        with torch.no_grad():
            return self.model(pixel_values=video.transpose(1, 2)).logits
