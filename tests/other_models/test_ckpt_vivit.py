"""ViViT: the converter on files with the published keys, of Hugging Face and Scenic, to the reference's logits."""

import importlib.util
import re

import msgpack
import numpy as np
import pytest
import torch
from helpers import ROOT, fill_head, golden, other_input, other_recipe, run
from safetensors.torch import save_file

from models import create_model
from models.registry import Dropout, VideoInput
from models.vit import Size, VideoViT
from models.weights import CheckpointError, load_pretrained
from models.weights.kinds import is_flax

SCRIPT = ROOT / "other_models" / "ViViT" / "ckpt_vivit.py"
FIXTURES = {f["name"]: f for f in golden("models_other")["fixtures"] if f["family"] == "ViViT"}
HF, SCENIC = FIXTURES["vivit_b16x2_k400_hf"], FIXTURES["vivit_b16x2_k400_scenic"]
spec = importlib.util.spec_from_file_location("ckpt_vivit", SCRIPT)
ckpt_vivit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ckpt_vivit)


# ----------------------------------------------------------------------------------------------------------------------
# Files as published


def shrink(shape):
    """A shape of ViViT-B as a tiny one: width 24, 3 heads, 2 blocks are kept by `is_kept`."""
    small = {768: 24, 3072: 96, 64: 8, 12: 3, 400: 5}
    return tuple(small.get(n, n) for n in shape)


def is_kept(key):
    return not any(f"{word}{i}{end}" in key for i in range(2, 12) for word, end in (("layer.", "."), ("block_", "/")))


def tensors(fixture, *, tiny, scale=0.02):
    return {
        key: other_recipe(key, shrink(shape) if tiny else shape, scale=scale)
        for key, shape in fixture["checkpoint_keys"]
        if is_kept(key) or not tiny
    }


def flax_bytes(leaves, chunked=()):
    """flax.serialization.msgpack_serialize of a tree, given as {path: tensor}; arrays in `chunked` come in pieces."""

    def pack(array):
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes("C"))))

    tree = {"accum_train_time": 1, "global_step": msgpack.ExtType(3, msgpack.packb(((), "int32", b"\1\0\0\0")))}
    for path, tensor in leaves.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        array = tensor.numpy()
        node[leaf] = pack(array)
        if path in chunked:
            pieces = np.array_split(array.reshape(-1), 3)
            node[leaf] = {
                "__msgpack_chunked_array__": True,
                "shape": {str(i): n for i, n in enumerate(array.shape)},
                "chunks": {str(i): pack(piece) for i, piece in enumerate(pieces)},
            }
    return msgpack.packb(tree)


def write_scenic(path, leaves, **kwargs):
    path.write_bytes(flax_bytes(leaves, **kwargs))
    return str(path)


