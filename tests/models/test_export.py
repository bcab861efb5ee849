"""Exported files: what they compute, what they say of themselves, what is refused."""

import copy
import functools
import io
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from helpers import complete, run
from onnx import numpy_helper
from safetensors.torch import load_file, safe_open, save_file

from engine.checkpoint import save_weights
from engine.evaluate import Scorer, _on_device
from models import create_model, export, load
from models.export import main
from models.weights import CheckpointError, container, hf, load_pretrained, read_hints, read_spec, write
from utils.damage import parse_json, with_sum

TINY = "vit_tiny_patch16_64"
FILES = ("onnx", "torch_export", "safetensors")
ABOUT = {"data_set": ["DoTA"], "epoch": 3, "operating_point": {"threshold": 0.25, "source": "best MCC on DoTA val"}}


def trained(name=TINY, *, learned=False, spread=0.05, **options):
    """A classifier none of whose tensors is zero, in evaluation mode."""
    torch.manual_seed(0)
    model = create_model(name, **{"init_scale": 1.0} | options).eval()
    if learned:
        model.learn_pos_embed()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * spread)
    return model


def saved(tmp_path, model, **about):
    path = tmp_path / "weights.pth"
    save_weights(path, model, **about)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a weights file and of all files made of it, and its model."""
    folder, model = tmp_path_factory.mktemp("export"), trained()
    path = saved(folder, model, **ABOUT)
    for kind in (*FILES, "hf"):
        export.export(path, kind)
    export.export(path, "onnx", str(folder / "one.onnx"), batch="1")
    export.export(path, "torch_export", str(folder / "one.pt2"), batch="1")
    return folder, model


@pytest.fixture
def files(source, tmp_path):
    """{kind: a copy of the file made of the weights}."""
    result = {}
    for kind in FILES:
        result[kind] = tmp_path / f"weights{container.SUFFIXES[kind]}"
        result[kind].write_bytes((source[0] / result[kind].name).read_bytes())
    return result


def windows(model, count, seed=7):
    shape = (count, *model.input_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def difference(one, other, count=3):
    video = windows(one, count)
    with torch.no_grad():
        a, b = (m(m.normalize(video)) for m in (one, other))
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    return (a - b).abs().max().item()


def command(monkeypatch, capsys, *words):
    """(exit code, stdout, stderr) of python -m models.export."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


# ----------------------------------------------------------------------------------------------------------------------
# What is written


VARIANTS = [
    (TINY, {"final_reduction": "cls", "gelu": "tanh", "num_frames": 8, "num_classes": 3}, True),
    ("internvideo2_tiny_patch14_56", {"num_frames": 6, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}, False),
]


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
@pytest.mark.parametrize("name, options, learned", VARIANTS)
def test_every_family_comes_out_as_it_went_in(tmp_path, kind, name, options, learned):
    model = trained(name, learned=learned, **options)
    said = export.export(saved(tmp_path, model), kind)
    exported, spec = load(tmp_path / f"weights{container.SUFFIXES[kind]}")
    assert spec == model.spec == exported.spec and exported.name == name
    for count in (1, 2, 3, 5):
        assert difference(model, exported, count) < 1e-4
    found = [float(x) for x in re.findall(r"([\d.e+-]+) on 3 windows", said)]
    assert len(found) == 2 and max(found) < 1e-4 and "at batch 1, 2, 3" in said


@pytest.mark.parametrize("name", ["one.onnx", "one.pt2"])
def test_a_program_of_one_clip_takes_a_batch_apart(source, name):
    exported, _ = load(source[0] / name)
    assert exported.one_by_one and difference(source[1], exported, 3) < 1e-4


@pytest.mark.parametrize("kind", FILES)
def test_the_spec_is_inside_and_beside(source, files, kind):
    spec = read_spec(str(files[kind]))  # nothing is beside the copy
    assert spec == source[1].spec | ABOUT == load(files[kind])[1]
    record = json.loads((source[0] / f"{files[kind].name}.spec.json").read_text())
    about, _ = record.pop("export"), record.pop("crc32")
    assert record == spec and about["format"] == kind and about["batch"] == "dynamic" and len(about["sha256"]) == 64
    assert not [path for path in source[0].iterdir() if path.name.startswith(".")]


