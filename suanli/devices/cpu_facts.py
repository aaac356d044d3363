"""The processor as this process may use it, read from the system and from nothing else.

Everything that is read on Linux goes through a root folder, so that another machine's files can be
read in its place. On other systems what cannot be known is left out, never guessed.
"""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

from suanli.base.hardware import CpuInfo
from suanli.devices.cgroup import cpu_quota, memory_left, memory_limit

# Names of instruction sets that decide a plan, as Linux writes them on x86.
_X86_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
)
# The same on Arm: Linux's name -> ours.
_ARM_FEATURES = {
    "asimd": "neon",
    "asimdhp": "neon_fp16",
    "asimddp": "neon_dot",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
# (implementer, part) -> name, from the main identification register as Arm's manuals list it.
_ARM_PARTS = {
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd0c"): "Arm Neoverse N1",
    ("0x41", "0xd40"): "Arm Neoverse V1",
    ("0x41", "0xd49"): "Arm Neoverse N2",
    ("0x41", "0xd4f"): "Arm Neoverse V2",
}
# macOS: sysctl name -> our feature.
_APPLE_FEATURES = {
    "hw.optional.arm.FEAT_FP16": "neon_fp16",
    "hw.optional.arm.FEAT_DotProd": "neon_dot",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.avx512f": "avx512f",
}
_ARCHITECTURES = {"amd64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64"}


def cpu_info(root: Path = Path("/")) -> CpuInfo:
    """The processor: model, usable cores, instruction sets, caches and memory.

    Args:
        root: Where `proc` and `sys` stand.
    """
    text = _read(root / "proc/cpuinfo")
    model, features = parse_cpuinfo(text) if text else _facts_elsewhere()
    limit, left = memory_limit(root), memory_left(root)
    memory = psutil.virtual_memory()
    logical = os.cpu_count() or 1
    return CpuInfo(
        model=model,
        architecture=architecture(),
        physical_cores=min(psutil.cpu_count(logical=False) or logical, logical),
        logical_cores=logical,
        usable_cores=usable_cores(root),
        features=features,
        cache_bytes=cache_sizes(root),
        memory_bytes=min(memory.total, limit) if limit else memory.total,
        memory_available_bytes=memory.available if left is None else min(memory.available, left),
    )


def architecture() -> str:
    """The family of the instruction set, such as "x86_64" or "aarch64"."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores allowed by affinity and by the cgroup's quota, at least 1.

    A quota of 1.5 cores counts as 1: a second busy thread would be stopped half of the time.
    """
    quota = cpu_quota(root)
    allowed = len(allowed_cpus())
    return max(1, min(allowed, int(quota))) if quota is not None else allowed


def allowed_cpus() -> list[int]:
    """Numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def spread_cpus(threads: int, root: Path = Path("/")) -> list[int]:
    """Processors for that many threads: one of each physical core first, then the siblings."""
    first: list[int] = []
    siblings: list[int] = []
    seen: set[str] = set()
    for cpu in allowed_cpus():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core = _read(folder / "thread_siblings_list") or str(cpu)
        (siblings if core in seen else first).append(cpu)
        seen.add(core)
    return (first + siblings)[:threads]


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and features out of the text of /proc/cpuinfo (x86 or Arm)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    if "flags" in fields:
        flags = set(fields["flags"].split())
        return fields.get("model name", "unknown"), tuple(f for f in _X86_FEATURES if f in flags)
    flags = set(fields.get("Features", "").split())
    implementer, part = fields.get("CPU implementer", ""), fields.get("CPU part", "")
    unnamed = f"Arm processor (implementer {implementer}, part {part})" if part else "unknown"
    model = fields.get("model name") or _ARM_PARTS.get((implementer, part), unnamed)
    return model, tuple(ours for theirs, ours in _ARM_FEATURES.items() if theirs in flags)


def cache_sizes(root: Path = Path("/")) -> dict[str, int]:
    """Bytes of one instance of each data cache: {"L1d": …, "L2": …, "L3": …}."""
    sizes: dict[str, int] = {}
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = _read(folder / "type"), _read(folder / "level")
        size = _bytes(_read(folder / "size"))
        if kind in ("Data", "Unified") and size:
            sizes[f"L{level}d" if kind == "Data" else f"L{level}"] = size
    return sizes


def request_amx() -> bool | None:
    """Ask the kernel for tile registers, which it grants to a process once and for all.

    Returns:
        True if granted, False if refused (a sandbox may), None where there are none to ask for.
        Source: Linux "Using XSTATE features in user space applications": arch_prctl(
        ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) = syscall 158, code 0x1023, feature 18.
    """
    if not sys.platform.startswith("linux") or architecture() != "x86_64":
        return None
    if "amx_tile" not in parse_cpuinfo(_read(Path("/proc/cpuinfo")))[1]:
        return None
    try:
        answer = ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18)
    except (OSError, AttributeError):
        return False
    return bool(answer == 0)


def _facts_elsewhere() -> tuple[str, tuple[str, ...]]:
    """Model and features where there is no /proc/cpuinfo."""
    if sys.platform != "darwin":
        return platform.processor() or "unknown", ()
    features = [ours for name, ours in _APPLE_FEATURES.items() if _sysctl(name) == "1"]
    if architecture() == "aarch64":
        features.insert(0, "neon")
    return _sysctl("machdep.cpu.brand_string") or platform.processor(), tuple(features)


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _bytes(text: str) -> int:
    """Bytes of a size as sysfs writes it, such as "48K"."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * scale if digits.isdigit() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