def write_hf(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def converted(source, output):
    """The file the script writes, run as a user runs it."""
    done = run(SCRIPT, source, output)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Golden


@pytest.mark.slow
@pytest.mark.parametrize(("fixture", "scale"), [(HF, 0.02), (SCENIC, 0.05)], ids=["hf", "scenic"])
def test_both_sources_give_the_reference_logits(fixture, scale, tmp_path):
    source, output = tmp_path / "source.bin", tmp_path / "vivit.pth"
    write = write_hf if fixture is HF else write_scenic
    said = converted(write(source, tensors(fixture, tiny=False, scale=scale)), output)
    assert "16 slots of 2 frames -> 8" in said and "12 blocks" in said
    state = torch.load(output, weights_only=True)["model"]
    assert {k: list(v.shape) for k, v in state.items()} == dict(fixture["converted_keys"])
    assert all(v.dtype == torch.float32 for v in state.values())
    if scale == 0.02:
        for key, expected in fixture["converted_digest"].items():
            np.testing.assert_allclose(state[key].flatten()[: len(expected["first"])], expected["first"], atol=1e-7)
            assert state[key].std(correction=0).item() == pytest.approx(expected["std"], abs=1e-7)
    name = {0.02: "main", 0.05: "strong"}[scale]
    for variant, kwargs, taken in (
        ("learned_pos", {}, True),
        ("learned_pos_tanh_gelu", {"gelu": "tanh"}, True),
        ("simple_tad_actual_sincos_pos", {}, False),
    ):
        model = create_model("vit_base_patch16_224", **kwargs).eval()
        report = load_pretrained(model, str(output), stored_table=taken)
        assert report.dialect == "ViViT, converted" and report.missing == ["head.weight", "head.bias"]
        assert report.ignored == [] if taken else ["encoder.pos_embed"]
        assert (
            sum(p.numel() for p in model.parameters())
            == fixture["finetune_params_learnable_pos" if taken else "finetune_params"]["total"]
        )
        fill_head(model, report.missing, lambda key, shape: other_recipe(key, shape, scale=scale))
        with torch.no_grad():
            logits = model(other_input(fixture))[0]
        np.testing.assert_allclose(logits, fixture["expected"][f"{name}_{variant}"]["logits"], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Tiny files


def test_bin_safetensors_and_bare_model_agree(tmp_path):
    state = tensors(HF, tiny=True)
    bare = {k.removeprefix("vivit."): v for k, v in state.items() if k.startswith("vivit.")}
    bare |= {"pooler.dense.weight": torch.zeros(24, 24), "pooler.dense.bias": torch.zeros(24)}
    results = []
    for name, content in (("a.bin", state), ("model.safetensors", state), ("b.bin", bare)):
        source = write_hf(tmp_path / name, content)
        results.append(ckpt_vivit.convert(ckpt_vivit.read_source(source), source))
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in results[0].keys() | other.keys())


def test_the_table_is_the_mean_of_pairs_and_half_files_become_float(tmp_path):
    state = tensors(HF, tiny=True)
    source = write_hf(tmp_path / "half.bin", {k: v.half() for k, v in state.items()})
    result = ckpt_vivit.convert(ckpt_vivit.read_source(source), source)
    table = state["vivit.embeddings.position_embeddings"].half().float()[0, 1:].view(16, 196, 24)
    torch.testing.assert_close(result["encoder.pos_embed"][0].view(8, 196, 24), (table[::2] + table[1::2]) / 2)
    assert {v.dtype for v in result.values()} == {torch.float32}


def test_chunked_arrays_params_and_target_params_agree(tmp_path):
    leaves = tensors(SCENIC, tiny=True)
    bare = {k.removeprefix("optimizer/target/"): v for k, v in leaves.items()}
    chunked = ("optimizer/target/Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel", "optimizer/target/cls")
    sources = (
        write_scenic(tmp_path / "a", leaves),
        write_scenic(tmp_path / "b", leaves, chunked=chunked),
        write_scenic(tmp_path / "c", {f"params/{k}": v for k, v in bare.items()}),
        write_scenic(tmp_path / "d", {f"optimizer/target/params/{k}": v for k, v in bare.items()}),
    )
    results = [ckpt_vivit.convert(ckpt_vivit.read_source(source), source) for source in sources]
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in results[0].keys() | other.keys())


def test_both_sources_give_the_same_weights(tmp_path):
    """A Scenic tree and the same weights in Hugging Face's layout, as its own converter lays them out."""
    leaves = tensors(SCENIC, tiny=True)
    ours = ckpt_vivit.from_scenic(ckpt_vivit.read_flax(write_scenic(tmp_path / "a", leaves)), "a")
    names = {k.removeprefix("vivit."): shrink(shape) for k, shape in HF["checkpoint_keys"] if is_kept(k)}
    assert {k: tuple(v.shape) for k, v in ours.items()} == names
    kernel = leaves["optimizer/target/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel"]
    weight = ours["encoder.layer.1.attention.attention.query.weight"]
    x = torch.randn(5, 24)
    torch.testing.assert_close(x @ weight.T, torch.einsum("nd,dhk->nhk", x, kernel).flatten(1))
    kernel = leaves["optimizer/target/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out/kernel"]
    weight = ours["encoder.layer.0.attention.output.dense.weight"]
    torch.testing.assert_close(x @ weight.T, torch.einsum("nhk,hkd->nd", x.unflatten(1, (3, 8)), kernel))


