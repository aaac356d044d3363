"""The operators: right on a CPU, differentiable, and usable by torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suanli.base.errors import BadInputError
from suanli.kernels.operators import (
    batch_norm,
    cross_entropy,
    gates,
    images,
    int8_linear,
    norms,
    optimizers,
)
from suanli.kernels.operators import linear_cross_entropy as fused


def _gen(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def _target(rows: int, classes: int) -> Tensor:
    target = torch.randint(0, classes, (rows,))
    target[1] = -100
    return target


def _cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    torch.manual_seed(0)
    target = _target(6, 11)
    x, r, w, b = _gen(6, 8), _gen(6, 8), _gen(8), _gen(8)
    image, scale, shift = _gen(3, 4, 6, 5), _gen(4), _gen(4)

    def bn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, w, b, True)), 3, 2, 1)

    return {
        "cross_entropy": (
            lambda x: cross_entropy.cross_entropy(x, target, label_smoothing=0.1),
            lambda x: F.cross_entropy(x, target, label_smoothing=0.1),
            (_gen(6, 11),),
        ),
        "linear_cross_entropy": (
            lambda x, w: fused.linear_cross_entropy(x, w, target),
            lambda x, w: F.cross_entropy(x @ w.t(), target),
            (_gen(6, 8), _gen(11, 8)),
        ),
        "rms_norm": (norms.rms_norm, lambda x, w: F.rms_norm(x, (8,), w, 1e-5), (x, w)),
        "add_rms_norm": (
            lambda x, r, w: sum(norms.add_rms_norm(x, r, w)),
            lambda x, r, w: F.rms_norm(x + r, (8,), w, 1e-5) + (x + r),
            (x, r, w),
        ),
        "layer_norm": (
            norms.layer_norm,
            lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5),
            (x, w, b),
        ),
        "add_layer_norm": (
            lambda x, r, w, b: norms.add_layer_norm(x, r, w, b)[0],
            lambda x, r, w, b: F.layer_norm(x + r, (8,), w, b, 1e-5),
            (x, r, w, b),
        ),
        "gate": (gates.gate, lambda a, b: F.silu(a) * b, (x, r)),
        "geglu": (
            lambda a, b: gates.gate(a, b, "gelu_tanh"),
            lambda a, b: F.gelu(a, approximate="tanh") * b,
            (x, r),
        ),
        "batch_norm": (
            lambda x, w, b: batch_norm.batch_norm_act(x, w, b, pool=(3, 2, 1))[0],
            bn,
            (image, scale, shift),
        ),
    }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    ours, theirs, inputs = CASES[name]
    made, right = ours(*inputs), theirs(*inputs)
    assert torch.allclose(made, right, atol=1e-12)
    weight = torch.randn_like(right)
    mine = torch.autograd.grad((made * weight).sum(), inputs)
    wanted = torch.autograd.grad((right * weight).sum(), inputs)
    for a, b in zip(mine, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


OPERATORS: dict[str, tuple[Any, tuple[Any, ...]]] = {}


def _operators() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, r, w, b = _gen(6, 8), _gen(6, 8), _gen(8), _gen(8)
    image = torch.rand(2, 3, 7, 9)
    q, s = int8_linear.int8_quantize(torch.randn(5, 8))
    op = torch.ops.suanli
    return {
        "norm": (op.norm, (x, r, w, b, 1e-5, True)),
        "plain norm": (op.norm, (x, None, w, None, 1e-5, False)),
        "gate": (op.gate, (x, r, "gelu")),
        "cross_entropy": (op.cross_entropy, (_gen(6, 11), _target(6, 11), -100, 0.0)),
        "linear": (op.linear_cross_entropy, (_gen(6, 8), _gen(11, 8), _target(6, 11), -100)),
        "batch_norm": (
            op.batch_norm,
            (_gen(3, 4, 6, 5), _gen(4), _gen(4), 1e-5, "relu", [2, 2, 0]),
        ),
        "int8": (op.int8_linear, (torch.randn(2, 3, 8), q, s, None)),
        "quantize": (op.int8_quantize, (torch.randn(5, 8),)),
        "denoise": (op.denoise, (image, 1, 1.0, 0.1)),
        "diffuse": (op.diffuse, (torch.rand(2, 5, 6), 0.2, 2)),
        "crop": (
            op.crop_flip,
            (image, torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int8), [4, 5]),
        ),
    }


@pytest.mark.parametrize("name", _operators())
def test_schema_fake_tensors_and_autograd_agree(name: str) -> None:
    operator, arguments = _operators()[name]
    torch.library.opcheck(
        operator.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


class Block(nn.Module):
    """A transformer-like block of shipped operators."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.Parameter(torch.ones(16)), nn.Linear(16, 64)
        self.down, self.head = nn.Linear(32, 16), nn.Linear(16, 23, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        a, b = self.up(norms.rms_norm(x, self.norm)).chunk(2, dim=-1)
        x = x + self.down(gates.gate(a, b))
        return fused.linear_cross_entropy(x, self.head.weight, target)


def test_torch_compile_takes_the_operators_whole() -> None:
    torch.manual_seed(0)
    block, x, target = Block(), torch.randn(10, 16), _target(10, 23)
    loss = block(x, target)
    loss.backward()
    wanted = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    # aot_eager runs dynamo, fake tensors and the traced backward, without a C++ compiler
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    again = compiled(x, target)
    again.backward()
    got = [p.grad for p in block.parameters() if p.grad is not None]
    assert torch.allclose(loss, again, atol=1e-6)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(7))]
    ours = [p.detach().clone() for p in theirs]
    averages, squares = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.95), weight_decay=0.2)
    for step in range(1, 4):
        for p in theirs:
            p.grad = torch.randn_like(p)
        grads = [p.grad.clone() for p in theirs if p.grad is not None]
        optimizer.step()
        optimizers.adamw_(
            ours,
            grads,
            averages,
            squares,
            lr=0.1,
            betas=(0.8, 0.95),
            weight_decay=0.2,
            step=step,
        )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_muon_makes_the_update_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    param, grad = torch.zeros(12, 30), torch.randn(12, 30)
    optimizers.muon_([param], [grad], [torch.zeros(12, 30)], lr=1.0, low_precision=False)
    singular = torch.linalg.svdvals(param)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


