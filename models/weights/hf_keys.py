"""Keys of Hugging Face's transformers brought to ours, by family; query, key and value are joined.

VideoMAE's biases have three spellings. All published files, and transformers up to 5.5 and from 5.18, have `q_bias` and
`v_bias`; versions between save `query.bias`, `value.bias` and `key.bias`, and took zeros for the published ones.
"""

import re
from dataclasses import dataclass, replace

import torch

from models.weights.entries import Entries, Entry
from models.weights.errors import CheckpointError
from utils.text import first_few

ZERO_BIASES = (
    "all query and value biases are zero: untrained, or trained by transformers 5.6 to 5.17 from a published file, "
    "whose biases these versions drop without an error; the file is taken as it is"
)
_INERT = "key biases, which change no attention"
_LAYER = {  # of VideoMAE and ViViT, within a block
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    r"attention\.output\.dense": "attn.proj",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
}


@dataclass(frozen=True)
class Family:
    """How transformers names the tensors of a family.

    marks: a pattern that at least one of its keys matches.
    names: pattern of a tensor's module, or of a whole key -> ours.
    blocks: pattern of a block, whose group 1 is its number -> ours.
    layer: as names, within a block.
    attention: what stands before query, key and value in a block.
    ignored: pattern of keys that are left out on purpose.
    key_bias: it matters, so all three biases are joined; else it is left out.
    """

    marks: str
    names: dict[str, str]
    blocks: dict[str, str]
    layer: dict[str, str]
    attention: str
    key_bias: bool = False
    ignored: str = r"(?!)"


_PROBE = r"pooler\.self_attention_layers\.(\d+)\."
_QUERY = r"pooler\.cross_attention_layer\."
_PROBE_NAMES = {
    r"pooler\.query_tokens": "pooler.query_tokens",
    rf"{_PROBE}layer_norm([12])": r"pooler.blocks.\1.norm\2",
    rf"{_PROBE}(mlp\.fc[12])": r"pooler.blocks.\1.\2",
    rf"{_PROBE}self_attn\.out_proj": r"pooler.blocks.\1.attn.proj",
    rf"{_QUERY}layer_norm([12])": r"pooler.cross_attention_block.norm\1",
    rf"{_QUERY}(mlp\.fc[12])": r"pooler.cross_attention_block.\1",
    rf"{_QUERY}cross_attn\.q_proj": "pooler.cross_attention_block.xattn.q",
    **{rf"{_PROBE}self_attn\.{part}_proj": rf"pooler.blocks.\1.attn.qkv.{i}" for i, part in enumerate("qkv")},
    **{rf"{_QUERY}cross_attn\.{p}_proj": f"pooler.cross_attention_block.xattn.kv.{i}" for i, p in enumerate("kv")},
}
FAMILIES = {  # by model_type; the first whose marks match
    "vjepa2": Family(
        marks=r"vjepa2\..+|encoder\.embeddings\.patch_embeddings\.proj\..+|encoder\.layer\.\d+\.norm1\..+"
        r"|pooler\.cross_attention_layer\..+",
        names={
            r"(?:vjepa2\.)?encoder\.embeddings\.patch_embeddings\.proj": "encoder.patch_embed.proj",
            r"(?:vjepa2\.)?encoder\.layernorm": "encoder.norm",
            r"classifier": "head",
            **_PROBE_NAMES,
        },
        blocks={r"(?:vjepa2\.)?encoder\.layer\.(\d+)\.": r"encoder.blocks.\1."},
        layer={r"(norm[12]|mlp\.fc[12])": r"\1", r"attention\.proj": "attn.proj"},
        attention=r"attention\.",
        key_bias=True,
        ignored=r"(vjepa2\.)?predictor\..+",
    ),
    "vivit": Family(
        marks=r"vivit\..+|embeddings\.(cls_token|position_embeddings)",
        names={
            r"(?:vivit\.)?embeddings\.cls_token": "encoder.cls_token",
            r"(?:vivit\.)?embeddings\.position_embeddings": "encoder.pos_embed",
            r"(?:vivit\.)?embeddings\.patch_embeddings\.projection": "encoder.patch_embed.proj",
            r"(?:vivit\.)?layernorm": "encoder.norm",
            r"classifier": "head",
        },
        blocks={r"(?:vivit\.)?encoder\.layer\.(\d+)\.": r"encoder.blocks.\1."},
        layer=_LAYER,
        attention=r"attention\.attention\.",
    ),
    "videomae": Family(
        marks=r"videomae\..+|encoder\.layer\.\d+\.layernorm_.+|decoder\.decoder_layers\..+",
        names={
            r"(?:videomae\.)?embeddings\.patch_embeddings\.projection": "encoder.patch_embed.proj",
            r"(?:videomae\.)?layernorm": "encoder.norm",
            r"classifier": "head",
        },
        blocks={
            r"(?:videomae\.)?encoder\.layer\.(\d+)\.": r"encoder.blocks.\1.",
            r"decoder\.decoder_layers\.(\d+)\.": r"decoder.blocks.\1.",
        },
        layer=_LAYER,
        attention=r"attention\.attention\.",
    ),
}


