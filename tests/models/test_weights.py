import argparse
import functools
import http.server
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden, golden_input, published_file, recipe

from models import create_model
from models.weights import CheckpointError, fetch, load, load_pretrained, read_checkpoint, read_spec
from models.weights.__main__ import main

TINY = "vit_tiny_patch16_64"


@pytest.fixture(scope="module")
def fixtures():
    return {f["name"]: f for f in golden("models_videomae")["fixtures"]}


def tiny(seed=0):
    model = create_model(TINY)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def pretraining_state(model):
    """The state dict of a VideoMAE pre-training run whose encoder is `model`."""
    state = {f"encoder.{k.replace('fc_norm', 'norm')}": v for k, v in model.state_dict().items() if "head" not in k}
    state |= {"mask_token": torch.zeros(1, 1, 64), "encoder_to_decoder.weight": torch.zeros(64, 128)}
    for name in ("norm1.weight", "attn.q_bias", "attn.qkv.weight", "attn.proj.bias", "mlp.fc1.weight"):
        state[f"decoder.blocks.0.{name}"] = torch.zeros(3)
    return state | {"decoder.norm.weight": torch.zeros(64), "decoder.head.bias": torch.zeros(8)}


def save(tmp_path, content, name="checkpoint.pth"):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------------------
# Golden


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("videomae_vit_s", "small"), ("videomae_vit_b", "base"), ("videomaev2_distill_vit_s", "small")],
)
def test_published_layouts_give_the_reference_logits(name, size, fixtures, tmp_path):
    fixture = fixtures[name]
    model = create_model(f"vit_{size}_patch16_224", num_classes=2, drop_path_rate=0.2).eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == dict(fixture["finetune_model"]["keys"])

    report = load_pretrained(model, str(published_file(tmp_path / "published.pth", fixture)))
    assert report.missing == fixture["loader"]["missing_after_load"] == ["head.weight", "head.bias"]
    sources = {old: new for new, old in report.sources.items()}
    assert sources == {old: new for old, new in fixture["loader"]["renamed"].items() if not new.startswith("head.")}
    all_keys = {key for key, _ in fixture["checkpoint"]["keys"]}
    assert sources.keys() | set(report.ignored) == all_keys and not sources.keys() & set(report.ignored)

    with torch.no_grad():
        for key in report.missing:
            model.state_dict()[key].copy_(recipe(key, model.state_dict()[key].shape))
    expected = fixture["expected"]
    with torch.set_grad_enabled("train_probe" in expected):
        logits = model(golden_input())
        pooled = model.forward_features(golden_input()).detach()
    np.testing.assert_allclose(logits.detach()[0], expected["logits"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(pooled[0, :16], expected["pooled_feature"]["first16"], atol=2e-5, rtol=0)
    assert ("train_probe" in expected) == (name == "videomae_vit_s")
    if "train_probe" in expected:
        probe = expected["train_probe"]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1]))
        loss.backward()
        assert loss.item() == pytest.approx(probe["loss"], abs=5e-6)
        parameters = dict(model.named_parameters())
        for key, norm in probe["grad_l2"].items():
            assert parameters[key].grad.norm().item() == pytest.approx(norm, rel=1e-4), key


# ----------------------------------------------------------------------------------------------------------------------
# Dialects


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "model_state", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes(wrapper, prefix, tmp_path):
    source, target = tiny(0), tiny(1)
    state = {prefix + k: v for k, v in pretraining_state(source).items()}
    report = load_pretrained(target, save(tmp_path, {wrapper: state, "epoch": 3} if wrapper else state))
    compiled = "MGMAE or VideoMAE V2 pre-training"  # what they were when they were saved
    assert report.dialect == (compiled if "_orig_mod" in prefix else "VideoMAE pre-training")
    assert report.wrapper == (wrapper or "")
    assert report.missing == ["head.weight", "head.bias"]
    assert set(report.sources.values()) | set(report.ignored) == set(state)
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key]) == (not key.startswith("head")), key


