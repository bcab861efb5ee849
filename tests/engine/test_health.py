"""engine.health on windows that are numbers, whose answer is known; run_dapt.py itself is in test_dapt_probe.py."""

import math
import signal

import numpy as np
import pytest
import torch
from helpers import session
from torch import nn

from datasets.clips import Clip, ClipTable
from datasets.faults import Fault
from datasets.stream import WindowBatch
from engine.checkpoint import Progress
from engine.evaluate import EvaluationError, gather_predictions
from engine.health import BEST, Health, PooledEncoder, best_of, in_words
from engine.intervals import Interval
from engine.plots import health_figure
from models import create_model, list_models
from utils.cli import ConfigError
from utils.signals import Preempted

FRAMES = 12


class Frames:
    """Windows of clips whose pixels are the label of the window, hidden in noise: (1, 3, 1, 4, 4) each."""

    def __init__(self, clips=36, recordings=36, unreadable=(), anomalous=None):
        self.device, self.unreadable = torch.device("cpu"), unreadable
        label = np.arange(FRAMES) % 2 if anomalous is None else np.zeros(FRAMES, int)
        self.clips = ClipTable("csv", "train", [
            Clip(f"c{i}", "", FRAMES, 10.0, labels=(label | (i in (anomalous or ()))).astype(np.uint8),
                 recording=f"r{i % recordings}" if recordings else None)
            for i in range(clips)
        ])  # fmt: skip

    def locations(self):
        return np.repeat(np.arange(len(self.clips)), FRAMES), np.tile(np.arange(FRAMES), len(self.clips))

    def batches(self, normalize):
        for c, clip in enumerate(self.clips):
            if clip.name in self.unreadable:
                yield Fault(c, clip.name, "gone", 0)
                continue
            noise = np.random.default_rng(c).standard_normal((FRAMES, 3, 1, 4, 4))
            video = torch.from_numpy(noise + np.asarray(clip.labels)[:, None, None, None, None]).float()
            yield WindowBatch(np.full(FRAMES, c), np.arange(FRAMES), video)

    def agree(self, faults):
        return faults


class Encoder(nn.Module):
    """(B, 3, 1, 4, 4) -> (B, 16, 3): pixels as tokens, in training with dropout; `loud`: how loud the class is."""

    def __init__(self, loud=1.0):
        super().__init__()
        self.loud, self.weight = loud, nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(0.5)

    def normalize(self, video):
        return video

    def forward(self, video):
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
        x = self.loud * video + (1 - self.loud) * noise
        return self.dropout(self.weight * x.flatten(2).transpose(1, 2))


def run_of(tmp_path, epoch=0):
    return session(None, Progress(epoch=epoch, steps_per_epoch=5), output_dir=tmp_path)


def probed(health, run, encoder, *, due=True):
    """One epoch as the loop ends it."""
    run.progress.means = {"loss": 0.9, "trivial_loss": 1.0, "grad_norm": 2.0}
    record, is_best = health.after_epoch(encoder, run, due=due)
    run.progress.epoch += 1
    return record, is_best


def test_a_history_of_better_and_worse_weights(tmp_path, caplog):
    caplog.set_level("INFO", "tad")
    run, health = run_of(tmp_path), Health(Frames(), tmp_path)
    assert health.before_training(Encoder(0.2), run)
    assert not health.before_training(Encoder(0.2), run), "once"
    first = run.progress.best[BEST]
    record, is_best = probed(health, run, Encoder(1.0))
    assert is_best and record["probe_auroc"] > 0.95 > first == record["probe_first_auroc"]
    assert record["probe_windows"] == 36 * FRAMES and record["probe_features"] == 3
    assert 1 < record["probe_effective_rank"] <= 3 and not any("loss" in name for name in record)
    assert probed(health, run, Encoder(0.3), due=False) == ({}, False)
    record, is_best = probed(health, run, Encoder(0.3))
    assert not is_best and record["probe_best_auroc"] == run.progress.best[BEST] > record["probe_auroc"]
    history = run.progress.health["history"]
    assert [r["epochs"] for r in history] == [0, 1, 2, 3] and [("auroc" in r) for r in history] == [1, 1, 0, 1]
    assert all(r["loss"] == 0.9 and r["trivial_loss"] == 1.0 for r in history[1:]) and "loss" not in history[0]
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("probe ")]
    assert "before the first epoch: AUC_ROC" in said[0] and "; later ones are compared with this" in said[0]
    assert "it still improves, +" in said[1] and "may be chance" not in said[1] and "to the first probe" in said[1]
    assert "no better for 2 epochs: the best is" in said[2] and "after 1 epoch, and this one is below it" in said[2]
    assert (tmp_path / "probe.png").stat().st_size > 1000


