import json
import re
import shutil

import numpy as np
import pytest
from helpers import SHARED

from datasets import DataError, VideoScan, build_clips
from datasets.formats import DATA_SETS
from datasets.formats.dota import CATEGORIES, read_metadata
from datasets.formats.text import read_split
from datasets.readers import open_clip
from datasets.tools.synthetic import Scene, render_dota


@pytest.fixture
def copy(dota_root, tmp_path):
    """The annotations of the synthetic set, to break."""
    shutil.copytree(dota_root / "dataset", tmp_path / "dataset")
    return tmp_path


def test_clips_equal_what_the_generator_knows(dota_root):
    for split, count in (("train", 8), ("val", 5)):
        table = build_clips("DoTA", str(dota_root), split)
        assert (table.name, table.split, len(table)) == ("DoTA", split, count)
        for i, clip in enumerate(table):
            scene = Scene(np.random.default_rng([1, split == "val", i]), (96, 54))
            np.testing.assert_array_equal(clip.labels, scene.labels())
            assert (clip.category, clip.ego, clip.night) == (scene.kind, scene.kind == "oncoming", scene.night)
            assert (clip.num_frames, clip.fps) == (scene.num_frames, 10.0)
            assert clip.filename(7) == "000007.jpg"
    with open_clip(table[0]) as reader:
        assert reader.read([0, table[0].num_frames - 1]).shape == (2, 54, 96, 3)


def test_a_recording_is_the_video_in_the_name_unless_the_metadata_says_more(copy):
    assert [c.recording for c in build_clips("DoTA", str(copy), "val")] == [f"syntheticva_00000{i}" for i in range(5)]
    path = copy / "dataset" / "metadata_val.json"
    content = json.loads(path.read_text())
    for name in list(content)[1:]:  # as DoTA has it
        del content[name]["recording"]
    path.write_text(json.dumps(content))
    table = build_clips("DoTA", str(copy), "val")
    assert [c.recording for c in table] == ["syntheticva_000000", *["syntheticva"] * 4]


def test_variants_and_splits(dota_root):
    names = {split: [c.name for c in build_clips("DoTA", str(dota_root), split)] for split in ("train", "val", "all")}
    assert names["all"] == names["train"] + names["val"]
    half = build_clips("DoTA_half", str(dota_root), "train")
    assert [c.name for c in half] == names["train"][::2] and half[0].category is not None
    assert [c.name for c in build_clips("DoTA_half", str(dota_root), "val")] == names["val"]
    with pytest.raises(DataError, match="DoTA_half has no split 'all'; it has train, val"):
        build_clips("DoTA_half", str(dota_root), "all")
    with pytest.raises(DataError, match="unknown data set 'dota'; known: A3D, BDD100K, CAP-DATA, .*DoTA, DoTA_half"):
        build_clips("dota", str(dota_root), "train")


def test_labels_come_from_the_annotation_in_frame_order(copy):
    path = copy / "dataset" / "annotations" / "syntheticva_000000.json"
    annotation = json.loads(path.read_text())
    before = build_clips("DoTA", str(copy), "val")[0].labels
    annotation["labels"].reverse()
    annotation["labels"][-1]["accident_id"] = 10
    path.write_text(json.dumps(annotation))
    after = build_clips("DoTA", str(copy), "val")[0].labels
    assert after[0] == 1 and before[0] == 0
    np.testing.assert_array_equal(after[1:], before[1:])


def test_category_falls_back_on_the_annotation(copy):
    expected = [c.category for c in build_clips("DoTA", str(copy), "val")]
    (copy / "dataset" / "metadata_val.json").unlink()
    assert [c.category for c in build_clips("DoTA", str(copy), "val")] == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "val_split.txt").unlink(), r"val_split.txt: split file not found; it comes with DoTA"),
        (lambda d: (d / "val_split.txt").write_text("\n"), r"val_split.txt: the split file is empty"),
        (lambda d: (d / "val_split.txt").write_text("a\nb\na\n"), r"clip a is listed twice"),
        (lambda d: (d / "val_split.txt").write_text("absent\n"), r"absent.json: cannot be read .*DoTA_annotations.zip"),
        (lambda d: (d / "annotations/syntheticva_000000.json").write_text("{"), r"000000.json: not valid JSON"),
        (lambda d: (d / "annotations/syntheticva_000000.json").write_text("[]"), r"expected a JSON object"),
        (lambda d: (d / "annotations/syntheticva_000000.json").write_text("{}"), r"not a DoTA annotation: KeyError"),
        (
            lambda d: (d / "metadata_val.json").write_text('{"syntheticva_000000": {}}'),
            r"metadata_val.json: clip .*_000000 has no anomaly",
        ),
    ],
)
def test_bad_input_is_named(copy, damage, message):
    damage(copy / "dataset")
    with pytest.raises(DataError, match=message):
        build_clips("DoTA", str(copy), "val")


