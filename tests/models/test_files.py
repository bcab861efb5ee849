"""Every file people bring: what is harmless is read past, one reading is taken, all else refused for its reason."""

import bz2
import collections
import datetime
import gzip
import http.server
import json
import lzma
import os
import pathlib
import tarfile
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import create_model, load
from models.pos_embed import position_table, resampled
from models.weights import CheckpointError, fetch, load_pretrained, read_checkpoint, read_spec
from models.weights.position import possible_grids

TINY = "vit_tiny_patch16_64"


def tiny(seed=1, **options):
    torch.manual_seed(seed)
    return create_model(TINY, **options)


STATE = {k: v.clone() for k, v in tiny(0, num_classes=2).state_dict().items()}


def save(tmp_path, content, **options):
    torch.save(content, tmp_path / "file.pth", **options)
    return str(tmp_path / "file.pth")


def check(path, **options):
    """The file gives the weights of STATE."""
    model = tiny()
    report = load_pretrained(model, path, **options)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in STATE.items()) and not report.missing
    return report


def error(path, **options):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model, path, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# What stands beside the weights


BESIDE = {
    "NumPy scalars": [np.int32(2), np.float16(2), np.uint8(1), np.complex64(1), np.str_("x"), np.bytes_(b"x")],
    "arrays": [np.arange(5), np.array(["a", "b"]), np.array([{"a": 1}], dtype=object)],
    "paths": [pathlib.Path("/x/y"), pathlib.PurePosixPath("z"), pathlib.PureWindowsPath("c:/x")],
    "times": [datetime.datetime.now(), datetime.date.today(), datetime.timedelta(1), datetime.timezone.utc],
    "containers": [
        collections.deque([1, 2], 5),
        collections.defaultdict(list, {"a": [1]}),
        collections.Counter("ab"),
        {1, 2},
        frozenset((1,)),
        range(3),
        1 + 2j,
        slice(1),
        ...,
        bytearray(b"x"),
    ],
    "random state": [np.random.RandomState(0).get_state(), np.random.default_rng(0).bit_generator.state],
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_harmless_is_read_past(kind, tmp_path):
    check(save(tmp_path, {"model": STATE, "epoch": 3, "beside": BESIDE[kind]}))
    half = {
        "model": {k: torch.nn.Parameter(v) for k, v in STATE.items()},
        "beside": BESIDE[kind],
        "step": torch.ones(()),
    }
    assert read_checkpoint(save(tmp_path, half)).state.keys() == STATE.keys()
    assert read_spec(save(tmp_path, {"model": STATE, "spec": tiny().spec, "x": BESIDE[kind]}))["model"] == TINY


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("beside", [[], BESIDE["times"], BESIDE["containers"]])
def test_code_beside_what_is_harmless_is_called_that(beside, tmp_path):
    path = save(tmp_path, {"model": STATE, "a": beside, "x": Calls(os.system, f"touch {tmp_path / 'called'}")})
    message = error(path)
    assert "it pickles posix.system, which is refused because unpickling can run code" in message
    assert "datetime" not in message and "truncated" not in message and not (tmp_path / "called").exists()
    for function in (getattr, eval, exec, open, os.unlink, torch.load, np.load, collections.namedtuple):
        path = save(tmp_path, {"model": STATE, "a": beside, "x": Calls(function, str(tmp_path / "called"), "w")})
        assert "can run code" in error(path) and not (tmp_path / "called").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is no weights file


def packed(tmp_path):
    """{name: content} of foreign files around an intact one."""
    data = (tmp_path / "file.pth").read_bytes()
    with tarfile.open(tmp_path / "t.tar", "w") as t:
        t.add(tmp_path / "file.pth", "file.pth")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.write(tmp_path / "file.pth", "inner/file.pth")
    np.savez(tmp_path / "n.npz", a=np.zeros(3))
    np.save(tmp_path / "n.npy", np.zeros(3))
    whole = {name: (tmp_path / name).read_bytes() for name in ("t.tar", "z.zip", "n.npz", "n.npy")}
    return whole | {
        "gz": gzip.compress(data),
        "bz2": bz2.compress(data),
        "xz": lzma.compress(data),
        "hdf5": b"\x89HDF\r\n\x1a\n" + b"x" * 100,
        "json": json.dumps({"a": 1}).encode(),
        "text": b"epoch 1 loss 0.5\n" * 40,
        "html": b"\n<!DOCTYPE html><html></html>",
        "lz4": b"\x04\x22\x4d\x18" + bytes(100),
        "zlib": zlib.compress(data),
        "html with a mark": b"\xef\xbb\xbf<html></html>",
        "json with a mark": b'\xef\xbb\xbf{"a": 1}',
        "text of two bytes": "Quota exceeded".encode("utf-16"),
        "gguf": b"GGUF\x03" + bytes(100),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "mp4": b"\0\0\0\x20ftypisom" + bytes(100),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "garbage": bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)),
    }


