"""From addresses in the built kernel to lines of the person's file."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from suanli.base.compiler import run_limited

_PLACE = re.compile(r"^(.*):(\d+)(?: \(discriminator \d+\))?$")


def source_lines(library: Path, offsets: Iterable[int], source_name: str) -> dict[int, int]:
    """Line of the kernel's own source for each code address.

    An address inside an inlined function of the runtime counts for the line that called it. Where
    neither addr2line nor llvm-symbolizer is installed, nothing is known.

    Args:
        library: Shared library with line numbers.
        offsets: Return addresses, relative to where the library is loaded.
        source_name: Name that the source goes by in the line numbers.
    """
    wanted = sorted(set(offsets))
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if tool is None or not wanted:
        return {}
    # a return address belongs to the instruction before it
    asked = [hex(offset - 1) for offset in wanted]
    code, said = run_limited([tool, "-a", "-i", "-e", str(library), *asked], 30.0)
    if code != 0:
        return {}
    found: dict[int, int] = {}
    current = -1
    for text in said.splitlines():
        if re.fullmatch(r"0x[0-9a-f]+", text.strip()):
            current = int(text, 16) + 1
            continue
        match = _PLACE.match(text.strip())
        if match and Path(match[1]).name == source_name and current not in found:
            found[current] = int(match[2])
    return found
