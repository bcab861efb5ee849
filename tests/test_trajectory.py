"""24 optimizer steps of the published code's own training scripts, and ours: the same weights and inputs, the same end.

tests/golden/trajectory.json says under "about" how the numbers were made; its limits are those of float32 on a CPU.
"""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ALONE, NORM_WEIGHT, golden, session

import run_dapt
import run_finetune
from datasets.loader import EpochSampler
from engine.checkpoint import Progress
from engine.dapt import DaptObjective
from engine.finetune import FinetuneObjective
from engine.loop import Reporting, train_one_epoch
from engine.losses import LOSSES
from utils.resolve import resolve_runtime

GOLDEN = golden("trajectory")
CPU = ALONE.device
SETTINGS = ("--device", "cpu", "--precision", "fp32", "--output_dir", "unused", "--data_path")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads would cost more than they bring: the models are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pcg(seed):
    return np.random.Generator(np.random.PCG64(seed))


def weights(key, shape):
    values = pcg(zlib.crc32(key.encode())).standard_normal(shape) * 0.05
    return torch.from_numpy((values + bool(NORM_WEIGHT.search(key))).astype(np.float32))


def videos(indices, frames):
    """(len(indices), 3, frames, 64, 64), normalised already."""

    def one(rng):
        pixels = rng.standard_normal((3, frames, 64, 64)).astype(np.float32)
        return pixels + rng.standard_normal((3, frames, 1, 1)).astype(np.float32)

    return torch.from_numpy(np.stack([one(pcg(1000 + index)) for index in indices]))


def masks(indices):
    """(len(indices), 128): tubes over 12 of the 16 cubes of a slot."""
    frames = np.zeros((len(indices), 16), bool)
    for frame, index in zip(frames, indices, strict=True):
        frame[pcg(5000 + index).permutation(16)[:12]] = True
    return torch.from_numpy(np.tile(frames, (1, 8)))


def finetuning(case, init):
    args = run_finetune.finetune_parser("").parse_args(
        ["--model", "vit_tiny_patch16_64", "--finetune", str(init), *SETTINGS, "unused", *case["flags"]]
    )
    resolve_runtime(args, cuda=False)
    run_finetune.resolve(args, 1)
    model = run_finetune.build_model(args, ALONE)
    if args.freeze_layers is not None:
        model.freeze_blocks(args.freeze_layers)

    def batch(indices):
        label = torch.tensor([index * 7 % 5 % 2 for index in indices])
        targets = {"label": label, "soft_label": label.float(), "ttc": torch.zeros(len(indices))}
        return {"video": videos(indices, 4), "boxes": None, "seed": None, "weight": 1.0, **targets}

    return SimpleNamespace(
        args=args,
        script=run_finetune,
        model=model,
        objective=FinetuneObjective(LOSSES[args.loss], lambda video, boxes, seeds: video),
        batch=batch,
        batch_sizes=[args.batch_size],
        answer=lambda: model(videos(range(900, 903), 4)),
        key="logits",
    )


def dapt(case, init):
    sets = case["data_sets"]
    args = run_dapt.dapt_parser("").parse_args(
        ["--model", "pretrain_videomae_tiny_patch16_64", "--num_frames", "16", "--decoder_depth", "2"]
        + ["--from_ckpt", str(init), "--data_set", *sets, *SETTINGS, *["unused"] * len(sets), *case["flags"]]
    )
    resolve_runtime(args, cuda=False)
    run_dapt.resolve(args, 1)
    model = run_dapt.build_model(args, ALONE, None)
    model.normalize = lambda video: video
    probe, rows, columns = (900, 901), [0, 31, 95], [0, 1, 700, 1535]
    return SimpleNamespace(
        args=args,
        script=run_dapt,
        model=model,
        objective=DaptObjective(model),
        batch=lambda indices: {"video": videos(indices, 16), "mask": masks(indices), "weight": 1.0},
        batch_sizes=args.batch_size,
        answer=lambda: model.predict(videos(probe, 16), masks(probe))[:, rows][:, :, columns].flatten(1),
        key="out",
    )