def test_onnx_as_others_see_it(source):
    model = onnx.load(source[0] / "weights.onnx")
    onnx.checker.check_model(model)
    assert [(opset.domain, opset.version) for opset in model.opset_import][0][1] >= 17
    (video,), (logits,) = model.graph.input, model.graph.output
    assert video.name == "video" and logits.name == "logits"
    assert [d.dim_param or d.dim_value for d in video.type.tensor_type.shape.dim] == ["batch", 3, 4, 64, 64]
    assert {p.key for p in model.metadata_props} == {"spec"}
    for path in (source[0] / "weights.onnx", source[0] / "weights.pt2"):
        assert str(Path(export.__file__).parent).encode() not in path.read_bytes()  # where the code lay


def test_a_program_as_others_load_it(source):
    extra = {"spec.json": ""}
    program = torch.export.load(source[0] / "weights.pt2", extra_files=extra)
    assert json.loads(extra["spec.json"])["operating_point"] == ABOUT["operating_point"]
    video = source[1].normalize(windows(source[1], 4))
    with torch.no_grad():
        assert (program.module()(video) - source[1](video)).abs().max() < 1e-4


def test_safetensors_are_a_weights_file(source, files):
    path = files["safetensors"]
    assert difference(load(path)[0], source[1]) == 0
    assert load_file(path).keys() == source[1].state_dict().keys()
    model = create_model(TINY)
    assert not load_pretrained(model, str(path)).missing
    assert torch.equal(model.head.weight, source[1].head.weight)


# ----------------------------------------------------------------------------------------------------------------------
# The interface


@pytest.mark.parametrize("kind", FILES)
def test_it_is_called_as_a_model(source, files, kind):
    model, _ = load(files[kind])
    assert model.eval() is model and model.train() is model and not model.eval().training
    clone = _on_device(model, torch.device("meta"))
    assert clone is not model and clone.mean.is_meta and not model.mean.is_meta
    assert _on_device(model, torch.device("cpu")) is model
    assert difference(source[1], copy.deepcopy(model)) < 1e-4
    with pytest.raises(ValueError, match=r"expected a video of shape \(B, 3, 4, 64, 64\)"):
        model(torch.zeros(1, 3, 8, 64, 64))
    video = model.normalize(windows(model, 2))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        low, high = model(video.bfloat16()), model(video)
    assert low.dtype == high.dtype == torch.float32
    if kind != "safetensors":  # which is the model itself
        with torch.no_grad():
            assert (high - source[1](video)).abs().max() < 1e-4


class Windows:
    """Some windows of one clip."""

    device, clips = torch.device("cpu"), [None]

    def __init__(self, video):
        self.video = video

    def batches(self, normalize):
        for i in range(len(self.video)):
            video = normalize(self.video[i : i + 1])
            yield SimpleNamespace(clip=np.array([0]), last=np.array([i]), video=video)
        yield SimpleNamespace(clip=0)


@pytest.mark.parametrize("kind", FILES)
def test_a_scorer_runs_it(source, files, kind):
    scorer = Scorer(Windows(windows(source[1], 3)))
    (wanted,), (found,) = (list(scorer.by_clip(model)) for model in (source[1], load(files[kind])[0]))
    assert wanted.frame.tolist() == found.frame.tolist() == [0, 1, 2]
    assert np.abs(wanted.logits - found.logits).max() < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# What has changed is refused


def change_onnx(path, amount):
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[11] += amount
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def members(path):
    with zipfile.ZipFile(path) as z:
        return {name: z.read(name) for name in z.namelist()}


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as z:
        for name, value in content.items():
            z.writestr(name, value)


