"""One launch of a CUDA kernel on the CPU, in a process of its own and under a time limit."""

import ctypes
import json
import math
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from suanli.base.compiler import run_limited
from suanli.base.errors import BadInputError, TrialFailedError
from suanli.kernels.cuda.host_build import HostBuild
from suanli.kernels.cuda.lines import source_lines
from suanli.kernels.cuda.shared_variables import shared_variables, special_functions
from suanli.kernels.declaration import Config, Inputs, Outputs, Sizes
from suanli.kernels.spec import CudaKernel, Launch, scalar

_CHILD = Path(__file__).with_name("host_child.py")
_GUARD_BYTES = 65536
_SIGNALS = {
    signal.SIGFPE: "a whole number was divided by zero",
    signal.SIGSEGV: "a thread needs more stack than the 256 KB it has here",
}
_SITES = {
    "site": "line",
    "other_site": "other_line",
    "caller": "caller_line",
    "other_caller": "other_caller_line",
}
_DYNAMIC_MOST = 2**18
_ACCESSES = 300_000_000


@dataclass(frozen=True, kw_only=True)
class RawFinding:
    """A mistake that the runtime saw, with its first example.

    Attributes:
        kind: Such as "race-read-after-write" or "out-of-bounds-write".
        line: Line in the kernel's source; 0 where unknown.
        other_line: Line of the other access of a race, or of the other barrier.
        caller_line: Line that called the function which `line` is in; 0 in the kernel itself.
        other_caller_line: The same for `other_line`.
        element: Index in the buffer; in shared memory in units of the access; -1 where there is
            none.
        differs: For two stores with no order between, whether they stored different values.
    """

    kind: str
    line: int
    other_line: int
    caller_line: int
    other_caller_line: int
    buffer: str
    count: int
    element: int
    block: int
    thread: int
    other_block: int
    other_thread: int
    differs: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the warps asked for at one place in the code, summed over the traced blocks.

    Attributes:
        line: Line in the kernel's source; 0 where unknown.
        space: "global" or "shared".
        bytes: Of one lane's access.
        requests: How often a warp came by.
        sectors: 32-byte sectors of global memory that were moved, and `ideal_sectors` that the
            bytes asked for would fill.
        touched_lines: 128-byte lines of global memory, counted for each request.
        wavefronts: Passes through shared memory, and `ideal_wavefronts` without bank conflicts.
        same_address: For atomic operations: lanes that met on the busiest address, summed.
        stride: Bytes from one lane to the next, where it is always the same, else 0.
    """

    line: int
    space: str
    buffer: str
    write: bool
    atomic: bool
    bytes: int
    requests: int
    lanes: int
    sectors: int
    ideal_sectors: int
    touched_lines: int
    wavefronts: int
    ideal_wavefronts: int
    same_address: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class HostRun:
    """What one launch did.

    Attributes:
        outputs: The outputs, then the inputs that are changed in place; empty where only traced.
        findings: Mistakes.
        places: Memory accesses by place.
        unwritten: Output -> how many elements nobody wrote, and the first of them.
        blocks: How many blocks ran.
        barriers: How often a block passed a barrier.
        printed: What the threads printed, the first 16 KB of it.
    """

    outputs: Outputs
    findings: tuple[RawFinding, ...]
    places: tuple[Place, ...]
    unwritten: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    blocks: int = 0
    barriers: int = 0
    printed: str = ""


def run(
    kernel: CudaKernel,
    built: HostBuild,
    inputs: Inputs,
    *,
    config: Config,
    dtype: torch.dtype,
    backwards: bool = False,
    only_blocks: int = 0,
    timeout_s: float = 120.0,
) -> HostRun:
    """Launch a kernel once.

    Args:
        kernel: Which.
        built: Its libraries.
        inputs: CPU tensors and numbers by name, with the sizes under "sizes".
        config: The configuration that it was built with.
        dtype: Of the main input.
        backwards: Run blocks and threads in the opposite order, which uncovers what depends on it.
        only_blocks: Run so many blocks, spread over the grid, and only trace them; 0 for all.
        timeout_s: Limit of the whole launch.

    Raises:
        TrialFailedError: The kernel crashed or took too long.
        BadInputError: The launch is over a limit.
    """
    sizes: Sizes = inputs["sizes"]
    launch = kernel.launch_at(sizes, config)
    if launch.shared_bytes > _DYNAMIC_MOST:
        raise BadInputError(f"{kernel.name}: {launch.shared_bytes} bytes of dynamic shared memory")
    with tempfile.TemporaryDirectory(prefix="suanli-cuda-") as name:
        folder = Path(name)
        buffers, tensors = _buffers(kernel, inputs, dtype, folder, watched=only_blocks == 0)
        anchor, variables = shared_variables(built.kernel)
        job = {
            "runtime": str(built.runtime),
            "kernel": str(built.kernel),
            "buffers": buffers,
            "arguments": [_argument(n, buffers, inputs) for n in kernel.arguments],
            "grid": launch.grid,
            "block": launch.block,
            "dynamic_shared": launch.shared_bytes,
            "shared": [(v.name, v.begin, v.size) for v in variables],
            "anchor": anchor,
            "functions": special_functions(built.kernel),
            "reversed": backwards,
            "traced_blocks": only_blocks or 4,
            "only_traced": only_blocks > 0,
            "limit": _ACCESSES,
        }
        (folder / "job.json").write_text(json.dumps(job))
        _execute(kernel, folder, launch, timeout_s)
        report = json.loads((folder / "report.json").read_text())
        return _result(kernel, built, report, buffers, tensors if not only_blocks else {}, folder)


def _execute(kernel: CudaKernel, folder: Path, launch: Launch, timeout_s: float) -> None:
    code, said = run_limited([sys.executable, "-S", "-E", str(_CHILD), str(folder)], timeout_s)
    if code is None:
        raise TrialFailedError(
            f"{kernel.name} did not end within {timeout_s:g} s: a thread may wait for one that "
            "never comes",
            kind="timeout",
        )
    if code != 0 or not (folder / "report.json").is_file():
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        ended = signal.Signals(-code) if code < 0 else None
        how = _SIGNALS.get(ended, ended.name) if ended else last
        raise TrialFailedError(
            f"{kernel.name} crashed on the CPU with {launch.blocks} blocks: {how}", kind="crash"
        )


def _buffers(
    kernel: CudaKernel, inputs: Inputs, dtype: torch.dtype, folder: Path, *, watched: bool
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Descriptions of all buffers, and by name those tensors that the kernel writes."""
    described: list[dict[str, Any]] = []
    written: dict[str, torch.Tensor] = {}

    def describe(name: str, tensor: torch.Tensor, *, output: bool) -> None:
        plain = tensor.detach().cpu().contiguous()
        file = f"buffer{len(described)}.bin"
        if not output:
            plain.flatten().view(torch.uint8).numpy().tofile(folder / file)
        writable = output or name in kernel.writes
        if writable:
            written[name] = plain
        described.append(
            {
                "name": name,
                "bytes": plain.numel() * plain.element_size(),
                "element": plain.element_size(),
                "writable": writable,
                "output": output,
                "guard": _GUARD_BYTES,
                "watched": watched,
                "file": file,
            }
        )

    for name, (shape, kind) in kernel.outputs(inputs["sizes"], dtype).items():
        describe(name, torch.empty(shape, dtype=kind), output=True)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            describe(name, value, output=False)
    return described, written