def test_our_own_weights_load_whole(tmp_path):
    source, target = tiny(0), tiny(1)
    report = load_pretrained(target, save(tmp_path, source.state_dict()))
    assert not report.missing and not report.ignored and len(report.loaded) == len(source.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_head_of_another_class_count_is_left_out(tmp_path):
    state = {"module": create_model(TINY, num_classes=710).half().state_dict()}
    target = tiny(1)
    head = target.head.weight.clone()
    report = load_pretrained(target, save(tmp_path, state))
    assert report.missing == report.ignored == ["head.weight", "head.bias"]
    assert "2 head.* of 710 classes" in str(report) and report.dtypes == ("float16",)
    assert torch.equal(target.head.weight, head)
    assert {v.dtype for v in target.state_dict().values()} == {torch.float32}


def test_final_norm_goes_where_the_model_has_it(tmp_path):
    source = tiny(0)
    with torch.no_grad():
        source.fc_norm.weight.copy_(torch.arange(128.0))
    path = save(tmp_path, pretraining_state(source))
    target = create_model(TINY, final_reduction="cls")
    report = load_pretrained(target, path)
    assert torch.equal(target.norm.weight, torch.arange(128.0))
    assert report.sources["norm.weight"] == "encoder.norm.weight"


def test_headless_model_takes_a_fine_tuned_file(tmp_path):
    report = load_pretrained(create_model(TINY, num_classes=0), save(tmp_path, tiny().state_dict()))
    assert report.ignored == ["head.weight", "head.bias"] and not report.missing


def test_model_prefix_selects_one_of_several_models(tmp_path):
    student, teacher, target = tiny(0), tiny(1), tiny(2)
    state = {
        f"{name}.{k}": v for name, m in (("student", student), ("teacher", teacher)) for k, v in m.state_dict().items()
    }
    report = load_pretrained(target, save(tmp_path, state), model_prefix="teacher.")
    assert torch.equal(target.head.weight, teacher.head.weight)
    assert len(report.ignored) == len(student.state_dict()) and "outside teacher.*" in str(report)


def test_model_key_selects_the_average(tmp_path):
    plain, average, target = tiny(0), tiny(1), tiny(2)
    path = save(tmp_path, {"model": plain.state_dict(), "model_ema": average.state_dict()})
    load_pretrained(target, path, model_key="model_ema")
    assert torch.equal(target.head.weight, average.head.weight)


def test_arguments_and_numpy_scalars_in_the_file_do_not_matter(tmp_path):
    content = {"model": tiny().state_dict(), "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "epoch": 3}
    assert not load_pretrained(tiny(1), save(tmp_path, content)).missing


def test_report_reads_as_a_table(tmp_path):
    text = str(load_pretrained(tiny(), save(tmp_path, {"model": pretraining_state(tiny())})))
    assert "VideoMAE pre-training under 'model', float32" in text
    assert "7 decoder.*" in text and "1 mask_token" in text and "head.weight, head.bias (newly initialised)" in text


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def error(path, model=None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model or tiny(), str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path):
    whole = save(tmp_path, {"model": tiny().state_dict()})
    data = (tmp_path / "checkpoint.pth").read_bytes()
    for name, content, message in (
        ("cut.pth", data[: len(data) // 2], "truncated, or not a PyTorch checkpoint"),
        ("page.pth", b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "HTML"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("empty.pth", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in error(tmp_path / name)
    assert "no such checkpoint file" in error(tmp_path / "absent.pth")
    assert not load_pretrained(tiny(), whole).missing


def test_wrong_size_names_both(tmp_path):
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in create_model("vit_base_patch16_224").state_dict().items()}
    state = {k: torch.zeros(1).expand(s) for k, s in shapes.items()}
    message = error(save(tmp_path, {"model": state}), create_model("vit_small_patch16_224"))
    assert "this is vit_base_patch16_224, but the model is vit_small_patch16_224" in message


@pytest.mark.parametrize("layout", ["pretraining", "finetuned"])
def test_every_tensor_is_needed(layout, tmp_path):
    """Removing, renaming or reshaping any one encoder tensor raises and names it."""
    model = tiny()
    state = pretraining_state(model) if layout == "pretraining" else dict(model.state_dict())
    needed = [k for k in state if not k.startswith(("decoder", "mask_token", "encoder_to", "head"))]
    assert len(needed) == 56
    for key in needed:
        bare = key.removeprefix("encoder.")
        ours = bare.replace("norm.", "fc_norm.") if bare.startswith("norm.") else bare
        rest = {k: v for k, v in state.items() if k != key}
        assert ours in error(save(tmp_path, rest))
        assert f"{key}_" in error(save(tmp_path, rest | {f"{key}_": state[key]}))
        assert bare.replace("fc_norm", "norm") in error(save(tmp_path, rest | {key: torch.zeros(3, 3)}))


def test_unknown_keys_are_named(tmp_path):
    for key in ("decoder.extra.weight", "encoder.blocks.0.attn.k_bias", "head.0.weight", "memory"):
        message = error(save(tmp_path, pretraining_state(tiny()) | {key: torch.zeros(2)}))
        assert key in message and "accounts for" in message


def test_the_same_tensor_twice_is_refused(tmp_path):
    state = pretraining_state(tiny()) | {"blocks.0.norm1.weight": torch.zeros(128)}
    assert "encoder.blocks.0.norm1.weight and blocks.0.norm1.weight both stand for the same" in error(
        save(tmp_path, state)
    )


def test_files_without_weights_name_their_keys(tmp_path):
    assert "epoch, net" in error(save(tmp_path, {"epoch": 3, "net": [tiny().state_dict()]}))
    assert "holds a list" in error(save(tmp_path, [1, 2]))
    assert "not a Video ViT checkpoint" in error(save(tmp_path, {"conv1.weight": torch.zeros(3)}))


class Payload:
    pass


def test_code_in_the_file_is_refused_with_the_remedy(tmp_path):
    message = error(save(tmp_path, {"model": tiny().state_dict(), "extra": Payload()}))
    assert "Payload" in message and "weights_only=False" in message


# ----------------------------------------------------------------------------------------------------------------------
# URLs


def test_url_is_downloaded_once(tmp_path, monkeypatch):
    save(tmp_path, tiny().state_dict(), "published.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert read_checkpoint(f"{url}/published.pth").state.keys() == tiny().state_dict().keys()
    with pytest.raises(CheckpointError, match="download failed"):
        fetch(f"{url}/absent.pth")
    server.shutdown()
    server.server_close()
    assert read_checkpoint(f"{url}/published.pth").state  # from the cache


def test_files_without_sums_are_read(tmp_path):
    """As torch.save writes them where it is told to."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tiny().state_dict(), tmp_path / "no_sums.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "no_sums.pth") as z:
        assert not any(info.CRC for info in z.infolist())
    assert load_pretrained(tiny(1), str(tmp_path / "no_sums.pth")).loaded


# ----------------------------------------------------------------------------------------------------------------------
# What readers tried in order to break it


def untouched(model, path, match, **kwargs):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_pretrained(model, path, **kwargs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_anywhere_is_a_checkpoint_error(tmp_path, legacy):
    torch.save(tiny().state_dict(), tmp_path / "whole.pth", _use_new_zipfile_serialization=not legacy)
    assert load_pretrained(tiny(1), str(tmp_path / "whole.pth")).loaded
    whole, model = (tmp_path / "whole.pth").read_bytes(), tiny(1)
    lengths = np.random.default_rng(0).integers(1, len(whole), 20).tolist()
    for length in [2, 10, 100, 511, 512, 513, *lengths]:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        untouched(model, str(tmp_path / "cut.pth"), "cut.pth: truncated, or not a PyTorch checkpoint")


def test_odd_tensors_and_keys_are_refused(tmp_path):
    state, key = tiny().state_dict(), "blocks.3.mlp.fc2.weight"
    for odd in ({key: state[key].to_sparse()}, {7: torch.zeros(1)}, {"x": None}, {b"y": torch.zeros(1)}):
        untouched(tiny(1), save(tmp_path, state | odd), "no weights under model or module")
    for odd, match in (
        (state[key].long(), f"{key} holds torch.int64, not weights"),
        (torch.full_like(state[key], torch.nan), f"{key} has NaN or infinite values"),
    ):
        untouched(tiny(1), save(tmp_path, state | {key: odd}), match)


def test_only_a_head_of_other_classes_is_set_aside(tmp_path):
    state = tiny().state_dict()
    for odd in (torch.tensor(1.0), torch.zeros(2, 64), torch.zeros(5, 64)):
        untouched(tiny(1), save(tmp_path, state | {"head.weight": odd}), "head.weight is .*, not .2, 128.")
    untouched(tiny(1), save(tmp_path, state | {"head.bias": torch.zeros(5)}), "head.bias is .5,., not .2,.")
    half = {k: v for k, v in state.items() if k != "head.bias"}
    untouched(tiny(1), save(tmp_path, half), "lacks 1 tensors the model needs: head.bias")


def test_empty_wrappers_are_passed_over(tmp_path):
    path = save(tmp_path, {"model": {}, "module": tiny().state_dict()})
    assert load_pretrained(tiny(1), path).wrapper == "module"


@pytest.mark.parametrize("prefix", ["student", "student.", "module.student."])
def test_prefixes_are_taken_as_meant(tmp_path, prefix):
    state = {f"module.student.{k}": v for k, v in tiny().state_dict().items()} | {"module.teacher.x": torch.zeros(1)}
    report = load_pretrained(tiny(1), save(tmp_path, state), model_prefix=prefix)
    assert not report.missing and report.ignored == ["module.teacher.x"]
    inner = {f"student.module.{k}": v for k, v in tiny().state_dict().items()}
    assert not load_pretrained(tiny(1), save(tmp_path, inner), model_prefix="student.").missing
    untouched(
        tiny(1), save(tmp_path, state), "no key begins 'pupil.'; the keys begin module.student", model_prefix="pupil"
    )


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = b"B" if "b/" in self.path else b"A"
        self.send_response(200)
        self.send_header("Content-Length", "100" if "short" in self.path else "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_): ...


def test_downloads_are_whole_and_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    files = [
        fetch(f"{url}/{path}") for path in ("a/checkpoint.pth", "b/checkpoint.pth", "x" * 300, "y" * 300 + ".pth?z")
    ]
    assert [Path(f).read_text() for f in files] == ["A", "B", "A", "A"] and len(set(files)) == 4
    for bad in (f"{url}/short.pth", f"{url}/has space.pth", "https://[bad"):
        with pytest.raises(CheckpointError, match="download failed .*; fetch it by hand"):
            fetch(bad)
    server.shutdown()
    assert not list(tmp_path.glob("**/*.tmp"))


# ----------------------------------------------------------------------------------------------------------------------
# The operating point in a spec

POINT = {"threshold": 0.25, "gap": 0.5, "source": "best F1 on mine", "criterion": "f1",
         "measured": {"f1": 0.75, "recall": None, "split": "mine"}}  # fmt: skip


def test_a_spec_with_an_operating_point_is_read_and_shown(tmp_path, monkeypatch, capsys):
    model = tiny()
    path = save(tmp_path, {"model": model.state_dict(), "spec": model.spec | {"operating_point": POINT}})
    assert read_spec(path)["operating_point"] == load(path)[1]["operating_point"] == POINT
    monkeypatch.setattr("sys.argv", ["models.weights", path])
    main()
    shown = capsys.readouterr().out
    for line in ("threshold 0.25", "source best F1 on mine", "measured f1 0.75", "measured recall None"):
        assert f"  spec     operating_point {line}\n" in shown


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (None, "the operating point is a NoneType, not a dictionary"),
        ({}, "lacks threshold"),
        (POINT | {"threshold": 2}, "threshold = 2, which is not a number from 0 to 1"),
        (POINT | {"gap": torch.zeros(1)}, "gap = "),
        (POINT | {"measured": {"f1": {}}}, "measured = "),
        (POINT | {"thresold": 0.5}, "has 'thresold'"),
    ],
)
def test_a_damaged_operating_point_is_refused(tmp_path, damaged, why):
    model = tiny()
    path = save(tmp_path, {"model": model.state_dict(), "spec": model.spec | {"operating_point": damaged}})
    for read in (read_spec, read_checkpoint, load):
        with pytest.raises(CheckpointError, match=f"checkpoint.pth: its spec is damaged: .*{why}.*take another copy"):
            read(path)
