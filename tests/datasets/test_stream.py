"""Evaluation's stream of windows: each frame decoded once, each window handed out once."""

import mmap
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rewrite_zip, tree

from datasets import build_clips
from datasets.augment.frames import EvalTransform
from datasets.chunks import ClipStream, balance
from datasets.clips import Clip, ClipTable, DataError
from datasets.faults import Fault
from datasets.readers import ZipReader, open_clip
from datasets.stream import SplitWindows, _Gatherer
from datasets.windows import WindowIndex


def test_balance():
    costs = [5, 1, 9, 3, 3, 7]
    shares = balance(costs, 2)
    assert sorted(sum(shares, [])) == list(range(6))
    assert [sum(costs[i] for i in share) for share in shares] in ([13, 15], [15, 13])
    assert balance([4], 3) == [[0], [], []]


def split(root, *, stride=1, view_fps=10, batch_size=16, **options):
    clips = build_clips("DoTA", str(root), "val")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=view_fps, stride=stride)
    return SplitWindows(clips, index, EvalTransform(32), batch_size=batch_size, **options)


def gathered(root, *, world_size=1, **options):
    """{(clip, last frame): the window's frames} of all ranks, each of which came once."""
    windows, times, faults = {}, Counter(), []
    for rank in range(world_size):
        part = split(root, rank=rank, world_size=world_size, **options)
        for item in part.batches(lambda frames: frames):
            if isinstance(item, Fault):
                faults.append(item)
                continue
            assert len(item.last) <= part.stream.chunk_frames
            for clip, last, video in zip(item.clip.tolist(), item.last.tolist(), item.video, strict=False):
                windows[clip, last] = video.clone()
                times[clip, last] += 1
    part.agree(faults)
    assert set(times) == set(zip(*(a.tolist() for a in part.locations()), strict=True))
    assert set(times.values()) == {1}
    return windows


