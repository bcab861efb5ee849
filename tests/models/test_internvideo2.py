"""InternVideo2: the reference's logits, its position table, its way through DAPT."""

import re

import numpy as np
import pytest
import torch
from helpers import fill_head, golden, other_input, other_recipe

from models import create_model
from models.internvideo2 import InternVideo2
from models.registry import Dropout
from models.vit import Size
from models.weights import CheckpointError, load_pretrained

FIXTURES = {f["name"]: f for f in golden("models_other")["fixtures"]}
SMALL = FIXTURES["internvideo2_s14_dist_1B_stage2"]
VARIANTS = {  # name: (scale of the recipe, kind of GELU)
    "main": (0.02, "erf"),
    "main_fusedpath_tanh_gelu": (0.02, "tanh"),
    "strong": (0.05, "erf"),
    "strong_fusedpath_tanh_gelu": (0.05, "tanh"),
}


def tiny(seed=0, name="internvideo2_tiny_patch14_56", **kwargs):
    torch.manual_seed(seed)
    return create_model(name, **kwargs)


def published(tmp_path, scale=0.02):
    state = {key: other_recipe(key, shape, scale=scale) for key, shape in SMALL["checkpoint_keys"]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    return str(tmp_path / "pytorch_model.bin"), state


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tiny_one_gives_the_reference_logits(variant, tmp_path):
    fixture, (scale, gelu) = FIXTURES["internvideo2_tiny"], VARIANTS[variant]
    model = tiny(gelu=gelu).eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == dict(fixture["checkpoint_keys"])
    state = {key: other_recipe(key, shape, scale=scale) for key, shape in fixture["checkpoint_keys"]}
    torch.save(state, tmp_path / "file.pth")
    report = load_pretrained(model, str(tmp_path / "file.pth"))
    assert set(report.loaded) == state.keys() and not report.missing and not report.ignored
    with torch.no_grad():
        logits = model(other_input(fixture)).flatten()
    np.testing.assert_allclose(logits, fixture["expected"][variant]["logits"], atol=5e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.02, 0.05])
def test_published_layout_gives_the_reference_logits(scale, tmp_path):
    path, state = published(tmp_path, scale)
    for variant, (its_scale, gelu) in VARIANTS.items():
        if its_scale != scale:
            continue
        model = create_model("internvideo2_small_patch14_224", gelu=gelu).eval()
        assert sum(p.numel() for p in model.parameters()) == SMALL["finetune_params"]["total"]
        report = load_pretrained(model, path)
        assert report.dialect == "InternVideo2" and not report.wrapper
        assert sorted(report.missing) == SMALL["load_report"]["missing"]
        assert sorted(report.ignored) == SMALL["load_report"]["unexpected"]
        assert set(report.loaded) | set(report.ignored) == state.keys()
        fill_head(model, report.missing, lambda key, shape: other_recipe(key, shape, scale=scale))
        with torch.no_grad():
            logits = model(other_input(SMALL))[0]
        np.testing.assert_allclose(logits, SMALL["expected"][variant]["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SMALL["loader_interpolated_pos_embed"])
def test_the_stored_position_table_is_resampled_as_the_reference_does(size, tmp_path):
    frames, pixels = map(int, re.fullmatch(r"frames(\d+)_img(\d+)", size).groups())
    model = create_model("internvideo2_small_patch14_224", num_frames=frames, input_size=pixels)
    report = load_pretrained(model, published(tmp_path)[0])
    side = pixels // 14
    assert report.fitted == [f"pos_embed of 8 x 16 x 16 tokens, resampled to {frames} x {side} x {side}"]
    assert report.fitted[0] in str(report)
    expected, table = SMALL["loader_interpolated_pos_embed"][size], model.pos_embed.detach()
    assert list(table.shape) == expected["shape"]
    for stat, value in (("mean", table.mean()), ("std", table.std()), ("abs_mean", table.abs().mean())):
        assert value.item() == pytest.approx(expected[stat], abs=1e-6), stat
    np.testing.assert_allclose(table[0, 0, :8], expected["first"], atol=1e-6)
    np.testing.assert_allclose(table[0, 1, :8], expected["tok1_8"], atol=1e-6)
    np.testing.assert_allclose(table[0, -1, :8], expected["last8"], atol=1e-6)


def test_a_new_one_starts_from_the_sin_cos_table():
    expected = SMALL["init_sincos3d_pos_embed"]
    table = create_model("internvideo2_small_patch14_224").pos_embed.detach()
    assert list(table.shape) == expected["shape"] and not table[0, 0].any()
    np.testing.assert_allclose(table[0, 300, :8], expected["tok300_8"], atol=1e-6)
    np.testing.assert_allclose(table[0, -1, -8:], expected["last8"], atol=1e-6)
    assert table.mean().item() == pytest.approx(expected["mean"], abs=1e-6)


def test_a_patch_embedding_of_one_frame_is_inflated(tmp_path):
    source, model = tiny(), tiny(1, tubelet_size=2)
    torch.save({"module": source.state_dict()}, tmp_path / "file.pth")
    report = load_pretrained(model, str(tmp_path / "file.pth"))
    assert "patch_embed.proj.weight from 1 frame to 2" in report.fitted
    still = torch.randn(1, 3, 1, 56, 56)
    torch.testing.assert_close(
        model.patch_embed(still.expand(1, 3, 4, 56, 56)), source.patch_embed(still).repeat(1, 2, 1)
    )
    with pytest.raises(CheckpointError, match="tiny_patch14_56, but the model is a model of 2 blocks with"):
        load_pretrained(
            InternVideo2(Size(96, 2, 3, patch_size=28), 64, model.video, Dropout()), str(tmp_path / "file.pth")
        )


def test_what_it_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match="pools by attention; final_reduction cannot be 'cls'"):
        tiny(final_reduction="cls")
    with pytest.raises(ValueError, match="gelu must be erf or tanh, not 'relu'"):
        tiny(gelu="relu")
    torch.save(tiny().state_dict(), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="position table is learned"):
        load_pretrained(tiny(1), str(tmp_path / "file.pth"), stored_table=False)


def test_without_pooling_it_classifies_each_token():
    assert tiny(final_reduction="none")(torch.randn(1, 3, 4, 56, 56)).shape == (1, 4 * 4 * 4, 2)


def test_half_precision_stays_in_the_blocks_and_leaves_the_head(recwarn):
    model, seen = tiny(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 3, 4, 56, 56)).dtype == torch.float32
    assert seen == [torch.bfloat16] * 4 and not [w for w in recwarn if "Mismatch dtype" in str(w.message)]