def change_program(path, amount, member=r".*/weights/weight_0"):
    content = members(path)
    name = next(name for name in content if re.fullmatch(member, name))
    values = np.frombuffer(content[name], dtype=np.float32).copy()
    values[0] += amount
    write_zip(path, content | {name: values.tobytes()})


def change_safetensors(path, amount):
    with safe_open(path, "pt") as f:
        about = f.metadata()
    state = load_file(path)
    state["blocks.0.attn.v_bias"][0] += amount
    save_file(state, path, metadata=about)


CHANGES = {"onnx": change_onnx, "torch_export": change_program, "safetensors": change_safetensors}


@pytest.mark.parametrize("kind", FILES)
def test_a_changed_weight_is_refused(files, kind):
    path = files[kind]
    CHANGES[kind](path, 0.0)
    load(path)  # written anew, not changed
    CHANGES[kind](path, 1e-6)
    match = f"{re.escape(str(path))}: its content has changed since it was exported.*export it again: .* --to {kind}"
    with pytest.raises(CheckpointError, match=match):
        load(path)
    if kind == "safetensors":
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(create_model(TINY), str(path))


def test_a_changed_position_table_is_refused(files):
    change_program(files["torch_export"], 1e-3, r".*/constants/tensor_0")
    with pytest.raises(CheckpointError, match="content has changed"):
        load(files["torch_export"])


@pytest.mark.parametrize("kind", FILES)
def test_another_record_beside_is_refused(source, files, kind):
    path = files[kind]
    beside = container.beside(path)
    text = (source[0] / beside.name).read_text()
    beside.write_text(text)
    load(path)
    record = parse_json(text) | {"view_fps": 12}
    beside.write_text(json.dumps(with_sum(record)))
    with pytest.raises(CheckpointError, match=r"spec.json beside it says view_fps = 12, the file itself 5"):
        load(path)
    beside.write_text(text[:100])
    with pytest.raises(CheckpointError, match=r"weights\S+spec.json is damaged"):
        load(path)
    beside.write_text(text.replace("0.485", "0.585"))
    with pytest.raises(CheckpointError, match=r"weights\S+spec.json is damaged, or was changed by hand"):
        load(path)


@pytest.mark.parametrize("kind", FILES)
def test_a_record_beside_that_is_no_text_is_named(source, files, kind):
    """As after a flipped bit."""
    beside = container.beside(files[kind])
    beside.write_bytes((source[0] / beside.name).read_bytes().replace(b"DoTA", b"Do\xd4A"))
    with pytest.raises(CheckpointError, match=rf"{re.escape(beside.name)} is damaged.*utf-8"):
        load(files[kind])


def test_a_changed_folder_is_refused(source, tmp_path):
    folder = shutil.copytree(source[0] / "weights-hf", tmp_path / "folder")
    load_pretrained(create_model(TINY), str(folder))
    weights, record = folder / "model.safetensors", folder / "spec.json"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    match = rf"{weights}: its content has changed since .* SHA-256 in spec.json .* --to hf \(or remove spec.json"
    with pytest.raises(CheckpointError, match=match):
        load_pretrained(create_model(TINY), str(folder))
    whole = record.read_text()
    record.write_text(whole[:-9])
    with pytest.raises(CheckpointError, match=rf"{weights}: spec.json beside it is damaged .*; copy it again"):
        load_pretrained(create_model(TINY), str(folder))
    record.write_text('{"name": "of another code"}')
    load_pretrained(create_model(TINY), str(folder))


