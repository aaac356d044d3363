"""What the host execution saw, in words with the line of the person's file."""

import re
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
        made = _index(kernel, finding) if finding.kind == "array-index" else _error(kernel, finding)
        if made is None:
            continue
        key = (made.kind, made.where, finding.buffer)
        known = found.get(key)
        seen = finding.kind == "array-index" and any(key[:2] == other[:2] for other in found)
        worse = known is None or (known.severity == "warning" and made.severity == "error")
        if worse and not seen:
            found[key] = made
    for r in runs[:1]:
        for name, (count, first) in r.unwritten.items():
            text = f"{count} elements of {name} are never written, the first at index {first}"
            found["unwritten", "", name] = KernelFinding(
                kind="unwritten", severity="error", where="", text=text
            )
    return list(found.values())


def _error(kernel: CudaKernel, f: RawFinding) -> KernelFinding:
    # a store that changes nothing, such as a flag that many threads set, does no harm
    harmless = f.kind == "race-write-write" and not f.differs
    return KernelFinding(
        kind=_kind(f.kind),
        severity="warning" if harmless else "error",
        where=_where(kernel, f.line),
        text=_called(f) + _text(f) + (", the same value in this run" if harmless else ""),
    )


def _called(f: RawFinding) -> str:
    """For a function of the person's own: from where it was called."""
    return f"called at line {f.caller_line}, " if f.caller_line not in (0, f.line) else ""


def _index(kernel: CudaKernel, f: RawFinding) -> KernelFinding | None:
    """An index beyond an array's declared extent.

    One index of several may run into the next row on purpose, which is a warning, and none for
    shared memory, where the runtime knows the variable's end. By itself it leaves the array.
    """
    lines = kernel.text().splitlines()
    place = f.line - kernel.first_line()
    line = lines[place] if 0 <= place < len(lines) else ""
    name, several = _indexed(line, f.other_thread)
    if several and name and re.search(rf"__shared__[^;]*\b{name}\s*[\[,;]", kernel.text()):
        return None
    declared = f.text.strip("'")
    return KernelFinding(
        kind="out-of-bounds",
        severity="warning" if several else "error",
        where=_where(kernel, f.line),
        text=_called(f)
        + (
            f"thread {f.thread} of block {f.block} takes index {f.element} of "
            f"{name or 'an array'}, declared as {declared}"
        ),
    )


def _indexed(line: str, column: int) -> tuple[str, bool]:
    """(the array, whether it has several indices) where `column` is that of the closing bracket."""
    if line[column - 1 : column] != "]":
        return "", True  # inside a macro
    several = line[column:].lstrip().startswith("[")
    end = column
    while line[:end].rstrip().endswith("]"):
        end = len(line[:end].rstrip()) - 1
        depth = 1
        while depth and end > 0:
            end -= 1
            depth += {"]": 1, "[": -1}.get(line[end], 0)
        several |= line[:end].rstrip().endswith("]")
    name = re.search(r"(\w+)\s*$", line[:end])
    return (name[1], several) if name else ("", several)


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
    "waits-for-block",
    "trap",
    "wild-write",
    "wild-read",
    "out-of-bounds-write",
    "out-of-bounds-read",
    "foreign-local",
    "misaligned",
    "waits-in-loop",
    "deadlock",
    "divergent-barrier",
    "barrier-after-exit",
    "race-read-after-write",
    "race-write-after-read",
    "race-write-write",
)

_NAMES = {
    "waits-for-block": "refused",
    "too-long": "refused",
    "waits-in-loop": "deadlock",
}


def _order(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _kind(kind: str) -> str:
    for short in ("race", "out-of-bounds", "wild"):
        if kind.startswith(short):
            return "out-of-bounds" if short == "wild" else short
    return _NAMES.get(kind, kind)


def _text(f: RawFinding) -> str:
    who = f"thread {f.thread} of block {f.block}"
    other = f"thread {f.other_thread}" if f.other_thread >= 0 else "no other"
    if f.other_block not in (-1, f.block):
        other += f" of block {f.other_block}"
    at = _at(f)
    what = f"{f.buffer}[{f.element}]"
    between = _between(f)
    texts = {
        "race-read-after-write": f"{who} reads {what} that {other} wrote{at} with no {between}",
        "race-write-after-read": f"{who} writes {what} that {other} reads{at} with no {between}",
        "race-write-write": f"{who} and {other} both write {what}{at} with no {between}",
        "uninitialised-shared": f"{who} reads {what}, which no thread of the block wrote",
        "uninitialised-output": f"{who} reads {what}, an output, before anything is written there",
        "out-of-bounds-write": f"{who} writes {what}, outside of {f.buffer}",
        "out-of-bounds-read": f"{who} reads {what}, outside of {f.buffer}",
        "wild-write": f"{who} writes memory of no argument; the launch was ended there",
        "wild-read": f"{who} reads memory of no argument; the launch was ended there",
        "foreign-local": (
            f"{who} goes through a pointer to a local variable of {other}; local memory is each "
            "thread's own"
        ),
        "misaligned": f"{who} accesses {f.buffer} at an address that is not a multiple of its size",
        "input-written": f"{who} writes {f.buffer}, an input that is not among `writes`",
        "divergent-barrier": f"{who} waits at this __syncthreads() and {other} at another one{at}",
        "barrier-after-exit": f"{who} waits at __syncthreads() and {other} has left the kernel",
        "trap": f"{f.text} in {who}",
        "waits-in-loop": f"{who} waits in a loop for what no other thread will do any more",
        "waits-for-block": (
            f"{who} waits in a loop for another block, and blocks are executed one after another "
            "on the CPU, in their order and in the opposite one (a block that takes its number "
            "from an atomic counter waits only for earlier ones)"
        ),
        "deadlock": f"{who} waits for threads that never come; {other} waits elsewhere{at}",
        "lane-outside-mask": f"{who} takes part in a warp operation whose mask leaves it out",
        "too-long": "the launch makes more accesses than a check can follow; take smaller sizes",
    }
    return texts.get(f.kind) or f.text or f.kind


def _at(f: RawFinding) -> str:
    """Where the other access or barrier stands, if not at the same place."""
    places = (f.other_line, f.other_caller_line)
    if not f.other_line or places == (f.line, f.caller_line):
        return ""
    called = f.other_caller_line not in (0, f.other_line, f.caller_line)
    return f" (line {f.other_line}{f', called at line {f.other_caller_line}' * called})"


def _between(f: RawFinding) -> str:
    if f.other_block not in (-1, f.block):
        return "order between their blocks"
    if f.thread // 32 == f.other_thread // 32:
        return "__syncthreads() or __syncwarp() between"
    return "__syncthreads() between"
