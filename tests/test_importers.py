"""ONNX, Keras and transformers models as torch modules, and files that must be refused."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from suanli.base.errors import BadInputError, CaptureError, MissingBackendError
from suanli.workloads.resolve import resolve

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper, numpy_helper, FLOAT, INT64 = (
    onnx.helper,
    onnx.numpy_helper,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
)
RANDOM = np.random.default_rng(3)


def _save(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: list[str],
    constants: dict[str, np.ndarray],
    version: int = 18,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in inputs.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=9)
    if not any(node.domain for node in nodes):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    path.write_bytes(model.SerializeToString())
    return path


def _reference(path: Path, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return list(session.run(None, feed))


def _agrees(path: Path, batch: int = 3, tolerance: float = 1e-4) -> nn.Module:
    """Import, run, compare with ONNX Runtime, capture with a free batch and compare again."""
    workload = resolve(str(path))
    model = workload.make_model()
    inputs = workload.make_inputs(batch).args
    with torch.inference_mode():
        found = model(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    for ours, theirs in zip(found, _reference(path, inputs), strict=True):
        assert tuple(ours.shape) == theirs.shape
        assert ours.dtype == torch.from_numpy(np.asarray(theirs)).dtype
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=tolerance, atol=tolerance)
    dim = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: dim} for _ in inputs) if workload.dynamic_batch else None
    with torch.no_grad():
        captured = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
        again = captured(*workload.make_inputs(2 if workload.dynamic_batch else batch).args)
        direct = model(*workload.make_inputs(2 if workload.dynamic_batch else batch).args)
    first = again[0] if isinstance(again, tuple | list) else again
    torch.testing.assert_close(first, direct[0] if isinstance(direct, tuple) else direct)
    return model


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    def export(name: str, **options: Any) -> Path:
        workload = resolve(name, weights="none")
        inputs = workload.make_inputs(2).args
        dim = torch.export.Dim("batch", min=1, max=64)
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(
            workload.make_model(),
            inputs,
            str(path),
            dynamo=True,
            dynamic_shapes=tuple({0: dim} for _ in inputs),
            verbose=False,
            **options,
        )
        return path

    return export


@pytest.mark.parametrize(
    "name",
    [
        "mnist-cnn",
        "digits-resnet",
        pytest.param("mobilenetv2", marks=pytest.mark.slow),
        pytest.param("worked-rnn-5x256", marks=pytest.mark.slow),
    ],
)
def test_builtin_there_and_back(exported: Callable[..., Path], name: str) -> None:
    path = exported(name)
    model = _agrees(path)
    original, inputs = resolve(name, weights="none"), resolve(str(path)).make_inputs(2)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(*inputs.args), original.make_model()(*inputs.args), rtol=1e-3, atol=1e-4
        )


def test_weights_beside_the_model(exported: Callable[..., Path]) -> None:
    path = exported("mnist-mlp", external_data=True)
    data = path.with_name(path.name + ".data")
    if not data.is_file():
        model = onnx.load(str(path))
        onnx.save(
            model, str(path), save_as_external_data=True, location=data.name, size_threshold=0
        )
    _agrees(path)
    outside = path.parent.parent / "weights.data"
    outside.write_bytes(data.read_bytes())
    data.unlink()
    with pytest.raises(BadInputError, match="not beside"):
        resolve(str(path))
    data.symlink_to(outside)
    with pytest.raises(BadInputError, match="is a link"):
        resolve(str(path))
    data.unlink()
    data.write_bytes(outside.read_bytes()[:100])
    with pytest.raises(BadInputError, match="ends before weight"):
        resolve(str(path))


@pytest.mark.parametrize("location", ["../w.data", "/etc/hostname", "a/../../w.data", ""])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    (tmp_path / "w.data").write_bytes(b"\0" * 64)
    tensor = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["b", 4])],
        [tensor],
    )
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(BadInputError, match="refused"):
        resolve(str(path))


def test_damaged_file_is_one_line(tmp_path: Path, exported: Callable[..., Path]) -> None:
    data = exported("worked-784-128-10").read_bytes()
    for index, text in enumerate((data[: len(data) // 2], b"", b"hello", b"\xff" * 50, data[100:])):
        path = tmp_path / f"broken{index}.onnx"
        path.write_bytes(text)
        with pytest.raises(BadInputError) as caught:
            resolve(str(path))
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
    with pytest.raises(BadInputError, match="no file"):
        resolve(str(tmp_path / "absent.onnx"))


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    node = helper.make_node("FusedGemm", ["x"], ["y"], domain="com.microsoft")
    path = _save(tmp_path / "m.onnx", [node], {"x": (FLOAT, ["b", 4])}, ["y"], {})
    with pytest.raises(CaptureError) as caught:
        resolve(str(path))
    assert caught.value.operator == "com.microsoft.FusedGemm"


def test_free_sizes_need_shapes_and_fixed_ones_fix_the_batch(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    path = _save(tmp_path / "m.onnx", [node], {"x": (FLOAT, ["b", "t", 4])}, ["y"], {})
    with pytest.raises(BadInputError, match="--input-shape"):
        resolve(str(path))
    workload = resolve(str(path), input_shapes=((6, 4),))
    assert resolve(workload.ref).make_inputs(5).args[0].shape == (5, 6, 4)
    with pytest.raises(BadInputError, match="--input-dtype would change nothing"):
        resolve(str(path), input_shapes=((6, 4),), input_dtype="int64")
    fixed = _save(tmp_path / "f.onnx", [node], {"x": (FLOAT, [2, 4])}, ["y"], {})
    workload = resolve(str(fixed))
    assert not workload.dynamic_batch
    assert workload.max_batch == 2
    assert workload.make_inputs(2).args[0].shape == (2, 4)


def _f(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def _i(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


PICTURE = {"x": (FLOAT, ["b", 4, 9, 9])}
ROW = {"x": (FLOAT, ["b", 6])}
SEQUENCE = {"x": (FLOAT, ["b", 5, 6])}
N = helper.make_node

CASES: dict[str, tuple[list[Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "conv-same-upper": (
        [N("Conv", ["x", "w", "c"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])],
        PICTURE,
        {"w": _f(8, 4, 3, 3), "c": _f(8)},
    ),
    "conv-unequal-pads-groups": (
        [N("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 1], group=2, dilations=[2, 2])],
        PICTURE,
        {"w": _f(6, 2, 3, 3)},
    ),
    "conv-transpose": (
        [
            N(
                *("ConvTranspose", ["x", "w", "c"], ["y"]),
                strides=[2, 2],
                pads=[1, 1, 1, 1],
                output_padding=[1, 1],
            )
        ],
        PICTURE,
        {"w": _f(4, 5, 3, 3), "c": _f(5)},
    ),
    "conv-transpose-unequal": (
        [N("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 0, 0])],
        PICTURE,
        {"w": _f(4, 5, 3, 3)},
    ),
    "max-pool-unequal": (
        [N("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
        PICTURE,
        {},
    ),
    "max-pool-ceil": (
        [N("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)],
        PICTURE,
        {},
    ),
    "average-pool-without-pad": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 1])],
        PICTURE,
        {},
    ),
    "average-pool-with-pad": (
        [
            N(
                *("AveragePool", ["x"], ["y"]),
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                count_include_pad=1,
            )
        ],
        PICTURE,
        {},
    ),
    "global-pools": (
        [
            N("GlobalAveragePool", ["x"], ["a"]),
            N("GlobalMaxPool", ["x"], ["m"]),
            N("Sub", ["a", "m"], ["y"]),
        ],
        PICTURE,
        {},
    ),
    "batch-norm": (
        [N("BatchNormalization", ["x", "s", "c", "m", "v"], ["y"], epsilon=1e-3)],
        PICTURE,
        {"s": _f(4), "c": _f(4), "m": _f(4), "v": np.abs(_f(4)) + 0.5},
    ),
    "instance-norm": (
        [N("InstanceNormalization", ["x", "s", "c"], ["y"])],
        PICTURE,
        {"s": _f(4), "c": _f(4)},
    ),
    "layer-norm": (
        [N("LayerNormalization", ["x", "s", "c"], ["y"], axis=-1, epsilon=1e-6)],
        SEQUENCE,
        {"s": _f(6), "c": _f(6)},
    ),
    "local-response": ([N("LRN", ["x"], ["y"], size=3, alpha=0.1)], PICTURE, {}),
    "gemm-scaled": (
        [N("Gemm", ["x", "w", "c"], ["y"], alpha=0.5, beta=2.0, transB=1)],
        ROW,
        {"w": _f(3, 6), "c": _f(1, 3)},
    ),
    "pad-modes": (
        [
            N("Pad", ["x", "p", "v"], ["a"]),
            N("Pad", ["a", "p"], ["d"], mode="reflect"),
            N("Pad", ["d", "p"], ["y"], mode="edge"),
        ],
        PICTURE,
        {"p": _i(0, 0, 1, 2, 0, 0, 2, 1), "v": np.float32(0.5)},
    ),
    "resize-nearest-by-scales": (
        [
            N(
                *("Resize", ["x", "", "s"], ["y"]),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        ],
        PICTURE,
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize-linear-to-size": (
        [
            N("Shape", ["x"], ["n"], start=0, end=2),
            N("Concat", ["n", "hw"], ["s"], axis=0),
            N("Resize", ["x", "", "", "s"], ["y"], mode="linear"),
        ],
        PICTURE,
        {"hw": _i(18, 27)},
    ),
    "slices": (
        [
            N("Slice", ["x", "s", "e", "a", "t"], ["c"]),
            N("Slice", ["c", "s2", "e2", "a2", "t2"], ["y"]),
        ],
        PICTURE,
        {
            **{"s": _i(1, -7), "e": _i(2**62, -1), "a": _i(2, 3), "t": _i(2, 3)},
            **{"s2": _i(-1), "e2": _i(-(2**62)), "a2": _i(1), "t2": _i(-1)},
        },
    ),
    "split-and-concat": (
        [
            N("Split", ["x", "n"], ["p", "q"], axis=1),
            N("Concat", ["q", "p"], ["y"], axis=1),
        ],
        PICTURE,
        {"n": _i(1, 3)},
    ),
    "split-in-equal-parts": (
        [N("Split", ["x"], ["p", "q"], axis=1, num_outputs=2), N("Mul", ["p", "q"], ["y"])],
        PICTURE,
        {},
    ),
    "shape-arithmetic": (
        [
            N("Shape", ["x"], ["s"]),
            N("Gather", ["s", "zero"], ["b"], axis=0),
            N("Gather", ["s", "one"], ["t"], axis=0),
            N("Mul", ["t", "six"], ["m"]),
            N("Unsqueeze", ["b", "ax"], ["b1"]),
            N("Unsqueeze", ["m", "ax"], ["m1"]),
            N("Concat", ["b1", "m1"], ["target"], axis=0),
            N("Reshape", ["x", "target"], ["flat"]),
            N("Cast", ["m"], ["mf"], to=FLOAT),
            N("Sqrt", ["mf"], ["root"]),
            N("Div", ["flat", "root"], ["y"]),
        ],
        SEQUENCE,
        {"zero": np.int64(0), "one": np.int64(1), "six": np.int64(6), "ax": _i(0)},
    ),
    "reshape-with-zero-and-rest": (
        [N("Reshape", ["x", "s"], ["y"])],
        SEQUENCE,
        {"s": _i(0, -1, 3)},
    ),
    "expand-and-where": (
        [
            N("Shape", ["x"], ["s"]),
            N("Expand", ["c", "s"], ["wide"]),
            N("Greater", ["x", "zero"], ["m"]),
            N("Where", ["m", "x", "wide"], ["y"]),
        ],
        ROW,
        {"c": _f(1, 6), "zero": np.float32(0)},
    ),
    "causal-mask": (
        [
            N("Shape", ["x"], ["s"]),
            N("Gather", ["s", "one"], ["t"], axis=0),
            N("Unsqueeze", ["t", "ax"], ["t1"]),
            N("Concat", ["t1", "t1"], ["tt"], axis=0),
            N("ConstantOfShape", ["tt"], ["full"], value=numpy_helper.from_array(np.ones(1, "f4"))),
            N("Trilu", ["full"], ["mask"], upper=0),
            N("MatMul", ["mask", "x"], ["y"]),
        ],
        SEQUENCE,
        {"one": np.int64(1), "ax": _i(0)},
    ),
    "range-and-compare": (
        [
            N("Range", ["zero", "six", "one"], ["r"]),
            N("Cast", ["r"], ["rf"], to=FLOAT),
            N("LessOrEqual", ["rf", "two"], ["m"]),
            N("Not", ["m"], ["k"]),
            N("Cast", ["k"], ["kf"], to=FLOAT),
            N("Mul", ["x", "kf"], ["y"]),
        ],
        ROW,
        {"zero": np.int64(0), "six": np.int64(6), "one": np.int64(1), "two": np.float32(2)},
    ),
    "gather-rows": (
        [N("Gather", ["table", "x"], ["y"], axis=0)],
        {"x": (INT64, ["b", 5])},
        {"table": _f(11, 3)},
    ),
    "gather-elsewhere": (
        [N("Gather", ["x", "i"], ["a"], axis=2), N("Gather", ["a", "last"], ["y"], axis=1)],
        SEQUENCE,
        {"i": np.array([[0, 5], [-1, 2]]), "last": np.int64(-1)},
    ),
    "gather-elements": (
        [
            N("ArgMax", ["x"], ["i"], axis=1),
            N("GatherElements", ["x", "i"], ["a"], axis=1),
            N("ReduceMax", ["x", "ax"], ["m"]),
            N("Sub", ["a", "m"], ["y"]),
        ],
        ROW,
        {"ax": _i(1)},
    ),
    "reductions": (
        [
            N("ReduceMean", ["x", "ax"], ["a"], keepdims=0),
            N("ReduceL2", ["x", "ax"], ["c"], keepdims=0),
            N("ReduceSumSquare", ["x", "ax"], ["d"], keepdims=0),
            N("ReduceLogSumExp", ["x", "ax"], ["e"], keepdims=0),
            N("Sum", ["a", "c", "d", "e"], ["y"]),
        ],
        SEQUENCE,
        {"ax": _i(1, -1)},
    ),
    "activations": (
        [
            N("LeakyRelu", ["x"], ["a"], alpha=0.2),
            N("Elu", ["a"], ["c"], alpha=1.5),
            N("HardSigmoid", ["c"], ["d"]),
            N("HardSwish", ["x"], ["e"]),
            N("Softplus", ["e"], ["f"]),
            N("PRelu", ["x", "slope"], ["g"]),
            N("Clip", ["g", "low", "high"], ["h"]),
            N("Max", ["d", "f", "h"], ["y"]),
        ],
        ROW,
        {"slope": _f(6), "low": np.float32(-0.5), "high": np.float32(1.5)},
    ),
    "gelu-by-erf": (
        [
            N("Div", ["x", "root"], ["a"]),
            N("Erf", ["a"], ["c"]),
            N("Add", ["c", "one"], ["d"]),
            N("Mul", ["x", "d"], ["e"]),
            N("Mul", ["e", "half"], ["y"]),
        ],
        ROW,
        {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "number-minus-tensor": (
        [
            N("Sub", ["one", "x"], ["a"]),
            N("Pow", ["a", "two"], ["c"]),
            N("Div", ["one", "c"], ["y"]),
        ],
        ROW,
        {"one": np.float32(1), "two": np.float32(2)},
    ),
    "integer-division": (
        [
            N("Div", ["x", "three"], ["a"]),
            N("Mod", ["x", "three"], ["c"]),
            N("Add", ["a", "c"], ["y"]),
        ],
        {"x": (INT64, ["b", 5])},
        {"three": np.int64(3)},
    ),
    "softmax-and-log": (
        [N("Softmax", ["x"], ["a"], axis=1), N("LogSoftmax", ["a"], ["y"])],
        SEQUENCE,
        {},
    ),
    "attention": (
        [
            N("Transpose", ["x"], ["k"], perm=[0, 2, 1]),
            N("MatMul", ["x", "k"], ["s"]),
            N("Softmax", ["s"], ["p"], axis=-1),
            N("MatMul", ["p", "x"], ["y"]),
        ],
        SEQUENCE,
        {},
    ),
    "flatten-squeeze-tile": (
        [
            N("Unsqueeze", ["x", "ax"], ["a"]),
            N("Squeeze", ["a", "ax"], ["c"]),
            N("Tile", ["c", "reps"], ["d"]),
            N("Flatten", ["d"], ["y"], axis=1),
        ],
        SEQUENCE,
        {"ax": _i(1), "reps": _i(1, 2, 3)},
    ),
    "depth-and-space": (
        [
            N("DepthToSpace", ["x"], ["a"], blocksize=2),
            N("SpaceToDepth", ["a"], ["c"], blocksize=2),
            N("DepthToSpace", ["c"], ["y"], blocksize=2, mode="CRD"),
        ],
        {"x": (FLOAT, ["b", 4, 6, 6])},
        {},
    ),
    "top-k": (
        [N("TopK", ["x", "k"], ["v", "i"], axis=1), N("Identity", ["v"], ["y"])],
        ROW,
        {"k": _i(2)},
    ),
    "cumulative": ([N("CumSum", ["x", "ax"], ["y"])], SEQUENCE, {"ax": np.int64(1)}),
    "einsum": (
        [N("Einsum", ["x", "w"], ["y"], equation="bti,oi->bto")],
        SEQUENCE,
        {"w": _f(3, 6)},
    ),
    "quantised": (
        [
            N("QuantizeLinear", ["x", "s", "z"], ["q"]),
            N("DequantizeLinear", ["q", "s", "z"], ["a"]),
            N("DequantizeLinear", ["w", "ws"], ["wf"], axis=1),
            N("MatMul", ["a", "wf"], ["y"]),
        ],
        ROW,
        {
            "s": np.float32(0.05),
            "z": np.int8(3),
            "w": RANDOM.integers(-127, 128, (6, 4)).astype(np.int8),
            "ws": np.abs(_f(4)) / 100,
        },
    ),
    "scatter": (
        [
            N("Transpose", ["x"], ["a"], perm=[1, 0]),
            N("ScatterND", ["a", "i", "u"], ["y"]),
        ],
        {"x": (FLOAT, [3, 6])},
        {"i": np.array([[1], [4]]), "u": _f(2, 3)},
    ),
    "one-hot": (
        [N("OneHot", ["x", "depth", "v"], ["y"], axis=-1)],
        {"x": (INT64, ["b", 5])},
        {"depth": np.int64(3), "v": np.array([-1.0, 2.0], np.float32)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_agrees_with_onnx_runtime(name: str, tmp_path: Path) -> None:
    nodes, inputs, constants = CASES[name]
    _agrees(_save(tmp_path / f"{name}.onnx", nodes, inputs, ["y"], constants))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_recurrent_layer_agrees_with_onnx_runtime(
    kind: str, direction: str, tmp_path: Path
) -> None:
    gates, both = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2 if direction == "bidirectional" else 1
    constants = {
        "w": _f(both, gates * 5, 6),
        "r": _f(both, gates * 5, 5),
        "c": _f(both, gates * 10),
    }
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes = [
        N("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        N(
            *(kind, ["t", "w", "r", "c"], ["s", "h"]),
            hidden_size=5,
            direction=direction,
            **attributes,
        ),
        N("Transpose", ["s"], ["y"], perm=[2, 0, 1, 3]),
    ]
    _agrees(_save(tmp_path / "m.onnx", nodes, SEQUENCE, ["y", "h"], constants))


def test_older_operator_sets_keep_axes_in_attributes(tmp_path: Path) -> None:
    nodes = [
        N("Unsqueeze", ["x"], ["a"], axes=[1]),
        N("ReduceMean", ["a"], ["c"], axes=[2], keepdims=1),
        N("Squeeze", ["c"], ["d"], axes=[1]),
        N("Slice", ["d"], ["e"], starts=[0], ends=[4], axes=[1]),
        N("Clip", ["e"], ["f"], min=-0.1, max=0.2),
        N("Softmax", ["f"], ["y"], axis=1),
    ]
    _agrees(_save(tmp_path / "m.onnx", nodes, SEQUENCE, ["y"], {}, version=9))


def test_several_outputs_keep_their_order_and_inputs_their_names(tmp_path: Path) -> None:
    nodes = [N("Add", ["left side", "r.x"], ["s"]), N("Sub", ["left side", "r.x"], ["d"])]
    inputs = {"left side": (FLOAT, ["b", 2]), "r.x": (FLOAT, ["b", 2])}
    model = _agrees(_save(tmp_path / "m.onnx", nodes, inputs, ["d", "s"], {}))
    one, two = torch.ones(1, 2), torch.full((1, 2), 3.0)
    difference, total = model(left_side=one, r_x=two)
    assert difference.tolist() == [[-2, -2]]
    assert total.tolist() == [[4, 4]]


def test_weights_are_parameters_and_copies_are_independent(tmp_path: Path) -> None:
    import copy

    nodes = [N("MatMul", ["x", "w"], ["y"])]
    path = _save(tmp_path / "m.onnx", nodes, ROW, ["y"], {"w": _f(6, 3)})
    model = resolve(str(path)).make_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).zero_()
    x = torch.ones(1, 6)
    assert model(x).abs().sum() > 0
    assert other(x).abs().sum() == 0


def test_size_known_only_at_run_time_is_named(tmp_path: Path) -> None:
    nodes = [
        N("ReduceMax", ["x"], ["m"], keepdims=0),
        N("Cast", ["m"], ["i"], to=INT64),
        N("Unsqueeze", ["i", "ax"], ["s"]),
        N("Expand", ["x", "s"], ["y"]),
    ]
    path = _save(tmp_path / "m.onnx", nodes, {"x": (FLOAT, ["b", 1])}, ["y"], {"ax": _i(0)})
    workload = resolve(str(path))
    with pytest.raises(CaptureError, match="Expand") as caught:
        workload.make_model()(*workload.make_inputs(2).args)
    assert caught.value.operator == "Expand"


# Keras


@pytest.fixture
def keras() -> Any:
    # imported by the package first, which chooses the backend
    from suanli.workloads.importers.keras import need_keras

    try:
        return need_keras()
    except MissingBackendError:
        pytest.skip("Keras 3 is not installed")


@pytest.mark.parametrize("name", ["mnist-cnn", "mnist-cnn-small", "cifar10-cnn"])
def test_keras_program_and_torch_network_agree(keras: Any, name: str, tmp_path: Path) -> None:
    from suanli.workloads.keras_programs import copy_to_keras, keras_model

    workload = resolve(name, weights="none")
    model, program = workload.make_model(), keras_model(name)
    assert program.count_params() == sum(p.numel() for p in model.parameters())
    copy_to_keras(model, program)
    path = tmp_path / "program.keras"
    program.save(path)
    imported = resolve(str(path))
    x = workload.make_inputs(4).args[0]
    with torch.inference_mode():
        expected = model(x)
        found = imported.make_model()(x.permute(0, 2, 3, 1).contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = resolve(imported.ref)
    inputs = again.make_inputs(3).args
    assert inputs[0].shape == (3, *x.permute(0, 2, 3, 1).shape[1:])
    dim = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        captured = torch.export.export(again.make_model(), inputs, dynamic_shapes=({0: dim},))
        torch.testing.assert_close(captured.module()(inputs[0]), again.make_model()(inputs[0]))


def test_keras_model_of_two_inputs(keras: Any, tmp_path: Path) -> None:
    left, right = keras.Input((3,), name="left"), keras.Input((4,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    model = keras.Model([left, right], keras.layers.Dense(2)(joined))
    model.save(tmp_path / "two.keras")
    workload = resolve(str(tmp_path / "two.keras"))
    inputs = workload.make_inputs(5).args
    assert [tuple(part.shape) for part in inputs] == [(5, 3), (5, 4)]
    with torch.inference_mode():
        assert workload.make_model()(left=inputs[0], right=inputs[1]).shape == (5, 2)


def test_keras_file_with_code_is_refused(keras: Any, tmp_path: Path) -> None:
    path = tmp_path / "code.keras"
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2)])
    model.save(path)
    with pytest.raises(CaptureError, match="Lambda"):
        resolve(str(path))
    foreign = tmp_path / "foreign.keras"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("config.json", json.dumps({"module": "os", "class_name": "system"}))
    with pytest.raises(CaptureError, match=r"os\.system"):
        resolve(str(foreign))


def test_damaged_keras_file(keras: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInputError, match="no readable Keras"):
        resolve(str(path))
    with pytest.raises(BadInputError, match="no file"):
        resolve(str(tmp_path / "absent.keras"))


# transformers

SMALL = (
    "hidden_size=32&num_hidden_layers=1&num_attention_heads=2&intermediate_size=64&vocab_size=50"
)


@pytest.mark.parametrize(
    "ref",
    [
        f"hf:bert?{SMALL}",
        f"hf:llama?{SMALL}&num_key_value_heads=2",
        "hf:gpt2?n_layer=1&n_embd=32&n_head=2&vocab_size=50",
        "hf:t5?num_layers=1&d_model=32&d_ff=64&num_heads=2&vocab_size=50&num_decoder_layers=1",
        "hf:vit?hidden_size=32&num_hidden_layers=1&num_attention_heads=2&image_size=32",
        'hf:resnet?embedding_size=16&hidden_sizes=[16,32]&depths=[1,1]&layer_type="basic"',
    ],
)
def test_architecture_from_its_configuration(ref: str) -> None:
    pytest.importorskip("transformers")
    workload = resolve(ref)
    assert workload.untrained
    model, again = workload.make_model(), resolve(workload.ref).make_model()
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    inputs = workload.make_inputs(2)
    with torch.no_grad():
        output = model(**inputs.kwargs)[0]
    assert output.shape[0] == 2
    assert torch.isfinite(output).all()
    dim = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: dim} for name in inputs.kwargs}
    torch.export.export(model, (), dict(inputs.kwargs), dynamic_shapes=shapes)


def test_configuration_file(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "a model"
    folder.mkdir()
    fields = {"model_type": "bert", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(fields))
    workload = resolve(f"hf:{folder}")
    assert resolve(workload.ref).make_inputs(2).kwargs["input_ids"].max() < 40
    (folder / "config.json").write_text(json.dumps({**fields, "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(BadInputError, match="code of its own"):
        resolve(f"hf:{folder}/config.json")
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInputError, match="no JSON"):
        resolve(f"hf:{folder}/config.json")


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("hf:bertt", "near names: bert"),
        ("hf:bert?num_hiden_layers=2", "num_hidden_layers"),
        ("hf:none/config.json", "no file"),
        ("hf:whisper", "input_features"),
        ("hf:", "no architecture"),
    ],
)
def test_wrong_configuration_is_one_line(ref: str, said: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(BadInputError) as caught:
        resolve(ref)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