ODD = ("1e400", "-1e400", "NaN", "null", "[]", "[1]", "{}", "1.5", '"x"', '""', "9" * 5000, "[" * 5000 + "]" * 5000)


@pytest.mark.parametrize("value", ODD, ids=lambda value: value[:8])
@pytest.mark.parametrize("key", ["accident_id", "ego_involve", "night"])
def test_values_that_are_none_are_refused_by_the_name_of_the_file(copy, key, value):
    path = copy / "dataset" / "annotations" / "syntheticva_000000.json"
    path.write_text(re.sub(rf'"{key}": \w+', lambda _: f'"{key}": {value}', path.read_text()))
    with pytest.raises(DataError, match="syntheticva_000000.json: not ") as caught:
        build_clips("DoTA", str(copy), "val")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_missing_half_split_says_where_it_comes_from(copy):
    (copy / "dataset" / "half_train_split.txt").unlink()
    with pytest.raises(DataError, match="half_train_split.txt.*simple-tad .*python -m datasets.tools.prepare half"):
        build_clips("DoTA_half", str(copy), "train")


def test_gap_in_the_labelled_frames_is_refused(copy):
    path = copy / "dataset" / "annotations" / "syntheticva_000000.json"
    annotation = json.loads(path.read_text())
    del annotation["labels"][5]
    path.write_text(json.dumps(annotation))
    with pytest.raises(DataError, match="the labelled frames are not 0 to"):
        build_clips("DoTA", str(copy), "val")


def test_generator_refuses_to_overwrite(dota_root):
    with pytest.raises(FileExistsError):
        render_dota(dota_root, train=1, val=1)


@pytest.mark.skipif(not (SHARED / "data" / "dota").is_dir(), reason="needs ../shared/data/dota")
def test_real_metadata_and_splits(tmp_path):
    (tmp_path / "dataset").symlink_to(SHARED / "data" / "dota")
    metadata = read_metadata(str(tmp_path))
    train, val = (read_split(tmp_path / "dataset" / f"{s}_split.txt", "it") for s in ("train", "val"))
    assert (len(train), len(val)) == (3275, 1402) and set(train) | set(val) == metadata.keys()
    assert sum(metadata[name]["num_frames"] for name in train) == 334_903
    assert {m["anomaly_class"].split(": ")[1] for m in metadata.values()} <= set(CATEGORIES.values())


def test_a_clip_in_both_splits_is_refused(dota_root, tmp_path):
    shutil.copytree(dota_root / "dataset", tmp_path / "dataset")
    with (tmp_path / "dataset" / "val_split.txt").open("a") as f:
        f.write("synthetictr_000002\n")
    with pytest.raises(DataError, match="clip synthetictr_000002 is in train_split.txt and in val_split.txt"):
        build_clips("DoTA", str(tmp_path), "all")


def test_encodings_of_a_split_file(dota_root, tmp_path):
    shutil.copytree(dota_root / "dataset", tmp_path / "dataset")
    split = tmp_path / "dataset" / "val_split.txt"
    names = split.read_text()
    split.write_text(names.replace("\n", "\r\n\r\n"), encoding="utf-8-sig")
    assert [c.name for c in build_clips("DoTA", str(tmp_path), "val")] == names.split()
    split.write_text(names, encoding="utf-16")
    with pytest.raises(DataError, match="val_split.txt: not a text file in UTF-8"):
        build_clips("DoTA", str(tmp_path), "val")


@pytest.mark.parametrize("entry", [None, {"anomaly_class": None}, {}])
def test_metadata_without_a_category_is_refused(dota_root, tmp_path, entry):
    shutil.copytree(dota_root / "dataset", tmp_path / "dataset")
    path = tmp_path / "dataset" / "metadata_val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"synthetictr_000000": entry}))
    with pytest.raises(DataError, match="metadata_val.json: clip synthetictr_000000 has no anomaly_class"):
        build_clips("DoTA", str(tmp_path), "val")


@pytest.mark.parametrize("name", [name for name, data_set in DATA_SETS.items() if data_set.home])
def test_a_folder_that_is_not_there_is_answered_with_where_the_data_set_is_from(name, tmp_path):
    data_set, scan = DATA_SETS[name], VideoScan(tmp_path / "videos.json", workers=1)
    with pytest.raises(DataError, match=rf"There is no /nowhere; {name} is from {data_set.home}, see docs/data.md$"):
        build_clips(name, "/nowhere", data_set.splits[0], scan)
