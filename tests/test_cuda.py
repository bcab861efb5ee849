"""What only a GPU can show: the same pictures and scores as on the CPU, no waits, runs that go on.

python -m pytest tests/test_cuda.py -s
"""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from background import Run
from helpers import run, write_video

import engine.loop
import run_dapt
import run_finetune
from datasets.augment import operations
from datasets.augment.device import DeviceAugment, DeviceLoader, NormalizeAndErase
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.augment.randaugment import DRIVING_OPS
from datasets.batches import BatchLoader
from datasets.live import LiveSource
from datasets.loader import Source, WindowDataset
from datasets.windows import index_clips
from engine.averages import Averages
from engine.guard import NonFinite
from engine.live import follow
from engine.stream import RiskStream
from models import create_model, model_defaults
from utils.flags import dapt_parser, finetune_parser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)
TINY = ["--model", "vit_tiny_patch16_64", "--data_set", "DoTA", "--num_workers", 2, "--print_freq", 10]
TRAIN = [*TINY, "--epochs", 2, "--warmup_epochs", 0, "--nb_samples_per_epoch", 320, "--total_batch_size", 16]
TRAIN += ["--sampling_rate_val", 4, "--lr", 4e-3]
DAPT = ["--model", "pretrain_videomae_tiny_patch16_64", "--data_set", "DoTA", "--sampling_rate", 1, "--epochs", 2]
DAPT += ["--warmup_epochs", 0, "--nb_samples_per_epoch", 320, "--total_batch_size", 16, "--num_workers", 2]
FAMILIES = ["vit_small_patch16_224", "mvd_vit_small_patch16_224", "umt_vit_base_patch16_224"]
FAMILIES += ["internvideo2_small_patch14_224"]


def words(flags, root, output, *more):
    return [str(word) for word in (*flags, "--data_path", root, "--output_dir", output, *more)]


def finetune(root, output, *more):
    return run("run_finetune.py", *words(TRAIN, root, output, *more))


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def scores(folder):
    with (Path(folder) / "predictions.csv").open() as f:
        return np.array([float(row["score"]) for row in csv.DictReader(f)])


