"""Work capture: counts by hand, against torch's counter, and on models of known size."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from suanli.base.errors import BadInputError, CaptureError
from suanli.base.work import Work
from suanli.measure.capture import capture
from suanli.measure.capturing.products import causal_pairs, valid_taps


def by_phase(work: Work, phase: str) -> int:
    return sum(op.flops for op in work.operators if op.matmul and op.phase == phase)


def named(work: Work, name: str) -> list:
    return [op for op in work.operators if op.name == name]


def torch_count(module: nn.Module, *args, training: bool = False) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(training):
        out = module(*args)
        if training:
            out.sum().backward()
    return counter.get_total_flops()


# By hand


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def test_small_mlp_forward_by_hand():
    work = capture(mlp(), (torch.randn(4, 2),), batch=4)
    first, second = named(work, "addmm")
    assert first.flops == 2 * 4 * 2 * 3
    assert second.flops == 2 * 4 * 3 * 1
    assert work.matmul_flops == 72
    assert first.bytes_read == 4 * (4 * 2 + 2 * 3 + 3)
    assert first.parameter_bytes == 4 * (2 * 3 + 3)
    assert first.bytes_written == 4 * 4 * 3
    (relu,) = named(work, "relu")
    assert relu.flops == 12
    assert relu.parameter_bytes == 0
    assert not relu.matmul
    assert work.flops == 72 + 12
    assert work.batch == 4
    assert work.parameters == work.read_parameters == 13
    assert work.parameter_bytes == work.read_parameter_bytes == 52
    assert (work.input_bytes, work.output_bytes) == (32, 16)


def test_small_mlp_training_by_hand():
    work = capture(mlp(), (torch.randn(4, 2),), batch=4, training=True, optimizer="adamw")
    assert by_phase(work, "forward") == 72
    # Gradients of both weights (48 + 24), and of the second layer's input (24): the first layer's
    # input needs none.
    assert by_phase(work, "backward") == 96
    steps = named(work, "adamw_step")
    assert [op.phase for op in steps] == ["optimizer"] * 4
    assert sum(op.flops for op in steps) == 14 * 13
    assert sum(op.bytes_read for op in steps) == 4 * 13 * 4
    assert sum(op.bytes_written for op in steps) == 3 * 13 * 4


@pytest.mark.parametrize(
    ("optimizer", "flops", "read", "written"),
    [("sgd", 2, 2, 1), ("sgd-momentum", 4, 3, 2), ("adam", 13, 4, 3), ("adamw", 14, 4, 3)],
)
def test_optimizer_formulas(optimizer, flops, read, written):
    module = nn.Linear(5, 7, bias=False)
    work = capture(module, (torch.randn(2, 5),), batch=2, training=True, optimizer=optimizer)
    (step,) = [op for op in work.operators if op.phase == "optimizer"]
    assert (step.flops, step.bytes_read, step.bytes_written) == (
        35 * flops,
        140 * read,
        140 * written,
    )


def test_unknown_optimizer_is_refused():
    with pytest.raises(BadInputError, match="no count for optimizer 'lion'"):
        capture(mlp(), (torch.randn(4, 2),), batch=4, training=True, optimizer="lion")


class Products(nn.Module):
    def forward(self, a, b, v):  # a, b [2, 3, 3], v [3]
        return (
            torch.baddbmm(a, a, b),  # 2 * 2 * 27
            torch.addbmm(a[0], a, b),  # the same, added up
            torch.mv(a[0], v),  # 2 * 9
            torch.addmv(v, a[0], v),
            torch.dot(v, v),  # 2 * 3
            torch.einsum("bij,bjk->bik", a, b),
            a @ v,  # 2 * 18
        )


def test_every_kind_of_product():
    work = capture(
        Products(), (torch.randn(2, 3, 3), torch.randn(2, 3, 3), torch.randn(3)), batch=2
    )
    assert work.matmul_flops == 108 + 108 + 18 + 18 + 6 + 108 + 36
    assert all(op.counted for op in work.operators)


class Experts(nn.Module):
    """Each row of the input meets the weights of one of four experts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x, ends):  # x [rows, 8], ends [4]
        return torch._grouped_mm(x, self.weight, offs=ends)


