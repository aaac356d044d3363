"""Static int8 by NNCF, with the operators that break the answer put back and named."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.base.errors import SuanliError
from suanli.base.lazy import need
from suanli.base.plan import Plan, Quantization
from suanli.engines._quiet import quiet
from suanli.engines.backend import BuildNote
from suanli.engines.openvino_graph import (
    GRAPH,
    matching,
    openvino,
    operator_names,
    program_graph,
    source_of,
)
from suanli.engines.sensitivity import PutBack, put_back

if TYPE_CHECKING:
    import torch

    from suanli.engines.program import Program

INSTALL = 'pip install "openvino>=2026.1" "nncf>=3"'
MAX_ERROR = 0.1  # see `relative_error`

Batch = list[np.ndarray]
Run = Callable[[Batch], list[np.ndarray]]

_RESTORE_SECONDS = 20.0
_JUDGED_BATCHES = 16
# activations with values below zero: zero points other than zero lose less of them
_SIGNED_ACTIVATIONS = frozenset(
    ("Gelu", "Swish", "HSwish", "HardSwish", "Elu", "PRelu", "Selu", "Mish", "SoftPlus", "Tanh")
)
# operators that hand a quantised value on as it is, so the quantiser may stand before them
_CARRIERS = frozenset(("Reshape", "Transpose", "MaxPool", "Squeeze", "Unsqueeze"))


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Says how much harm a quantised graph does.

    Attributes:
        harm: Gets a function that runs the graph on a flat batch, and gives the harm; such as the
            share of search samples that were right before and are wrong after.
        wish: Harm that is low enough.
        seconds: Time to spend on finding what to put back.
    """

    harm: Callable[[Run], float]
    wish: float
    seconds: float = _RESTORE_SECONDS


def build_int8(
    program: "Program",
    plan: Plan,
    folder: Path,
    calibration: "Sequence[tuple[torch.Tensor, ...]] | None",
    judge: Judge | None = None,
) -> BuildNote:
    """Quantise a program with calibrated activations and write it as IR.

    With `plan.quantization.keep` those operators stay in floating point and nothing is searched.
    Without, the quantised graph is held against fp32 on calibration samples: where its error is
    above the option `max_error` the operators that cause it are put back, and the note's plan
    names them.

    Args:
        program: The captured model.
        plan: Its quantisation, and the option `max_error` (relative RMS error of an output).
        folder: Gets model.xml and model.bin.
        calibration: Batches of flat inputs.
        judge: Decides instead of the output error.

    Raises:
        MissingBackendError: OpenVINO or NNCF is absent.
        CaptureError: OpenVINO cannot convert the program.
        SuanliError: There is no calibration data, a name to keep does not exist, or NNCF fails.
    """
    quantization = plan.quantization or Quantization(scheme="int8-static")
    batches = _batches(program, calibration)
    ov = openvino()
    original = ov.Core().read_model(program_graph(program))
    keep = matching(operator_names(original), quantization.keep)
    judge = judge or _by_error(original, batches, float(plan.options.get("max_error") or MAX_ERROR))
    made = _quantise(original, batches, keep, judge)
    details = {
        "graph": source_of(original),
        "calibration_batches": str(len(batches)),
        "int8_error": f"{made.harm:.3g}",
    }
    if not keep and made.harm > judge.wish:
        found = _put_back(original, made.graph, judge)
        details["int8_variants"] = str(found.measured)
        if found.keep:
            keep = list(found.keep)
            made = _quantise(original, batches, keep, judge)
            details |= {"int8_error_kept": f"{made.harm:.3g}", "kept": ", ".join(keep)}
    names = quantised_operators(made.graph)
    if not names:
        raise SuanliError(f"nothing in {program.meta.name} can be quantised")
    ov.save_model(made.graph, folder / GRAPH, compress_to_fp16=False)
    details |= {"int8_operators": str(len(names)), "int8_recipe": made.recipe}
    filled = replace(quantization, keep=tuple(keep))
    return BuildNote(plan=plan.with_(quantization=filled), details=details)


def quantised_operators(model: Any) -> list[str]:
    """Names of the operators that take a quantised activation, in execution order."""
    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() not in {*_CARRIERS, "FakeQuantize", "Result"}
        and any(_quantiser(port) is not None for port in op.inputs())
    ]


