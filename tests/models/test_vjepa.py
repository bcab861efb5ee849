"""V-JEPA 2 and 2.1: the reference's features, its files, what tells the versions apart, the way through DAPT."""

import json
import re
import zlib

import numpy as np
import pytest
import torch
from helpers import golden, load_weights, run
from safetensors.torch import save_file
from timm.models import group_parameters

from models import create_model
from models.heads import AttentivePooler
from models.registry import Dropout, VideoInput
from models.vit import Size
from models.vjepa import VJEPA, rotary_table
from models.weights import CheckpointError, load_pretrained, read_hints

FIXTURES = {f["name"]: f for f in golden("models_vjepa")["fixtures"]}
HF = {f["name"]: f for f in golden("models_hf")["fixtures"] if f["name"].startswith("vjepa2")}
TINY = {"vjepa2_0_tiny": ("2.0", 2, "target_encoder"), "vjepa2_1_tiny": ("2.1", 12, "ema_encoder")}
VIDEO = VideoInput(num_frames=4, input_size=64)
NAMES = {"2.0": "vjepa2_vit_tiny_patch16_64", "2.1": "vjepa21_vit_tiny_patch16_64"}
every_version = pytest.mark.parametrize("version", NAMES)


def recipe(key, shape, scale, tag=""):
    values = (
        np.random.Generator(np.random.PCG64(zlib.crc32((tag + key).encode()))).standard_normal(tuple(shape)) * scale
    )
    return torch.from_numpy((values + (len(shape) == 1 and key.endswith(".weight"))).astype(np.float32))


def clip(case):
    video = np.random.Generator(np.random.PCG64(case["input"]["seed"])).standard_normal(case["input"]["shape"])
    return torch.from_numpy(video.astype(np.float32))


def model_of(name, **options):
    version, depth, _ = TINY[name]
    options = {"num_classes": 0, "final_reduction": "none"} | options
    return VJEPA(Size(96, depth, 3), version, 3, VIDEO, Dropout(), **options).eval()


def published(path, name, scale=None):
    """The file of a tiny model as published: other weights under `encoder`, a predictor, an optimizer."""
    fixture, (version, _, ema) = FIXTURES[name], TINY[name]
    scale = scale or fixture["scale"]
    trees = {
        tree: {f"module.backbone.{key}": recipe(key, shape, scale, tag) for key, shape in fixture["keys"]}
        for tree, tag in (("encoder", "encoder/"), (ema, ""))
    }
    if version == "2.0":
        trees[ema]["module.backbone.pos_embed"] = torch.zeros(1, 32, 96)
    predictor = {
        "module.backbone.predictor_embed.weight": torch.ones(4, 96),
        "module.backbone.img_mod_embed": torch.ones(1),
    }
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}
    torch.save({**trees, "predictor": predictor, "opt": optimizer, "scaler": None, "epoch": 3}, path)
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# Golden


