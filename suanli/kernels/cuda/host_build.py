"""Builds a CUDA kernel for the CPU: the text with the host headers, every access instrumented."""

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from suanli.base.compiler import INSTALL as INSTALL_COMPILER
from suanli.base.compiler import Compiler, CompilerError, find_compiler
from suanli.base.errors import BadInputError, MissingBackendError, SuanliError
from suanli.base.files import cache_dir, write_atomic
from suanli.kernels.cuda.compile import compile_cuda
from suanli.kernels.cuda.source import Refusal, blanked, for_host
from suanli.kernels.declaration import Config, Sizes
from suanli.kernels.spec import CudaKernel

_HOST = Path(__file__).parent.parent / "host"
_BUILD_S = 60.0
# -O0 keeps one access in the code for one access in the text.
_KERNEL_FLAGS = (
    *("-x", "c++", "-std=gnu++17", "-O0", "-g1", "-w", "-nodefaultlibs"),
    *("-fsanitize=thread", "-fsanitize=bounds"),
    *("-fno-exceptions", "-fno-threadsafe-statics", "-ffp-contract=off"),
)
# What nobody wrote in a local variable must not be 0 by chance.
_PATTERN = "-ftrivial-auto-var-init=pattern"
_OWN_FLAGS = {
    # its instrumentation does not see what a call returns into memory; this makes it a copy
    "gcc": ("-fmax-errors=3", "-fno-elide-constructors"),
    "clang": (_PATTERN, "-ferror-limit=3", "-mllvm", "-tsan-distinguish-volatile=1"),
    "zig": (_PATTERN, "-ferror-limit=3", "-fno-sanitize=undefined"),
}
_RUNTIME_FLAGS = ("-x", "c++", "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-lstdc++", "-lm")
_ERROR = re.compile(
    r"^(?P<file>[^\s:][^:]*):(?P<line>\d+):(?:\d+:)? (?:fatal )?error: (?P<text>.*)$"
)


# What compilers say where the entry point has a mangled name, or is a template.
_NO_ENTRY = ("aliased to undefined symbol", "must point to a defined", "no matches converting")
_OVER_BOUNDS = "more than __launch_bounds__ allows"
_INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class HostBuild:
    """A kernel built for the CPU.

    Attributes:
        kernel: Shared library of the kernel.
        runtime: Shared library that executes it.
        compiler: Which compiler built them.
    """

    kernel: Path
    runtime: Path
    compiler: str


def build(
    kernel: CudaKernel, sizes: Sizes, config: Config, dtype: str, *, timeout_s: float = _BUILD_S
) -> HostBuild:
    """Build a kernel, or find what was built before.

    Args:
        kernel: What to build.
        sizes: Shape, for macros.
        config: The configuration.
        dtype: Of the main input.
        timeout_s: Limit of the compiler; a minute at most is given to it.

    Raises:
        MissingBackendError: There is no C++ compiler.
        BadInputError: The kernel does not compile, where its own line is named, or takes too long.
        Refusal: It uses what cannot be executed on the CPU.
        SuanliError: This operating system cannot do it.
    """
    if not sys.platform.startswith("linux"):
        raise SuanliError("CUDA kernels are executed on the CPU only under Linux")
    compiler = find_compiler()
    if compiler is None:
        raise MissingBackendError("a C++ compiler", INSTALL_COMPILER)
    text = program(kernel, sizes, config, dtype)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_dir() / "native" / "cuda" / f"{kernel.function}-{digest}.cpp"
    write_atomic(path, text)
    include = (f"-I{_HOST / 'include'}", f"-I{kernel.source_path().resolve().parent}")
    stamp = f"-DSUANLI_HEADERS={_headers()}"
    try:
        runtime = compiler.build_shared(
            _HOST / "runtime.cpp", (*_RUNTIME_FLAGS, stamp), timeout_s=4 * _BUILD_S
        )
    except CompilerError as error:
        raise MissingBackendError(
            f"a C++ compiler that works ({error})", INSTALL_COMPILER
        ) from None
    try:
        own = (*_OWN_FLAGS[compiler.kind], *_of_version(compiler))
        flags = (*_KERNEL_FLAGS, *own, *include, stamp, *_beside(kernel), "-lm", "-lc")
        library = compiler.build_shared(path, flags, timeout_s=min(_BUILD_S, timeout_s))
    except CompilerError as error:
        said = first_error(error.output, kernel)
        if not said:  # it took too long, or broke
            raise BadInputError(f"{kernel.name}: {error}") from None
        if any(sign in error.output for sign in _NO_ENTRY):
            raise BadInputError(
                f'{kernel.name}: {kernel.function} is no extern "C" __global__ function',
                next_step="a template is called from one that is",
            ) from None
        # that arguments or threads differ in number from what is declared is seen here only
        differ = f"{kernel.function} does not take the" in said or _OVER_BOUNDS in said
        if differ or not _compiles_for_a_gpu(kernel, sizes, config, dtype):
            raise BadInputError(said) from None
        place = re.match(r"[^:]*:(\d+): ", said)
        line = int(place[1]) - kernel.first_line() + 1 if place else 1
        what = said[place.end() :] if place else said
        raise Refusal(reason=f"not known to the execution on the CPU: {what}", line=line) from None
    return HostBuild(kernel=library, runtime=runtime, compiler=str(compiler))