def relative_error(values: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """RMS error over what tells the samples apart, of the worst output.

    The scale is the RMS of the reference around its mean over the samples (the first dimension):
    an offset that all samples share is no signal. Where samples do not differ it is the standard
    deviation of the whole, and of a constant its size. Outputs that are not floating point are left
    out. Infinite where a value is not finite.
    """
    worst = 0.0
    for value, wanted in zip(values, reference, strict=True):
        if wanted.dtype.kind != "f" or not wanted.size:
            continue
        exact = wanted.astype(np.float64)
        error = _rms(value - exact)
        candidates = (_rms(exact - exact.mean(0)), float(np.std(exact)), float(np.abs(exact).max()))
        scale = next((size for size in candidates if size > 1e-12), 1.0)
        worst = max(worst, error / scale) if np.isfinite(error) else math.inf
    return worst


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array))))


def _batches(
    program: "Program", calibration: "Sequence[tuple[torch.Tensor, ...]] | None"
) -> list[Batch]:
    """Calibration as numpy; cut to the only batch size where there is only one."""
    if not calibration:
        raise SuanliError(
            "int8 with calibrated activations needs calibration data",
            next_step="give the workload data, or try a plan with dynamic quantisation",
        )
    batches = [[t.detach().cpu().numpy() for t in batch] for batch in calibration]
    signature = program.signature
    if signature.dynamic:
        return batches
    size = signature.max_batch
    joined = [
        np.concatenate(parts) if spec.batched else parts[0]
        for spec, parts in zip(signature.inputs, zip(*batches, strict=True), strict=True)
    ]
    samples = max((len(j) for j, s in zip(joined, signature.inputs, strict=True) if s.batched))
    starts = range(0, max(samples - size, 0) + 1, size)
    return [
        [
            np.resize(whole[start : start + size], (size, *whole.shape[1:]))
            if spec.batched
            else whole
            for whole, spec in zip(joined, signature.inputs, strict=True)
        ]
        for start in starts
    ]


@dataclass(frozen=True, kw_only=True)
class _Quantised:
    graph: Any
    harm: float
    recipe: str


# How ranges of activations are found, and whether biases are shifted against the error that NNCF
# expects, in the order in which they are tried. NNCF's own default (mean of each sample's range,
# with correction) clips what few samples reach and overshoots on small networks: a classifier of
# digits had an error of 0.13 and lost six points, against 0.02 and half a point with the full range
# and no correction.
_RECIPES = ("full range", "full range, bias corrected", "mean range, bias corrected")


def _quantise(
    original: Any, batches: Sequence[Batch], keep: Sequence[str], judge: Judge
) -> _Quantised:
    """Quantise by the first recipe that is clearly good enough, else by the best."""
    with quiet():
        nncf = need("nncf", INSTALL)
    kinds = {op.get_type_name() for op in original.get_ops()}
    attention = "ScaledDotProductAttention" in kinds or {"Softmax", "MVN"} <= kinds
    mixed = attention or bool(kinds & _SIGNED_ACTIVATIONS)
    settings = {
        "preset": nncf.QuantizationPreset.MIXED if mixed else nncf.QuantizationPreset.PERFORMANCE,
        "model_type": nncf.ModelType.TRANSFORMER if attention else None,
        "subset_size": len(batches),
        "ignored_scope": nncf.IgnoredScope(names=list(keep)) if keep else None,
    }
    best: _Quantised | None = None
    for recipe in _RECIPES:
        advanced = {"advanced_parameters": _advanced(nncf, recipe)}
        graph = _by_nncf(nncf, original, batches, settings | advanced)
        made = _Quantised(graph=graph, harm=judge.harm(_runner(graph)), recipe=recipe)
        if best is None or made.harm < best.harm:
            best = made
        if made.harm <= judge.wish / 2:
            break
    assert best is not None
    return best


def _advanced(nncf: Any, recipe: str) -> Any:
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    parameters = nncf.AdvancedQuantizationParameters(
        disable_bias_correction="bias corrected" not in recipe
    )
    if recipe.startswith("full range"):
        parameters.activations_range_estimator_params = RangeEstimatorParametersSet.MINMAX
    return parameters


