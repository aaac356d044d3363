"""What the host execution saw, in words with the line of the person's file."""

from collections.abc import Iterable, Sequence

from suanli.base.kernel_results import KernelAccess, KernelFinding
from suanli.kernels.cuda.host_run import HostRun, Place, RawFinding
from suanli.kernels.spec import CudaKernel

# From so many times the sectors or wavefronts that are needed, a place is worth a word.
WORTH_A_WORD = 2.0
_FEW_REQUESTS = 1


def errors(kernel: CudaKernel, runs: Sequence[HostRun]) -> list[KernelFinding]:
    """Mistakes of any of the runs, each once, those that explain the others first."""
    found: dict[tuple[str, str, str], KernelFinding] = {}
    raw = sorted((f for r in runs for f in r.findings), key=lambda f: _order(f.kind))
    for finding in raw:
        made = KernelFinding(
            kind=_kind(finding.kind),
            severity="error",
            where=_where(kernel, finding.line),
            text=_text(kernel, finding),
        )
        found.setdefault((made.kind, made.where, finding.buffer), made)
    for r in runs[:1]:
        for name, (count, first) in r.unwritten.items():
            text = f"{count} elements of {name} are never written, the first at index {first}"
            found["unwritten", "", name] = KernelFinding(
                kind="unwritten", severity="error", where="", text=text
            )
    return list(found.values())


def costs(kernel: CudaKernel, places: Iterable[Place]) -> list[KernelFinding]:
    """Places where warps move more than they need, the worst first."""
    found = []
    for access in accesses(kernel, places):
        if access.factor < WORTH_A_WORD or access.requests <= _FEW_REQUESTS:
            continue
        found.append(
            KernelFinding(
                kind=_cost(access),
                severity="warning",
                where=access.where,
                text=describe(access),
                factor=access.factor,
            )
        )
    return sorted(found, key=lambda f: -(f.factor or 0))


def accesses(kernel: CudaKernel, places: Iterable[Place]) -> list[KernelAccess]:
    """The memory accesses by line, in the order of the lines."""
    made = []
    for place in places:
        operation = "atomic" if place.atomic else "store" if place.write else "load"
        made.append(
            KernelAccess(
                where=_where(kernel, place.line),
                space=place.space,
                buffer=place.buffer,
                operation=operation,
                bytes=place.bytes,
                requests=place.requests,
                factor=_factor(place),
                stride_bytes=place.stride or None,
            )
        )
    return sorted(made, key=lambda a: (_line(a.where), a.space, a.operation))


def describe(access: KernelAccess) -> str:
    """What is slow about an access, in one line."""
    target = f"{access.operation} of {access.buffer}" if access.buffer else access.operation
    if access.operation == "atomic":
        return (
            f"{access.factor:.3g} lanes of a warp meet on one address of {access.space} memory and "
            "wait for one another"
        )
    if access.space == "shared":
        return (
            f"shared memory {target} has {access.factor:.3g}-way bank conflicts"
            f"{_stride(access)}; pad the rows or change which thread takes which column"
        )
    return (
        f"uncoalesced {target} moves {access.factor:.3g} times the sectors that it needs"
        f"{_stride(access)}; let neighbouring threads take neighbouring elements"
    )


def _stride(access: KernelAccess) -> str:
    if access.stride_bytes is None:
        return ""
    return f" (threads are {access.stride_bytes} bytes apart)"


def _cost(access: KernelAccess) -> str:
    if access.operation == "atomic":
        return "atomic-contention"
    return "bank-conflict" if access.space == "shared" else "uncoalesced"


def _factor(place: Place) -> float:
    if place.atomic:
        return place.same_address / max(1, place.requests)
    if place.space == "shared":
        return place.wavefronts / max(1, place.ideal_wavefronts)
    return place.sectors / max(1, place.ideal_sectors)


def _where(kernel: CudaKernel, line: int) -> str:
    return f"{kernel.source_path().name}:{line}" if line else ""


def _line(where: str) -> int:
    return int(where.rpartition(":")[2] or 0) if where else 0


_ORDER = (
    "refused",
    "wild-write",
    "wild-read",
    "out-of-bounds-write",
    "out-of-bounds-read",
    "deadlock",
    "divergent-barrier",
    "barrier-after-exit",
    "race-read-after-write",
    "race-write-after-read",
    "race-write-write",
)


def _order(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _kind(kind: str) -> str:
    for short in ("race", "out-of-bounds", "wild"):
        if kind.startswith(short):
            return "out-of-bounds" if short == "wild" else short
    return kind


def _text(kernel: CudaKernel, f: RawFinding) -> str:
    who = f"thread {f.thread} of block {f.block}"
    other = f"thread {f.other_thread}"
    if f.other_block not in (-1, f.block):
        other += f" of block {f.other_block}"
    at = f" (line {f.other_line})" if f.other_line and f.other_line != f.line else ""
    what = f"{f.buffer}[{f.element}]" if f.buffer != "shared memory" else "shared memory"
    between = _between(f)
    texts = {
        "race-read-after-write": f"{who} reads {what} that {other} wrote{at} with no {between}",
        "race-write-after-read": f"{who} writes {what} that {other} reads{at} with no {between}",
        "race-write-write": f"{who} and {other} both write {what}{at} with no {between}",
        "uninitialised-shared": f"{who} reads shared memory that no thread of the block wrote",
        "uninitialised-output": f"{who} reads {what}, an output, before anything is written there",
        "out-of-bounds-write": f"{who} writes {what}, outside of {f.buffer}",
        "out-of-bounds-read": f"{who} reads {what}, outside of {f.buffer}",
        "wild-write": f"{who} writes memory of no argument; the launch was ended there",
        "wild-read": f"{who} reads memory of no argument; the launch was ended there",
        "misaligned": f"{who} accesses {f.buffer} at an address that is not a multiple of its size",
        "input-written": f"{who} writes {f.buffer}, an input that is not among `writes`",
        "divergent-barrier": f"{who} waits at this __syncthreads() and {other} at another one{at}",
        "barrier-after-exit": f"{who} waits at __syncthreads() and {other} has left the kernel",
        "deadlock": f"{who} waits for threads that never come; {other} waits elsewhere{at}",
        "lane-outside-mask": f"{who} takes part in a warp operation whose mask leaves it out",
        "too-long": "the launch makes more accesses than a check can follow; take smaller sizes",
    }
    return texts.get(f.kind) or f.text or f.kind


def _between(f: RawFinding) -> str:
    if f.other_block not in (-1, f.block):
        return "order between their blocks"
    if f.thread // 32 == f.other_thread // 32:
        return "__syncthreads() or __syncwarp() between"
    return "__syncthreads() between"
