"""Models and settings that people really have: frozen parts, own chance, overwritten inputs."""

import copy
import random
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.nn.functional import dropout as imported_by_name

import suanli
from suanli.base import codec
from suanli.base.errors import BadInputError, MissingBackendError, SuanliError
from suanli.base.train_plan import TrainPlan
from suanli.training import attention, trainer
from suanli.training.batches import Batches
from suanli.training.calls import Run
from suanli.training.chance import dropout_off, generators, set_generators
from suanli.training.checks import checked_settings
from suanli.training.forward import Forward
from suanli.training.loop import Loop
from suanli.training.recipe import Recipe, as_written
from suanli.training.start import starting_point
from suanli.training.step import Stepper
from suanli.training.verify import Trace, compare, eager_plan, record, reference_trace
from suanli.workloads.builtins import builtin, builtin_names
from suanli.workloads.given import as_samples
from suanli.workloads.record import Data, Inputs, Samples, TrainingSettings, Workload
from suanli.workloads.seeding import seeded
from tests.train_parts import new_loop, state_of

_LOSS = functional.cross_entropy


def _samples(count: int, seed: int) -> Samples:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=draw)
    return Samples(inputs=(x,), labels=(x[:, 0] > 0).long())


class Chancy(nn.Module):
    """Leaves layers out by Python's and numpy's chance, and drops by functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and random.random() < 0.5:
            x = x + self.first(x)
        if self.training and np.random.rand() < 0.5:
            x = x + self.second(x)
        x = functional.dropout(x, 0.5, self.training)
        return self.head(imported_by_name(x, 0.5, self.training))


class Overwriting(nn.Module):
    """Scales its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.sub_(1.0).mul_(3.0))


def _recipe(make: Any, **changes: Any) -> Recipe:
    def made() -> nn.Module:
        with seeded():
            return make().eval()

    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "batch": 16, "epochs": 3}
    return as_written(
        Workload(
            name="odd",
            make_model=made,
            make_inputs=lambda batch: Inputs(args=(torch.zeros(batch, 8),)),
            data=lambda: Data(
                train=_samples(96, 1), search=_samples(32, 2), acceptance=_samples(32, 3)
            ),
            loss=_LOSS,
            training=TrainingSettings(**(settings | changes)),
        )
    )


def _trained(model: nn.Module, out: Path, samples: Samples | None = None, **options: Any) -> Run:
    data = samples or _samples(120, 1)
    options = {"plan": "default", "batch": 16, "epochs": 2, "lr": 0.1} | options
    return suanli.train(model, (*data.inputs, data.labels), _LOSS, out=out, **options)


# -- what a model does not train --------------------------------------------------------------


def test_parameters_that_the_model_does_not_train_stay_as_they_are(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    run = _trained(model, tmp_path / "run")
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])
    assert "72 parameters are not trained" in run.result.notes


def test_a_parameter_of_integers_is_no_obstacle(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 2))
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)  # type: ignore[assignment]
    assert _trained(model, tmp_path / "run").result.steps > 0


def test_a_workload_whose_weights_are_kept_for_inference_is_trained_as_a_whole() -> None:
    made = _recipe(lambda: nn.Sequential(nn.Linear(8, 2)).requires_grad_(False))
    model = starting_point(made, _samples(96, 1), 0)
    assert all(p.requires_grad for p in model.parameters())


def test_hooks_on_gradients_are_called_or_the_plan_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].weight.register_hook(torch.zeros_like)
    before = copy.deepcopy(model.state_dict())
    _trained(model, tmp_path / "run")
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[0].bias, before["0.bias"])
    for plan in (
        TrainPlan(compile="default", compile_scope="joint"),
        TrainPlan(precision="bf16", weights="bf16"),
    ):
        with pytest.raises(BadInputError, match=r"0.weight has a hook on its gradient"):
            Forward(model, _LOSS, plan)
    model[0].weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(BadInputError, match="once its gradient is there"):
        _trained(model, tmp_path / "again")


