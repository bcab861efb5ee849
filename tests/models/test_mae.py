import numpy as np
import pytest
import torch
from helpers import golden, golden_input, published_file

from models import classifier_of, create_model, list_models, masked_autoencoder_of, model_defaults
from models.mae import MaskedAutoencoder
from models.weights import CheckpointError, load_pretrained

TINY = "pretrain_videomae_tiny_patch16_64"
DEFAULTS = model_defaults(TINY)


def tiny(**kwargs):
    torch.manual_seed(0)
    return create_model(TINY, **kwargs).eval()


def tube(grid=(2, 4, 4), masked=12, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    frames = np.zeros((batch, grid[1] * grid[2]), bool)
    for frame in frames:
        frame[rng.choice(frames.shape[1], masked, replace=False)] = True
    return torch.from_numpy(np.tile(frames, (1, grid[0])))


def clips(batch=2, size=64, frames=4):
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------------------
# Golden


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base"])
def test_published_pretraining_checkpoints_give_the_reference_loss(size, tmp_path):
    fixture = next(f for f in golden("models_videomae")["fixtures"] if f["name"] == f"videomae_pretrain_{size}")
    model = create_model(f"pretrain_videomae_{size}_patch16_224", drop_path_rate=0.0)
    assert [[k, list(v.shape)] for k, v in sorted(model.state_dict().items())] == sorted(fixture["checkpoint"]["keys"])
    assert sum(p.numel() for p in model.decoder.parameters()) == fixture["param_counts"]["decoder"]
    report = load_pretrained(model, str(published_file(tmp_path / "published.pth", fixture)))
    assert len(report.loaded) == len(fixture["checkpoint"]["keys"]) and not report.ignored + report.missing

    frame = torch.zeros(196, dtype=torch.bool)
    frame[fixture["mask"]["masked_idx_per_frame_sorted"]] = True
    video, mask = golden_input(), frame.tile(8)[None]
    expected = fixture["expected"]
    target, predicted = model.target(video, mask), model.predict(video, mask)
    for name, value in (("decoder_output", predicted), ("targets", target)):
        assert list(value.shape) == expected[name]["shape"]
        value = value.detach()
        np.testing.assert_allclose(value.flatten()[:16], expected[name]["first16"], atol=1e-5)
        np.testing.assert_allclose(value[0, -1, -16:], expected[f"{name}[0,-1,-16:]"], atol=1e-5)
        assert value.double().mean().item() == pytest.approx(expected[name]["mean"], abs=1e-6)
        assert value.double().std(correction=0).item() == pytest.approx(expected[name]["std_ddof0"], abs=1e-6)
    loss = model(video, mask)
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-5)
    loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert len(expected["grad_l2"]) >= 10
    for name, norm in expected["grad_l2"].items():
        assert gradients[name] == pytest.approx(norm, rel=2e-4), name


def test_the_target_is_the_reference_s():
    known = golden("dapt_target")
    pixels = np.random.Generator(np.random.PCG64(31)).random((2, 3, 4, 32, 32)).astype(np.float32)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (DEFAULTS.mean, DEFAULTS.std))
    video = (torch.from_numpy(pixels) - mean) / std
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool).tile(1, 2)
    model = create_model(TINY, input_size=32)
    target = model.target(video, mask)
    assert list(target.shape) == known["labels_shape"]
    np.testing.assert_allclose(target.flatten()[:6], known["first6"], atol=1e-5)
    np.testing.assert_allclose(target.flatten()[-3:], known["last3"], atol=1e-5)
    assert target[0, 3, 700].item() == pytest.approx(known["label_0_3_700"], abs=1e-5)
    assert target.square().mean().item() == pytest.approx(known["mse_vs_zeros"], abs=1e-6)
    assert model.trivial_loss(target).item() == pytest.approx(known["mse_vs_zeros"], abs=1e-6)
    line = torch.linspace(-1, 1, target.numel()).view_as(target)
    assert (target - line).square().mean().item() == pytest.approx(known["mse_vs_linspace"], abs=1e-6)

    plain = create_model(TINY, input_size=32, normalize_target=False)
    target = plain.target(video, mask)
    np.testing.assert_allclose(target.flatten()[:6], known["unnormalised_first6"], atol=1e-6)
    assert target.square().mean().item() == pytest.approx(known["mse_unnormalised_vs_zeros"], abs=1e-6)
    assert 0.07 < plain.trivial_loss(target).item() < 0.09  # the variance of uniform pixels, 1 / 12


