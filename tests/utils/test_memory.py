"""How much memory can be had, read from played /proc and /sys/fs/cgroup."""

import sys

import pytest

from utils import memory

MB = 10**6


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Returns what writes files of /proc and /sys/fs/cgroup, given as {path: content}."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        free, where = memory.available_memory()
        return free, where.removeprefix(f"{tmp_path}/")

    return write


MACHINE = {"proc/meminfo": "MemTotal:       64000000 kB\nMemFree: 5 kB\nMemAvailable:   40000000 kB\n"}
V2_STAT = f"anon 5\nfile 9\ninactive_file {30 * MB}\nactive_file {20 * MB}\nworkingset_refault_file 7\n"
V1_STAT = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {3 * MB}\ntotal_active_file {2 * MB}\n"


def group(folder, limit, used, *, version=2):
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    numbers = dict(zip(names, (limit, used), strict=True))
    stat = V2_STAT if version == 2 else V1_STAT
    return {f"cgroup/{folder}memory.{name}": f"{number}\n" for name, number in numbers.items()} | {
        f"cgroup/{folder}memory.stat": stat
    }


def test_without_groups_it_is_the_machine_s(system):
    assert system(MACHINE) == (40_000_000 * 1024, "proc/meminfo")


def test_where_nothing_tells_nothing_limits(system):
    assert system({}) == (sys.maxsize, "")


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/../../elsewhere"])
def test_a_container_sees_its_limit_at_the_root(system, path):
    files = MACHINE | {"proc/self/cgroup": f"0::{path}\n"} | group("", 400 * MB, 300 * MB)
    assert system(files) == (150 * MB, "cgroup/memory.max")  # what caches files is given back


def test_the_tightest_group_above_counts(system):
    files = MACHINE | {"proc/self/cgroup": "0::/slurm/job/step\n"}
    files |= group("slurm/job/step/", "max", 80 * MB) | group("slurm/job/", 200 * MB, 90 * MB)
    files |= group("slurm/", 900 * MB, 890 * MB)
    assert system(files) == (60 * MB, "cgroup/slurm/memory.max")


def test_groups_of_version_1(system):
    files = MACHINE | {"proc/self/cgroup": "5:cpu:/a\n4:memory,hugetlb:/a/b\n0::/\n"}
    files |= group("memory/a/b/", 100 * MB, 70 * MB, version=1)
    files |= group("memory/", 9223372036854771712, 9 * MB, version=1)
    assert system(files) == (35 * MB, "cgroup/memory/a/b/memory.limit_in_bytes")


def test_more_in_use_than_the_limit_leaves_nothing(system):
    files = MACHINE | {"proc/self/cgroup": "0::/\n"} | group("", 100 * MB, 500 * MB)
    assert system(files) == (0, "cgroup/memory.max")


def test_this_machine_tells():
    free, where = memory.available_memory()
    assert 10 * MB < free < 10**15 and where


def test_sizes_for_people():
    sizes = {
        0: "0 B",
        999: "999 B",
        1500: "1.5 kB",
        134_873_088: "135 MB",
        999_600_000: "1 GB",
        2_408_000_000: "2.41 GB",
    }
    assert {number: memory.in_bytes(number) for number in sizes} == sizes
