"""Features on disk: what is made when, what is read, damage, and what cannot be read."""

import dataclasses
import errno
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ALONE

from datasets.clips import Clip, ClipTable, DataError
from datasets.faults import Fault, agree_on_faults
from datasets.stream import WindowBatch
from engine import feature_cache
from engine.checkpoint import CheckpointWriteError
from engine.evaluate import Scorer
from engine.feature_cache import FeatureCache, FromFeatures, encoder_digest
from models import create_model
from utils.cli import ConfigError
from utils.signals import Preempted

COUNTS = (3, 0, 5, 1, 2)  # windows of each clip
CLIPS = ClipTable("DoTA", "val", [Clip(f"c{i}", "", 9, 10.0, labels=np.zeros(9, np.uint8)) for i in range(5)])
PICTURES = torch.randint(256, (5, 9, 3, 4, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Made:
    """Windows of PICTURES that end on frames 4, 5, ... of each clip; says which clips it was asked for."""

    clips, device, batch_size = CLIPS, torch.device("cpu"), 4

    def __init__(self, *, only=range(5), broken=(), allow_missing=True, contents=None):
        self.wanted, self.broken, self.allow_missing = only, broken, allow_missing
        self.contents, self.asked = contents or dict.fromkeys(range(5), "as filmed"), []

    def only(self, clips):
        self.asked.append(sorted(clips))
        options = {"broken": self.broken, "allow_missing": self.allow_missing, "contents": self.contents}
        return Made(only=sorted(clips), **options)

    def identity(self, clip):
        return f"{clip} {self.contents[clip]}"

    def locations(self):
        clip = np.repeat(np.arange(5), COUNTS)
        return clip, np.concatenate([np.arange(n) for n in COUNTS]) + 4

    def batches(self, normalize):
        for clip in self.wanted:
            if clip in self.broken:
                yield Fault(clip, f"c{clip}", "no such file")
                continue
            for last in range(4, 4 + COUNTS[clip]):
                yield WindowBatch(np.array([clip]), np.array([last]), normalize(PICTURES[clip, last][None]))

    def agree(self, faults):
        return agree_on_faults(faults, self.clips, allow_missing=self.allow_missing)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", init_scale=1.0)
    model.freeze_encoder()
    return model


@pytest.fixture(scope="module")
def tokens_model():
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", head="attentive", init_scale=1.0)
    model.freeze_encoder()
    return model


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(feature_cache, "_FILE_WINDOWS", 3)


def cache_of(folder, model, windows=None, dtype=torch.float32):
    return FeatureCache(folder, windows or Made(), model, dtype, ALONE)


def expected(model):
    clip, last = Made().locations()
    with torch.no_grad():
        return model.eval().forward_features(model.normalize(PICTURES[clip, last]))


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "_FILE_WINDOWS", 3)
        folder = tmp_path_factory.mktemp("made")
        cache_of(folder, model)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


def files(folder):
    return sorted(folder.glob("*/*.pth"))


def test_features_are_those_of_the_encoder_by_number_and_made_once(copy, model):
    again = Made()
    cache = cache_of(copy, model, again)
    assert again.asked == [] and not cache.missing()
    assert len(files(copy)) == 4, "clip 0; clip 2 in two; clips 3 and 4"
    numbers = np.array([10, 0, 4, 4, 7])
    torch.testing.assert_close(cache.read(numbers), expected(model)[numbers], rtol=1e-5, atol=1e-5)


def test_a_scorer_gives_the_models_scores(made, model):
    cache = cache_of(made, model)
    scores = Scorer(cache).score(FromFeatures(model))
    whole = Scorer(SimpleNamespace(clips=CLIPS, device=Made.device, batches=Made().batches, agree=Made().agree,
                                   locations=Made().locations)).score(model)  # fmt: skip
    assert scores.clip.tolist() == whole.clip.tolist() and scores.frame.tolist() == whole.frame.tolist()
    np.testing.assert_allclose(scores.logits, whole.logits, atol=1e-6)


def test_what_a_killed_run_left_undone_is_made_and_no_more(copy, model):
    of_clip_2 = [path for path in files(copy) if len(torch.load(path)["missing"]) == 2]
    for path in of_clip_2:
        path.unlink()
    (copy / ".half.tmp").touch()
    again = Made()
    cache = cache_of(copy, model, again)
    assert again.asked == [[2]] and len(files(copy)) == 4
    torch.testing.assert_close(cache.read(np.arange(11)), expected(model), rtol=1e-5, atol=1e-5)


def test_a_signal_ends_it_between_batches_and_files_that_are_whole_stay(tmp_path, model, monkeypatch):
    asked = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "stop_requested", lambda: next(asked) == 7)
        with pytest.raises(Preempted):
            cache_of(tmp_path, model)
    assert len(files(tmp_path)) == 2, "clip 0, and the first three windows of clip 2"
    again = Made()
    cache = cache_of(tmp_path, model, again)
    assert again.asked == [[2, 3, 4]]
    torch.testing.assert_close(cache.read(np.arange(11)), expected(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "foreign"])
