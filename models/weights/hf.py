"""Folders that Hugging Face's transformers reads: VideoMAE, ViViT, V-JEPA 2, their published architectures alone.

    config.json  model.safetensors  preprocessor_config.json  spec.json (the spec, which models.load would need)

V-JEPA 2 has video_preprocessor_config.json instead.

VideoMAE's keys and their history, from transformers 4.57 to 5.24: the biases of query and value are `q_bias` and
`v_bias` in all published files. Versions from about 5.6 to 5.17 read `query.bias`, `value.bias` and `key.bias` alone,
and take zeros, without an error, where a file has the published names.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.vit import VideoViT
from models.vivit import ViViT
from models.vjepa import VJEPA
from models.weights.container import export_record, sum_of_tensors
from models.weights.file import CheckpointError
from models.weights.programs import require
from models.weights.write import contiguous
from utils.text import first_few, short_reason

HF = "hf"
PUBLISHED, LINEAR = "q_bias and v_bias", "query.bias and value.bias"  # how VideoMAE's biases are named
_BICUBIC = 3  # of Pillow
_FC_NORM_EPS = 1e-5  # PyTorch's own, which transformers leaves as it is
_QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Kind:
    """How transformers holds a model.

    name: its class there.
    names: pattern of our module, or of a whole key -> theirs, or several, of equal parts of it along the first axis.
    biases: the ways to name its biases, the published one first, in words; "" where there is one way.
    """

    name: str
    names: dict[str, str | tuple[str, ...]]
    biases: tuple[str, ...] = ("",)


def _blocks(family: str) -> dict[str, str | tuple[str, ...]]:
    """Return the names of what VideoMAE's and ViViT's blocks have in common."""
    block, layer = r"blocks\.(\d+)", rf"{family}.encoder.layer.\1"
    return {
        r"patch_embed\.proj": f"{family}.embeddings.patch_embeddings.projection",
        rf"{block}\.attn\.qkv": tuple(f"{layer}.attention.attention.{part}" for part in _QKV),
        rf"{block}\.attn\.proj": f"{layer}.attention.output.dense",
        rf"{block}\.mlp\.fc1": f"{layer}.intermediate.dense",
        rf"{block}\.mlp\.fc2": f"{layer}.output.dense",
        rf"{block}\.norm1": f"{layer}.layernorm_before",
        rf"{block}\.norm2": f"{layer}.layernorm_after",
        r"norm": f"{family}.layernorm",
        r"head": "classifier",
    }


def _encoder(prefix: str) -> dict[str, str | tuple[str, ...]]:
    """Return the names of V-JEPA 2's encoder."""
    block, layer = r"blocks\.(\d+)", rf"{prefix}encoder.layer.\1"
    return {
        r"patch_embed\.proj": f"{prefix}encoder.embeddings.patch_embeddings.proj",
        rf"{block}\.(norm[12]|mlp\.fc[12])": rf"{layer}.\2",
        rf"{block}\.attn\.qkv": tuple(f"{layer}.attention.{part}" for part in _QKV),
        rf"{block}\.attn\.proj": f"{layer}.attention.proj",
        r"norm": f"{prefix}encoder.layernorm",
    }


