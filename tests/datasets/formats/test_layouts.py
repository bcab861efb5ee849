"""Each layout, written by a generator that knows it all: what is read back is what was written, frame by frame."""

import csv
import io
import json
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import window_of, write_video
from PIL import Image

from datasets import VideoScan, build_clips
from datasets.augment.finetune import FinetuneTransform
from datasets.loader import Source, WindowDataset
from datasets.readers import open_clip
from datasets.windows import RandomClipIndex, index_clips

NUM_FRAMES, VIEW_FPS, STRIDE = 4, 5, 2


@dataclass(frozen=True)
class Truth:
    """A clip as its writer knows it: frames in its source, their rate, anomalous ranges (first, one past the last)."""

    frames: int
    fps: float
    anomalies: tuple = ()
    labelled: bool = True

    @property
    def labels(self):
        return [int(any(a <= t < b for a, b in self.anomalies)) for t in range(self.frames)]

    def ttc(self, t):
        """Seconds to the next anomaly within 2 s, from the last within 1 s, 0 in one, -100 else; NaN without any."""
        if not self.anomalies:
            return np.nan
        until = min((a - t for a, b in self.anomalies if b > t), default=np.inf)
        since = min((t - (b - 1) for a, b in self.anomalies if b <= t), default=np.inf)
        if until <= 0:
            return 0.0
        if until <= int(2 * self.fps):
            return -until / self.fps
        return since / self.fps if since <= int(1 * self.fps) else -100.0

    def windows(self):
        """Source frames of all windows, for a whole number of source frames per view frame."""
        step = round(self.fps / VIEW_FPS)
        span = step * (NUM_FRAMES - 1) + 1
        starts = range((self.frames - span) % STRIDE, self.frames - span + 1, STRIDE)
        return [[s + step * i for i in range(NUM_FRAMES)] for s in starts]


ONE, TWO, NONE = Truth(40, 10, ((12, 20),)), Truth(33, 10, ((5, 9), (30, 33))), Truth(25, 10)


def picture(t, suffix):
    data = io.BytesIO()
    Image.new("RGB", (24, 16), (2 * t + 10,) * 3).save(data, "PNG" if suffix == "png" else "JPEG", quality=95)
    return data.getvalue()


