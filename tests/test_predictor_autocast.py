"""Element types as autocast passes them: what stays narrow, what is wide, what is cast."""

import torch
from torch import nn

from suanli.base.work import Operator, Work
from suanli.cost.autocast_types import Passed, passed
from suanli.cost.work_kernels import How, kernels_of
from suanli.measure.capture import capture


class Block(nn.Module):
    """A residual block around one product, with this norm before it."""

    def __init__(self, norm: nn.Module, inner: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.inner = first, norm, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(2):
            x = x + torch.relu(self.inner(self.norm(x)))
        return x


def transformer() -> Work:
    model = Block(nn.LayerNorm(32), nn.Linear(32, 32), nn.Embedding(10, 32))
    return capture(model, (torch.zeros(4, 8, dtype=torch.long),), batch=4)


def network() -> Work:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = Block(nn.BatchNorm2d(8), conv, nn.Conv2d(3, 8, 1)).eval()
    return capture(model, (torch.zeros(4, 3, 16, 16),), batch=4)


def widths(work: Work, name: str) -> list[Passed]:
    pairs = zip(work.operators, passed(work.operators, 2.0), strict=True)
    return [found for op, found in pairs if op.name == name and found is not None]


def whole(work: Work, name: str) -> int:
    return next(o.bytes_read + o.bytes_written for o in work.operators if o.name == name)


def test_batch_norms_stay_narrow() -> None:
    work = network()
    for name in ("native_batch_norm", "relu", "add"):
        size = whole(work, name)
        for found in widths(work, name):
            assert found.cast == 0 and found.moved is not None
            assert abs(found.moved / size - 0.5) < 0.02, name
    casts = [found.cast for found in widths(work, "convolution")]
    assert casts == [4 * 3 * 16 * 16 * 6.0, 0, 0]  # the images alone come in fp32


def test_layer_norms_keep_sums_wide_and_every_product_is_cast() -> None:
    work = transformer()
    size = 4 * 8 * 32
    assert [found.moved for found in widths(work, "native_layer_norm")] == [
        float(whole(work, "native_layer_norm"))
    ] * 2
    assert [found.cast for found in widths(work, "addmm")] == [size * 6.0] * 2
    assert [found.cast for found in widths(work, "native_layer_norm")] == [0.0] * 2
    for found in widths(work, "add"):  # a wide sum and a narrow addend
        assert found.moved is not None
        assert 2 * size * 4 < found.moved < 3 * size * 4


def test_softmax_reads_what_it_gets_and_writes_fp32() -> None:
    shape = (64, 64)
    product = Operator(
        name="mm", flops=2, matmul=True, input_shapes=(shape, shape), output_shapes=(shape,)
    )
    softmax = Operator(
        name="_softmax", flops=1, bytes_read=16384, bytes_written=16384,
        input_shapes=(shape,), output_shapes=(shape,),
    )  # fmt: skip
    _, found, after = passed((product, softmax, product), 2.0)
    assert found == Passed(moved=1.5 * 16384)
    assert after is not None and after.cast == 64 * 64 * 6.0


def test_updates_and_whole_numbers_are_left_as_they_are() -> None:
    update = Operator(name="adam_step", phase="optimizer", bytes_read=8, input_shapes=((2,),))
    ids = Operator(name="add", dtype="int64", bytes_read=8, input_shapes=((1,),))
    assert list(passed((update, ids), 2.0)) == [None, None]


def test_mixed_precision_moves_more_than_a_narrow_model() -> None:
    def moved(work: Work, *, autocast: bool) -> float:
        kernels = kernels_of(work, How(dtype="bf16", autocast=autocast))
        return float(kernels["moved"].sum())

    for work in (transformer(), network()):
        assert moved(work, autocast=True) > moved(work, autocast=False)