_CROSS, _SELF = "pooler.cross_attention_layer", r"pooler.self_attention_layers.\1"
_PROBE: dict[str, str | tuple[str, ...]] = {
    r"pooler\.query_tokens": "pooler.query_tokens",
    r"pooler\.cross_attention_block\.norm([12])": rf"{_CROSS}.layer_norm\1",
    r"pooler\.cross_attention_block\.(mlp\.fc[12])": rf"{_CROSS}.\1",
    r"pooler\.cross_attention_block\.xattn\.q": f"{_CROSS}.cross_attn.q_proj",
    r"pooler\.cross_attention_block\.xattn\.kv": tuple(f"{_CROSS}.cross_attn.{part}_proj" for part in "kv"),
    r"pooler\.blocks\.(\d+)\.norm([12])": rf"{_SELF}.layer_norm\2",
    r"pooler\.blocks\.(\d+)\.(mlp\.fc[12])": rf"{_SELF}.\2",
    r"pooler\.blocks\.(\d+)\.attn\.qkv": tuple(f"{_SELF}.self_attn.{part}_proj" for part in "qkv"),
    r"pooler\.blocks\.(\d+)\.attn\.proj": f"{_SELF}.self_attn.out_proj",
    r"head": "classifier",
}
VIDEOMAE = Kind("VideoMAEForVideoClassification", _blocks("videomae") | {r"fc_norm": "fc_norm"}, (PUBLISHED, LINEAR))
VIVIT = Kind(
    "VivitForVideoClassification",
    {
        r"cls_token": "vivit.embeddings.cls_token",
        r"pos_embed": "vivit.embeddings.position_embeddings",
        **_blocks("vivit"),
    },
    (LINEAR,),
)
VJEPA2 = Kind("VJEPA2ForVideoClassification", _encoder("vjepa2.") | _PROBE)
VJEPA2_ENCODER = Kind("VJEPA2Model", _encoder(""))  # of a head on the mean of the tokens, for which nothing is there


def kind_of(model: nn.Module, path: str) -> Kind:
    """Return how transformers holds a classifier, whose weights file is `path`.

    Raises CheckpointError where it has no such architecture, or no place for one of the tensors.
    """
    kind, reason = _kind_or_reason(model)
    if kind is not None and kind is not VJEPA2_ENCODER:
        unplaced = [key for key in model.state_dict() if not _theirs(kind, key) and not _is_bias(key)]
        reason = f"{kind.name} has no place for {first_few(unplaced, 3)}" if unplaced else ""
    if reason:
        raise CheckpointError(
            f"{path}: transformers has no model for {model.name}: {reason}; export it --to onnx, torch_export or "
            "safetensors"
        )
    return kind


def _kind_or_reason(model: nn.Module) -> tuple[Kind | None, str]:
    """Return how transformers holds a classifier, or why it cannot."""
    if isinstance(model, VideoViT | ViViT) and model.head_kind == "attentive":
        return (
            None,
            f"its head is attentive, and {'ViViT' if isinstance(model, ViViT) else 'VideoMAE'}'s there is linear",
        )
    if isinstance(model, ViViT):
        return VIVIT, ""
    if isinstance(model, VJEPA):
        if model.version != "2.0":
            return None, "its rotations and modality embedding are V-JEPA 2.1's, and VJEPA2 there has those of 2.0"
        if model.final_reduction == "mean":
            return VJEPA2_ENCODER, ""
        heads = model.blocks[0].attn.num_heads, model.pooler.cross_attention_block.xattn.num_heads
        if heads[0] != heads[1]:
            return None, f"its probe has {heads[1]} heads, and VJEPA2's there as many as the encoder, {heads[0]}"
        if model.gelu != "erf":
            return None, "its probe has another GELU than its encoder, and VJEPA2's there the same"
        return VJEPA2, ""
    if not isinstance(model, VideoViT):
        return None, "it is of another architecture than VideoMAE, ViViT and V-JEPA 2"
    if isinstance(model.pos_embed, nn.Parameter):
        return None, "its position table is learned, and VideoMAE's there is fixed"
    if model.pos_embed_kind != "sinusoid":
        return None, f"its position table is {model.pos_embed_kind}, and VideoMAE's there is the sinusoid"
    return VIDEOMAE, ""


def _is_bias(key: str) -> bool:
    return bool(re.fullmatch(r"blocks\.\d+\.attn\.[qv]_bias", key))


def _theirs(kind: Kind, key: str) -> tuple[str, ...]:
    """Return the keys of transformers that a key of ours becomes, of equal parts of the tensor; () where none does."""
    module, _, leaf = key.rpartition(".")
    for ours, names in kind.names.items():
        names = (names,) if isinstance(names, str) else names
        if match := re.fullmatch(ours, module):
            return tuple(f"{match.expand(name)}.{leaf}" for name in names)
        if match := re.fullmatch(ours, key):
            return tuple(map(match.expand, names))
    return ()


