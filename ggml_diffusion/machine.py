"""What this process may use of the machine: processors and memory, and the room on a disk.

A container is a control group of Linux with limits of its own, and counts as the machine: version 1 and 2,
and every group above the process's own. Deliberately not here: what is done with it. Sources: cgroups(7),
the kernel's admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst, proc(5).
"""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_MEMORY_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # two of version 2, one of version 1
_MEMORY_USED = ("memory.current", "memory.usage_in_bytes")
# Pages of files in memory can be dropped; the sums over the groups below have "total_" in version 1.
_DROPPABLE = {"inactive_file", "active_file"}, {"total_inactive_file", "total_active_file"}


def processors(root: Path = _ROOT) -> int:
    """Processors that this process may use: by its affinity, and by the quota of its control groups.

    A quota of one and a half is two: the second one is idle for half of the time.

    Args:
        root: where /proc and /sys are.

    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups("cpu", root):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # "max 100000" = no limit
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # "-1" = no limit
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def memory_limit(root: Path = _ROOT) -> int:
    """Bytes of memory that this process could have at most: the machine's, or its control groups'."""
    limits = [limit for _, limit in _memory_limits(root)]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def memory_available(root: Path = _ROOT) -> int:
    """Bytes of memory that this process can still get without swapping; the limit where nobody says."""
    available = [memory_limit(root)]
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            available.append(int(value.split()[0]) << 10)
    for folder, limit in _memory_limits(root):
        used = next((n for name in _MEMORY_USED if (n := _number(folder / name)) is not None), 0)
        available.append(limit - max(0, used - _droppable(folder)))
    return max(0, min(available))


def disk_free(folder: Path) -> int:
    """Bytes that can still be written into a folder, which need not be there yet.

    Raises:
        OSError: nobody knows.

    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _memory_limits(root: Path) -> Iterator[tuple[Path, int]]:
    for folder in _control_groups("memory", root):
        for name in _MEMORY_LIMITS:
            limit = _number(folder / name)
            if limit is not None:
                yield folder, limit


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups of this process, its own first, then those above it that can be seen."""
    own: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        own.update(dict.fromkeys(names.split(","), group))  # version 2 has the name ""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        place, _, mounted = line.partition(" - ")
        fields, (kind, _, options) = place.split(), mounted.partition(" ")
        is_one = kind == "cgroup" and controller in options.split(" ")[-1].split(",")
        name = controller if is_one else ""
        if not (is_one or kind == "cgroup2") or name not in own or len(fields) < 5:
            continue
        group = own[name]
        # Inside a container the mount shows a part of the groups only, often none above the process's own.
        mount_root, mount = fields[3].rstrip("/"), root / fields[4].lstrip("/")
        inside = group[len(mount_root) :] if f"{group}/".startswith(f"{mount_root}/") else ""
        folder = mount / inside.strip("/") if ".." not in inside.split("/") else mount
        while folder != mount:
            yield folder
            folder = folder.parent
        yield mount


def _droppable(folder: Path) -> int:
    values = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines() if " " in line)
    return max(sum(int(values.get(name, 0)) for name in names) for names in _DROPPABLE)


def _number(path: Path) -> int | None:
    """A file's number, None where there is none ("max", or no such file)."""
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
