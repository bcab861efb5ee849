"""Damage to every kind of file that is read: a result, or one line that names the file; never a traceback or a hang.

Of states, weights and other files with sums the result is what it was, or the damage is found. More mutations than the
2,000 of all kinds together: FUZZ_CASES=20000 pytest tests/test_fuzz.py.
"""

import faulthandler
import json
import os
import pickle
import shutil
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import msgpack
import numpy as np
import pytest
import torch
from curves import RULE, bumpy
from helpers import golden, write_video
from mutations import BYTES, TEXT, mutated
from PIL import Image
from safetensors.torch import save_file

from datasets import DataError, VideoScan, build_clips, open_clip
from datasets.clips import Clip, ClipTable
from datasets.faults import read_bad_clips
from datasets.scan import probe
from datasets.tools.pack import pack
from datasets.tools.pack_clip import Settings
from datasets.video import Video
from datasets.windows import index_clips
from engine.checkpoint import Progress, load_last, save_weights
from engine.curve import Gap
from engine.evaluate import EvaluationError, Predictions
from engine.outputs import WantedPoint, begin_evaluation, finish_evaluation, keep_scores, unfinished_evaluation
from engine.prediction import VideoResult, load_result, save_result
from engine.report import Options, ScoresError, write_report
from models import create_model, load
from models.export import export
from models.registry import Dropout, VideoInput
from models.vit import Size, VideoViT
from models.weights import CheckpointError, load_pretrained, read_hints
from other_models.ViViT.ckpt_vivit import read_source
from utils.cli import ConfigError
from utils.logging import drop_records_from
from utils.record import differing, read_run_record, write_run_record

CASES = int(os.environ.get("FUZZ_CASES", 2000))
LIMIT = 20.0  # seconds for a case; a hang in native code ends the tests after six times that
ERRORS = (DataError, ConfigError, CheckpointError, EvaluationError, ScoresError)


@dataclass
class Kind:
    """A kind of file: where it is, what reads it, and whether damage must be found wherever it changes the result.

    share: of all mutations. names: what the message names; the file where it is empty.
    """

    path: Path
    read: object
    mutations: tuple = BYTES
    exact: bool = False
    share: int = 1
    names: str = ""