def test_optimizers_refuse_what_they_would_get_wrong() -> None:
    a, b = torch.zeros(4, 5), torch.zeros(5, 4)
    with pytest.raises(BadInputError, match="differ"):
        optimizers.muon_([a], [b], [a], lr=0.1)
    with pytest.raises(BadInputError, match="alike"):
        optimizers.adamw_([a], [b.t()], [a], [a], lr=0.1, step=1)
    with pytest.raises(BadInputError, match="matrices"):
        optimizers.muon_([torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3)], lr=0.1)
    with pytest.raises(BadInputError, match="silu"):
        gates.gate(a, a, "tanhshrink")


def test_int8_linear_is_near_the_weight_it_came_from() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(5, 64)
    q, scale = int8_linear.int8_quantize(weight)
    made, right = int8_linear.int8_linear(x, q, scale), x @ weight.t()
    # each weight is off by at most half a step
    bound = 0.5 * scale * x.abs().sum(1, keepdim=True) * 1.001
    assert bool(((made - right).abs() <= bound).all())
    assert float((made - right).abs().max()) > 0


def test_crops_are_windows_of_the_image() -> None:
    image = torch.arange(2 * 3 * 6 * 8, dtype=torch.float32).reshape(2, 3, 6, 8)
    offsets = torch.tensor([[1, 2], [-1, 4]])
    made = images.crop_flip(image, offsets, torch.tensor([0, 1]), (4, 5))
    assert torch.equal(made[0], image[0, :, 1:5, 2:7])
    padded = F.pad(image[1], (0, 1, 1, 0))
    assert torch.equal(made[1], padded[:, 0:4, 4:9].flip(-1))


