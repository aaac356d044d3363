"""The fused training kernels against float64."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError, MissingBackendError
from suanli.base.train_plan import TrainPlan
from suanli.training.fused import FusedConv2d, FusedNorm, fused_cnn
from suanli.training.kernels import put_in_place
from suanli.training.native import behind, convolution, operators
from suanli.training.native import library as native
from suanli.workloads.models.fast import cifar10_fast

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
needs_tiles = pytest.mark.skipif(
    find_compiler() is None or convolution.tile_library() is None, reason="no tile registers here"
)
PLAN = TrainPlan(precision="bf16", memory_layout="channels_last", kernels=("fused-cnn",))
ACTIVATIONS = {"identity": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}
ROUNDING = 2.0**-8  # of bf16


@pytest.fixture(params=["native", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators on the code for this processor, then on that without AVX-512."""
    if request.param == "plain":
        plain = native.build(("-DSUANLI_PLAIN",))
        monkeypatch.setattr(operators, "library", lambda: plain)
    yield


def images(batch: int, channels: int, height: int, width: int, mean: float = 0.0) -> Tensor:
    drawn = torch.randn(batch, channels, height, width) * 2 + mean
    return drawn.bfloat16().to(memory_format=torch.channels_last)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    difference = (found.detach().double() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max())


@needs_compiler
@pytest.mark.parametrize("size", [(7, 9), (8, 6), (31, 31)])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("kind", list(native.KINDS))
def test_norm_act_and_its_gradients(
    library: None, kind: str, pool: bool, size: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    x = images(5, 64, *size, mean=3.0).requires_grad_()
    weight, bias = (torch.randn(64).requires_grad_() for _ in range(2))
    y, mean, variance, *_ = operators.norm_act(
        x, weight, bias, None, pool, native.KINDS[kind], 1e-5
    )
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, weight, bias], gradient)

    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    pooled = functional.max_pool2d(exact[0], 2) if pool else exact[0]
    normal = functional.batch_norm(pooled, None, None, exact[1], exact[2], True, 0.0, 1e-5)
    expected = ACTIVATIONS[kind](normal)
    expected_gradients = torch.autograd.grad(expected, exact, gradient.double())

    assert error(y, expected) < ROUNDING
    assert error(found[0], expected_gradients[0]) < ROUNDING
    assert error(found[1], expected_gradients[1]) < 1e-5
    assert error(found[2], expected_gradients[2]) < 1e-5
    assert error(mean, pooled.mean((0, 2, 3))) < 1e-5
    assert error(variance, pooled.var((0, 2, 3), unbiased=False)) < 1e-5


@needs_compiler
@pytest.mark.parametrize("size", [(7, 9), (8, 6), (31, 31)])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("kind", list(native.KINDS))
def test_bias_act_and_its_gradients(kind: str, pool: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(2)
    x = images(5, 64, *size).requires_grad_()
    bias = torch.randn(64).requires_grad_()
    y, *_ = behind.bias_act(x, bias, pool, native.KINDS[kind])
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, bias], gradient)

    exact = [t.detach().double().requires_grad_() for t in (x, bias)]
    moved = exact[0] + exact[1][:, None, None]
    expected = ACTIVATIONS[kind](functional.max_pool2d(moved, 2) if pool else moved)
    expected_gradients = torch.autograd.grad(expected, exact, gradient.double())
    assert error(y, expected) < ROUNDING
    assert error(found[0], expected_gradients[0]) < ROUNDING
    assert error(found[1], expected_gradients[1]) < 1e-5


@needs_compiler
@pytest.mark.parametrize("kind", list(native.KINDS))
def test_a_shortcut_is_added_before_the_activation(library: None, kind: str) -> None:
    torch.manual_seed(3)
    x, added = (images(5, 64, 7, 9, mean=m).requires_grad_() for m in (3.0, 0.5))
    weight, bias = (torch.randn(64).requires_grad_() for _ in range(2))
    y = operators.norm_act(x, weight, bias, added, False, native.KINDS[kind], 1e-5)[0]
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, weight, bias, added], gradient)

    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias, added)]
    normal = functional.batch_norm(exact[0], None, None, exact[1], exact[2], True, 0.0, 1e-5)
    expected = ACTIVATIONS[kind](normal + exact[3])
    expected_gradients = torch.autograd.grad(expected, exact, gradient.double())
    assert error(y, expected) < ROUNDING
    for one, other in zip(found, expected_gradients, strict=True):
        assert error(one, other) < 2 * ROUNDING  # what the shortcut gets is rounded, then the rest