def write_pictures(folder, truth, name, first, packed):
    """Frame t is grey level 2 t + 10."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    content = {name.format(first + t): picture(t, name.split(".")[-1]) for t in range(truth.frames)}
    if packed:
        with zipfile.ZipFile(f"{folder}.zip", "w") as z:
            for file, data in content.items():
                z.writestr(file, data)
    else:
        folder.mkdir()
        for file, data in content.items():
            (folder / file).write_bytes(data)


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        csv.writer(f).writerows(rows)


def dota(root, packed):
    truths = {"abcdefghijk_000010": ONE, "a_-defghijk_000200": TWO, "abcdefghijk_000500": NONE}
    for name, truth in truths.items():
        rows = [
            {"image_path": f"frames/{name}/images/{t:06d}.jpg", "accident_id": 8 * label, "objects": []}
            for t, label in enumerate(truth.labels)
        ]
        (root / "dataset" / "annotations").mkdir(parents=True, exist_ok=True)
        annotation = {"labels": rows, "ego_involve": True, "night": False, "accident_id": 8}
        (root / "dataset" / "annotations" / f"{name}.json").write_text(json.dumps(annotation))
        write_pictures(root / "frames" / name / "images", truth, "{:06d}.jpg", 0, packed)
    (root / "dataset" / "train_split.txt").write_text("\n".join(truths) + "\n")
    return "DoTA", root, truths


def dada(root, name):
    cap = name == "CAP-DATA"
    truths = {(10, 1): Truth(60, 30, ((20, 41),)), (3, 7): Truth(52, 30)}
    if cap:
        truths[62, 123] = Truth(50, 10, ((49, 50),))
    header = ["video", "light(day,night)1-2", "type", "abnormal start frame", "abnormal end frame", "total frames"]
    rows, found = [header], {}
    for (kind, video), truth in truths.items():
        (a, b), *_ = truth.anomalies or ((-2, -1),)
        rows.append([f"{video:03d}", 1, kind, a + 1, b, truth.frames])
        found[f"{kind}/{video:0{6 if cap else 3}d}"] = truth
    write_table(root / "annotation" / ("cap_text_annotations.csv" if cap else "full_anno.csv"), rows)
    lists = root / ("CAPDATA_my_split" if cap else "DADA2K_my_split")
    lists.mkdir()
    (lists / "training.txt").write_text("\n".join(found))
    for clip, truth in found.items():
        frame = "{:06d}.jpg" if cap else "{:04d}.png"
        write_pictures(root / "frames" / clip / "images", truth, frame, 1, packed=not cap)
    return name, root, found


def bdd(root):
    truths = {"train/a-b.mov": Truth(50, 30, labelled=False), "train/c-d.mov": Truth(44, 10, labelled=False)}
    for name, truth in truths.items():
        write_video(root / name, frames=truth.frames, fps=int(truth.fps))
    return "BDD100K", root, truths


def own(root):
    truths = {"video": Truth(50, 30, ((3, 8), (20, 45))), "folder": ONE, "zip": TWO, "safe": NONE}
    rows = [
        ["path", "clip", "fps", "start_frame", "end_frame", "category", "night"],
        ["videos/a.mp4", "video", "", "3", "7", "hit", ""],
        ["frames/b", "folder", "10", "12", "19", "", "1"],
        ["", "video", "", "20", "44", "", ""],
        ["frames/c.zip", "zip", "10.0", "5", "8", "", ""],
        ["frames/c.zip", "zip", "", "30", "32", "", ""],
        ["frames/d", "safe", "10", "", "", "", ""],
    ]
    write_table(root / "train.csv", rows)
    write_video(root / "videos" / "a.mp4", frames=50, fps=30)
    write_pictures(root / "frames" / "b", ONE, "shot{{0}}_{:d}.png", 95, packed=False)  # 95 to 134, no padding
    write_pictures(root / "frames" / "c", TWO, "x/{:04d}.jpg", 1, packed=True)
    write_pictures(root / "frames" / "d", NONE, "{:05d}.jpg", 0, packed=False)
    return "csv", root, truths


def own_per_frame(root):
    name, _, truths = own(root)
    paths = {"video": "videos/a.mp4", "folder": "frames/b", "zip": "frames/c.zip", "safe": "frames/d"}
    rows = [["clip", "path", "fps", "frame", "label"]]
    for clip, truth in truths.items():
        rows += [[clip, paths[clip], truth.fps, t, label] for t, label in enumerate(truth.labels)]
    write_table(root / "train.csv", rows[:1] + rows[:0:-1])  # in no particular order
    return name, root, dict(reversed(truths.items()))


LAYOUTS = {
    "DoTA zip": lambda root: dota(root, packed=True),
    "DoTA folder": lambda root: dota(root, packed=False),
    "DADA2K png zip": lambda root: dada(root, "DADA2K"),
    "CAP-DATA": lambda root: dada(root, "CAP-DATA"),
    "BDD100K mov": bdd,
    "csv": own,
    "csv per frame": own_per_frame,
}


def shown(frame, source):
    """The number of the frame a picture shows."""
    level = np.median(frame.numpy())
    return level / 4 if source.endswith((".mp4", ".mov")) else (level - 10) / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_windows_and_ttc_are_what_the_writer_knows(layout, tmp_path):
    name, root, truths = LAYOUTS[layout](tmp_path / "data" if layout != "BDD100K mov" else tmp_path)
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    clips = build_clips(name, str(root), "train", scan)
    assert [c.name for c in clips] == list(truths)
    index = index_clips(clips, num_frames=NUM_FRAMES, view_fps=VIEW_FPS, stride=STRIDE)
    expected = [(c.name, w) for c in clips for w in truths[c.name].windows()]
    assert [(clips[c].name, frames.tolist()) for c, frames in map(index.__getitem__, range(len(index)))] == expected
    for clip in clips:
        truth = truths[clip.name]
        assert (clip.num_frames, clip.fps) == (truth.frames, truth.fps)
        with open_clip(clip) as reader:
            assert reader.mismatch() == ""
            numbers = [0, 1, truth.frames // 2, truth.frames - 1]
            for t, frame in zip(numbers, reader.read(numbers), strict=True):
                assert shown(frame, clip.source) == pytest.approx(t, abs=0.9 if "." in clip.source[-4:] else 0.4)
        if truth.labelled:
            assert clip.labels.tolist() == truth.labels
            assert clip.ttc.tolist() == pytest.approx([truth.ttc(t) for t in range(truth.frames)], nan_ok=True)
        else:
            assert clip.labels is None
    dataset = WindowDataset([Source(clips, index, FinetuneTransform(16, aa="none"))], seed=0, targets=truth.labelled)
    for i in range(0, len(index), 5):
        sample, (clip, window) = window_of(dataset, (0, 0, i, i)), expected[i]
        assert sample["notes"] == [] and sample["video"].shape == (1, NUM_FRAMES, 16, 16, 3)
        if truth.labelled:
            assert sample["label"].item() == truths[clip].labels[window[-1]]
            assert sample["ttc"].item() == pytest.approx(truths[clip].ttc(window[-1]), nan_ok=True)


def test_kinetics(tmp_path):
    write_table(
        tmp_path / "annotations" / "train.csv",
        [["label", "youtube_id", "time_start", "time_end", "split"], ["a b", "abcdefghijk", "3", "13", "train"]],
    )
    write_video(tmp_path / "train" / "a b" / "abcdefghijk_000003_000013.mp4", frames=47, fps=25)
    clips = build_clips("Kinetics", str(tmp_path), "train", VideoScan(tmp_path / "scan.json", workers=1))
    index = index_clips(clips, num_frames=NUM_FRAMES, view_fps=VIEW_FPS, stride=4)
    assert isinstance(index, RandomClipIndex) and clips[0].labels is None and clips[0].num_frames == 47
    seen = set()
    for seed in range(300):
        clip, frames = index.sample(0, np.random.default_rng(seed))
        assert clip == 0 and np.diff(frames).tolist() == [4, 4, 4]
        seen.add(int(frames[0]))
    assert seen == set(range(47 - 16 + 1))
    with open_clip(clips[0]) as reader:
        for t, frame in zip(frames.tolist(), reader.read(frames), strict=True):
            assert shown(frame, clips[0].source) == pytest.approx(t, abs=0.9)