def family_of(entries: list[Entry]) -> str | None:
    """Return the model_type whose keys these are, or None."""
    for name, family in FAMILIES.items():
        if any(re.fullmatch(family.marks, entry.bare) for entry in entries):
            return name
    return None


def translate(found: Entries, family: str, path: str) -> None:
    """Bring entries of a family to our keys, in place; those that it does not know stay as they are.

    Raises CheckpointError: a query, key or value is absent or of another shape, or is there twice.
    """
    rules, entries, attention, unknown = FAMILIES[family], [], {}, []
    pattern = rules.attention + r"(?:(query|key|value)\.(weight|bias)|([qv])_(bias))"
    for entry in found.entries:
        block, inner = _split(rules, entry.bare)
        if part := block and re.fullmatch(pattern, inner):
            name = (part[1] or {"q": "query", "v": "value"}[part[3]], part[2] or part[4])
            other = attention.setdefault(block, {}).setdefault(name, entry)
            if other is not entry:
                raise CheckpointError(
                    f"{path}: {other.key} and {entry.key} both stand for the same tensor; one must go"
                )
            continue
        if re.fullmatch(rules.ignored, entry.bare):
            found.reasons[entry.key] = f"{entry.bare.removeprefix('vjepa2.').partition('.')[0]}.*"
            continue
        ours = _renamed(rules.layer if block else rules.names, inner)
        if block and ours is None:
            unknown.append(entry.key)
        entries.append(replace(entry, bare=block + (inner if ours is None else ours)))
    entries = _join_probe(entries, path)
    for block, parts in attention.items():
        entries += _joined(block, parts, rules.key_bias, path, unknown)
    if not rules.key_bias:
        _leave_out_key_biases(found, attention, path, unknown)
    biases = [e.tensor for e in entries if re.fullmatch(r"encoder\.blocks\.\d+\.attn\.[qv]_bias", e.bare)]
    if biases and not any(map(torch.any, biases)):
        found.notes.append(ZERO_BIASES)
    found.entries, found.family = entries, family


def _split(rules: Family, key: str) -> tuple[str, str]:
    """Return (our name of a key's block with a dot, the rest), or ("", the key)."""
    for block, ours in rules.blocks.items():
        if match := re.match(block, key):
            return match.expand(ours), key[match.end() :]
    return "", key


def _renamed(names: dict[str, str], key: str) -> str | None:
    """Return our name of a key, or None."""
    module, _, leaf = key.rpartition(".")
    for pattern, ours in names.items():
        if match := re.fullmatch(pattern, module):
            return f"{match.expand(ours)}.{leaf}"
        if match := re.fullmatch(pattern, key):
            return match.expand(ours)
    return None