def test_a_buffer_that_forward_replaces_is_no_twin_s() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count = self.count + 1
            return self.head(x)

    low = Forward(Counting(), _LOSS, TrainPlan(precision="bf16", weights="bf16"))
    batch = (torch.randn(4, 8),), torch.zeros(4, dtype=torch.long)
    with pytest.raises(BadInputError, match="the place of the buffer count"):
        low.gradients(*batch)
    model = Counting()
    Forward(model, _LOSS, TrainPlan()).gradients(*batch)
    assert float(model.count) == 1.0


# -- chance -----------------------------------------------------------------------------------


def test_the_seed_decides_what_python_and_numpy_draw_and_the_callers_stay(tmp_path: Path) -> None:
    first, second = Chancy(), Chancy()
    second.load_state_dict(first.state_dict())
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    _trained(first, tmp_path / "first")
    assert (random.random(), np.random.rand()) == expected
    _trained(second, tmp_path / "second")
    assert torch.equal(first.head.weight, second.head.weight)
    assert torch.equal(first.first.weight, second.first.weight)


def test_half_and_resumed_is_the_whole_with_chance_of_python_and_numpy() -> None:
    made, train = _recipe(Chancy), _samples(96, 1)
    whole = new_loop(made, steps=12, train=train)
    whole.run()
    half = new_loop(made, steps=6, train=train)
    half.run()
    again: Loop = new_loop(made, steps=12, train=train)
    random.seed(99)  # whatever the process drew in the meantime
    np.random.seed(99)
    again.restore(half.state())
    again.run()
    expected, found = state_of(whole), state_of(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_states_of_generators_go_through_and_older_ones_are_taken() -> None:
    before = generators("cpu")
    drawn = [torch.rand(2).tolist(), random.gauss(0, 1), float(np.random.standard_normal())]
    set_generators(before, "cpu")
    assert drawn == [torch.rand(2).tolist(), random.gauss(0, 1), float(np.random.standard_normal())]
    set_generators(before[:2], "cpu")  # as checkpoints had them once
    assert drawn[0] == torch.rand(2).tolist()


def _traces(made: Recipe, plan: TrainPlan) -> tuple[Trace, Trace, list[Trace]]:
    """The plan's trace, the reference and two of eager; the batches are the same ones for all."""
    train = _samples(96, 1)
    source = Batches(train, made, eager_plan("cpu", "fp32"), 0)
    batches = [source.next() for _ in range(3)]
    probe = (train.inputs[0][:32],)

    def fresh() -> nn.Module:
        return starting_point(made, train, 0)

    reference, note = reference_trace(fresh(), made, batches, 18, probe)
    assert not note
    plain = eager_plan("cpu", "fp32")
    eager = [record(Stepper(fresh(), made, plain), batches, 18, probe) for _ in range(2)]
    return record(Stepper(fresh(), made, plan), batches, 18, probe), reference, eager


@pytest.mark.parametrize("make", [Chancy, Overwriting])
def test_plans_are_compared_in_spite_of_chance_and_of_a_changed_input(make: Any) -> None:
    made = _recipe(make)
    trace, reference, eager = _traces(made, TrainPlan(optimizer_kernel="fused"))
    assert compare(trace, reference, eager, "fp32").ok
    assert torch.equal(eager[0]["output"], eager[1]["output"])


class Dropping(nn.Module):
    """Drops in every way that torch knows."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.own = share, partial(functional.dropout, p=share)
        self.layers = nn.ModuleList(
            [nn.Dropout(share), nn.AlphaDropout(share), nn.FeatureAlphaDropout(share)]
        )
        self.planes = nn.ModuleList([nn.Dropout1d(share), nn.Dropout2d(share), nn.Dropout3d(share)])
        self.attend = nn.MultiheadAttention(8, 2, dropout=share, batch_first=True)
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, dropout=share, batch_first=True)
        self.walk = nn.LSTM(8, 8, num_layers=2, dropout=share, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        for rank, layer in enumerate(self.planes, start=1):
            x = layer(x[(None,) * (rank - 1)]).reshape(x.shape)
        x = torch.dropout(self.own(imported_by_name(x, self.share)), self.share, True)
        x = functional.dropout(x + 0.0, self.share, inplace=True)
        x = functional.scaled_dot_product_attention(x, x, x, None, self.share)
        x = functional.scaled_dot_product_attention(x, x, x, dropout_p=self.share)
        x = self.encode(self.attend(x, x, x)[0] + self.attend(x, x, x, need_weights=False)[0])
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        return self.walk(x)[0].sum() + self.walk(packed)[0].data.sum()


def test_dropout_is_off_by_whatever_name_it_is_called() -> None:
    with seeded():
        model = Dropping(0.5)
    without = Dropping(0.0)
    without.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 8)
    with dropout_off():
        off = model(x)
    assert torch.equal(off, without(x))
    assert not torch.equal(model(x), model(x))


def test_a_compiled_model_is_traced_whole_without_dropout() -> None:
    def drop(x: torch.Tensor) -> torch.Tensor:
        x = imported_by_name(x * 2.0, 0.5)
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    counter = CompileCounter()
    compiled = torch.compile(drop, backend=counter, fullgraph=True)
    x = torch.randn(1, 2, 4, 8)
    doubled = 2.0 * x
    with dropout_off():
        off = compiled(x)
    torch.testing.assert_close(
        off, functional.scaled_dot_product_attention(doubled, doubled, doubled)
    )
    assert counter.frame_count == 1
    assert not torch.equal(compiled(x), compiled(x))  # and what is made outside drops again
    assert counter.frame_count == 2


def test_attention_that_drops_is_checked_as_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel leaves attention with dropout to torch, in a check as well."""
    x = torch.randn(1, 2, 16, 8)
    seen: list[float] = []

    def attended(*args: Any, **kwargs: Any) -> None:
        seen.append(kwargs.get("dropout_p", 0.0))

    monkeypatch.setattr(attention, "_attended", attended)
    plain = functional.scaled_dot_product_attention(x, x, x)
    with dropout_off(), attention._Products():
        found = functional.scaled_dot_product_attention(x, x, x, dropout_p=0.9)
    assert seen == [0.9]
    torch.testing.assert_close(found, plain)


# -- the owner's data and work ----------------------------------------------------------------


def test_a_forward_that_overwrites_its_input_leaves_the_owners_samples(tmp_path: Path) -> None:
    data = _samples(120, 1)
    kept = data.inputs[0].clone()
    for plan in (TrainPlan(), TrainPlan(micro_batch=8)):
        out = tmp_path / f"run-{plan.micro_batch}"
        suanli.train(
            Overwriting(),
            (*data.inputs, data.labels),
            _LOSS,
            plan=plan,
            batch=16,
            epochs=1,
            out=out,
        )
        assert torch.equal(data.inputs[0], kept)


def test_a_full_disk_at_the_end_does_not_take_the_trained_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_weights", full)
    model = nn.Sequential(nn.Linear(8, 2))
    before = model[0].weight.detach().clone()
    run = _trained(model, tmp_path / "run")
    assert not torch.equal(model[0].weight, before)
    assert any("not kept on disk: No space left" in line for line in run.result.notes)
    made = _recipe(lambda: nn.Linear(8, 2))
    named = replace(made, ref="file.py:name")
    with pytest.raises(SuanliError, match=r"cannot be written to .*named: No space left"):
        suanli.train(named, plan="default", out=tmp_path / "named")


# -- before the first step ----------------------------------------------------------------------


def test_an_epoch_that_ends_with_one_sample_is_refused_where_batch_norm_cannot(
    tmp_path: Path,
) -> None:
    def normed(kind: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 2))

    norm, no_norm = (lambda: nn.BatchNorm1d(8)), nn.ReLU
    with pytest.raises(BadInputError, match="last batch of an epoch, which is one sample"):
        _trained(normed(norm), tmp_path / "one", batch=19)  # 96 samples, 5 times 19 and 1
    assert not (tmp_path / "one").exists()
    assert _trained(normed(norm), tmp_path / "two", batch=32).result.steps == 6
    assert _trained(normed(no_norm), tmp_path / "three", batch=19).result.steps == 12


