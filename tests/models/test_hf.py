"""Hugging Face's folders: the reference's numbers, every spelling of the keys, what is refused, transformers itself."""

import json
import re
import zlib

import numpy as np
import pytest
import torch
from helpers import golden, run
from safetensors.torch import save_file

from models.mae import MaskedAutoencoder
from models.registry import Dropout, VideoInput
from models.vit import Size, VideoViT
from models.vivit import ViViT
from models.weights import CheckpointError, load_pretrained, read_hints, read_spec

FIXTURES = {f["name"]: f for f in golden("models_hf")["fixtures"]}
CLASSIFIER, FIRST, PRETRAINING = (
    FIXTURES[f"videomae_{name}"] for name in ("classification", "classification_first_token", "pretraining")
)
VIVIT = FIXTURES["vivit_classification"]
SIZE, VIDEO = Size(96, 2, 3), VideoInput(num_frames=4, input_size=64)


def recipe(key, shape):
    values = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape)) * 0.1
    return torch.from_numpy((values + (len(shape) == 1 and key.endswith(".weight"))).astype(np.float32))


def tensors(fixture):
    return {key: recipe(key, shape) for key, shape in fixture["keys"]}


def clip():
    video = np.random.Generator(np.random.PCG64(100)).standard_normal((2, 4, 3, 64, 64)).astype(np.float32)
    return torch.from_numpy(video).transpose(1, 2)


