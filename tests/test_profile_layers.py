"""What compilers and backends ran, mapped back to the operators of the model as written."""

from suanli.engines.backend import LayerTime
from suanli.profiling.layers import spread
from tests.profile_parts import pointwise, product


def test_layers_take_their_modules_and_what_follows_them() -> None:
    operators = [
        product("stem", name="convolution"),
        pointwise("native_batch_norm", "bn"),
        pointwise("relu", "act"),
        product("head"),
    ]
    layers = [
        LayerTime(name="Reorder_1", kind="Reorder", time_ms=0.5, precision="fp32"),
        LayerTime(name="stem", kind="Convolution", time_ms=4, precision="bf16", origin=("stem",)),
        LayerTime(name="Reorder_2", kind="Reorder", time_ms=0.25, precision="fp32"),
        LayerTime(name="fc", kind="FullyConnected", time_ms=1, precision="bf16", origin=("head",)),
    ]
    found = {row.kernel: row for row in spread(layers, operators)}
    assert found["stem"].fused == ("convolution", "native_batch_norm", "relu")
    assert (found["stem"].module, found["stem"].ms) == ("stem", 4)
    assert found["fc"].fused == ()
    assert (found["Reorder_1"].count, found["Reorder_1"].ms) == (2, 0.75)
    assert sum(row.ms for row in found.values()) == sum(layer.time_ms for layer in layers)


def test_kernels_without_names_are_matched_by_their_order() -> None:
    operators = [product("a"), pointwise(), product("b")]
    layers = [
        LayerTime(name="aten::addmm", kind="addmm", time_ms=1),
        LayerTime(name="cpp_fused_relu_0", kind="cpp_fused_relu_0", time_ms=0.5),
        LayerTime(name="aten::addmm", kind="addmm", time_ms=2),
    ]
    found = spread(layers, operators)
    assert [row.module for row in found if row.module] == ["a", "b"]
    assert sum(row.ms for row in found) == 3.5
    assert [op.name for op in found[1].operators] == ["relu"], "the kernel is named after it"


def test_kernels_that_a_compiler_made_have_a_place() -> None:
    operators = [
        product("conv2", name="convolution", source="m.py:1"),
        pointwise("native_batch_norm", "bn2", source="m.py:1"),
        product("shortcut", name="convolution", source="m.py:2"),
        pointwise("add", "block", source="m.py:2"),
        pointwise("mean", "", source="m.py:9"),
    ]
    layers = [
        LayerTime(name="mkldnn_convolution", kind="conv", time_ms=1),
        LayerTime(name="mkldnn_convolution", kind="conv", time_ms=1),
        LayerTime(name="cpp_fused_native_batch_norm_add_0", kind="cpp_fused", time_ms=0.5),
        LayerTime(name="cpp_fused_zeros_1", kind="cpp_fused", time_ms=0.25),
    ]
    found = spread(layers, operators)
    assert [row.module for row in found] == ["conv2", "shortcut", "bn2", "bn2"]
    assert found[2].fused == ("native_batch_norm", "add", "mean")
    assert found[3].source == "m.py:1"


def test_a_layer_that_names_an_operator_outside_of_modules_has_it() -> None:
    operators = [product("stem", name="convolution"), pointwise("mean", "", source="m.py:9")]
    layers = [
        LayerTime(name="stem", kind="Convolution", time_ms=4, origin=("stem",)),
        LayerTime(name="mean:ReduceMean", kind="ReduceMean", time_ms=1, origin=("mean_1:R",)),
    ]
    found = spread(layers, operators)
    assert [(row.name, row.source) for row in found] == [("convolution", ""), ("mean", "m.py:9")]
