"""Eager plans of a model that can be neither exported nor built in another process."""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import BadInputError
from suanli.base.plan import Plan, Precision
from suanli.base.timing import Timing
from suanli.base.trial import Trial
from suanli.measure.timing import measure
from suanli.measure.values import compare, relative_rms, tensors_of
from suanli.workloads.record import Inputs, Workload

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SAMPLES = 32
_STEADY = 1e-6  # of the answer's size, between two calls in float64


def eager_trials(
    model: nn.Module, workload: Workload, batch: int, precisions: Sequence[Precision]
) -> list[Trial]:
    """Check and time eager in this process, one trial per precision.

    There is no isolation here: the model lives in this process only.

    Args:
        model: In evaluation mode, fp32; it is copied, not changed.
        workload: Gives example inputs.
        batch: Samples in the step that is timed.
        precisions: "fp32" and "bf16".

    Raises:
        BadInputError: The answer changes from call to call.
    """
    inputs = workload.make_inputs(_SAMPLES)
    reference = _call(model, inputs, torch.float64)
    for now, then in zip(_call(model, inputs, torch.float64), reference, strict=True):
        if not relative_rms(now, then) <= _STEADY:
            raise BadInputError(
                "the model's answer changes from call to call on the same inputs, so nothing can "
                "be verified",
                next_step="take dropout or noise out of forward",
            )
    trials = []
    for precision in precisions:
        started = time.monotonic()
        plan = Plan(backend="eager", precision=precision, options={"source": True})
        dtype = _DTYPES[precision]
        timed, given = copy.deepcopy(model).to(dtype), workload.make_inputs(batch)
        answer = _call(model, inputs, dtype)
        values = compare(answer, reference, answer, precision=precision)
        timing = _timed(timed, _cast(given, dtype), batch)
        trials.append(
            Trial(
                plan=plan,
                status="verified" if values.ok else "rejected",
                reason=values.reason,
                step_ms=timing.step_ms,
                samples_per_s=timing.samples_per_s,
                values=values,
                seconds_spent=time.monotonic() - started,
                baseline=True,
                batch=batch,
                timings=(timing,),
            )
        )
    return trials


@torch.inference_mode()
def _timed(model: nn.Module, inputs: Inputs, batch: int) -> Timing:
    return measure(lambda: model(*inputs.args, **inputs.kwargs), batch=batch)


@torch.inference_mode()
def _call(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs in fp32 of a copy that computes in `dtype`."""
    given = _cast(inputs, dtype)
    result = copy.deepcopy(model).to(dtype)(*given.args, **given.kwargs)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(wide) if t.is_floating_point() else t for t in tensors_of(result)]


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    args, kwargs = pytree.tree_map(cast, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args=args, kwargs=kwargs)