@pytest.mark.parametrize("name", TINY)
def test_published_files_give_the_reference_features(name, tmp_path):
    model = model_of(name)
    report = load_pretrained(model, published(tmp_path / "file.pt", name))
    assert report.dialect == {"2.0": "V-JEPA 2", "2.1": "V-JEPA 2.1"}[model.version] and report.epoch == 3
    assert report.wrapper == TINY[name][2] and not report.missing and not report.fitted
    assert report.ignored == (["module.backbone.pos_embed"] if model.version == "2.0" else [])
    assert sum(p.numel() for p in model.parameters()) == FIXTURES[name]["parameters"]
    for case in FIXTURES[name]["cases"]:
        if case["name"] == "small_weights":
            load_pretrained(model, published(tmp_path / "file.pt", name, case["scale"]))
        positions = torch.tensor(case["visible_tokens"]) if "visible_tokens" in case else None
        levels = (0, 1, 2, 3) if case["name"].startswith(("hierarchical", "out_layers")) else (-1,)
        with torch.no_grad():
            found = model.features(clip(case), positions, levels).numpy()
        if "features" in case:
            np.testing.assert_allclose(found, case["features"], atol=5e-5, rtol=0)
        elif "features_first4channels" in case:
            np.testing.assert_allclose(found[..., :4], case["features_first4channels"], atol=5e-5, rtol=0)
        elif "tokens" in case:
            for token, first in case["tokens"].items():
                np.testing.assert_allclose(found[0, int(token), : len(first)], first, atol=5e-5, rtol=0)
        else:
            for level, ends in enumerate(case["first4channels_of_tokens_0_and_last"]):
                np.testing.assert_allclose(found[0, [0, -1], 96 * level :][:, :4], ends, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_a_masked_autoencoder_encodes_visible_tokens_as_the_reference(name, tmp_path):
    """embed, a subset, encode: the way of `models.mae`."""
    model = model_of(name)
    load_pretrained(model, published(tmp_path / "file.pt", name))
    case = next(case for case in FIXTURES[name]["cases"] if case["name"] == "visible_subset")
    visible = torch.tensor(case["visible_tokens"])
    with torch.no_grad():
        tokens = model.embed(clip(case)).take_along_dim(visible[:, :, None], dim=1)
        np.testing.assert_allclose(model.encode(tokens, visible), case["features"], atol=5e-5, rtol=0)


def test_the_probe_gives_the_reference_logits(tmp_path):
    fixture = FIXTURES["vjepa2_0_tiny"]
    probe, model = fixture["probe"], model_of("vjepa2_0_tiny")
    load_pretrained(model, published(tmp_path / "file.pt", "vjepa2_0_tiny"))
    state = {key: recipe(key, shape, probe["scale"]) for key, shape in probe["keys"]}
    pooler, linear = AttentivePooler(96, 3, depth=4).eval(), torch.nn.Linear(96, 5)
    pooler.load_state_dict({k.removeprefix("pooler."): v for k, v in state.items() if k.startswith("pooler.")})
    linear.load_state_dict({k.removeprefix("linear."): v for k, v in state.items() if k.startswith("linear.")})
    with torch.no_grad():
        logits = linear(pooler(model(clip(fixture["cases"][0]))))
    np.testing.assert_allclose(logits, probe["logits"], atol=5e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model_name", "size"),
    [("vjepa2_0_vitl", "vjepa2_vit_large_patch16_256", 256), ("vjepa2_1_vitb", "vjepa21_vit_base_patch16_384", 224)],
)
def test_full_sizes_give_the_reference_features(name, model_name, size, tmp_path):
    """Forward from a file of two encoders, and backward: every parameter that is trained has a gradient."""
    fixture = FIXTURES[name]
    model = create_model(model_name, num_classes=0, final_reduction="none", input_size=size).eval()
    keys = {f"module.backbone.{k}": recipe(k, s, fixture["scale"]) for k, s in fixture["keys"]}
    torch.save({fixture["checkpoint"]["read"]: keys, "encoder": keys, "epoch": 1}, tmp_path / "file.pt")
    report = load_pretrained(model, str(tmp_path / "file.pt"))
    assert not report.missing and len(report.loaded) == fixture["tensors"]
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    for case in fixture["cases"]:
        positions = None
        if "visible_tokens" in case:
            count, some = case["shape"][1], (size // 16) ** 2 * 8
            positions = np.sort(np.random.Generator(np.random.PCG64(1)).choice(some, count, replace=False))
            assert positions[:8].tolist() == case["visible_first8"]
            positions = torch.from_numpy(positions)[None]
        with torch.no_grad():
            found = model.features(clip(case), positions)
        np.testing.assert_allclose(found.mean(dim=1)[0, :16], case["mean_over_tokens_first16"], atol=2e-6, rtol=0)
        for token, first in case["tokens"].items():
            np.testing.assert_allclose(found[0, int(token), : len(first)], first, atol=5e-5, rtol=0)
    model = create_model(model_name, input_size=size, num_frames=4, init_scale=1.0)
    video = torch.randn(1, *model.input_shape)
    torch.nn.functional.cross_entropy(model(video), torch.tensor([1])).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face


def hf_folder(path, name, state=None):
    path.mkdir(exist_ok=True)
    fixture = HF[name]
    save_file(
        {k: recipe(k, s, 0.1) for k, s in fixture["keys"]} if state is None else state, path / "model.safetensors"
    )
    (path / "config.json").write_text(fixture["config.json"])
    return str(path)


def hf_clip():
    video = np.random.Generator(np.random.PCG64(100)).standard_normal((2, 4, 3, 64, 64)).astype(np.float32)
    return torch.from_numpy(video).transpose(1, 2)


def classifier():
    return model_of("vjepa2_0_tiny", num_classes=3, final_reduction="attention")


def test_folders_of_hugging_face_give_the_reference_numbers(tmp_path):
    model, expected = model_of("vjepa2_0_tiny"), HF["vjepa2_model"]["expected"]
    report = load_pretrained(model, hf_folder(tmp_path / "model", "vjepa2_model"))
    assert report.dialect == "V-JEPA 2 of Hugging Face" and not report.missing and "predictor.*" in str(report)
    with torch.no_grad():
        found = model(hf_clip())
    np.testing.assert_allclose(found[0, :, :8], expected["first8_of_every_token_clip_0"], atol=5e-5, rtol=0)
    np.testing.assert_allclose(found.mean(dim=1), expected["mean_over_tokens"], atol=5e-6, rtol=0)
    path = hf_folder(tmp_path / "classifier", "vjepa2_classification")
    model = classifier()
    assert not load_pretrained(model, path).missing
    with torch.no_grad():
        np.testing.assert_allclose(
            model(hf_clip()), HF["vjepa2_classification"]["expected"]["logits"], atol=5e-6, rtol=0
        )
    assert read_hints(path) == {"num_frames": 4, "input_size": 64, "tubelet_size": 2, "gelu": "erf"}
    settings = json.loads((tmp_path / "classifier" / "config.json").read_text())
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(settings | {"use_rope_interleave": True}))
    with pytest.raises(CheckpointError, match="says use_rope_interleave: V-JEPA 2.1 converted by others"):
        load_pretrained(model, path)


def test_transformers_computes_the_same_of_the_same_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = hf_folder(tmp_path / "classifier", "vjepa2_classification")
    theirs = transformers.VJEPA2ForVideoClassification.from_pretrained(path).eval()
    theirs.save_pretrained(tmp_path / "again")
    for folder in (path, str(tmp_path / "again")):
        model = classifier()
        assert not load_pretrained(model, folder).missing
        with torch.no_grad():
            expected = theirs(hf_clip().transpose(1, 2)).logits
            np.testing.assert_allclose(model(hf_clip()), expected, atol=5e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Mutations


@pytest.mark.parametrize("name", [*TINY, "vjepa2_classification"])
def test_any_tensor_missing_renamed_or_misshapen_is_named(name, tmp_path):
    if name in TINY:
        model, state = model_of(name), {k: recipe(k, s, 0.1) for k, s in FIXTURES[name]["keys"]}
        state = {f"module.backbone.{k}": v for k, v in state.items() if not re.match(r"blocks\.([3-9]|1\d)\.", k)}
        model.blocks = model.blocks[:3]
    else:
        model, state = classifier(), {k: recipe(k, s, 0.1) for k, s in HF[name]["keys"] if ".predictor." not in k}
    torch.save({"x": state}, tmp_path / "file.pt")
    load_pretrained(model, str(tmp_path / "file.pt"))
    for key in state:
        rest = {k: v for k, v in state.items() if k != key}
        bare = key.removeprefix("module.backbone.")
        for broken, named in (
            (rest, "lacks"),
            (rest | {f"{key}_": state[key]}, "lacks"),
            (state | {key: torch.zeros(3, 3)}, re.escape(bare)),
        ):
            torch.save({"x": broken}, tmp_path / "file.pt")
            with pytest.raises(CheckpointError, match=named):
                load_pretrained(model, str(tmp_path / "file.pt"))


def test_the_versions_are_told_apart_by_their_keys(tmp_path):
    for name, other in (("vjepa2_0_tiny", "2.1"), ("vjepa2_1_tiny", "2.0")):
        path = published(tmp_path / "file.pt", name)
        model = VJEPA(Size(96, TINY[name][1], 3), other, 3, VIDEO, Dropout())
        with pytest.raises(CheckpointError, match="this is .*, but the model is "):
            load_pretrained(model, path)
    bare = {k: recipe(k, s, 0.1) for k, s in FIXTURES["vjepa2_0_tiny"]["keys"]}  # as torch.hub has it
    torch.save(bare, tmp_path / "file.pt")
    assert not load_pretrained(model_of("vjepa2_0_tiny"), str(tmp_path / "file.pt")).missing
    with pytest.raises(CheckpointError, match="but the model is"):
        load_pretrained(create_model("vit_tiny_patch16_64"), str(tmp_path / "file.pt"))


def test_rotations():
    positions = torch.arange(32)
    tables = {version: rotary_table(positions, (2, 4, 4), 32, version) for version in ("2.0", "2.1")}
    assert all(table.shape == (2, 32, 32) and (table[0, :, 30:] == 1).all() for table in tables.values())
    assert not torch.equal(*tables.values())
    np.testing.assert_allclose(tables["2.1"][0, :4, 10], torch.tensor([1.0] * 4), atol=1e-6)  # row 0
    np.testing.assert_allclose(tables["2.1"][0, :4, 20], (torch.arange(4) * 5.0).cos(), atol=1e-6)  # columns 0 to 15
    with pytest.raises(ValueError, match="2 rows and columns of tokens or more, not 1 x 1"):
        create_model(NAMES["2.1"], input_size=16)
    with pytest.raises(ValueError, match="does not divide into tokens"):
        create_model(NAMES["2.0"]).features(torch.zeros(1, 3, 3, 64, 64))


# ----------------------------------------------------------------------------------------------------------------------
# Training


@every_version
def test_recomputed_blocks_give_the_same_gradients(version):
    torch.manual_seed(0)
    model, grads = create_model(NAMES[version], init_scale=1.0).train(), []
    video = torch.randn(2, *model.input_shape)
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(video).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g is not None for g in grads[0]) and all(map(torch.allclose, *grads))


@every_version
def test_layers_of_the_learning_rate(version):
    model = create_model(NAMES[version])
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    depth = len(model.blocks)
    for name, layer in layers.items():
        block = re.match(r"blocks\.(\d+)", name)
        expected = 0 if re.match("patch_embed|img_mod|video_mod", name) else int(block[1]) + 1 if block else depth + 1
        assert layer == expected, name


@pytest.mark.slow
@every_version
def test_a_tiny_one_goes_through_both_scripts(version, dota_root, tmp_path):
    """A published layout -> one step of DAPT -> one step of fine-tuning -> --eval, under torchrun."""
    source = create_model(NAMES[version], num_classes=0, final_reduction="none")
    state = {f"module.backbone.{k}": v for k, v in source.state_dict().items()}
    torch.save({"ema_encoder": state, "encoder": state, "epoch": 1}, tmp_path / "published.pt")
    data = ["--data_set", "DoTA", "--data_path", dota_root, "--num_workers", 0, "--view_fps", 5]
    steps = ["--total_batch_size", 2, "--nb_samples_per_epoch", 2, "--epochs", 1, "--warmup_epochs", 0, "--aa", "none"]
    dapt = ["--model", f"pretrain_{NAMES[version]}", "--from_ckpt", tmp_path / "published.pt"]
    done = run("run_dapt.py", *data, *steps, *dapt, "--output_dir", tmp_path / "dapt", processes=1)
    assert done.returncode == 0, done.stderr
    tuned = ["--model", NAMES[version], "--disable_eval_during_finetuning", "--finetune"]
    tuned += [tmp_path / "dapt" / "checkpoint-0.pth", "--output_dir", tmp_path / "tuned"]
    done = run("run_finetune.py", *data, *steps, *tuned, processes=1)
    assert done.returncode == 0, done.stderr
    before, after = (
        load_weights(tmp_path / "dapt" / "checkpoint-0.pth"),
        load_weights(tmp_path / "tuned/checkpoint-0.pth"),
    )
    key = "blocks.1.attn.qkv.weight"
    assert not torch.equal(state[f"module.backbone.{key}"], before[f"encoder.{key}"])
    assert not torch.equal(before[f"encoder.{key}"], after[key])
    evaluate = ["--eval", "--finetune", tmp_path / "tuned" / "checkpoint-0.pth", "--output_dir", tmp_path / "eval"]
    done = run("run_finetune.py", *data, *evaluate, "--sampling_rate_val", 8, processes=1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())