def _of_version(compiler: Compiler) -> tuple[str, ...]:
    """What gcc knows from version 11 (volatile accesses told apart) and 12 (patterns) on."""
    version = re.search(r" (\d+)\.\d+\.\d+", compiler.version)
    if compiler.kind != "gcc" or version is None:
        return ()
    volatile = ("--param", "tsan-distinguish-volatile=1") if int(version[1]) >= 11 else ()
    return (*volatile, *((_PATTERN,) if int(version[1]) >= 12 else ()))


def _beside(kernel: CudaKernel) -> tuple[str, ...]:
    """A stamp of the headers beside the source that it includes, so that a change builds anew."""
    folder, digest = kernel.source_path().resolve().parent, hashlib.sha256()
    wanted, known = _INCLUDED.findall(kernel.text()), set[str]()
    while wanted:
        name = wanted.pop()
        path = folder / name
        if name in known or not path.is_file():
            continue
        known.add(name)
        content = path.read_bytes()
        digest.update(content)
        wanted += _INCLUDED.findall(content.decode("utf-8", "replace"))
    return (f"-DSUANLI_BESIDE=h{digest.hexdigest()[:16]}",) if known else ()


def _compiles_for_a_gpu(kernel: CudaKernel, sizes: Sizes, config: Config, dtype: str) -> bool:
    """Whether NVIDIA's compiler takes what the CPU's does not; False where there is none here."""
    try:
        compile_cuda(kernel, "sm_90", sizes=sizes, config=config, dtype=dtype, timeout_s=_BUILD_S)
    except SuanliError:
        return False
    return True


def program(kernel: CudaKernel, sizes: Sizes, config: Config, dtype: str) -> str:
    """The whole text that is compiled for the CPU.

    Raises:
        Refusal: The kernel uses what cannot be executed on the CPU.
        BadInputError: The dtype or the source cannot be used.
    """
    macros = [f"#define {k} {v}" for k, v in kernel.macros(sizes, config, dtype).items()]
    body = for_host(kernel.text())
    matrix = ["#include <suanli_mma.h>"] if "suanli_mma<" in body else []
    count = len(kernel.arguments)
    return "\n".join(
        [
            "#include <suanli_cuda.h>",
            *_needed(body),
            *matrix,
            *macros,
            f'#line {kernel.first_line()} "{kernel.source_path().name}"',
            body,
            *_bounds(kernel, body, sizes, config),
            '#line 1 "suanli_entry.cpp"',
            f'extern "C" void SUANLI_LINKED() __attribute__((alias("{kernel.function}")));',
            "#include <suanli_entry.h>",
            f"static_assert(suanli_arity(&{kernel.function}) == {count}, "
            f'"{kernel.function} does not take the {count} arguments that the kernel file names");',
            'extern "C" void suanli_entry(const suanli_slot *slots) '
            f"{{ suanli_start(&{kernel.function}, slots); }}",
            "",
        ]
    )


def _bounds(kernel: CudaKernel, body: str, sizes: Sizes, config: Config) -> list[str]:
    """The check of a launch against the kernel's own `__launch_bounds__`, which a GPU refuses."""
    bare = blanked(body)
    entry = re.search(rf"\b{kernel.function}\s*\(", bare)
    begin = max(bare.rfind(end, 0, entry.start()) for end in ";}") if entry else 0
    found = re.search(r"\b__launch_bounds__\s*\(", bare[begin + 1 : entry.start()] if entry else "")
    if not found:
        return []
    opening = begin + found.end()
    depth, most = 0, ""
    for letter in bare[opening:]:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 or (depth == 1 and letter == ","):
            break
        most += letter
    threads = kernel.launch_at(sizes, config).threads
    line = kernel.first_line() + bare.count("\n", 0, opening)
    return [
        f'#line {line} "{kernel.source_path().name}"',
        f"static_assert({threads} <= ({most[1:].strip()}), "
        f'"a block of the launch has {threads} threads, {_OVER_BOUNDS}");',
    ]


def _needed(body: str) -> list[str]:
    """Headers for `ELEMENT`, which the text may not include for itself."""
    return [f"#include <{name}>" for name in ("cuda_fp16.h", "cuda_bf16.h") if "ELEMENT" in body]


def first_error(said: str, kernel: CudaKernel) -> str:
    """The first error in a compiler's output, as "file:line: text"; "" where there is none."""
    name = kernel.source_path().name
    errors = [match for match in map(_ERROR.match, said.splitlines()) if match]
    if not errors:
        return ""
    own = [match for match in errors if Path(match["file"]).name == name]
    match = (own or errors)[0]
    text = match["text"].removeprefix("static assertion failed: ")
    if own:
        return f"{name}:{match['line']}: {text}"
    return f"{name}: {text}"


@cache
def _headers() -> str:
    """Hash of everything that the builds include."""
    digest = hashlib.sha256()
    for path in sorted(_HOST.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return f"h{digest.hexdigest()[:16]}"