def test_a_program_that_cannot_be_written_is_named_in_one_line(tmp_path):
    """PyTorch's writer would end the process, with a page of C++, on a file that it cannot write to its end."""
    weights, target = saved(tmp_path, trained()), tmp_path / "out" / "x.pt2"
    words = [sys.executable, "-m", "models.export", weights, "--to", "torch_export", "--output", target]
    done = complete(["bash", "-c", 'ulimit -f 1000; exec "$@"', "-", *words], timeout=240)
    assert (done.returncode, done.stderr) == (1, f"error: {target}: File too large\n")
    assert not os.listdir(target.parent)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "save", lambda *_: memoryview(b""))  # written to a disk that is full
    monkeypatch.setattr(Path, "write_bytes", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{tmp_path}/out'$"):
        export.export(saved(tmp_path, trained()), "hf", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_safetensors_with_their_record_beside_alone(source, files):
    path = files["safetensors"]
    save_file(load_file(path), path)  # as by a program that drops what it does not know
    assert read_spec(str(path)) is None
    beside = container.beside(path)
    beside.write_text((source[0] / beside.name).read_text())
    assert load(path)[1] == source[1].spec | ABOUT
    change_safetensors(path, 0.1)
    with pytest.raises(CheckpointError, match="content has changed"):
        load(path)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_part_of_a_file_is_refused(files, kind, share):
    path = files[kind]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*(copy|export) it again"):
        load(path)


def test_a_compressed_program_is_refused_before_it_is_unpacked(files, tmp_path):
    """Which may be to any size; those of PyTorch are as large as what is in them."""
    packed = tmp_path / "packed.pt2"
    with zipfile.ZipFile(files["torch_export"]) as z, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in z.namelist():
            out.writestr(name, z.read(name))
    for read in (load, read_spec):
        with pytest.raises(CheckpointError, match="packed.pt2: .*it is compressed, as no file of torch.export is; exp"):
            read(str(packed))


def test_programs_of_others_are_refused(files, tmp_path):
    model = onnx.load(files["onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match="this onnx file has no spec.*models.export"):
        load(tmp_path / "other.onnx")
    for kind in ("onnx", "torch_export"):
        with pytest.raises(CheckpointError, match="an exported program.*give the weights file"):
            load_pretrained(create_model(TINY), str(files[kind]))
        with pytest.raises(CheckpointError, match="exported already"):
            export.export(str(files[kind]), "safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# Nothing of a file is run


class Attack:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def forge(path, change):
    """Change the members of a program, and make its record's sum that of the result."""
    content = {name: value for name, value in members(path).items() if not name.endswith("extra/spec.json")}
    record = container.read_record(path, "torch_export")
    change(content)
    write_zip(path, content)
    record["export"]["sha256"] = container.sum_of(path, "torch_export")
    container.add_program_record(path, json.dumps(record))


def in_graph(find, replace):
    def change(content):
        name = next(n for n in content if n.endswith("models/model.json"))
        text = content[name].decode()
        assert find in text
        content[name] = text.replace(find, replace).encode()

    return change


def pickled(mark, content):
    buffer = io.BytesIO()
    torch.save(Attack(mark), buffer)
    content["archive/data/sample_inputs/model.pt"] = buffer.getvalue()


def pickled_weight(mark, content):
    name = "archive/data/weights/model_weights_config.json"
    payloads = json.loads(content[name])
    next(iter(payloads["config"].values()))["use_pickle"] = True
    content[name], content["archive/data/weights/weight_0"] = json.dumps(payloads).encode(), pickle.dumps(Attack(mark))


def hidden(mark, content):
    pickled(mark, content)
    content["other/data/sample_inputs/model.pt"] = b""


def added(mark, content):
    content["archive/data/constants/opaque_obj_0"] = pickle.dumps(Attack(mark))


ATTACKS = {
    "pickle": pickled,
    "pickled weight": pickled_weight,
    "object": added,
    "second archive": hidden,
    "compiled code": lambda mark, content: content.update({"archive/data/aotinductor/model/x.so": b""}),
    "size": lambda mark, content: in_graph("Symbol(", f"__import__('os').mkdir('{mark}') or Symbol(")(content),
    "guard": lambda mark, content: in_graph('"guards_code": []', f'"guards_code": ["mkdir({mark})"]')(content),
    "operator": lambda mark, content: in_graph("torch.ops.aten.gelu.default", "torch.os.system")(content),
    "reads a file": lambda mark, content: in_graph("torch.ops.aten.gelu.default", "torch.ops.aten.from_file")(content),
    "name": lambda mark, content: in_graph('"name": "video"', '"name": "video=print(1)"')(content),
    "import": lambda mark, content: in_graph('\\"context\\": \\"null\\"', '\\"context\\": {\\"__enum__\\": true}')(
        content
    ),
}


def test_a_program_of_the_right_sum_loads(files):
    forge(files["torch_export"], lambda content: None)
    assert load(files["torch_export"])


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_may_be_code_is_refused(files, tmp_path, attack):
    path, mark = files["torch_export"], tmp_path / "mark"
    forge(path, functools.partial(ATTACKS[attack], mark))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*refused"):
        load(path)
    assert not mark.exists()


def test_values_in_other_files_are_refused(files, tmp_path):
    path = files["onnx"]
    model = onnx.load(path)
    entry = next(p for p in model.metadata_props if p.key == "spec")
    onnx.external_data_helper.convert_model_to_external_data(model, location="values.bin", size_threshold=0)
    onnx.save(model, path)
    record = parse_json(entry.value)
    record["export"]["sha256"] = container.sum_of(path, "onnx")
    model = onnx.load(path, load_external_data=False)
    model.metadata_props[0].value = json.dumps(record)
    path.write_bytes(model.SerializeToString())
    assert container.read_record(path, "onnx") and (tmp_path / "values.bin").exists()
    with pytest.raises(CheckpointError, match="takes values from other files, which is refused"):
        load(path)


# ----------------------------------------------------------------------------------------------------------------------
# The proof


def spoil(monkeypatch, kind, change):
    """Let `change` alter the model that is written, and not the one it is compared with."""
    writer = write.WRITERS[kind]

    def spoilt(path, model, *rest, **options):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        return writer(path, other, *rest, **options)

    monkeypatch.setitem(write.WRITERS, kind, spoilt)


@pytest.mark.parametrize(  # of an untrained head logits are all small
    "kind, init_scale", [("onnx", 1e-4), ("torch_export", 1.0), ("safetensors", 1.0), ("safetensors", 1e-4)]
)
def test_the_proof_finds_another_weight(tmp_path, monkeypatch, capsys, kind, init_scale):
    path = saved(tmp_path, trained(init_scale=init_scale, spread=0.0))
    spoil(monkeypatch, kind, lambda model: model.blocks[1].mlp.fc2.weight.mul_(1.5))
    code, out, err = command(monkeypatch, capsys, path, "--to", kind)
    assert code == 1 and not out and err.startswith("error: nothing was written: ")
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_the_proof_finds_a_bit(tmp_path, monkeypatch):
    path = saved(tmp_path, trained())
    for kind in ("torch_export", "safetensors"):
        spoil(monkeypatch, kind, lambda model: model.blocks[0].norm1.bias[3].add_(1e-6))
        with pytest.raises(CheckpointError, match="blocks.0.norm1.bias is not as in the weights file"):
            export.export(path, kind)


def test_a_failed_proof_leaves_the_file_before(tmp_path, monkeypatch, capsys):
    path = saved(tmp_path, trained())
    assert command(monkeypatch, capsys, path, "--to", "torch_export", "--batch", "1")[0] == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, _, err = command(monkeypatch, capsys, path, "--to", "torch_export", "--tolerance", "1e-12")
    assert code == 1 and re.search(r"largest difference of a logit [\d.e-]+ on 3 windows random", err)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_nan_is_a_difference(tmp_path):
    model = trained()
    proof = export.Proof(model, {"random": export.random_windows(model.spec)}, (1, 2), 1e-4)
    with pytest.raises(export.ProofError, match="inf on 3 windows"):
        proof.compare(lambda video: model(video) * float("nan"))
    with pytest.raises(export.ProofError, match="inf on 3 windows"):
        proof.compare(lambda video: model(video)[:, :1])
    assert "on 3 windows random, at batch 1, 2" in proof.compare(lambda video: model(video))
    with pytest.raises(CheckpointError, match="all logits of the weights file are 0"):
        export.export(saved(tmp_path, trained(init_scale=0.0, spread=0.0)), "safetensors")


def test_windows_of_a_file(tmp_path, monkeypatch, capsys):
    model = trained()
    path, clips = saved(tmp_path, model), tmp_path / "clips.npy"
    np.save(clips, windows(model, 5).numpy())
    code, out, _ = command(monkeypatch, capsys, path, "--to", "safetensors", "--clips", clips)
    assert code == 0 and "on 5 windows of video" in out
    np.savez(tmp_path / "one.npz", windows=windows(model, 1).numpy())
    assert len(export.read_windows(str(tmp_path / "one.npz"), model.spec)) == 3
    wrong = {
        "float.npy": (windows(model, 1).numpy() / 255, "holds float64 of shape"),
        "short.npy": (windows(model, 1).numpy()[:, :, :2], "needs an array of uint8 of shape .n, 3, 4, 64, 64."),
        "none.npy": (windows(model, 1).numpy()[:0], "holds uint8 of shape .0, "),
        "object.npy": (np.array([{}]), "not a file of NumPy"),
    }
    for name, (content, match) in wrong.items():
        np.save(tmp_path / name, content, allow_pickle=True)
        code, _, err = command(monkeypatch, capsys, path, "--to", "onnx", "--clips", tmp_path / name)
        assert code == 1 and re.search(match, err) and err.count("\n") == 1
    code, _, err = command(monkeypatch, capsys, path, "--to", "onnx", "--clips", tmp_path / "absent.npy")
    assert code == 1 and "absent.npy: No such file" in err


# ----------------------------------------------------------------------------------------------------------------------
# transformers


HF_CASES = {
    "VideoMAE": (TINY, {}),
    "VideoMAE of the first token": (
        TINY,
        {"final_reduction": "cls", "gelu": "tanh", "num_frames": 8, "num_classes": 3},
    ),
    "ViViT": ("vivit_tiny_patch16_64", {"num_frames": 8, "input_size": 32, "num_classes": 3}),
    "ViViT of others": ("vivit_tiny_patch16_64", {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "gelu": "erf"}),
    "V-JEPA 2": ("vjepa2_vit_tiny_patch16_64", {"num_frames": 8, "input_size": 32, "num_classes": 3}),
}
FOLDER = {"config.json", "model.safetensors", "preprocessor_config.json", "spec.json"}


def of_transformers(folder):
    """The model that a folder is for, read without a word of what is missing or not expected."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, about = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(about.values())
    return model.eval()


def processed(folder, video):
    """What the folder's own processor makes of a clip (3, T, H, W) of another size, and its number of frames."""
    from transformers import AutoImageProcessor, AutoVideoProcessor

    if (folder / "video_preprocessor_config.json").exists():
        kinds = [AutoVideoProcessor]
    else:
        kinds = [AutoVideoProcessor, AutoImageProcessor]
    for kind in kinds:
        processor = kind.from_pretrained(folder)
        frames = video.permute(1, 0, 2, 3) if kind is AutoVideoProcessor else list(video.permute(1, 2, 3, 0).numpy())
        (pixels,) = (v for k, v in processor(frames, return_tensors="pt").items() if k.startswith("pixel_values"))
        yield pixels[0].transpose(0, 1), processor.num_frames


@pytest.mark.parametrize("case", HF_CASES)
def test_transformers_reads_the_folder(tmp_path, case):
    name, options = HF_CASES[case]
    model = trained(name, **options)
    said = export.export(saved(tmp_path, model, **ABOUT), "hf", str(tmp_path / "out" / "folder"))
    folder, video = tmp_path / "out" / "folder", windows(model, 2)
    names = FOLDER - {"preprocessor_config.json"} | {"video_preprocessor_config.json"} if "JEPA" in case else FOLDER
    assert {p.name for p in folder.iterdir()} == names and os.listdir(folder.parent) == ["folder"]
    assert f"for {type(of_transformers(folder)).__name__}, " in said and ("skip_predictor" in said) == ("JEPA" in case)
    assert json.loads((folder / "spec.json").read_text())["operating_point"] == ABOUT["operating_point"]
    for pixels, count in processed(folder, video[0]):
        assert (pixels - model.normalize(video)[0]).abs().max() < 1e-5 and count == model.spec["num_frames"]
    batch = model.normalize(video)
    again = create_model(name, num_classes=len(model.spec["classes"]), **read_hints(str(folder))).eval()
    report = load_pretrained(again, str(folder))
    assert not report.missing and not report.notes
    with torch.no_grad():
        wanted = model(batch)
        assert (of_transformers(folder)(batch.transpose(1, 2)).logits - wanted).abs().max() < 1e-4
        assert torch.equal(again(again.normalize(video)), wanted) or "ViViT" in case  # whose pixels go from -1 to 1
        assert (again(again.normalize(video)) - wanted).abs().max() < 1e-5
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_v_jepa_of_another_head_goes_out_as_an_encoder(tmp_path):
    model = trained("vjepa2_vit_tiny_patch16_64", final_reduction="mean")
    said = export.export(saved(tmp_path, model), "hf")
    assert "for VJEPA2Model, read by" in said and "difference of a feature" in said and "the head is not in it" in said
    folder, video = tmp_path / "weights-hf", model.normalize(windows(model, 2))
    with torch.no_grad():
        found = of_transformers(folder)(video.transpose(1, 2), skip_predictor=True).last_hidden_state
        assert (found - model.encode(model.embed(video))).abs().max() < 1e-4
    again = create_model(model.name, final_reduction="mean")
    assert load_pretrained(again, str(folder)).missing == ["head.weight", "head.bias"]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items() if "head" not in k)


def test_biases_that_transformers_does_not_read(tmp_path, monkeypatch):
    """As in versions 5.6 to 5.17, where a file with the published names gives zeros, and no error."""
    rename, path = hf.hf_state, saved(tmp_path, trained())

    def unread(state, kind, biases, *, also=()):
        is_lost = re.compile(r".*attention\.attention.*bias" if biases in (hf.PUBLISHED, *also) else "none")
        return {f"{k}_lost" if is_lost.fullmatch(k) else k: v for k, v in rename(state, kind, biases).items()}

    monkeypatch.setattr(hf, "hf_state", unread)
    assert f"biases named {hf.LINEAR}, as transformers" in export.export(path, "hf")
    monkeypatch.setattr(hf, "hf_state", functools.partial(unread, also=(hf.LINEAR,)))
    with pytest.raises(CheckpointError, match=f"with {hf.PUBLISHED}: nothing was written: .*with {hf.LINEAR}: nothing"):
        export.export(path, "hf", str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="its last norm adds 1e-05 .* and 1e-06 here, .*a larger --tolerance"):
        export.export(path, "hf", str(tmp_path / "other"))
    assert not (tmp_path / "other").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "name, options, reason",
    [
        (TINY, {"learned": True}, "its position table is learned"),
        (TINY, {"head": "attentive"}, "its head is attentive, and VideoMAE's there is linear"),
        ("vivit_tiny_patch16_64", {"head": "attentive"}, "its head is attentive, and ViViT's there is linear"),
        ("umt_vit_tiny_patch16_64", {}, "its position table is umt"),
        ("internvideo2_tiny_patch14_56", {}, "another architecture than VideoMAE, ViViT and V-JEPA 2"),
        ("vjepa21_vit_tiny_patch16_64", {}, "its rotations and modality embedding are V-JEPA 2.1's"),
        ("vjepa2_vit_tiny_patch16_64", {"gelu": "tanh"}, "its probe has another GELU than its encoder"),
    ],
)
def test_what_transformers_has_no_model_for(tmp_path, monkeypatch, capsys, name, options, reason):
    path = saved(tmp_path, trained(name, **options))
    code, _, err = command(monkeypatch, capsys, path, "--to", "hf")
    assert code == 1 and reason in err and "--to onnx, torch_export or safetensors" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_a_model_with_more_than_transformers_has_place_for():
    model = trained()
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="VideoMAEForVideoClassification has no place for adapter.weight, adap"):
        hf.kind_of(model, "x.pth")
    probe = trained("vjepa2_vit_tiny_patch16_64")
    probe.pooler.cross_attention_block.xattn.num_heads = 6
    with pytest.raises(CheckpointError, match="its probe has 6 heads, and VJEPA2's there as many as the encoder, 3"):
        hf.kind_of(probe, "x.pth")


def test_a_folder_that_is_there_stays(tmp_path, monkeypatch, capsys):
    path = saved(tmp_path, trained())
    (tmp_path / "weights-hf").mkdir()
    (tmp_path / "weights-hf" / "mine.txt").write_text("mine")
    code, _, err = command(monkeypatch, capsys, path, "--to", "hf")
    assert code == 1 and "weights-hf: exists already" in err and os.listdir(tmp_path / "weights-hf") == ["mine.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_tensorrt_is_a_command_that_was_not_run():
    first, *lines = export.tensorrt_lines(Path("a b.onnx"), trained().spec, "dynamic")
    assert "not tested here" in first and all("--onnx='a b.onnx' --saveEngine='a b.engine'" in line for line in lines)
    assert "--minShapes=video:1x3x4x64x64 --optShapes=video:1x3x4x64x64 --maxShapes=video:1x3x4x64x64" in lines[0]
    assert "--minShapes=video:1x3x4x64x64 --optShapes=video:8x3x4x64x64 --maxShapes=video:32x3x4x64x64" in lines[1]
    (line,) = export.tensorrt_lines(Path("x.onnx"), trained().spec, "1")[1:]
    assert line.split() == ["trtexec", "--onnx=x.onnx", "--saveEngine=x.engine"]


def test_what_has_no_logits_is_refused(tmp_path, monkeypatch, capsys):
    for model in (create_model("pretrain_videomae_tiny_patch16_64"), trained(num_classes=0, final_reduction="none")):
        code, _, err = command(monkeypatch, capsys, saved(tmp_path, model), "--to", "onnx")
        assert code == 1 and "has no logits to export; fine-tune it first" in err
    torch.save(trained().state_dict(), tmp_path / "flat.pth")
    for name, reason in (("flat.pth", "has no spec"), ("absent.pth", "no such checkpoint file")):
        code, _, err = command(monkeypatch, capsys, tmp_path / name, "--to", "onnx")
        assert code == 1 and reason in err and err.count("\n") == 1


@pytest.mark.parametrize("kind, package", [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("hf", "transformers")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, files, kind, package):
    path = saved(tmp_path, trained())
    before = set(os.listdir(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = command(monkeypatch, capsys, path, "--to", kind, "--output", tmp_path / "new")
    assert code == 1 and f"pip install {package}" in err and set(os.listdir(tmp_path)) == before
    if package == "onnxruntime":
        with pytest.raises(CheckpointError, match="pip install onnxruntime"):
            load(files["onnx"])


def test_a_model_too_large_for_onnx_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, trained())
    monkeypatch.setattr(write, "_LARGEST_ONNX", 10**6)
    with pytest.raises(CheckpointError, match="takes 2 GB: export it --to torch_export or safetensors"):
        export.export(path, "onnx")


def test_the_file_itself_is_not_written_over(tmp_path, monkeypatch, capsys):
    path = saved(tmp_path, trained())
    code, _, err = command(monkeypatch, capsys, path, "--to", "onnx", "--output", path)
    assert code == 1 and "this is the file to export" in err


def test_as_a_user_would_run_it(tmp_path):
    path = saved(tmp_path, trained("internvideo2_tiny_patch14_56"))
    done = run("-m", "models.export", path, "--to", "onnx")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert load(tmp_path / "weights.onnx") and f"trtexec --onnx={tmp_path}/weights.onnx" in done.stdout
    done = run("-m", "models.export", path, "--to", "safetensors", "--output", "/proc/none/x.safetensors")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "/proc/none" in done.stderr