def test_random_crops_follow_their_generator() -> None:
    image = torch.rand(16, 3, 8, 8)
    first = images.random_crop_flip(image, generator=torch.Generator().manual_seed(1))
    again = images.random_crop_flip(image, generator=torch.Generator().manual_seed(1))
    other = images.random_crop_flip(image, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(BadInputError, match="window"):
        images.random_crop_flip(image, size=(99, 4))


def test_filters_do_what_their_names_say() -> None:
    torch.manual_seed(0)
    clean = torch.linspace(0.2, 0.8, 32).expand(1, 1, 32, 32)
    noisy = (clean + 0.05 * torch.randn(1, 1, 32, 32)).clamp(0, 1)
    quiet = images.denoise(noisy, radius=2, sigma_range=0.3)
    assert float((quiet - clean).square().mean()) < 0.4 * float((noisy - clean).square().mean())
    assert float(images.sharpen(noisy, amount=1.0).std()) > float(noisy.std())
    wide = images.contrast(noisy, factor=1.2)
    assert float(wide.std()) == pytest.approx(1.2 * float(noisy.std()), rel=1e-3)
    still = images.diffuse(clean[0], rate=0.25, steps=3)
    assert torch.allclose(still, clean[0], atol=1e-6)  # linear: already in balance


def test_muon_is_torchs() -> None:
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(12, 30)), nn.Parameter(torch.randn(40, 8))]
    ours = [p.detach().clone() for p in theirs]
    averages = [torch.zeros_like(p) for p in ours]
    optimizer = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(3):
        for p in theirs:
            p.grad = torch.randn_like(p)
        grads = [p.grad.clone() for p in theirs if p.grad is not None]
        optimizer.step()
        optimizers.muon_(ours, grads, averages, lr=0.1, beta=0.9, weight_decay=0.1)
    # the Newton-Schulz steps work in bf16, whose roundings differ with the order of the products
    for a, b in zip(ours, theirs, strict=True):
        step = 0.1 * max(1.0, a.shape[0] / a.shape[1]) ** 0.5
        assert float((a - b.detach()).abs().max()) < 3 * step * 2**-5


EDGES: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: norms.rms_norm(x, torch.ones(8)),
    "layer_norm": lambda x: norms.layer_norm(x, torch.ones(8), torch.zeros(8)),
    "add_rms_norm": lambda x: sum(norms.add_rms_norm(x, x, torch.ones(8))),  # type: ignore[return-value]
    "gate": lambda x: gates.gate(x, x),
    "cross_entropy": lambda x: cross_entropy.cross_entropy(
        x, torch.zeros(x.shape[0], dtype=torch.long)
    ),
    "linear_cross_entropy": lambda x: fused.linear_cross_entropy(
        x, torch.ones(5, 8), torch.zeros(x.shape[0], dtype=torch.long)
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_no_rows_and_rows_with_gaps(name: str) -> None:
    operator = EDGES[name]
    none = torch.empty(0, 8, requires_grad=True)
    made = operator(none)
    made.sum().backward()
    assert none.grad is not None and none.grad.shape == (0, 8)
    torch.manual_seed(0)
    wide = torch.randn(6, 16, requires_grad=True)
    tall = torch.randn(8, 6, requires_grad=True)
    for parent, view in ((wide, wide[:, ::2]), (tall, tall.t())):
        plain = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        right = operator(plain)
        assert torch.allclose(operator(view), right)
        (mine,) = torch.autograd.grad(operator(view).sum(), view)
        (wanted,) = torch.autograd.grad(right.sum(), plain)
        assert torch.allclose(mine, wanted, atol=1e-6)
        assert parent.grad is None


def test_torch_compile_takes_shapes_that_change() -> None:
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 10, 17):
        x, target = torch.randn(rows, 16), _target(rows, 23)
        assert torch.allclose(compiled(x, target), block(x, target), atol=1e-6)


def test_rows_that_are_all_ignored_give_what_torch_gives() -> None:
    x, target = _gen(4, 11), torch.full((4,), -100)
    ours, theirs = cross_entropy.cross_entropy(x, target), F.cross_entropy(x, target)
    assert torch.allclose(ours, theirs, equal_nan=True)
    (grad,) = torch.autograd.grad(ours, x)
    (wanted,) = torch.autograd.grad(theirs, x)
    assert torch.allclose(grad, wanted, equal_nan=True)