def folder(tmp_path, fixture, state=None, config=None):
    path = tmp_path / fixture["name"]
    path.mkdir(exist_ok=True)
    save_file(tensors(fixture) if state is None else state, path / "model.safetensors")
    content = json.loads(fixture["config.json"]) | (config or {})
    (path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def vit(**options):
    return VideoViT(SIZE, "sinusoid", VIDEO, Dropout(), **{"num_classes": 3} | options).eval()


def mae():
    return MaskedAutoencoder(vit(num_classes=0, final_reduction="none"), Size(48, 2, 2)).eval()


def vivit(video=VIDEO, **options):
    return ViViT(SIZE, video, Dropout(), **{"num_classes": 3} | options).eval()


BUILDERS = {
    CLASSIFIER["name"]: vit,
    FIRST["name"]: lambda: vit(final_reduction="cls"),
    PRETRAINING["name"]: mae,
    VIVIT["name"]: vivit,
}
every_fixture = pytest.mark.parametrize("name", BUILDERS)


def logits(model):
    with torch.no_grad():
        return model(clip())


def load(fixture, path):
    model = BUILDERS[fixture["name"]]()
    return model, load_pretrained(model, str(path))


def check_classifier(fixture, path):
    model, report = load(fixture, path)
    expected = fixture.get("expected_with_eps_1e-6", fixture["expected"])["logits"]
    np.testing.assert_allclose(logits(model), expected, atol=3e-6, rtol=0)
    assert not report.missing
    return report


# ----------------------------------------------------------------------------------------------------------------------
# Golden


@pytest.mark.parametrize("fixture", [CLASSIFIER, FIRST, VIVIT], ids=lambda f: f["name"])
def test_classifiers_give_the_reference_logits(fixture, tmp_path):
    check_classifier(fixture, folder(tmp_path, fixture))
    check_classifier(fixture, tmp_path / fixture["name"] / "model.safetensors")  # the file in its folder
    (tmp_path / fixture["name"] / "config.json").unlink()
    check_classifier(fixture, tmp_path / fixture["name"])


def test_pre_training_gives_the_reference_loss(tmp_path):
    model, report = load(PRETRAINING, folder(tmp_path, PRETRAINING))
    assert not report.missing and not report.ignored and len(report.loaded) == len(model.state_dict())
    mask = torch.zeros(2, 32, dtype=torch.bool)
    for row, tokens in zip(mask, PRETRAINING["masked_tokens"], strict=True):
        row[tokens] = True
    expected = PRETRAINING["expected_with_eps_1e-6"]
    with torch.no_grad():
        assert model(clip(), mask).item() == pytest.approx(expected["loss"], abs=2e-6)
        predicted = model.predict(clip(), mask)
    for i in range(2):
        for token in (0, 23):
            first = expected["logits_first8"][f"clip {i} masked token number {token}"]
            np.testing.assert_allclose(predicted[i, token, :8], first, atol=2e-6, rtol=0)


def linear_biases(state):
    """As transformers 5.6 to 5.17 save them."""
    result = {re.sub(r"\.([qv])_bias$", lambda m: {"q": ".query", "v": ".value"}[m[1]] + ".bias", k): v
              for k, v in state.items()}  # fmt: skip
    keys = {k.replace("query.bias", "key.bias"): recipe(k, v.shape) for k, v in result.items() if "query.bias" in k}
    return result, keys


@pytest.mark.parametrize("fixture", [CLASSIFIER, PRETRAINING], ids=lambda f: f["name"])
def test_every_spelling_of_biases_is_the_same(fixture, tmp_path):
    model, _ = load(fixture, folder(tmp_path, fixture))
    state, key_biases = linear_biases(tensors(fixture))
    for more in ({}, key_biases):
        again, report = load(fixture, folder(tmp_path, fixture, state | more))
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
        assert set(report.ignored) == more.keys() and not report.missing
    twice = {**state, **{k: v for k, v in tensors(fixture).items() if k.endswith("q_bias")}}
    with pytest.raises(CheckpointError, match="both stand for the same tensor"):
        load(fixture, folder(tmp_path, fixture, twice))


def test_biases_that_are_all_zero_are_named(tmp_path):
    state = {k: torch.zeros_like(v) if k.endswith(("q_bias", "v_bias")) else v for k, v in tensors(CLASSIFIER).items()}
    model, report = load(CLASSIFIER, folder(tmp_path, CLASSIFIER, state))
    assert "all query and value biases are zero" in str(report) and "5.6 to 5.17" in str(report)
    np.testing.assert_allclose(logits(model), CLASSIFIER["wrong_logits_if_q_and_v_biases_are_lost"], atol=1e-4)
    state["videomae.encoder.layer.1.attention.attention.q_bias"][0] = 1
    assert not load(CLASSIFIER, folder(tmp_path, CLASSIFIER, state))[1].fitted


def test_other_heads_and_models_without_one(tmp_path):
    path = folder(tmp_path, CLASSIFIER)
    two = vit(num_classes=2)
    report = load_pretrained(two, str(path))
    assert report.missing == ["head.weight", "head.bias"] and report.ignored == ["classifier.bias", "classifier.weight"]
    bare = {k.removeprefix("videomae."): v for k, v in tensors(CLASSIFIER).items() if k.startswith("videomae.")}
    bare |= {f"layernorm.{k}": torch.ones(96) for k in ("weight", "bias")}
    report = load_pretrained(vit(), str(folder(tmp_path, CLASSIFIER, bare)))
    assert report.missing == ["head.weight", "head.bias"] and report.dialect == "VideoMAE of Hugging Face"
    with pytest.raises(CheckpointError, match="trained with --final_reduction cls, the model has fc_norm; use cls"):
        load_pretrained(vit(), str(folder(tmp_path, FIRST)))


def test_an_encoder_and_its_classifier_take_each_other_s_files(tmp_path):
    model = mae()
    report = load_pretrained(model, str(folder(tmp_path, CLASSIFIER)))
    assert all(not key.startswith("encoder.") for key in report.missing)
    report = load_pretrained(vit(), str(folder(tmp_path, PRETRAINING)))
    assert report.missing == ["head.weight", "head.bias"] and "decoder.*" in str(report)


# ----------------------------------------------------------------------------------------------------------------------
# ViViT


def test_a_plain_vit_takes_vivit_s_encoder_and_table(tmp_path):
    path, model = folder(tmp_path, VIVIT), vit(gelu="tanh")
    report = load_pretrained(model, str(path))
    state = tensors(VIVIT)
    assert report.missing == ["head.weight", "head.bias"] and "2 head.* of the class token" in str(report)
    assert torch.equal(model.pos_embed, state["vivit.embeddings.position_embeddings"][:, 1:])
    assert "std of pixels" not in str(report) and "gelu" not in str(report)
    assert "gelu: the model has erf, the weights were trained with tanh" in str(load_pretrained(vit(), str(path)))
    half = VideoViT(SIZE, "sinusoid", VideoInput(num_frames=2, input_size=64), Dropout())
    assert "of 2 x 4 x 4 tokens, resampled to 1 x 4 x 4" in str(load_pretrained(half, str(path)))
    pairs = state["vivit.embeddings.position_embeddings"][:, 1:].unflatten(1, (2, 16)).mean(dim=1)
    np.testing.assert_allclose(half.pos_embed.detach(), pairs, atol=1e-6)


def test_vivit_at_another_size_and_without_its_head(tmp_path):
    report = load_pretrained(
        vivit(VideoInput(num_frames=8, input_size=32), num_classes=2), str(folder(tmp_path, VIVIT))
    )
    assert "of 2 x 4 x 4 tokens, resampled to 4 x 2 x 2" in str(report)
    assert report.missing == ["head.weight", "head.bias"]


# ----------------------------------------------------------------------------------------------------------------------
# Files and hints


def write_parts(path, state, suffix, save):
    keys = sorted(state)
    parts = {f"part-{i}{suffix}": keys[i::3] for i in range(3)}
    for name, own in parts.items():
        save({k: state[k] for k in own}, path / name)
    return {k: name for name, own in parts.items() for k in own}


@pytest.mark.parametrize("kind", ["one bin", "safetensors parts", "bin parts"])
def test_folders_of_other_files(kind, tmp_path):
    path, state = folder(tmp_path, CLASSIFIER), tensors(CLASSIFIER)
    (path / "model.safetensors").unlink()
    if kind == "one bin":
        torch.save(state, path / "pytorch_model.bin")
        check_classifier(CLASSIFIER, path)
        return
    name, suffix, save = {
        "safetensors parts": ("model.safetensors.index.json", ".safetensors", save_file),
        "bin parts": ("pytorch_model.bin.index.json", ".bin", torch.save),
    }[kind]
    places = write_parts(path, state, suffix, save)
    (path / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    check_classifier(CLASSIFIER, path)
    check_classifier(CLASSIFIER, path / name)
    key, part = next(iter(places.items()))
    for wrong, match in (
        ({"weight_map": {}}, "has no weight_map"),
        ([1], "holds a list, not an object"),
        ({"weight_map": {**places, key: "../../etc/passwd"}}, "is said to be in '../../etc/passwd', which is no file"),
        ({"weight_map": {**places, "more.weight": part}}, f"{part}: lacks more.weight, which .* says it has"),
        ({"weight_map": {**places, key: f"absent{suffix}"}}, f"names absent{suffix}, which is not there"),
    ):
        (path / name).write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=match):
            load(CLASSIFIER, path)
    (path / name).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load(CLASSIFIER, path)


@pytest.mark.parametrize(
    ("name", "match"), [("", "'', which is no file beside it"), ("x" * 300, "names x{300}, which is not there")]
)
def test_an_index_of_impossible_names(name, match, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=match):
        load_pretrained(vit(), str(tmp_path))


def test_folders_of_something_else(tmp_path):
    for name, match in (
        ("adapter_config.json", "an adapter, not a model"),
        ("tf_model.h5", "TensorFlow alone"),
        ("x.txt", "without model.safetensors or pytorch_model.bin; it holds x.txt. Give"),
    ):
        (tmp_path / name.replace(".", "_")).mkdir()
        (tmp_path / name.replace(".", "_") / name).write_text("")
        for read in (lambda p: load_pretrained(vit(), p), read_spec):
            with pytest.raises(CheckpointError, match=match):
                read(str(tmp_path / name.replace(".", "_")))


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        (golden("models_hf")["processor_files_with_class_defaults"], None, None),
        ({"offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False}, [0.5] * 3, [0.5] * 3),
        ({"do_normalize": False}, [0.0] * 3, [1.0] * 3),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 255}, [0.5] * 3, [1.0] * 3),
    ],
)
def test_hints(processor, mean, std, tmp_path):
    path = folder(tmp_path, VIVIT)
    clips = {"num_frames": 4, "input_size": 64, "tubelet_size": 2, "gelu": "tanh"}
    assert read_hints(str(path)) == clips and read_spec(str(path)) is None
    if mean is None:  # as the classes write them
        processor = processor["preprocessor_config.json of VivitImageProcessor()"]
        mean, std = [0.75] * 3, [0.25] * 3  # p / 127.5 - 1, then - 0.5, / 0.5
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    hints = read_hints(str(path / "model.safetensors"))
    assert hints.keys() == clips.keys() | {"mean", "std"}
    assert hints["mean"] == pytest.approx(mean) and hints["std"] == pytest.approx(std)
    assert ("std of pixels: the model's" in str(load_pretrained(vivit(), str(path)))) == (std != [0.229, 0.224, 0.225])
    (path / "preprocessor_config.json").write_text('{"image_mean": [0, 0]}')
    with pytest.raises(CheckpointError, match="preprocessor_config.json: says no mean and deviation"):
        read_hints(str(path))