@pytest.mark.parametrize("training", [False, True])
def test_products_with_groups(training):
    x = torch.randn(32, 8, requires_grad=training)
    ends = torch.tensor([8, 16, 24, 32], dtype=torch.int32)
    work = capture(Experts(), (x, ends), batch=32, training=training)
    assert work.matmul_flops == (3 if training else 1) * 2 * 32 * 8 * 16
    assert work.read_parameters == 4 * 8 * 16


def test_one_row_reads_one_expert():
    work = capture(Experts(), (torch.randn(1, 8), torch.ones(4, dtype=torch.int32)), batch=1)
    assert work.read_parameters == 8 * 16


class IntegerProducts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(16, 32, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(16))

    def forward(self, x):  # x [8, 32]
        packed = torch.ops.aten._weight_int8pack_mm(
            x.bfloat16(), self.weight, self.scales.bfloat16()
        )
        return packed, torch._int_mm(x.to(torch.int8), self.weight.t())


def test_quantised_products():
    work = capture(IntegerProducts(), (torch.randn(8, 32),), batch=8)
    packed, plain = [op for op in work.operators if op.matmul]
    assert packed.flops == plain.flops == 2 * 8 * 32 * 16
    assert plain.dtype == "int8"
    assert packed.parameter_bytes == 16 * 32


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_linear_with_packed_weights():
    weight = torch.quantize_per_tensor(torch.randn(16, 32), 0.1, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)

    class Packed(nn.Module):
        def forward(self, x):
            return torch.ops.quantized.linear_dynamic(x, packed)

    work = capture(Packed(), (torch.randn(8, 32),), batch=8)
    assert work.matmul_flops == 2 * 8 * 32 * 16


def test_quantised_weights_as_tensor_subclass():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)).eval()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    work = capture(model, (torch.randn(4, 64),), batch=4)
    assert work.matmul_flops == 2 * 2 * 4 * 64 * 32
    assert work.read_parameter_bytes < 2 * 64 * 32 * 2  # a byte each, scales and biases


# Convolutions