def hf_state(state: Mapping[str, Tensor], kind: Kind, biases: str) -> dict[str, Tensor]:
    """Return a state dict under transformers' keys; what has no place is left out. biases: one of the kind's."""
    result = {}
    for key, tensor in state.items():
        if _is_bias(key):
            module, _, name = key.rpartition(".")
            prefix = _theirs(kind, f"{module}.qkv.weight")[0].removesuffix(".query.weight")
            if biases == PUBLISHED:
                result[f"{prefix}.{name}"] = tensor
            else:
                result[f"{prefix}.{'query' if name == 'q_bias' else 'value'}.bias"] = tensor
                result[f"{prefix}.key.bias"] = torch.zeros_like(tensor)
        elif names := _theirs(kind, key):
            result |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    return result


_PREDICTOR = {"pred_hidden_size": 12, "pred_num_attention_heads": 12, "pred_num_hidden_layers": 0}
_PREDICTOR |= {"pred_num_mask_tokens": 1}


def _no_predictor(kind: Kind, dim: int) -> dict[str, Tensor]:
    """Return the least predictor that VJEPA2Model takes, of no layer, all zeros."""
    prefix, width = ("vjepa2." if kind is VJEPA2 else "") + "predictor.", _PREDICTOR["pred_hidden_size"]
    shapes = {
        "embeddings.mask_tokens": (1, 1, 1, width),
        "embeddings.predictor_embeddings.weight": (width, dim),
        "embeddings.predictor_embeddings.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "proj.weight": (dim, width),
        "proj.bias": (dim,),
    }
    return {prefix + key: torch.zeros(shape) for key, shape in shapes.items()}


def hf_config(model: nn.Module, kind: Kind) -> dict[str, Any]:
    """Return the content of config.json."""
    spec, block = model.spec, model.blocks[0]
    tubelet, patch, _ = model.patch_embed.cube
    common = {
        "architectures": [kind.name],
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu" if spec["gelu"] == "erf" else "gelu_pytorch_tanh",
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": True,
        "dtype": "float32",
    }
    if kind is not VJEPA2_ENCODER:
        common |= {
            "id2label": {str(i): name for i, name in enumerate(spec["classes"])},
            "label2id": {name: i for i, name in enumerate(spec["classes"])},
        }
    if kind in (VJEPA2, VJEPA2_ENCODER):
        return {
            "model_type": "vjepa2",
            "crop_size": spec["input_size"],
            "frames_per_clip": spec["num_frames"],
            "tubelet_size": tubelet,
            "patch_size": patch,
            "in_chans": 3,
            "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
            "num_pooler_layers": len(model.pooler.blocks) if kind is VJEPA2 else 0,
            **_PREDICTOR,
            **common,
        }
    about = {
        "image_size": spec["input_size"],
        "num_frames": spec["num_frames"],
        "num_channels": 3,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_dropout_prob": 0.0,
        **common,
    }
    if kind is VIVIT:
        return {"model_type": "vivit", "tubelet_size": [tubelet, patch, patch], **about}
    pooled = {"use_mean_pooling": spec["final_reduction"] == "fc_norm"}
    return {"model_type": "videomae", "tubelet_size": tubelet, "patch_size": patch, **pooled, **about}


