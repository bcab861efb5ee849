import base64
import os
import random

import numpy as np
import pytest
import torch
from helpers import golden
from PIL import Image
from torch.nn import functional

from datasets.augment.dapt import ALIGNED_SCALES, SCALES, PretrainTransform
from datasets.augment.device import NormalizeAndErase
from datasets.augment.erasing import draw_erasing
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import (
    PADDINGS,
    EvalTransform,
    crop_offsets,
    crop_sizes,
    multi_scale_crop,
    pad_wide,
    resize,
)
from datasets.augment.randaugment import DRIVING_OPS, timm_policy
from datasets.clips import DataError

# cv2.resize(picture(h, w), (size, size), interpolation=cv2.INTER_CUBIC), OpenCV 4.13, in base 85.
CV2 = {
    (72, 128, 14): """
kfC7Ff{}SXd=x;LVUT5~({s3Qfi@<8Ep>oXw2ra2mc~nhdOnXeVRfwEznWx5e=$#gLv?wk$B@&kcU)kCJ6wWbnTEp9h|r;Se+HckS#D{aab3Vzlv{FTF2
0MHl5N*Pm54}i6rp=Y!)lX}f4Mw{g-C-xv!+zch}3;vnj3p-fu>!~yne$=m0l!lN1}Y1mtXFuY=l3fTr+1&o`kZ&bNGdEb0JH3Y_^!azP!|YmuV)29Bhb
;)sfiGgoj&zHz_<hbXa<ylFXiwu3*z{Z0T>kf05E%UUyr8A;nr=l5e|7nYU?=hKYJWwt}3SjpJB*qC}!zqt9*fs+d_vbuc`3UZ`iTyOY(4o1t8FM?-pF*
?QR8ajr$NOHqJTfSAA2y|IHbela|HH-?^<+kn5dtBOZ;8A)GWl5^3gf~lN(M<bRVRAO(hE@-MobV6rf6V-yC!IHs2l$2baF0f-ixOBRpc*Rkhfk=QB)^|
VFX~I`Fj1+5ZpuCdoqM^5Cgg8KQE|H9Mym-U3h?hWZAyi;mrjo3uaoCBbfhB8cVwHW&i?_LFj!sN%G<=R~y?D^JjLc@SE<tEDdu4sDdd{eu=VFy+D&}&f
YLK*9sd$WIL8xnMsE6Q0q{C33UWIZVw`YpHi`-VQtxlOrlHP#Za&>}Iq#aI?SEW$W$#T@CY#%Fw6Je-%woS#ppVwxTR9KQcadN!Srmdn?R7E^UMs<VT-K
5iyr;Ay3HB4Y-kBFw~kHnIKYB_^QV1sq9""",
    (10, 16, 12): """
f}w1#v{{X%XL+hgyti%cpMv44Y`2w(<)D_$h^_yBugj&&pviZ1y>+alU7n(m(A0CKxQFPTq{6zD)T491ny2xPp}Uf>ki%?kz>}D&fr`P2*Tspt&z{}7k*~
ddx0rj@zL3bOn!%BneY0VM!JUS~e~H;<t-qen(T3sMiL$(C$Af*^u7<d=kimU*jlFV^#FCE9Z?DpIgxsIF&1mG-lhVp%>XU1@gn_f8eXCASpv9V;(T9V#
r?kwRnd^|i)RDitU)jY~*UxaOj$oFXWt%%foyxs{|DST?o4dZOr0j^Bz<{jSYTdeBp{8uOlt#XnGpS=Wb>5_9^0te^w4&m%U)GbL#d*K4jibYFjG1t{oM
5MXPoaQAcE87S(z$rSxv%YtmBo&q+LDaamy4`pnx<l{woH+kQGRtscBj&Yy1Qi5vAD*OqSl6%&8TVOfr+C<p1oFm%2R!?NM(>UbhNpKsLpuQ#h<dZWaO2
Gt($SbZhEjmg|}N$xLatXQe~7bn!D15nB$Mj@rvJ?cF3=8uzXs}bZDqzZIfkTjTK_3S86Rk""",
}