CONVOLUTIONS = [
    (1, {"kernel_size": 3}),
    (1, {"kernel_size": 5, "padding": 2, "stride": 2}),
    (2, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": (1, 3), "padding": (0, 2), "stride": (2, 1)}),
    (2, {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}),
    (2, {"kernel_size": 3, "padding": "same", "groups": 4}),
    (3, {"kernel_size": 3, "padding": 1, "stride": 2}),
]


def convolution(dims: int, transposed: bool, **settings) -> nn.Module:
    kinds = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    if transposed:
        kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
        if settings.get("padding") == "same":
            settings["padding"] = 1
    return kinds[dims - 1](4, 8, bias=False, **settings)


def needed_products(module: nn.Module, x: torch.Tensor) -> int:
    """Products that are not with zero padding: what a convolution of ones adds up to."""
    ones = convolution_of_ones(module)
    return 2 * int(ones(torch.ones_like(x)).sum().item())


def convolution_of_ones(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.weight.fill_(1.0)
    return module


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dims", "settings"), CONVOLUTIONS)
def test_convolutions_against_torch_and_by_summing_ones(dims, settings, transposed):
    module = convolution(dims, transposed, **settings)
    x = torch.randn(2, 4, *(9, 7, 5)[:dims])
    work = capture(module, (x,), batch=2)
    (op,) = named(work, "convolution")
    assert op.flops == torch_count(module, x)
    assert op.least_flops == needed_products(module, x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dims", "settings"), CONVOLUTIONS)
def test_gradients_of_convolutions(dims, settings, transposed):
    module = convolution(dims, transposed, **settings)
    x = torch.randn(2, 4, *(9, 7, 5)[:dims])
    forward = capture(module, (x,), batch=2)
    weight_only = capture(module, (x,), batch=2, training=True)
    both = capture(module, (x.clone().requires_grad_(),), batch=2, training=True)
    assert by_phase(weight_only, "backward") == forward.matmul_flops
    assert by_phase(both, "backward") == 2 * forward.matmul_flops
    assert both.least_matmul_flops == 3 * forward.least_matmul_flops


def test_groups_divide_the_work():
    x = torch.randn(1, 16, 8, 8)
    full = capture(nn.Conv2d(16, 16, 3, bias=False), (x,), batch=1).flops
    for groups in (2, 4, 16):
        work = capture(nn.Conv2d(16, 16, 3, groups=groups, bias=False), (x,), batch=1)
        assert work.flops * groups == full


def test_convolution_without_batch_dimension():
    x = torch.randn(4, 6, 6)
    module = nn.Conv2d(4, 8, 3)
    assert capture(module, (x,), batch=1).matmul_flops == 2 * 8 * 4 * 4 * 4 * 9


def test_valid_taps_against_enumeration():
    for taps, other, stride, pad, step in itertools.product(
        (1, 3, 4), (1, 5, 8), (1, 2, 3), (0, 1, 3), (1, 2)
    ):
        positions = (other + 2 * pad - step * (taps - 1) - 1) // stride + 1
        if positions < 1:
            continue
        pairs = sum(
            0 <= p * stride - pad + t * step < other
            for p, t in itertools.product(range(positions), range(taps))
        )
        assert valid_taps(positions, taps, other, stride=stride, pad=pad, step=step) == pairs


# Properties


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 10),
    )


@pytest.mark.parametrize("training", [False, True])
def test_flops_are_linear_in_the_batch(training):
    def total(n: int) -> int:
        return capture(cnn(), (torch.randn(n, 3, 16, 16),), batch=n, training=training).matmul_flops

    assert total(6) == 3 * total(2) == 6 * total(1)


@pytest.mark.parametrize("training", [False, True])
def test_cnn_agrees_with_torch(training):
    module, x = cnn().train(training), torch.randn(2, 3, 16, 16)
    work = capture(module, (x,), batch=2, training=training)
    assert work.matmul_flops == torch_count(module, x, training=training)
    assert all(op.counted for op in work.operators)


def test_training_is_three_times_forward_without_the_first_input_gradient():
    work = capture(cnn(), (torch.randn(2, 3, 16, 16),), batch=2, training=True)
    forward = by_phase(work, "forward")
    first = named(work, "convolution")[0].flops
    assert by_phase(work, "backward") == 2 * forward - first


def test_frozen_layers_have_no_weight_gradient():
    module = mlp()
    module[0].requires_grad_(False)
    work = capture(module, (torch.randn(4, 2),), batch=4, training=True)
    assert by_phase(work, "backward") == 24  # the second weight; nothing before it is asked for
    assert len(named(work, "sgd_step")) == 2


def test_recomputation_counts_as_backward():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    work = capture(Recomputed(), (torch.randn(4, 8),), batch=4, training=True)
    once = 2 * 4 * 8 * 8
    assert by_phase(work, "forward") == once
    assert by_phase(work, "backward") == 2 * once  # again, and the weight's gradient
    assert {op.module for op in work.operators if op.matmul} == {"inner.0"}


# Attention


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.settings)


def heads(n_heads: int, length: int, width: int, **settings) -> torch.Tensor:
    return torch.randn(2, n_heads, length, width, **settings)


def test_attention_is_counted_where_torch_counts_none():
    q, k, v = heads(4, 6, 8), heads(4, 10, 8), heads(4, 10, 8)
    work = capture(Attention(), (q, k, v), batch=2)
    (op,) = named(work, "scaled_dot_product_attention")
    assert op.flops == 2 * 2 * (2 * 4) * 6 * 10 * 8
    assert op.bytes_read == 4 * (q.numel() + k.numel() + v.numel())
    assert op.bytes_written == 4 * q.numel()
    assert torch_count(Attention(), q, k, v) == 0  # the CPU's fused kernel is not in torch's table


