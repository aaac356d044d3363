"""What a loss is asked: labels it ignores, mean or sum, the axis of classes; rates by pattern."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.checks import check_samples
from suanli.training.judging import judge
from suanli.training.losses import class_axis, ignores, is_mean
from suanli.training.recipe import Recipe
from suanli.training.schedules import apart, factors
from suanli.training.start import freeze, frozen_norms
from suanli.training.step import Stepper
from suanli.workloads.record import Samples
from suanli.workloads.stream import Stream
from tests.train_parts import make_model, recipe, samples

VOID = 255
cross_entropy = functional.cross_entropy


def _void(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output, labels, ignore_index=VOID)


def _masks(count: int, value: int) -> Samples:
    """Pictures [N, 1, 4, 5]; each pixel's class is its sign, and a few are ignored."""
    torch.manual_seed(3)
    pictures = torch.randn(count, 1, 4, 5)
    labels = (pictures[:, 0] > 0).long()
    for row in range(count):
        labels[row, 0, : row % 4] = value
    return Samples(inputs=(pictures,), labels=labels)


def _segmenter(right: bool = True) -> nn.Module:
    model = nn.Conv2d(1, 2, 1)
    sign = 1.0 if right else -1.0
    with torch.no_grad():
        model.weight.copy_(sign * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
        model.bias.zero_()  # type: ignore[union-attr]
    return model


def _with(loss: Any) -> Recipe:
    made = recipe(augmentation=())
    return replace(made, workload=replace(made.workload, loss=loss))


@pytest.mark.parametrize(("loss", "value"), [(cross_entropy, -100), (_void, VOID)])
def test_labels_that_the_loss_ignores_are_taken_and_do_not_count(loss: Any, value: int) -> None:
    data = _masks(12, value)
    check_samples(_segmenter(), _with(loss), data)
    assert judge(_segmenter(), data, loss=loss) == 1.0
    assert judge(_segmenter(right=False), data, loss=loss) == 0.0


@pytest.mark.parametrize(("loss", "value"), [(cross_entropy, VOID), (_void, -100)])
def test_labels_that_it_does_not_ignore_are_refused(loss: Any, value: int) -> None:
    with pytest.raises(BadInputError, match=rf"label {value} of number 1 of the training samples"):
        check_samples(_segmenter(), _with(loss), _masks(12, value))
    mixed = _masks(12, -100)
    assert mixed.labels is not None
    mixed.labels[7, 3, 3] = 9
    with pytest.raises(BadInputError, match="label 9 of number 7"):
        check_samples(_segmenter(), _with(cross_entropy), mixed)


def test_a_data_set_may_ignore_labels_further_on() -> None:
    data = _masks(40, VOID)
    assert data.labels is not None
    data.labels[:20] = (data.inputs[0][:20, 0] > 0).long()

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, row: int) -> Any:
            assert data.labels is not None
            return data.inputs[0][row], data.labels[row]

    checked = check_samples(_segmenter(), _with(_void), Stream(Rows()))
    assert isinstance(checked, Stream)
    assert (checked.classes, checked.ignored) == (2, VOID)
    assert judge(_segmenter(), checked, loss=_void) == 1.0
    strict = check_samples(_segmenter(), _with(cross_entropy), Stream(Rows()))
    with pytest.raises(BadInputError, match="label 255 of sample 21"):
        judge(_segmenter(), strict, loss=cross_entropy)


