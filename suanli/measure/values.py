"""Whether a floating-point plan's values are as right as eager's at the same precision.

Three answers to the same inputs are compared: the candidate's, a float64 reference, and eager's at
the plan's precision. How far the candidate may be from the reference is what eager itself is, times
k, in three ways: over the whole output (rms), at its worst element, and systematically in any one
channel or class. The last one finds a shift that the rounding of single answers hides.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from suanli.base.trial import OutputError, ValueCheck
from suanli.measure import _bias

# Errors below this many ulps (of the output's dtype, at the output's own size) always pass, so that
# an eager run which happens to be exact does not fail everybody else.
FLOOR_ULPS = 4
# The same for what all answers share. Folding a normalisation or another order of sums moves a
# whole channel of a deep fp32 network by some units in the last place while its rms error falls.
_SYSTEMATIC_ULPS = 16
# Largest rms error, over the rms of the reference, at which an answer is still the model's: a
# quarter of the signal. Of the built-in networks MobileNetV2 with random weights has the most in
# bf16, 0.095 (ResNet-50 0.056); one whose sums cancel has 0.8 and more. From 0.5 on, twice eager's
# error is the answer itself, and nothing but zeros would pass.
MOST_RELATIVE_RMS = 0.25


def compare(
    candidate: Sequence[Tensor],
    reference64: Sequence[Tensor],
    eager: Sequence[Tensor],
    *,
    k: float = 2.0,
    names: Sequence[str] | None = None,
    channel_dims: Sequence[int | None] | None = None,
    precision: str = "",
) -> ValueCheck:
    """Compare a candidate's outputs with the float64 reference, by the error that eager makes.

    Dimension 0 of every output is the samples; give as many as there are (64 or more for the
    systematic test to have power; under 8 it is not made). Each floating-point output passes when

    - rms(candidate - reference) <= k max(rms(eager - reference), floor), the floor being 4 ulps of
      the output's dtype times rms(reference);
    - max |candidate - reference| <= k max(max |eager - reference|, sqrt(2 ln 2n) times eager's rms
      or floor), as the largest of n errors depends on luck where n is small;
    - mean error and slope of error of each channel stay within what `_bias.ratios` grants;
    - neither eager's rms error nor the candidate's is above `MOST_RELATIVE_RMS` times
      rms(reference): where eager itself is that far off, nothing can be proved by its error.

    A shift smaller than k times eager's own bias passes by this contract: eager bf16 can make mean
    errors nearly as large as its rms error, because rounded weights are wrong for all samples.
    Integer and boolean outputs may differ from the reference at k times as many elements as eager,
    and neither at more than a share of `MOST_RELATIVE_RMS`.

    Args:
        candidate: Outputs of the plan.
        reference64: Outputs in float64 (integer outputs as they are).
        eager: Outputs of eager at the plan's precision, in the dtypes the user gets.
        k: How many times eager's own error is allowed.
        names: Of the outputs.
        channel_dims: Of each output; None for none. By default dimension 1 of outputs with 4 or
            more dimensions ([B, C, H, W]) and the last one of others ([B, C], [B, T, C]).
        precision: Of the plan and of `eager`, for the reason.

    Returns:
        The check; shapes or dtypes that differ from eager's, NaN, and infinities that the reference
        does not have, never pass.
    """
    if not len(candidate) == len(reference64) == len(eager):
        reason = f"{len(candidate)} outputs, eager has {len(eager)}"
        return ValueCheck(ok=False, k=k, reason=reason)
    titles = list(names) if names is not None else [f"output {i}" for i in range(len(eager))]
    found: list[OutputError] = []
    for i, outputs in enumerate(zip(candidate, reference64, eager, strict=True)):
        mine, reference, theirs = (_plain(output) for output in outputs)
        reason = _unfit(mine, reference, theirs)
        if reason:
            reason = f"{titles[i]}: {reason}"
            return ValueCheck(ok=False, k=k, outputs=tuple(found), reason=reason)
        if mine.is_floating_point():
            dim = channel_dims[i] if channel_dims is not None else _channel_dim(mine)
            found.append(_float_error(titles[i], (mine, reference, theirs), k, dim))
        else:
            found.append(_integer_error(titles[i], mine, reference, theirs))
    reasons = [_too_far(error, precision) or _excess(error, k) for error in found]
    reason = next((r for r in reasons if r), "")
    batches = tuple(dict.fromkeys(int(t.shape[0]) for t in candidate if t.ndim))
    return ValueCheck(
        ok=not reason,
        k=k,
        outputs=tuple(found),
        batches=batches,
        reason=reason,
        relative_rms=max((error.relative_rms for error in found), default=None),
    )


def eager_too_far(
    eager: Sequence[Tensor], reference: Sequence[Tensor], names: Sequence[str], precision: str
) -> str:
    """Why nothing can be proved at a precision: eager itself is not the model there; "" if it is.

    Args:
        eager: Eager's outputs at the precision.
        reference: Outputs in float64.
        names: Of the outputs.
        precision: For the reason.
    """
    for mine, wanted, name in zip(eager, reference, names, strict=True):
        reason = _off(name, f"eager {precision} itself", relative_rms(mine, wanted))
        if reason:
            return reason
    return ""


def _too_far(error: OutputError, precision: str) -> str:
    who = f"eager {precision}".rstrip() + " itself"
    return _off(error.name, who, error.eager_relative_rms) or _off(
        error.name, "the plan", error.relative_rms
    )


def _off(name: str, who: str, figure: float) -> str:
    """Why an output is not the model's answer at all, by `MOST_RELATIVE_RMS`; "" if it is."""
    if figure <= MOST_RELATIVE_RMS:
        return ""
    return (
        f"{name}: {who} is {figure:.2g} off (rms error over the reference's rms), "
        f"{MOST_RELATIVE_RMS:g} is the most"
    )