def plain(value):
    """Content in a form that compares by value, bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    return [plain(item) for item in value] if isinstance(value, list | tuple) else repr(value)


# ----------------------------------------------------------------------------------------------------------------------
# What reads them


def use(table):
    """What a run makes of clips before it reads frames, and one of their frames."""
    index_clips(table, num_frames=4, view_fps=5, stride=1)
    for clip in table:
        if clip.labels is not None:
            clip.ttc  # noqa: B018
        str((clip.category, clip.ego, clip.night)).encode()
    known = [
        (c.name, c.num_frames, c.fps, c.category, c.ego, c.labels is not None and c.labels.tolist()) for c in table
    ]
    return known, read_frames(table[0], [0])


def read_frames(clip, frames):
    with open_clip(clip) as reader:
        reader.mismatch()
        return reader.read(frames)


def read_video(path):
    """Frames at both ends and the middle, once it has passed the scan."""
    info = probe(str(path))
    if info.problem:
        raise DataError(f"{path}: {info.problem}")
    video = Video(str(path))
    try:
        video.read([0, len(video) // 2, len(video) - 1])
    finally:
        video.close()


# ----------------------------------------------------------------------------------------------------------------------
# The files


def make_annotations(root, dota_root):
    """Kinds of the layouts of data sets, their splits and lists."""
    dota = root / "dota"
    shutil.copytree(dota_root, dota)
    (dota / "dataset" / "val_split.txt").write_text("syntheticva_000001\nsyntheticva_000002\n")
    folder, clip = dota / "dataset", "syntheticva_000001"

    def read_dota(_):
        return use(build_clips("DoTA", str(dota), "val"))

    yield "dota annotation", Kind(folder / "annotations" / f"{clip}.json", read_dota, TEXT, share=2)
    yield "dota metadata", Kind(folder / "metadata_val.json", read_dota, TEXT)
    yield "dota split", Kind(folder / "val_split.txt", read_dota, TEXT, names=str(dota))
    dada = root / "dada"
    for part in ("annotation", "DADA2K_my_split", "frames/1/001/images", "frames/2/003/images"):
        (dada / part).mkdir(parents=True)
    header = "video,type,weather,light,abnormal start frame,accident frame,abnormal end frame,total frames"
    sheet = f"{header}\n1,1,1,1,8,12,20,30\n3,2,1,2,-1,-1,-1,25\n"
    (dada / "annotation" / "full_anno.csv").write_text(sheet)
    (dada / "DADA2K_my_split" / "validation.txt").write_text("1/001\n2/003\n")
    picture = np.zeros((36, 64, 3), np.uint8)
    for i in range(1, 31):
        Image.fromarray(picture + i).save(dada / "frames/1/001/images" / f"{i:04d}.png")

    def read_dada(_):
        return use(build_clips("DADA2K", str(dada), "val"))

    yield "dada sheet", Kind(dada / "annotation" / "full_anno.csv", read_dada, TEXT)
    yield "dada split", Kind(dada / "DADA2K_my_split" / "validation.txt", read_dada, TEXT, names=str(dada))
    own = root / "own"
    own.mkdir()
    write_video(own / "a.mp4", frames=30, fps=10)
    shutil.copytree(dada / "frames/1/001/images", own / "b")
    rows = "path,clip,fps,start_frame,end_frame,ego\na.mp4,one,,5,9,1\na.mp4,one,,15,19,\nb,two,10.0,3,4,0\n"
    (own / "val.csv").write_text(rows)
    scan = VideoScan(root / "own.json", workers=1)
    yield (
        "csv",
        Kind(own / "val.csv", lambda _: use(build_clips("csv", str(own), "val", scan)), TEXT, share=2, names=" "),
    )
    kinetics = root / "kinetics"
    (kinetics / "annotations").mkdir(parents=True)
    (kinetics / "val" / "a b").mkdir(parents=True)
    shutil.copy(own / "a.mp4", kinetics / "val" / "a b" / "x_000001_000011.mp4")
    path = kinetics / "annotations" / "val.csv"
    path.write_text('label,youtube_id,time_start,time_end,split\n"a b",x,1,11,val\n')
    yield "kinetics", Kind(path, lambda _: use(build_clips("Kinetics", str(kinetics), "val", scan)), TEXT, names=" ")
    (own / "list.txt").write_text("a.mp4\nb.mp4\n")
    yield (
        "video list",
        Kind(own / "list.txt", lambda path: use(build_clips("videos", str(path), "all", scan)), TEXT, names=" "),
    )
    cache = root / "cache" / "videos.json"
    build_clips("videos", str(own), "all", VideoScan(cache, workers=1))

    def read_cache(path):
        return use(build_clips("videos", str(own), "all", VideoScan(path, workers=1)))

    yield "scan", Kind(cache, read_cache, TEXT, exact=True, share=2, names=" ")
    (root / "bad_clips.txt").write_text("one\tunreadable: x\ntwo\n")
    yield "bad clips", Kind(root / "bad_clips.txt", lambda path: read_bad_clips([path]), TEXT)


def make_packs(root):
    """Kinds of the files of a pack."""
    out = root / "pack"
    pack("DoTA", str(root / "dota"), out, splits=["val"], settings=Settings(32, 10, 92))
    clip = build_clips("DoTA", str(out), "val")[0]

    def read(_):
        return use(build_clips("DoTA", str(out), "val"))

    yield "pack.json", Kind(out / "pack.json", read, TEXT, exact=True, share=3, names=" ")
    yield "clips.jsonl", Kind(out / "clips.jsonl", read, TEXT, exact=True, share=3, names=" ")
    frames = clip.stored_frames.tolist()
    yield "pack frames", Kind(Path(f"{clip.source}.zip"), lambda _: read_frames(clip, frames), exact=True)


def make_frames(root):
    """Kinds of zips, folders and videos."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)) for _ in range(4)]
    for suffix in (".jpg", ".png"):
        folder = root / f"folder{suffix}"
        folder.mkdir()
        for i, image in enumerate(images):
            image.save(folder / f"{i:06d}{suffix}")
        clip = Clip("a", str(folder), 4, 10.0, f"{{:06d}}{suffix}")
        yield f"folder of {suffix}", Kind(folder / f"000001{suffix}", lambda _, clip=clip: read_frames(clip, range(4)))
        for what, method in (("zip", zipfile.ZIP_STORED), ("deflated zip", zipfile.ZIP_DEFLATED)):
            path = root / f"{what}{suffix}.zip"
            with zipfile.ZipFile(path, "w", method) as z:
                for picture in sorted(folder.iterdir()):
                    z.write(picture, picture.name)
            zipped = replace(clip, source=str(path).removesuffix(".zip"))
            yield f"{what} of {suffix}", Kind(path, lambda _, clip=zipped: read_frames(clip, range(4)), exact=True)
    for suffix, codec in ((".mp4", "libx264"), (".mkv", "libx264"), (".ts", "libx264"), (".avi", "mpeg4")):
        path = root / f"video{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(20):
                picture = np.full((48, 64, 3), 10 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())
        yield suffix, Kind(path, read_video, share=3 if suffix == ".mp4" else 1)