def test_a_loss_with_parameters_is_refused(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return _LOSS(self.scale * output, labels)

    data, model, loss = _samples(120, 1), nn.Linear(8, 2), Scaled()
    given = (*data.inputs, data.labels)
    with pytest.raises(BadInputError, match="parameters of its own"):
        suanli.train(model, given, loss, plan="default", out=tmp_path / "run")
    loss.requires_grad_(False)
    assert suanli.train(model, given, loss, plan="default", epochs=1, out=tmp_path / "run")


def _no_tensor() -> nn.Module:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"k": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    return Extra(8, 2)


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (_no_tensor, {}, "_extra_state is a dict: a run keeps tensors only"),
        (lambda: nn.Linear(8, 2).bfloat16(), {}, "weight is bfloat16, a run trains fp32"),
        (lambda: nn.Linear(8, 2, dtype=torch.complex64), {}, "weight is complex64"),
        (lambda: nn.Linear(8, 2).requires_grad_(False), {}, "no parameter of the model is trained"),
        (lambda: nn.Linear(8, 2), {"augmentation": ("flip",)}, "flip is for images"),
        (lambda: nn.Linear(8, 2), {"plan": None}, "a plan cannot be a NoneType"),
    ],
)
def test_what_a_run_cannot_do_is_said_before_the_first_step(
    make: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInputError) as caught:
        _trained(make(), tmp_path / "run", **changes)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_detached_is_one_line(tmp_path: Path) -> None:
    def detached(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _LOSS(output, labels).detach()

    with pytest.raises(BadInputError, match="does not follow from the trained parameters"):
        Forward(nn.Linear(8, 2), detached, TrainPlan()).gradients(
            (torch.randn(4, 8),), torch.zeros(4, dtype=torch.long)
        )


def test_samples_that_want_gradients_are_samples(tmp_path: Path) -> None:
    data = _samples(120, 1)
    wanting = Samples(inputs=(data.inputs[0].clone().requires_grad_(),), labels=data.labels)
    assert _trained(nn.Linear(8, 2), tmp_path / "run", wanting).result.steps > 0
    assert not as_samples(wanting).inputs[0].requires_grad
    assert wanting.inputs[0].grad is None


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"batch": 2.5}, "at batch"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"lr": float("nan")}, "at lr"),
        ({"betas": (2.0, 0.9)}, "betas must lie between 0 and 1"),
        ({"betas": 0.9}, "at betas"),
        ({"momentum": -0.1}, "momentum must be at least 0"),
        ({"schedule": "nope"}, "at schedule"),
        ({"augmentation": "flip"}, "at augmentation"),
        ({"validation_split": 1.0}, "validation_split must be under 1"),
        ({"optimizer": torch.optim.SGD}, "has no place in a record"),
        ({"nesterov": True}, "nesterov needs a momentum"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError) as caught:
        checked_settings(TrainingSettings(**changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_the_built_in_workloads_are_of_their_types_already() -> None:
    found = []
    for name in builtin_names():
        with suppress(MissingBackendError):  # an optional package
            found.append(builtin(name, None).training)
    assert len(found) > 10
    for settings in filter(None, found):  # trained weights are found by them
        assert codec.dumps(checked_settings(settings)) == codec.dumps(settings)


def test_settings_get_their_own_types_and_a_run_looks_at_them(tmp_path: Path) -> None:
    assert checked_settings(TrainingSettings(lr="0.5", batch=32.0)).lr == 0.5  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="batch must be at least 1"):
        _trained(nn.Linear(8, 2), tmp_path / "run", batch=0)
    with pytest.raises(BadInputError, match="--seed must be below"):
        _trained(nn.Linear(8, 2), tmp_path / "run", seed=1 << 70)
    assert not (tmp_path / "run").exists()
