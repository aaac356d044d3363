"""Linear layers in fp8: what they compute, and how a plan with them is verified."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.plans.situation import Situation
from suanli.plans.train_space import TrainSituation, train_candidates
from suanli.training import fp8
from suanli.training.forward import Forward
from suanli.training.fp8 import EmulatedLinear, Fp8Linear, fp8_layers, fp8_products
from suanli.training.recipe import as_written
from suanli.training.trials import situation_of
from suanli.workloads.record import Data, Inputs, Samples, TrainingSettings, Workload
from suanli.workloads.seeding import seeded
from tests.train_parts import Bench

PLAN = TrainPlan(precision="fp8")


def _dense() -> nn.Module:
    with seeded():
        return nn.Sequential(
            *(nn.Linear(32, 48), nn.SiLU(), nn.LayerNorm(48)),
            *(nn.Linear(48, 64), nn.SiLU(), nn.Linear(64, 16)),
        ).eval()


def _samples(count: int, seed: int) -> Samples:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 16, (count,), generator=draw)
    values = torch.randn(count, 32, generator=draw)
    values[torch.arange(count), labels] += 2.0
    return Samples(inputs=(values,), labels=labels)


def _workload() -> Workload:
    return Workload(
        name="dense",
        make_model=_dense,
        make_inputs=lambda batch: Inputs(args=(torch.zeros(batch, 32),)),
        data=lambda: Data(
            train=_samples(256, 1), search=_samples(32, 2), acceptance=_samples(32, 3)
        ),
        loss=functional.cross_entropy,
        training=TrainingSettings(lr=0.05, momentum=0.9, batch=64, epochs=2),
    )


def _gradients(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    made = layer(x)
    made.float().backward(upstream)
    assert x.grad is not None
    return [made.detach().float(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_rounded_values(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 32, bias=bias)
    x, upstream = torch.randn(2, 16, 48), 1e-4 * torch.randn(2, 16, 32)
    exact = _gradients(copy.deepcopy(plain), x, upstream)
    emulated = _gradients(EmulatedLinear(copy.deepcopy(plain)), x, upstream)
    found = _gradients(Fp8Linear(copy.deepcopy(plain)), x, upstream)
    assert len(found) == 3 + bias
    for mine, rounded, right in zip(found, emulated, exact, strict=True):
        size = right.norm()
        assert mine.shape == right.shape and mine.dtype == torch.float32
        assert float((mine - rounded).norm() / size) < 0.01  # bf16 results
        assert float((mine - right).norm() / size) < 0.12
    assert float((found[0] - exact[0]).norm() / exact[0].norm()) > 0.005  # it is fp8


def test_rows_that_no_product_takes_are_left_to_the_layer() -> None:
    torch.manual_seed(0)
    plain, x, upstream = nn.Linear(32, 32), torch.randn(5, 32), torch.randn(5, 32)
    exact = _gradients(copy.deepcopy(plain), x, upstream)
    for kind in (Fp8Linear, EmulatedLinear):
        for mine, right in zip(
            _gradients(kind(copy.deepcopy(plain)), x, upstream), exact, strict=True
        ):
            torch.testing.assert_close(mine, right)


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    layer = Fp8Linear(nn.Linear(16, 16, bias=False))
    nothing = _gradients(layer, torch.zeros(16, 16), torch.zeros(16, 16))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in nothing)
    x = torch.ones(16, 16)
    x[3, 4] = float("nan")
    assert not layer(x).isfinite().all()


def test_the_last_layer_and_odd_sizes_are_left_out() -> None:
    assert list(fp8_layers(_dense())) == ["0", "3"]
    odd = nn.Sequential(nn.Linear(20, 32), nn.Linear(32, 20), nn.Linear(32, 32))
    assert fp8_layers(odd) == {}
    with pytest.raises(BadInputError, match="multiples of 16"):
        Forward(odd, functional.cross_entropy, PLAN)
    model = _dense()
    twin = fp8_products(model)
    assert sum(isinstance(m, Fp8Linear) for m in twin.modules()) == 2
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, made = tmp_path_factory.mktemp("dense"), as_written(_workload())
    bench = Bench(folder, made, total_steps=8, precisions=("fp8",))
    assert bench.host(PLAN).too_far("fp8") == ""
    return bench.check


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch": 32}, {"optimizer_kernel": "fused"}], ids=str
)
def test_fp8_learns_what_rounding_to_it_learns(changes: dict[str, Any], check: Any) -> None:
    found = check(PLAN.with_(**changes))
    assert found.ok, found.reason


def _too_large(real: Any) -> Any:
    def low(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        made, factor = real(tensor, dtype)
        return made, 1.25 * factor if dtype == torch.float8_e5m2 else factor

    return low


def _coarse(real: Any) -> Any:
    return lambda tensor, dtype: real((tensor * 2**-6).round() * 2**6, dtype)


@pytest.mark.parametrize("fault", [_too_large, _coarse])
def test_planted_faults_are_caught(fault: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_low", fault(fp8._low))
    found = check(PLAN)
    assert not found.ok
    assert "step 1" in found.reason


def _situation(capability: str | None, device: str = "cuda:0") -> TrainSituation:
    machine = Situation(
        device=device,
        cores=2,
        objective="throughput",
        batch=64,
        present=frozenset({"eager"}),
        capability=capability,
    )
    return TrainSituation(machine=machine, images=False, fp8=True)


def test_fp8_is_tried_where_there_is_hardware() -> None:
    found = {
        capability: [
            c
            for c in train_candidates(_situation(capability), eager_ms=9.0)
            if c.plan.precision == "fp8"
        ]
        for capability in ("8.0", "8.9", "9.0", None)
    }
    assert found["8.0"] and all("compute capability 8.9" in c.why_not for c in found["8.0"])
    for capability in ("8.9", "9.0", None):
        assert any(c.coarse and not c.why_not for c in found[capability])
        assert all(TrainPlan.from_plan(c.plan).weights == "fp32" for c in found[capability])
    here = train_candidates(_situation(None, "cpu"), eager_ms=9.0)
    assert not any(c.plan.precision == "fp8" for c in here)


def test_a_situation_knows_whether_fp8_has_layers() -> None:
    made = as_written(_workload())
    assert situation_of(made, _dense(), "cpu", images=False, blocks=False).fp8
    assert not situation_of(made, nn.Linear(16, 16), "cpu", images=False, blocks=False).fp8


def test_what_fp8_does_not_go_with_is_said() -> None:
    for changes in ({"sharded": True}, {"weights": "bf16"}):
        with pytest.raises(BadInputError, match=r"fp8|precision bf16"):
            PLAN.with_(**changes).checked()
    assert codec.loads(TrainPlan, codec.dumps(PLAN)) == PLAN