def summary(key, parameter):
    """What the file keeps of a parameter: mean, standard deviation, four elements."""
    values = parameter.detach().double().numpy().ravel()
    places = pcg(zlib.crc32(key.encode()) ^ 1).integers(0, len(values), size=4)
    return [values.mean(), values.std(), *values[places]]


def check_start(case, run, optimization, sampler):
    """Compare the weights, the parameter groups, and the schedules with the published ones."""
    named = dict(run.model.named_parameters())
    assert named.keys() == {key for key, _ in case["shapes"]}
    assert all(torch.equal(named[key], weights(key, shape)) for key, shape in case["shapes"])
    names = {id(p): key for key, p in named.items()}
    groups = {
        names[id(p)]: (group["lr_scale"], float(group["weight_decay"] > 0))
        for group in optimization.optimizer.param_groups
        for p in group["params"]
    }
    assert groups == {key: (pytest.approx(scale, rel=1e-12), decayed) for key, scale, decayed in case["groups"]}
    assert sampler.steps_per_epoch == case["steps_per_epoch"]
    steps = range(len(case["lr_table"]))
    assert [optimization.lr(i) for i in steps] == pytest.approx(case["lr_table"], abs=1e-9 * max(case["lr_table"]))
    assert [optimization.weight_decay(i) for i in steps] == pytest.approx(case["wd_table"], abs=1e-9)


@pytest.mark.parametrize(
    ("build", "name"),
    [*((finetuning, name) for name in GOLDEN["finetune"]), *((dapt, name) for name in GOLDEN["dapt"])],
)
def test_training_ends_where_the_published_code_s_does(build, name, tmp_path):
    kind = "dapt" if build is dapt else "finetune"
    case, limits = GOLDEN[kind][name], GOLDEN["limits"][kind]
    init = tmp_path / "init.pth"
    torch.save({"model": {key: weights(key, shape) for key, shape in case["shapes"]}}, init)
    run = build(case, init)
    sampler = EpochSampler(case["samples"], batch_sizes=run.batch_sizes, accumulate=run.args.update_freq)
    optimization = run.script.optimization_of(run.args, run.model, sampler.steps_per_epoch)
    check_start(case, run, optimization, sampler)
    progress = Progress(steps_per_epoch=sampler.steps_per_epoch)
    loop, rows, order = session(optimization, progress), [], iter(case["order"])
    loop.tensorboard = SimpleNamespace(scalars=lambda group, row, step: rows.append(row) if group == "train" else None)
    compared = 0
    for epoch in range(run.args.epochs):
        progress.epoch, progress.step = epoch, 0
        batches = [run.batch(next(order)) for _ in range(sampler.steps_per_epoch * run.args.update_freq)]
        train_one_epoch(run.model, batches, run.objective, loop, Reporting(clips_per_step=1, log_every=1))
        if expected := case["after"].get(str(progress.steps_done)):
            for key, parameter in run.model.named_parameters():
                assert summary(key, parameter) == pytest.approx(expected["params"][key], abs=limits["params"]), key
            run.model.eval()
            with torch.no_grad():
                np.testing.assert_allclose(run.answer(), expected[run.key], rtol=0, atol=limits[run.key])
            compared += 1
    assert compared == len(case["after"]) == 2 and progress.steps_done == len(rows) == 24

    losses, norms = [row["loss"] for row in rows], [row["grad_norm"] for row in rows]
    per_step = lambda values: np.reshape(values, (24, -1)).mean(axis=1)  # noqa: E731
    np.testing.assert_allclose(losses, per_step(case["loss"]), rtol=0, atol=limits["loss"])
    np.testing.assert_allclose(norms, case["grad_norm"], rtol=limits["grad_norm"])
    if kind == "finetune":
        accuracy = [row["accuracy"] for row in rows]
        np.testing.assert_allclose(accuracy, per_step(case["accuracy"]), rtol=0, atol=limits["accuracy"])