def test_whether_a_loss_ignores_is_found_by_its_gradient() -> None:
    output, labels = torch.randn(2, 3), torch.tensor([1, 2])
    assert ignores(cross_entropy, output, labels, -100)
    assert not ignores(cross_entropy, output, labels, -1)
    assert not ignores(lambda o, t: o.square().mean(), output, labels, -100)
    assert not ignores(lambda o, t: 0.0 * o.sum(), output, labels, -100)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_parts_of_a_batch_count_for_their_labels(size: int) -> None:
    """Also where all of a part's labels are ignored, whose mean would be no number."""
    data = _masks(12, -100)
    assert data.labels is not None
    data.labels[:2] = -100
    made = _with(cross_entropy)
    found = []
    for plan in (TrainPlan(), TrainPlan(micro_batch=size)):
        stepper = Stepper(_segmenter(right=False), made, plan)
        loss = stepper.gradients(data.inputs, data.labels)
        found.append((float(loss), [p.grad for p in stepper.model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)


def test_where_both_axes_fit_the_loss_tells_which_it_is() -> None:
    labels = torch.randint(0, 4, (2, 4, 4))
    square = torch.zeros(2, 4, 4, 4)
    assert class_axis(square, labels) == 1
    assert class_axis(square, labels, cross_entropy) == 1
    assert class_axis(square, labels, lambda o, t: cross_entropy(o.movedim(-1, 1), t)) == -1
    words = torch.zeros(2, 4, 4), torch.randint(0, 4, (2, 4))
    assert class_axis(*words) == -1
    assert class_axis(*words, cross_entropy) == 1
    flat = class_axis(*words, lambda o, t: cross_entropy(o.flatten(0, 1), t.flatten()))
    assert flat == -1


def test_the_loss_as_a_metric_does_not_depend_on_pieces() -> None:
    made = samples(600, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    data = replace(made, labels=made.inputs[0].mean(dim=(1, 2, 3)).unsqueeze(1))

    def summed(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(output, labels, reduction="sum")

    wanted = judge(model, data, loss=functional.mse_loss)
    for batch in (64, 100, 256):
        assert judge(model, data, loss=functional.mse_loss, batch=batch) == pytest.approx(wanted)
        assert judge(model, data, loss=summed, batch=batch) == pytest.approx(wanted)
    output, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert is_mean(cross_entropy, output, labels)
    with pytest.raises(BadInputError, match="neither"):
        is_mean(lambda o, t: o.sum().square(), output, labels)


def test_rates_by_pattern() -> None:
    made = recipe(lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", augmentation=())
    own = replace(made, settings=replace(made.settings, lr_of=("head.*=10", "*.bias=0.5")))
    data = samples(32, 1)
    assert data.labels is not None
    moved = []
    for one in (made, own):
        model = make_model()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        stepper = Stepper(model, one, TrainPlan())
        torch.manual_seed(0)  # of dropout
        stepper(data.inputs, data.labels, 0.0)
        moved.append({n: p.detach() - start[n] for n, p in model.named_parameters()})
    wanted = {"body.0.weight": 1, "body.0.bias": 0.5, "body.1.weight": 1, "body.1.bias": 0.5}
    for name, factor in {**wanted, "head.weight": 10, "head.bias": 10}.items():
        torch.testing.assert_close(moved[1][name], factor * moved[0][name], rtol=1e-3, atol=1e-6)
    assert stepper.own_rates == (
        "2 tensors that match head.* learn at 10 times the rate: head.weight, head.bias",
        "2 tensors that match *.bias learn at 0.5 times the rate: body.0.bias, body.1.bias",
    )


def test_rates_by_pattern_in_an_optimiser_of_groups() -> None:
    model = make_model()
    groups = [
        {"params": list(model.body.parameters()), "name": "body", "momentum": 0.5},  # type: ignore[union-attr]
        {"params": list(model.head.parameters()), "lr": 3.0},  # type: ignore[union-attr]
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    apart(optimizer, model, ("*.weight=2",))
    found = [
        (g.get("name"), g["lr"], g["momentum"], len(g["params"])) for g in optimizer.param_groups
    ]
    assert found == [
        ("body", 1.0, 0.5, 2),
        (None, 3.0, 0, 1),
        ("body", 2.0, 0.5, 2),
        (None, 6.0, 0, 1),
    ]
    all_ = torch.optim.SGD(model.parameters(), lr=1.0)
    apart(all_, model, ("*=4",))
    assert [g["lr"] for g in all_.param_groups] == [4.0]


def test_rates_that_make_no_sense() -> None:
    assert factors({"head.*": 10, "a=b": 0.1}) == ("head.*=10", "a=b=0.1")
    assert factors(("head.*=1e1",)) == ("head.*=10",)
    for given, words in (
        (("head.*",), "needs a factor above 0"),
        (("head.*=fast",), "takes PATTERN=FACTOR"),
        (("=3",), "needs a factor"),
        ({"head.*": 0}, "--freeze"),
        ({"head.*": float("inf")}, "above 0"),
    ):
        with pytest.raises(BadInputError, match=words):
            factors(given)  # type: ignore[arg-type]


def test_batch_norms_of_a_frozen_part_are_counted() -> None:
    model = make_model()
    assert frozen_norms(model) == 0
    freeze(model, ("body.0.*",))
    assert frozen_norms(model) == 0
    freeze(model, ("body.*",))
    assert frozen_norms(model) == 1


def test_a_mean_that_weighs_classes_is_not_split() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 1.0]))
    made = recipe()
    made = replace(made, workload=replace(made.workload, loss=weighted))
    stepper = Stepper(make_model(), made, TrainPlan(micro_batch=8))
    some = samples(32, 1)
    assert some.labels is not None
    with pytest.raises(BadInputError, match="weighs its samples"):
        stepper.gradients(some.inputs, some.labels)