def make_run(root):
    """Kinds of the files of a run but for its weights."""
    folder = root / "run"
    folder.mkdir()
    write_run_record(folder / "args.json", {"lr": 1e-3, "data_set": ["a", "b"], "opt_betas": [0.9, 0.999]}, 2)
    record = {"lr": 1e-3, "data_set": ["a", "b"], "opt_betas": [0.9, 0.999]}
    yield (
        "args.json",
        Kind(
            folder / "args.json",
            lambda path: differing(read_run_record(path), record, set()),
            TEXT,
            exact=True,
            share=2,
        ),
    )
    for name, step in (("log.txt", {}), ("nonfinite.jsonl", {"step": 3})):
        lines = [json.dumps({"epoch": epoch, **step, "train_loss": 0.5 / (epoch + 1)}) for epoch in range(5)]
        (folder / name).write_text("\n".join(lines) + "\n")

        def rewind(path):
            drop_records_from(path, 3)
            assert all(json.loads(line)["epoch"] < 3 for line in path.read_bytes().splitlines())

        yield name, Kind(folder / name, rewind, TEXT, share=2)


def make_weights(root):
    """Kinds of states and weights."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", init_scale=1.0)
    weights = model.state_dict()
    folder = root / "run" / "checkpoint-last"
    folder.mkdir()
    state = {"model": weights, "optimizer": {"state": {0: torch.rand(9)}}, "scaler": None, "model_ema": None}
    torch.save(state | asdict(Progress()) | {"ranks": [{"rng": 1}], "args": {"lr": 0.1}}, folder / "state.pth")
    yield "state", Kind(folder / "state.pth", lambda path: load_last(path.parent), exact=True, share=10)

    def read_own(path):
        filled, about = load(str(path))
        return [filled.state_dict(), about]

    save_weights(root / "own.pth", model, epoch=3)
    yield "weights", Kind(root / "own.pth", read_own, exact=True, share=6)

    def read_other(path):
        load_pretrained(model, str(path))

    torch.save({"model": weights, "epoch": 3}, root / "legacy.pth", _use_new_zipfile_serialization=False)
    yield "legacy weights", Kind(root / "legacy.pth", read_other, share=2)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, root / "x.safetensors")
    yield "safetensors", Kind(root / "x.safetensors", read_other, share=2)
    array = msgpack.ExtType(1, msgpack.packb(((2, 3), "float32", np.ones((2, 3), np.float32).tobytes())))
    kernel = msgpack.ExtType(1, msgpack.packb(((1, 1, 1, 2, 3), "float32", np.ones(6, np.float32).tobytes())))
    leaves = {
        "embedding": {"kernel": kernel, "bias": array},
        "Transformer": {"posembed_input": {"pos_embedding": array}},
    }
    step = msgpack.ExtType(3, msgpack.packb(((), "int32", b"\1\0\0\0")))
    (root / "flax").write_bytes(msgpack.packb({"optimizer": {"target": leaves | {"cls": array}}, "step": step}))
    yield "flax", Kind(root / "flax", lambda path: read_source(str(path)), share=2)


def make_accidents(root):
    """Kinds of the layouts that speak of seconds, of a pickle of labels, and of a list of one's own."""
    root, scan = root / "accidents", VideoScan(root / "accidents.json", workers=1)
    for place in ("nexar/train/positive/00001", "nexar/train/negative/00002", "ccd/videos/Crash-1500/000001",
                  "dad/videos/testing/negative/000001", "dad/videos/testing/positive/000456", "own/a"):  # fmt: skip
        write_video(root / f"{place}.mp4", frames=50 if "ccd" in place else 100, fps=10)

    def reads(name, folder, split, **options):
        return lambda _: use(build_clips(name, str(root / folder), split, scan, **options))

    header = "file_name,time_of_event,time_of_alert,light_conditions,weather,scene,time_to_accident\n"
    nexar = root / "nexar" / "train"
    (nexar / "negative" / "metadata.csv").write_text(f"{header}00002.mp4,,,Dark,,Urban,\n")
    (nexar / "positive" / "metadata.csv").write_text(f"{header}00001.mp4,5.25,4.5,Normal,Rain,Urban,\n")
    yield "nexar", Kind(nexar / "positive" / "metadata.csv", reads("Nexar", "nexar", "train"), TEXT, names=" ")
    ccd = root / "ccd" / "videos" / "Crash-1500.txt"
    ccd.write_text(f"000001,[{', '.join('0' * 40 + '1' * 10)}],000285,7,Night,Rainy,No\n")
    yield "ccd", Kind(ccd, reads("CCD", "ccd", "all"), TEXT, names=" ")
    consensus = root / "dad" / "consensus" / "dad_test_concensus.csv"
    consensus.parent.mkdir()
    consensus.write_text(
        "id,Event-type,Nexar-vehicle-involved,min_support,Time-of-alert,Time-of-collision,article_category\n"
        "000456.mp4,Collision,no,9,4.6,5.2,pos-ego\n"
    )
    yield "consensus", Kind(consensus, reads("DAD", "dad", "val", labels="consensus"), TEXT)
    a3d = root / "a3d" / "A3D_labels.pkl"
    pictures = a3d.parent / "frames" / "x_000001" / "images"
    pictures.mkdir(parents=True)
    for i in range(1, 31):
        Image.fromarray(np.full((36, 64, 3), i, np.uint8)).save(pictures / f"{i:06d}.jpg")
    entry = {"video_name": "x", "clip_start": "000001", "clip_end": "000030", "ego_envolve": True}
    a3d.write_bytes(pickle.dumps({"x_000001": entry | {"target": np.arange(30) // 15}}, protocol=2))
    yield "a3d", Kind(a3d, reads("A3D", "a3d", "all"), names=str(a3d.parent))
    rows = "path;clip;clip_start;clip_end;event_time;alert_time;label;source;weather\n"
    rows += "a.mp4;one;0;6.5;5,5;4.25;1;s;rain\na.mp4;two;7;;;;0;s;\n"
    (root / "own" / "all.csv").write_text(rows)
    yield "csv of seconds", Kind(root / "own" / "all.csv", reads("csv", "own", "all"), TEXT, share=2, names=" ")
    (root / "own" / "splits").mkdir()
    (root / "own" / "splits" / "mine.txt").write_text("# clips of split all; by source, val 0.2, seed 0\none\ntwo\n")
    yield "split list", Kind(root / "own" / "splits" / "mine.txt", reads("csv", "own", "mine"), TEXT, names=" ")


def make_scores(root):
    """Kinds of what evaluations and predictions leave, from which they go on and reports are made."""
    scored, half, video = (root / "scores" / name for name in ("scored", "half", "video"))
    labels = np.repeat([0, 1, 0], 10).astype(np.uint8)
    clips = ClipTable("DoTA", "val", [Clip(f"c{i}", "", 30, 10.0, labels=labels * (i > 0)) for i in range(3)])
    clip, frame = np.repeat(np.arange(3), 15), np.tile(np.arange(15, 30), 3)
    logits = np.random.default_rng(0).standard_normal((45, 2)).astype(np.float32)
    label = np.concatenate([c.labels[15:] for c in clips]).astype(np.int64)
    about = {"coverage": "3 of 3 clips", "data_set": "DoTA", "split": "val"}
    for folder in (scored, half):
        record = begin_evaluation(folder, {"seed": 1, "data_set": "DoTA"}, None, 1)
        keep_scores(folder, Predictions(clip, frame, label, logits, time=frame / 10), clips, about, record)

    def read_half(_):
        known = unfinished_evaluation(half, {"seed": 1, "data_set": "DoTA"}, set(), None)
        made = finish_evaluation(half, known, WantedPoint("none", None, RULE, None, as_trained=True))
        (half / "metrics.json").unlink()
        return made

    def report_on(path):
        text, _ = write_report({"one": [path]}, root / "scores", Options(replicates=100))
        return text

    yield "scores of a report", Kind(scored / "predictions.csv", report_on, TEXT, share=2)
    yield "scores", Kind(half / "predictions.csv", read_half, TEXT, exact=True)
    yield "eval_args.json", Kind(half / "eval_args.json", read_half, TEXT, names=str(half))
    curve = bumpy(200, step=3, gaps=(Gap(4.0, 4.8, "damaged"),))
    save_result(video, VideoResult("v", curve), {"source": "v.mp4"})
    expected = curve.events()

    def read_video_scores(_):
        """What is damaged is as if it were not there."""
        result = load_result(video, "v", {"source": "v.mp4"}, curve.rule)
        return True if result is None else result.curve.events() == expected and result.curve.gaps == curve.gaps

    yield "events.json", Kind(video / "events.json", read_video_scores, TEXT, exact=True)
    yield "scores.csv", Kind(video / "scores.csv", read_video_scores, TEXT, exact=True)


def make_folders(root):
    """Kinds of a folder of transformers, and of a program that was exported."""
    fixture = next(f for f in golden("models_hf")["fixtures"] if f["name"] == "videomae_classification")
    folder, state = root / "hf", {key: torch.ones(shape) for key, shape in fixture["keys"]}
    folder.mkdir()
    parts = {f"model-{number}.safetensors": sorted(state)[number::2] for number in range(2)}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / name)
    places = {key: name for name, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(fixture["config.json"])
    processor = {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.2] * 3, "offset": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))

    def read_folder(_):
        model = VideoViT(Size(96, 2, 3), "sinusoid", VideoInput(4, 64), Dropout(), num_classes=3)
        load_pretrained(model, str(folder))
        return read_hints(str(folder))

    for name in ("config.json", "model.safetensors.index.json", "preprocessor_config.json"):
        yield name, Kind(folder / name, read_folder, TEXT, names=str(folder))
    export(str(root / "own.pth"), "torch_export", str(root / "own.pt2"))
    yield "program", Kind(root / "own.pt2", lambda path: load(str(path))[0].weights(), exact=True)


@pytest.fixture(scope="module")
def kinds(dota_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    made = (
        make_annotations(root, dota_root),
        make_accidents(root),
        make_packs(root),
        make_frames(root),
        make_run(root),
        make_weights(root),
        make_scores(root),
        make_folders(root),
    )
    return {name: kind for group in made for name, kind in group}


# ----------------------------------------------------------------------------------------------------------------------

NAMES = (
    *("dota annotation", "dota metadata", "dota split", "dada sheet", "dada split", "csv", "kinetics", "video list"),
    *("nexar", "ccd", "consensus", "a3d", "csv of seconds", "split list"),
    *("scan", "bad clips", "pack.json", "clips.jsonl", "pack frames", ".mp4", ".mkv", ".ts", ".avi"),
    *(f"{what} of {suffix}" for what in ("folder", "zip", "deflated zip") for suffix in (".jpg", ".png")),
    *("scores of a report", "scores", "eval_args.json", "events.json", "scores.csv", "program"),
    *("config.json", "model.safetensors.index.json", "preprocessor_config.json"),
    *("args.json", "log.txt", "nonfinite.jsonl", "state", "weights", "legacy weights", "safetensors", "flax"),
)


def outcome(kind):
    """("result", content) or ("error", message) of reading a file within the limit."""
    faulthandler.dump_traceback_later(6 * LIMIT, exit=True)
    started = time.monotonic()
    try:
        result = "result", plain(kind.read(kind.path))
    except ERRORS as e:
        result = "error", str(e)
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - started < LIMIT
    return result


def fault(kind, damaged, whole, expected):
    """What is wrong with what becomes of a damaged file; "" if nothing."""
    kind.path.write_bytes(damaged)
    try:
        what, content = outcome(kind)
    except Exception:
        return traceback.format_exc(limit=-4)
    if what == "error":
        is_right = "\n" not in content and (kind.names or kind.path.name) in content and content.encode()
        return "" if is_right else f"not one line that names the file: {content!r}"
    with_sums = damaged.count(b'"crc32"') >= whole.count(b'"crc32"')  # as older versions wrote it, it cannot be told
    return "not found" if kind.exact and with_sums and content != expected else ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_damage_gives_a_result_or_one_line_that_names_the_file(kinds, name):
    assert set(kinds) == set(NAMES)
    kind = kinds[name]
    whole, cases = kind.path.read_bytes(), -(-CASES * kind.share // sum(k.share for k in kinds.values()))
    what, expected = outcome(kind)
    assert what == "result", expected
    try:
        damaged = [mutated(whole, f"{name} {case}", kind.mutations) for case in range(cases)]
        faults = {case: fault(kind, data, whole, expected) for case, data in enumerate(damaged)}
    finally:
        kind.path.write_bytes(whole)
    assert not (faults := {case: why for case, why in faults.items() if why}), "\n".join(
        f"{name} {case}: {why}" for case, why in list(faults.items())[:5]
    )
