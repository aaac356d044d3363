"""What a container's control group grants: processor time and memory (versions 1 and 2).

The path in /proc/self/cgroup is the host's and need not exist inside a container, where the group
itself is mounted at the root. So every ancestor that exists is read, and the tightest limit holds.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_UNLIMITED_BYTES = 2**60  # version 1 writes a number near 2**63 for "no limit"


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the group may use at once, such as 1.5; None where there is no quota.

    Source of the formula: quota / period, kernel documentation "CFS Bandwidth Control" and
    "cgroup v2, cpu.max".
    """
    quotas = [
        quota
        for folder in _folders(root, "cpu")
        for quota in (_quota_v2(folder), _quota_v1(folder))
        if quota is not None
    ]
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the group may hold; None where there is no limit."""
    return min((limit for limit, _ in _memory(root)), default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that the group may still take, file cache counted as free; None without a limit."""
    return min((max(0, limit - used) for limit, used in _memory(root)), default=None)


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, use that cannot be dropped) of each group with a limit."""
    for folder in _folders(root, "memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(folder / limit_name)
            if limit is None or limit >= _UNLIMITED_BYTES:
                continue
            used = _number(folder / used_name) or 0
            yield limit, max(0, used - _statistic(folder / "memory.stat", cache_name))


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of its ancestors, for one controller."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            bases = [mount, mount / "unified"]
        elif controller in names.split(","):
            bases = [mount / names, mount / controller]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for base in bases:
            for ancestor in (group, *group.parents):
                folder = base / ancestor
                if folder.is_dir():
                    yield folder


def _quota_v2(folder: Path) -> float | None:
    parts = _text(folder / "cpu.max").split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) == 0:
        return None  # "max 100000" is no quota
    return int(parts[0]) / int(parts[1])


def _quota_v1(folder: Path) -> float | None:
    quota = _number(folder / "cpu.cfs_quota_us")
    period = _number(folder / "cpu.cfs_period_us")
    if quota is None or not period or quota <= 0:
        return None  # -1 is no quota
    return quota / period


def _statistic(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