def test_nothing_of_the_run_is_touched(tmp_path):
    encoder, run = Encoder(0.5).train(), run_of(tmp_path)
    encoder.dropout.eval()  # a mode of its own
    health = Health(Frames(), tmp_path)
    torch.manual_seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    health.before_training(encoder, run)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()
    assert encoder.training and not encoder.dropout.training and encoder.weight.grad is None
    assert encoder.weight.requires_grad and not encoder.weight.is_inference()


def test_held_out_recordings_are_of_no_window_to_fit_on(tmp_path):
    health = Health(Frames(clips=36, recordings=12), tmp_path)
    recording = np.array([int(c) % 12 for c, _ in zip(*Frames(36, 12).locations(), strict=True)])
    out = set(recording[health.held_out])
    assert len(out) == 4 and not out & set(recording[~health.held_out])


@pytest.mark.parametrize("recordings", [1, 2])
def test_too_few_recordings_are_replaced_by_clips_and_that_is_said(tmp_path, caplog, recordings):
    health = Health(Frames(clips=9, recordings=recordings, anomalous=range(0, 9, 2)), tmp_path)
    assert "are held out by clips, not by recordings" in caplog.text
    assert health.held_out.sum() == (2 + 2) * FRAMES  # of 5 anomalous clips and of 4 safe ones, a third, up


def test_a_class_on_one_side_alone_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"csv train: the 24 windows of the probe, of 2 recordings and 2 clips, cannot"
    ):
        Health(Frames(clips=2, recordings=0, anomalous=[1]), tmp_path)


def test_unreadable_clips_are_left_out_of_the_comparison(tmp_path):
    run = run_of(tmp_path)
    Health(Frames(), tmp_path).before_training(Encoder(0.3), run)
    health = Health(Frames(unreadable=("c0", "c1", "c2", "c3")), tmp_path)
    assert not health.before_training(Encoder(0.3), run), "the same windows, as far as was planned"
    record, _ = probed(health, run, Encoder(1.0))
    assert record["probe_windows"] == 32 * FRAMES
    assert sum(map(math.isnan, run.progress.health["best"])) == sum(health.held_out[: 4 * FRAMES])
    assert not any(map(math.isnan, run.progress.health["base"]))
    scores = run.progress.health["base"]
    partly = [math.nan if i % 3 else score for i, score in enumerate(scores)]
    for pair in ((scores, partly), (partly, scores)):  # equal where both are known
        assert health._gain(*pair).percentile == (0, 0)
    with pytest.raises(ConfigError, match="too few of the probe's windows can still be read"):
        probed(Health(Frames(unreadable=[f"c{i}" for i in range(1, 36)]), tmp_path), run, Encoder())


def test_other_windows_begin_another_history(tmp_path, caplog):
    run = run_of(tmp_path)
    assert Health(Frames(), tmp_path).before_training(Encoder(1.0), run)
    run.progress.epoch = 4
    assert Health(Frames(clips=30), tmp_path).before_training(Encoder(0.1), run), "the best of its own"
    assert "the probe's windows are others than before: its history begins anew" in caplog.text
    assert [r["epochs"] for r in run.progress.health["history"]] == [4]


def test_a_run_that_stands_within_an_epoch_is_probed_at_its_end(tmp_path):
    run = run_of(tmp_path)
    run.progress.step = 2
    health = Health(Frames(), tmp_path)
    assert not health.before_training(Encoder(), run) and run.progress.health["history"] == []
    assert probed(health, run, Encoder())[1]


def test_features_that_are_not_finite_are_said(tmp_path):
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        Health(Frames(), tmp_path).before_training(Encoder(math.nan), run_of(tmp_path))