def test_attention_gradient_is_four_products():
    leaves = [heads(4, 6, 8, requires_grad=True) for _ in range(3)]
    work = capture(Attention(), tuple(leaves), batch=2, training=True)
    (forward,) = named(work, "scaled_dot_product_attention")
    (backward,) = named(work, "scaled_dot_product_attention_backward")
    assert backward.flops == 2 * forward.flops
    assert work.matmul_flops == 3 * forward.flops
    value_only = (heads(4, 6, 8), heads(4, 6, 8), heads(4, 6, 8, requires_grad=True))
    work = capture(Attention(), value_only, batch=2, training=True)
    assert by_phase(work, "backward") == forward.flops // 2


def test_causal_attention_needs_only_the_triangle():
    q = heads(4, 6, 8)
    full = capture(Attention(), (q, q, q), batch=2)
    causal = capture(Attention(is_causal=True), (q, q, q), batch=2)
    assert causal.matmul_flops == full.matmul_flops
    assert causal.least_matmul_flops * 36 == full.least_matmul_flops * 21
    assert causal_pairs(3, 5) == 6
    assert causal_pairs(5, 3) == 12


def test_grouped_heads_share_keys_not_work():
    q, k = heads(8, 6, 4), heads(2, 6, 4)
    grouped = capture(Attention(enable_gqa=True), (q, k, k), batch=2)
    plain = capture(Attention(), (q, q, q), batch=2)
    assert grouped.matmul_flops == plain.matmul_flops
    assert [op.name for op in grouped.operators] == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("training", [False, True])
def test_attention_inside_torch_modules(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    work = capture(layer, (torch.randn(2, 5, 8),), batch=2, training=training)
    tokens = 10
    weights = 3 * 64 + 64 + 2 * 8 * 16
    pairs = 2 * 2 * 2 * 2 * 25 * 4  # products, operations, samples, heads, pairs, width
    forward = 2 * tokens * weights + pairs
    assert by_phase(work, "forward") == forward
    if training:
        assert by_phase(work, "backward") == 2 * forward - 2 * tokens * 3 * 64


def test_attention_with_a_mask_as_code_promises_nothing_to_a_bound():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flexible(nn.Module):
        def forward(self, x):
            return flex.flex_attention(x, x, x)

    work = capture(Flexible(), (heads(2, 128, 64),), batch=2)
    (op,) = named(work, "flex_attention")
    assert (op.flops, op.least_flops) == (2 * 2 * 4 * 128 * 128 * 64, 0)


def test_a_branch_on_data_is_there_but_not_counted():
    class Either(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x + 1, (x,))

    work = capture(Either(), (torch.randn(4, 4),), batch=4)
    (op,) = named(work, "cond")
    assert (op.counted, op.flops) == (False, 16)


# Recurrent networks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_networks(kind, gates, training):
    network = kind(6, 16, num_layers=2, bidirectional=True, batch_first=True)
    work = capture(network, (torch.randn(3, 5, 6),), batch=3, training=training)
    per_step = 2 * gates * 16 * ((6 + 16) + (32 + 16))  # both directions, both layers
    forward = [op for op in work.operators if op.matmul and op.phase == "forward"]
    assert [op.flops for op in forward] == [2 * 3 * 5 * per_step]
    assert forward[0].name == ("rnn_tanh" if kind is nn.RNN else kind.__name__.lower())
    assert forward[0].parameter_bytes == work.parameter_bytes
    if training:
        backward = by_phase(work, "backward")
        # The initial state and the first layer's input need no gradient.
        assert 1.5 * forward[0].flops < backward <= 2 * forward[0].flops


# Bytes


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 16)

    def forward(self, ids):
        return self.table(ids)


