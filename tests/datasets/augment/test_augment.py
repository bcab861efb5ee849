import base64
import os
import random

import cv2
import numpy as np
import pytest
import torch
from helpers import golden
from PIL import Image
from torch.nn import functional

from datasets.augment.dapt import ALIGNED_SCALES, SCALES, PretrainTransform
from datasets.augment.device import DeviceAugment, NormalizeAndErase
from datasets.augment.draws import Draws, augmented
from datasets.augment.erasing import draw_erasing
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import (
    PADDINGS,
    EvalTransform,
    Padding,
    crop_offsets,
    crop_sizes,
    draw_crop,
    draw_padding,
    halved,
    padded,
)
from datasets.augment.operations import crop
from datasets.augment.randaugment import DRIVING_OPS, NO_OP, timm_policy
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


def through(transform, frames, seed=0, **options):
    """(video uint8 (V, T, S, S, 3), what was drawn) of frames that a reader hands over at full size."""
    out = torch.zeros(transform.shape(len(frames)), dtype=torch.uint8)
    drawn = transform(lambda _: frames, np.random.default_rng(seed), out, **options)
    return out, drawn


def test_frames_are_halved_as_long_as_enough_is_left():
    assert halved(720, 1280, 224) == (360, 640) and halved(1080, 1920, 224) == (270, 480)
    assert halved(447, 900, 224) == (447, 900) and halved(449, 897, 224) == (225, 449)
    assert halved(2160, 3840, 224) == (270, 480) and halved(100, 100, 224) == (100, 100)


def test_evaluation_preprocessing_is_a_bicubic_without_antialias():
    frame = picture(72, 128)
    planes = frame.permute(2, 0, 1)[None].float()
    expected = functional.interpolate(planes, size=(14, 14), mode="bicubic", antialias=False).round().clamp(0, 255)
    assert (EvalTransform(14)([frame]) - expected).abs().max() <= 1


def test_evaluation_preprocessing_takes_rotated_frames_and_starts_no_thread():
    wide = picture(720, 1280)
    upright, copied = wide.transpose(0, 1), wide.transpose(0, 1).contiguous()
    before = len(os.listdir("/proc/self/task"))
    small = EvalTransform(224)([upright]), EvalTransform(224)([copied])
    assert len(os.listdir("/proc/self/task")) == before
    assert torch.equal(*small)


# ----------------------------------------------------------------------------------------------------------------------
# Padding


def paddings(kind, width=64, tries=200):
    """Draws of one kind of padding of frames of 36 x width."""
    for seed in range(tries):
        if PADDINGS[np.random.default_rng(seed).integers(len(PADDINGS))] == kind:
            yield draw_padding(36, width, np.random.default_rng(seed))


def test_paddings_are_drawn_as_published():
    assert [PADDINGS.count(k) for k in ("none", "black", "colour", "reflect", "replicate")] == [5, 2, 1, 2, 2]
    rng = np.random.default_rng(0)
    drawn = [draw_padding(36, 64, rng) for _ in range(2000)]
    assert np.mean([p.kind != "none" for p in drawn]) == pytest.approx(7 / 12, abs=0.05)
    assert np.mean([p.top for p in drawn if p.kind != "none"]) == pytest.approx(0.25 * 28 / 36, abs=0.02)


@pytest.mark.parametrize("kind", ["black", "colour", "reflect", "replicate"])
def test_padding_keeps_the_picture_and_fills_above_and_below(kind):
    frame, heights, tops = picture(36, 64).numpy(), set(), set()
    for padding in paddings(kind):
        top, bottom = round(padding.top * 36), round(padding.bottom * 36)
        result = padded(frame, padding)
        assert result.shape == (top + 36 + bottom, 64, 3) and np.array_equal(result[top : top + 36], frame)
        above, below = result[:top], result[top + 36 :]
        if kind in ("black", "colour"):
            assert {tuple(p) for p in np.concatenate([above, below]).reshape(-1, 3).tolist()} <= {padding.colour}
        elif kind == "replicate":
            assert (above == frame[:1]).all() and (below == frame[-1:]).all()
        else:  # the edge row comes again first: OpenCV's BORDER_REFLECT, as published
            mirrored = np.concatenate([frame[:top][::-1], frame[36 - bottom :][::-1]]) * padding.brightness
            assert np.abs(np.concatenate([above, below]) - mirrored).max(initial=0) <= 0.5 + 1e-4
            assert padding.brightness < 0.7
        heights.add(top + bottom)
        tops.add(top)
    assert max(heights) <= 64 - 36 and max(tops) <= (64 - 36) / 2 and len(heights) > 5 and len(tops) > 4