def relative_rms(values: Tensor, reference: Tensor) -> float:
    """Rms error over the rms of the reference; of integers the share of elements that differ.

    NaN where a value is not finite. Both may be on any device and of any shape, but the same.
    """
    mine, wanted = _plain(values), _plain(reference)
    if mine.numel() == 0:
        return 0.0
    if not wanted.is_floating_point():
        return float((mine != wanted).double().mean())
    if not bool(mine.isfinite().all()) and not bool((mine == wanted)[~mine.isfinite()].all()):
        return math.nan
    infinite = wanted.isinf()
    mine, wanted = mine.double().masked_fill(infinite, 0), wanted.double().masked_fill(infinite, 0)
    return _ratio(_rms(mine - wanted), _rms(wanted))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _plain(values: Tensor) -> Tensor:
    """On the CPU, detached, complex numbers as pairs."""
    values = values.detach().cpu()
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _unfit(mine: Tensor, reference: Tensor, theirs: Tensor) -> str:
    """Why the values cannot even be compared, or ""."""
    if mine.shape != theirs.shape or mine.shape != reference.shape:
        return f"shape {list(mine.shape)}, eager has {list(theirs.shape)}"
    if mine.dtype != theirs.dtype:
        return f"dtype {_dtype(mine)}, eager has {_dtype(theirs)}"
    if mine.is_floating_point() != reference.is_floating_point():
        return f"dtype {_dtype(mine)}, the reference has {_dtype(reference)}"
    return _not_finite(mine, reference, theirs) if mine.is_floating_point() else ""


def _not_finite(mine: Tensor, reference: Tensor, theirs: Tensor) -> str:
    """NaN anywhere, or infinities that are not the reference's own."""
    for values, whose in ((reference, "the reference"), (theirs, "eager"), (mine, "the plan")):
        missing = int(values.isnan().sum())
        if missing:
            return f"{whose} gives NaN in {missing} of {values.numel()} elements"
        wrong = (values.isinf() | reference.isinf()) & (values.double() != reference.double())
        if wrong.any():
            return f"{whose} gives wrong infinities in {int(wrong.sum())} of {values.numel()}"
    return ""


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _channel_dim(values: Tensor) -> int:
    return 1 if values.ndim >= 4 else values.ndim - 1


def _float_error(
    name: str, values: tuple[Tensor, Tensor, Tensor], k: float, dim: int | None
) -> OutputError:
    mine, reference, theirs = values
    if mine.numel() == 0:
        return _nothing(name)
    epsilon = torch.finfo(mine.dtype).eps
    infinite = reference.isinf()
    if infinite.any():  # equal in all three: no error there
        mine, theirs, reference = (v.masked_fill(infinite, 0) for v in (mine, theirs, reference))
    rows = [_bias.arranged(v, dim) for v in (mine, reference, theirs)]
    own = _bias.moments(rows[0], rows[1])
    eager = _bias.moments(rows[2], rows[1])
    rms, eager_rms = float(own.square.mean().sqrt()), float(eager.square.mean().sqrt())
    floor = FLOOR_ULPS * epsilon * float(eager.size.square().mean().sqrt())
    size = _rms(reference.double())
    largest, eager_largest = _largest(mine, reference), _largest(theirs, reference)
    usual = math.sqrt(2 * math.log(2 * mine.numel())) * max(eager_rms, floor)
    bias, gain = _bias.ratios(own, eager, k, _SYSTEMATIC_ULPS * epsilon)
    worst = int(torch.maximum(bias, gain).argmax())
    return OutputError(
        name=name,
        rms=rms,
        eager_rms=eager_rms,
        max_abs=largest,
        eager_max_abs=eager_largest,
        rms_ratio=_ratio(rms, max(eager_rms, floor)),
        max_ratio=_ratio(largest, max(eager_largest, usual)),
        bias_ratio=float(bias.max()),
        gain_ratio=float(gain.max()),
        worst_channel=worst if bias.numel() > 1 and own.rows >= _bias.LEAST_ROWS else None,
        relative_rms=_ratio(rms, size),
        eager_relative_rms=_ratio(eager_rms, size),
    )


