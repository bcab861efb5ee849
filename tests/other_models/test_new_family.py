"""The family that other_models/README.md shows: its code, as it stands there, and what follows from it."""

import importlib.util
import re
import shutil

import pytest
import torch
from helpers import ROOT, load_weights, run

from engine.checkpoint import save_weights
from models import classifier_of, create_model, list_models, load, masked_autoencoder_of, registry
from models.weights import CheckpointError, dialects, identify, load_pretrained

NAME, TWIN = "register_vit_tiny_patch16_64", "pretrain_register_vit_tiny_patch16_64"
CODE, LIST = re.findall(r"```python\n(.+?)```", (ROOT / "other_models" / "README.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def family(monkeypatch, tmp_path):
    """The module of the family, in a file outside the repository."""
    some = {name: model for name, model in registry._MODELS.items() if "_tiny_" in name}
    monkeypatch.setattr(registry, "_MODELS", some)
    monkeypatch.setattr(dialects, "DIALECTS", list(dialects.DIALECTS))
    monkeypatch.setattr(identify, "DIALECTS", dialects.DIALECTS)
    (tmp_path / "register_vit.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("register_vit", tmp_path / "register_vit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published():
    """(a model, the content of a file of it as its authors would publish it)."""
    torch.manual_seed(1)
    model = create_model(NAME)
    state = {
        f"module.trunk.{k.replace('fc_norm', 'norm')}": v for k, v in model.state_dict().items() if "head" not in k
    }
    state |= {"module.head.weight": torch.ones(7, 128), "module.projector.0.weight": torch.ones(3, 3)}
    return model, {"state_dict": state, "epoch": 4}


def test_all_that_follows_from_one_file(family, tmp_path):
    assert {NAME, TWIN, "register_vit_base_patch16_224", "pretrain_register_vit_base_patch16_224"} <= {*list_models()}
    assert classifier_of(TWIN) == NAME and masked_autoencoder_of(NAME) == TWIN
    source, content = published()
    path = str(tmp_path / "published.pth")
    torch.save(content, path)
    assert identify.likely_models(path) == ([NAME, TWIN], 0)
    model, twin = create_model(NAME).eval(), create_model(TWIN)
    report = load_pretrained(model, path)
    assert report.dialect == "Register ViT" and report.missing == ["head.weight", "head.bias"]
    assert sorted(report.ignored) == ["module.head.weight", "module.projector.0.weight"]
    assert torch.equal(model.registers, source.registers) and torch.equal(model.fc_norm.bias, source.fc_norm.bias)
    report = load_pretrained(twin, path)
    assert not [key for key in report.missing if key.startswith("encoder.")] and twin.encoder.registers.equal(
        source.registers
    )
    assert len(twin.decoder.blocks) == 1 and twin.decoder.head.in_features == 64

    video = torch.randn(2, *model.input_shape)
    probe = create_model(NAME, head="attentive")
    assert "pooler.query_tokens" in load_pretrained(probe, path).missing and probe(video).shape == (2, 2)
    for one in (model, twin):
        save_weights(tmp_path / "ours.pth", one)
        again, spec = load(tmp_path / "ours.pth")
        assert spec["model"] == one.name and type(again) is type(one)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in one.state_dict().items())
    report = load_pretrained(model, str(tmp_path / "ours.pth"))  # the masked autoencoder's
    assert report.missing == ["head.weight", "head.bias"] and report.dialect == "Register ViT"
    mask = torch.arange(32).repeat(2, 1) % 4 > 0
    twin(video, mask).backward()
    assert twin.encoder.registers.grad.any() and model(video).shape == (2, 2)


def test_its_files_are_checked_as_those_of_any_family(family, tmp_path):
    _, content = published()
    for change, match in (
        (lambda s: s.pop("module.trunk.blocks.2.attn.q_bias"), r"lacks 1 tensors .* blocks.2.attn.q_bias"),
        (lambda s: s.update({"module.extra": torch.ones(1)}), "no rule of 'Register ViT' accounts for: module.extra"),
        (lambda s: s.update({"module.trunk.registers": torch.ones(1, 5, 128)}), r"\(1, 5, 128\), not \(1, 4, 128\)"),
    ):
        state = dict(content["state_dict"])
        change(state)
        torch.save({"state_dict": state}, tmp_path / "wrong.pth")
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(create_model(NAME), str(tmp_path / "wrong.pth"))
    torch.save(content, tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match="no rule of 'Register ViT' accounts for: module.trunk.registers"):
        load_pretrained(create_model("vit_tiny_patch16_64"), str(tmp_path / "published.pth"))


def test_the_scripts_take_it_from_the_import_list(family, dota_root, tmp_path):
    """A copy of the house with the file, and the one line of models/__init__.py changed as the README says."""
    house = tmp_path / "house"
    shutil.copytree(ROOT / "models", house / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("datasets", "engine", "utils"):
        (house / name).symlink_to(ROOT / name)
    for name in ("run_dapt.py", "run_finetune.py"):
        shutil.copy(ROOT / name, house)
    (house / "models" / "register_vit.py").write_text(CODE)
    init = house / "models" / "__init__.py"
    names = LIST.partition("  #")[0]
    changed, count = re.subn(r"^from models import [\w, ]+", names, init.read_text(), flags=re.MULTILINE)
    assert count == 1 and set(re.findall(r"\w+", names)) - set(re.findall(r"\w+", init.read_text())) == {"register_vit"}
    init.write_text(changed)
    torch.save(published()[1], tmp_path / "published.pth")
    common = ["--data_set", "DoTA", "--data_path", dota_root, "--total_batch_size", 2, "--nb_samples_per_epoch", 2]
    common += ["--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0, "--aa", "none", "--device", "cpu"]
    dapt = ["--model", TWIN, "--from_ckpt", tmp_path / "published.pth", "--output_dir", tmp_path / "dapt"]
    done = run(house / "run_dapt.py", *common, *dapt)
    assert done.returncode == 0 and "dialect  Register ViT under 'state_dict'" in done.stdout, done.stderr
    tuned = ["--finetune", tmp_path / "dapt" / "checkpoint-0.pth", "--disable_eval_during_finetuning"]
    done = run(house / "run_finetune.py", *common, *tuned, "--output_dir", tmp_path / "tuned")
    assert done.returncode == 0 and "missing     2  head.weight, head.bias" in done.stdout, done.stderr
    assert not load_weights(tmp_path / "tuned" / "checkpoint-0.pth")["registers"].equal(
        published()[1]["state_dict"]["module.trunk.registers"]
    )