def test_padding_of_reduced_frames_is_the_same_share():
    half = padded(np.zeros((18, 32, 3), np.uint8), Padding("colour", 10 / 36, 4 / 36, colour=(9, 9, 9)))
    assert half.shape == (5 + 18 + 2, 32, 3) and (half[:5] == 9).all() and not half[5:23].any()


def test_frames_that_are_not_wide_are_never_padded():
    assert all(draw_padding(64, 64, np.random.default_rng(s)) == Padding() for s in range(50))


def test_frames_stored_squashed_are_padded_as_filmed():
    """Of a pack: 36 x 32, filmed at 36 x 64."""
    options = {"aa": "none", "erase_prob": 0}
    for seed in range(20):
        wide, squashed = picture(36, 64), torch.from_numpy(cv2.resize(picture(36, 64).numpy(), (32, 36)))
        rows = [through(FinetuneTransform(32, **options), [f], seed, aspect=a)[0][0, 0].any(-1).any(-1)
                for f, a in ((wide, None), (squashed, 64 / 36))]  # fmt: skip
        assert torch.equal(*rows)
        a, b = (
            through(pretrain(aa="none", here=False), [f] * 2, seed, aspect=a)[1]["crop"]
            for f, a in ((wide, None), (squashed, 64 / 36))
        )
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# RandAugment (what its operations do: test_operations.py)


def test_policy_is_parsed_as_in_the_reference():
    reference = golden("augment")["rand_augment"]
    policy = timm_policy("rand-m6-n3-mstd0.5-inc1", img_mean=(128, 128, 128), interpolation=Image.BICUBIC)
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
    transform, changed = FinetuneTransform(32, aa="rand-m9-n3-mstd0.5", erase_prob=0), 0
    for seed in range(30):
        video, _ = through(transform, [picture(36, 64)] * 5, seed)
        assert all(torch.equal(video[:, 0], video[:, t]) for t in range(1, 5))
        plain, _ = through(FinetuneTransform(32, aa="none", erase_prob=0), [picture(36, 64)] * 5, seed)
        changed += not torch.equal(video, plain)
    assert changed > 15


