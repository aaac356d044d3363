"""Native kernels get what they can read: other strides and types are brought there or refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import spectral_norm

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.activations import FusedActivation
from suanli.training.augment import augment, whole_epoch
from suanli.training.fused import FusedConv2d, FusedNorm
from suanli.training.fused_blocks import join_blocks
from suanli.training.headless import behead
from suanli.training.kernels import put_in_place, rows_for
from suanli.training.narrow import NarrowConv2d
from suanli.training.native import attention, behind, convolution, moves, narrow, operators, update
from suanli.training.native.library import KINDS, present
from suanli.training.triton_rows import FusedNorm as TritonNorm
from suanli.training.triton_rows import fused_norm

needs_compiler = pytest.mark.skipif(not present(), reason="there is no C compiler")
RELU, GELU = KINDS["relu"], KINDS["gelu"]
FUSED = TrainPlan(precision="bf16", memory_layout="channels_last", kernels=("fused-cnn",))
NARROW = TrainPlan(kernels=("narrow-cnn",))


def images(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    made = torch.randn(shape, generator=draw).bfloat16()
    return made.contiguous(memory_format=torch.channels_last)


def odd(values: Tensor, how: str) -> Tensor:
    """The same values, as a kernel that takes an address alone would misread them."""
    if how == "gaps":
        return torch.stack([values, torch.full_like(values, 1e9)], -1).flatten(-2)[..., ::2]
    return values.double()


# -- moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("most", "fits"), [(60, False), (2, False), (1, True)])
def test_moves_that_are_as_long_as_an_image_are_one_line(
    layout: torch.memory_format, most: int, fits: bool
) -> None:
    x = torch.randint(0, 255, (64, 3, 2, 5), dtype=torch.uint8).contiguous(memory_format=layout)
    draw = torch.Generator().manual_seed(0)
    if fits:
        assert whole_epoch(x, 0, draw, most=most).shape == x.shape
        return
    with pytest.raises(BadInputError, match=rf"of 2x5 pixels cannot be shifted by up to {most}"):
        whole_epoch(x, 0, draw, most=most)
    with pytest.raises(BadInputError, match=r"1 at most"):
        augment(x, (f"shift{most}",), draw)


@needs_compiler
def test_moved_reads_no_pixel_that_is_not_there() -> None:
    x = images(4, 3, 5, 7)
    none, flags = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.bool)
    assert torch.equal(moves.moved(x, none, none, flags), x)
    for down, right, mirror in (
        (torch.tensor([0, 0, 5, 0]), none, flags),
        (none, torch.tensor([0, -7, 0, 0]), flags),
        (none[:3], none, flags),
        (none, none, flags[:3]),
    ):
        with pytest.raises(ValueError, match="for each image"):
            moves.moved(x, down, right, mirror)
    with pytest.raises(ValueError, match="channels last"):
        moves.moved(x.contiguous(), none, none, flags)


@needs_compiler
def test_images_wider_than_the_kernel_counts_go_another_way() -> None:
    x = torch.arange(2 * 70_000.0).reshape(2, 1, 1, 70_000).repeat(1, 1, 3, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    assert not moves.can_move(x)
    found = whole_epoch(x, 0, torch.Generator().manual_seed(0), most=1)
    assert {float(line[0, 0, 40_000] % 70_000) for line in found} <= {
        *(39_999.0, 40_000.0, 40_001.0, 29_998.0, 29_999.0, 30_000.0)
    }


# -- operators -----------------------------------------------------------------------------------


def gradients(call: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    result = call(*leaves)
    found = torch.autograd.grad(result.float().square().sum(), leaves)
    return [result.detach(), *(one.float() for one in found)]


@needs_compiler
@pytest.mark.parametrize("how", ["gaps", "float64"])
def test_weights_of_other_strides_and_types_count_as_what_they_are(how: str) -> None:
    x, few = images(2, 32, 4, 4), torch.randn(2, 3, 6, 6)
    scale, offset = torch.linspace(0.5, 2.0, 32), torch.linspace(-1.0, 1.0, 32)
    filters, bias = torch.randn(4, 3, 3, 3), torch.randn(4)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = operators.norm_act(x, weight, bias, None, False, GELU, 1e-5)[0]
        return found

    def biased(x: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = behind.bias_act(x, bias, True, GELU)[0]
        return found

    def convolved(x: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = narrow.narrow_conv2d(x, filters, bias, 1)
        return found

    for call, first, rest in (
        (norm, x, (scale, offset)),
        (biased, x, (offset,)),
        (convolved, few, (bias,)),
    ):
        right = gradients(call, first, *rest)
        found = gradients(call, first, *(odd(one, how) for one in rest))
        assert all(map(torch.equal, found, right)), call.__name__


@needs_compiler
@pytest.mark.parametrize("kind", [RELU, GELU])
def test_images_in_another_layout_are_brought_into_rows_and_kept_alive(kind: int) -> None:
    x = images(8, 32, 64, 64)

    def biased(x: Tensor) -> Tensor:
        found: Tensor = behind.bias_act(x, None, False, kind)[0]
        return found

    right = gradients(biased, x)
    found = gradients(biased, x.contiguous())  # large enough to be given back once it is freed
    assert all(map(torch.equal, found, right))


WRONG: dict[str, Callable[[], object]] = {
    "a norm of fp32": lambda: operators.norm_act(
        *(images(2, 32, 4, 4).float(), None, None, None, False, 0, 1e-5)
    ),
    "a norm of 40 channels": lambda: operators.norm_act(
        *(images(2, 40, 4, 4), None, None, None, False, 0, 1e-5)
    ),
    "a norm of nothing": lambda: operators.norm_act(
        *(images(0, 32, 4, 4), None, None, None, False, 0, 1e-5)
    ),
    "a short weight": lambda: operators.norm_act(
        *(images(2, 64, 4, 4), torch.ones(32), None, None, False, 0, 1e-5)
    ),
    "a short bias": lambda: operators.norm_act(
        *(images(2, 64, 4, 4), None, torch.ones(32), None, False, 0, 1e-5)
    ),
    "a small shortcut": lambda: operators.norm_act(
        *(images(2, 32, 4, 4), None, None, images(2, 32, 2, 2), False, 0, 1e-5)
    ),
    "a shortcut in fp32": lambda: operators.norm_act(
        *(images(2, 32, 4, 4), None, None, images(2, 32, 4, 4).float(), False, 0, 1e-5)
    ),
    "a small gradient of a norm": lambda: operators.norm_act_backward(
        *(images(2, 32, 2, 2), images(2, 32, 4, 4), [torch.empty(0), torch.empty(0, 2)]),
        *([torch.ones(32), torch.ones(32)], None, None, None, [0, 0]),
    ),
    "no places of a pool": lambda: operators.norm_act_backward(
        *(images(2, 32, 2, 2), images(2, 32, 4, 4), [images(2, 32, 2, 2), torch.empty(0, 2)]),
        *([torch.ones(32), torch.ones(32)], None, None, None, [1, 0]),
    ),
    "an activation of fp32": lambda: operators.act(torch.randn(64), RELU),
    "a small gradient of an activation": lambda: operators.act_backward(
        *(torch.randn(32).bfloat16(), torch.randn(64).bfloat16(), RELU)
    ),
    "a bias of 16": lambda: behind.bias_act(images(2, 32, 4, 4), torch.ones(16), False, RELU),
    "a pool of fp32": lambda: behind.bias_act(images(2, 32, 4, 4).float(), None, True, RELU),
    "a small gradient of a bias": lambda: behind.bias_act_backward(
        images(2, 32, 2, 2), images(2, 32, 4, 4), torch.empty(0, 2), None, [4, 4], RELU
    ),
    "weights in bf16": lambda: narrow.narrow_conv2d(
        torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3).bfloat16(), None, 1
    ),
    "weights of other inputs": lambda: narrow.narrow_conv2d(
        torch.randn(2, 3, 6, 6), torch.randn(4, 5, 3, 3), None, 1
    ),
    "a narrow bias of 3": lambda: narrow.narrow_conv2d(
        torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.ones(3), 1
    ),
    "a kernel of 9": lambda: narrow.narrow_conv2d(
        torch.randn(2, 3, 12, 12), torch.randn(4, 3, 9, 9), None, 1
    ),
    "a wide padding": lambda: narrow.narrow_conv2d(
        torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), None, 3
    ),
    "a small narrow gradient": lambda: narrow.narrow_conv2d_backward(
        *(torch.randn(2, 4, 5, 5), torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), 1),
        [True, True, True],
    ),
    "scores in fp32": lambda: attention.attention_weights(torch.randn(2, 4, 16), 1.0, False),
    "20 keys": lambda: attention.attention_weights(torch.randn(2, 4, 20).bfloat16(), 1.0, False),
    "16,384 keys": lambda: attention.attention_weights(
        torch.zeros(1, 16_384, dtype=torch.bfloat16), 1.0, False
    ),
    "a small gradient of scores": lambda: attention.attention_weights_backward(
        torch.zeros(2, 16).bfloat16(), torch.zeros(4, 16).bfloat16(), 1.0, False
    ),
}


@needs_compiler
@pytest.mark.parametrize("what", WRONG)
def test_what_a_kernel_would_read_beyond_its_end_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match=r"the kernel takes|channels need one each"):
        WRONG[what]()


@needs_compiler
def test_an_empty_batch_is_one_to_a_bias_and_a_pool() -> None:
    for pool in (True, False):
        x = images(0, 32, 4, 4).requires_grad_()
        behind.bias_act(x, None, pool, RELU)[0].sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.skipif(
    not present() or convolution.tile_library() is None, reason="no tile registers here"
)
def test_gradients_of_weights_look_at_shapes() -> None:
    with pytest.raises(ValueError, match="of the result's shape"):
        convolution.weight_gradient(images(2, 16, 4, 4), images(2, 16, 9, 9), 3, 1)
    with pytest.raises(ValueError, match="a padding of at most half"):
        convolution.weight_gradient(images(2, 16, 11, 11), images(2, 16, 9, 9), 3, 2)


# -- the update ----------------------------------------------------------------------------------


@needs_compiler
def test_a_state_of_another_shape_is_torchs_to_refuse() -> None:
    for name, kind in (("momentum_buffer", update.SGD), ("exp_avg_sq", update.Adam)):
        options = {"momentum": 0.9} if kind is update.SGD else {}
        weight = nn.Parameter(torch.zeros(1000))
        optimizer = kind([weight], lr=0.1, **options)
        for _ in range(2):
            weight.grad = torch.ones(1000)
            optimizer.update()
        kept = optimizer.state_dict()
        kept["state"][0][name] = torch.zeros(10)
        optimizer.load_state_dict(kept)
        with pytest.raises(RuntimeError, match=r"size|shape"):
            optimizer.update()


@needs_compiler
def test_sparse_gradients_and_parameters_within_one_tensor() -> None:
    results = []
    for kind in (update.SGD, torch.optim.SGD):
        draw = torch.Generator().manual_seed(0)
        whole = torch.randn(200, generator=draw)
        table = nn.Embedding(10, 4, sparse=True, _weight=whole[3:43].view(10, 4).clone())
        parts = [nn.Parameter(whole[50:85].view(5, 7)), nn.Parameter(whole[101:120])]
        groups = [{"params": parts}, {"params": [table.weight]}]  # the second is torch's
        optimizer = kind(groups, lr=0.1)
        table(torch.tensor([1, 3])).sum().backward()
        for part in parts:
            part.grad = torch.ones_like(part)
        optimizer.update() if isinstance(optimizer, update.SGD) else optimizer.step()
        results.append((whole, table.weight.detach()))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right)


# -- layers with hooks ---------------------------------------------------------------------------


class Shortcut(nn.Module):
    """A block whose forward the kernels take in, with something to say about its result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32)
        self.register_forward_hook(lambda _module, _inputs, result: 2 * result)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x) + x)


