import json
import math
import os
import random
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALONE

from engine import checkpoint
from engine.averages import WeightAverage
from engine.checkpoint import Progress, RunState, find_last, load_last, restore, save_weights
from engine.guard import step_if_finite
from engine.optim import FUSED, Optimization, build_optimizer, parameter_groups
from engine.resume import find_resume
from models import create_model
from models.weights import CheckpointError, load_pretrained
from utils.cli import ConfigError
from utils.distributed import Process
from utils.record import Changeable


def optimization(model, **kwargs):
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.6)
    optimizer = build_optimizer(groups, name="adamw", lr=1e-3, eps=1e-8, betas=(0.9, 0.999))
    return Optimization(optimizer, lr=lambda s: 1e-3, weight_decay=lambda s: 0.05, **kwargs)


def trained(seed=0):
    """A tiny model one step into training, and its optimization."""
    torch.manual_seed(seed)
    model = create_model("vit_tiny_patch16_64", init_scale=1.0)
    state = optimization(model, ema=WeightAverage(model, 0.5))
    model(torch.randn(1, 3, 4, 64, 64)).square().sum().backward()
    state.optimizer.step()
    state.ema.update(model)
    return model, state


def save_last(folder, model, optimization, progress, **options):
    checkpoint.save_last(folder, RunState(model, optimization, progress, **options))


def restored(saved, model, optimization, progress, process=ALONE):
    restore(saved, RunState(model, optimization, progress), process)


def draws():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist()


def test_everything_comes_back(tmp_path):
    model, state = trained()
    np.random.randn()  # leaves a cached second normal, which is part of the state
    save_last(
        tmp_path,
        model,
        state,
        Progress(3, 7, {"auroc": 0.9, "auc_mcc": -math.inf}, {"loss": 0.5}),
        record={"lr": 1},
    )
    expected = draws()

    other, fresh = trained(seed=1)
    draws()
    loaded, progress = load_last(find_last(tmp_path)), Progress()
    restored(loaded, other, fresh, progress)
    assert draws() == expected
    assert progress == Progress(3, 7, {"auroc": 0.9, "auc_mcc": -math.inf}, {"loss": 0.5})
    assert loaded["args"] == {"lr": 1}
    for a, b in (
        (model.state_dict(), other.state_dict()),
        (state.ema.module.state_dict(), fresh.ema.module.state_dict()),
    ):
        assert all(torch.equal(a[k], b[k]) for k in a)
    old, new = state.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert old["param_groups"] == new["param_groups"]
    for key, moments in old["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(new["state"][key][k])) for k, v in moments.items())


def test_a_state_is_mapped_and_nothing_stays_in_its_file(tmp_path):
    """Another save may replace the file, and ranks share what they read of it."""
    model, state = trained()
    state.optimizer.param_groups[0]["fused"] = None  # as an older version, or another device, saves it
    save_last(tmp_path, model, state, Progress(1), record={"padding": "x"})
    path = find_last(tmp_path) / "state.pth"
    loaded = load_last(path.parent)
    with open("/proc/self/smaps") as f:
        assert any(str(path) in line for line in f)
    other, fresh = trained(seed=1)
    restored(loaded, other, fresh, Progress())
    path.write_bytes(bytes(path.stat().st_size))
    assert all(group["fused"] for group in fresh.optimizer.param_groups)
    old, new = state.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"]
    assert all(torch.equal(value, new[i][k]) for i, values in old.items() for k, value in values.items())
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert all(map(torch.equal, state.ema.module.parameters(), fresh.ema.module.parameters()))


def test_what_cuda_draws_is_kept_only_where_this_process_uses_it(tmp_path, monkeypatch):
    model, state = trained()
    for name, answer in (("is_available", True), ("is_initialized", False)):  # a GPU, and a run on the CPU
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    save_last(tmp_path, model, state, Progress(1))
    assert load_last(find_last(tmp_path))["ranks"][0]["rng"]["cuda"] is None


@pytest.mark.parametrize("change", [{"num_windows": [7, 3]}, {"steps_per_epoch": 6}])
def test_a_state_of_other_data_is_refused(tmp_path, change):
    model, state = trained()
    now = {"num_windows": [8, 3], "steps_per_epoch": 5}
    save_last(tmp_path, model, state, Progress(**now | change))
    ((name, before),) = change.items()
    match = re.escape(f"had {before} ") + ".*" + re.escape(f", now there are {now[name]}: the data has changed")
    with pytest.raises(ConfigError, match=match):
        restored(load_last(find_last(tmp_path)), model, state, Progress(**now))


class Killed(BaseException):
    pass


def test_a_save_cut_short_anywhere_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    model, state = trained()
    instants = 0
    while True:
        folder = tmp_path / str(instants)
        save_last(folder, model, state, Progress(epoch=1))
        calls = 0

        def guarded(function, limit=instants):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "rename", guarded(os.rename))
            patch.setattr(checkpoint.shutil, "rmtree", guarded(shutil.rmtree))
            patch.setattr(checkpoint, "sync", guarded(checkpoint.sync))
            patch.setattr(checkpoint.torch, "save", guarded(torch.save))
            try:
                save_last(folder, model, state, Progress(epoch=2))
                finished = True
            except Killed:
                finished = False
        assert load_last(find_last(folder))["epoch"] in ((2,) if finished else (1, 2))
        save_last(folder, model, state, Progress(epoch=3))  # and what is left over is in nobody's way
        assert load_last(find_last(folder))["epoch"] == 3 and os.listdir(folder) == ["checkpoint-last"]
        if finished:
            break
        instants += 1
    assert instants >= 8