class Shortcut(nn.Module):
    """Two convolutions around a shortcut, in the ways that people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv1, self.conv2 = (nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "functions":
            y = functional.relu(self.bn1(self.conv1(x)))
            return functional.relu(x + self.bn2(self.conv2(y)))
        if self.way == "layers":
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            y += x
            return self.relu(y)
        if self.way == "values":  # cannot be traced
            y = self.bn1(self.conv1(x))
            y = y.relu() if float(y.detach().sum()) > -1e9 else y
            return self.bn2(self.conv2(y)) + x
        y = self.bn1(self.conv1(x))  # used twice: nothing may be joined with it
        return self.bn2(self.conv2(y.relu())).add(y)


@needs_compiler
@pytest.mark.parametrize(
    ("way", "joined"), [("functions", 2), ("layers", 2), ("values", 0), ("twice", 1)]
)
def test_shortcuts_of_blocks_are_joined(way: str, joined: int) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(Shortcut(way), nn.Conv2d(32, 32, 1)).to(memory_format=torch.channels_last)
    twin = fused_cnn(model, PLAN)
    plain = copy.deepcopy(model)
    for layer in [m for m in plain.modules() if isinstance(m, nn.ReLU)]:
        layer.inplace = False
    norms = [m for m in twin.modules() if isinstance(m, FusedNorm)]
    graphs = [m for m in twin.modules() if isinstance(m, torch.fx.GraphModule)]
    assert len(norms) == 2
    assert len(graphs) == (joined > 0)
    if graphs:
        calls = [n for n in graphs[0].graph.nodes if n.op not in ("placeholder", "output")]
        # what is left: two convolutions, two norms, and what could not be joined
        assert len(calls) == {2: 4, 1: 5}[joined]
    x = images(4, 32, 8, 8)
    eager_model, exact_model = copy.deepcopy(plain), plain.double()
    outputs = []
    # the twin's parameters are the model's own
    for net, owner in ((twin, model), (eager_model, eager_model), (exact_model, exact_model)):
        exactly = net is exact_model
        given = (x.double() if exactly else x).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=not exactly):
            out = net(given)
        out.double().square().mean().backward()
        outputs.append([out, given.grad, *(p.grad for p in owner.parameters())])
    for found, eager, exact in zip(*outputs, strict=True):
        off, allowed = ((t.double() - exact.double()).norm() for t in (found, eager))
        assert off < 1.5 * allowed + 1e-3 * exact.double().norm()
    for name, buffer in model.named_buffers():  # the model's own statistics moved
        torch.testing.assert_close(
            buffer.double(), plain.get_buffer(name).double(), rtol=0.02, atol=0.02
        )


@needs_compiler
def test_a_large_mean_does_not_cancel_the_variance() -> None:
    x = (torch.randn(64, 32, 8, 8) * 0.5 + 100).bfloat16().to(memory_format=torch.channels_last)
    _, mean, variance, *_ = operators.norm_act(x, None, None, None, False, 0, 1e-5)
    assert error(mean, x.double().mean((0, 2, 3))) < 1e-6
    assert error(variance, x.double().var((0, 2, 3), unbiased=False)) < 1e-4


@needs_compiler
def test_threads_do_not_change_the_result() -> None:
    torch.manual_seed(2)
    x = images(9, 32, 10, 10)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(operators.norm_act(x, None, None, None, True, 2, 1e-5)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_compiler
def test_not_a_number_stays_one(library: None) -> None:
    x = images(2, 32, 4, 4)
    x[0, 3, 0, 0] = float("nan")
    y = operators.norm_act(x, None, None, None, True, native.KINDS["gelu"], 1e-5)[0]
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    assert operators.act(x, native.KINDS["gelu"])[0, 3, 0, 0].isnan()


@needs_compiler
@pytest.mark.parametrize("kind", ["relu", "gelu", "silu"])
def test_act_over_the_whole_range(library: None, kind: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4064), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    x = functional.pad(x, (0, 28)).bfloat16().requires_grad_()
    y = operators.act(x, native.KINDS[kind])
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = ACTIVATIONS[kind](exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    scale = expected.detach().abs().clamp(min=1e-2)
    assert float(((y - expected).detach().abs() / scale).max()) < ROUNDING
    away = x.detach() != 0  # relu has no slope at zero
    assert float((slope - expected_slope)[away].abs().max()) < ROUNDING


@needs_compiler
def test_operators_keep_torchs_rules() -> None:
    x = images(2, 32, 6, 6)
    weight, bias = torch.randn(32), torch.randn(32)
    names = ("test_schema", "test_faketensor")
    for given in ((weight, bias, None, True), (weight, bias, images(2, 32, 6, 6), False)):
        torch.library.opcheck(operators.norm_act, (x, *given, 2, 1e-5), test_utils=names)
    torch.library.opcheck(operators.act, (x, 2), test_utils=names)
    for pool in (True, False):
        torch.library.opcheck(behind.bias_act, (x, bias, pool, 2), test_utils=names)
    filters = torch.randn(16, 32, 3, 3)
    torch.library.opcheck(convolution.conv2d, (x, filters, None, 1), test_utils=names)


@needs_tiles
@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "kernel", "padding"),
    [
        *((24, 64, 31, 3, 1), (64, 40, 15, 3, 1), (33, 16, 7, 5, 2), (256, 96, 3, 3, 1)),
        *((16, 16, 5, 1, 0), (1, 32, 28, 3, 0), (32, 64, 13, 3, 0), (6, 16, 14, 5, 0)),
        *((20, 16, 9, 5, 1), (64, 64, 3, 3, 0)),
    ],
)
def test_weight_gradient(inputs: int, outputs: int, size: int, kernel: int, padding: int) -> None:
    torch.manual_seed(3)
    behind_it = size + 2 * padding - kernel + 1
    x, g = images(7, inputs, size, size), images(7, outputs, behind_it, behind_it)
    weight = torch.zeros(outputs, inputs, kernel, kernel, dtype=torch.float64)
    expected = torch.ops.aten.convolution_backward(
        *(g.double(), x.double(), weight, None, [1, 1], [padding] * 2, [1, 1], False),
        *([0, 0], 1, [False, True, False]),
    )[1]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = convolution.weight_gradient(g, x, kernel, padding)
            assert error(found, expected) < 2e-6, threads
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_the_librarys_kernels_still_work_in_between() -> None:
    """Tile registers are configured per thread, and the library keeps its own configuration."""
    torch.manual_seed(4)
    a, b = (torch.randn(256, 256).bfloat16() for _ in range(2))
    expected = a.double() @ b.double()
    x, g = images(4, 64, 9, 9), images(4, 64, 9, 9)
    for _ in range(3):
        assert error(a @ b, expected) < ROUNDING
        convolution.weight_gradient(g, x, 3, 1)
        assert error(a @ b, expected) < ROUNDING


@needs_compiler
@pytest.mark.parametrize("padding", [0, 1])
def test_conv2d_gives_fp32_gradients_of_its_weights(padding: int) -> None:
    torch.manual_seed(5)
    x = images(3, 32, 8, 8).requires_grad_()
    weight = (torch.randn(48, 32, 3, 3) * 0.1).requires_grad_()
    bias = torch.randn(48).requires_grad_()
    y = convolution.conv2d(x, weight, bias, padding)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, weight, bias], gradient)
    exact = [x.detach().double(), weight.detach().bfloat16().double(), bias.detach().double()]
    exact = [t.requires_grad_() for t in exact]
    expected = functional.conv2d(*exact, padding=padding)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    assert error(y, expected) < ROUNDING
    for mine, right in zip(found, wanted, strict=True):
        assert error(mine, right) < ROUNDING
    assert found[1].dtype is torch.float32


def gradients(model: nn.Module, call: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    enabled = x.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output = call(x)
    functional.cross_entropy(
        output.to(torch.promote_types(output.dtype, torch.float32)), labels
    ).backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@needs_compiler
def test_a_network_trains_with_them_as_it_does_in_eager() -> None:
    torch.manual_seed(6)
    model = cifar10_fast().train()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias.normal_(0, 0.2)
    model = model.to(memory_format=torch.channels_last)
    x = images(32, 3, 32, 32)
    labels = torch.randint(0, 10, (32,))
    exact = copy.deepcopy(model).double()
    expected = gradients(exact, exact, x.double(), labels)
    eager_model, fused_model = copy.deepcopy(model), copy.deepcopy(model)
    eager = gradients(eager_model, eager_model, x, labels)
    fused, _ = put_in_place(fused_model, nn.functional.cross_entropy, PLAN)
    assert sum(isinstance(m, FusedNorm) for m in fused.modules()) == 7
    found = gradients(fused_model, fused, x, labels)

    assert found.keys() == expected.keys()
    for name, right in expected.items():
        scale = right.norm() + 1e-12
        eagers = float((eager[name] - right).norm() / scale)
        mine = float((found[name] - right).norm() / scale)
        assert mine <= 1.5 * eagers + 1e-4, (name, mine, eagers)
    statistics = dict(eager_model.named_buffers())
    for name, kept in fused_model.named_buffers():
        right = dict(exact.named_buffers())[name].double()
        eagers = (statistics[name].double() - right).norm()
        mine = (kept.double() - right).norm()
        assert float(mine) <= 2 * float(eagers) + 1e-4 * float(right.norm()), name


@needs_compiler
def test_a_twin_shares_the_parameters_and_leaves_the_model() -> None:
    model = cifar10_fast().to(memory_format=torch.channels_last)
    layers = [type(layer) for layer in model]
    twin = fused_cnn(model, PLAN)
    assert [type(layer) for layer in model] == layers
    mine = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} == mine
    model.eval()
    twin.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(twin(x), model(x).double()) < 0.1


class Residual(nn.Module):
    """A block that is no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.narrow = nn.BatchNorm2d(20)  # not a multiple of 32: stays
        self.two = nn.Conv2d(32, 20, 3, stride=2, bias=False)  # so does this

    def forward(self, images: Tensor) -> Tensor:
        return self.narrow(self.two(torch.relu(self.norm(self.one(images)) + images))).mean((2, 3))


