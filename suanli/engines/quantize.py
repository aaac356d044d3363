"""Static int8 by NNCF, with the operators that break the answer put back and named."""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.base import codec
from suanli.base.errors import SuanliError
from suanli.base.lazy import need, version
from suanli.base.plan import Plan, Quantization
from suanli.engines._quiet import quiet
from suanli.engines._unquantise import quantised_operators, revert
from suanli.engines.backend import Batch, BuildNote, Judge, Run
from suanli.engines.onnx_export import publish
from suanli.engines.openvino_graph import (
    GRAPH,
    WEIGHTS,
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

_NOTE = "note.json"
_JUDGED_BATCHES = 16
# activations with values below zero: zero points other than zero lose less of them
_SIGNED_ACTIVATIONS = frozenset(
    ("Gelu", "Swish", "HSwish", "HardSwish", "Elu", "PRelu", "Selu", "Mish", "SoftPlus", "Tanh")
)


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
    names them. Where a judge decides, it is held to as much more or less than its wish as
    `max_error` is above or below `MAX_ERROR`.

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
    wish = float(plan.options.get("max_error") or MAX_ERROR)
    if judge is not None:
        judge = replace(judge, wish=judge.wish * wish / MAX_ERROR)
    if judge is not None and not judge.key:
        made = _make(program, quantization.keep, batches, judge, folder)
    else:
        cached = _cached(program, quantization.keep, batches, wish, judge)
        made = codec.read(_Made, cached / _NOTE)
        for file in (GRAPH, WEIGHTS):
            shutil.copyfile(cached / file, folder / file)
    filled = replace(quantization, keep=made.keep)
    return BuildNote(plan=plan.with_(quantization=filled), details=made.details)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What stands beside a quantised graph."""

    keep: tuple[str, ...]
    details: dict[str, str]


def _cached(
    program: "Program",
    keep: Sequence[str],
    batches: Sequence[Batch],
    wish: float,
    judge: Judge | None,
) -> Path:
    """Folder of the quantised graph: plans that differ in streams or threads share it."""
    versions = [str(version(name)) for name in ("openvino", "nncf")]
    by = judge.key if judge is not None else "error"
    digest = hashlib.sha256(json.dumps([*versions, list(keep), wish, by]).encode())
    for batch in batches:
        for array in batch:
            digest.update(np.ascontiguousarray(array).tobytes())
    target = program.folder / f"int8-{digest.hexdigest()[:16]}"
    if not (target / _NOTE).is_file():
        fresh = Path(tempfile.mkdtemp(dir=program.folder, prefix=".int8."))
        try:
            original = openvino().Core().read_model(program_graph(program))
            chosen = judge or _by_error(original, batches, wish)
            made = _make(program, keep, batches, chosen, fresh)
            (fresh / _NOTE).write_text(codec.dumps(made), encoding="utf-8")
            publish(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target


def _make(
    program: "Program",
    wanted: Sequence[str],
    batches: Sequence[Batch],
    judge: Judge,
    folder: Path,
) -> _Made:
    """Quantise, put back what is to be put back, and write the graph."""
    original = openvino().Core().read_model(program_graph(program))
    keep = matching(operator_names(original), wanted)
    made = _quantise(original, batches, keep, judge)
    details = {
        "graph": source_of(original),
        "calibration_batches": str(len(batches)),
        f"int8_{judge.measure}": f"{made.harm:.3g}",
    }
    if not keep and made.harm > judge.wish:
        found = _put_back(original, made.graph, judge)
        details["int8_variants"] = str(found.measured)
        if found.keep:
            keep = list(found.keep)
            made = _quantise(original, batches, keep, judge)
            details |= {f"int8_{judge.measure}_kept": f"{made.harm:.3g}", "kept": ", ".join(keep)}
    names = quantised_operators(made.graph)
    if not names:
        raise SuanliError(f"nothing in {program.meta.name} can be quantised")
    openvino().save_model(made.graph, folder / GRAPH, compress_to_fp16=False)
    details |= {"int8_operators": str(len(names)), "int8_recipe": made.recipe}
    return _Made(keep=tuple(keep), details=details)


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

    return Judge(harm=harm, wish=wish, measure="error")


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
                    revert(op, floats)
        return judge.harm(_runner(variant))

    names = quantised_operators(quantised)
    return put_back(names, harm, wish=judge.wish, seconds=judge.seconds)