def _argument(name: str, buffers: list[dict[str, Any]], inputs: Inputs) -> dict[str, Any]:
    for index, buffer in enumerate(buffers):
        if buffer["name"] == name:
            return {"kind": 0, "value": index}
    value = scalar(inputs[name] if name in inputs else inputs["sizes"][name])
    if isinstance(value, ctypes.Structure | ctypes.Union):
        return {"kind": 3, "value": bytes(value).hex()}
    real = isinstance(value, ctypes.c_float | ctypes.c_double)
    return {"kind": 2 if real else 1, "value": value.value}


def _result(
    kernel: CudaKernel,
    built: HostBuild,
    report: dict[str, Any],
    buffers: list[dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    folder: Path,
) -> HostRun:
    base = report["base"]
    sites = [f[key] for f in report["findings"] for key in _SITES]
    sites += [p["site"] for p in report["places"]]
    found = source_lines(built.kernel, (s - base for s in sites if s), kernel.source_path().name)
    lines = {offset + base: line for offset, line in found.items()}
    findings = tuple(_finding(entry, lines) for entry in report["findings"])
    places = tuple(_place(entry, lines, buffers) for entry in report["places"])
    # a launch that was ended has written nothing to the end
    unwritten = [] if report["stopped"] else report["unwritten"]
    outputs = []
    for buffer in buffers:
        tensor = tensors.get(buffer["name"])
        if tensor is not None:
            content = bytearray((folder / buffer["file"]).read_bytes())
            outputs.append(_filled(tensor, content))
    return HostRun(
        outputs=tuple(outputs),
        findings=findings,
        places=places,
        unwritten={name: (count, first) for name, count, first in unwritten if count},
        blocks=report["blocks"],
        barriers=report["barriers"],
        printed=report["printed"],
    )


def _filled(tensor: torch.Tensor, content: bytearray) -> torch.Tensor:
    if not content:
        return torch.empty_like(tensor)
    flat = torch.frombuffer(content, dtype=tensor.dtype).clone()
    return flat.reshape(tensor.shape) if math.prod(tensor.shape) else torch.empty_like(tensor)


def _finding(entry: dict[str, Any], lines: Mapping[int, int]) -> RawFinding:
    kept = {k: v for k, v in entry.items() if k not in _SITES}
    kept |= {name: lines.get(entry[site], 0) for site, name in _SITES.items()}
    return RawFinding(**kept)


def _place(entry: dict[str, Any], lines: Mapping[int, int], buffers: list[dict[str, Any]]) -> Place:
    kept = {k: v for k, v in entry.items() if k not in ("site", "buffer", "distinct_bytes")}
    kept["write"], kept["atomic"] = bool(entry["write"]), bool(entry["atomic"])
    buffer = buffers[entry["buffer"]]["name"] if entry["buffer"] >= 0 else ""
    return Place(line=lines.get(entry["site"], 0), buffer=buffer, **kept)
