"""Whether a kernel's answer is right: against its reference in fp64, with nothing left out.

The bound of an output y with reference r is, element by element,

    |y - r| <= 2 u_out |r| + 8 sqrt(depth) u_32 S + 2 roundings u_in S + tiny

with u the unit roundoff of the output's dtype, of fp32 (in which sums are kept) and of the inputs'
dtype, S the size of the summed terms, and tiny the output's smallest number. The square root is
the usual probabilistic form of the bound on sums (Higham and Mary, SIAM J. Sci. Comput. 2019).
"""

import math
from dataclasses import dataclass

import torch

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.lazy import version
from suanli.kernels.declaration import (
    DTYPES,
    Config,
    Declaration,
    Inputs,
    Outputs,
    Sizes,
    doubled,
    mapped,
    tensors,
)
from suanli.kernels.guarded import GuardedMemory
from suanli.kernels.launching import allocating

_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_TINY = {
    torch.float64: 2.0**-1022,
    torch.float32: 2.0**-126,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-126,
}
# What NumPy 2.4 and newer say to the interpreter of Triton 3.6 at a loop with run-time bounds.
_OLD_INTERPRETER = "only 0-dimensional arrays can be converted"
# Whole numbers that come from rounding may fall on the other side of a half this often.
_WHOLE_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class CaseCheck:
    """One kernel checked at one shape.

    Attributes:
        status: "verified", "rejected" (ran, but wrong), "failed" (crash, time-out) or "refused"
            (cannot be judged here).
        where: "interpreter on CPU", or the device.
        error_share: Largest error over its bound; 1 is at the bound. None where nothing ran.
        worst_output: Which output that was, from 0.
        max_abs_error: Largest error in the outputs' unit.
        reason: One line; "" if verified.
    """

    kernel: str
    sizes: dict[str, int]
    dtype: str
    config: dict[str, int]
    status: str
    where: str
    error_share: float | None = None
    worst_output: int | None = None
    max_abs_error: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How far outputs are from the reference.

    Attributes:
        share: Largest error over its bound; 1 is at the bound.
        output: Which output that was, from 0.
        max_abs: Largest error in the outputs' unit.
        reason: What is wrong, in one line; "" where all is right.
    """

    share: float
    output: int
    max_abs: float
    reason: str = ""


def check_here(
    kernel: Declaration,
    sizes: Sizes,
    dtype: str,
    *,
    config: Config | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> CaseCheck:
    """Run a kernel in this process on guarded memory and judge its outputs.

    On "cpu" the process must have been started with TRITON_INTERPRET=1; `check_isolated` does
    that, and outlives a kernel that crashes.

    Args:
        kernel: What to check.
        sizes: At which shape.
        dtype: Such as "fp16".
        config: The configuration; the default one where None.
        device: torch's name of the device.
        seed: Of the inputs.

    Raises:
        BadInputError: The dtype is unknown, or the kernel does not take it.
    """
    if dtype not in kernel.dtypes or dtype not in DTYPES:
        raise BadInputError(
            f"{kernel.name} does not take {dtype}", next_step=f"it takes {', '.join(kernel.dtypes)}"
        )
    chosen = dict(config or kernel.default_for(sizes, dtype))
    where = "interpreter on CPU" if device == "cpu" else device
    made = {
        **{"kernel": kernel.name, "sizes": dict(sizes), "dtype": dtype},
        **{"config": chosen, "where": where},
    }
    if device == "cpu" and dtype == "bf16":
        return CaseCheck(**made, status="refused", reason=BF16)  # type: ignore[arg-type]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        judged = _judged(kernel, kernel.inputs(sizes, DTYPES[dtype], device, seed), chosen, device)
    except SuanliError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if device == "cpu" and _OLD_INTERPRETER in str(error):
            reason = (
                f"the interpreter of Triton {version('triton')} cannot work with NumPy "
                f"{version('numpy')}: install a newer Triton, or numpy<2.4"
            )
        return CaseCheck(**made, status="failed", reason=reason[:300])  # type: ignore[arg-type]
    finally:
        torch.set_float32_matmul_precision(before)
    return CaseCheck(
        **made,  # type: ignore[arg-type]
        status="rejected" if judged.reason else "verified",
        error_share=judged.share if math.isfinite(judged.share) else None,
        worst_output=judged.output,
        max_abs_error=judged.max_abs if math.isfinite(judged.max_abs) else None,
        reason=judged.reason,
    )


BF16 = (
    "Triton's interpreter computes bf16 wrongly (triton#11584): check fp32 and fp16 here, and bf16 "
    "on a GPU"
)


def _judged(kernel: Declaration, inputs: Inputs, config: Config, device: str) -> Judgement:
    runs = [_run(kernel, inputs, config, device, pattern) for pattern in (0, 1)]
    wrong = next((reason for _, reason in runs if reason), "")
    first, second = runs[0][0], runs[1][0]
    judged = judge(kernel, inputs, first)
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if wrong or torch.equal(_bits(a), _bits(b)):
            continue
        if device == "cpu" or not a.is_floating_point():
            wrong = f"output {index} was not written everywhere, or uses memory that was not"
        elif not judged.reason:
            # atomic additions come in another order each time: then both runs must be right
            judged = max(judged, judge(kernel, inputs, second), key=_badness)
    if wrong:
        return Judgement(
            share=judged.share, output=judged.output, max_abs=judged.max_abs, reason=wrong
        )
    return judged


def _badness(judged: Judgement) -> tuple[bool, float]:
    return bool(judged.reason), judged.share


def _run(
    kernel: Declaration, inputs: Inputs, config: Config, device: str, pattern: int
) -> tuple[Outputs, str]:
    """Outputs as plain copies, and what was done to memory that should not be, or ""."""
    memory = GuardedMemory(device, pattern)
    names = iter(tensors(inputs))
    given = mapped(inputs, lambda t: memory.copy(next(names), t))
    with allocating(memory.empty):
        outputs = kernel.run(given, config)
    if device != "cpu":
        torch.cuda.synchronize()
    outputs = tuple(t.clone() for t in outputs)
    violations = memory.violations()
    if violations:
        return outputs, violations[0]
    before, after = tensors(inputs), tensors(given)
    for name, tensor in before.items():
        written = name.partition(".")[0] in kernel.writes
        if not written and not torch.equal(_bits(tensor), _bits(after[name])):
            return outputs, f"input {name} was changed"
    return outputs, ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable as it is: NaN is not equal to itself."""
    plain = tensor.contiguous().flatten()
    return plain.view(torch.uint8) if plain.numel() else plain


