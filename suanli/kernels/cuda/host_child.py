"""Runs a built kernel in a process of its own: `python host_child.py FOLDER`.

A program by itself with the standard library only, so that it starts in no time and a kernel that
crashes ends nothing but it. FOLDER holds job.json and one file per buffer; outputs and report.json
are written into it.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

_LONG = ctypes.c_ulong


class _Slot(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("whole", ctypes.c_longlong),
        ("real", ctypes.c_double),
        ("pointer", ctypes.c_void_p),
    )


def main(folder: Path) -> None:
    """Do the job in `folder`."""
    job = json.loads((folder / "job.json").read_text())
    runtime = ctypes.CDLL(job["runtime"], mode=ctypes.RTLD_GLOBAL)
    runtime.suanli_buffer.restype = ctypes.c_void_p
    runtime.suanli_report.restype = ctypes.c_char_p
    runtime.suanli_unwritten.restype = ctypes.c_longlong
    kernel = ctypes.CDLL(job["kernel"])
    runtime.suanli_begin()
    addresses = [_buffer(runtime, folder, buffer) for buffer in job["buffers"]]
    begin, end = _extent(job["kernel"])
    _module(runtime, kernel, job, (begin, end))
    slots = (_Slot * max(1, len(job["arguments"])))()
    structures: list[Any] = []
    for slot, argument in zip(slots, job["arguments"], strict=False):
        slot.kind = argument["kind"]
        if slot.kind == 0:
            slot.pointer = addresses[argument["value"]]
        elif slot.kind == 1:
            slot.whole = argument["value"]
        elif slot.kind == 3:
            structures.append(ctypes.create_string_buffer(bytes.fromhex(argument["value"])))
            slot.whole = len(structures[-1]) - 1  # the buffer ends with a zero of its own
            slot.pointer = ctypes.addressof(structures[-1])
        else:
            slot.real = argument["value"]
    three = ctypes.c_uint * 3
    runtime.suanli_launch(
        kernel.suanli_entry,
        slots,
        three(*job["grid"]),
        three(*job["block"]),
        int(job["reversed"]),
        int(job["traced_blocks"]),
        int(job["only_traced"]),
        ctypes.c_ulonglong(job["limit"]),
    )
    report: dict[str, Any] = json.loads(runtime.suanli_report().decode("utf-8", "replace"))
    report["base"] = begin
    report["unwritten"] = []
    first = ctypes.c_longlong()
    for index, buffer in enumerate(job["buffers"]):
        if not buffer["output"] or job["only_traced"]:
            continue
        count = runtime.suanli_unwritten(index, ctypes.byref(first))
        report["unwritten"].append([buffer["name"], count, first.value])
    for address, buffer in zip(addresses, job["buffers"], strict=True):
        if buffer["writable"] and not job["only_traced"]:
            made = ctypes.string_at(address, buffer["bytes"])
            (folder / buffer["file"]).write_bytes(made)
    (folder / "report.json").write_text(json.dumps(report))


def _buffer(runtime: Any, folder: Path, buffer: dict[str, Any]) -> int:
    address = runtime.suanli_buffer(
        buffer["name"].encode(),
        _LONG(buffer["bytes"]),
        _LONG(buffer["element"]),
        int(buffer["writable"]),
        int(buffer["output"]),
        _LONG(buffer["guard"]),
        int(buffer["watched"]),
    )
    if not address:
        raise MemoryError(buffer["name"])
    if not buffer["output"]:
        content = (folder / buffer["file"]).read_bytes()
        ctypes.memmove(address, content, len(content))
    return int(address)


def _extent(library: str) -> tuple[int, int]:
    """Where a loaded library lies."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    own = [line[0].split("-") for line in lines if line[-1] == str(Path(library).resolve())]
    pages = [int(page, 16) for pair in own for page in pair]
    return min(pages), max(pages) + 65536  # zero-initialised data follows without a name


def _module(runtime: Any, kernel: Any, job: dict[str, Any], extent: tuple[int, int]) -> None:
    """Tell the runtime where the kernel's own data and its shared variables lie."""
    for name, begin, size in job["shared"]:
        runtime.suanli_variable(name.encode(), _LONG(begin), _LONG(size))
    for begin, size, kind in job["functions"]:
        runtime.suanli_function(ctypes.c_void_p(extent[0] + begin), _LONG(size), kind)
    kernel.suanli_anchor_address.restype = ctypes.c_void_p
    shared = (kernel.suanli_anchor_address() or 0) - job["anchor"]
    pointers = map(ctypes.c_void_p, (*extent, shared))
    runtime.suanli_module(*pointers, _LONG(job["dynamic_shared"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
