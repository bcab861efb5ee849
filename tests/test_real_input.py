"""A real driving video, cut into DoTA's layout at full size, through the published recipe with ViT-S."""

import json

import pytest
from helpers import DRIVING, cut_dota, golden, load_weights, published_file, run


@pytest.mark.slow
@pytest.mark.skipif(not DRIVING.exists(), reason="needs ../shared/data/driving")
def test_published_weights_on_real_video(tmp_path):
    cut_dota(tmp_path / "data", clips=4, frames=20)
    fixture = next(f for f in golden("models_videomae")["fixtures"] if f["name"] == "videomae_vit_s")
    checkpoint = published_file(tmp_path / "videomae_s.pth", fixture)
    common = ["--model", "vit_small_patch16_224", "--data_path", tmp_path / "data", "--num_workers", "1"]
    common += ["--device", "cpu", "--eval_batch_size", "5"]
    done = run(
        "run_finetune.py", *common, "--output_dir", tmp_path / "run", "--finetune", checkpoint, "--epochs", "2",
        "--warmup_epochs", "1", "--total_batch_size", "2", "--nb_samples_per_epoch", "4",
        timeout=900, env={"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loaded    160  (160 of them renamed)" in done.stdout
    assert "ignored    58  56 decoder.*, 1 mask_token, 1 encoder_to_decoder.*" in done.stdout
    assert "missing     2  head.weight, head.bias (newly initialised)" in done.stdout
    assert "DoTA train: 2 clips, 40 frames, 10 windows" in done.stdout
    assert len((tmp_path / "run" / "log.txt").read_text().splitlines()) == 2

    done = run(
        "run_finetune.py", "--eval", *common, "--output_dir", tmp_path / "eval", "--finetune",
        tmp_path / "run" / "checkpoint-1.pth", timeout=900, env={"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    last = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert metrics["n"] == 10 and metrics["n_pos"] == 3
    assert metrics["auroc"] == last["val_auroc"] and metrics["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    assert load_weights(tmp_path / "run" / "checkpoint-1.pth")["head.weight"].shape == (2, 384)