# ----------------------------------------------------------------------------------------------------------------------
# Behaviour


@pytest.mark.parametrize("name", [n for n in list_models() if n.startswith("pretrain_")])
def test_every_size_wraps_its_encoder(name):
    with torch.device("meta"):
        model = create_model(name)
        encoder = create_model(classifier_of(name), num_classes=0, final_reduction="none")
    assert classifier_of(name) == name.removeprefix("pretrain_").replace("videomae", "vit")
    assert masked_autoencoder_of(classifier_of(name)) == name == masked_autoencoder_of(name)
    assert classifier_of(classifier_of(name)) == classifier_of(name) and model.encoder.name == classifier_of(name)
    assert isinstance(model, MaskedAutoencoder) and type(model.encoder) is type(encoder)
    shapes = {k: v.shape for k, v in encoder.state_dict().items()}
    own = {k.removeprefix("encoder."): v.shape for k, v in model.state_dict().items() if k.startswith("encoder.")}
    assert own == shapes
    size = name.split("_patch")[0].split("_")[-1]
    assert len(model.decoder.blocks) == {"tiny": 1, "large": 12, "huge": 12}.get(size, 4)
    assert model.encoder.grid == encoder.grid and model.pos_embed_kind == encoder.pos_embed_kind


def test_only_visible_pixels_are_seen():
    model, video, mask = tiny(), clips(), tube()
    changed = video.clone()
    cubes = model._cubes(changed)
    cubes[model._where(model.split(mask))] = 9.0  # a view: the masked pixels of `changed`
    assert not torch.equal(changed, video)
    with torch.no_grad():
        assert torch.equal(model.predict(video, mask), model.predict(changed, mask))
        assert not torch.equal(model.target(video, mask), model.target(changed, mask))


def test_masks_of_a_batch_may_differ_and_clips_do_not_mix():
    model, video, mask = tiny(), clips(), tube()
    assert not torch.equal(mask[0], mask[1])
    with torch.no_grad():
        both = model.predict(video, mask)
        for i in range(2):
            torch.testing.assert_close(both[i : i + 1], model.predict(video[i : i + 1], mask[i : i + 1]))


def test_unequal_or_empty_masks_are_refused():
    model, video, mask = tiny(), clips(), tube()
    mask[0, 0] = ~mask[0, 0]
    for wrong in (mask, torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="same number of masked tokens, at least 1"):
            model(video, wrong)


def test_a_mask_split_beforehand_gives_the_same_loss_in_one_graph():
    model, video, mask = tiny(), clips(), tube()
    expected, split = model(video, mask), model.split(mask)
    assert all(torch.equal(positions, (mask == masked).nonzero()[:, 1].view(2, -1))
               for masked, positions in enumerate(split))  # fmt: skip
    assert torch.equal(model(video, split, model.target(video, split)), expected)
    model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model.train()(video, split, model.target(video, split)), expected)


def test_reconstruction_pictures():
    model, mask = tiny(), tube()
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (DEFAULTS.mean, DEFAULTS.std))
    pixels = torch.rand(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(2))
    video = (pixels - mean) / std
    with torch.no_grad():
        model.decoder.head.weight.zero_()  # predicts 0: each cube's own mean
    original, masked, predicted = model.reconstruct(video, mask)
    torch.testing.assert_close(original, pixels, atol=1e-6, rtol=0)
    hidden = mask.view(2, 2, 4, 4).repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    hidden = hidden[:, None].expand_as(pixels)
    assert (masked[hidden] == 0.5).all()
    for picture in (masked, predicted):
        torch.testing.assert_close(picture[~hidden], pixels[~hidden], atol=1e-6, rtol=0)
    cube = predicted[0][:, :2, :16, :16] if hidden[0, 0, 0, 0, 0] else predicted[0][:, :2, 16:32, :16]
    assert hidden[0, 0, 0, 0, 0] or hidden[0, 0, 0, 16, 0]
    assert cube.std(dim=(1, 2, 3)).max() < 1e-5