def test_features_are_the_mean_of_all_tokens_after_the_last_norm():
    model = create_model("pretrain_videomae_tiny_patch16_64").eval()
    video = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    encoder = model.encoder
    with torch.no_grad():
        nn.init.normal_(encoder.norm.weight)
        x = encoder.embed(video)
        for block in encoder.blocks:
            x = block(x)
        torch.testing.assert_close(PooledEncoder(encoder)(video), encoder.norm(x).mean(dim=1))


FAMILIES = [name for name in list_models() if name.startswith("pretrain_") and "tiny" in name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_features(name):
    model = create_model(name).eval()
    video = torch.randn(2, *model.encoder.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.encoder.encode(model.encoder.embed(video))
        torch.testing.assert_close(PooledEncoder(model.encoder)(video), tokens.mean(dim=1))
    assert tokens.shape == (2, np.prod(model.grid), model.encoder.embed_dim)


def test_ranks_without_windows_are_no_trouble():
    """Fewer clips than processes: one has nothing, and does not know how wide features are."""
    frames = Frames(clips=1)
    location = frames.locations()
    scored = (*location, np.ones((FRAMES, 3), np.float32))
    empty = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.evaluate.gather", lambda part: [empty, part])
        assert gather_predictions(scored, location, frames.clips).logits.shape == (FRAMES, 3)


INSIDE, ABOVE, BELOW = (Interval(x, percentile=(x - 0.02, x + 0.02), units=20) for x in (0.01, 0.05, -0.05))
FEW = Interval(0.03)
REST = "AP 50.00  effective rank 9.3 of 128"


def record(epochs, auroc, width=0.02):
    return {"epochs": epochs, "auroc": auroc, "ap": 0.5, "effective_rank": 9.26, "features": 128,
            "auroc_low": auroc - width, "auroc_high": auroc + width}  # fmt: skip


FIRST = "; later ones are compared with this"
LINES = [  # history, gains, what is said
    ([record(0, 0.6)], {}, f"probe before the first epoch: AUC_ROC 60.00 [58.00, 62.00]  {REST}{FIRST}"),
    ([record(3, 0.6, math.nan)], {}, f"probe after 3 epochs: AUC_ROC 60.00  {REST}{FIRST}"),
    (
        [record(0, 0.6), record(1, 0.65)],
        {"base": ABOVE, "best": ABOVE},
        f"probe after 1 epoch: AUC_ROC 65.00 [63.00, 67.00]  {REST}; it still improves, +5.00 [+3.00, +7.00] to the "
        "best before; +5.00 [+3.00, +7.00] to the first probe",
    ),
    (
        [record(0, 0.6), record(1, 0.61)],
        {"base": INSIDE, "best": INSIDE},
        "; it still improves, +1.00 [-1.00, +3.00] to the best before, which may be chance; +1.00 [",
    ),
    (
        [record(0, 0.6), record(1, 0.63)],
        {"base": FEW, "best": FEW},
        "; it still improves, +3.00 to the best before, which may be chance; +3.00 to the first probe",
    ),
    (
        [record(0, 0.6), record(2, 0.7), {"epochs": 3}, record(4, 0.65)],
        {"base": ABOVE, "best": BELOW},
        "; no better for 2 epochs: the best is 70.00, after 2 epochs, and this one is below it; +5.00 [+3.00, +7.00] ",
    ),
    (
        [record(0, 0.6), record(1, 0.6)],
        {"base": INSIDE, "best": INSIDE},
        "; no better for 1 epoch: the best is 60.00, before the first epoch, which this one may equal; ",
    ),
]


@pytest.mark.parametrize(("history", "gains", "words"), LINES, ids=range(len(LINES)))
def test_the_line_after_a_probe(history, gains, words):
    line = in_words(history, gains)
    assert words in line and "\n" not in line and (gains or line == words)
    health_figure(history, "DoTA train")


def test_the_first_of_equals_is_the_best():
    assert best_of([{"epochs": 0}, {"epochs": 1, "auroc": 0.7}, {"epochs": 2, "auroc": 0.7}])["epochs"] == 1
    assert best_of([{"epochs": 0}]) is None


def test_a_signal_leaves_a_probe_unfinished(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.signals._arrivals", [(0.0, signal.SIGTERM)])
    run, health = run_of(tmp_path), Health(Frames(), tmp_path)
    with pytest.raises(Preempted):
        health.before_training(Encoder(), run)
    assert run.progress.health["history"] == [] and BEST not in run.progress.best
