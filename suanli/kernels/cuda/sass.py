"""What kind of instructions machine code holds, by NVIDIA's disassembler."""

import re
import tempfile
from pathlib import Path

from suanli.base.compiler import run_limited
from suanli.base.kernel_results import InstructionMix
from suanli.kernels.cuda import toolkit

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)"
)
_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)")
_MATRIX = re.compile(r"^(?:H|I|B|D|Q|O)G?MMA$|^UTC\w*MMA$|^WARPGROUP$")
_SKIPPED = {"NOP"}


def instruction_mix(
    code: bytes, function: str = "", *, timeout_s: float = 30.0
) -> InstructionMix | None:
    """Count the instructions of a cubin.

    Args:
        code: The cubin.
        function: Only those of this function; "" for all.
        timeout_s: Limit of the disassembler.

    Returns:
        The counts; None where no disassembler is installed or it cannot read this code.
    """
    tool = toolkit.disassembler()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory(prefix="suanli-sass-") as name:
        path = Path(name) / "kernel.cubin"
        path.write_bytes(code)
        status, said = run_limited([str(tool), "-c", str(path)], timeout_s)
    return parse(said, function) if status == 0 else None


def parse(listing: str, function: str = "") -> InstructionMix | None:
    """Count the instructions of nvdisasm's listing; None where there are none.

    Code behind the last EXIT that only jumps to itself is padding and not counted.
    """
    counts: dict[str, int] = {}
    total = 0
    current = ""
    for line in listing.splitlines():
        section = _FUNCTION.match(line)
        current = section[1] if section else current
        match = _INSTRUCTION.match(line)
        if match is None or match[1] in _SKIPPED or (function and current != function):
            continue
        total += 1
        for kind in _kinds(match[1], match[2]):
            counts[kind] = counts.get(kind, 0) + 1
    return InstructionMix(total=total, **counts) if total else None


def _kinds(name: str, modifiers: str) -> list[str]:
    wide = ".128" in modifiers
    if _MATRIX.match(name) and name != "WARPGROUP":
        return ["tensor_core"]
    if name in ("LDG", "LD", "LDGSTS", "UBLKCP", "UTMALDG"):
        return ["global_loads", *["wide_loads"] * wide]
    if name in ("STG", "ST", "UTMASTG"):
        return ["global_stores", *["wide_stores"] * wide]
    if name in ("LDS", "STS", "LDSM", "STSM"):
        return ["shared"]
    if name in ("LDL", "STL"):
        return ["local"]
    if name.startswith(("ATOM", "RED")) and name != "REDUX":
        return ["atomics"]
    plain = {"BAR": "barriers", "SHFL": "shuffles", "REDUX": "shuffles", "MUFU": "special"}
    return [plain[name]] if name in plain else []