WHAT = {
    "t.tar": "a tar archive; unpack",
    "z.zip": "a zip of inner/file.pth; unpack",
    "n.npz": "arrays of NumPy",
    "n.npy": "an array of NumPy",
    "gz": "gunzip",
    "bz2": "bunzip2",
    "xz": "unxz",
    "hdf5": "an HDF5 file",
    "json": "JSON, not weights",
    "text": "text, not weights",
    "html": "HTML",
    "lz4": "unlz4",
    "zlib": "compressed by zlib",
    "html with a mark": "HTML",
    "json with a mark": "JSON, not weights",
    "text of two bytes": "text, not weights; it begins 'Quota exceeded'",
    "gguf": "GGUF",
    "png": "a picture",
    "mp4": "a video",
    "lfs": "git lfs pull",
    "garbage": "damaged, or not a PyTorch checkpoint",
}


def test_foreign_files_are_called_what_they_are(tmp_path):
    save(tmp_path, STATE)
    files = packed(tmp_path)
    assert files.keys() == WHAT.keys()
    for name, content in files.items():
        (tmp_path / "model.pth").write_bytes(content)
        for read in (error, lambda p: str(pytest.raises(CheckpointError, read_spec, p).value)):
            message = read(str(tmp_path / "model.pth"))
            assert WHAT[name] in message and "truncated" not in message and "flax" not in message, (name, message)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    (tmp_path / "link.pth").symlink_to("gone.pth")
    for name, match in (
        ("pipe.pth", "a pipe or a device, not a file"),
        ("loop.pth", "cannot be read (Too many levels"),
        ("link.pth", "no such checkpoint file (a link to gone.pth)"),
        ("x" * 300, "cannot be read (File name too long)"),
        ("null\0.pth", "cannot be read (embedded null"),
    ):
        for read in (
            error,
            *(lambda p, r=r: str(pytest.raises(CheckpointError, r, p).value) for r in (read_spec, load)),
        ):
            assert match in read(str(tmp_path / name))


def test_files_in_a_closed_folder(as_nobody):
    folder, drop = as_nobody
    (folder / "closed").mkdir(mode=0o700)
    torch.save(STATE, folder / "closed" / "file.pth")
    with drop():
        assert "cannot be read (Permission denied)" in error(str(folder / "closed" / "file.pth"))


def test_a_file_that_torch_save_did_not_finish(tmp_path):
    with pytest.raises(TypeError):
        torch.save({"model": STATE, "x": os}, tmp_path / "file.pth")
    assert "torch.save began this file and failed" in error(str(tmp_path / "file.pth"))