def judge(kernel: Declaration, inputs: Inputs, outputs: Outputs) -> Judgement:
    """Hold a kernel's outputs to its reference in fp64.

    Args:
        kernel: Whose they are.
        inputs: What it was given.
        outputs: What it gave.
    """
    exact = kernel.reference(doubled(inputs))
    plain = kernel.reference(mapped(inputs, torch.Tensor.clone))
    if len(exact) != len(outputs):
        reason = f"gave {len(outputs)} outputs where the reference gives {len(exact)}"
        return Judgement(share=math.inf, output=0, max_abs=math.inf, reason=reason)
    sizes: tuple[torch.Tensor | None, ...] = (None,) * len(exact)
    if kernel.magnitude is not None:
        sizes = kernel.magnitude(doubled(inputs))
    floats = (t.dtype for t in tensors(inputs).values() if t.is_floating_point())
    main = next(floats, torch.float32)
    depth = kernel.depth(kernel.sizes(inputs))
    worst = Judgement(share=0.0, output=0, max_abs=0.0)
    for index, (made, right) in enumerate(zip(outputs, exact, strict=True)):
        if made.shape != right.shape:
            reason = f"output {index} is {tuple(made.shape)}, not {tuple(right.shape)}"
            return Judgement(share=math.inf, output=index, max_abs=math.inf, reason=reason)
        if not made.is_floating_point():
            reason = _whole(made, right, plain[index])
            if reason:
                reason = f"output {index}: {reason}"
                return Judgement(share=math.inf, output=index, max_abs=math.inf, reason=reason)
            continue
        bound = _bound(made.dtype, main, right, sizes[index], (depth, kernel.roundings))
        judged = _float(made, right, bound, index)
        if judged.reason:
            return judged
        worst = judged if judged.share > worst.share else worst
    return worst


def _bound(
    out: torch.dtype,
    main: torch.dtype,
    right: torch.Tensor,
    size: torch.Tensor | None,
    counts: tuple[int, int],
) -> torch.Tensor:
    magnitude = right.abs()
    finite = magnitude[torch.isfinite(magnitude)]
    terms = finite.max() if finite.numel() else torch.zeros((), device=right.device)
    terms = terms.double() if size is None else size.double()
    depth, roundings = counts
    sums = 8 * math.sqrt(depth) * _ROUNDOFF[torch.float32] * terms
    stored = 2 * roundings * _ROUNDOFF[main] * terms
    return 2 * _ROUNDOFF[out] * magnitude.double() + sums + stored + _TINY[out]


def _float(made: torch.Tensor, right: torch.Tensor, bound: torch.Tensor, index: int) -> Judgement:
    if made.numel() == 0:
        return Judgement(share=0.0, output=index, max_abs=0.0)
    value = made.double()
    # what the output's dtype cannot hold is infinite in both
    most = torch.finfo(made.dtype).max
    right = torch.where(
        right.abs() > most * (1 + _ROUNDOFF[made.dtype]), right.sign() * math.inf, right
    )
    error = torch.where(value == right, 0.0, (value - right).abs())
    broken = error.isnan()
    if bool(broken.any()):
        count = int(broken.sum())
        reason = f"output {index}: {count} of {made.numel()} values are NaN or not written"
        return Judgement(share=math.inf, output=index, max_abs=math.inf, reason=reason)
    share = error / bound
    place = int(share.argmax())
    largest = float(share.flatten()[place])
    reason = ""
    if largest > 1:
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), made.shape))
        got, want = float(value.flatten()[place]), float(right.flatten()[place])
        many = int((share > 1).sum())
        reason = (
            f"output {index}: {many} of {made.numel()} values are wrong; at {at} it is {got:.6g}, "
            f"not {want:.6g}, {largest:.3g} times the bound"
        )
    return Judgement(share=largest, output=index, max_abs=float(error.max()), reason=reason)


def _whole(made: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> str:
    """Whole numbers equal the reference's, in fp64 or in its own precision."""
    wrong = (made != exact) & (made != plain.to(made.dtype))
    count = int(wrong.sum())
    near = (made.int() - exact.int()).abs() <= 1
    if count == 0 or (count <= _WHOLE_SHARE * made.numel() and bool(near[wrong].all())):
        return ""
    return f"{count} of {made.numel()} whole numbers are wrong"
