"""The shipped kernels on a GPU."""

import pytest
import torch

from suanli.kernels.checking import check_here
from suanli.kernels.operators import cross_entropy, norms
from suanli.kernels.shipped import shipped, shipped_kernel
from suanli.kernels.tune_kernel import tune_kernel
from suanli.kernels.tuning import SearchLimits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_right_on_the_gpu(name: str, dtype: str) -> None:
    kernel = shipped_kernel(name)
    for seed, sizes in enumerate(kernel.check_sizes):
        case = check_here(kernel, sizes, dtype, device="cuda:0", seed=seed)
        assert case.status == "verified", case


def test_operators_train_on_the_gpu() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 256, (64,), device="cuda")
    loss = cross_entropy.cross_entropy(norms.rms_norm(x, weight), target)
    loss.backward()
    again = torch.nn.functional.cross_entropy(
        torch.nn.functional.rms_norm(x.double(), (256,), weight.double(), 1e-5), target
    )
    assert float(loss.detach()) == pytest.approx(float(again.detach()), rel=2e-2)
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_tune_finds_a_verified_winner() -> None:
    sizes = {"rows": 512, "width": 1024, "residual": 0, "centred": 0}
    result = tune_kernel("norm", sizes, limits=SearchLimits(most=4), fresh=True)
    assert result.verified
    assert not result.ranking
    assert "eager" in result.races
