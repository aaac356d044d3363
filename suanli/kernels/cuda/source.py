"""CUDA C++ text made ready for the CPU's compiler, line by line where it was."""

import re
from dataclasses import dataclass

from suanli.base.errors import BadInputError
from suanli.kernels.cuda.ptx import translate

_EXTERN_SHARED = re.compile(
    r"\bextern\s+__shared__\s+"
    r"(?P<before>(?:__align__\s*\(\s*\d+\s*\)\s*|alignas\s*\(\s*\d+\s*\)\s*)?)"
    r"(?P<type>[\w:\s<>,]+?)\s*(?P<name>\b\w+)\s*\[\s*\]\s*;"
)
_COMMENT_OR_STRING = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL
)
_ASM = re.compile(r"\b(?:asm|__asm__)\b\s*(?:volatile|__volatile__)?\s*\(")
# What may stand before `__shared__` and must stand behind it for the host headers.
_BEFORE_SHARED = re.compile(
    r"\b(?P<before>(?:(?:static|volatile|const|__align__\s*\(\s*\d+\s*\)|"
    r"alignas\s*\(\s*\w+\s*\))\s+)+)__shared__\b"
)
_ALIGNAS = re.compile(r"\b__shared__\s+alignas\s*\(")
# What the host execution has no equal for; each with what to do instead.
_REFUSED = {
    r"<<<": "a kernel that launches kernels",
    r"\bcudaLaunchKernel\b|\bcudaMalloc\b|\bcudaMemcpy\w*\b": "host code (give device code only)",
    r"\btex(?:1D|2D|3D)(?:fetch|Lod|Layered)?\s*[<(]|\bsurf2D\w+": "texture and surface fetches",
    r"\b__pipeline_\w+|\bmemcpy_async\b|\bcuda::(?:barrier|pipeline)\b|<cuda/(?:barrier|pipeline)>"
    r"|<cuda_pipeline\w*\.h>": "asynchronous copies",
    r"\bcub::|#\s*include\s*<(?:cub|thrust|cutlass|cute)/": "CUB, Thrust and CUTLASS",
    r"\b(?:malloc|free)\s*\(|\bnew\s+\w+\s*[\[({]": "memory that the kernel allocates itself",
    r"\bthis_cluster\s*\(|\bmap_shared_rank\b": "clusters of blocks",
}


@dataclass(frozen=True, kw_only=True)
class Refusal(Exception):
    """The kernel uses what cannot be executed on the CPU."""

    reason: str
    line: int

    def __str__(self) -> str:
        return self.reason


def blanked(text: str) -> str:
    """The text with comments and strings as spaces, so that positions and lines stay."""

    def spaces(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    return _COMMENT_OR_STRING.sub(spaces, text)


def for_host(text: str) -> str:
    """CUDA C++ as the CPU's compiler takes it together with the host headers.

    Dynamic shared memory becomes a pointer into the runtime's, and inline PTX a call. Line breaks
    stay where they are.

    Raises:
        Refusal: It uses what cannot be executed here.
    """
    bare = blanked(text)
    for pattern, what in _REFUSED.items():
        found = re.search(pattern, bare)
        if found:
            line = 1 + bare.count("\n", 0, found.start())
            raise Refusal(reason=f"{what} cannot be executed on the CPU", line=line)
    return _shared(_inline_ptx(text, bare))


def _behind(match: re.Match[str]) -> str:
    """Qualifiers behind `__shared__`, where they belong to the variable; lines stay."""
    kept = re.sub(r"\bstatic\b", "", match["before"]).strip()
    kept = kept.replace("alignas", "__align__")
    return f"__shared__ {kept}" + "\n" * match.group().count("\n")


def _shared(text: str) -> str:
    text = _ALIGNAS.sub("__shared__ __align__(", _BEFORE_SHARED.sub(_behind, text))

    def pointer(match: re.Match[str]) -> str:
        kind = match["type"].strip()
        made = f"{kind}* const {match['name']} = reinterpret_cast<{kind}*>(suanli_dynamic_shared);"
        return "static " + made + "\n" * match.group().count("\n")

    return _EXTERN_SHARED.sub(pointer, text)


def _inline_ptx(text: str, bare: str) -> str:
    parts, end = [], 0
    for match in _ASM.finditer(bare):
        if match.start() < end:
            continue
        close = _closing(bare, match.end() - 1)
        statement = text[match.end() : close]
        line = 1 + bare.count("\n", 0, match.start())
        try:
            call = translate(statement)
        except ValueError as error:
            raise Refusal(reason=str(error), line=line) from None
        parts += [text[end : match.start()], call, "\n" * text[match.start() : close].count("\n")]
        end = close + 1
    return "".join([*parts, text[end:]])


def _closing(bare: str, opening: int) -> int:
    """Place of the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(bare)):
        depth += {"(": 1, ")": -1}.get(bare[place], 0)
        if depth == 0:
            return place
    raise BadInputError("an asm statement is not closed")
