"""Where a model looked: how much each of its tokens weighs in a score, and a picture of that."""

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
import torch
from einops import reduce
from PIL import Image, ImageDraw
from torch import Tensor, nn

from engine.evaluate import EvaluationError
from engine.fonts import fitting, font
from utils.text import label_of

SHOWN = 4  # frames of a picture
_SIDE = 224  # pixels of a frame's width at least
_LARGEST = 640  # pixels of its longer side, for which that gives way
_STRONGEST = 0.75  # share of the heat map's colour where it is 1
_INK, _PAPER, _EDGE = (27, 27, 31), (255, 255, 255), 8
_METHOD = "brighter: gradient x input is larger there, in this window; it shows what the score depends on, not why"


def saliency(model: nn.Module, video: Tensor) -> np.ndarray:
    """Return how much each token weighs in the score of a window, (T', H', W') float32 in [0, 1], the largest 1.

    It is gradient x input (Shrikumar et al., arXiv:1605.01713): the gradient of the risk logit minus the safe one with
    respect to the normalised input, times that input, summed over the colours and pixels of a token's cube, without its
    sign, over the largest. All 0 where the score depends on no token.

    Args:
        model: a classifier of this repository with two classes, in evaluation mode while this runs; its weights gather
            no gradients.
        video: uint8 (3, T, H, W) RGB, a window as the model takes it, on any device.

    Raises ValueError: a model without a head of two classes, or another shape; EvaluationError: gradients that are not
    finite.
    """
    was_training, device = model.training, next(model.parameters()).device
    with torch.inference_mode(False), torch.enable_grad():
        window = model.normalize(video.to(device)[None].clone()).float().requires_grad_()
        model.eval()
        try:
            logits = model(window)
        finally:
            model.train(was_training)
        if logits.shape != (1, 2):
            raise ValueError(
                f"{model.name} gives {tuple(logits.shape)} for a window: there is a risk where it is (1, 2)"
            )
        (gradient,) = torch.autograd.grad(logits[0, 1] - logits[0, 0], window)
    a, p, q = model.patch_embed.cube
    weights = reduce(
        (gradient * window.detach())[0].double(), "c (t a) (h p) (w q) -> t h w", "sum", a=a, p=p, q=q
    ).abs()
    if not torch.isfinite(weights).all():
        raise EvaluationError(f"{model.name}: the gradients of a window are not finite")
    largest = weights.max()
    return (weights / largest if largest > 0 else weights).float().cpu().numpy()


def explain_picture(
    frames: np.ndarray, heat: np.ndarray, caption: str = "", labels: Sequence[str] | None = None
) -> np.ndarray:
    """Return uint8 (H, W, 3): four frames of a window, evenly spaced, each beside itself with the heat over it.

    Args:
        frames: uint8 (T, H, W, 3) RGB.
        heat: (T', H', W') of `saliency`; T' divides T.
        caption: what the window is of; it stands on top.
        labels: words below each of the T frames; None: "frame 1 of 16" and so on.
    """
    count = len(frames)
    labels = labels or [f"frame {number + 1} of {count}" for number in range(count)]
    shown = np.unique(np.linspace(0, count - 1, SHOWN).round().astype(int)).tolist()
    scale = min(max(1, -(-_SIDE // frames.shape[2])), _LARGEST / max(frames.shape[1:3]))
    height, width = (max(round(side * scale), 1) for side in frames.shape[1:3])
    size = max(12, width // 18)
    line, pairs = round(1.7 * size), 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // pairs)
    pair_width = 2 * width + _EDGE
    whole = (pairs * (pair_width + 2 * _EDGE), 2 * line + rows * (height + line + _EDGE))
    image = Image.new("RGB", whole, _PAPER)
    draw = ImageDraw.Draw(image)
    for row, words in enumerate((label_of(caption, 120), _METHOD)):
        room = whole[0] - 2 * _EDGE
        draw.text((_EDGE, row * line + line // 2), words, _INK, fitting(words, size, room), anchor="lm")
    for place, number in enumerate(shown):
        x = _EDGE + place % pairs * (pair_width + 2 * _EDGE)
        y = 2 * line + place // pairs * (height + line + _EDGE)
        how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
        frame = cv2.resize(np.ascontiguousarray(frames[number]), (width, height), interpolation=how)
        image.paste(Image.fromarray(frame), (x, y))
        image.paste(Image.fromarray(_heated(frame, heat[number * len(heat) // count])), (x + width + _EDGE, y))
        draw.text((x, y + height + line // 2), labels[number], _INK, font(size), anchor="lm")
    return np.asarray(image)


def _heated(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3): a frame with heat (H', W') in [0, 1] over it."""
    heat = cv2.resize(heat.astype(np.float32), frame.shape[1::-1], interpolation=cv2.INTER_LINEAR).clip(0, 1)
    colour = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
    share = _STRONGEST * heat[..., None]
    grey = frame.mean(axis=2, keepdims=True)  # so that the colours are those of the heat alone
    return ((1 - share) * grey + share * colour).round().astype(np.uint8)
