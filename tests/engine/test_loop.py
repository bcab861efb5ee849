import json
from types import SimpleNamespace

import pytest
import torch
from helpers import session
from torch import nn

from engine.averages import WeightAverage
from engine.checkpoint import Progress
from engine.finetune import FinetuneObjective
from engine.loop import Reporting, _Clock, train_epochs, train_one_epoch
from engine.losses import LOSSES
from engine.optim import Optimization, build_optimizer, cosine, parameter_groups
from models import create_model

CPU = torch.device("cpu")


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def squared(model, batch):
    loss = model(batch).square().mean()
    return loss, {"loss": loss}


def train(model, batches, *, lr=lambda step: 0.1, steps=None, progress=None, objective=squared, **kwargs):
    progress = progress or Progress()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0, "weight_decay": 0.0}], lr=0.0)
    optimization = Optimization(optimizer, lr=lr, weight_decay=lambda step: 0.0, **kwargs)
    progress.steps_per_epoch = steps or len(batches) // optimization.accumulate
    reporting = Reporting(clips_per_step=1, log_every=2)
    return train_one_epoch(model, batches, objective, session(optimization, progress), reporting)


def test_accumulation_equals_a_large_batch():
    data = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(0))
    whole, halves = linear(), linear()
    means = train(whole, list(data))
    split = train(halves, [half for batch in data for half in batch.chunk(2)], accumulate=2)
    torch.testing.assert_close(whole.weight, halves.weight)
    assert means == pytest.approx(split, rel=1e-5)


def test_continues_at_the_step_it_is_told():
    data = list(torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0)))
    asked = []

    def lr(step):
        asked.append(step)
        return 1.0 / (1 + step)

    whole, parts = linear(), linear()
    train(whole, data, lr=lr, progress=Progress(epoch=2))
    assert asked == [12, 13, 14, 15, 16, 17]
    progress = Progress(epoch=2)
    with pytest.raises(StopIteration):  # as a kill after the fourth step would leave it
        train(parts, data[:4], lr=lr, steps=6, progress=progress)
    assert progress.step == 4
    train(parts, data[4:], lr=lr, steps=6, progress=progress)
    assert progress.step == 6
    torch.testing.assert_close(whole.weight, parts.weight)


def test_clipping_bounds_the_step():
    model = linear()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    means = train(model, [torch.full((4, 3), 100.0)], clip_grad=0.5, lr=lambda step: 1.0)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm() == pytest.approx(0.5, abs=1e-4) and means["grad_norm"] > 100


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_the_model(loss):
    """A tiny ViT separates four clips by each of the losses."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", init_scale=1.0)
    label = torch.tensor([0, 1, 0, 1])
    batch = {
        "video": (torch.rand(4, 3, 4, 64, 64) * 60 + 120 * label.view(4, 1, 1, 1, 1)).byte(),
        "boxes": None,
        "seed": None,
        "label": label,
        "soft_label": label.float() * 0.9,
        "ttc": torch.tensor([-0.5, 0.0, float("nan"), 0.0]),
        "weight": 1.0,
    }
    groups = parameter_groups(model, weight_decay=0.05)
    optimization = Optimization(
        build_optimizer(groups, name="adamw", lr=1e-3, eps=1e-8, betas=(0.9, 0.999)),
        lr=lambda step: cosine(step, base=3e-4, final=0.0, total_steps=40, warmup_steps=5),
        weight_decay=lambda step: 0.05,
    )
    to_input = lambda video, boxes, seeds: (video.float() - 120) / 60  # noqa: E731
    run = session(optimization, Progress(steps_per_epoch=40))
    objective = FinetuneObjective(LOSSES[loss], to_input)
    train_one_epoch(model, [batch] * 40, objective, run, Reporting(clips_per_step=4))
    before = [p.clone() for p in model.parameters()]
    objective(model, batch | {"weight": 0.0})[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()), "nothing was read, nothing is learnt"
    assert all(map(torch.equal, before, model.parameters()))
    risk = model.eval()(to_input(batch["video"], None, None)).softmax(1)[:, 1]
    assert risk[label == 1].min() > risk[label == 0].max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_trains_in_the_precision_asked_for(dtype, caplog):
    caplog.set_level("INFO", "tad")
    seen = []

    def objective(model, batch):
        output = model(batch)
        seen.append((model.training, output.dtype))
        return squared(model, batch)

    model, optimizer = linear().eval(), torch.optim.SGD(linear().parameters(), lr=0.0)
    optimizer.param_groups[0]["lr_scale"] = 1.0
    optimization = Optimization(optimizer, lr=lambda s: 0.1, weight_decay=lambda s: 0.0, dtype=dtype)
    run = session(optimization, Progress(steps_per_epoch=1))
    train_one_epoch(model, [torch.ones(2, 3)], objective, run, Reporting(clips_per_step=1))
    assert seen == [(True, dtype)]
    assert "step 1/1  loss" in caplog.text  # and no time to the epoch's end


def mean_of(model, batch):
    loss = model(batch).mean()
    return loss, {"loss": loss}


def test_the_average_begins_at_the_first_weights_and_decays_in_every_step():
    """Weights 1, 0.9, 0.8, 0.7 by hand; their average of decay 0.8 is 1, 0.98, 0.944, 0.8952."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = WeightAverage(model, 0.8)
    for weight, average in ((0.9, 0.98), (0.8, 0.944), (0.7, 0.8952)):
        train(model, [torch.ones(2, 1)], objective=mean_of, ema=ema)
        assert (model.weight.item(), ema.module.weight.item()) == pytest.approx((weight, average))