def test_nothing_to_resume(tmp_path):
    assert find_last(tmp_path) is None and find_last(tmp_path / "absent") is None
    (tmp_path / "checkpoint-last.new").mkdir()
    (tmp_path / "checkpoint-last.new" / "state.pth").write_bytes(b"half")
    assert find_last(tmp_path) is None


def test_weights_files_are_whole_or_untouched(tmp_path, monkeypatch):
    model, _ = trained()
    path = tmp_path / "checkpoint-best_auroc.pth"
    save_weights(path, model)
    before = path.read_bytes()

    def fail(state, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(checkpoint.CheckpointWriteError, match="No space"):
        save_weights(path, model)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_weights_files_hold_published_keys_and_their_spec_and_load_anywhere(tmp_path):
    model, _ = trained()
    save_weights(tmp_path / "weights.pth", model, data_set="DoTA", epoch=3)
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert content.keys() == {"model", "spec"} and content["model"].keys() == model.state_dict().keys()
    assert content["spec"] == model.spec | {"data_set": "DoTA", "epoch": 3}
    assert json.loads(json.dumps(content["spec"])) == content["spec"], "plain types alone"
    report = load_pretrained(create_model("vit_tiny_patch16_64"), str(tmp_path / "weights.pth"))
    assert not report.missing and not report.ignored


def test_each_rank_gets_its_own_random_state_and_the_scaler_its_scale(tmp_path, monkeypatch):
    model, state = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    state = optimization(model, scaler=scaler)
    scaler.scale(torch.ones(1))  # it reads its scale from now on

    def two_ranks(first):
        torch.manual_seed(5)
        return [first, {**first, "rng": checkpoint._rng_state()}]

    monkeypatch.setattr(checkpoint, "gather", two_ranks)
    save_last(tmp_path, model, state, Progress())
    torch.manual_seed(5)
    expected = torch.rand(3)
    other = optimization(model, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    restored(load_last(find_last(tmp_path)), model, other, Progress(), Process(1, 1, 2, torch.device("cpu")))
    assert torch.equal(torch.rand(3), expected) and other.scaler.get_scale() == 512.0


def record(**changes):
    return {"lr": 1.0, "seed": 0} | changes


def find(folder, **kwargs):
    options = {"auto_resume": True, "resume": None, "record": record(), "changeable": Changeable()} | kwargs
    return find_resume(folder, **options)


def test_best_values_stay_with_their_files(tmp_path):
    model, state = trained()
    save_last(tmp_path / "a", model, state, Progress(2, 0, {"auroc": 0.9}), record=record())
    assert find(tmp_path / "a")["best"] == {"auroc": 0.9}
    assert find(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-last"))["best"] == {"auroc": -math.inf}


def test_damaged_or_foreign_states_are_named(tmp_path):
    folder = tmp_path / "checkpoint-last"
    folder.mkdir()
    for content, match in ((b"", "state.pth is damaged"), (b"PK", "state.pth is damaged")):
        (folder / "state.pth").write_bytes(content)
        with pytest.raises(ConfigError, match=match):
            find(tmp_path)
    for content in (create_model("vit_tiny_patch16_64").state_dict(), [1]):
        torch.save(content, folder / "state.pth")
        with pytest.raises(ConfigError, match="is not the state of a run; weights alone are for --finetune"):
            find(tmp_path)
    save_last(tmp_path, *trained(), Progress())
    state = torch.load(folder / "state.pth", weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "left_out"}, folder / "state.pth")
    with pytest.raises(ConfigError, match=r"another version of this code \(no left_out\): continue it with that"):
        find(tmp_path)
    shutil.rmtree(folder)
    (tmp_path / "args.json").write_text("")
    with pytest.raises(ConfigError, match="args.json is damaged .*; remove it"):
        find(tmp_path)


def test_a_flipped_bit_is_found_and_the_way_on_is_said(tmp_path):
    """Also where the program around us has told torch.save to write no sums."""
    torch.serialization.set_crc32_options(False)
    model, state = trained()
    save_last(tmp_path, model, state, Progress(3))
    save_weights(tmp_path / "w.pth", model)
    path = tmp_path / "checkpoint-last" / "state.pth"
    for file, error, read in ((path, ConfigError, lambda: find(tmp_path)), (tmp_path / "w.pth", CheckpointError, None)):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(error, match=r"pth(:| is) damaged \(Bad CRC-32 for file '[.\w]+/data/\d+'\); .*copy"):
            read() if read else load_pretrained(model, str(file))
    shutil.copytree(path.parent, tmp_path / "checkpoint-last.old")
    with pytest.raises(ConfigError, match="remove its folder, and the same command goes on from .*checkpoint-last.old"):
        find(tmp_path)


def test_a_full_disk_keeps_what_was_there_and_says_so(tmp_path, monkeypatch):
    model, state = trained()
    save_last(tmp_path, model, state, Progress(1))
    save_weights(tmp_path / "w.pth", model)
    before = (tmp_path / "w.pth").read_bytes()

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoint.CheckpointWriteError, match="checkpoint-last: cannot be written .*No space .*intact"):
        save_last(tmp_path, model, state, Progress(2))
    with pytest.raises(checkpoint.CheckpointWriteError, match="w.pth: cannot be written"):
        save_weights(tmp_path / "w.pth", model)
    assert load_last(find_last(tmp_path))["epoch"] == 1 and (tmp_path / "w.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-last", "w.pth"]  # the half file does not stay on the full disk


def test_a_file_that_cannot_grow_is_a_full_disk(tmp_path):
    """The kernel itself refuses, at half the size."""
    model, state = trained()
    save_last(tmp_path, model, state, Progress(1))
    size = (tmp_path / "checkpoint-last" / "state.pth").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(checkpoint.CheckpointWriteError, match="what was there before is intact"):
            save_last(tmp_path, model, state, Progress(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_last(find_last(tmp_path))["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint-last"]


HOW = {
    "fused": None,
    "foreach": True,
    "capturable": False,
    "differentiable": False,
}  # as a device without kernels has it
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def stepped(optimization, parameters, step):
    """Take a step with made-up gradients, of which the second is not finite, as training does."""
    for p in parameters:
        p.grad = p.detach().sin() + (math.nan if step == 1 else 0.1 * step)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    return step_if_finite(optimization, torch.zeros((), device=norm.device), norm)


def built(name, device, how):
    """Two parameters and their Optimization; how: settings of the groups that belong to a device."""
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, n, device=device)) for n in (5, 64)]
    groups = [{"params": [p], "lr_scale": 1.0, "weight_decay": 0.1} for p in parameters]
    optimizer = build_optimizer(groups, name=name, lr=1e-2, eps=1e-8, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group |= {k: v for k, v in how.items() if k in group}
    return parameters, Optimization(optimizer, lambda s: 1e-2, lambda s: 0.1)


@pytest.mark.parametrize("saved_on", DEVICES)
@pytest.mark.parametrize("resumed_on", DEVICES)
@pytest.mark.parametrize(("before", "after"), [(HOW, {}), ({}, HOW), ({}, {})], ids=["to_fused", "from_fused", "same"])
@pytest.mark.parametrize("name", [*FUSED, "lamb", "nadamw", "adan"])
def test_an_optimizer_goes_on_where_another_kernel_takes_its_steps(name, before, after, resumed_on, saved_on, tmp_path):
    """How it computes is up to the device it resumes on; steps end where they would have without a break."""
    whole, parts = built(name, saved_on, before), built(name, saved_on, before)
    for step in range(3):
        stepped(whole[1], whole[0], step)
        stepped(parts[1], parts[0], step)
    torch.save(parts[1].optimizer.state_dict(), tmp_path / "state.pth")
    saved = torch.load(tmp_path / "state.pth", map_location="cpu", weights_only=True, mmap=True)
    parameters, optimization = built(name, resumed_on, after)
    with torch.no_grad():
        for p, old in zip(parameters, parts[0], strict=True):
            p.copy_(old)
    own = [{k: group[k] for k in HOW if k in group} for group in optimization.optimizer.param_groups]
    checkpoint._restore_optimizer(saved, optimization.optimizer)
    assert [{k: g[k] for k in o} for g, o in zip(optimization.optimizer.param_groups, own, strict=True)] == own
    for step in (3, 1, 4):
        assert [bool(stepped(*pair, step)) for pair in ((whole[1], whole[0]), (optimization, parameters))] == [
            step == 1
        ] * 2
    for a, b in zip(whole[0], parameters, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_a_scaler_and_an_average_that_come_or_go(tmp_path, kept):
    model, state = trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale(torch.ones(1))
    state = optimization(model, scaler=scaler, ema=WeightAverage(model, 0.5)) if kept else optimization(model)
    save_last(tmp_path, model, state, Progress(1))
    other, _ = trained(seed=1)
    more = {} if kept else {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0), "ema": WeightAverage(other, 0.5)}
    fresh = optimization(other, **more)
    restored(load_last(find_last(tmp_path)), other, fresh, Progress())
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    if not kept:
        assert fresh.scaler.get_scale() == 2.0  # as a run that begins
        assert all(torch.equal(v, before[k]) for k, v in fresh.ema.module.state_dict().items())