def test_safetensors_of_a_type_to_come(tmp_path):
    save_file(STATE, tmp_path / "new.safetensors")
    content = (tmp_path / "new.safetensors").read_bytes()
    (tmp_path / "new.safetensors").write_bytes(content.replace(b'"F32"', b'"F99"'))
    message = error(str(tmp_path / "new.safetensors"))
    assert "type F99, which this version of safetensors does not know; update it" in message


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_as_code(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
    assert "a TorchScript program, which is refused because it holds code" in error(str(tmp_path / "script.pt"))


def test_truncated_is_said_only_where_a_container_ends_early(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for cut in (5, 100, len(whole) // 2, len(whole) - 3):
        (tmp_path / "b.safetensors").write_bytes(whole[:cut])
        assert "truncated" in error(str(tmp_path / "b.safetensors")), cut
    (tmp_path / "b.safetensors").write_bytes(whole[:20] + b"\xff" + whole[21:])
    assert "damaged" in error(str(tmp_path / "b.safetensors"))
    (tmp_path / "b.safetensors").write_bytes(whole + b"more")
    assert "damaged" in error(str(tmp_path / "b.safetensors"))
    path = save(tmp_path, STATE)
    content = bytearray(pathlib.Path(path).read_bytes())
    content[len(content) // 2] ^= 255
    pathlib.Path(path).write_bytes(content)
    assert ": damaged (" in error(path)


# ----------------------------------------------------------------------------------------------------------------------
# Layouts


def prefixed(prefix, state=STATE):
    return {f"{prefix}{key}": value for key, value in state.items()}


def of_mmaction(*names):
    """As mmaction has it: its head, and its own names in place of ours."""
    state = {}
    for key, value in STATE.items():
        key = key.replace("head.", "cls_head.fc_cls.") if key.startswith("head.") else f"backbone.{key}"
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        state[key] = value
    return {"state_dict": state, "meta": {"x": 1}}


OPTIMIZER = {"state": {0: {"a.b": torch.ones(1)}}, "param_groups": [{"lr": 1}]}
OWN = (("patch_embed.proj", "patch_embed.projection"), ("fc1", "layers.0.0"), ("fc2", "layers.1"))
LAYOUTS = {  # name: content, keys that are ignored
    "Lightning": ({"state_dict": prefixed("model."), "epoch": 1}, 0),
    "Lightning with a loss": ({"state_dict": prefixed("model.") | {"loss.w": torch.ones(2)}}, 1),
    "net.": (prefixed("net."), 0),
    "two prefixes": (prefixed("module.student.model."), 0),
    "model_state_dict": ({"model_state_dict": STATE, "optimizer_state_dict": OPTIMIZER}, 0),
    "nested": ({"model": {"model": STATE}}, 0),
    "deep": ({"checkpoint": {"state": {"net": STATE}}, "epoch": 1}, 0),
    "flat with more": ({**STATE, "epoch": 3, "best_acc": 0.5, "args": {"lr": 1}}, 3),
    "network": ({"epoch": 3, "network": STATE}, 0),
    "six deep": ({"a": {"b": {"c": {"d": {"e": {"f": STATE}}}}}}, 0),
    "mixed under its key": ({"model": {**STATE, "version": 3}}, 1),
    "mmaction": (of_mmaction(), 0),
    "mmaction's own names": (of_mmaction(*OWN), 0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_one_reading_is_taken(name, tmp_path):
    content, ignored = LAYOUTS[name]
    assert len(check(save(tmp_path, content)).ignored) == ignored


def test_several_readings_are_named_with_the_flag(tmp_path):
    content = {"generator": STATE, "critic": {k: v + 1 for k, v in STATE.items()}}
    message = error(save(tmp_path, content))
    assert "--model_key generator, --model_key critic" in message
    check(save(tmp_path, content), model_key="generator")
    check(save(tmp_path, {"a": content}), model_key="a.generator")
    both = {f"{name}.{k}": v for name in ("online", "target") for k, v in STATE.items()}
    assert "choose one with --model_prefix online or --model_prefix target" in error(save(tmp_path, both))
    check(save(tmp_path, both), model_prefix="online")
    for wrong in ({"x": None}, {"odd.name": 3}):
        assert "no weights under model or module" in error(save(tmp_path, STATE | wrong))
    for name, value, match in (
        ("x", None, "x is no tensor: take it out"),
        ("head.weight", STATE["head.weight"].to_sparse(), "head.weight is sparse: save its to_dense()"),
        ("head.weight", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "head.weight is quantised"),
        ("head.weight", torch.ones(2, device="meta"), "head.weight has no values"),
        (3, torch.ones(2), "keys are of type int, no names of tensors"),
    ):
        message = error(save(tmp_path, {"model": STATE | {name: value}}))
        assert f"Under model, {match}" in message and "--model_key" not in message
    assert "Under model, there is nothing" in error(save(tmp_path, {"model": {}}))
    assert "holds an empty dictionary" in error(save(tmp_path, {}))
    arrays = {"model": {k: v.numpy() for k, v in STATE.items()}}
    assert "Under model are arrays of NumPy, not tensors" in error(save(tmp_path, arrays))


def test_a_whole_qkv_bias_is_split(tmp_path):
    state = {}
    for key, value in STATE.items():
        value = torch.randn_like(value) if key.endswith(("q_bias", "v_bias")) else value
        state[key] = value
    whole = {k: v for k, v in state.items() if not k.endswith(("q_bias", "v_bias"))}
    for i in range(4):
        q, v = (state[f"blocks.{i}.attn.{part}_bias"] for part in "qv")
        whole[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.randn(128), v])
    model = tiny()
    report = load_pretrained(model, save(tmp_path, {"model": whole}))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert report.fitted[0].startswith("qkv.bias split") and not report.missing
    assert "no rule of" in error(save(tmp_path, whole | {"blocks.0.attn.qkv.bias": torch.zeros(100)}))
    assert "blocks.0.attn.qkv.bias" in error(save(tmp_path, state | {"blocks.0.attn.qkv.bias": torch.zeros(384)}))


def test_eight_bits_are_copied_up(tmp_path):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in STATE.items()}
    model = tiny()
    report = load_pretrained(model, save(tmp_path, {"model": state, "when": BESIDE["times"]}))
    assert report.dtypes == ("float8_e4m3fn",)
    assert all(torch.equal(v.float(), model.state_dict()[k]) for k, v in state.items())


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no such type")
def test_four_bits_are_refused_by_name(tmp_path):
    state = STATE | {"head.bias": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    assert "head.bias is float4_e2m1fn_x2, which PyTorch does not copy up" in error(save(tmp_path, {"model": state}))


def test_parts_of_zero_3_are_to_be_gathered(tmp_path):
    message = error(save(tmp_path, {"module": {k: torch.zeros(0) for k in STATE}}))
    assert "58 of its tensors are empty" in message and "gather it first" in message


# ----------------------------------------------------------------------------------------------------------------------
# Position tables


@pytest.mark.parametrize("true", [(32, 16, 16), (2, 24, 24), (18, 14, 14), (8, 32, 32), (50, 14, 14), (4, 20, 20)])
@pytest.mark.parametrize("wanted", [(8, 14, 14), (8, 16, 16), (32, 16, 16)])
def test_no_other_grid_is_guessed(true, wanted):
    found = possible_grids(true[0] * true[1] * true[2], wanted)
    assert true in found and (len(found) > 1 or found == [true])


def test_a_table_that_fits_several_grids_is_asked_for(tmp_path):
    source = create_model("internvideo2_tiny_patch14_56", num_frames=32)
    path, model = save(tmp_path, {"model": source.state_dict()}), create_model("internvideo2_tiny_patch14_56")
    with pytest.raises(CheckpointError, match="pos_embed has 512 positions, and nothing says .*--table_grid 32x4x4"):
        load_pretrained(model, path)
    report = load_pretrained(model, path, table_grid="32x4x4")
    assert "pos_embed of 32 x 4 x 4 tokens, resampled to 4 x 4 x 4" in report.fitted
    expected = resampled(source.pos_embed[0, 1:], (32, 4, 4), (4, 4, 4))
    assert torch.equal(model.pos_embed[0, 1:], expected)
    for grid, match in (("8x4x4", "has 512 positions, not 8 x 4 x 4"), ("4", "'4' is not slots x rows x columns")):
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(model, path, table_grid=grid)
    known = save(tmp_path, {"model": source.state_dict(), "spec": source.spec})
    assert "pos_embed of 32 x 4 x 4 tokens, resampled to 4 x 4 x 4" in load_pretrained(model, known).fitted


def test_a_fixed_table_at_another_size_is_said_and_resampled_where_asked(tmp_path):
    path = save(tmp_path, {"model": STATE, "spec": tiny().spec})
    model = tiny(num_frames=8)
    own = model.pos_embed.clone()
    report = load_pretrained(model, path)
    assert "computed for 4 x 4 x 4 tokens" in str(report) and "--table_grid 2x4x4 resamples" in str(report)
    assert torch.equal(model.pos_embed, own) and "pos_embed" not in model.state_dict() and not report.fitted
    assert "computed for" not in str(load_pretrained(tiny(), path))
    report = load_pretrained(model, path, table_grid="2x4x4")
    expected = resampled(position_table("sinusoid", (2, 4, 4), 128), (2, 4, 4), (4, 4, 4))
    assert torch.equal(model.pos_embed[0], expected) and "the sinusoid table of 2 x 4 x 4 tokens" in str(report)


# ----------------------------------------------------------------------------------------------------------------------
# Downloads


def test_a_download_that_does_not_load_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    content = {"/w.pth": b"<html><body>Quota exceeded</body></html>"}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content[self.path])

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/w.pth"
    whole = pathlib.Path(save(tmp_path, STATE)).read_bytes()
    for bad in (content["/w.pth"], whole[: len(whole) // 2]):
        content["/w.pth"] = bad
        message = error(url)
        assert "where it is removed: the next run downloads it again" in message and str(tmp_path / "hub") in message
    content["/w.pth"] = bad
    assert "is removed" in error(fetch(url))  # as the scripts read it
    content["/w.pth"] = whole
    check(url)
    server.shutdown()
    server.server_close()
    check(url)
