"""A weights file of ours is enough: its spec, the model that is built from it, what is refused, who else reads it."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from engine.checkpoint import save_weights
from models import classifier_of, create_model, list_models, load, mae, masked_autoencoder_of, model_defaults, registry
from models.registry import ModelDefaults, register_model
from models.vit import LayerNorm, Size, VideoEncoder
from models.weights import CheckpointError, load_pretrained, read_checkpoint, read_spec

TINY, MAE = "vit_tiny_patch16_64", "pretrain_videomae_tiny_patch16_64"
ALL_TINY = [name for name in list_models() if "_tiny_" in name]
OURS = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.15], "view_fps": 7.5, "num_frames": 8}


def new(name=TINY, **options):
    torch.manual_seed(0)
    return create_model(name, **options)


def encoder_of(model):
    return getattr(model, "encoder", model)


def save(tmp_path, model, **about):
    save_weights(tmp_path / "weights.pth", model, **about)
    return str(tmp_path / "weights.pth")


def flat(tmp_path, model):
    """A file as it was written before it had a spec: flat, with the name of the model beside the tensors."""
    state = OrderedDict(model.state_dict())
    state._metadata = OrderedDict({"": {"version": 1, "model": model.name}})
    torch.save(state, tmp_path / "flat.pth")
    return str(tmp_path / "flat.pth")


def output(model):
    """What a model makes of a fixed clip."""
    generator = torch.Generator().manual_seed(3)
    shape = encoder_of(model).input_shape
    video = model.normalize(torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=generator))
    with torch.no_grad():
        if not hasattr(model, "decoder"):
            return model(video)
        slots, *frame = encoder_of(model).grid
        mask = torch.arange(frame[0] * frame[1]) % 4 > 0
        return model(video, mask.repeat(2, slots))


# ----------------------------------------------------------------------------------------------------------------------
# The spec, the pixels


def test_a_model_says_what_it_is():
    assert new().spec == {
        "version": 1,
        "model": TINY,
        "num_frames": 4,
        "view_fps": 5,
        "input_size": 64,
        "tubelet_size": 2,
        "gelu": "erf",
        "final_reduction": "fc_norm",
        "pos_embed": "sinusoid",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "classes": ["safe", "risk"],
    }
    assert new(num_classes=0).spec["classes"] == []
    assert new(num_classes=3, **OURS).spec.items() >= {**OURS, "classes": ["class_0", "class_1", "class_2"]}.items()
    about = {"model": MAE, "final_reduction": "none", "classes": [], "decoder_depth": 2, "normalize_target": False}
    assert new(MAE, decoder_depth=2, normalize_target=False).spec == new().spec | about
    kinds = {"mvd": "sincos_3d", "umt": "umt", "internvideo2": "learned", "vivit": "learned", "vit": "sinusoid"}
    kinds |= {"vjepa2": "rotary 2.0", "vjepa21": "rotary 2.1"}
    for name in ALL_TINY:
        family = classifier_of(name).split("_")[0]
        model = new(name)
        assert model.spec["pos_embed"] == kinds[family] == model.pos_embed_kind
        if encoder_of(model).pos_embed is None:
            continue
        encoder_of(model).learn_pos_embed()
        assert model.spec["pos_embed"] == "learned" and model.pos_embed_kind == kinds[family]
    model = new()
    model.spec["mean"].append(1.0)
    assert len(model.spec["mean"]) == 3


def test_options_are_flat_and_what_the_name_fixes_is_no_option():
    model = new(drop_rate=0.1, drop_path_rate=0.2, mean=(0.0, 0.0, 0.0))
    assert model.blocks[3].drop_path1.drop_prob == pytest.approx(0.2) and not model.mean.any()
    for option in ("pos_embed", "embed_dim", "size", "in_chans"):
        with pytest.raises(TypeError, match=option):
            new(**{option: 1})


def test_the_model_normalizes():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3 * 256).view(1, 3, 4, 64, 256)[..., :64].contiguous()
    for name in (TINY, MAE):
        model, expected = new(name, mean=OURS["mean"], std=OURS["std"]), pixels.float()
        mean, std = (torch.tensor(OURS[key]).view(3, 1, 1, 1) * 255 for key in ("mean", "std"))
        assert torch.equal(model.normalize(pixels), expected.sub_(mean).div_(std)) and pixels.max() > 0
        at = {key for key, _ in model.named_buffers() if key.split(".")[-1] in ("mean", "std")}
        assert at == ({"mean", "std"} if name == TINY else {"encoder.mean", "encoder.std"})
        assert not at & model.state_dict().keys() and encoder_of(model).mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "total", "draw"),  # of the weights' absolute values, and the next number, as they were before the tables
    [
        ("internvideo2_tiny_patch14_56", 9068.095256, 0.7566208243370056),
        ("mvd_vit_tiny_patch16_64", 16215.374607, 0.9710808992385864),
        ("pretrain_internvideo2_tiny_patch14_56", 27947.473064, 0.45844775438308716),
        ("pretrain_mvd_vit_tiny_patch16_64", 51943.591705, 0.3792327642440796),
        ("pretrain_umt_vit_tiny_patch16_64", 50303.282575, 0.6701462268829346),
        ("pretrain_videomae_tiny_patch16_64", 51943.591705, 0.3792327642440796),
        ("umt_vit_tiny_patch16_64", 15477.003288, 0.6025389432907104),
        ("vit_tiny_patch16_64", 16215.374607, 0.9710808992385864),
    ],
)
def test_a_seed_gives_the_weights_it_always_gave(name, total, draw):
    state = new(name, drop_path_rate=0.1).state_dict()
    assert torch.rand(1).item() == draw
    assert sum(v.double().abs().sum().item() for v in state.values()) == pytest.approx(total, rel=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# From the file alone


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ALL_TINY),
        (TINY, OURS | {"gelu": "tanh", "final_reduction": "cls", "input_size": 96, "tubelet_size": 4}),
        (TINY, {"num_classes": 5, "final_reduction": "none", "drop_path_rate": 0.3, "fc_drop_rate": 0.5}),
        (TINY, {"num_classes": 0}),
        (TINY, {"num_classes": 710}),
        (MAE, OURS | {"gelu": "tanh", "decoder_depth": 3, "normalize_target": False, "input_size": 32}),
        ("internvideo2_tiny_patch14_56", OURS | {"gelu": "erf", "final_reduction": "none", "input_size": 112}),
        ("pretrain_internvideo2_tiny_patch14_56", {"num_frames": 2}),
        ("umt_vit_tiny_patch16_64", {"num_frames": 6, "input_size": 32}),
    ],
)
def test_a_file_is_enough(name, options, learned, tmp_path):
    model = new(name, **{"init_scale": 1.0} | options if name == classifier_of(name) else options)
    if learned and encoder_of(model).pos_embed is None:
        pytest.skip("it has no table")
    if learned:
        encoder_of(model).learn_pos_embed()
        with torch.no_grad():
            encoder_of(model).pos_embed.mul_(1.5)
    path = save(tmp_path, model, epoch=7, data_set="DoTA")
    torch.manual_seed(1)
    again, spec = load(path)
    assert spec == model.spec | {"epoch": 7, "data_set": "DoTA"} == read_spec(path) and again.spec == model.spec
    assert again.state_dict().keys() == model.state_dict().keys() and not again.training and again.name == name
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(output(again), output(model.eval()))


def test_which_files_have_a_spec(tmp_path):
    model = new()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "published.pth")
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    for path in (flat(tmp_path, model), tmp_path / "published.pth", tmp_path / "model.safetensors"):
        assert read_spec(str(path)) is None and read_checkpoint(str(path)).spec is None
        with pytest.raises(CheckpointError, match=r"has no spec: .* create_model\(NAME\) and load_pretrained\(model"):
            load(str(path))
    path = save(tmp_path, model, epoch=3)
    assert read_checkpoint(path).spec == read_spec(path) and read_checkpoint(path).model == TINY
    assert ", epoch 3\n" in str(load_pretrained(new(), path))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:-3000])
    for read in (read_spec, load):
        with pytest.raises(CheckpointError, match="cut.pth: truncated, or not a PyTorch checkpoint"):
            read(str(tmp_path / "cut.pth"))
        with pytest.raises(CheckpointError, match="no such checkpoint file"):
            read(str(tmp_path / "absent.pth"))


def test_a_spec_is_read_without_the_tensors(tmp_path, monkeypatch):
    path, mapped = save(tmp_path, new()), []
    torch_load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **options: mapped.append(options["mmap"]) or torch_load(*a, **options)
    )
    read_spec(path)
    read_checkpoint(path)
    assert mapped == [True, False]


def changed(tmp_path, model, /, **about):
    """A file of the model whose spec says something else; None takes a key away."""
    spec = model.spec | about
    spec = {key: value for key, value in spec.items() if value is not None}
    torch.save({"model": model.state_dict(), "spec": spec}, tmp_path / "changed.pth")
    return str(tmp_path / "changed.pth")


@pytest.mark.parametrize("key", [*sorted(new().spec.keys() - {"version"}), "decoder_depth", "normalize_target"])
def test_a_damaged_spec_is_refused_by_its_key(key, tmp_path):
    model = new(MAE)
    for wrong in (None, torch.zeros(2), {}, float("nan"), -1, [1.0, 2.0], [7, 7, "x"]):
        path, found = changed(tmp_path, model, **{key: wrong}), rf"changed.pth: its spec (lacks {key}|says {key} = )"
        for read in (read_spec, load, partial(load_pretrained, new(MAE))):
            with pytest.raises(CheckpointError, match=found):
                read(path)
    torch.save({"model": model.state_dict(), "spec": 3}, tmp_path / "changed.pth")
    with pytest.raises(CheckpointError, match="its spec is a int, not a dictionary; take another copy, or its"):
        read_spec(str(tmp_path / "changed.pth"))


@pytest.mark.parametrize(
    ("about", "match"),
    [
        ({"model": "vjepa9"}, "its spec does not make a model here: unknown model 'vjepa9'"),
        ({"gelu": "relu"}, "its spec says gelu = 'relu'"),
        ({"version": 2}, "its spec is of version 2, this code knows 1: update it"),
        ({"classes": ["risk", "safe"]}, r"its classes are \['risk', 'safe'\], the model's \['safe', 'risk'\]"),
        ({"input_size": 65}, "does not make a model here: input_size 65 must be a multiple"),
        ({"final_reduction": "cls"}, "head was trained with --final_reduction fc_norm"),
        ({"classes": ["a", "b", "c"]}, "but that is not the size of its head"),
        ({"classes": []}, "but that is not the size of its head"),
        ({"model": "vit_small_patch16_224", "input_size": 224}, "but the model is vit_small_patch16_224"),
        ({"pos_embed": "learned"}, "its spec says pos_embed = 'learned', but its weights have 'sinusoid'"),
        ({"pos_embed": "umt"}, "its spec says pos_embed = 'umt', but its weights have 'sinusoid'"),
        ({"tubelet_size": 1}, "vit_tiny_patch16_64, but the model is"),
    ],
)
def test_weights_that_are_not_those_of_the_spec(about, match, tmp_path):
    with pytest.raises(CheckpointError, match=match):
        load(changed(tmp_path, new(), **about))


def test_a_masked_autoencoder_needs_its_own_part_of_the_spec(tmp_path):
    path = changed(tmp_path, new(MAE), decoder_depth=None, normalize_target=None)
    with pytest.raises(CheckpointError, match="does not make a model here: .* needs decoder_depth and normalize_targ"):
        load(path)


def test_a_learned_table_under_a_spec_without_one_is_refused(tmp_path):
    model = new()
    model.learn_pos_embed()
    with pytest.raises(CheckpointError, match="says pos_embed = 'sinusoid', but its weights have 'learned'"):
        load(changed(tmp_path, model, pos_embed="sinusoid"))


@pytest.mark.parametrize("write", [save, flat])
def test_files_of_ours_name_their_model_with_a_spec_or_without(write, tmp_path):
    """MVD's and VideoMAE's classifiers have the same keys, and another position table."""
    mvd = write(tmp_path, new("mvd_vit_tiny_patch16_64"))
    assert read_checkpoint(mvd).model == "mvd_vit_tiny_patch16_64"
    report = load_pretrained(new("mvd_vit_tiny_patch16_64"), mvd)
    assert not report.missing + report.ignored + report.fitted
    with pytest.raises(CheckpointError, match="this is mvd_vit_tiny_patch16_64, but the model is vit_tiny_patch16_64"):
        load_pretrained(new(), mvd)
    assert not load_pretrained(new(num_frames=8), write(tmp_path, new())).fitted


# ----------------------------------------------------------------------------------------------------------------------
# Other programs


def load_as_published(path, model, *, strict):
    """What VideoMAE's fine-tuning does with a file, by the fact sheet: unwrap, drop another head, strip prefixes."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = next((content[key] for key in ("model", "module") if key in content), content)
    wanted = model.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("head.") or v.shape == wanted[k].shape}
    renamed = {}
    for key, value in state.items():
        if key.startswith("encoder.norm"):
            key = "fc_norm" + key[len("encoder.norm") :]
        renamed[key.removeprefix("backbone.").removeprefix("encoder.")] = value
    return model.load_state_dict(renamed, strict=strict)