def test_augmentation_depends_on_the_generator_alone():
    transform = FinetuneTransform(32)
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = [through(transform, moving(), s) for s in range(6)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # timm's draws leave no trace
    random.seed(2)
    np.random.seed(2)
    second = [through(transform, moving(), s) for s in range(6)]
    for (a, drawn), (b, again) in zip(first, second, strict=True):
        assert torch.equal(a, b) and all(torch.equal(drawn[k], again[k]) for k in drawn)
    assert len({video.sum().item() for video, _ in first}) > 1
    assert first[0][0].shape == (1, 4, 32, 32, 3)


@pytest.mark.parametrize("kind", ["fine-tuning", "DAPT", "VideoMAE"])
def test_the_device_does_what_the_worker_would_have_done(kind):
    make = {
        "fine-tuning": lambda here: FinetuneTransform(32, views=3, here=here),
        "DAPT": lambda here: pretrain(here=here),
        "VideoMAE": lambda here: pretrain(here=here, aligned=False),
    }[kind]
    left = 0
    for seed in range(25):
        (done, drawn), (raw, draws) = (through(make(here), moving(), seed) for here in (True, False))
        left += (draws["ops"] != NO_OP).any().item()
        assert (drawn["ops"] == NO_OP).all() and (drawn["crop"] == torch.tensor([0, 0, 32, 32])).all()
        assert all(torch.equal(drawn[k], draws[k]) for k in drawn.keys() - {"ops", "levels", "crop", "side"})
        a, b = (DeviceAugment(32)(*pair) for pair in ((done, drawn), (raw, draws)))
        assert torch.equal(a, b) and a.shape[1:] == (3, 4, 32, 32)
        assert torch.equal(a, done[:, :, :32, :32].permute(0, 4, 1, 2, 3))
    assert (left > 10) == (kind != "VideoMAE")


def test_what_was_drawn_is_done_in_order_then_cropped():
    clip = torch.stack(moving(2, 50, 50))
    drawn = Draws(40, np.array([DRIVING_OPS.index("Invert"), NO_OP]), np.zeros(2), (3, 5, 30, 32))
    assert torch.equal(augmented(clip, drawn, 24, "bicubic"), crop(255 - clip[:, :40, :40], (3, 5, 30, 32), 24))


def test_short_side_scales_frames_before_padding():
    small = [torch.from_numpy(cv2.resize(f.numpy(), (32, 18), interpolation=cv2.INTER_CUBIC)) for f in moving()]
    for seed in range(8):
        video, _ = through(FinetuneTransform(32, short_side=18, aa="none"), moving(), seed)
        assert torch.equal(video, through(FinetuneTransform(32, aa="none"), small, seed)[0])
    with pytest.raises(DataError, match="different sizes"):
        through(FinetuneTransform(32), [picture(36, 64), picture(20, 64)])


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
    boxes = {draw_crop(64, 96, 48, (1, 0.75), np.random.default_rng(s)) for s in range(800)}
    sizes = crop_sizes(64, 48, (1, 0.75))
    assert sizes == [(64, 64), (48, 64), (64, 48), (48, 48)]
    assert len(boxes) > 0.8 * sum(len(set(crop_offsets(96 - w, 64 - h))) for w, h in sizes)
    assert all(t + h <= 64 and left + w <= 96 and (w, h) in sizes for t, left, h, w in boxes)


def test_a_crop_of_the_output_size_is_not_touched():
    clip = torch.randint(256, (2, 60, 80, 3), dtype=torch.uint8)
    assert torch.equal(crop(clip, (0, 13, 60, 60), 60), clip[:, :, 13:73])


def test_resized_crops_are_pillow_s():
    clip = torch.stack(moving(2, 50, 70))
    expected = Image.fromarray(clip[1, :, 7:57].numpy()).resize((32, 32), Image.BILINEAR)
    assert np.abs(np.asarray(expected, dtype=int) - crop(clip, (0, 7, 50, 50), 32)[1].numpy()).max() <= 1


def pretrain(**kwargs):
    options = {"grid": (2, 4, 4), "mask_ratio": 0.75, "short_side": 40} | kwargs
    return PretrainTransform(32, **options)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", [(36, 64), (90, 50), (20, 30)])
def test_pretraining_samples(aligned, shape):
    frames = moving(4, *shape)
    video, drawn = through(pretrain(aligned=aligned), frames)
    side = 40 if aligned else 32
    assert video.shape == (1, 4, side, side, 3)
    assert drawn["mask"].shape == (1, 32) and drawn["mask"].dtype == torch.bool and drawn["mask"].sum() == 24
    again, other = (through(pretrain(aligned=aligned), frames, seed) for seed in (0, 1))
    assert torch.equal(video, again[0]) and all(torch.equal(drawn[k], again[1][k]) for k in drawn)
    assert not torch.equal(video, other[0]) and not torch.equal(drawn["mask"], other[1]["mask"])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", [(30, 60), (31, 31), (31, 90), (33, 32)])
def test_frames_a_pixel_or_two_off_the_output_size(aligned, shape):
    for seed in range(40):
        video, drawn = through(pretrain(aligned=aligned, enlarge=False, here=False), moving(2, *shape), seed)
        assert DeviceAugment(32)(video, drawn).shape == (1, 3, 2, 32, 32)


def test_the_augmentation_is_the_same_for_all_frames_of_a_clip():
    for seed in range(12):
        video, _ = through(pretrain(), [picture(36, 64)] * 4, seed)
        assert all(torch.equal(video[:, 0], video[:, t]) for t in range(4))


def test_seven_clips_of_ten_are_rand_augmented(monkeypatch):
    transform, calls = pretrain(), []
    monkeypatch.setattr(Draws, "of", lambda policy, side, rng: calls.append((policy, side, rng)) or Draws(
        side, np.full(1, NO_OP), np.zeros(1), (0, 0, side, side)))  # fmt: skip
    for seed in range(300):
        through(transform, [picture(36, 64)] * 2, seed)
    assert 0.63 < sum(rng is not None for *_, rng in calls) / 300 < 0.77
    assert {(policy, side) for policy, side, _ in calls} == {(transform.rand_augment, 40)}  # on the square, uncropped
    assert pretrain(aa="none").rand_augment is None


def test_draws_of_a_mix_have_one_shape():
    """A batch holds clips of data sets that are aligned and of others that are not."""
    drawn = [through(pretrain(aligned=a, here=False), moving(), seed)[1] for a in (True, False) for seed in range(9)]
    assert len({tuple((k, v.shape, v.dtype) for k, v in sorted(d.items())) for d in drawn}) == 1
    assert all((d["ops"] == NO_OP).all() for d in drawn[9:])


def test_small_frames_are_enlarged_or_not():
    small = [picture(20, 30)]
    assert through(pretrain(here=False), small * 2)[1]["side"].tolist() == [40]
    assert through(pretrain(enlarge=False, here=False), small * 2)[1]["side"].tolist() == [20]
    assert through(pretrain(enlarge=False, here=False), [picture(80, 120)] * 2)[1]["side"].tolist() == [40]


@pytest.mark.parametrize("aligned", [True, False])
def test_reduced_frames_give_the_same_clip(aligned):
    """A reader may hand over pictures at half their size; what is drawn and where it lands stays."""
    y, x = np.mgrid[:144, :256]
    smooth = np.stack([x // 2 + y // 4, y, 200 - x // 2], -1).astype(np.uint8)
    half = torch.from_numpy(cv2.resize(smooth, (128, 72), interpolation=cv2.INTER_AREA))

    def reduced(fit):
        assert fit(144, 256) in ((72, 128), (36, 64))  # by the short side of the recipe
        return [half] * 2

    for make in (lambda: FinetuneTransform(32, aa="none"), lambda: pretrain(aa="none", aligned=aligned)):
        differences = []
        for seed in range(15):
            whole, drawn = through(make(), [torch.from_numpy(smooth)] * 2, seed)
            out = torch.zeros_like(whole)
            again = make()(reduced, np.random.default_rng(seed), out)
            assert all(torch.equal(drawn[k], again[k]) for k in drawn)
            differences.append((whole.int() - out.int()).abs().float().mean().item())
        assert np.median(differences) < 1 and max(differences) < 5  # the edge of a border may be half a row off
    with pytest.raises(AssertionError):
        FinetuneTransform(32, decoding="full")(reduced, np.random.default_rng(0), out)


@pytest.mark.parametrize("make", [FinetuneTransform, lambda size: pretrain()])
def test_sizes_of_one_clip_are_not_taken_for_those_of_the_next(make):
    """A reader of JPEGs says how large they are, one of videos does not."""
    transform = make(32)
    expected, drawn = through(transform, moving())
    out = torch.zeros(transform.shape(1), dtype=torch.uint8)
    transform(lambda fit: fit(999, 400) and [picture(64, 64)], np.random.default_rng(0), out)
    again, redrawn = through(transform, moving())
    assert torch.equal(expected, again) and all(torch.equal(drawn[k], redrawn[k]) for k in drawn)


def test_colours_keep_their_order():
    red = torch.zeros(36, 64, 3, dtype=torch.uint8)
    red[..., 0] = 200
    for make in (pretrain, lambda aa: FinetuneTransform(32, aa=aa)):
        video = through(make(aa="none"), [red] * 2, 5)[0].float()
        assert video[..., 0].mean() > 100 and video[..., 1:].mean() < 60


def test_pretraining_refuses():
    with pytest.raises(ValueError, match="some must be masked"):
        pretrain(mask_ratio=0.0)
    with pytest.raises(ValueError, match="--aa 'rand-q1'"):
        pretrain(aa="rand-q1")
    with pytest.raises(DataError, match="different sizes"):
        through(pretrain(), [picture(36, 64), picture(36, 36)])
