import numpy as np
import pytest
import torch

from datasets.faults import Fault
from datasets.stream import WindowBatch
from engine.features import extract
from models import create_model

VIDEO = torch.randint(256, (7, 3, 4, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLIP, LAST = np.array([2, 2, 0, 0, 0, 1, 1]), np.array([3, 4, 8, 5, 6, 4, 3])


class Listed:
    """Windows that are VIDEO, in two batches of which the second is padded, and a fault."""

    clips, device = [None] * 4, torch.device("cpu")

    def batches(self, normalize):
        yield WindowBatch(CLIP[:4], LAST[:4], normalize(VIDEO[:4]))
        yield Fault(3, "broken", "no such file")
        yield WindowBatch(CLIP[4:], LAST[4:], normalize(VIDEO[[4, 5, 6, 6]]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_64").train()


def test_pooled_features_are_those_the_head_gets_sorted_by_clip_and_frame(model):
    found = extract(model, Listed())
    assert found.clip.tolist() == [0, 0, 0, 1, 1, 2, 2] and found.frame.tolist() == [5, 6, 8, 3, 4, 3, 4]
    assert [fault.name for fault in found.faults] == ["broken"]
    assert model.training, "the mode is as it was"
    model.eval()
    with torch.no_grad():
        expected = model.forward_features(model.normalize(VIDEO[[3, 4, 2, 6, 5, 0, 1]]))
    model.train()
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)
    assert not found.values.is_inference(), "a probe may be fitted to them"


def test_tokens_of_a_masked_autoencoders_encoder_are_averaged():
    torch.manual_seed(0)
    encoder = create_model("pretrain_videomae_tiny_patch16_64").encoder.eval()
    found = extract(encoder, Listed())
    with torch.no_grad():
        tokens = encoder.forward_features(encoder.normalize(VIDEO[[3, 4, 2, 6, 5, 0, 1]]))
    torch.testing.assert_close(found.values, tokens.mean(dim=1), rtol=1e-5, atol=1e-5)


def test_a_share_without_windows_has_no_features(model):
    class Empty(Listed):
        def batches(self, normalize):
            yield from ()

    found = extract(model, Empty())
    assert len(found.clip) == len(found.values) == 0
