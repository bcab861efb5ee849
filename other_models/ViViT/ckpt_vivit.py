"""Convert ViViT-B/16x2 (Kinetics-400, unfactorised) into a checkpoint for run_finetune.py and run_dapt.py.

    python other_models/ViViT/ckpt_vivit.py pytorch_model.bin vivit_b_k400.pth
    python run_finetune.py --model vit_base_patch16_224 --finetune vivit_b_k400.pth ...

SOURCE is one of
    pytorch_model.bin or model.safetensors of huggingface.co/google/vivit-b-16x2-kinetics400
    the flax checkpoint of Scenic (github.com/google-research/scenic, projects/vivit, "ViViT-B/16x2 unfactorized")

The result has VideoMAE's keys, in float32, with ViViT's learned position table: of its 16 slots of 2 frames it keeps 8,
the means of pairs, for 16 frames. Left out are the class token with its position, the classifier, and the key biases,
which change no attention weight. ViViT (arXiv:2103.15691) was trained on 32 frames in [-1, 1], with tanh GELU (--gelu
tanh), and classified by its class token.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.exits import report_uncaught

if __name__ == "__main__":
    report_uncaught()

import msgpack
import numpy as np
import torch
from torch import Tensor

from models.weights.errors import CheckpointError
from models.weights.file import read_checkpoint
from models.weights.kinds import is_flax
from utils.files import replaced
from utils.text import first_few, short_reason

SLOTS, SIDE = 16, 14  # the position table: slots of 2 frames, 16-pixel patches of 224

# Hugging Face's names -> ours; {i} is the number of the block.
RENAMED = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.{i}.layernorm_before": "blocks.{i}.norm1",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
    "encoder.layer.{i}.layernorm_after": "blocks.{i}.norm2",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.output.dense": "blocks.{i}.mlp.fc2",
    "layernorm": "norm",
}
QKV = "encoder.layer.{i}.attention.attention."
LEFT_OUT = r"embeddings\.cls_token|classifier\.(weight|bias)|pooler\.dense\.(weight|bias)"

# Scenic's names -> Hugging Face's.
SCENIC = {
    "cls": "embeddings.cls_token",
    "embedding": "embeddings.patch_embeddings.projection",
    "Transformer/posembed_input/pos_embedding": "embeddings.position_embeddings",
    "Transformer/encoder_norm": "layernorm",
    "Transformer/encoderblock_{i}/LayerNorm_0": "encoder.layer.{i}.layernorm_before",
    "Transformer/encoderblock_{i}/LayerNorm_1": "encoder.layer.{i}.layernorm_after",
    "Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/query": QKV + "query",
    "Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/key": QKV + "key",
    "Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/value": QKV + "value",
    "Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/out": "encoder.layer.{i}.attention.output.dense",
    "Transformer/encoderblock_{i}/MlpBlock_0/Dense_0": "encoder.layer.{i}.intermediate.dense",
    "Transformer/encoderblock_{i}/MlpBlock_0/Dense_1": "encoder.layer.{i}.output.dense",
    "output_projection": "classifier",
}


def read_source(path: str) -> dict[str, Tensor]:
    """Read a state dict in Hugging Face's names, without "vivit.", from any of the sources. Raises CheckpointError."""
    try:
        with open(path, "rb") as f:
            head = f.read(9)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e
    if is_flax(head):
        try:
            return from_scenic(read_flax(path), path)
        except (AttributeError, LookupError, TypeError, ValueError) as e:  # an array of another shape, or none
            raise CheckpointError(f"{path}: not the arrays of a ViViT ({short_reason(e)}); download it again") from e
    return {key.removeprefix("vivit."): tensor for key, tensor in read_checkpoint(path).state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Scenic


def read_flax(path: str) -> dict:
    """Return the tree of dictionaries and arrays in flax.serialization's msgpack. Raises CheckpointError."""
    try:
        return _joined(msgpack.unpackb(Path(path).read_bytes(), ext_hook=_array, strict_map_key=False))
    except Exception as e:  # msgpack and NumPy raise a dozen types, depending on where the bytes go wrong
        raise CheckpointError(
            f"{path}: truncated, or not a flax checkpoint ({short_reason(e)}); download it again"
        ) from e


def _array(kind: int, data: bytes) -> np.ndarray | complex:
    """Return flax's extension types: 1 an array, 2 a complex number, 3 a NumPy scalar."""
    if kind == 2:
        return complex(*msgpack.unpackb(data))
    shape, dtype, content = msgpack.unpackb(data)
    return np.frombuffer(content, dtype=np.dtype(dtype)).reshape(shape)


def _joined(tree: object) -> object:
    """Return the tree with its large arrays, which flax writes in pieces, made whole."""
    if not isinstance(tree, dict):
        return tree
    if "__msgpack_chunked_array__" not in tree:
        return {key: _joined(value) for key, value in tree.items()}
    shape, chunks = ([parts[str(i)] for i in range(len(parts))] for parts in (tree["shape"], tree["chunks"]))
    return np.concatenate([chunk.reshape(-1) for chunk in chunks]).reshape(shape)


def from_scenic(tree: dict, path: str) -> dict[str, Tensor]:
    """Return parameters of a Scenic checkpoint -> a state dict in Hugging Face's names. Raises CheckpointError."""
    optimizer = tree.get("optimizer")
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    parameters = tree.get("params") or (target and target.get("params", target))
    if not isinstance(parameters, dict):
        raise CheckpointError(
            f"{path}: no parameters under params or optimizer/target; its keys are {first_few(tree, 4)}"
        )
    state = {}
    for key, array in _leaves(parameters, ""):
        module, _, leaf = key.rpartition("/")
        if name := _renamed(key, SCENIC):
            state[name] = torch.from_numpy(np.array(array))
        elif name := _renamed(module, SCENIC):
            state[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = _as_torch(module, leaf, array)
        else:
            raise CheckpointError(f"{path}: {key} is not of an unfactorised ViViT; other variants cannot be converted")
    return state


def _leaves(tree: dict, prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _as_torch(module: str, leaf: str, array: np.ndarray) -> Tensor:
    """Return an array of flax's layout in PyTorch's: kernels are (inputs, outputs) there, with heads apart."""
    if leaf != "kernel":
        return torch.from_numpy(array.reshape(-1).copy())
    if module == "embedding":  # t h w in out
        return torch.from_numpy(array.transpose(4, 3, 0, 1, 2).copy())
    inputs = array.shape[0] if not module.endswith("/out") else array.shape[0] * array.shape[1]
    return torch.from_numpy(array.reshape(inputs, -1).T.copy())


# ----------------------------------------------------------------------------------------------------------------------
# To VideoMAE's layout


def convert(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Turn Hugging Face's names into VideoMAE's, float32, under "encoder."; print what becomes of each group.

    Raises CheckpointError: a key that is unknown or absent, a table for another number of positions.
    """
    state = {key: tensor.float() for key, tensor in state.items()}
    depth = 1 + max((int(m.group(1)) for k in state if (m := re.match(r"encoder\.layer\.(\d+)\.", k))), default=-1)
    if not depth:
        raise CheckpointError(f"{path}: not a ViViT; its keys begin {first_few(state, 4)}")

    def take(key: str) -> Tensor:
        try:
            return state.pop(key)
        except KeyError:
            raise CheckpointError(f"{path}: lacks {key}; the file is incomplete") from None

    result = {"pos_embed": _pooled_table(take("embeddings.position_embeddings"), path)}
    for old, new in RENAMED.items():
        for i in range(depth if "{i}" in old else 1):
            for leaf in ("weight", "bias"):
                result[f"{new.format(i=i)}.{leaf}"] = take(f"{old.format(i=i)}.{leaf}")
    for i in range(depth):
        own = QKV.format(i=i)
        query, key, value = (take(f"{own}{part}.weight") for part in ("query", "key", "value"))
        result[f"blocks.{i}.attn.qkv.weight"] = torch.cat([query, key, value])
        result[f"blocks.{i}.attn.q_bias"], result[f"blocks.{i}.attn.v_bias"] = (
            take(f"{own}{part}.bias") for part in ("query", "value")
        )
        take(f"{own}key.bias")
    left_out = [key for key in state if re.fullmatch(LEFT_OUT, key)]
    if unknown := state.keys() - set(left_out):
        raise CheckpointError(f"{path}: {first_few(sorted(unknown), 4)}: not of an unfactorised ViViT-B/16x2")
    print(f"position table   {SLOTS} slots of 2 frames -> {SLOTS // 2}, by the mean of pairs; class position left out")
    print("patch embedding  as it is")
    print(f"{depth} blocks        query, key, value -> qkv; key biases left out; the rest renamed")
    print("final norm       renamed")
    print(f"left out         {', '.join(left_out) or 'nothing else'}")
    return {f"encoder.{key}": tensor.contiguous() for key, tensor in result.items()}


def _pooled_table(table: Tensor, path: str) -> Tensor:
    """Map (1, 1 + 16 x 14 x 14, D) to (1, 8 x 14 x 14, D)."""
    expected = 1 + SLOTS * SIDE * SIDE
    if table.ndim != 3 or table.shape[1] != expected:
        raise CheckpointError(f"{path}: a position table of shape {tuple(table.shape)}, not (1, {expected}, D)")
    return table[:, 1:].unflatten(1, (SLOTS // 2, 2, SIDE * SIDE)).mean(dim=2).flatten(1, 2)


def _renamed(key: str, names: dict[str, str]) -> str | None:
    """Return the new name of a key, of its block if it has one, or None."""
    number = re.search(r"(?<=encoderblock_)\d+", key)
    general = key if number is None else key.replace(f"encoderblock_{number[0]}", "encoderblock_{i}")
    name = names.get(general)
    return name and name.replace("{i}", number[0] if number else "")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hugging Face's pytorch_model.bin or model.safetensors, or Scenic's checkpoint")
    parser.add_argument("output", help="file to write, e.g. vivit_b_k400.pth")
    args = parser.parse_args()
    try:
        state = convert(read_source(args.source), args.source)
    except CheckpointError as e:
        sys.exit(f"error: {e}")
    except RuntimeError as e:
        sys.exit(f"error: {args.source}: its tensors do not fit together ({short_reason(e)}); download it again")
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with replaced(args.output) as temporary:
            torch.save({"model": state, "family": "ViViT"}, temporary)
    except (OSError, RuntimeError) as e:  # torch.save raises either
        sys.exit(f"error: {args.output}: cannot be written ({str(e).splitlines()[0]})")
    print(f"{len(state)} tensors, float32: {args.output}, for --model vit_base_patch16_224")


if __name__ == "__main__":
    main()