def test_a_perfect_prediction_reconstructs_the_video(monkeypatch):
    for normalize in (True, False):
        model, mask = tiny(normalize_target=normalize), tube()
        video = clips().clamp(-1.5, 1.5)
        monkeypatch.setattr(model, "predict", model.target)
        original, _, predicted = model.reconstruct(video, mask)
        torch.testing.assert_close(predicted, original, atol=1e-5, rtol=0)
        assert model(video, mask).item() < 1e-12


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = tiny(decoder_depth=2).train()
        model.set_grad_checkpointing(recompute)
        model(clips(), tube()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_learns_eight_fixed_clips_to_half_the_trivial_loss():
    """Clips with structure: moving stripes whose hidden part follows from the visible one."""
    torch.manual_seed(0)
    x = torch.arange(64).view(1, 1, 1, 1, 64) / 64
    y, t = x.transpose(3, 4), torch.arange(4).view(1, 1, 4, 1, 1) / 4
    phase, tilt = torch.rand(8, 3, 1, 1, 1), torch.randint(1, 4, (8, 1, 1, 1, 1))
    video = torch.sin(6.28 * (tilt * x + y + 0.3 * t + phase))
    mask = tube(batch=8)
    model = create_model(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        loss = model(video, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(video, mask).item() < 0.5 * model.trivial_loss(model.target(video, mask)).item()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(tmp_path, state):
    torch.save(state, tmp_path / "file.pth")
    return str(tmp_path / "file.pth")


def test_own_files_go_back_in_and_into_the_classifier(tmp_path):
    model, other = tiny(), create_model(TINY)
    path = save(tmp_path, model.state_dict())
    report = load_pretrained(other, path)
    assert not report.missing + report.ignored and report.dialect == "VideoMAE pre-training"
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())

    classifier = create_model("vit_tiny_patch16_64")
    report = load_pretrained(classifier, path)
    assert report.missing == ["head.weight", "head.bias"]
    assert set(report.ignored) == {k for k in model.state_dict() if not k.startswith("encoder.")}
    assert torch.equal(classifier.fc_norm.weight, model.encoder.norm.weight)
    assert torch.equal(classifier.blocks[3].mlp.fc1.weight, model.encoder.blocks[3].mlp.fc1.weight)


def test_an_encoder_alone_gets_a_fresh_decoder(tmp_path):
    classifier, model = create_model("vit_tiny_patch16_64", num_classes=710), tiny()
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_pretrained(model, save(tmp_path, {"module": classifier.half().state_dict()}))
    assert set(report.missing) == {k for k in fresh if not k.startswith("encoder.")}
    assert report.ignored == ["head.weight", "head.bias"]
    assert all(torch.equal(model.state_dict()[k], fresh[k]) for k in report.missing)
    assert torch.equal(model.encoder.norm.weight, classifier.fc_norm.weight.float())
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, classifier.blocks[0].attn.qkv.weight.float())


def test_what_a_masked_autoencoder_refuses(tmp_path):
    state = tiny(decoder_depth=2).state_dict()
    with pytest.raises(CheckpointError, match="its decoder has 2 blocks, the model's 1; use --decoder_depth 2"):
        load_pretrained(tiny(), save(tmp_path, state))
    for key in ("mask_token", "decoder.blocks.0.norm1.bias", "encoder.norm.bias", "encoder_to_decoder.weight"):
        with pytest.raises(CheckpointError, match=f"lacks 1 tensors the model needs: {key}"):
            load_pretrained(tiny(decoder_depth=2), save(tmp_path, {k: v for k, v in state.items() if k != key}))
    with pytest.raises(CheckpointError, match="no rule .* accounts for: decoder.extra.weight"):
        load_pretrained(tiny(decoder_depth=2), save(tmp_path, state | {"decoder.extra.weight": torch.zeros(2)}))
    with pytest.raises(
        CheckpointError, match="this is pretrain_videomae_tiny_patch16_64, but the model is pretrain_vid"
    ):
        load_pretrained(create_model("pretrain_videomae_small_patch16_224"), save(tmp_path, state))
