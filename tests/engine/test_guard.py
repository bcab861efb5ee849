import json
import math
from functools import partial

import pytest
import torch
from helpers import session
from torch import nn

from engine.checkpoint import Progress
from engine.guard import NonFinite, TrainingError
from engine.loop import Reporting, train_one_epoch
from engine.optim import FUSED, Optimization, build_optimizer

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.0),
    **{f"fused {name}": partial(build_optimizer, name=name, lr=0.0, eps=1e-8, betas=(0.9, 0.999)) for name in FUSED},
}


def run(values, *, optimizer="sgd", log_every=3, guard=None, objective=None, accumulate=1, scaler=None):
    """Train a linear model on batches full of `values`; returns it, the optimizer's state and the means."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": 0.1}]
    optimization = Optimization(
        OPTIMIZERS[optimizer](groups),
        lr=lambda step: 0.1,
        weight_decay=lambda step: 0.1,
        accumulate=accumulate,
        scaler=scaler,
    )
    batches = [{"x": torch.full((2, 3), v), "samples": [f"clip {i}a", f"clip {i}b"]} for i, v in enumerate(values)]
    guard = guard or NonFinite(Progress())
    guard.progress.steps_per_epoch = len(values) // accumulate
    means = train_one_epoch(
        model,
        batches,
        objective or squared,
        session(optimization, guard.progress, guard=guard),
        Reporting(clips_per_step=2, log_every=log_every),
    )
    return model, optimization.optimizer.state_dict()["state"], means


def squared(model, batch):
    loss = model(batch["x"]).square().mean()
    return loss, {"loss": loss}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_leaves_no_trace_in_weights_moments_and_means(tmp_path, optimizer, bad):
    guard = NonFinite(Progress(), tmp_path / "nonfinite.jsonl")
    clean = run([1.0, 2.0, 3.0, 4.0], optimizer=optimizer)
    planted = run([bad, 1.0, 2.0, 3.0, bad, 4.0], optimizer=optimizer, guard=guard)
    assert torch.equal(clean[0].weight, planted[0].weight) and clean[2] == planted[2]
    for parameter, moments in clean[1].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(planted[1][parameter][k])) for k, v in moments.items()
        )
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"], line["samples"]) for line in lines] == [
        (0, step, [f"clip {step}a", f"clip {step}b"]) for step in (0, 4)
    ]
    assert all(line["losses"][0] in ("nan", "inf") for line in lines)


def test_all_samples_of_an_accumulated_step_are_named(tmp_path):
    guard = NonFinite(Progress(), tmp_path / "nonfinite.jsonl")
    run([1.0, math.nan, 1.0, 1.0], guard=guard, accumulate=2)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == ["clip 0a", "clip 0b", "clip 1a", "clip 1b"]


def test_a_gradient_that_is_not_finite_counts_though_the_loss_is(tmp_path):
    def root(model, batch):  # sqrt(0): a loss of 0, a gradient of NaN
        loss = (model(batch["x"]) * 0).square().sum().sqrt()
        return loss, {"loss": loss}

    guard = NonFinite(Progress(), tmp_path / "nonfinite.jsonl")
    before, _, _ = run([], optimizer="sgd")
    model, _, means = run([1.0], objective=root, guard=guard)
    assert torch.equal(model.weight, before.weight) and math.isnan(means["loss"])
    assert json.loads((tmp_path / "nonfinite.jsonl").read_text())["losses"] == [0.0]


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_five_in_a_row_end_the_run_four_do_not(log_every):
    nan = math.nan
    run([1.0, nan, nan, nan, nan, 1.0, nan, nan, nan, nan], log_every=log_every)
    with pytest.raises(TrainingError, match="not finite in 5 steps in a row, up to epoch 0, step 6; nonfinite.jsonl"):
        run([1.0, 1.0] + [nan] * 5 + [1.0], log_every=log_every)
    with pytest.raises(TrainingError, match="in 5 steps in a row, up to epoch 0, step 1"):  # after a restart
        run([nan, nan, 1.0], guard=NonFinite(Progress(left_out=3)))


@pytest.mark.parametrize("precise", [False, True])
def test_another_number_format_is_advised_where_it_may_help(precise):
    with pytest.raises(TrainingError, match="--max_nonfinite") as raised:
        run([math.nan] * 5, guard=NonFinite(Progress(), precise=precise))
    assert ("fp32" in str(raised.value)) is not precise


def test_many_steps_between_log_lines_do_not_hide_it():
    progress = Progress()
    with pytest.raises(TrainingError):
        run([math.nan] * 60, log_every=1000, guard=NonFinite(progress))
    assert progress.step == 20


def test_with_a_scaler_the_loss_counts_and_overflow_does_not(tmp_path):
    guard = NonFinite(Progress(), tmp_path / "nonfinite.jsonl")
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000)
    run([1e3, math.inf, 1e3], guard=guard, scaler=scaler)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1 and scaler.get_scale() < 1e38


def test_gradients_that_overflow_at_any_scale_end_the_run(tmp_path):
    """A finite loss with an infinite gradient: the scaler would halve its factor for ever."""

    def infinite_slope(model, batch):
        loss = sum(p.sum() for p in model.parameters()) * 0 + ((model.weight * 0).abs() + 0).sqrt().sum()
        return loss, {"loss": loss}

    guard = NonFinite(Progress(), tmp_path / "nonfinite.jsonl", limit=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        run([1.0] * 20, guard=guard, scaler=scaler, objective=infinite_slope)
    lines = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][:3] == [4, 5, 6]  # 16, 8, 4, 2 are the scaler's affair