def hf_processor(spec: Mapping[str, Any], kind: Kind) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the processor's file: the whole frame in the model's size, bicubic.

    ViViT's video processor knows pixels of -1 to 1 alone, so that mean and deviation are those of such. V-JEPA 2's own
    cuts the middle of a larger frame, whatever it is told; LLaVA's does all as it is told.
    """
    side, mean, std = spec["input_size"], spec["mean"], spec["std"]
    content = {
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": _BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "num_frames": spec["num_frames"],
    }
    if kind is VIVIT:
        content |= {"rescale_factor": 1 / 127.5, "offset": True}
        content |= {"image_mean": [2 * m - 1 for m in mean], "image_std": [2 * s for s in std]}
        return "preprocessor_config.json", {"image_processor_type": "VivitImageProcessor", **content}
    if kind is VIDEOMAE:
        return "preprocessor_config.json", {"image_processor_type": "VideoMAEImageProcessor", **content}
    return "video_preprocessor_config.json", {"video_processor_type": "LlavaOnevisionVideoProcessor", **content}


def write_hf(folder: Path, model: nn.Module, spec: dict, *, kind: Kind, biases: str, tolerance: float) -> str:
    """Write a folder, which is there, for transformers. Returns the record. kind: see `kind_of`; biases: one of its."""
    tensors = hf_state(model.state_dict(), kind, biases)
    if kind in (VJEPA2, VJEPA2_ENCODER):
        tensors |= _no_predictor(kind, model.embed_dim)
    tensors = contiguous(tensors)
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    for name, content in (("config.json", hf_config(model, kind)), hf_processor(spec, kind)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    record = export_record(spec, kind=HF, batch="dynamic", tolerance=tolerance, sha256=sum_of_tensors(tensors))
    (folder / "spec.json").write_text(record)
    return record


def lines_on(kind: Kind) -> list[str]:
    """Return what a folder does not hold, in lines."""
    if kind not in (VJEPA2, VJEPA2_ENCODER):
        return []
    lines = ["  it has no predictor (of 0 layers, all zeros): VJEPA2Model needs skip_predictor=True"]
    head = "  the head is not in it: transformers has none on the mean of V-JEPA 2's tokens"
    return [*lines, head] if kind is VJEPA2_ENCODER else lines


def known_difference(kind: Kind, model: nn.Module) -> str:
    """Return what transformers does otherwise that nothing in a folder can change; "" where there is nothing."""
    norm = getattr(model, "fc_norm", None)
    if kind is not VIDEOMAE or not isinstance(norm, nn.LayerNorm) or norm.eps == _FC_NORM_EPS:
        return ""
    return (
        f"; its last norm adds {_FC_NORM_EPS:g} to the variance there, and {norm.eps:g} here, which tells where "
        "features vary little: a larger --tolerance accepts that"
    )


class Features(nn.Module):
    """(B, 3, T, H, W) normalised -> (B, N, D): the normed tokens of a classifier's encoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def normalize(self, video: Tensor) -> Tensor:
        """Map uint8 RGB (B, 3, T, H, W) to float32, as the model takes it."""
        return self.model.normalize(video)

    def forward(self, video: Tensor) -> Tensor:
        """Map (B, 3, T, H, W) normalised to (B, N, D)."""
        return self.model.encode(self.model.embed(video))


class HfModel(nn.Module):
    """(B, 3, T, H, W) normalised -> (B, K), or (B, N, D) of an encoder: what transformers makes of a folder.

    Raises CheckpointError where transformers is missing or cannot read the folder.
    """

    def __init__(self, folder: Path, kind: Kind):
        super().__init__()
        self.kind, self.transformers = kind, require("transformers")
        self.transformers.logging.set_verbosity_error()
        self.transformers.logging.disable_progress_bar()
        try:
            read = getattr(self.transformers, kind.name).from_pretrained
            self.model = read(folder, local_files_only=True).eval()
        except (AttributeError, OSError, ValueError, RuntimeError, KeyError, TypeError) as e:
            version = self.transformers.__version__
            raise CheckpointError(f"transformers {version} cannot read what was written ({short_reason(e)})") from e

    def forward(self, video: Tensor) -> Tensor:
        """Map (B, 3, T, H, W) normalised to logits (B, K), or to the tokens (B, N, D)."""
        video = video.transpose(1, 2)
        with torch.no_grad():
            if self.kind is VJEPA2_ENCODER:
                return self.model(pixel_values_videos=video, skip_predictor=True).last_hidden_state
            if self.kind is VJEPA2:
                return self.model(pixel_values_videos=video).logits
            return self.model(pixel_values=video).logits