@needs_compiler
def test_layers_outside_of_sequences() -> None:
    torch.manual_seed(7)
    model = Residual().to(memory_format=torch.channels_last).train()
    x, labels = images(8, 32, 10, 10), torch.randint(0, 20, (8,))
    exact = copy.deepcopy(model).double()
    expected = gradients(exact, exact, x.double(), labels)
    eager_model = copy.deepcopy(model)
    eager = gradients(eager_model, eager_model, x, labels)
    twin = fused_cnn(model, PLAN)
    assert isinstance(twin.norm, FusedNorm)
    assert isinstance(twin.narrow, nn.BatchNorm2d)
    assert isinstance(twin.two, nn.Conv2d)
    found = gradients(model, twin, x, labels)
    for name, right in expected.items():
        allowed = 1.5 * float((eager[name] - right).norm()) + 1e-3 * float(right.norm())
        assert float((found[name] - right).norm()) <= allowed + 1e-9, name


class Tutorial(nn.Module):
    """Convolutions as tutorials write them: activations and pools are functions."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 20, 3)  # not a multiple of 32: nothing is joined with it
        self.pool = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "relu-pool":
            x = self.pool(functional.relu(self.conv1(x)))
            x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        elif self.order == "pool-silu":
            x = functional.silu(self.pool(self.conv1(x)))
            x = functional.silu(functional.max_pool2d(self.conv2(x), kernel_size=2))
        else:  # a pool behind a SiLU is not one before it, and one of three is none of the kernels
            x = self.pool(functional.silu(self.conv1(x)))
            x = functional.max_pool2d(torch.relu(self.conv2(x)), 3, stride=2)
        # no ReLU at the end: few values would fall to one side of its kink or the other
        return functional.gelu(self.conv3(x)).mean((2, 3))


def tutorial(order: str) -> nn.Module:
    if order != "layers":
        return Tutorial(order)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.GELU()),
        *(nn.Conv2d(64, 20, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


@needs_compiler
@pytest.mark.parametrize(
    ("order", "pools"), [("layers", 2), ("relu-pool", 2), ("pool-silu", 2), ("other", 0)]
)
def test_what_stands_behind_convolutions_is_joined(order: str, pools: int) -> None:
    torch.manual_seed(8)
    model = tutorial(order).to(memory_format=torch.channels_last).train()
    x, labels = images(8, 3, 25, 23), torch.randint(0, 20, (8,))
    exact, eager_model = copy.deepcopy(model).double(), copy.deepcopy(model)
    expected = gradients(exact, exact, x.double(), labels)
    eager = gradients(eager_model, eager_model, x, labels)
    twin = fused_cnn(model, PLAN)
    joined = [m for m in twin.modules() if isinstance(m, FusedConv2d)]
    assert len(joined) == 3
    assert sum(m.pool is not None for m in joined) == pools
    assert joined[0].activation is not None
    assert joined[2].activation is None
    found = gradients(model, twin, x, labels)
    for name, right in expected.items():
        allowed = 1.5 * float((eager[name] - right).norm()) + 1e-3 * float(right.norm())
        assert float((found[name] - right).norm()) <= allowed + 1e-9, name


@needs_compiler
def test_a_layer_that_is_used_twice_keeps_both_places() -> None:
    torch.manual_seed(9)
    relu = nn.ReLU()
    layers = [nn.Conv2d(3, 32, 3), relu, nn.Conv2d(32, 32, 3), relu, nn.MaxPool2d(2)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = images(2, 3, 12, 12, mean=-1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(fused_cnn(model, PLAN)(x), model(x).double()) < 0.05


class ByChance(Tutorial):
    """What is drawn in `forward` must not be drawn once for all."""

    def forward(self, x: Tensor) -> Tensor:
        if float(torch.rand(1)) < 0.5:
            x = -x
        return super().forward(x)


@needs_compiler
def test_a_forward_that_draws_is_not_traced() -> None:
    model = ByChance("relu-pool").to(memory_format=torch.channels_last)
    before = torch.get_rng_state()
    twin = fused_cnn(model, PLAN)
    assert not any(isinstance(m, torch.fx.GraphModule) for m in twin.modules())
    assert torch.equal(torch.get_rng_state(), before)


@needs_compiler
def test_not_a_number_passes_pools_whatever_its_sign(library: None) -> None:
    x = images(2, 32, 4, 4)
    x.view(torch.int16)[0, 3, 0, 0] = -64  # 0xffc0, which inf - inf gives on x86
    assert operators.norm_act(x, None, None, None, True, 0, 1e-5)[0][:, 3].isnan().all()


@needs_compiler
def test_the_default_dtype_does_not_matter() -> None:
    x, bias = images(2, 32, 6, 6), torch.randn(32)
    expected = behind.bias_act(x, bias, True, 1)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        y = behind.bias_act(x, bias, True, 1)[0]
        norm = operators.norm_act(x, None, None, None, True, 1, 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, expected)
    assert norm[1].dtype is torch.float32


@needs_compiler
def test_what_does_not_fit_is_said() -> None:
    model = cifar10_fast()
    with pytest.raises(BadInputError, match="bf16"):
        fused_cnn(model, TrainPlan())
    with pytest.raises(BadInputError, match="no layer"):
        fused_cnn(nn.Sequential(nn.Linear(2, 2)), PLAN)


def test_without_a_compiler_the_row_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    native.library.cache_clear()
    try:
        with pytest.raises(MissingBackendError, match="compiler"):
            fused_cnn(cifar10_fast(), PLAN)
    finally:
        native.library.cache_clear()
