"""What runs in a process of its own: Triton's compiler, and its interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported, so the two never share a
process; a compiler that hangs and a kernel that crashes end with their process.
"""

import os
import time
from pathlib import Path
from typing import Any

from suanli.base import codec
from suanli.kernels.checking import check_here
from suanli.kernels.subjects import find_kernel


class KernelWorker:
    """Compiles and checks one kernel.

    Args:
        ref: A kernel that ships, or "file.py:name".
    """

    def __init__(self, ref: str) -> None:
        self._kernel = find_kernel(ref)

    def check(
        self, sizes: dict[str, int], dtype: str, config: dict[str, int] | None, seed: int
    ) -> Any:
        """`check_here` through the interpreter, as JSON."""
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("this process was not started for the interpreter")
        case = check_here(self._kernel, sizes, dtype, config=config, seed=seed)
        return codec.to_json(case)

    def compile(
        self, sizes: dict[str, int], dtype: str, config: dict[str, int] | None, arch: str, keep: str
    ) -> Any:
        """`compile_here`, as JSON; cubins go to the folder `keep` where it is not ""."""
        from suanli.kernels.triton_compile import compile_here

        made = compile_here(
            self._kernel, sizes, dtype, arch, config=config, keep=Path(keep) if keep else None
        )
        return [codec.to_json(item) for item in made]

    def hang(self) -> None:
        """Never answers, for the test of the time limit."""
        time.sleep(3600)