def _by_nncf(nncf: Any, original: Any, batches: Sequence[Batch], settings: dict[str, Any]) -> Any:
    try:
        with quiet():
            return nncf.quantize(original.clone(), nncf.Dataset(list(batches)), **settings)
    except Exception as error:  # NNCF raises whatever its passes raise
        text = str(error).strip() or type(error).__name__
        raise SuanliError(
            f"NNCF cannot quantise the model: {text.splitlines()[0][:300]}"
        ) from error


def _by_error(original: Any, batches: Sequence[Batch], wish: float) -> Judge:
    judged = batches[:_JUDGED_BATCHES]
    run = _runner(original)
    reference = _joined([run(batch) for batch in judged])

    def harm(candidate: Run) -> float:
        return relative_error(_joined([candidate(batch) for batch in judged]), reference)

    return Judge(harm=harm, wish=wish)


def _joined(results: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    return [
        np.concatenate([np.atleast_1d(p) for p in parts]) for parts in zip(*results, strict=True)
    ]


def _runner(model: Any) -> Run:
    """Run a graph in fp32 (what is quantised stays int8), for its values only."""
    compiled = (
        openvino()
        .Core()
        .compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        )
    )
    request = compiled.create_infer_request()

    def run(batch: Batch) -> list[np.ndarray]:
        results = request.infer(batch)
        return [np.array(results[port]) for port in compiled.outputs]

    return run


def _put_back(original: Any, quantised: Any, judge: Judge) -> PutBack:
    floats = {op.get_friendly_name(): op for op in original.get_ops()}

    def harm(kept: frozenset[str]) -> float:
        variant = quantised
        if kept:
            variant = quantised.clone()
            for op in variant.get_ordered_ops():
                if op.get_friendly_name() in kept:
                    _revert(op, floats)
        return judge.harm(_runner(variant))

    names = quantised_operators(quantised)
    return put_back(names, harm, wish=judge.wish, seconds=judge.seconds)


def _quantiser(port: Any) -> Any:
    """The quantiser that feeds an input port, also through operators that only carry; or None."""
    node = port.get_source_output().get_node()
    while node.get_type_name() in _CARRIERS:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _revert(op: Any, floats: dict[str, Any]) -> None:
    """Take the quantisers off an operator, for measuring what they do to the answer.

    Weights are replaced by the original ones unless they were rescaled against the activations
    (smoothing), and a bias that was shifted against the quantisation error gets its value back.
    """
    source = floats.get(op.get_friendly_name())
    for index, port in enumerate(op.inputs()):
        quantiser = _quantiser(port)
        if quantiser is not None:
            _bypass(port, quantiser)
        elif source is not None and index < source.get_input_size():
            _original_constant(port, source.input_value(index), rescaled_stays=True)
    for target in op.output(0).get_target_inputs():
        follower = target.get_node()
        before = floats.get(follower.get_friendly_name())
        if follower.get_type_name() == "Add" and before is not None:
            for port, value in zip(follower.inputs(), before.input_values(), strict=True):
                _original_constant(port, value, rescaled_stays=False)


def _bypass(port: Any, quantiser: Any) -> None:
    """Take a value from before its quantiser, through the operators that carry it."""
    node = port.get_source_output().get_node()
    while node.get_type_name() in _CARRIERS:
        port = node.input(0)
        node = port.get_source_output().get_node()
    port.replace_source_output(quantiser.input_value(0))


def _original_constant(port: Any, original: Any, *, rescaled_stays: bool) -> None:
    node = original.get_node()
    if node.get_type_name() != "Constant" or node.get_element_type().is_integral():
        return
    shape = port.get_partial_shape()
    if shape.is_dynamic or list(shape.to_shape()) != list(node.get_output_shape(0)):
        return
    ov = openvino()
    data = np.array(node.data)
    if rescaled_stays:
        now = _folded(port.get_source_output())
        size = float(np.linalg.norm(data))
        # int8 rounding moves weights by a percent or two, smoothing by its factors
        if now is None or not size or float(np.linalg.norm(now - data)) / size > 0.3:
            return
    constant = ov.opset13.constant(data)
    port.replace_source_output(constant.output(0))


def _folded(output: Any) -> np.ndarray | None:
    """Value of a weight that is stored as integers with a scale."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data).astype(np.float64)
    if kind == "Convert":
        return _folded(node.input_value(0))
    if kind not in ("Multiply", "Subtract"):
        return None
    first, second = (_folded(value) for value in node.input_values())
    if first is None or second is None:
        return None
    return np.asarray(first * second if kind == "Multiply" else first - second)