def picture(height, width):
    """Waves and harsh noise: the case where roundings between two passes would show."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + k) * np.cos(y / 5 - k) for k in range(3)], -1) * 90 + 128
    noise = np.random.Generator(np.random.PCG64(0)).normal(0, 25, (height, width, 3))
    return torch.from_numpy((waves + noise).clip(0, 255).astype(np.uint8))


def moving(frames=4, height=36, width=64):
    return [picture(height, width).roll(i, dims=1) for i in range(frames)]


@pytest.mark.parametrize("sizes", CV2, ids=str)
def test_evaluation_preprocessing_equals_opencv(sizes):
    height, width, size = sizes
    expected = np.frombuffer(base64.b85decode("".join(CV2[sizes].split())), np.uint8).reshape(size, size, 3)
    frames = EvalTransform(size)([picture(height, width)] * 2)
    assert frames.shape == (2, 3, size, size) and frames.dtype == torch.uint8
    assert np.abs(frames[1].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_evaluation_preprocessing_is_a_bicubic_without_antialias():
    frame = picture(72, 128)
    planes = frame.permute(2, 0, 1)[None].float()
    expected = functional.interpolate(planes, size=(14, 14), mode="bicubic", antialias=False).round().clamp(0, 255)
    assert (EvalTransform(14)([frame]) - expected).abs().max() <= 1


def test_evaluation_preprocessing_takes_rotated_frames_and_starts_no_thread():
    wide = picture(720, 1280)
    upright = wide.transpose(0, 1)
    before = len(os.listdir("/proc/self/task"))
    assert torch.equal(EvalTransform(224)([upright]), EvalTransform(224)([upright.contiguous()]))
    assert len(os.listdir("/proc/self/task")) == before


def test_fast_resize_is_close_on_smooth_pictures():
    y, x = np.mgrid[:72, :128]
    smooth = torch.from_numpy(np.stack([x + y, 2 * y, 200 - x], -1).astype(np.uint8))
    difference = resize(smooth[None], 28, 28)[0].int() - EvalTransform(28)([smooth])[0].permute(1, 2, 0).int()
    assert difference.abs().max() <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Padding


def draws(kind, width=64, tries=200):
    """(rng, padded) for draws of one kind of padding over frames of 36 x 64."""
    frames = torch.stack(moving())
    for seed in range(tries):
        if PADDINGS[np.random.default_rng(seed).integers(len(PADDINGS))] == kind:
            yield frames, pad_wide(frames, width, np.random.default_rng(seed))


def test_paddings_are_drawn_as_published():
    assert [PADDINGS.count(k) for k in ("none", "black", "colour", "reflect", "replicate")] == [5, 2, 1, 2, 2]
    rng, counts = np.random.default_rng(0), np.zeros(2)
    for _ in range(2000):
        counts[int(pad_wide(torch.zeros(1, 36, 64, 3, dtype=torch.uint8), 64, rng).shape[1] > 36)] += 1
    assert counts[1] / 2000 == pytest.approx(7 / 12, abs=0.05)


@pytest.mark.parametrize("kind", ["black", "colour", "reflect", "replicate"])
def test_padding_keeps_the_picture_and_fills_above_and_below(kind):
    heights, tops = [], []
    for frames, padded in draws(kind):
        extra = padded.shape[1] - 36
        top = next(t for t in range(extra + 1) if torch.equal(padded[:, t : t + 36], frames))
        heights.append(extra)
        tops.append(top)
        above = padded[:, :top]
        if kind == "black":
            assert not above.any()
        elif kind == "colour":
            assert len({tuple(p) for p in above.reshape(-1, 3).tolist()}) <= 1
        elif kind == "replicate":
            assert torch.equal(above, frames[:, :1].expand_as(above))
        elif top:
            mirrored = frames[:, 1 : top + 1].flip(1)
            assert (above <= (mirrored * 0.7).ceil()).all()
    assert min(heights) >= 0 and max(heights) <= 64 - 36 and max(tops) <= (64 - 36) / 2
    assert len(set(heights)) > 5 and len(set(tops)) > 4


def test_padding_goes_by_the_width_before_squashing():
    """Frames are squashed to the output width first; the padding is still that of the wide frame."""
    for _, padded in draws("black", width=360):
        assert padded.shape[1] - 36 <= 324
    assert max(padded.shape[1] - 36 for _, padded in draws("black", width=360)) > 64 - 36


def test_frames_that_are_not_wide_are_never_padded():
    frames = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    assert all(pad_wide(frames, 64, np.random.default_rng(s)) is frames for s in range(50))


# ----------------------------------------------------------------------------------------------------------------------
# RandAugment


def test_policy_is_parsed_as_in_the_reference():
    reference = golden("augment")["rand_augment"]
    policy = timm_policy("rand-m6-n3-mstd0.5-inc1", "bicubic")
    assert policy.num_layers == reference["num_layers"] == 3 and policy.choice_weights is reference["weights"] is None
    assert [op.name for op in policy.ops] == reference["drive_ops"] == DRIVING_OPS
    for op, expected in zip(policy.ops, reference["parsed"], strict=True):
        assert (op.prob, op.magnitude, op.magnitude_std) == (expected["prob"], expected["magnitude"], expected["std"])
        assert op.kwargs == {"fillcolor": tuple(expected["fill"]), "resample": expected["resample"]}
    named = {op.name: op for op in policy.ops}
    for level in reference["levels"]:
        for name, key in (("Rotate", "rotate_abs_deg"), ("ShearX", "shear_abs"), ("Brightness", "enhance")):
            (value,) = named[name].level_fn(level["m"], {})
            assert abs(value) == pytest.approx(level[key])


@pytest.mark.parametrize("policy", ["rand-m6-n3-w0", "augmix-m3", "rand-m11-n2", "rand-m6-n0", "rand-m6-x", "random"])
def test_policies_that_do_not_parse_are_refused(policy):
    with pytest.raises(ValueError, match=policy):
        FinetuneTransform(32, aa=policy)


def test_all_frames_get_the_same_operations():
    transform = FinetuneTransform(32, aa="rand-m9-n3-mstd0.5", erase_prob=0)
    frames, width = transform.shrink([picture(36, 64)] * 5)
    changed = 0
    for seed in range(30):
        video, _ = transform.augment(frames, width, np.random.default_rng(seed))
        assert all(torch.equal(video[:, 0], video[:, t]) for t in range(1, 5))
        plain, _ = FinetuneTransform(32, aa="none", erase_prob=0).augment(frames, width, np.random.default_rng(seed))
        changed += not torch.equal(video, plain)
    assert changed > 15


def test_augmentation_depends_on_the_generator_alone():
    transform = FinetuneTransform(32)
    frames, width = transform.shrink(moving())
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = [transform.augment(frames, width, np.random.default_rng(s)) for s in range(6)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # timm's draws leave no trace
    random.seed(2)
    np.random.seed(2)
    second = [transform.augment(frames, width, np.random.default_rng(s)) for s in range(6)]
    assert all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))
    assert len({video.sum().item() for video, _ in first}) > 1
    assert first[0][0].shape == (3, 4, 32, 32) and first[0][0].dtype == torch.uint8


def test_short_side_scales_frames_before_padding():
    frames, width = FinetuneTransform(32, short_side=18).shrink(moving())
    assert frames.shape == (4, 18, 32, 3) and width == 32
    frames, width = FinetuneTransform(32).shrink(moving())
    assert frames.shape == (4, 36, 32, 3) and width == 64
    with pytest.raises(DataError, match="different sizes"):
        FinetuneTransform(32).shrink([picture(36, 64), picture(20, 64)])


# ----------------------------------------------------------------------------------------------------------------------
# Erasing


def test_erasing_boxes_follow_the_published_distribution():
    rng, areas, aspects, erased = np.random.default_rng(0), [], [], 0
    for _ in range(4000):
        (box,) = draw_erasing(224, rng, prob=0.25, count=1, max_area=0.1).tolist()
        top, left, height, width = box
        erased += height > 0
        if height:
            assert top + height <= 224 and left + width <= 224
            areas.append(height * width / 224**2)
            aspects.append(height / width)
    assert erased / 4000 == pytest.approx(0.25, abs=0.03)
    assert min(areas) > 0.015 and max(areas) < 0.105
    assert min(aspects) < 0.1 and max(aspects) > 10
    counts = [int((draw_erasing(224, rng, prob=1, count=3, max_area=0.3)[:, 2] > 0).sum()) for _ in range(200)]
    assert set(counts) == {1, 2, 3}
    shared = [draw_erasing(224, rng, prob=1, count=3, max_area=0.3) for _ in range(200)]
    assert max(int((boxes[:, 2] * boxes[:, 3]).sum()) for boxes in shared) < 0.32 * 224**2


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erased_boxes_are_filled(mode):
    to_input = NormalizeAndErase(lambda video: video / 127.5 - 1, mode)
    video = torch.full((2, 3, 4, 16, 16), 255, dtype=torch.uint8)
    boxes = torch.tensor([[[2, 3, 5, 6]], [[0, 0, 0, 0]]])
    seeds = torch.tensor([7, 8])
    out = to_input(video, boxes, seeds)
    box = out[0, :, :, 2:7, 3:9].clone()
    assert (out[1] == 1).all()  # no box, no change
    rest = out[0].clone()
    rest[:, :, 2:7, 3:9] = 1
    assert (rest == 1).all()
    if mode == "const":
        assert not box.any()
    elif mode == "rand":
        assert (box == box[:, :1, :1, :1]).all() and box[:, 0, 0, 0].unique().numel() == 3
    else:
        assert box.std() == pytest.approx(1, abs=0.2) and not torch.equal(box[:, 0], box[:, 1])
    torch.testing.assert_close(out, to_input(video, boxes, seeds))  # the noise is the sample's own


# ----------------------------------------------------------------------------------------------------------------------
# DAPT


@pytest.mark.parametrize(
    "case",
    golden("augment")["multi_scale_crop"],
    ids=lambda c: f"{c['scales_name']}-{'x'.join(map(str, c['image_wh']))}",
)
def test_crops_are_the_reference_s(case):
    width, height = case["image_wh"]
    scales = {"default": SCALES, "light": ALIGNED_SCALES}[case["scales_name"]]
    assert list(scales) == case["scales"]
    sizes = crop_sizes(min(width, height), case["input"], scales)
    assert [list(s) for s in sizes] == case["pairs_wh"] and len(sizes) == case["n_pairs"]
    assert case["offsets_examples"]
    for name, expected in case["offsets_examples"].items():
        w, h = map(int, name.split("x"))
        assert [list(o) for o in crop_offsets(width - w, height - h)] == expected


def test_crops_reach_every_size_and_place():
    clip = torch.arange(64 * 96, dtype=torch.float32).view(1, 64, 96, 1).expand(2, 64, 96, 3)
    clip = (clip / clip.max() * 255).byte()
    crops = {multi_scale_crop(clip, 48, (1, 0.75), np.random.default_rng(s)).numpy().tobytes() for s in range(800)}
    sizes = crop_sizes(64, 48, (1, 0.75))
    assert sizes == [(64, 64), (48, 64), (64, 48), (48, 48)]
    places = sum(len(set(crop_offsets(96 - w, 64 - h))) for w, h in sizes)
    assert len(crops) > 0.8 * places


def test_a_crop_of_the_output_size_is_not_touched():
    clip = torch.randint(256, (2, 60, 80, 3), dtype=torch.uint8)
    crop = multi_scale_crop(clip, 60, (1,), np.random.default_rng(0))
    lefts = [x for x, _ in crop_offsets(20, 0)]
    assert any(torch.equal(crop, clip[:, :, x : x + 60]) for x in lefts)


def test_resized_crops_are_pillow_s():
    clip = torch.stack(moving(2, 50, 70))
    crop = multi_scale_crop(clip, 32, (1,), np.random.default_rng(1))
    best = min(
        np.abs(np.asarray(Image.fromarray(clip[0, :, x : x + 50].numpy()).resize((32, 32), Image.BILINEAR), dtype=int)
               - crop[0].numpy()).max()
        for x, _ in crop_offsets(20, 0)
    )  # fmt: skip
    assert best <= 1


def pretrain(**kwargs):
    options = {"grid": (2, 4, 4), "mask_ratio": 0.75, "short_side": 40} | kwargs
    return PretrainTransform(32, **options)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", [(36, 64), (90, 50), (20, 30)])
def test_pretraining_samples(aligned, shape):
    frames = moving(4, *shape)
    sample = pretrain(aligned=aligned)(frames, np.random.default_rng(0))
    assert sample["video"].shape == (1, 3, 4, 32, 32) and sample["video"].dtype == torch.uint8
    assert sample["mask"].shape == (1, 32) and sample["mask"].dtype == torch.bool and sample["mask"].sum() == 24
    again = pretrain(aligned=aligned)(frames, np.random.default_rng(0))
    other = pretrain(aligned=aligned)(frames, np.random.default_rng(1))
    assert all(torch.equal(sample[k], again[k]) for k in sample)
    assert not torch.equal(sample["video"], other["video"]) and not torch.equal(sample["mask"], other["mask"])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", [(30, 60), (31, 31), (31, 90), (33, 32)])
def test_frames_a_pixel_or_two_off_the_output_size(aligned, shape):
    for seed in range(40):
        sample = pretrain(aligned=aligned, enlarge=False)(moving(2, *shape), np.random.default_rng(seed))
        assert sample["video"].shape == (1, 3, 2, 32, 32)


def test_the_augmentation_is_the_same_for_all_frames_of_a_clip():
    still = [picture(36, 64)] * 4
    for seed in range(12):
        video = pretrain()(still, np.random.default_rng(seed))["video"][0]
        assert all(torch.equal(video[:, 0], video[:, t]) for t in range(4))


def test_seven_clips_of_ten_are_rand_augmented(monkeypatch):
    transform, calls = pretrain(), []
    monkeypatch.setattr(transform, "rand_augment", lambda clip, rng: calls.append(tuple(clip.shape)) or clip)
    for seed in range(300):
        transform([picture(36, 64)] * 2, np.random.default_rng(seed))
    assert 0.63 < len(calls) / 300 < 0.77 and set(calls) == {(2, 40, 40, 3)}  # on the square, before the crop
    assert pretrain(aa="none").rand_augment is None and pretrain(aligned=False).rand_augment is None


def test_small_frames_are_enlarged_or_not():
    small = [picture(20, 30)]
    assert pretrain()._shrink(small[0]).shape == (40, 60, 3)
    assert pretrain(enlarge=False)._shrink(small[0]).shape == (20, 30, 3)
    assert pretrain(enlarge=False)._shrink(picture(80, 120)).shape == (40, 60, 3)


def test_colours_keep_their_order():
    red = torch.zeros(36, 64, 3, dtype=torch.uint8)
    red[..., 0] = 200
    video = pretrain(aa="none")([red] * 2, np.random.default_rng(5))["video"][0]
    assert video[0].float().mean() > 100 and video[1:].float().mean() < 60


def test_pretraining_refuses():
    with pytest.raises(ValueError, match="some must be masked"):
        pretrain(mask_ratio=0.0)
    with pytest.raises(ValueError, match="--aa 'rand-q1'"):
        pretrain(aa="rand-q1")
    with pytest.raises(DataError, match="different sizes"):
        pretrain()([picture(36, 64), picture(36, 36)], np.random.default_rng(0))
