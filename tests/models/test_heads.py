"""Linear and attentive heads of every family: what they see, their files, training them alone."""

import pytest
import torch

from engine.optim import parameter_groups
from models import create_model, head_of, load
from models.export import export
from models.weights import CheckpointError, load_pretrained

FAMILIES = {  # name: final_reduction of either head, the default first
    "internvideo2_tiny_patch14_56": {"linear": "attention", "attentive": "attentive"},
    "mvd_vit_tiny_patch16_64": {"linear": "fc_norm", "attentive": "attentive"},
    "umt_vit_tiny_patch16_64": {"linear": "fc_norm", "attentive": "attentive"},
    "vit_tiny_patch16_64": {"linear": "fc_norm", "attentive": "attentive"},
    "vivit_tiny_patch16_64": {"linear": "cls", "attentive": "attentive"},
    "vjepa21_vit_tiny_patch16_64": {"attentive": "attention", "linear": "mean"},
    "vjepa2_vit_tiny_patch16_64": {"attentive": "attention", "linear": "mean"},
}
every_family = pytest.mark.parametrize("name", sorted(FAMILIES))
every_head = pytest.mark.parametrize("head", ["attentive", "linear"])


def build(name, head=None, **options):
    torch.manual_seed(0)
    return create_model(name, head=head, init_scale=1.0, **options)


def write(path, model, **about):
    torch.save({"model": model.state_dict(), "spec": model.spec | about}, path)
    return str(path)


def video_of(model):
    return torch.randn(2, *model.input_shape, generator=torch.Generator().manual_seed(1))


@every_family
def test_the_default_is_the_published_head(name):
    default, reduction = next(iter(FAMILIES[name].items()))
    model = build(name)
    assert (model.head_kind, model.final_reduction) == (default, reduction)
    assert model.spec.get("head", "linear") == head_of(name, None, None) == default


@every_family
@every_head
def test_the_head_sees_what_the_encoder_returns_and_a_file_brings_it_back(name, head, tmp_path):
    model = build(name, head).eval()
    assert model.final_reduction == FAMILIES[name][head] and model.spec.get("head", "linear") == head
    video = video_of(model)
    with torch.no_grad():
        features, logits = model.forward_features(video), model(video)
        tokens = model.encode(model.embed(video))
        assert torch.equal(model(features, encoded=True), logits)
    if head == "attentive":
        assert torch.equal(features, tokens), "all tokens, less a class token"
    else:
        assert features.ndim == 2
    loaded, spec = load(write(tmp_path / "w.pth", model))
    assert spec == model.spec and loaded.head_kind == head
    with torch.no_grad():
        assert torch.equal(loaded(video), logits)


@every_family
@pytest.mark.parametrize("head", ["attentive"])
def test_a_frozen_encoder_trains_its_head_alone(name, head):
    model = build(name, head, drop_path_rate=0.5, drop_rate=0.5, attn_drop_rate=0.5, fc_drop_rate=0.5)
    model.freeze_encoder()
    model.set_grad_checkpointing()
    model.train()
    video, before = video_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(model.forward_features(video), model.forward_features(video)), "nothing is dropped out"
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.65)
    assert all(group["lr_scale"] == 1 for group in groups), "layer decay does not matter"
    optimizer = torch.optim.SGD(groups, lr=0.1)
    torch.nn.functional.cross_entropy(model(video), torch.tensor([0, 1])).backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key.split(".")[0] for key in trained} == ({"head", "pooler"} if head == "attentive" else {"head"})
    assert sum(len(group["params"]) for group in groups) == len(trained)
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) == (key not in trained) for key in before)


def test_dropout_before_the_head_is_the_heads():
    model = build("vit_tiny_patch16_64", fc_drop_rate=0.5)
    model.freeze_encoder()
    model.train()
    features = model.forward_features(video_of(model))
    assert not torch.equal(model(features, encoded=True), model(features, encoded=True))


@pytest.mark.parametrize("name", ["internvideo2_tiny_patch14_56", "vit_tiny_patch16_64", "vjepa21_vit_tiny_patch16_64"])
def test_a_head_of_the_other_kind_is_left_out_and_said_so(name, tmp_path):
    for head, other in (("linear", "attentive"), ("attentive", "linear")):
        model = build(name, other)
        report = load_pretrained(model, write(tmp_path / "w.pth", build(name, head)))
        kind = {"attentive": "an attentive head", "linear": "a linear head"}[head]
        assert report.reasons["head.weight"] == f"head.* of {kind}"
        assert {key.split(".")[0] for key in report.missing} >= {"head"}
        assert ("pooler.query_tokens" in report.ignored) == (head == "attentive")
        assert {key.split(".")[0] for key in report.ignored} <= {"head", "pooler", "norm", "fc_norm"}


def test_dapt_goes_on_from_a_classifier_with_an_attentive_head(tmp_path):
    file = write(tmp_path / "w.pth", build("vit_tiny_patch16_64", "attentive"))
    report = load_pretrained(create_model("pretrain_videomae_tiny_patch16_64"), file)
    assert {key.split(".")[0] for key in report.ignored} == {"head", "pooler"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "mlp"}, "head must be linear or attentive, not 'mlp'"),
        ({"head": "attentive", "final_reduction": "fc_norm"}, "fc_norm goes with linear head, not attentive"),
        ({"head": "linear", "final_reduction": "attentive"}, "attentive goes with attentive head, not linear"),
        ({"head": "linear", "final_reduction": "none"}, "none goes with no head, not linear"),
    ],
    ids=["unknown", "pooled", "tokens", "none"],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("vit_tiny_patch16_64", **options)
    with pytest.raises(ValueError, match=message):
        head_of("vit_tiny_patch16_64", options.get("head"), options.get("final_reduction"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "linear"}, "its spec does not make a model here.*attentive goes with attentive head, not linear"),
        ({"head": 3}, "its spec says head = 3, not linear or attentive"),
    ],
    ids=["another", "none"],
)
def test_a_file_whose_spec_names_another_head_is_refused(change, message, tmp_path):
    file = write(tmp_path / "w.pth", build("vit_tiny_patch16_64", "attentive"), **change)
    with pytest.raises(CheckpointError, match=message):
        load(file)


def test_a_file_from_before_heads_were_named_is_read(tmp_path):
    model = build("vjepa2_vit_tiny_patch16_64")
    spec = {key: value for key, value in model.spec.items() if key != "head"}
    torch.save({"model": model.state_dict(), "spec": spec}, tmp_path / "old.pth")
    assert load(str(tmp_path / "old.pth"))[0].head_kind == "attentive"


def test_an_attentive_head_is_exported_but_not_where_there_is_no_place_for_it(tmp_path):
    file = write(tmp_path / "w.pth", build("vit_tiny_patch16_64", "attentive"))
    assert "largest difference" in export(file, "safetensors")
    with pytest.raises(CheckpointError, match="its head is attentive, and VideoMAE's there is linear"):
        export(file, "hf")