def test_the_published_loader_reads_our_files(tmp_path):
    source, model = new(init_scale=1.0), create_model(TINY)
    load_as_published(save(tmp_path, source, epoch=1), model, strict=True)
    assert torch.equal(output(model.eval()), output(source.eval()))
    source, model = new(MAE), create_model(TINY)
    result = load_as_published(save(tmp_path, source), model, strict=False)
    assert result.missing_keys == ["head.weight", "head.bias"]
    assert set(result.unexpected_keys) == {key for key in source.state_dict() if not key.startswith("encoder.")}
    assert torch.equal(model.fc_norm.weight, source.encoder.norm.weight)


# ----------------------------------------------------------------------------------------------------------------------
# An encoder without a position table


class RotaryBlock(nn.Module):
    """(B, n, D), (B, n) positions -> (B, n, D): attention whose queries and keys are turned by their position."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.norm1 = num_heads, LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, positions):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        angle = positions[:, None, :, None] * 0.5 ** torch.arange(q.shape[-1] // 2)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
        return x + self.proj(rearrange(F.scaled_dot_product_attention(8 * q, k, v), "b h n d -> b n (h d)"))


class RotaryViT(VideoEncoder):
    """A Video ViT with rotary positions."""

    def __init__(self, size, video, dropout, *, num_classes=2, gelu="erf", init_scale=1.0, final_reduction="fc_norm"):
        super().__init__(size, video, gelu=gelu, final_reduction=final_reduction, pos_embed_kind="rotary")
        self.blocks = nn.ModuleList(RotaryBlock(size.embed_dim, size.num_heads) for _ in range(size.depth))
        fc_norm = LayerNorm(size.embed_dim) if final_reduction == "fc_norm" else None
        self.add_head(num_classes, fc_norm=fc_norm, drop_rate=dropout.fc_drop_rate)
        self.initialize(init_scale)

    def encode(self, x, positions=None):
        if positions is None:
            positions = torch.arange(x.shape[1]).expand(len(x), -1)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)

    def forward_features(self, video):
        x = self.encode(self.embed(video))
        return self.fc_norm(x.mean(dim=1)) if self.final_reduction == "fc_norm" else x


@pytest.fixture
def rotary(monkeypatch):
    """The names of a registered classifier and masked autoencoder with rotary positions."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    defaults = ModelDefaults(num_frames=4, input_size=64)
    register_model("rotary_tiny_patch16_64", partial(RotaryViT, Size(64, 2, 2)), defaults)
    return "rotary_tiny_patch16_64", "pretrain_rotary_tiny_patch16_64"


