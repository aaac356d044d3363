"""Attention by products with a softmax of our own, against float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training import attention
from suanli.training.activations import FusedActivation
from suanli.training.kernels import put_in_place, rows_for
from suanli.training.native.attention import attention_weights
from suanli.workloads.models.vit import Block

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
PLAN = TrainPlan(precision="bf16", kernels=("attention",))
ROUNDING = 2.0**-8  # of bf16


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    difference = found.detach().double() - expected.detach().double()
    return float(difference.norm() / (expected.detach().double().norm() + 1e-30))


def exact_weights(scores: Tensor, scale: float, causal: bool) -> Tensor:
    scaled = scores * scale
    if causal:
        unseen = torch.ones(scores.shape[-2:]).triu(1).bool()
        scaled = scaled.masked_fill(unseen, -math.inf)
    return scaled.softmax(-1)


@needs_compiler
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 48, 48), (1, 1, 16), (3, 7, 32), (2, 40, 16)])
def test_weights_and_their_gradient(shape: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(1)
    scores = (torch.randn(shape) * 8).bfloat16().requires_grad_()
    weights = attention_weights(scores, 0.3, causal)
    gradient = torch.randn(shape).bfloat16()
    (found,) = torch.autograd.grad(weights, scores, gradient)
    exact = scores.detach().double().requires_grad_()
    expected = exact_weights(exact, 0.3, causal)
    (wanted,) = torch.autograd.grad(expected, exact, gradient.double())
    assert error(weights, expected) < ROUNDING
    assert error(found, wanted) < 3 * ROUNDING  # from weights that are rounded
    if causal:
        assert torch.equal(weights.detach().triu(1), torch.zeros_like(weights))


@needs_compiler
def test_large_scores_and_what_is_not_a_number() -> None:
    scores = torch.full((1, 2, 16), -3e38).bfloat16()
    scores[0, 0, 3] = 3e38
    weights = attention_weights(scores, 1.0, False)
    sure = functional.one_hot(torch.tensor(3), 16).bfloat16()
    torch.testing.assert_close(weights[0, 0], sure, rtol=0, atol=1e-30)
    assert error(weights[0, 1], torch.full((16,), 1 / 16)) < ROUNDING
    scores[0, 1, 5] = math.nan
    assert attention_weights(scores, 1.0, False)[0, 1].isnan().all()


@needs_compiler
def test_operators_keep_torchs_rules() -> None:
    names = ("test_schema", "test_faketensor")
    scores = torch.randn(2, 16, 32).bfloat16()
    torch.library.opcheck(attention_weights, (scores, 0.5, True), test_utils=names)


@needs_compiler
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_block_trains_with_them_as_it_does_in_eager(
    causal: bool, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(*(Block(64, 2, 128, causal=causal) for _ in range(2)))
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    twin = put_in_place(model, functional.cross_entropy, PLAN.with_(weights=weights))[0]
    assert any(isinstance(m, FusedActivation) for m in twin.modules())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    calls = []
    real = attention._attended
    monkeypatch.setattr(
        attention, "_attended", lambda *a, **k: calls.append(real(*a, **k)) or calls[-1]
    )
    x = torch.randn(3, 32, 64)
    for net in (twin, eager, exact):
        doubled = net is exact
        with torch.autocast("cpu", torch.bfloat16, enabled=not doubled):
            out = net(x.double() if doubled else x)
        out.double().square().mean().backward()
    assert len(calls) == 2
    assert all(call is not None for call in calls)
    parts = zip(model.named_parameters(), eager.parameters(), exact.parameters(), strict=True)
    for (name, mine), theirs, right in parts:
        assert mine.grad is not None
        assert theirs.grad is not None
        assert right.grad is not None
        allowed = 2 * error(theirs.grad, right.grad) + 1e-3
        assert error(mine.grad, right.grad) <= allowed, name


@needs_compiler
@pytest.mark.parametrize(
    "more",
    [{"attn_mask": torch.ones(16, 16).bool()}, {"dropout_p": 0.1}, {"keys": 20}, {"fp32": True}],
)
def test_what_the_kernels_cannot_do_is_left_to_the_library(more: dict[str, object]) -> None:
    keys, single = int(more.pop("keys", 16)), more.pop("fp32", False)  # type: ignore[call-overload]
    dtype = torch.float32 if single else torch.bfloat16
    q, k, v = (torch.randn(1, 2, n, 8, dtype=dtype) for n in (16, keys, keys))
    assert attention._attended(q, k, v, **more) is None  # type: ignore[arg-type]


def test_where_it_is_offered() -> None:
    assert "attention" in rows_for(nn.Sequential(Block(32, 2, 64)), "cpu")
    assert "attention" in rows_for(nn.TransformerEncoderLayer(32, 2, 64), "cpu")
    assert "attention" not in rows_for(nn.Sequential(nn.Linear(2, 2)), "cpu")
    with pytest.raises(BadInputError, match="bf16"):
        put_in_place(Block(32, 2, 64), functional.cross_entropy, PLAN.with_(precision="fp32"))
    with pytest.raises(BadInputError, match="second time"):
        PLAN.with_(checkpointing=True).checked()
