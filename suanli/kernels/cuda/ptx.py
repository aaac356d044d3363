"""Inline PTX as calls of the host execution: the warp matrix instructions, and no others."""

import re

# mma.sync: (shape, type of D, A, B, C) -> registers a lane holds of D, A, B (PTX ISA, 9.7.15)
_MMA = {
    ("m16n8k16", "f32", "f16", "f16", "f32"): (4, 4, 2),
    ("m16n8k16", "f32", "bf16", "bf16", "f32"): (4, 4, 2),
    ("m16n8k8", "f32", "f16", "f16", "f32"): (4, 2, 1),
    ("m16n8k8", "f32", "bf16", "bf16", "f32"): (4, 2, 1),
    ("m16n8k8", "f32", "tf32", "tf32", "f32"): (4, 4, 2),
    ("m16n8k4", "f32", "tf32", "tf32", "f32"): (4, 2, 1),
    ("m16n8k32", "s32", "s8", "s8", "s32"): (4, 4, 2),
    ("m16n8k16", "s32", "s8", "s8", "s32"): (4, 2, 1),
}
_STRING = re.compile(r'"((?:\\.|[^"\\])*)"')
_MMA_NAME = re.compile(
    r"mma\.sync\.aligned\.(m\d+n\d+k\d+)\.row\.col(?:\.satfinite)?\.(\w+)\.(\w+)\.(\w+)\.(\w+)"
)


def translate(statement: str) -> str:
    """A call in C++ that does what one asm statement does.

    Args:
        statement: What stands between its brackets.

    Raises:
        ValueError: The instruction is not known here; the message is for the person.
    """
    pieces = _split(statement, ":")
    template = "".join(_STRING.findall(pieces[0])).replace("\\n", " ").replace("\\t", " ").strip()
    operands = [o for piece in pieces[1:3] for o in _operands(piece)]
    instructions = [part.strip() for part in template.strip("{} ").split(";") if part.strip(" {}")]
    name = instructions[0].split()[0] if instructions else ""
    if len(instructions) != 1:
        raise ValueError(f"inline PTX with {len(instructions)} instructions is not executed here")
    match = _MMA_NAME.match(name)
    key = match.groups() if match else ()
    if key not in _MMA:
        raise ValueError(
            f"the instruction {name} is not executed on the CPU; wmma and mma.sync with 16-bit, "
            "tf32 and int8 operands are"
        )
    return _mma(key, [operands[int(n)] for n in re.findall(r"%(\d+)", instructions[0])])


def _mma(key: tuple[str, ...], registers: list[str]) -> str:
    shape, result, kind, _, _ = key
    d, a, b = _MMA[key]  # type: ignore[index]
    if len(registers) != 2 * d + a + b:
        raise ValueError(
            f"mma.sync of {shape} takes {2 * d + a + b} registers, not {len(registers)}"
        )
    m, n, k = re.findall(r"\d+", shape)
    outs = ", ".join(f"&({r})" for r in registers[:d])
    groups = (registers[d : d + a], registers[d + a : d + a + b], registers[d + a + b :])
    ins = [", ".join(f"suanli_register({r})" for r in group) for group in groups]
    number = "int" if result == "s32" else "float"
    return (
        f"{{ {number}* suanli_d[] = {{{outs}}}; "
        f"const unsigned suanli_a[] = {{{ins[0]}}}, suanli_b[] = {{{ins[1]}}}, "
        f"suanli_c[] = {{{ins[2]}}}; "
        f"suanli_mma<{m}, {n}, {k}, suanli_{kind}, {number}>"
        f"(SUANLI_HERE, suanli_d, suanli_a, suanli_b, suanli_c); }}"
    )


def _operands(piece: str) -> list[str]:
    """The expressions of `"constraint"(expression), …`."""
    found = []
    for part in _split(piece, ","):
        match = re.match(r'\s*(?:\[\w+\]\s*)?"[^"]*"\s*\((.*)\)\s*$', part, re.DOTALL)
        if match:
            found.append(match[1].strip())
    return found


def _split(text: str, mark: str) -> list[str]:
    """Parts between marks that stand outside of strings and brackets; "::" is two of them."""
    parts, depth, quoted, begin = [], 0, False, 0
    for place, letter in enumerate(text):
        if letter == '"' and text[place - 1 : place] != "\\":
            quoted = not quoted
        if quoted:
            continue
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == mark and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]