def test_of_a_table_only_the_rows_taken_are_read():
    work = capture(Table(), (torch.zeros(2, 3, dtype=torch.long),), batch=2)
    (op,) = named(work, "embedding")
    assert op.flops == 0
    assert op.bytes_read == 6 * 8 + 6 * 16 * 4
    assert op.bytes_written == 6 * 16 * 4
    assert op.parameter_bytes == work.read_parameter_bytes == 6 * 16 * 4
    assert work.parameter_bytes == 64000
    assert work.read_parameters == 96


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(100, 16)
            self.head = nn.Linear(16, 100, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    work = capture(Tied(), (torch.zeros(4, dtype=torch.long),), batch=4)
    assert work.parameters == work.read_parameters == 1600
    assert work.parameter_bytes == 6400


def test_a_weight_used_twice_is_read_once_and_slices_add_up():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 4))

        def forward(self, x):
            return x @ self.weight[:4], x @ self.weight[4:8], x @ self.weight[:4]

    work = capture(Sliced(), (torch.randn(2, 4),), batch=2)
    assert work.parameters == 48
    assert work.read_parameters == 32


def test_batch_norm_can_be_folded_so_its_parameters_need_no_read():
    work = capture(cnn(), (torch.randn(1, 3, 16, 16),), batch=1)
    assert work.read_parameters == 3 * 8 * 9 + 8 * 16 * 9 + 16 + 16 * 10 + 10


def test_views_are_free_and_copies_only_move():
    class Shapes(nn.Module):
        def forward(self, x):
            return x.transpose(0, 1)[1:].unsqueeze(0), torch.cat([x, x]), x.expand(3, 4, 6)

    work = capture(Shapes(), (torch.randn(4, 6),), batch=4)
    assert work.flops == 0
    assert all(op.counted for op in work.operators)
    views = [op for op in work.operators if op.name != "cat"]
    assert {op.name for op in views} >= {"transpose", "slice", "unsqueeze", "expand"}
    assert sum(op.bytes_read + op.bytes_written for op in views) == 0
    (cat,) = named(work, "cat")
    assert (cat.bytes_read, cat.bytes_written) == (96, 192)  # one input, given twice


def test_reductions_count_their_input():
    class Reduced(nn.Module):
        def forward(self, x):
            return x.sum(), x.mean(0), x.amax(1), x.softmax(-1)

    work = capture(Reduced(), (torch.randn(4, 6),), batch=4)
    assert [op.flops for op in work.operators] == [24, 24, 24, 5 * 24]


def test_types_have_suanlis_names():
    work = capture(nn.Linear(4, 4).bfloat16(), (torch.randn(2, 4, dtype=torch.bfloat16),), batch=2)
    assert {op.dtype for op in work.operators} == {"bf16"}
    assert work.parameter_bytes == 40


# Names and places


class Placed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        y = self.body(x)
        return y * 2


def test_module_paths_and_source_lines_forward_and_backward():
    line = Placed.forward.__code__.co_firstlineno
    work = capture(Placed(), (torch.randn(2, 4),), batch=2, training=True)
    places = {(op.name, op.phase): (op.module, op.source) for op in work.operators}
    first, second = f"test_capture.py:{line + 1}", f"test_capture.py:{line + 2}"
    assert places["addmm", "forward"] == ("body.0", first)
    assert places["tanh", "forward"] == ("body.1", first)
    assert places["mul", "forward"] == ("", second)
    assert places["mm", "backward"] == ("body.0", first)
    assert places["tanh_backward", "backward"] == ("body.1", first)
    assert places["mul", "backward"] == ("", second)
    assert places["sgd_step", "optimizer"] == ("body.0", "")


