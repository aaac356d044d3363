"""The C compiler of this machine, and shared libraries built by it once and kept.

A system compiler is taken first (`CC`, then cc, gcc, clang); where there is none that works, the
one inside the `ziglang` package serves. What is built is cached under the hash of everything that
it depends on, so a library from another processor or compiler is never loaded.
"""

import atexit
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from suanli.base.errors import SuanliError
from suanli.base.files import cache_dir
from suanli.base.lazy import present
from suanli.base.leftovers import temporary_folder

INSTALL = "pip install 'suanli[compiler]'"
_PROBE = '#include <string.h>\nint suanli_probe(void) { return (int)strlen(""); }\n'
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


class CompilerError(SuanliError):
    """The compiler refused a source, or took too long; `output` is all that it said."""

    def __init__(self, message: str, *, output: str = "", next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.output = output


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A C compiler that works here.

    Attributes:
        command: How it is called, such as ("gcc",).
        version: Its first line of `--version`.
        kind: "gcc", "clang" or "zig".
    """

    command: tuple[str, ...]
    version: str
    kind: str

    def __str__(self) -> str:
        name = " ".join(Path(part).name for part in self.command)
        return self.version if self.version.split()[0] == name else f"{name}: {self.version}"

    def build_shared(
        self, source: Path, flags: Sequence[str] = (), *, timeout_s: float = 120.0
    ) -> Path:
        """Compile one C file into a shared library, or find the one built before.

        Args:
            source: The C file.
            flags: Compiler flags; those that start with "-l" go behind the source.
            timeout_s: Seconds after which the compiler and its children are ended.

        Returns:
            Path of the library. It stands in the cache, or in a temporary folder of this process
            where the cache cannot be written.

        Raises:
            CompilerError: The source cannot be read, does not compile, or takes too long.
        """
        try:
            text = source.read_bytes()
        except OSError as error:
            raise CompilerError(f"cannot read {source}: {error.strerror}") from None
        name = f"{source.stem}-{self._key(text, flags)}{_SUFFIX}"
        for folder in _native_folders():
            library = folder / name
            if library.is_file():
                return library
            try:
                folder.mkdir(parents=True, exist_ok=True)
                build = temporary_folder(folder, ".build.")
            except OSError:
                continue
            try:
                self._compile(source, flags, build / name, timeout_s)
                # Another process may have put the same library there meanwhile: same bytes.
                (build / name).replace(library)
            finally:
                shutil.rmtree(build, ignore_errors=True)
            return library
        raise CompilerError("no folder can be written for what is compiled", next_step="free space")

    def _key(self, text: bytes, flags: Sequence[str]) -> str:
        parts = (*self.command, self.version, *flags, _machine())
        digest = hashlib.sha256(text)
        digest.update("\0".join(parts).encode())
        return digest.hexdigest()[:24]

    def _compile(self, source: Path, flags: Sequence[str], output: Path, timeout_s: float) -> None:
        libraries = [flag for flag in flags if flag.startswith("-l")]
        options = [flag for flag in flags if not flag.startswith("-l")]
        position = [] if sys.platform == "win32" else ["-fPIC"]
        command = [*self.command, *options, *position, "-shared", "-o", str(output)]
        code, said = run_limited([*command, str(source.resolve()), *libraries], timeout_s)
        if code is None:
            raise CompilerError(
                f"{self.kind} took more than {timeout_s:g} s on {source.name}", output=said
            )
        if code != 0 or not output.is_file():
            raise CompilerError(
                f"{self.kind} cannot compile {source.name}: {_first_error(said)}", output=said
            )


def find_compiler() -> Compiler | None:
    """The first compiler that can build a shared library here, or None.

    `CC` is tried first, then cc, gcc and clang, then the `ziglang` package.
    """
    return _find(os.environ.get("CC", ""), os.environ.get("PATH", ""))


@cache
def _find(preferred: str, _path: str) -> Compiler | None:
    candidates = [("cc",), ("gcc",), ("clang",)]
    try:
        chosen = tuple(shlex.split(preferred))
    except ValueError:
        chosen = ()
    for command in ([chosen] if chosen else []) + candidates:
        found = _system_compiler(command)
        if found is not None:
            return found
    return _zig_compiler()


def _system_compiler(command: tuple[str, ...]) -> Compiler | None:
    """The compiler behind a command, if it can compile and link a small file with a header."""
    if shutil.which(command[0]) is None:
        return None
    code, said = run_limited([*command, "--version"], 10.0)
    if code != 0 or not said.strip():
        return None
    version = said.strip().splitlines()[0]
    kind = "clang" if "clang" in said.lower() else "gcc"
    compiler = Compiler(command=command, version=version, kind=kind)
    with tempfile.TemporaryDirectory(prefix="suanli-") as folder:
        source = Path(folder) / "probe.c"
        source.write_text(_PROBE)
        try:
            compiler._compile(source, (), source.with_suffix(_SUFFIX), 30.0)
        except CompilerError:
            return None
    return compiler


def _zig_compiler() -> Compiler | None:
    if not present("ziglang"):
        return None
    base = (sys.executable, "-m", "ziglang")
    code, said = run_limited([*base, "version"], 30.0)
    if code != 0:
        return None
    return Compiler(command=(*base, "cc"), version=f"zig {said.strip()}", kind="zig")


def run_limited(command: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """Run a compiler or another tool with a time limit on it and all that it starts.

    Returns:
        Exit code (None after the limit, 127 where it cannot be started) and all output.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(_zig_cache()))
    environment.setdefault("ZIG_LOCAL_CACHE_DIR", environment["ZIG_GLOBAL_CACHE_DIR"])
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return 127, str(error)
    _bound(process.pid, timeout_s)
    with process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            _end(process)
            said, _ = process.communicate()
            return None, said
        except BaseException:
            _end(process)
            raise


def _bound(pid: int, timeout_s: float) -> None:
    """Let the system end it some time after its limit, should this process be killed meanwhile.

    Whatever it starts from now on has the same limit, of processor time.
    """
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource

        seconds = int(timeout_s) + 30
        resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds + 5))


def _end(process: "subprocess.Popen[str]") -> None:
    """End a compiler with the passes that it started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
            return
        except ProcessLookupError:
            return
    process.kill()


def _first_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in lines:
        if "error" in line.lower():
            return line
    return lines[-1] if lines else "it said nothing"


def _zig_cache() -> Path:
    """Where zig keeps the C library that it builds on first use."""
    folder = cache_dir() / "zig"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary_folder() / "zig"
    return folder if os.access(folder, os.W_OK) else _temporary_folder() / "zig"


def _native_folders() -> Iterator[Path]:
    """Where libraries are kept; the second is made only where the first cannot be written."""
    yield cache_dir() / "native"
    yield _temporary_folder()


@cache
def _temporary_folder() -> Path:
    """A private folder that goes when the process ends, or at a later run if it is killed."""
    folder = temporary_folder(None, "suanli-native-")
    atexit.register(shutil.rmtree, folder, True)
    return folder


@cache
def _machine() -> str:
    """What `-march=native` depends on: architecture and the processor's feature list."""
    facts = [sys.platform, platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    facts += sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join(facts)
