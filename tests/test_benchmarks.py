"""The benchmarks measure what they say: the yardstick loads what ours loads, and the arithmetic of tables is right."""

import json
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import write_video

from benchmarks import _common, _data_sets, _yardstick, data, evaluate, predict, risk_picture, step
from datasets import open_clip
from datasets.augment.frames import EvalTransform
from datasets.parallel import Child
from engine.curve import RiskCurve
from engine.events import EventRule
from engine.prediction import VideoResult, save_result

SMALL = _data_sets.Recipe(size=(640, 360), clips=2, clip_frames=20, video_frames=99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark")
    _data_sets.make(path, SMALL)
    return path


@pytest.fixture(scope="module")
def roots(folder):
    return _data_sets.make(folder, SMALL)  # again: what is there is kept


def test_data(roots):
    clips, index = data.table_of(roots, "zips")
    assert clips.frame_counts.tolist() == [20, 20] and len(index) == 10
    videos, clip_index = data.table_of(roots, "mp4")
    assert videos.frame_counts.tolist() == [99] and len(clip_index) == (99 - 46) // 3 + 1 == 18
    sizes = {"zips": (360, 640), "mp4": (360, 640), "pack": (320, 569), "dapt_pack": (320, 569)}
    for name, size in (sizes | {"squashed": (320, 224), "dapt_squashed": (320, 320)}).items():
        table, windows = data.table_of(roots, name)
        assert len(windows) == len(clip_index if name in ("mp4", "dapt_pack", "dapt_squashed") else index)
        with open_clip(table[0]) as reader:
            assert reader.read([2, 5]).shape == (2, *size, 3)


def test_yardstick_of_evaluation_is_ours(roots):
    clips, index = data.table_of(roots, "zips")
    number, frames = index[3]
    names = [clips[number].filename(i) for i in frames]
    published = _yardstick.Yardstick().evaluation(f"{clips[number].source}.zip", names)
    with open_clip(clips[number]) as reader:
        ours = EvalTransform(224)(reader.frames(frames))
    ours = evaluate.NoModel().normalize(ours.transpose(0, 1)[None])[0]
    assert (published - ours).abs().max() < 0.02  # a grey level is 0.017


@pytest.mark.parametrize("decord", [True, False])
def test_yardstick_of_training(roots, monkeypatch, decord):
    """Without operations and padding it is the frames, squashed; with them it is something else."""
    if decord and not _yardstick.HAS_DECORD:
        pytest.skip("needs decord")
    monkeypatch.setattr(_yardstick, "HAS_DECORD", decord)
    yardstick = _yardstick.Yardstick()
    clips, index = data.table_of(roots, "mp4")
    number, frames = index[1]

    def dapt():  # decord must not come into this process
        child = Child(lambda _: [yardstick.dapt(clips[number].source, frames.tolist())], limit=60)
        (video,) = child.results(0)
        child.kill()
        return video

    augmented = dapt()
    monkeypatch.setattr(_yardstick, "_padded", lambda frame: frame)
    monkeypatch.setattr(yardstick, "_augmented", lambda frames, policy: frames)
    monkeypatch.setattr(_yardstick, "draw_crop", lambda *_: (0, 0, 320, 320))
    plain = dapt()
    assert "decord" not in sys.modules
    with open_clip(clips[number]) as reader:
        ours = EvalTransform(224)(reader.frames(frames)).float().mean((0, 2, 3)) / 255
    mean, std = (x.flatten() for x in (_yardstick._MEAN, _yardstick._STD))
    assert augmented.shape == plain.shape == (3, 16, 224, 224)
    assert torch.allclose(plain.mean((1, 2, 3)) * std + mean, ours, atol=0.01)
    assert (augmented - plain).abs().mean() > 0.05


def spend(seconds, items, number):
    """Work for so many CPU seconds, times the number."""
    end = time.process_time() + seconds * number
    while time.process_time() < end:
        pass
    return items


def spending():
    return {"ours": partial(spend, 0.01, 1), "yardstick": partial(spend, 0.08, 2)}


def test_turns_and_ratios():
    seconds = _common.in_turns(spending, [[1, 3], [2, 2], [1, 1]])
    assert seconds["ours"] == pytest.approx([0.02, 0.02, 0.01], rel=0.2)
    assert seconds["yardstick"] == pytest.approx([0.08, 0.08, 0.04], rel=0.2)
    result = _common.against(seconds["ours"], seconds["yardstick"])
    assert result["ratio"] == pytest.approx(4, rel=0.3) and result["ours"] == pytest.approx(50, rel=0.2)


def test_json_is_the_last_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(data, "Recipe", lambda *_: SMALL)
    monkeypatch.setattr(data, "single_thread", lambda: None)
    command = ["benchmarks/data.py", "--data", str(folder), "--rounds", "1", "--windows", "1", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    data.main()
    printed = capsys.readouterr().out.splitlines()
    results = json.loads(printed[-1])
    names = {f"finetune_{kind}" for kind in ("zips", "pack", "squashed")} | {"dapt_pack", "evaluation"}
    for name in names | {"dapt_mp4", "dapt_mp4_4windows"}:
        assert results[name].keys() >= {"ours", "yardstick", "ratio"} and f"| {name} | " in "\n".join(printed)
    assert results["command"].startswith("python -m benchmarks.data --data")


def test_windows_together(roots, monkeypatch):
    """Half a window apart, within the video; each is counted."""
    keys = []
    dataset = data.training_set(roots, "mp4", here=False)
    fill = dataset.fill_together
    monkeypatch.setattr(dataset, "fill_together", lambda k, outs: keys.extend(k) or fill(k, outs))
    assert data.loading(dataset, together=2)(30) == 2 and [key[3] for key in keys] == [9, 17]


def test_every_window_is_scored(roots):
    ways = data.evaluation_ways(roots, windows=2)
    assert ways["evaluation"](0) == 5 and ways["yardstick"](0) == 2
    assert evaluate.scoring(roots, evaluate.NoModel(), "cpu")(0) == 10


def test_the_ways_of_prediction_score_the_same(tmp_path):
    write_video(tmp_path / "a.mp4", frames=20, fps=10)
    ways = predict.ways_of(str(tmp_path / "a.mp4"), "none", 2)  # which raises where they do not agree
    assert {name: way(0) for name, way in ways.items()} == {"ours": 3, "each window": 3, "window by window": 3}


def test_workers(roots):
    rates = data.workers_rates(data.training_set(roots, "pack"), [1], seconds=0.1, rounds=1)
    assert rates[1] > 0


def test_step_rows():
    """Operations of ViT-tiny by hand; a measurement of both tasks runs."""
    device = torch.device("cpu")
    tokens, dim, depth, cube = 2 * 4 * 4, 128, 4, 2 * 16 * 16 * 3
    blocks = depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)
    forward, head = 2 * tokens * cube * dim, 3 * 2 * dim * 2
    assert step.flops_of_clip("vit_tiny_patch16_64", "finetune", device) == 3 * blocks + 2 * forward + head
    rate, _ = step.measure("vit_tiny_patch16_64", "dapt", 2, device, "fp32", steps=1, compiled=False, recompute=True)
    assert rate > 0


def test_largest_batch():
    """2 GB and 1 GB a clip: 5 of them fit into the 7.2 GB of a card that are used."""
    assert step.largest_batch(4, int(6e9), int(4e9), 8) == 5
    line = step.command("vit_base_patch16_224", "dapt", 5, compiled=True, recompute=False)
    assert line == "python run_dapt.py --model pretrain_videomae_base_patch16_224 --batch_size 5 --compile"


def test_risk_picture(tmp_path, monkeypatch, capsys):
    frame = np.arange(5, 40)
    score = np.where(frame >= 25, 0.9, 0.1).astype(np.float32)
    curve = RiskCurve("v.mp4", 10, 40, frame, score, np.zeros(35, bool), EventRule(0.5))
    write_video(tmp_path / "v.mp4", frames=40, fps=10)
    save_result(tmp_path / "v", VideoResult("v.mp4", curve), {})
    words = [str(tmp_path / name) for name in ("v.mp4", "v", "risk.png")]
    monkeypatch.setattr(sys, "argv", ["risk_picture", *words])
    risk_picture.main()
    assert "frames [11, 18, 25, 32, 39]" in capsys.readouterr().out and (tmp_path / "risk.png").stat().st_size > 9999
    monkeypatch.setattr(sys, "argv", ["risk_picture", words[0], str(tmp_path), words[2]])
    with pytest.raises(SystemExit, match=f"error: {tmp_path}: holds no scores"):
        risk_picture.main()