def passed(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint whose head is large enough for scores to differ."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(create_model("vit_tiny_patch16_64", init_scale=30.0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(dota_root, tmp_path_factory):
    """A run of two epochs on the GPU with an average of the weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    print(passed(finetune(dota_root, folder, "--model_ema"))[-1500:])
    return folder


@pytest.mark.parametrize("name", DRIVING_OPS)
def test_an_operation_does_what_it_does_on_the_cpu(name, monkeypatch):
    levels = {"Rotate": 17.3, "ShearX": 0.17, "ShearY": -0.2, "Color": 1.6, "Contrast": 0.4, "Brightness": 1.5}
    level = (levels | {"Sharpness": 1.7}).get(name, 0.0)
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 72, 128, 3), dtype=np.uint8))
    monkeypatch.setattr(operations, "on_cpu", lambda clip: False)
    there = operations.operate(clip.to(GPU), name, level).cpu().int()
    difference = (there - operations.operate(clip, name, level).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01


def test_a_batch_is_augmented_as_on_the_cpu(dota_root):
    clips = run_finetune.build_clips("DoTA", dota_root, "train", None, None)
    index = index_clips(clips, num_frames=4, view_fps=10, stride=1)
    transform = FinetuneTransform(64, views=2, aa="rand-m6-n3-mstd0.5-inc1", interpolation="bicubic", here=False)
    keys = [[(0, 0, place, 5 * place) for place in range(start, start + 8)] for start in (0, 8, 16)]
    batches = []
    for device in (torch.device("cpu"), GPU):
        dataset = WindowDataset([Source(clips, index, transform)], seed=0, targets=True)
        loader = BatchLoader(dataset, keys, num_workers=2, pin_memory=device.type == "cuda")
        augmented = DeviceLoader(loader, device, DeviceAugment(64, "bicubic"))
        batches.append([batch["video"].cpu().int() for batch in augmented])
        loader.close()
    assert len(batches[0]) == 3
    for cpu, gpu in zip(*batches, strict=True):
        assert cpu.float().std() > 10 and (cpu - gpu).abs().float().mean() < 0.4  # OpenCV there, PyTorch here


def test_boxes_are_erased_where_they_are():
    model = create_model("vit_tiny_patch16_64").to(GPU)
    video = torch.randint(256, (2, 3, 4, 64, 64), dtype=torch.uint8)
    boxes, seeds = torch.tensor([[[8, 16, 20, 24]], [[0, 0, 0, 0]]]), torch.tensor([3, 4])
    plain = model.normalize(video.to(GPU))
    erased = NormalizeAndErase(model.normalize)(video.to(GPU), boxes, seeds)
    changed = (erased != plain).any(dim=(1, 2))
    assert changed[0, 8:28, 16:40].all() and changed.sum() == 20 * 24


@pytest.mark.parametrize("script", ["finetune", "dapt"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_no_step_waits(script, precision, dota_root, tmp_path, monkeypatch):
    """CUDA itself watches the steps and the augmentation; reports may wait."""

    def with_mode(function, mode):
        def call(*args, **kwargs):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    optimizer_step, calls = engine.loop._optimizer_step, []

    def step(*args):
        calls.append(1)
        return with_mode(optimizer_step, "error" if len(calls) > 2 else "default")(*args)

    monkeypatch.setattr(engine.loop, "_optimizer_step", step)
    monkeypatch.setattr(DeviceAugment, "__call__", with_mode(DeviceAugment.__call__, "error"))
    monkeypatch.setattr(Averages, "update", with_mode(Averages.update, "error"))
    monkeypatch.setattr(NonFinite, "note", with_mode(NonFinite.note, "error"))
    if script == "finetune":
        flags = words(TRAIN, dota_root, tmp_path / "run", "--model_ema", "--precision", precision, "--clip_grad", 1)
        run_finetune.main(finetune_parser("").parse_args(flags))
    else:
        flags = words(DAPT, dota_root, tmp_path / "run", "--precision", precision)
        run_dapt.main(dapt_parser("").parse_args(flags))
    assert len(calls) == 40


def test_a_run_goes_on_where_it_was_stopped(trained, dota_root, tmp_path):
    again = tmp_path / "again"
    passed(finetune(dota_root, again, "--model_ema", "--stop_epoch", 1))
    passed(finetune(dota_root, again, "--model_ema"))
    whole, parts = (
        torch.load(f / "checkpoint-last" / "state.pth", weights_only=True)["model"] for f in (trained, again)
    )
    largest = max((whole[k].float() - parts[k].float()).abs().max().item() for k in whole)
    print(f"a stopped and continued run: weights differ by up to {largest:.2g}")
    assert log(trained)[0]["train_loss"] == pytest.approx(log(again)[0]["train_loss"], rel=1e-2)
    assert log(trained)[1]["train_loss"] == pytest.approx(log(again)[1]["train_loss"], rel=1e-2)


@pytest.mark.parametrize(
    "more",
    [
        ["--precision", "fp16"],
        ["--model_ema", "--model_ema_force_cpu"],
        ["--compile", "--model_ema"],
        ["--use_checkpoint", "--num_sample", 2, "--update_freq", 2],
        ["--augment_on", "worker", "--opt", "sgd"],
        ["--no_flash_attn", "--opt", "lamb", "--clip_grad", 1],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_a_run_learns(more, trained, dota_root, tmp_path):
    out = passed(finetune(dota_root, tmp_path / "run", *more))
    print(out[-300:])
    assert log(tmp_path / "run")[-1]["train_loss"] < log(tmp_path / "run")[0]["train_loss"] + 0.05
    assert "Traceback" not in out


@pytest.mark.parametrize("more", [[], ["--compile"], ["--precision", "fp16", "--windows_per_read", 2]])
def test_pre_training_learns(more, dota_root, tmp_path):
    passed(run("run_dapt.py", *words(DAPT, dota_root, tmp_path / "run", *more), processes=1))  # NCCL
    first, last = log(tmp_path / "run")
    assert last["train_loss"] < first["train_loss"]


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_a_run_moves_between_devices(first, then, opt, dota_root, tmp_path):
    for device, stop in ((first, 1), (then, 2)):
        flags = ["--device", device, "--stop_epoch", stop, "--precision", "fp32", "--opt", opt, "--model_ema"]
        passed(finetune(dota_root, tmp_path / "run", *flags))
    assert len(log(tmp_path / "run")) == 2


def test_a_signal_stops_a_run_that_nccl_connects_and_it_goes_on(dota_root, tmp_path):
    flags = ["run_finetune.py", *TRAIN, "--data_path", dota_root, "--disable_eval_during_finetuning"]
    flags[flags.index("--epochs") + 1] = 40
    started = Run(flags, tmp_path / "run", processes=1)
    started.until_said("step 10/20")
    os.kill(started.process.pid, signal.SIGTERM)
    started.end()
    assert (tmp_path / "run" / "REQUEUE").exists(), started.output
    epochs = len(log(tmp_path / "run")) if (tmp_path / "run" / "log.txt").exists() else 0
    passed(run(*flags, "--output_dir", tmp_path / "run", "--stop_epoch", epochs + 1, processes=1))
    assert len(log(tmp_path / "run")) == epochs + 1


def test_scores_are_those_of_the_cpu(weights, dota_root, tmp_path):
    folders = {}
    for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")):
        folders[device, precision] = tmp_path / f"{device}_{precision}"
        flags = ["--eval", "--finetune", weights, "--device", device, "--precision", precision]
        passed(run("run_finetune.py", *words(TINY, dota_root, folders[device, precision], *flags)))
    cpu, gpu, bf16 = map(scores, folders.values())
    print(f"scores: fp32 differ by {np.abs(gpu - cpu).max():.2g}, bf16 by {np.abs(bf16 - cpu).max():.2g}")
    assert cpu.std() > 0.02 and np.abs(gpu - cpu).max() < 5e-3 and np.abs(bf16 - cpu).max() < 5e-2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stream_is_scored_as_on_the_cpu(precision, tmp_path):
    write_video(tmp_path / "a.mp4", frames=60, fps=30)
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", num_classes=2)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    scores = []
    for device in ("cpu", GPU):
        source = LiveSource(str(tmp_path / "a.mp4"))
        options = {"num_frames": 4, "view_fps": 5, "fps": source.fps, "device": device}
        options |= {"dtype": getattr(torch, precision)} if device == GPU else {}
        stream = RiskStream(model.to(device), lambda frame: EvalTransform(64)([frame])[0], **options)
        scores.append(np.array([result.score.score for result in follow(source, stream)]))
    assert np.abs(scores[0] - scores[1]).max() < (2e-3 if precision == "float32" else 0.1) and len(scores[1]) == 42


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_it_does_on_the_cpu(name):
    torch.manual_seed(0)
    model, video = create_model(name, init_scale=1.0).eval(), model_defaults(name)
    clip = torch.randint(256, (1, 3, video.num_frames, video.input_size, video.input_size), dtype=torch.uint8)
    with torch.no_grad():
        cpu = model(model.normalize(clip))
        gpu = model.to(GPU)(model.normalize(clip.to(GPU))).cpu()
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        model(model.normalize(clip.to(GPU))).sum().backward()
    assert (gpu - cpu).norm() < 1e-3 * cpu.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
