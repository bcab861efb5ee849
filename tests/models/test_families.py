"""The published families: their checkpoints' authentic keys, through files on disk, to the reference's logits."""

import re

import numpy as np
import pytest
import torch
from helpers import fill_head, golden, golden_input, other_input, other_recipe, published_file, recipe, run

from engine.checkpoint import save_weights
from models import create_model
from models.pos_embed import likely_grid, position_table, resampled, sincos_3d, sinusoid_1d
from models.registry import Dropout, VideoInput
from models.vit import Size, VideoViT
from models.weights import CheckpointError, load_pretrained
from models.weights.__main__ import main as weights_main

VIDEOMAE = {f["name"]: f for f in golden("models_videomae")["fixtures"]}
OTHER = {f["name"]: f for f in golden("models_other")["fixtures"]}
FULL_SIZE = {  # one of each architecture; the others' keys are in test_inspecting_published_key_sets
    "sigma_vit_s": ("vit_small_patch16_224", "SIGMA pre-training"),
    "mvd_vit_s_from_l": ("mvd_vit_small_patch16_224", "MVD pre-training"),
}


def accounted(report, keys, model):
    """Every key of the file is loaded or ignored, every key of the model loaded or missing; none is both."""
    loaded = set(report.sources.values())
    assert loaded | set(report.ignored) == set(keys) and not loaded & set(report.ignored)
    loaded = set(report.loaded)
    assert loaded | set(report.missing) == model.state_dict().keys() and not loaded & set(report.missing)


# ----------------------------------------------------------------------------------------------------------------------
# Golden


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_layouts_give_the_reference_logits(name, tmp_path):
    fixture, (model_name, dialect) = VIDEOMAE[name], FULL_SIZE[name]
    model = create_model(model_name).eval()
    report = load_pretrained(model, str(published_file(tmp_path / "published.pth", fixture)))
    assert report.dialect == dialect and report.missing == ["head.weight", "head.bias"]
    accounted(report, [key for key, _ in fixture["checkpoint"]["keys"]], model)
    assert set(report.ignored) == set(fixture["loader"]["ignored_checkpoint_keys"])
    fill_head(model, report.missing, recipe)
    with torch.no_grad():
        np.testing.assert_allclose(model(golden_input())[0], fixture["expected"]["logits"], atol=5e-6, rtol=0)