def _integer_error(name: str, mine: Tensor, reference: Tensor, theirs: Tensor) -> OutputError:
    """Shares of elements that differ take the place of errors."""
    if mine.numel() == 0:
        return _nothing(name)
    share = float((mine != reference).double().mean())
    eager_share = float((theirs != reference).double().mean())
    return OutputError(
        name=name,
        rms=share,
        eager_rms=eager_share,
        max_abs=_largest(mine, reference),
        eager_max_abs=_largest(theirs, reference),
        rms_ratio=_ratio(share, eager_share),
        max_ratio=0.0,
        bias_ratio=0.0,
        gain_ratio=0.0,
        relative_rms=share,
        eager_relative_rms=eager_share,
    )


def _nothing(name: str) -> OutputError:
    return OutputError(
        name=name,
        rms=0.0,
        eager_rms=0.0,
        max_abs=0.0,
        eager_max_abs=0.0,
        rms_ratio=0.0,
        max_ratio=0.0,
        bias_ratio=0.0,
        gain_ratio=0.0,
    )


def _largest(values: Tensor, reference: Tensor) -> float:
    return float((values.double() - reference.double()).abs().max())


def _ratio(value: float, allowed: float) -> float:
    if value == 0:
        return 0.0
    return value / allowed if allowed > 0 else math.inf


def _excess(error: OutputError, k: float) -> str:
    """Which limit an output breaks, in one line, or ""."""
    where = "" if error.worst_channel is None else f" in channel {error.worst_channel}"
    for ratio, what in (
        (error.rms_ratio, "rms error"),
        (error.max_ratio, "largest error"),
        (error.bias_ratio, f"mean error{where}"),
        (error.gain_ratio, f"gain error{where}"),
    ):
        if not ratio <= k:
            return f"{error.name}: {what} is {ratio:.3g} times what eager earns, {k:g} are allowed"
    return ""


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a model's answer, in order: a tensor, or any nesting of lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def joined(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Outputs of several batches, put together along the samples (dimension 0)."""
    return [
        torch.cat(parts) if parts[0].ndim else torch.stack(parts)
        for parts in (list(column) for column in zip(*outputs, strict=True))
    ]


def check_runner(
    run: Callable[[Any], Any], batches: Sequence[Any]
) -> tuple[list[list[Tensor]], str]:
    """Run a plan on all batches in a way that exposes stale, shared and unwritten output buffers.

    First pass: all batches in order and the first one again, every answer kept; an answer that has
    changed by the end shares its memory with a later one. Then the kept answers are filled with NaN
    (integers: the lowest number), so that a plan which answers from the same memory and does not
    write it all shows them. Second pass: the batches in reverse order; before each call, memory of
    the answer's size is poisoned in the same way and freed. What the second pass gives is returned
    for `compare` to judge, where stale values are those of another batch.

    Args:
        run: Takes one of `batches` and gives an answer, as `tensors_of` understands it.
        batches: At least one; two or more of different content are needed to see stale answers.
            They are copied before each call, since a model may write to its inputs.

    Returns:
        The outputs per batch, and what is wrong ("" if nothing).
    """
    answers: list[list[Tensor]] = []
    copies: list[list[Tensor]] = []
    for batch in (*batches, batches[0]):
        answers.append(tensors_of(run(_copied(batch))))
        copies.append([tensor.detach().clone() for tensor in answers[-1]])
    for i, (answer, copy) in enumerate(zip(answers, copies, strict=True)):
        if not all(_same(now, then) for now, then in zip(answer, copy, strict=True)):
            return copies[:-1], f"the answer to batch {i} changed when another batch was run"
    _poison_kept(answers)
    del answers
    outputs: list[list[Tensor]] = [[] for _ in batches]
    for i in reversed(range(len(batches))):
        for tensor in copies[i]:
            _poison(torch.empty_like(tensor))
        outputs[i] = [t.detach().clone() for t in tensors_of(run(_copied(batches[i])))]
    return outputs, ""


def _poison_kept(answers: list[list[Tensor]]) -> None:
    """Poison answers, but for constants of the model: memory that two unchanged answers share."""
    places = Counter(t.untyped_storage().data_ptr() for answer in answers for t in answer)
    for answer in answers:
        for tensor in answer:
            if places[tensor.untyped_storage().data_ptr()] == 1:
                _poison(tensor)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        copies = [_copied(item) for item in value]
        return tuple(copies) if isinstance(value, tuple) else copies
    return value


def _same(now: Tensor, then: Tensor) -> bool:
    return bool(torch.equal(now.detach().nan_to_num(), then.nan_to_num()))


def _poison(tensor: Tensor) -> None:
    """Fill with what no model answers; memory that cannot be written stays as it is."""
    with torch.inference_mode():
        try:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(math.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).min)
        except RuntimeError:
            return