@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"view_fps": 5}, {"view_fps": 4, "stride": 2}], ids=str)
def test_streamed_windows_are_the_windows_of_the_index(dota_root, options):
    part = split(dota_root, **options)
    clips, index = part.clips, part.index
    windows = gathered(dota_root, **options)
    for i in range(0, len(index), 7):
        clip, frames = index[i]
        with open_clip(clips[clip]) as reader:
            expected = EvalTransform(32)(reader.frames(frames)).transpose(0, 1)
        assert torch.equal(windows[clip, int(frames[-1])], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"world_size": 3},
        {"num_workers": 2, "world_size": 2},
        {"batch_size": 5},
        {"across_clips": True},
        {"across_clips": True, "batch_size": 7, "num_workers": 2},
    ],
    ids=str,
)
def test_each_window_comes_once_however_the_work_is_split(dota_root, options):
    whole, parts = gathered(dota_root), gathered(dota_root, **options)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_batches_are_filled_across_clips(dota_root):
    part = split(dota_root, across_clips=True, stride=2, num_workers=2)
    batches = [(batch.clip, len(batch.video)) for batch in part.batches(lambda frames: frames)]
    clips, rows = [clip for clip, _ in batches], [count for _, count in batches]
    assert rows == [16] * -(-len(part.index) // 16) and all(len(clip) == 16 for clip in clips[:-1])
    assert sum(map(len, clips)) == len(part.index) and max(len(set(clip.tolist())) for clip in clips) > 1
    alone = list(split(dota_root, stride=2, num_workers=2).batches(lambda frames: frames))
    assert all(len(set(batch.clip.tolist())) == 1 and len(batch.video) == len(batch.last) for batch in alone)


@pytest.mark.parametrize("across_clips", [True, False])
def test_each_frame_is_normalised_once_and_no_more_are_kept_than_later_windows_need(dota_root, across_clips):
    seen, whole = [], split(dota_root, view_fps=5)

    def normalize(video):
        seen.append(video.shape)
        return video.float() / 255

    gatherer = _Gatherer(whole.index, normalize, whole.device, batch_size=16, across_clips=across_clips)
    for chunk in whole.stream:
        assert all(batch.video.dtype == torch.float32 for batch in gatherer.add(chunk))
        kept = sum(frames.untyped_storage().nbytes() for _, frames in gatherer.kept.values())
        assert kept < whole.index.spans[chunk.clip] * chunk.frames[0].numel() * 4
    assert not gatherer.kept and {shape[:2] for shape in seen} == {(1, 3)}
    assert sum(shape[2] for shape in seen) == sum(len(whole.index.needed_frames(c)) for c in range(5))


def test_rows_that_no_window_needs_take_no_memory(dota_root):
    """Room for 300 MB of windows, of which some are used."""
    batches = split(dota_root, batch_size=6000).batches(lambda frames: frames.float())
    before = resident()
    batch = next(batches)
    assert len(batch.last) < 200 and resident() - before < 100e6
    batches.close()


def resident():
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("across_clips", [True, False])
def test_a_clip_that_breaks_off_takes_no_window_of_another_with_it(dota_root, tmp_path, across_clips):
    shutil.copytree(dota_root, tmp_path, dirs_exist_ok=True)
    rewrite_zip(tmp_path / "frames" / "syntheticva_000001" / "images.zip", drop=["000030.jpg"])  # 40 frames or more
    whole, clip = gathered(dota_root), 1
    items = list(split(tmp_path, across_clips=across_clips, allow_missing=True).batches(lambda frames: frames.clone()))
    (fault,) = [item for item in items if isinstance(item, Fault)]
    assert (fault.number, fault.frames) == (clip, 0) and "000030.jpg" in fault.reason
    came = {key for item in items if item is not fault for key in zip(item.clip, item.last, strict=True)}
    assert {key for key in whole if key[0] != clip} <= came < set(whole)
    items = list(split(tmp_path, across_clips=across_clips).batches(lambda frames: frames))
    place = items.index(fault)
    assert place and all(isinstance(item, Fault) for item in items[place:])  # refused: nothing follows


def test_each_frame_is_decoded_once(dota_root, monkeypatch):
    reads = Counter()
    original = ZipReader._bytes

    def counting(self, name):
        reads[self.path, name] += 1
        return original(self, name)

    monkeypatch.setattr(ZipReader, "_bytes", counting)
    gathered(dota_root, view_fps=5)
    assert set(reads.values()) == {1}
    clips = build_clips("DoTA", str(dota_root), "val")
    assert len(reads) == sum(c.num_frames for c in clips)


def test_frames_no_window_needs_are_not_decoded():
    index = WindowIndex([31], src_fps=30, num_frames=4, view_fps=10, stride=6)
    assert index.needed_frames(0).tolist() == list(range(3, 31, 3))


def test_clips_without_windows_are_left_out(dota_root):
    clips = build_clips("DoTA", str(dota_root), "val")
    short = Clip("short", "nowhere", 2, 10.0, labels=np.zeros(2, np.uint8))
    table = ClipTable("DoTA", "val", [short, *clips])
    index = WindowIndex(table.frame_counts, src_fps=10, num_frames=4, view_fps=10)
    stream = ClipStream(table, index, EvalTransform(32), chunk_frames=64)
    assert stream.share == [1, 2, 3, 4, 5]
    assert sum(1 for _ in stream) == stream.num_chunks == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_clip_stops_evaluation_and_is_named(dota_root, tmp_path, workers):
    (tmp_path / "dataset").symlink_to(dota_root / "dataset")
    with pytest.raises(
        DataError, match=r"(?s)5 of 5 clips cannot be read.*(\n  syntheticva_00000\d: clip.*no frames.*){5}"
    ):
        gathered(tmp_path, num_workers=workers)


# ----------------------------------------------------------------------------------------------------------------------
# Reading processes that hang, die, or are left


@pytest.fixture
def misread(monkeypatch):
    """Returns what has `misbehave(reader, number of the picture)` called for each picture that is read."""
    original = ZipReader._bytes

    def patch(misbehave):
        def read(self, name):
            misbehave(self.clip.name, int(name.split(".")[0]))
            return original(self, name)

        monkeypatch.setattr(ZipReader, "_bytes", read)

    return patch


@pytest.fixture
def below():
    """Returns what lists the processes below this one, those of other tests excepted."""
    before = set(tree(os.getpid()))
    return lambda: set(tree(os.getpid())) - before


HANGS = (lambda: time.sleep(3600), "nothing could be read of it for 1 seconds")
DIES = (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process that read it was killed by SIGKILL")


@pytest.mark.parametrize(("how", "reason"), [HANGS, DIES], ids=["hangs", "dies"])
@pytest.mark.parametrize(("workers", "at"), [(1, 0), (2, 24), (1, 39)])
def test_a_clip_that_ends_its_process_is_named_once_and_the_others_are_scored(
    dota_root, misread, below, workers, at, how, reason
):
    """Whether at its beginning, in the middle or, for a process that is ahead, while another clip is handed out."""
    whole = gathered(dota_root)
    misread(lambda clip, number: how() if clip == "syntheticva_000001" and number == at else None)
    options = {"num_workers": workers, "batch_size": 8, "read_timeout": 1.0}
    items = list(split(dota_root, allow_missing=True, **options).batches(lambda frames: frames.clone()))
    (fault,) = [item for item in items if isinstance(item, Fault)]
    assert (fault.number, fault.frames) == (1, 0) and fault.reason.startswith(reason)
    times = Counter(key for item in items if item is not fault for key in zip(item.clip, item.last, strict=True))
    assert set(times.values()) == {1}
    assert {key for key in whole if key[0] != 1} <= times.keys() < whole.keys()
    assert not below()
    refusing = split(dota_root, **options)
    faults = [item for item in refusing.batches(lambda frames: frames) if isinstance(item, Fault)]
    with pytest.raises(DataError, match="1 of 5 clips cannot be read; repair them, or evaluate the others with"):
        refusing.agree(faults)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_clip_is_named_once_in_every_evaluation(dota_root, misread, workers):
    def fail(clip, number):
        if clip[-1] == "2" and number == 9:
            raise OSError("a bad sector")

    misread(fail)
    windows = split(dota_root, allow_missing=True, num_workers=workers, batch_size=4)
    for _ in range(2):
        faults = [item for item in windows.batches(lambda frames: frames) if isinstance(item, Fault)]
        assert [(fault.number, "a bad sector" in fault.reason) for fault in faults] == [(2, True)]


def test_clips_that_hang_cost_a_timeout_each(dota_root, misread):
    misread(lambda clip, number: time.sleep(3600) if clip[-1] in "13" else None)
    started = time.monotonic()
    windows = split(dota_root, allow_missing=True, num_workers=1, batch_size=8, read_timeout=1.0)
    faults = [item for item in windows.batches(lambda frames: frames) if isinstance(item, Fault)]
    assert sorted(fault.number for fault in faults) == [1, 3] and time.monotonic() - started < 60


def test_a_process_killed_between_two_chunks_costs_nothing(dota_root, below):
    """All that it had to do is done when it is killed; another one goes on in the middle of the clip."""
    whole, windows, killed = gathered(dota_root), {}, 0
    part = split(dota_root, num_workers=1, batch_size=8)
    for number, batch in enumerate(part.batches(lambda frames: frames)):
        assert not isinstance(batch, Fault)
        for clip, last, video in zip(batch.clip.tolist(), batch.last.tolist(), batch.video, strict=False):
            assert (clip, last) not in windows
            windows[clip, last] = video.clone()
        if number in (2, 5):
            (pid,) = below()
            wait_until_idle(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            killed += 1
    assert killed == 2 and windows.keys() == whole.keys()
    assert all(torch.equal(whole[key], windows[key]) for key in whole)


def wait_until_idle(pid):
    """Wait until a reading process waits for what to do next: twice the same CPU time, asleep."""
    before = None
    while (now := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()) != before or now[0] != "S":
        before = now
        time.sleep(0.1)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_an_evaluation_that_is_left_leaves_no_process_and_can_be_repeated(dota_root, below, taken):
    part = split(dota_root, num_workers=3, batch_size=8)
    batches = part.batches(lambda frames: frames)
    for _ in range(taken):
        next(batches)
    batches.close()
    assert not below()
    assert sum(len(batch.last) for batch in part.batches(lambda frames: frames)) == len(part.index)
    assert not below()


def test_a_fault_of_the_code_in_a_process_reaches_this_one(dota_root, misread, below):
    def fail(clip, number):
        if number == 20:
            raise ZeroDivisionError("a fault of the code")

    misread(fail)
    with pytest.raises(ZeroDivisionError) as raised:
        list(split(dota_root, num_workers=2).batches(lambda frames: frames))
    assert "in fail" in str(raised.value.__cause__) and not below()


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_is_a_few_chunks_ahead_however_long_a_clip_is(dota_root, misread, below, workers):
    """What is read while nothing is asked for; each frame counts in memory that is shared with the processes."""
    reads = torch.frombuffer(mmap.mmap(-1, 1 << 10), dtype=torch.int64)
    misread(lambda clip, number: reads[os.getpid() % 64 : os.getpid() % 64 + 1].add_(1))
    part = split(dota_root, num_workers=workers, batch_size=4)
    batches = part.batches(lambda frames: frames)
    next(batches)
    for pid in below():
        wait_until_idle(pid)
    assert 0 < int(reads.sum()) <= 4 * (2 * workers + 1)
    assert part.slots.count == 2 * workers and part.slots.shape == (4, 3, 32, 32)
    batches.close()


def test_the_order_of_windows_is_the_same_for_the_same_processes(dota_root):
    def order():
        return [(b.clip.tolist(), b.last.tolist()) for b in split(dota_root, **options).batches(lambda f: f)]

    options = {"num_workers": 2, "batch_size": 8, "across_clips": True}
    assert order() == order()