@pytest.mark.slow
def test_umt_gives_the_reference_logits(tmp_path):
    fixture, name, scale = OTHER["umt_b16_ptk710_f8_res224"], "strong", 0.05
    state = {key: other_recipe(key, shape, scale=scale) for key, shape in fixture["checkpoint_keys"]}
    torch.save({"model": state}, tmp_path / "published.pth")
    model = create_model("umt_vit_base_patch16_224").eval()
    assert sum(p.numel() for p in model.parameters()) == fixture["finetune_params"]["total"]
    report = load_pretrained(model, str(tmp_path / "published.pth"))
    assert report.dialect == "UMT pre-training" and report.missing == ["head.weight", "head.bias"]
    accounted(report, state, model)
    assert sorted(report.ignored) == fixture["load_report"]["unexpected"]
    fill_head(model, report.missing, lambda key, shape: other_recipe(key, shape, scale=scale))
    with torch.no_grad():
        logits = model(other_input(fixture))[0]
    np.testing.assert_allclose(logits, fixture["expected"][name]["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "scale"), [("main", 0.02), ("strong", 0.05)])
def test_a_tiny_umt_gives_the_reference_logits(name, scale, tmp_path):
    fixture = OTHER["umt_tiny_f8_img224"]
    model = VideoViT(Size(96, 2, 3), "umt", VideoInput(num_frames=8, tubelet_size=1), Dropout()).eval()
    state = {key: other_recipe(key, shape, scale=scale) for key, shape in fixture["checkpoint_keys"]}
    report = load_pretrained(model, save(tmp_path, state))
    assert set(report.loaded) == state.keys() and not report.missing and not report.ignored
    with torch.no_grad():
        np.testing.assert_allclose(model(other_input(fixture))[0], fixture["expected"][name]["logits"], atol=5e-6)


@pytest.mark.parametrize("dim", [384, 768, 1024])
def test_mvd_s_position_table(dim):
    expected = golden("models_videomae")["pos_embed_tables"][f"mvd_sincos_3d_g14_t8_d{dim}"]
    table = sincos_3d((8, 14, 14), dim)
    for row in (0, 1, 1567):
        np.testing.assert_allclose(table[row, :8], expected[f"row{row}[:8]"], atol=1e-6)
    np.testing.assert_allclose(table[15, dim // 4 : dim // 4 + 8], expected["row15[d/4:d/4+8]"], atol=1e-6)
    np.testing.assert_allclose(table[1567, -8:], expected["row1567[-8:]"], atol=1e-6)
    assert table.double().sum().item() == pytest.approx(expected["sum"], rel=1e-7)
    assert table.double().abs().sum().item() == pytest.approx(expected["abs_sum"], rel=1e-7)


@pytest.mark.parametrize("name", OTHER["umt_b16_ptk710_f8_res224"]["sincos_pos_embed_interpolated_dim768"])
def test_umt_s_position_table_at_other_sizes(name):
    expected = OTHER["umt_b16_ptk710_f8_res224"]["sincos_pos_embed_interpolated_dim768"][name]
    frames, size = map(int, re.fullmatch(r"frames(\d+)_img(\d+)", name).groups())
    table = position_table("umt", (frames, size // 16, size // 16), 768)
    assert [1, *table.shape] == expected["shape"]
    for stat, value in (("mean", table.mean()), ("std", table.std()), ("abs_mean", table.abs().mean())):
        assert value.item() == pytest.approx(expected[stat], abs=2e-5), stat
    flat = table.flatten()
    np.testing.assert_allclose(flat[: len(expected["first"])], expected["first"], atol=2e-5)
    np.testing.assert_allclose(flat[-8:], expected["last8"], atol=2e-5)


@pytest.mark.parametrize(
    ("positions", "wanted", "grid"),
    [
        (2048, (8, 16, 16), (8, 16, 16)),
        (2048, (16, 16, 16), (8, 16, 16)),
        (2048, (8, 8, 8), (8, 16, 16)),
        (512, (2, 16, 16), (2, 16, 16)),
        (4 * 81, (4, 16, 16), (4, 9, 9)),
        (4096, (8, 16, 16), (16, 16, 16)),
        (32, (4, 4, 4), (2, 4, 4)),
        (2049, (8, 16, 16), None),
        (0, (8, 16, 16), None),
    ],
)
def test_likely_grids(positions, wanted, grid):
    assert likely_grid(positions, wanted) == grid


def test_a_table_on_its_own_grid_is_not_touched():
    table = sinusoid_1d(1568, 32)
    assert resampled(table, (8, 14, 14), (8, 14, 14)) is table
    with pytest.raises(ValueError, match="sinusoid, sincos_3d or umt, not 'rope'"):
        position_table("rope", (1, 2, 2), 32)
    with pytest.raises(ValueError, match="divides by 16, not 20"):
        sincos_3d((1, 2, 2), 20)


# ----------------------------------------------------------------------------------------------------------------------
# Tiny files of each family, broken in every way


TINY = {
    "SMILE pre-training": "vit_tiny_patch16_64",
    "SIGMA pre-training": "vit_tiny_patch16_64",
    "MME pre-training": "vit_tiny_patch16_64",
    "MVD pre-training": "mvd_vit_tiny_patch16_64",
    "UMT pre-training": "umt_vit_tiny_patch16_64",
    "InternVideo2": "internvideo2_tiny_patch14_56",
    "ViViT, converted": "vit_tiny_patch16_64",
}
FRESH = {"InternVideo2": ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]}
ENCODER_TENSORS = {"InternVideo2": 44, "ViViT, converted": 57}
every_family = pytest.mark.parametrize("dialect", TINY)


def block(prefix, dim):
    """Zeros under the keys of a decoder's block."""
    shapes = {"attn.qkv.weight": (3 * dim, dim), "mlp.fc1.weight": (4 * dim, dim), "mlp.fc2.weight": (dim, 4 * dim)}
    names = [f"norm{i}.{k}" for i in (1, 2) for k in ("weight", "bias")]
    names += ["attn.q_bias", "attn.v_bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"]
    return {f"{prefix}.{k}": torch.zeros(s) for k, s in shapes.items()} | {
        f"{prefix}.{k}": torch.zeros(dim) for k in names
    }


def zeros(*names):
    return {name: torch.zeros(4) for name in names}


def published(dialect, model):
    """A state dict with the keys of a published file of the family, around the encoder of `model`."""
    if dialect == "InternVideo2":
        encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(("head", "fc_norm"))}
        decoders = [f"clip_decoder.5.{k}" for k in ("head.0.weight", "head.2.bias", "norm.weight")]
        return encoder | zeros(*decoders, "clip_pos_embed", "final_clip_decoder.head.2.weight", "mae_pos_embed")
    encoder = {k.replace("fc_norm", "norm"): v for k, v in model.state_dict().items() if not k.startswith("head")}
    pixel = {f"decoder.{k}": v for k, v in zeros("norm.weight", "norm.bias").items()}
    pixel |= {"mask_token": torch.zeros(1, 1, 64), "encoder_to_decoder.weight": torch.zeros(64, 128)}
    pixel |= block("decoder.blocks.0", 64)
    if dialect == "MVD pre-training":
        extra = zeros(
            "pos_embed", "pos_embed_img", "pos_embed_vid", "mask_token_img", "mask_token_vid", "down_img.bias"
        )
        return (
            encoder
            | extra
            | block("decoder_img.blocks.1", 64)
            | zeros("decoder_vid.head.weight", "decoder_vid.norm.bias")
        )
    prefixed = {f"encoder.{k}": v for k, v in encoder.items()}
    if dialect == "ViViT, converted":
        return prefixed | {"encoder.pos_embed": model.pos_embed * 2}
    if dialect == "UMT pre-training":
        return prefixed | zeros("clip_decoder.0.head.weight", "clip_decoder.5.norm.bias")
    if dialect == "MME pre-training":
        extra = zeros("mask_token", "encoder_to_decoder.0.weight", "decoder.0.norm.weight", "decoder.0.head.1.2.bias")
        return prefixed | extra | block("decoder.0.blocks.0", 64)
    if dialect == "SIGMA pre-training":
        head = zeros("head.0.weight", "head.6.bias", "prototypes", "memory", "memory_pred_head.0.weight")
        return prefixed | pixel | {"decoder.head.weight": torch.zeros(256, 64)} | head
    return prefixed | pixel | {"decoder.head.weight": torch.zeros(768, 64), "decoder.head.bias": torch.zeros(768)}


def tiny(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_model(name, **kwargs)


def save(tmp_path, state, dialect=""):
    about = {"family": "ViViT"} if dialect == "ViViT, converted" else {}
    torch.save({"model": state, **about}, tmp_path / "file.pth")
    return str(tmp_path / "file.pth")


@every_family
def test_every_key_is_loaded_or_ignored_by_a_rule(dialect, tmp_path):
    source, model = tiny(TINY[dialect]), tiny(TINY[dialect], seed=1)
    state = published(dialect, source)
    report = load_pretrained(model, save(tmp_path, state, dialect))
    assert report.dialect == dialect and report.missing == FRESH.get(dialect, ["head.weight", "head.bias"])
    accounted(report, state, model)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    if dialect not in FRESH:
        assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)


@every_family
def test_a_masked_autoencoder_takes_the_encoder_and_no_foreign_decoder(dialect, tmp_path):
    name = TINY[dialect]
    source, model = tiny(name), tiny("pretrain_" + re.sub(r"^vit", "videomae", name))
    state = published(dialect, source)
    fresh = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    if dialect == "InternVideo2":
        fresh |= {k: model.state_dict()[k].clone() for k in ("encoder.norm.weight", "encoder.norm.bias")}
    report = load_pretrained(model, save(tmp_path, state, dialect))
    assert set(report.missing) == fresh.keys()
    accounted(report, state, model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in fresh.items())
    assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


@every_family
def test_any_encoder_tensor_missing_renamed_or_misshapen_is_named(dialect, tmp_path):
    model = tiny(TINY[dialect])
    state = published(dialect, model)
    parts = r"blocks|patch_embed|norm" + r"|cls_token|clip_projector|pos_embed" * (dialect in ENCODER_TENSORS)
    needed = [k for k in state if re.search(rf"^(encoder\.)?({parts})\b", k)]
    assert len(needed) == ENCODER_TENSORS.get(dialect, 56)
    for key in needed:
        bare = key.removeprefix("encoder.")
        ours = bare.replace("norm.", "fc_norm.") if bare.startswith("norm.") else bare
        rest = {k: v for k, v in state.items() if k != key}
        for broken, name in (
            (rest, ours),
            (rest | {f"{key}_": state[key]}, f"{key}_"),
            (state | {key: torch.zeros(3, 3)}, bare),
        ):
            with pytest.raises(CheckpointError) as caught:
                load_pretrained(model, save(tmp_path, broken, dialect))
            assert name in str(caught.value)


@every_family
def test_unknown_keys_are_named(dialect, tmp_path):
    model = tiny(TINY[dialect])
    for key in ("encoder.blocks.0.attn.k_bias", "decoder.extra", "projector.weight", "head.1.weight"):
        with pytest.raises(CheckpointError, match=f"no rule of '{dialect}' accounts for: {key}"):
            load_pretrained(model, save(tmp_path, published(dialect, model) | {key: torch.zeros(2)}, dialect))


@pytest.mark.parametrize("prefix", ["encoder.model.", "encoder_q.encoder.model."])
def test_mme_s_other_prefixes(prefix, tmp_path):
    model = tiny("vit_tiny_patch16_64")
    state = {re.sub(r"^encoder\.", prefix, k): v for k, v in published("MME pre-training", model).items()}
    report = load_pretrained(model, save(tmp_path, state))
    assert report.dialect == "MME pre-training" and report.missing == ["head.weight", "head.bias"]


def test_weights_of_another_position_table_are_refused(tmp_path):
    mvd, vit, umt = tiny("mvd_vit_tiny_patch16_64"), tiny("vit_tiny_patch16_64"), tiny("umt_vit_tiny_patch16_64")
    for dialect, source, model, match in (
        ("MVD pre-training", mvd, vit, "this is mvd_vit_tiny_patch16_64, but the model is vit_tiny_patch16_64"),
        ("SIGMA pre-training", vit, mvd, "this is vit_tiny_patch16_64, but the model is mvd_vit_tiny_patch16_64"),
        ("UMT pre-training", umt, vit, "this is umt_vit_tiny_patch16_64, but the model is vit_tiny_patch16_64"),
        ("SMILE pre-training", vit, umt, "this is vit_tiny_patch16_64, but the model is umt_vit_tiny_patch16_64"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(model, save(tmp_path, published(dialect, source)))


def test_files_of_ours_name_their_model(tmp_path):
    """MVD's and VideoMAE's classifiers have the same keys, and another position table; foreign files do not say."""
    mvd, vit = tiny("mvd_vit_tiny_patch16_64"), tiny("vit_tiny_patch16_64")
    save_weights(tmp_path / "dapt.pth", tiny("pretrain_mvd_vit_tiny_patch16_64"))
    with pytest.raises(CheckpointError, match="this is mvd_vit_tiny_patch16_64, but the model is vit_tiny_patch16_64"):
        load_pretrained(vit, str(tmp_path / "dapt.pth"))
    assert not load_pretrained(mvd, str(tmp_path / "dapt.pth")).fitted
    foreign = save(tmp_path, dict(mvd.state_dict()))
    assert load_pretrained(vit, foreign).fitted == [
        "position table: sinusoid, the model's; the file does not say which it was trained with"
    ]


def test_a_head_trained_behind_another_pooling_is_refused(tmp_path):
    mean, first = tiny("vit_tiny_patch16_64"), tiny("vit_tiny_patch16_64", final_reduction="cls")
    for model, source, match in ((mean, first, "cls, the model has fc_norm; use cls"), (first, mean, "use fc_norm")):
        with pytest.raises(CheckpointError, match=f"its head was trained with --final_reduction .*{match}"):
            load_pretrained(model, save(tmp_path, source.state_dict()))
        headless = {k: v for k, v in source.state_dict().items() if not k.startswith("head")}
        assert load_pretrained(model, save(tmp_path, headless)).missing == ["head.weight", "head.bias"]


# ----------------------------------------------------------------------------------------------------------------------
# python -m models.weights


def inspect(capsys, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["weights", *words])
    try:
        weights_main()
    except SystemExit as e:
        return str(e.code)
    return capsys.readouterr().out


@every_family
def test_inspecting_names_family_and_model(dialect, tmp_path, capsys, monkeypatch):
    path = save(tmp_path, published(dialect, tiny(TINY[dialect])), dialect)
    out = inspect(capsys, monkeypatch, path)
    pretrain = "pretrain_" + re.sub(r"^vit", "videomae", TINY[dialect])
    assert f"dialect  {dialect} under 'model', float32" in out and f"  model    {TINY[dialect]} or {pretrain}\n" in out
    fresh = FRESH.get(dialect, ["head.weight", "head.bias"])
    assert f"missing     {len(fresh)}  {', '.join(fresh)}" in out and "epoch" not in out
    trial = inspect(capsys, monkeypatch, path, "--model", pretrain)
    assert f"  model    {pretrain}\n" in trial


PLAIN = {"s": "vit_small_patch16_224", "b": "vit_base_patch16_224"}


def shapes_alone(keys):
    """A state dict of tensors that take no room."""
    return {key: torch.zeros(1).expand(shape) for key, shape in keys}


@pytest.mark.parametrize("name", [name for name in VIDEOMAE if "pretrain" not in name])
def test_inspecting_published_key_sets(name, tmp_path, capsys, monkeypatch):
    checkpoint = VIDEOMAE[name]["checkpoint"]
    path = save(tmp_path, shapes_alone(checkpoint["keys"]))
    size = PLAIN[re.search(r"vit_([sb])", name)[1]]
    dialect, plain = {
        "videomae": ("VideoMAE pre-training", True),
        "videomaev2": ("VideoMAE V2 distilled", True),
        "smile": ("SMILE pre-training", True),
        "sigma": ("SIGMA pre-training", True),
        "mme": ("MME pre-training", True),
        "mvd": ("MVD pre-training", False),
    }[name.split("_")[0]]
    out = inspect(capsys, monkeypatch, path)
    assert f"dialect  {dialect} under" in out and f"  model    {'' if plain else 'mvd_'}{size} or pretrain_" in out
    other = "vit_tiny_patch16_64" if plain else "mvd_vit_tiny_patch16_64"
    refused = inspect(capsys, monkeypatch, path, "--model", other)
    assert f"this is {'' if plain else 'mvd_'}{size}, but the model is {other}" in refused


def test_inspecting_other_published_key_sets(tmp_path, capsys, monkeypatch):
    for name, dialect, model in (
        ("umt_b16_ptk710_f8_res224", "UMT pre-training", "umt_vit_base_patch16_224"),
        ("internvideo2_s14_dist_1B_stage2", "InternVideo2", "internvideo2_small_patch14_224"),
    ):
        out = inspect(capsys, monkeypatch, save(tmp_path, shapes_alone(OTHER[name]["checkpoint_keys"])))
        assert f"dialect  {dialect} under" in out and f"  model    {model} or pretrain_{model}\n" in out
    keys = VIDEOMAE["videomae_vit_b"]["checkpoint"]["keys"]
    out = inspect(capsys, monkeypatch, save(tmp_path, shapes_alone([(f"_orig_mod.{k}", s) for k, s in keys])))
    assert "dialect  MGMAE or VideoMAE V2 pre-training under" in out and "  model    vit_base_patch16_224 or" in out
    converted = shapes_alone(OTHER["vivit_b16x2_k400_hf"]["converted_keys"])
    out = inspect(capsys, monkeypatch, save(tmp_path, converted, "ViViT, converted"))
    assert "dialect  ViViT, converted under" in out and "  model    vit_base_patch16_224 or" in out


@pytest.mark.parametrize("name", ["vit_tiny_patch16_64", "mvd_vit_tiny_patch16_64", "umt_vit_tiny_patch16_64"])
def test_inspecting_files_of_ours(name, tmp_path, capsys, monkeypatch):
    pretrain = "pretrain_" + re.sub(r"^vit", "videomae", name)
    for model in (tiny(name), tiny(pretrain, decoder_depth=2)):
        save_weights(tmp_path / "ours.pth", model)
        out = inspect(capsys, monkeypatch, str(tmp_path / "ours.pth"))
        assert f"  model    {model.name}\n" in out and "  spec     gelu erf\n" in out
    trial = inspect(capsys, monkeypatch, str(tmp_path / "ours.pth"), "--model", pretrain)
    assert "missing     0" in trial and f"  model    {pretrain}\n" in trial


def test_inspecting_what_tells_no_family_names_the_plain_model_first(tmp_path, capsys, monkeypatch):
    """A classifier of 400 classes, as VideoMAE and MVD publish them: the keys are the same."""
    state = dict(tiny("vit_tiny_patch16_64", num_classes=400).state_dict())
    out = inspect(capsys, monkeypatch, save(tmp_path, state))
    names = ["vit_tiny_patch16_64", "mvd_vit_tiny_patch16_64"]
    names += ["pretrain_mvd_vit_tiny_patch16_64", "pretrain_videomae_tiny_patch16_64"]
    assert "dialect  Video ViT under" in out and f"  model    {' or '.join(names)}\n" in out


def test_inspecting_says_epoch_size_and_errors(tmp_path, capsys, monkeypatch):
    state = {f"encoder.{k}": v for k, v in tiny("vit_tiny_patch16_64").state_dict().items() if "head" not in k}
    torch.save({"model": state, "epoch": 1599}, tmp_path / "file.pth")
    out = inspect(capsys, monkeypatch, str(tmp_path / "file.pth"))
    assert "dialect  VideoMAE pre-training under 'model', float32, epoch 1599\n" in out
    for words, message in (
        ((str(tmp_path / "absent.pth"),), "error: .*absent.pth: no such checkpoint file"),
        (
            (str(tmp_path / "file.pth"), "--model", "vit_large_patch16_224"),
            "this is vit_tiny_patch16_64, but the model",
        ),
        ((str(tmp_path / "file.pth"), "--model", "vit_tini"), "unknown model 'vit_tini'"),
        ((save(tmp_path, state | {"x": torch.zeros(1)}),), "no rule of 'VideoMAE pre-training' accounts for: x"),
    ):
        assert re.search(message, inspect(capsys, monkeypatch, *words))
    shallow = {k: v for k, v in state.items() if "blocks.3" not in k}
    assert "a model of 3 blocks with" in inspect(capsys, monkeypatch, save(tmp_path, shallow))


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.slow
def test_a_full_size_model_gives_every_parameter_a_gradient():
    model = tiny("vit_small_patch16_224", init_scale=1.0, num_frames=2)
    video = torch.randn(1, *model.input_shape)
    torch.nn.functional.cross_entropy(model(video), torch.tensor([1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.patch_embed.proj.weight.grad.any() and model.head.weight.grad.any()

    mae = tiny("pretrain_videomae_small_patch16_224", num_frames=2)
    mask = torch.rand(1, mae.grid[1] * mae.grid[2]).argsort() < 0.75 * mae.grid[1] * mae.grid[2]
    mae(video, mask.repeat(1, mae.grid[0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mae.parameters() if p.requires_grad)
    assert mae.encoder.patch_embed.proj.weight.grad.any() and mae.mask_token.grad.any()


def test_a_umt_after_dapt_is_not_taken_for_smile(tmp_path):
    """Its token of one frame has 768 pixels, as many as the outputs of SMILE's decoder."""
    source, model = tiny("pretrain_umt_vit_tiny_patch16_64"), tiny("umt_vit_tiny_patch16_64")
    save_weights(tmp_path / "dapt.pth", source)
    report = load_pretrained(model, str(tmp_path / "dapt.pth"))
    assert report.dialect == "VideoMAE pre-training" and report.missing == ["head.weight", "head.bias"]


@pytest.mark.slow
def test_a_family_goes_through_both_scripts(dota_root, tmp_path):
    """A published layout -> one step of DAPT -> one step of fine-tuning from its checkpoint: the family with a learned
    table, a pooling of its own and a decoder that is left out.
    """
    dialect = "InternVideo2"
    name = TINY[dialect]
    source = tiny(name)
    state = published(dialect, source)
    common = ["--data_set", "DoTA", "--data_path", dota_root, "--total_batch_size", 2, "--nb_samples_per_epoch", 2]
    common += ["--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0, "--aa", "none", "--view_fps", 5]
    common += ["--device", "cpu"]
    dapt = ["--model", "pretrain_" + re.sub(r"^vit", "videomae", name), "--output_dir", tmp_path / "dapt"]
    done = run("run_dapt.py", *common, *dapt, "--from_ckpt", save(tmp_path, state, dialect))
    assert done.returncode == 0, done.stderr
    assert f"dialect  {dialect} under" in done.stdout

    weights_file = tmp_path / "dapt" / "checkpoint-0.pth"
    adapted, published_state = torch.load(weights_file, weights_only=True)["model"], source.state_dict()
    moved = [k for k, v in published_state.items() if not torch.equal(v, adapted.get(f"encoder.{k}", v))]
    assert "patch_embed.proj.weight" in moved and any(k.startswith("blocks.1.") for k in moved)
    tuned = ["--model", name, "--output_dir", tmp_path / "tuned", "--disable_eval_during_finetuning"]
    done = run("run_finetune.py", *common, *tuned, "--finetune", weights_file)
    assert done.returncode == 0, done.stderr
    fresh = FRESH.get(dialect, ["head.weight", "head.bias"])
    assert f"missing     {len(fresh)}  {', '.join(fresh)} (newly" in done.stdout
    result = torch.load(tmp_path / "tuned" / "checkpoint-0.pth", weights_only=True)["model"]
    assert not torch.equal(result["patch_embed.proj.weight"], adapted["encoder.patch_embed.proj.weight"])
    assert "pos_embed" in result