def test_hints_of_videomae(tmp_path):
    about = {"num_frames": 4, "input_size": 64, "tubelet_size": 2, "gelu": "erf"}
    assert read_hints(str(folder(tmp_path, CLASSIFIER))) == about | {"final_reduction": "fc_norm"}
    assert read_hints(str(folder(tmp_path, FIRST))) == about | {"final_reduction": "cls"}
    assert read_hints(str(folder(tmp_path, PRETRAINING))) == about | {"normalize_target": True}
    for key, value in (("num_frames", "many"), ("hidden_act", "relu"), ("hidden_act", {})):
        with pytest.raises(CheckpointError, match=f"config.json: {key} is {value!r}"):
            read_hints(str(folder(tmp_path, CLASSIFIER, config={key: value})))
    assert "final_reduction" not in read_hints(str(folder(tmp_path, CLASSIFIER, config={"architectures": 1.5})))


# ----------------------------------------------------------------------------------------------------------------------
# Mutations


@every_fixture
def test_any_tensor_missing_renamed_or_misshapen_is_named(name, tmp_path):
    fixture = FIXTURES[name]
    state = tensors(fixture)
    model = BUILDERS[name]()
    (tmp_path / name).mkdir()
    torch.save(state, tmp_path / name / "pytorch_model.bin")
    load_pretrained(model, str(tmp_path / name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for key in state:
        rest = {k: v for k, v in state.items() if k != key}
        for broken, named in (
            (rest, r"lacks"),
            (rest | {f"{key}_": state[key]}, re.escape(f"{key}_")),
            (state | {key: torch.zeros(3, 3)}, re.escape(key.replace("encoder.layernorm", ""))),
        ):
            torch.save(broken, tmp_path / name / "pytorch_model.bin")
            with pytest.raises(CheckpointError, match=named):
                load_pretrained(model, str(tmp_path / name))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "vivit"}, "model_type 'vivit', its keys are videomae's"),
        ({"model_type": "timesformer"}, "must be one of videomae, vivit, vjepa2"),
        ({"hidden_size": 192}, "hidden_size 192, its tensors have 96"),
        ({"num_hidden_layers": 12}, "num_hidden_layers 12, its tensors have 2"),
        ({"intermediate_size": 100}, "intermediate_size 100, its tensors have 384"),
        ({"patch_size": 14}, r"patch_size \[2, 14, 14\], its tensors have \[2, 16, 16\]"),
        ({"num_attention_heads": 4}, "has 4 heads by its config.json, the model 3"),
    ],
)
def test_weights_that_are_not_those_of_their_config(config, match, tmp_path):
    with pytest.raises(CheckpointError, match=match):
        load(CLASSIFIER, folder(tmp_path, CLASSIFIER, config=config))