def test_plain_and_fused_attention_agree():
    model, video = tiny().eval(), torch.randn(2, 3, 4, 56, 56)
    fused = model.forward_features(video)
    for module in model.modules():
        if hasattr(module, "fused"):
            assert module.fused
            module.fused = False
    torch.testing.assert_close(model.forward_features(video), fused)


def test_recomputed_activations_give_the_same_gradients():
    video, gradients = torch.randn(2, 3, 4, 56, 56), []
    for recompute in (False, True):
        model = tiny()
        model.set_grad_checkpointing(recompute)
        model(video).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_freezing_stops_embedding_and_blocks():
    model = tiny()
    model.freeze_blocks(1)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} < frozen
    assert not any(name.startswith(("blocks.1", "blocks.0.norm", "clip_projector", "head")) for name in frozen)


def test_dapt_keeps_all_that_fine_tuning_starts_from(tmp_path):
    """Published weights -> masked autoencoder -> its checkpoint -> classifier: the pooling is the published one."""
    source = tiny()
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(("head", "fc_norm"))}
    torch.save(state, tmp_path / "published.pth")
    mae = tiny(1, "pretrain_internvideo2_tiny_patch14_56")
    load_pretrained(mae, str(tmp_path / "published.pth"))
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, ::2] = True
    loss = mae(torch.randn(2, 3, 4, 56, 56), mask)
    loss.backward()
    assert all(p.grad is not None for p in mae.parameters() if p.requires_grad)
    assert all(not p.requires_grad for p in mae.encoder.clip_projector.parameters())
    with torch.no_grad():
        for p in mae.parameters():
            p.sub_(0.1 * p.grad.sign() if p.grad is not None else 0)
    torch.save(mae.state_dict(), tmp_path / "dapt.pth")
    model = tiny(2)
    report = load_pretrained(model, str(tmp_path / "dapt.pth"))
    assert report.missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert torch.equal(model.cls_token, mae.encoder.cls_token) and not torch.equal(model.cls_token, source.cls_token)
    pooling = source.clip_projector.state_dict()
    assert all(torch.equal(v, pooling[k]) for k, v in model.clip_projector.state_dict().items())
    again = tiny(3, "pretrain_internvideo2_tiny_patch14_56")
    assert not load_pretrained(again, str(tmp_path / "dapt.pth")).missing


def test_a_fine_tuned_one_is_loaded_whole_or_not_at_all(tmp_path):
    state = tiny().state_dict()
    torch.save({"model": state}, tmp_path / "file.pth")
    assert not load_pretrained(tiny(1), str(tmp_path / "file.pth")).missing
    for key in ("fc_norm.weight", "head.bias"):
        torch.save({"model": {k: v for k, v in state.items() if k != key}}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=f"lacks 1 tensors the model needs: {key}"):
            load_pretrained(tiny(1), str(tmp_path / "file.pth"))


def test_sizes():
    with torch.device("meta"):
        for size, millions in (("small", 23), ("base", 89), ("large", 309)):
            model = create_model(f"internvideo2_{size}_patch14_224")
            assert isinstance(model, InternVideo2)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