@pytest.mark.parametrize("source", ["hf", "scenic"])
def test_any_tensor_missing_or_unknown_is_named(source, tmp_path):
    fixture = HF if source == "hf" else SCENIC
    write = write_hf if source == "hf" else write_scenic
    state = tensors(fixture, tiny=True)
    optional = ("classifier", "cls_token", "optimizer/target/cls", "output_projection")
    for key in state:
        if any(word in key for word in optional):
            continue
        path = write(tmp_path / "file", {k: v for k, v in state.items() if k != key})
        with pytest.raises(CheckpointError, match=r"lacks .*; the file is incomplete"):
            ckpt_vivit.convert(ckpt_vivit.read_source(path), path)
    prefix = "vivit." if source == "hf" else "optimizer/target/"
    path = write(tmp_path / "file", state | {f"{prefix}extra": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="extra.* not of an unfactorised ViViT"):
        ckpt_vivit.convert(ckpt_vivit.read_source(path), path)


def test_other_files_are_refused(tmp_path):
    leaves = tensors(SCENIC, tiny=True)
    factorised = {k.replace("Transformer/", "SpatialTransformer/"): v for k, v in leaves.items()}
    html = tmp_path / "html"
    html.write_text("<!DOCTYPE html>")
    whole = flax_bytes(leaves)
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    table = "vivit.embeddings.position_embeddings"
    other_size = tensors(HF, tiny=True) | {table: torch.zeros(1, 1 + 8 * 196, 24)}
    for path, message in (
        (write_scenic(tmp_path / "factorised", factorised), "SpatialTransformer.* not of an unfactorised ViViT"),
        (write_scenic(tmp_path / "empty", {"model_state/x": torch.zeros(1)}), "no parameters under params or"),
        (write_hf(tmp_path / "vit.bin", create_model("vit_tiny_patch16_64").state_dict()), "not a ViViT"),
        (write_hf(tmp_path / "size.bin", other_size), r"a position table of shape \(1, 1569, 24\), not \(1, 3137, D\)"),
        (str(html), "HTML or XML page"),
        (str(tmp_path / "cut"), "truncated, or not a flax checkpoint"),
        (str(tmp_path / "absent"), "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ckpt_vivit.convert(ckpt_vivit.read_source(path), path)
    done = run(SCRIPT, html, tmp_path / "out.pth")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and not (tmp_path / "out.pth").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Unconverted and converted files in load_pretrained


def test_flax_files_are_sent_to_the_converter(tmp_path):
    path = write_scenic(tmp_path / "checkpoint", tensors(SCENIC, tiny=True))
    with pytest.raises(CheckpointError, match=r"convert it with other_models/ViViT/ckpt_vivit\.py"):
        load_pretrained(create_model("vit_tiny_patch16_64"), path)


def test_hugging_face_s_files_load_as_they_are_and_as_converted(tmp_path):
    sizes, video = Size(24, 2, 3), VideoInput(num_frames=16)
    direct, by_way = (VideoViT(sizes, "sinusoid", video, Dropout()).eval() for _ in range(2))
    source = write_hf(tmp_path / "model.safetensors", tensors(HF, tiny=True))
    report = load_pretrained(direct, source)
    assert "of 16 x 14 x 14 tokens, resampled to 8 x 14 x 14" in str(report)
    converted(source, tmp_path / "vivit.pth")
    load_pretrained(by_way, str(tmp_path / "vivit.pth"))
    for key, value in by_way.state_dict().items():
        if not key.startswith("head."):
            torch.testing.assert_close(value, direct.state_dict()[key], atol=1e-6, rtol=0)


def with_table(tmp_path, scale=2.0, **kwargs):
    """(model with a learned table, file of it)."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", **kwargs)
    model.learn_pos_embed()
    with torch.no_grad():
        model.pos_embed.mul_(scale)
    torch.save({"model": model.state_dict(), "spec": model.spec}, tmp_path / "file.pth")
    return model, str(tmp_path / "file.pth")


def test_a_stored_table_is_taken_resampled_or_left_out(tmp_path):
    source, path = with_table(tmp_path)
    model = create_model("vit_tiny_patch16_64")
    report = load_pretrained(model, path)
    assert "pos_embed" in report.loaded and not report.missing and isinstance(model.pos_embed, torch.nn.Parameter)
    assert report.fitted == [
        "pos_embed of 2 x 4 x 4 tokens",
        "pos_embed replaces the model's fixed table, and is trained unless --freeze_layers is given",
    ]
    assert torch.equal(model.pos_embed, source.pos_embed)

    model = create_model("vit_tiny_patch16_64")
    report = load_pretrained(model, path, stored_table=False)
    assert report.ignored == ["pos_embed"] and report.reasons == {"pos_embed": "learned position table"}
    assert "pos_embed" not in model.state_dict()

    longer = create_model("vit_tiny_patch16_64", num_frames=8)
    assert load_pretrained(longer, path).fitted[0] == "pos_embed of 2 x 4 x 4 tokens, resampled to 4 x 4 x 4"
    mae = create_model("pretrain_videomae_tiny_patch16_64")
    assert "encoder.pos_embed" in load_pretrained(mae, path).loaded
    assert torch.equal(mae.encoder.pos_embed, source.pos_embed)


def test_a_stored_table_equal_to_the_model_s_own_stays_fixed(tmp_path):
    source, path = with_table(tmp_path, scale=1.0)
    torch.save({"model": dict(source.state_dict())}, tmp_path / "foreign.pth")
    model = create_model("vit_tiny_patch16_64")
    report = load_pretrained(model, str(tmp_path / "foreign.pth"))
    assert report.reasons == {"pos_embed": "position table, the model's own"} and "pos_embed" not in model.state_dict()
    load_pretrained(model, path)  # our files hold a table that was learned, or none
    assert "pos_embed" in model.state_dict()


def test_a_learned_table_that_the_file_lacks_is_missed(tmp_path):
    torch.save({"model": create_model("vit_tiny_patch16_64").state_dict()}, tmp_path / "file.pth")
    model = create_model("vit_tiny_patch16_64")
    model.learn_pos_embed()
    with pytest.raises(CheckpointError, match="lacks 1 tensors the model needs: pos_embed"):
        load_pretrained(model, str(tmp_path / "file.pth"))


def test_a_safetensors_file_that_begins_like_msgpack_is_read(tmp_path):
    state = tensors(HF, tiny=True)
    for padding in range(4096):
        save_file(state, tmp_path / "model.safetensors", metadata={"p": "-" * padding})
        if is_flax((tmp_path / "model.safetensors").read_bytes()[:1]):
            break
    assert is_flax((tmp_path / "model.safetensors").read_bytes()[:1])
    read = ckpt_vivit.read_source(str(tmp_path / "model.safetensors"))
    assert read.keys() == {k.removeprefix("vivit.") for k in state}


def test_an_output_that_cannot_be_written_is_said(tmp_path):
    source = write_hf(tmp_path / "source.bin", tensors(HF, tiny=True))
    (tmp_path / "folder").mkdir()
    done = run(SCRIPT, source, tmp_path / "folder")
    assert done.returncode == 1 and re.match(r"error: .*/folder: cannot be written \(", done.stderr)
    assert "for --model vit_base" in converted(source, tmp_path / "new" / "vivit.pth")


def test_another_hugging_face_model_is_not_taken_for_vivit(tmp_path):
    torch.save({"embeddings.patch_embeddings.projection.weight": torch.zeros(1)}, tmp_path / "file.bin")
    with pytest.raises(CheckpointError, match="not a Video ViT checkpoint"):
        load_pretrained(create_model("vit_tiny_patch16_64"), str(tmp_path / "file.bin"))


def test_a_table_of_no_known_grid_is_refused(tmp_path):
    state = create_model("vit_tiny_patch16_64").state_dict() | {"pos_embed": torch.zeros(1, 31, 128)}
    torch.save({"model": state}, tmp_path / "file.pth")
    model = create_model("vit_tiny_patch16_64")
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 31, 128\), not \(1, 32, 128\)"):
        load_pretrained(model, str(tmp_path / "file.pth"))
    assert "pos_embed" not in model.state_dict()
