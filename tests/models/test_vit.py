import numpy as np
import pytest
import torch
from einops import rearrange
from helpers import golden

from models import create_model, list_models, model_defaults
from models.pos_embed import sinusoid_1d
from models.vit import TubeletEmbed

TINY = "vit_tiny_patch16_64"


def tiny(**kwargs):
    torch.manual_seed(0)
    return create_model(TINY, **kwargs)


def video(batch=2):
    return torch.randn(batch, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dim", [192, 384, 512, 768, 1024])
def test_sinusoid_equals_the_reference(dim):
    expected = golden("models_videomae")["pos_embed_tables"][f"sinusoid_1d_n1568_d{dim}"]
    table = sinusoid_1d(1568, dim)
    for row in (0, 1, 1567):
        np.testing.assert_allclose(table[row, :8], expected[f"row{row}[:8]"], atol=1e-7)
    np.testing.assert_allclose(table[1567, -8:], expected["row1567[-8:]"], atol=1e-7)
    assert table.double().sum().item() == pytest.approx(expected["sum"], rel=1e-9)


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Did you mean vit_small_patch16_224\?.*vit_base_patch16_224"):
        create_model("vit_smal_patch16_224")
    with pytest.raises(TypeError):
        create_model(TINY, dropuot=0.1)


def test_sizes_and_defaults():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in create_model(name, num_classes=2).parameters())
            for name in list_models()
            if name.startswith("vit_") and name != TINY
        }
    assert counts["vit_small_patch16_224"] == 21_880_706
    assert counts["vit_base_patch16_224"] == 86_228_738
    assert counts["vit_large_patch16_224"] == 303_862_786
    defaults = model_defaults("vit_small_patch16_224")
    assert (defaults.num_frames, defaults.view_fps, defaults.tubelet_size, defaults.finetune_lr) == (16, 10, 2, 1e-3)
    assert model_defaults("vit_base_patch16_224").finetune_lr == 5e-4


def test_initialisation():
    model = tiny(init_scale=0.001)
    assert model.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.2)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[0].attn.q_bias.any() and not model.blocks[0].mlp.fc1.bias.any()
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "eps")} == {"LayerNorm"}
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-6}  # the golden logits cannot tell 1e-12


def test_drop_path_grows_with_depth_and_dropout_follows_fc2_only():
    model = create_model(TINY, drop_path_rate=0.3, drop_rate=0.5)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3], atol=1e-6)
    assert isinstance(model.blocks[0].mlp.drop1, torch.nn.Identity) and model.blocks[0].mlp.drop2.p == 0.5


@pytest.mark.parametrize("cube", [(2, 16, 16), (1, 14, 14)])
def test_tokens_and_their_gradients_are_those_of_a_convolution(cube):
    torch.manual_seed(0)
    embed = TubeletEmbed(cube, 24).double()
    pixels = torch.randn(2, 3, 2 * cube[0], 3 * cube[1], 2 * cube[2], dtype=torch.double, requires_grad=True)
    expected = rearrange(embed.proj(pixels), "b d t h w -> b (t h w) d")
    tokens = embed(pixels)
    torch.testing.assert_close(tokens, expected)
    slope = torch.randn_like(tokens)
    inputs = (pixels, embed.proj.weight, embed.proj.bias)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, slope) for out in (tokens, expected)))
    assert {key: tuple(v.shape) for key, v in embed.state_dict().items()} == {
        "proj.weight": (24, 3, *cube),
        "proj.bias": (24,),
    }


def test_a_classifier_compiles_to_one_graph():
    model, graph = tiny(drop_path_rate=0.1), tiny(drop_path_rate=0.1)
    graph.compile(fullgraph=True, backend="eager")
    for training in (True, False):
        outputs = []
        for m in (model, graph):
            torch.manual_seed(1)
            outputs.append(m.train(training)(video()))
        torch.testing.assert_close(*outputs)


def test_reductions():
    x = video()
    pooled, first, tokens = (tiny(final_reduction=r).eval() for r in ("fc_norm", "cls", "none"))
    assert "fc_norm.weight" in pooled.state_dict() and "norm.weight" not in pooled.state_dict()
    assert "norm.weight" in first.state_dict() and "fc_norm.weight" not in first.state_dict()
    assert pooled(x).shape == first(x).shape == (2, 2)
    assert tokens(x).shape == (2, 32, 2)
    torch.testing.assert_close(tokens.forward_features(x)[:, 0], first.forward_features(x))
    assert tiny(num_classes=0)(x).shape == (2, 128)
    with pytest.raises(ValueError, match="final_reduction"):
        tiny(final_reduction="mean")


def test_wrong_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 64, 64\), got \(2, 3, 8, 64, 64\)"):
        tiny()(torch.zeros(2, 3, 8, 64, 64))
    with pytest.raises(ValueError, match="multiple"):
        tiny(input_size=65)


def test_activation_checkpointing_changes_nothing_but_memory():
    gradients = []
    for enable in (False, True):
        model = tiny(init_scale=1.0).train()
        model.set_grad_checkpointing(enable)
        runs = []
        model.blocks[1].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model(video()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(runs) == 1 + enable  # once more in the backward pass
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_half_precision_reaches_the_blocks_but_not_the_head():
    model, seen = tiny(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(video()).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_freeze_blocks():
    model = tiny()
    model.freeze_blocks(2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert (
        "patch_embed.proj.weight" in frozen and "blocks.1.attn.q_bias" in frozen and "blocks.0.mlp.fc2.bias" in frozen
    )
    assert not any("norm" in name or name.startswith(("blocks.2", "blocks.3", "head")) for name in frozen)
    with pytest.raises(ValueError, match="5 of 4"):
        model.freeze_blocks(5)


def test_timm_protocol():
    model = tiny()
    assert "pos_embed" in model.no_weight_decay() and "pos_embed" not in model.state_dict()
