"""Muon, averages of weights, whole-epoch augmentation, starts and views."""

import pytest
import torch
from torch import Tensor, nn

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError
from suanli.training import augment
from suanli.training.augment import flipped_in, whole_epoch
from suanli.training.averaging import ExponentialAverage, Lookahead
from suanli.training.initialise import dirac, whiten, whitening_filters
from suanli.training.muon import Muon, matrix_parameters, orthogonalised
from suanli.training.schedules import triangle
from suanli.training.views import called_in, for_the_unsure, mirrored, mirrored_and_shifted


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (16, 16)])
def test_orthogonalised_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalised(matrix, steps=6)
    values = torch.linalg.svdvals(found.double())
    assert float(values.max()) < 1.3
    if shape[0] != shape[1]:  # a square one of chance has values too small for six steps
        assert float(values.min()) > 0.6
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    cosine = (found.double() * (u @ v)).sum() / (found.double().norm() * (u @ v).norm())
    assert float(cosine) > 0.95


def test_the_sgd_half_of_muon_is_torchs_sgd() -> None:
    torch.manual_seed(1)
    mine, torchs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    one = Muon([{"params": [mine], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}])
    two = torch.optim.SGD([torchs], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    for _ in range(4):
        gradient = torch.randn(5)
        mine.grad, torchs.grad = gradient.clone(), gradient.clone()
        one.step()
        two.step()
    assert torch.allclose(mine, torchs, atol=1e-6)


def test_muon_keeps_the_norm_and_goes_downhill() -> None:
    torch.manual_seed(2)
    layer = nn.Conv2d(8, 16, 3, bias=False)
    target = layer.weight.detach().clone()
    nn.init.normal_(layer.weight)
    optimizer = Muon([{"params": matrix_parameters(layer), "muon": True, "lr": 0.1}])
    target *= 4.0 / target.norm()
    losses = []
    for _ in range(40):
        loss = (layer.weight - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert float(layer.weight.detach().norm()) == pytest.approx(16**0.5, rel=1e-4)
    assert (
        torch.nn.functional.cosine_similarity(before.flatten(), layer.weight.flatten(), 0) > 0.999
    )


def test_muon_goes_on_from_its_state() -> None:
    def run(steps: int, load: dict | None = None, weight: Tensor | None = None) -> tuple:
        parameter = nn.Parameter(torch.ones(4, 6) if weight is None else weight.clone())
        optimizer = Muon([{"params": [parameter], "muon": True, "lr": 0.1}])
        if load is not None:
            optimizer.load_state_dict(load)
        for step in range(steps):
            parameter.grad = torch.sin(parameter.detach() * 3 + step + (2 if load else 0))
            optimizer.step()
        return parameter.detach(), optimizer.state_dict()

    whole, _ = run(4)
    half, state = run(2)
    assert torch.equal(whole, run(2, state, half)[0])


def test_muon_refuses_vectors() -> None:
    with pytest.raises(BadInputError, match="vectors"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}])


def model_of(value: float) -> nn.Module:
    model = nn.BatchNorm1d(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.running_mean):
            tensor.fill_(value)
    return model


def test_lookahead_meets_every_few_steps() -> None:
    model = model_of(0.0)
    ahead = Lookahead(model, every=2, decay=0.5, power=1.0)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ahead.after_step(1, 1.0)
    assert model.weight.tolist() == [1.0] * 3
    ahead.after_step(2, 1.0)
    assert model.weight.tolist() == [0.5] * 3
    other = model_of(0.0)
    twin = Lookahead(other, every=2, decay=0.5, power=1.0)
    twin.load_state_dict(ahead.state_dict())
    twin.after_step(2, 1.0)
    assert other.weight.tolist() == [0.25] * 3
    ahead.after_step(4, 0.0)  # at the start of a run nothing is kept
    assert model.weight.tolist() == [0.5] * 3


def test_exponential_average_is_put_in_at_the_end() -> None:
    model = model_of(0.0)
    average = ExponentialAverage(model, decay=0.9)
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.after_step(step, 0.5)
    average.finish()
    assert 185 < float(model.weight[0]) < 195  # about ten steps behind


def test_every_image_is_seen_both_ways() -> None:
    even, odd = flipped_in(0, 64), flipped_in(1, 64)
    assert torch.equal(even, ~odd)
    assert torch.equal(even, flipped_in(2, 64))
    assert 10 < int(even.sum()) < 54


def test_a_whole_epoch_is_mirrored_and_moved_within_the_reflection() -> None:
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(400, 1, 1, 1)
    found = whole_epoch(images, 0, torch.Generator().manual_seed(0), most=2)
    mirror = flipped_in(0, 400)
    for turned, start in ((False, images[:1]), (True, images[:1].flip(-1))):
        padded = torch.nn.functional.pad(start, (2,) * 4, mode="reflect")
        windows = {
            tuple(padded[0, 0, y : y + 8, x : x + 8].flatten().tolist())
            for y in range(5)
            for x in range(5)
        }
        assert {tuple(i.flatten().tolist()) for i in found[mirror == turned]} == windows


@pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_native_pass_gives_the_same(
    dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.randint(0, 255, (70, channels, 9, 12)).to(dtype)
    images = drawn.contiguous(memory_format=torch.channels_last)
    assert augment.can_move(images)
    found = whole_epoch(images, 1, torch.Generator().manual_seed(4), most=3)
    monkeypatch.setattr(augment, "can_move", lambda _: False)
    assert torch.equal(found, whole_epoch(images, 1, torch.Generator().manual_seed(4), most=3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [4, 5])
def test_a_square_of_each_image_is_cut_out(layout: torch.memory_format, side: int) -> None:
    images = torch.ones(3000, 2, 8, 6).contiguous(memory_format=layout)
    found = augment.cut_out(images, side, torch.Generator().manual_seed(0))
    assert found is images
    gone = found == 0
    assert torch.equal(gone[:, 0], gone[:, 1])
    rows, columns = gone[:, 0].any(2), gone[:, 0].any(1)
    assert torch.equal(gone[:, 0], rows[:, :, None] & columns[:, None, :])  # all of them rectangles
    # a centre may be any pixel, so that at the edge half of the square is left
    assert {int(n) for n in rows.sum(1)} == set(range(side - side // 2, side + 1))
    assert {int(n) for n in columns.sum(1)} == set(range(side - side // 2, side + 1))
    assert rows.any(0).all() and columns.any(0).all()


def test_cutout_by_name_leaves_the_images_of_the_set() -> None:
    images = torch.ones(4, 1, 8, 8)
    found = augment.augment(images, ("cutout3",), torch.Generator().manual_seed(0))
    assert images.all()
    assert (found == 0).flatten(1).any(1).all()
    with pytest.raises(BadInputError, match="unknown augmentation 'cut3'"):
        augment.augment(images, ("cut3",), torch.Generator())


def test_whitening_makes_responses_uncorrelated() -> None:
    torch.manual_seed(3)
    rough = torch.randn(400, 3, 12, 12)
    images = torch.nn.functional.avg_pool2d(rough, 3, 1) + 0.3 * rough[..., 1:-1, 1:-1]
    layer = nn.Conv2d(3, 32, 2, bias=False)
    whiten(layer, images, eps=0.0)
    responses = layer(images).transpose(0, 1).flatten(1).detach()
    covariance = responses @ responses.T / responses.shape[1]
    assert torch.allclose(covariance[:12, :12], torch.eye(12), atol=0.05)
    assert torch.equal(layer.weight[12:24], -layer.weight[:12])
    assert not layer.weight[24:].any()
    assert not layer.weight.requires_grad
    assert whitening_filters(images, 2).shape == (24, 3, 2, 2)
    with pytest.raises(BadInputError, match="24"):
        whiten(nn.Conv2d(3, 16, 2), images)


def test_dirac_passes_the_input_on() -> None:
    layer = nn.Conv2d(4, 9, 3, padding=1, bias=False)
    rest = layer.weight[4:].detach().clone()
    dirac(layer)
    images = torch.randn(2, 4, 6, 6)
    assert torch.allclose(layer(images)[:, :4], images, atol=1e-6)
    assert torch.equal(layer.weight[4:], rest)


def corner(images: Tensor) -> Tensor:
    return images[:, 0, 0, :2]


def test_views() -> None:
    images = torch.randn(6, 1, 5, 5)
    flipped = torch.stack([images[:, 0, 0, 4], images[:, 0, 0, 3]], 1)
    both = (corner(images) + flipped) / 2
    assert torch.allclose(mirrored(corner, images), both)
    constant = torch.ones(2, 1, 5, 5)
    assert torch.allclose(mirrored_and_shifted(corner, constant), torch.ones(2, 2))
    padded = torch.nn.functional.pad(images, (1,) * 4, mode="reflect")
    moved = [mirrored(corner, padded[..., :5, :5]), mirrored(corner, padded[..., 2:, 2:])]
    expected = both / 2 + sum(moved) / 4
    assert torch.allclose(mirrored_and_shifted(corner, images), expected)


def test_only_the_unsure_are_looked_at_again() -> None:
    images = torch.zeros(4, 1, 5, 5)
    images[:, 0, 0, 0] = torch.tensor([5.0, 0.1, -4.0, 0.2])
    seen = []

    def views(call: object, some: Tensor) -> Tensor:
        seen.append(len(some))
        return torch.full((len(some), 2), 9.0)

    answer = for_the_unsure(corner, images, views, share=0.5)
    assert seen == [2]
    assert (answer[[1, 3]] == 9).all()
    assert torch.equal(answer[[0, 2]], corner(images)[[0, 2]])


def test_called_in_gives_fp32() -> None:
    model = nn.Conv2d(1, 2, 3)
    images = torch.randn(1, 1, 4, 4)
    assert called_in(model, bf16=True)(images).dtype is torch.float32
    assert torch.equal(called_in(model, bf16=False)(images), model(images))


def test_triangle() -> None:
    assert triangle(0.0) == pytest.approx(0.2)
    assert triangle(0.23) == pytest.approx(1.0)
    assert triangle(1.0) == pytest.approx(0.07)
    assert triangle(0.0, peak=0.0) == 1.0
