"""Compiles with NVRTC in a process of its own: `python nvrtc_child.py LIBRARY SOURCE OUT OPTION…`.

A program by itself with the standard library only. What the compiler says goes to standard
output; the machine code into OUT. The exit code is 3 where the source does not compile and 4 where
NVRTC does not know the architecture.
"""

import ctypes
import sys
from pathlib import Path

_INVALID_OPTION = 5  # NVRTC_ERROR_INVALID_OPTION of nvrtc.h


def main(library: str, source: str, out: str, options: list[str]) -> int:
    """Compile one file; gives the exit code."""
    nvrtc = ctypes.CDLL(library)
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()
    text = Path(source).read_bytes()
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None)
    if code:
        sys.stdout.write(nvrtc.nvrtcGetErrorString(code).decode())
        return 1
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    sys.stdout.write(log.value.decode("utf-8", "replace") + "\n")
    if code:
        sys.stdout.write(nvrtc.nvrtcGetErrorString(code).decode() + "\n")
        return 4 if code == _INVALID_OPTION else 3
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    Path(out).write_bytes(cubin.raw)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