def test_unknown_operators_are_never_silently_free():
    @torch.library.custom_op("suanli_test::strange", mutates_args=())
    def strange(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @strange.register_fake
    def _(x):
        return torch.empty_like(x)

    class Strange(nn.Module):
        def forward(self, x):
            return strange(x)

    work = capture(Strange(), (torch.randn(4, 6),), batch=4)
    (op,) = work.operators
    assert (op.name, op.counted, op.flops) == ("strange", False, 24)
    assert (op.bytes_read, op.bytes_written) == (96, 96)


# Exported programs


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x, *, scale, shift=None):
        q = self.query(self.norm(x))
        with torch.no_grad():
            frozen = x @ x.mT
        return {"out": F.scaled_dot_product_attention(q, x, x), "frozen": frozen * scale}


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_counts_like_its_module(training):
    module, x, scale = Keyed().eval(), torch.randn(2, 5, 8), torch.ones(5)
    program = torch.export.export(module, (x,), {"scale": scale, "shift": None})
    exported = capture(program, (x,), {"shift": None, "scale": scale}, batch=2, training=training)
    direct = capture(module, (x,), {"scale": scale}, batch=2, training=training)
    assert exported.matmul_flops == direct.matmul_flops
    assert (exported.input_bytes, exported.parameters) == (direct.input_bytes, direct.parameters)
    if not training:
        assert exported.read_parameter_bytes == direct.read_parameter_bytes
        assert exported.output_bytes == direct.output_bytes
    (attention,) = named(exported, "scaled_dot_product_attention")
    assert attention.source.startswith("test_capture.py:")
    assert named(exported, "addmm")[0].module == "query"
    assert named(exported, "bmm")[0].source.startswith("test_capture.py:")


def test_an_exported_program_with_a_dynamic_batch_takes_any():
    module = cnn().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        module, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},)
    )
    work = capture(program, (torch.randn(7, 3, 16, 16),), batch=7)
    direct = capture(module, (torch.randn(7, 3, 16, 16),), batch=7)
    assert work.matmul_flops == direct.matmul_flops


def test_wrong_keywords_of_an_exported_program_are_named():
    x, scale = torch.randn(2, 5, 8), torch.ones(5)
    program = torch.export.export(Keyed().eval(), (x,), {"scale": scale, "shift": None})
    with pytest.raises(CaptureError, match="takes the keywords scale, shift"):
        capture(program, (x,), {"size": scale}, batch=2)
    with pytest.raises(CaptureError, match="too few inputs"):
        capture(program, (), batch=2)


# The model is left alone


def test_the_model_and_the_random_state_are_untouched():
    model = cnn().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    capture(
        model, (torch.randn(2, 3, 16, 16, generator=torch.Generator()),), batch=2, training=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 10)


def test_a_model_that_cannot_be_copied_is_borrowed_and_given_back():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout())

        def forward(self, x):
            with self.lock:
                return self.body(x)

    model = Locked()
    model.body.eval()
    weight = model.body[0].weight
    work = capture(model, (torch.randn(2, 8),), batch=2, training=True)
    assert by_phase(work, "forward") == by_phase(work, "backward") == 2 * 2 * 64
    assert named(work, "mm")[0].module == "body.0"
    assert model.body[0].weight is weight
    assert (model.training, model.body.training) == (True, False)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.isfinite(model(torch.randn(2, 8))).all()


def test_inference_mode_inside_a_model_changes_no_count():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        @torch.inference_mode()
        def forward(self, x):
            return F.layer_norm(self.linear(x) @ x.mT, (4,)).softmax(-1)

    work = capture(Inner(), (torch.randn(4, 8),), batch=4)
    assert work.matmul_flops == 2 * 4 * 64 + 2 * 4 * 4 * 8
    assert all(op.counted for op in work.operators)


def test_models_without_memory():
    with torch.device("meta"):
        huge = nn.Linear(1_000_000, 1_000_000, bias=False)
    work = capture(huge, (torch.empty(1, 1_000_000, device="meta"),), batch=1)
    assert work.flops == 2 * 10**12
    assert work.parameter_bytes == 4 * 10**12


