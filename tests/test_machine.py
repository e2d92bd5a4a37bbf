"""What the machine has, read from made-up trees of /proc and /sys: with control groups and without."""

from pathlib import Path

import pytest

from ggml_diffusion import machine

MIB = 1 << 20


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine of 8 processors and 4096 MiB, half of it available, without control groups."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    sizes = {"SC_PHYS_PAGES": MIB, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(machine.os, "sysconf", sizes.__getitem__)
    write(tmp_path / "proc/meminfo", "MemTotal:  4194304 kB\nMemAvailable:  2097152 kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def found(root: Path) -> tuple[int, int, int]:
    """Processors, MiB of memory, MiB available."""
    return (
        machine.processors(root),
        machine.memory_limit(root) // MIB,
        machine.memory_available(root) // MIB,
    )


def version_2(root: Path, group: str = "/", mount_root: str = "/") -> None:
    write(root / "proc/self/cgroup", f"0::{group}\n")
    mount = f"31 23 0:28 {mount_root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    write(root / "proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mount)


def version_1(root: Path, group: str, mount_root: str = "/") -> None:
    write(root / "proc/self/cgroup", f"9:cpu,cpuacct:{group}\n4:memory:{group}\n0::/\n")
    mounts = [
        f"32 31 0:29 {mount_root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n",
        f"35 31 0:32 {mount_root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    ]
    write(root / "proc/self/mountinfo", "".join(mounts))


def test_without_control_groups_the_machine_counts(root):
    assert found(root) == (8, 4096, 2048)


def test_where_nobody_says_what_is_available_the_limit_counts(root):
    (root / "proc/meminfo").unlink()
    assert found(root) == (8, 4096, 4096)


def test_limits_of_version_2_count(root):
    version_2(root)
    write(root / "sys/fs/cgroup/cpu.max", "150000 100000\n")
    write(root / "sys/fs/cgroup/memory.max", f"{1024 * MIB}\n")
    write(root / "sys/fs/cgroup/memory.current", f"{600 * MIB}\n")
    # Files in memory can be dropped, whether they were read lately or not; shared memory cannot.
    write(
        root / "sys/fs/cgroup/memory.stat",
        f"file {300 * MIB}\ninactive_file {100 * MIB}\nactive_file {150 * MIB}\n",
    )
    assert found(root) == (2, 1024, 1024 - 350)


def test_no_limit_of_version_2_is_none(root):
    version_2(root)
    write(root / "sys/fs/cgroup/cpu.max", "max 100000\n")
    write(root / "sys/fs/cgroup/memory.max", "max\n")
    assert found(root) == (8, 4096, 2048)


def test_the_lowest_limit_of_all_groups_above_counts(root):
    version_2(root, "/slice/service")
    write(root / "sys/fs/cgroup/slice/cpu.max", "300000 100000")
    write(root / "sys/fs/cgroup/slice/service/cpu.max", "max 100000")
    write(root / "sys/fs/cgroup/slice/service/memory.max", f"{1024 * MIB}")
    write(root / "sys/fs/cgroup/slice/memory.max", f"{512 * MIB}")
    assert found(root) == (3, 512, 512)


def test_a_group_is_throttled_above_its_high_limit(root):
    version_2(root)
    write(root / "sys/fs/cgroup/memory.high", f"{700 * MIB}")
    write(root / "sys/fs/cgroup/memory.max", f"{1024 * MIB}")
    assert found(root)[1] == 700


def test_limits_of_version_1_count(root):
    version_1(root, "/jobs/one")
    cpu, memory = root / "sys/fs/cgroup/cpu,cpuacct/jobs/one", root / "sys/fs/cgroup/memory/jobs/one"
    write(cpu / "cpu.cfs_quota_us", "400000\n")
    write(cpu / "cpu.cfs_period_us", "100000\n")
    write(memory / "memory.limit_in_bytes", f"{1024 * MIB}\n")
    write(memory / "memory.usage_in_bytes", f"{900 * MIB}\n")
    write(memory / "memory.stat", f"total_inactive_file {100 * MIB}\ntotal_active_file {200 * MIB}\n")
    assert found(root) == (4, 1024, 424)


def test_no_limit_of_version_1_is_none(root):
    version_1(root, "/")
    write(root / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(root / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert found(root) == (8, 4096, 2048)


@pytest.mark.parametrize("mount_root", ["/docker/abc", "/"])
def test_inside_a_container_the_mount_may_show_its_own_group_only(root, mount_root):
    """The group's path is the host's; what is mounted is that group itself, whatever the mount says."""
    version_1(root, "/docker/abc", mount_root)
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{256 * MIB}\n")
    assert found(root)[1] == 256


def test_a_group_outside_of_what_is_mounted_is_that_of_the_mount(root):
    version_2(root, "/../other")
    write(root / "sys/fs/cgroup/memory.max", f"{256 * MIB}")
    assert found(root)[1] == 256


@pytest.mark.parametrize(
    ("quota", "count"), [("1000 100000", 1), ("100001 100000", 2), ("nonsense", 8), ("5 0", 8)]
)
def test_a_part_of_a_processor_is_one_and_nonsense_is_none(root, quota, count):
    version_2(root)
    write(root / "sys/fs/cgroup/cpu.max", quota)
    assert machine.processors(root) == count


def test_the_disk_of_a_folder_that_is_not_there_yet_is_that_of_the_folder_above(tmp_path):
    assert machine.disk_free(tmp_path / "not" / "yet") == pytest.approx(machine.disk_free(tmp_path), rel=0.1)


def test_what_this_machine_says_of_itself_is_possible():
    assert machine.processors() >= 1
    assert 0 < machine.memory_available() <= machine.memory_limit()