def test_an_average_on_the_cpu_is_a_step_late_and_complete_when_asked_for(monkeypatch):
    """What a GPU would do is done here at once; the weights of a step are those of its end, whatever comes after."""
    waits = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: waits.append(model.weight.item()))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = WeightAverage(model, 0.8)
    ema._copies = [torch.empty(1, 1)]
    for weight in (0.9, 0.8, 0.7):
        nn.init.constant_(model.weight, weight)
        ema.update(model)
    nn.init.zeros_(model.weight)
    assert waits == pytest.approx([0.8, 0.7])
    assert ema.module.weight.item() == ema.module.weight.item() == pytest.approx(0.8952)


def test_gradients_are_read_once_and_not_rescaled_without_a_limit(monkeypatch):
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", lambda *_: pytest.fail("rescaled"))
    model, data = linear(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    squared(model, data)[0].backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    model.zero_grad(set_to_none=True)
    assert train(model, [data])["grad_norm"] == pytest.approx(norm.item())


def test_memory_is_the_most_since_the_last_report(monkeypatch):
    gib = 2**30
    held = SimpleNamespace(now=1 * gib, peak=9 * gib)  # 9: of what came before
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(held, "peak", held.now))
    clock = _Clock(torch.device("cuda", 0))
    assert clock.memory() == {"mem_gib": 1}
    held.peak = 3 * gib
    assert clock.memory() == {"mem_gib": 3}
    clock.restart()
    assert clock.memory() == {"mem_gib": 1} and _Clock(CPU).memory() == {}


def test_waiting_for_data_is_what_batches_count_since_the_last_report():
    batches = SimpleNamespace(waited=3.0)
    clock = _Clock(CPU, batches)
    batches.waited = 3.75
    assert clock.data_seconds() == 0.75 and _Clock(CPU, [1, 2]).data_seconds() == 0
    clock.restart()
    assert clock.data_seconds() == 0


def test_scaled_losses_are_clipped_at_their_own_size():
    plain, scaled = linear(), linear()
    train(plain, list(torch.ones(1, 8, 3)), clip_grad=0.1)
    train(scaled, list(torch.ones(1, 8, 3)), clip_grad=0.1, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    torch.testing.assert_close(plain.weight, scaled.weight)


def test_epochs_continue_where_a_kill_left_them(tmp_path, monkeypatch):
    """A run that was killed at epoch 1, step 2, and one that was killed between the training of epoch 1 and its end."""
    for step, trained in ((2, [(1, 2), (2, 0)]), (4, [(2, 0)])):
        announced, saved, folder = [], [], tmp_path / str(step)
        folder.mkdir()
        progress = Progress(epoch=1, step=step, means={"loss": 7.0}, steps_per_epoch=4)
        batches = [torch.ones(2, 3)] * 4

        model = linear()
        optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0, "weight_decay": 0.0}], lr=0.0)
        optimization = Optimization(optimizer, lr=lambda s: 0.1, weight_decay=lambda s: 0.0)
        monkeypatch.setattr(
            "engine.session.save_last",
            lambda folder, state, saved=saved: saved.append((state.progress.epoch, state.progress.step)),
        )
        train_epochs(
            model,
            batches,
            lambda epoch, first, announced=announced: announced.append((epoch, first)),
            squared,
            session(optimization, progress, output_dir=folder, save_ckpt=True),
            Reporting(clips_per_step=1),
            stop_epoch=3,
            after_epoch=lambda progress=progress: {"epoch_seen": progress.epoch},
        )
        assert announced == trained and (progress.epoch, progress.step) == (3, 0)
        assert saved == ([(1, 4)] if step == 2 else []) + [(2, 0), (2, 4), (3, 0)]
        records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        assert [(r["epoch"], r["epoch_seen"]) for r in records] == [(1, 1), (2, 2)]
        assert (records[0]["train_loss"] == 7.0) == (step == 4)


def test_a_step_that_overflows_is_left_out_of_the_weights_and_of_the_mean():
    model = linear()
    before = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    means = train(model, [torch.full((2, 3), 1e3)], scaler=scaler)
    assert torch.equal(model.weight, before) and means["grad_norm"] == 0 and scaler.get_scale() < 1e38