def _joined(block: str, parts: dict, key_bias: bool, path: str, unknown: list[str]) -> list[Entry]:
    """Return qkv.weight and the biases of a block. parts: (query, key or value; weight or bias) -> entry."""
    some = next(iter(parts.values())).key
    stem = re.sub(r"(query\.|key\.|value\.|[qv]_)(weight|bias)$", "", some)
    three = ("query", "key", "value")
    joined = {"weight": three}
    if key_bias and any(kind == "bias" for _, kind in parts):
        joined["bias"] = three
    result = []
    for kind, names in joined.items():
        if lacking := [f"{stem}{name}.{kind}" for name in names if (name, kind) not in parts]:
            raise CheckpointError(f"{path}: lacks {first_few(lacking)}; the file is incomplete{_and(unknown)}")
        own = [parts[name, kind] for name in names]
        shapes = {e.key: tuple(e.tensor.shape) for e in own}
        if len(set(shapes.values())) > 1 or not all(shapes.values()):
            told = ", ".join(f"{key} is {shape}" for key, shape in shapes.items())
            raise CheckpointError(f"{path}: {told}, which cannot be joined; wrong or damaged file")
        key = f"{stem}{{query,key,value}}.{kind}"
        result.append(Entry(key, f"{block}attn.qkv.{kind}", torch.cat([e.tensor for e in own])))
    if not key_bias:
        for name in ("query", "value"):
            if entry := parts.get((name, "bias")):
                result.append(replace(entry, bare=f"{block}attn.{name[0]}_bias"))
    return result


def _join_probe(entries: list[Entry], path: str) -> list[Entry]:
    """Return the entries with the projections of V-JEPA's attentive probe joined as there: q, k, v and k, v."""
    parts: dict[str, dict[int, Entry]] = {}
    rest = []
    for entry in entries:
        if match := re.fullmatch(r"(pooler\..+\.(?:qkv|kv)\.)(\d)\.(weight|bias)", entry.bare):
            parts.setdefault(match[1] + match[3], {})[int(match[2])] = entry
        else:
            rest.append(entry)
    for bare, own in parts.items():
        shapes = {entry.key: tuple(entry.tensor.shape) for entry in own.values()}
        told = ", ".join(f"{key} is {shape}" for key, shape in shapes.items())
        if len(own) < (3 if ".qkv." in bare else 2):
            raise CheckpointError(f"{path}: lacks parts of {bare}: {told} alone; the file is incomplete")
        if len(set(shapes.values())) > 1:
            raise CheckpointError(f"{path}: {told}, which cannot be joined; wrong or damaged file")
        names = "{q,k,v}" if ".qkv." in bare else "{k,v}"
        key = re.sub(r"[qkv](?=_proj\.)", lambda _, names=names: names, next(iter(shapes)))
        rest.append(Entry(key, bare, torch.cat([own[i].tensor for i in sorted(own)])))
    return rest


def _and(unknown: list[str]) -> str:
    return f"; it has {first_few(unknown, 4)}, which no rule accounts for" if unknown else ""


def _leave_out_key_biases(found: Entries, attention: dict, path: str, unknown: list[str]) -> None:
    """Ignore key biases, of which either all blocks of a file have one, or none has."""
    biases = {block: parts.get(("key", "bias")) for block, parts in attention.items()}
    if not any(biases.values()):
        return
    for block, entry in biases.items():
        weight = attention[block]["key", "weight"]
        name, shape = weight.key.removesuffix("weight") + "bias", tuple(weight.tensor.shape[:1])
        if entry is None:
            raise CheckpointError(
                f"{path}: lacks {name}, which other blocks have; the file is incomplete{_and(unknown)}"
            )
        if tuple(entry.tensor.shape) != shape:
            raise CheckpointError(f"{path}: {name} is {tuple(entry.tensor.shape)}, not {shape}; wrong or damaged file")
        found.reasons[entry.key] = _INERT