# What cannot be captured says why


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Picks(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Raises(nn.Module):
    def forward(self, x):
        y = x.cos()
        raise ValueError(f"no such shape {tuple(y.shape)}")


@pytest.mark.parametrize(
    ("module", "operator", "words"),
    [
        (Branches(), "aten._local_scalar_dense.default", "needs the values of its input"),
        (Picks(), "aten.index.Tensor", "needs the values of its input"),
        (Raises(), "cos", r"no such shape \(3, 4\)"),
        (nn.Linear(5, 5), "addmm", "5"),
    ],
)
def test_errors_name_operator_and_line(module, operator, words, capfd):
    with pytest.raises(CaptureError, match=words) as caught:
        capture(module, (torch.randn(3, 4),), batch=3)
    assert caught.value.operator == operator or operator in ("aten.index.Tensor", "addmm")
    assert caught.value.operator
    assert "\n" not in str(caught.value)
    if type(module).__module__ == __name__:
        assert "test_capture.py:" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_lazy_modules_ask_for_one_call():
    with pytest.raises(CaptureError, match="call the model once"):
        capture(nn.LazyLinear(3), (torch.randn(2, 4),), batch=2)


def test_what_is_no_model_is_refused():
    with pytest.raises(CaptureError, match="a function cannot be captured"):
        capture(lambda x: x, (torch.randn(2),), batch=2)


def test_losses():
    module, x = nn.Linear(4, 3), torch.randn(2, 4)
    labels = torch.tensor([0, 2])
    work = capture(
        module, (x,), batch=2, training=True, loss=nn.functional.cross_entropy, targets=labels
    )
    assert named(work, "nll_loss_forward")
    assert work.input_bytes == 2 * 4 * 4 + 2 * 8
    assert work.output_bytes == 4
    with pytest.raises(CaptureError, match="no single number"):
        capture(module, (x,), batch=2, training=True, loss=lambda out: out)
    with pytest.raises(CaptureError, match="depends on a parameter"):
        capture(module.requires_grad_(False), (x,), batch=2, training=True)


# Models of known size


def test_resnet50_is_8_2_gflop():
    transformers = pytest.importorskip("transformers")
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    x = torch.randn(1, 3, 224, 224)
    work = capture(model, (x,), batch=1)
    assert work.flops == pytest.approx(8.2e9, rel=0.015)
    assert work.matmul_flops == 8_178_368_512  # 4.089 G multiply-adds, as published
    assert work.parameters == 25_557_032
    assert all(op.counted for op in work.operators)
    training = capture(model, (x,), batch=1, training=True)
    stem = named(work, "convolution")[0].flops
    assert training.matmul_flops == 3 * work.matmul_flops - stem


def test_bert_base_is_22_gflop():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig())
    ids = torch.zeros(1, 128, dtype=torch.long)
    work = capture(model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, batch=1)
    assert work.matmul_flops == pytest.approx(22.35e9, rel=0.001)
    attention = sum(op.flops for op in named(work, "scaled_dot_product_attention"))
    assert attention == 12 * 4 * 128 * 128 * 768
    assert all(op.counted for op in work.operators)
    words = 30522 * 768 * 4
    assert work.parameter_bytes - work.read_parameter_bytes > 0.99 * words


@pytest.mark.parametrize("training", [False, True])
def test_gpt2_is_counted_throughout(training):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.zeros(1, 64, dtype=torch.long)
    work = capture(model, (ids,), {"labels": ids}, batch=1, training=training)
    assert all(op.counted for op in work.operators)
    weights = 2 * 12 * 768**2 + 768 * config.vocab_size
    pairs = 2 * 4 * 64 * 64 * 768
    assert by_phase(work, "forward") == 2 * 64 * weights + pairs
    if training:
        assert by_phase(work, "backward") == 2 * by_phase(work, "forward")
        unplaced = [op for op in work.operators if op.matmul and not op.module]
        assert unplaced == []


@pytest.mark.slow
def test_seventy_billion_parameters_in_four_gigabytes():
    pytest.importorskip("transformers")
    program = """
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from suanli.measure.capture import capture
config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                     num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
work = capture(model, (torch.zeros(1, 2048, dtype=torch.long),), batch=1)
print(work.parameters, work.matmul_flops, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    parameters, flops, kilobytes = map(int, done.stdout.split()[-3:])
    assert parameters == 70_553_706_496
    in_products = parameters - 128256 * 8192 - 161 * 8192  # without the table and the norms
    assert flops == 2 * 2048 * in_products + 80 * 4 * 2048 * 2048 * 8192
    assert kilobytes < 4 * 2**20