def test_the_order_of_visible_tokens_does_not_matter_where_their_positions_go_with_them(rotary, monkeypatch):
    model = new(rotary[1])
    loss, order = output(model), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(order, torch.arange(8))

    def shuffled(mask, split=model.split):
        visible, masked = split(mask)
        return mae.Split(visible[:, order], masked)

    monkeypatch.setattr(model, "split", shuffled)
    torch.testing.assert_close(output(model), loss, rtol=1e-5, atol=1e-6)
    encode = model.encoder.encode
    monkeypatch.setattr(model.encoder, "encode", lambda x, positions: encode(x))  # they do count
    assert abs(output(model) - loss) > 1e-4


def test_weights_without_a_position_table(rotary, tmp_path):
    for name in rotary:
        model = new(name)
        path = save(tmp_path, model)
        assert model.spec["pos_embed"] == "rotary" == load(path)[1]["pos_embed"]
        assert torch.equal(output(load(path)[0]), output(model))
        for stored_table in (True, False):
            report = load_pretrained(create_model(name), path, stored_table=stored_table)
            assert not report.missing + report.ignored + report.fitted
        with pytest.raises(ValueError, match="rotary_tiny_patch16_64 has no position table: rotary"):
            encoder_of(model).learn_pos_embed()
        with pytest.raises(CheckpointError, match="does not make a model here: .* has no position table: rotary"):
            load(changed(tmp_path, model, pos_embed="learned"))
    report = load_pretrained(create_model(rotary[0]), path)
    assert report.missing == ["head.weight", "head.bias"] and masked_autoencoder_of(rotary[0]) == rotary[1]
    assert model_defaults(rotary[1]) == model_defaults(rotary[0])
    state = model.state_dict() | {"encoder.pos_embed": torch.zeros(1, 32, 64)}
    torch.save({"model": state, "spec": model.spec}, tmp_path / "table.pth")
    match = r"encoder.pos_embed is a position table, and the model has none \(its positions are rotary\)"
    with pytest.raises(CheckpointError, match=match):
        load_pretrained(create_model(rotary[1]), str(tmp_path / "table.pth"))
    report = load_pretrained(create_model(rotary[1]), str(tmp_path / "table.pth"), stored_table=False)
    assert report.ignored == ["encoder.pos_embed"]


def test_an_encoder_is_registered_once_with_its_masked_autoencoder(rotary):
    name, twin = rotary
    assert classifier_of(twin) == classifier_of(name) == name and masked_autoencoder_of(twin) == twin
    for find in (classifier_of, masked_autoencoder_of):
        with pytest.raises(
            ValueError, match="unknown model 'rotary_tiny_patch16'. Did you mean rotary_tiny_patch16_64?"
        ):
            find("rotary_tiny_patch16")
    for taken in rotary:
        with pytest.raises(ValueError, match=f"'{taken}' is registered twice"):
            register_model(taken, create_model, ModelDefaults())