def kinds(model: nn.Module) -> list[type]:
    return [type(layer) for layer in model.modules()]


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_layers_with_hooks_keep_their_operators() -> None:
    seen: list[str] = []
    model = nn.Sequential(
        spectral_norm(nn.Conv2d(3, 32, 3)),
        nn.BatchNorm2d(32),
        nn.GELU(),
        *(nn.Conv2d(32, 32, 3), nn.MaxPool2d(2), nn.ReLU()),
    ).to(memory_format=torch.channels_last)
    model[1].register_forward_pre_hook(lambda *_: seen.append("norm"))
    model[2].register_full_backward_hook(lambda *_: seen.append("activation"))
    model[4].register_forward_hook(lambda *_: seen.append("pool"))
    twin, _ = put_in_place(model, functional.cross_entropy, FUSED)
    found = kinds(twin)
    assert found.count(FusedConv2d) == 1
    assert not {FusedNorm, FusedActivation} & set(found)
    before = model[0].weight_u.clone()
    with torch.autocast("cpu", torch.bfloat16):
        twin(torch.randn(2, 3, 9, 9)).float().sum().backward()
    assert seen == ["norm", "pool", "activation"]
    assert not torch.equal(model[0].weight_u, before)  # the norm's own iteration went on
    with pytest.raises(BadInputError, match="finds no layer"):
        put_in_place(model[:1], functional.cross_entropy, FUSED)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_other_rows_leave_them_too() -> None:
    few = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3))
    assert "narrow-cnn" not in rows_for(few[:1], "cpu")
    assert kinds(put_in_place(few, functional.cross_entropy, NARROW)[0]).count(NarrowConv2d) == 1
    norms = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    norms[0].register_forward_hook(lambda *_: None)
    assert kinds(fused_norm(norms, TrainPlan())).count(TritonNorm) == 1
    head = nn.Sequential(nn.Linear(8, 8), spectral_norm(nn.Linear(8, 4)))
    with pytest.raises(BadInputError, match="1 has hooks"):
        behead(head, functional.cross_entropy, TrainPlan(), lambda x, *_: x)


@needs_compiler
def test_a_block_with_a_hook_is_not_traced_away() -> None:
    torch.manual_seed(0)
    block = Shortcut().to(memory_format=torch.channels_last).train()
    x = images(2, 32, 4, 4)
    expected = block(x.float())
    twin, _ = put_in_place(nn.Sequential(block), functional.cross_entropy, FUSED)
    torch.testing.assert_close(twin(x).float(), expected, rtol=0.05, atol=0.05)
    assert join_blocks(twin) is twin