# ----------------------------------------------------------------------------------------------------------------------
# transformers itself, and the scripts


@every_fixture
def test_transformers_computes_the_same_of_the_same_folder(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    fixture = FIXTURES[name]
    path = folder(tmp_path, fixture)
    kind = getattr(transformers, fixture["class"])
    theirs = kind.from_pretrained(path).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    theirs.save_pretrained(tmp_path / "again")
    for folder_ in (path, tmp_path / "again"):
        model, report = load(fixture, folder_)
        assert not report.missing
        with torch.no_grad():
            if name == PRETRAINING["name"]:
                mask = torch.arange(32).repeat(2, 1) % 4 > 0
                out = theirs(clip().transpose(1, 2), bool_masked_pos=mask)
                np.testing.assert_allclose(model.predict(clip(), mask), out.logits, atol=5e-6)
            else:
                np.testing.assert_allclose(logits(model), theirs(clip().transpose(1, 2)).logits, atol=5e-6)


@pytest.mark.slow
def test_folders_go_through_the_scripts(dota_root, tmp_path):
    """DAPT from a folder, with its clips and pixels, and --eval of a classifier in one."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    sizes |= {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    sizes |= {"decoder_intermediate_size": 256, "image_size": 32, "num_frames": 2, "num_labels": 2}
    settings = transformers.VideoMAEConfig(**sizes)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    for name in ("VideoMAEForPreTraining", "VideoMAEForVideoClassification"):
        getattr(transformers, name)(settings).save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(processor))
    common = ["--data_set", "DoTA", "--data_path", dota_root, "--num_workers", 0, "--device", "cpu", "--view_fps", 5]
    steps = ["--total_batch_size", 2, "--nb_samples_per_epoch", 2, "--epochs", 1, "--warmup_epochs", 0]
    dapt = ["--model", "pretrain_videomae_tiny_patch16_64", "--from_ckpt", tmp_path / "VideoMAEForPreTraining"]
    done = run("run_dapt.py", *common, *steps, *dapt, "--output_dir", tmp_path / "dapt")
    assert done.returncode == 0, done.stderr
    assert "dialect  VideoMAE of Hugging Face, float32" in done.stdout and "no final norm in the file" in done.stdout
    spec = read_spec(str(tmp_path / "dapt" / "checkpoint-0.pth"))
    assert spec.items() >= {"num_frames": 2, "input_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3}.items()
    evaluate = ["--eval", "--model", "vit_tiny_patch16_64", "--finetune", tmp_path / "VideoMAEForVideoClassification"]
    done = run("run_finetune.py", *common, *evaluate, "--output_dir", tmp_path / "eval", "--sampling_rate_val", 8)
    assert done.returncode == 0, done.stderr
    assert "num_frames 2, input_size 32" in done.stdout and (tmp_path / "eval" / "predictions.csv").is_file()
    inspected = run("-m", "models.weights", tmp_path / "VideoMAEForVideoClassification")
    assert "  config   num_frames 2\n" in inspected.stdout and "model    vit_tiny_patch16_64 or" in inspected.stdout