def test_a_damaged_file_is_named_and_made_again(copy, model, damage, caplog):
    victim = files(copy)[1]
    content = bytearray(victim.read_bytes())
    place = content.find(torch.load(victim)["features"].numpy().tobytes()[:64])
    content[place + 5] ^= 4
    if damage == "foreign":
        torch.save({"features": torch.zeros(2, 3), "missing": torch.zeros(2, dtype=torch.bool), "faults": []}, victim)
    else:
        victim.write_bytes({"bit": content, "cut": content[:-200], "empty": b""}[damage])
    cache = cache_of(copy, model)
    assert f"features are damaged and made again: {victim}" in caplog.text
    torch.testing.assert_close(cache.read(np.arange(11)), expected(model), rtol=1e-5, atol=1e-5)
    caplog.clear()
    cache_of(copy, model)
    assert "are damaged" not in caplog.text


def test_other_weights_inputs_precision_and_data_have_files_of_their_own(copy, model):
    torch.manual_seed(1)
    other = create_model("vit_tiny_patch16_64")
    attentive, faster = (create_model("vit_tiny_patch16_64", **o) for o in ({"head": "attentive"}, {"view_fps": 10}))
    for twin in (attentive, faster):
        twin.load_state_dict(model.state_dict(), strict=False)
    digests = {encoder_digest(m, torch.float32) for m in (model, other, faster)}
    digests |= {encoder_digest(attentive, torch.float32), encoder_digest(model, torch.bfloat16)}
    assert len(digests) == 5
    with torch.no_grad():
        retrained = create_model("vit_tiny_patch16_64")
        retrained.load_state_dict(model.state_dict())
        retrained.head.weight.add_(1)
    assert encoder_digest(retrained, torch.float32) in digests, "the head makes no feature"
    again = Made(contents=dict.fromkeys(range(5), "as filmed") | {3: "as filmed anew"})
    cache_of(copy, model, again)
    assert again.asked == [[3, 4]] and len(files(copy)) == 5


def test_a_clip_that_cannot_be_read_has_no_features_and_is_tried_again(tmp_path, model):
    broken = Made(broken=(3,))
    cache = cache_of(tmp_path, model, broken)
    assert cache.missing() == {8: "no such file"} and [fault.number for fault in cache.faults] == [3]
    scores = Scorer(cache).score(FromFeatures(model))
    assert 3 not in scores.clip and len(scores.clip) == 10 and [fault.name for fault in scores.faults] == ["c3"]
    again = Made()
    assert not cache_of(tmp_path, model, again).missing() and again.asked == [[3, 4]]


def test_a_clip_that_cannot_be_read_is_refused_where_that_is_not_allowed(tmp_path, model):
    with pytest.raises(DataError, match="1 of 5 clips cannot be read; repair them.*\n  c3: no such file"):
        cache_of(tmp_path, model, Made(broken=(3,), allow_missing=False))


def test_room_is_found_out_before(tmp_path, tokens_model, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    asked = Made()
    with pytest.raises(ConfigError, match=r"cannot take 180 kB of features \(No space.*another --cache_features, or a"):
        cache_of(tmp_path, tokens_model, asked)
    assert not asked.asked and "features of 11 windows, 16.4 kB each: 11 are made now and take 180 kB" in caplog.text


def test_a_disk_that_fills_up_later_is_named_and_what_is_there_stays(copy, model, monkeypatch):
    files(copy)[0].unlink()

    def full(content, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointWriteError, match=r"\.pth: cannot be written \(No space left on device\)"):
        cache_of(copy, model)
    assert len(files(copy)) == 3 and not list(copy.rglob("*.tmp"))


def test_a_folder_that_another_node_has_for_itself_is_refused(copy, model, monkeypatch):
    """What this rank is told is made, it does not find."""
    other, state_of = files(copy)[1], feature_cache._state_of
    other.unlink()
    monkeypatch.setattr(feature_cache, "_state_of", lambda part, like: state_of(part, like) * (part.path != other))
    monkeypatch.setattr(feature_cache, "_LATE", 0.0)
    with pytest.raises(ConfigError, match=rf"^{other}: .* --cache_features must be a folder that all nodes share$"):
        cache_of(copy, model)


def test_all_tokens_are_kept_for_an_attentive_head(tmp_path, tokens_model):
    cache = cache_of(tmp_path, tokens_model)
    assert cache.bytes_of_a_window == 32 * 128 * 4
    torch.testing.assert_close(cache.read(np.arange(11)), expected(tokens_model), rtol=1e-5, atol=1e-5)


def test_two_ranks_share_out_what_is_scored(made, model):
    found = []
    for rank in range(2):
        cache = cache_of(made, model)
        cache.process = dataclasses.replace(ALONE, rank=rank, world_size=2)
        found += [(int(c), int(f)) for b in cache.batches(None) for c, f in zip(b.clip, b.last, strict=True)]
    assert sorted(found) == found == list(zip(*(x.tolist() for x in Made().locations()), strict=True))
