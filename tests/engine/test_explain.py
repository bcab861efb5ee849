"""Where a model looked: against what small changes of a token do to the score; and the picture of it."""

import numpy as np
import pytest
import torch

from engine.evaluate import EvaluationError
from engine.explain import explain_picture, saliency
from models import create_model

TINY = ["vit_tiny_patch16_64", "mvd_vit_tiny_patch16_64", "umt_vit_tiny_patch16_64", "internvideo2_tiny_patch14_56"]


def build(name, **options):
    torch.manual_seed(0)
    model = create_model(name, init_scale=30.0, **options)
    return model, torch.randint(0, 256, model.input_shape, dtype=torch.uint8)


@pytest.mark.parametrize("name", TINY)
def test_is_what_a_change_of_a_token_does(name):
    """Growing a token's cube by e changes the margin by e times its gradient x input."""
    model, video = build(name, drop_path_rate=0.5)
    model.train()
    heat = saliency(model, video)
    assert heat.shape == model.grid and heat.dtype == np.float32 and heat.min() >= 0 and heat.max() == 1
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval().double()
    window = model.normalize(video[None]).double()
    (a, p, q), e = model.patch_embed.cube, 1e-4

    def margin(x):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            tokens = model.fc_dropout(model.forward_features(x))
            safe, risk = torch.nn.functional.linear(tokens, model.head.weight, model.head.bias)[0]
        return float(risk - safe)

    changes = []
    places = [(0, 0, 0), tuple(g - 1 for g in model.grid), (1, 0, 2), (1, 2, 0), (0, 1, 3)]
    places.append(np.unravel_index(heat.argmax(), heat.shape))
    for t, h, w in places:
        values = []
        for sign in (1, -1):
            changed = window.clone()
            changed[..., t * a : (t + 1) * a, h * p : (h + 1) * p, w * q : (w + 1) * q] *= 1 + sign * e
            values.append(margin(changed))
        changes.append(abs(values[0] - values[1]) / (2 * e))
    expected = np.array(changes) / changes[-1]
    assert np.allclose([heat[place] for place in places], expected, rtol=1e-2, atol=1e-3)
    assert len(set(expected.round(3))) > 3


def test_works_where_scores_are_made_and_on_any_size():
    model, video = build("vit_tiny_patch16_64", num_frames=8, input_size=96)
    with torch.inference_mode():
        first = saliency(model, video)
    assert first.shape == (4, 6, 6) and np.array_equal(first, saliency(model, video))


def test_a_score_that_depends_on_nothing():
    model, video = build("vit_tiny_patch16_64")
    torch.nn.init.zeros_(model.head.weight)
    assert not saliency(model, video).any()


def test_refusals():
    model, video = build("vit_tiny_patch16_64", num_classes=3)
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_64 gives \(1, 3\)"):
        saliency(model, video)
    model, video = build("vit_tiny_patch16_64", final_reduction="none")
    with pytest.raises(ValueError, match="for a window"):
        saliency(model, video)
    model, video = build("vit_tiny_patch16_64")
    with pytest.raises(ValueError, match="expected a video of shape"):
        saliency(model, video[..., :32])
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        saliency(model, video)


@pytest.mark.parametrize("frames", [1, 2, 8, 16])
def test_picture_is_hot_where_the_heat_is(frames):
    pictures = np.full((frames, 64, 64, 3), 128, np.uint8)
    heat = np.zeros((max(frames // 2, 1), 4, 4), np.float32)
    cold = explain_picture(pictures, heat, "clip.mp4, 3.40 s, score 0.912")
    heat[:, 0, 3] = 1
    hot = explain_picture(pictures, heat, "clip.mp4, 3.40 s, score 0.912")
    assert hot.shape == cold.shape and hot.dtype == np.uint8 and hot.shape[2] == 3
    changed = np.argwhere((hot != cold).any(axis=2))
    columns = min(frames, 4)
    places = {
        (y // (hot.shape[0] // -(-columns // 2)), x // (hot.shape[1] // min(columns, 2))) for y, x in changed.tolist()
    }
    assert len(places) == columns
    first = changed[changed[:, 1] < hot.shape[1] // min(columns, 2)]
    assert first[:, 1].min() > 256 + 100  # right part of the second of the pair
    explain_picture(pictures, heat, "odd \udcff\r\n\u202e" * 40)
    other = explain_picture(pictures, heat, "another caption", [f"{i} s" for i in range(frames)])
    assert other.shape == hot.shape and (other != hot).any()


def test_picture_follows_time():
    heat = np.zeros((4, 4, 4), np.float32)
    heat[0], heat[3] = 1, 0.5
    pictures = np.full((8, 224, 224, 3), 90, np.uint8)
    picture = explain_picture(pictures, heat).astype(int)
    colourful = (picture.max(axis=2) - picture.min(axis=2)) > 20
    rows, columns = colourful.shape
    quarter = [
        colourful[y : y + rows // 2, x : x + columns // 2].mean() for y in (0, rows // 2) for x in (0, columns // 2)
    ]
    assert quarter[0] > 0.2 and quarter[3] > 0.2 and quarter[1] < 0.01 and quarter[2] < 0.01


@pytest.mark.parametrize("size", [(2160, 3840), (3840, 2160), (540, 960), (1, 1), (4000, 2)], ids=str)
def test_picture_of_any_size_of_frames_can_be_looked_at(size):
    picture = explain_picture(np.full((2, *size, 3), 90, np.uint8), np.ones((1, 4, 4), np.float32), "clip", ["", ""])
    assert max(picture.shape) < 3000 and picture.shape[1] >= (4 * 224 if size[1] > 2 or size[0] == 1 else 0)
