"""Rows of the kernel table for norms and losses: they train what the model trains, or refuse."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from suanli.base.errors import BadInputError
from suanli.base.lazy import present
from suanli.base.train_plan import TrainPlan
from suanli.plans.situation import Situation
from suanli.plans.train_space import TrainSituation, train_candidates
from suanli.training import fused_loss, kernels, triton_rows
from suanli.training.forward import Forward
from suanli.training.fused_loss import sliced
from suanli.training.kernels import put_in_place, rows_for, usable
from suanli.training.loss_forms import cross_entropy_form
from suanli.training.recipe import Recipe, as_written
from suanli.training.triton_rows import FusedNorm
from suanli.workloads.record import Data, Inputs, Samples, TrainingSettings, Workload
from suanli.workloads.seeding import seeded
from tests.train_parts import Bench

WORDS, WIDTH, LENGTH = 50, 24, 5


class Words(nn.Module):
    """[B, T] -> [B, T, WORDS], with both kinds of norms and a weight that is used twice."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        x = x + functional.silu(self.middle(self.first(x)))
        found: torch.Tensor = self.head(self.second(x))
        return found


class Capped(Words):
    """Does something with the last layer's output."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(words))


def next_word(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def _made(kind: type[Words]) -> nn.Module:
    with seeded():
        return kind().eval()


def _samples(count: int, seed: int) -> Samples:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (count, LENGTH + 1), generator=draw)
    return Samples(inputs=(words[:, :-1].contiguous(),), labels=words[:, 1:].contiguous())


def words_recipe() -> Recipe:
    workload = Workload(
        name="words",
        make_model=partial(_made, Words),
        make_inputs=lambda batch: Inputs(args=(torch.zeros(batch, LENGTH, dtype=torch.int64),)),
        data=lambda: Data(train=_samples(64, 1), search=_samples(8, 2), acceptance=_samples(8, 3)),
        loss=next_word,
        training=TrainingSettings(optimizer="adamw", lr=1e-3, batch=16, epochs=2),
    )
    return as_written(workload)


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Bench(tmp_path_factory.mktemp("words"), words_recipe(), total_steps=8).check


ROWS = ("fused-norm", "fused-cross-entropy", "fused-linear-cross-entropy", "fused-loss")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"micro_batch": 8}], ids=str)
def test_rows_learn_what_the_model_learns(row: str, changes: dict[str, Any], check: Any) -> None:
    found = check(TrainPlan(kernels=(row,), **changes))
    assert found.ok, found.reason


def test_rows_go_together(check: Any) -> None:
    both = ("fused-norm", "fused-linear-cross-entropy")
    found = check(TrainPlan(kernels=both, precision="bf16"))
    assert found.ok, found.reason


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own, of the plain RMS norm
@pytest.mark.parametrize("row", ROWS)
def test_gradients_of_bf16_copies_come_to_the_masters(row: str) -> None:
    words, found = _samples(16, 1), list[dict[str, Any]]()
    for kernels_ in ((), (row,)):
        plan = TrainPlan(kernels=kernels_, precision="bf16", weights="bf16")
        model = _made(Words)
        forward = Forward(model, next_word, plan)
        assert words.labels is not None
        forward.gradients(words.inputs, words.labels)
        forward.collect()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, right in found[0].items():
        assert right is not None and right.dtype == torch.float32
        error = (found[1][name] - right).norm() / right.norm()
        assert float(error) < 0.03, name


def test_planted_faults_of_rows_are_caught(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weight(x: torch.Tensor, layer: nn.Linear, target: torch.Tensor, form: Any) -> Any:
        return functional.cross_entropy(functional.linear(x, layer.weight.detach()), target)

    monkeypatch.setattr(triton_rows, "_product", no_weight)
    found = check(TrainPlan(kernels=("fused-linear-cross-entropy",)))
    assert "step 1: gradient of" in found.reason
    assert "weight" in found.reason
    monkeypatch.setattr(FusedNorm, "forward", lambda self, x: functional.layer_norm(x, (WIDTH,)))
    assert not check(TrainPlan(kernels=("fused-norm",), precision="bf16")).ok


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "_SLICE_BYTES", 0)
    monkeypatch.setattr(fused_loss, "_LEAST_SLICE", 16)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_loss_by_slices_is_the_loss(bias: bool, smoothing: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 50, bias=bias).double()
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 50, (9,))
    target[2] = 7
    loss = partial(functional.cross_entropy, ignore_index=7, label_smoothing=smoothing)
    form = cross_entropy_form(loss)
    assert form is not None
    values = [x, *layer.parameters()]
    right, found = loss(layer(x), target), sliced(x, layer, target, form)
    torch.testing.assert_close(found, right)
    for one, other in zip(
        torch.autograd.grad(found, values), torch.autograd.grad(right, values), strict=True
    ):
        torch.testing.assert_close(one, other)
    target[3] = 50
    assert sliced(x, layer, target, form).isnan()


@pytest.mark.usefixtures("small_slices")
def test_slices_pass_and_a_slice_that_is_off_by_one_does_not(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("fp32", "bf16"):
        found = check(TrainPlan(kernels=("fused-loss",), precision=precision))
        assert found.ok, found.reason
    assert len(fused_loss._slices(torch.zeros(2, 3), torch.zeros(50, 3))) == 4
    real = fused_loss._place
    monkeypatch.setattr(fused_loss, "_place", lambda y, first, part: real(y, first + 1, part))
    assert not check(TrainPlan(kernels=("fused-loss",), precision="bf16")).ok


def test_a_twin_shares_tied_weights_and_leaves_the_model() -> None:
    model = _made(Words)
    plan = TrainPlan(kernels=("fused-norm", "fused-linear-cross-entropy"))
    twin, _ = put_in_place(model, next_word, plan)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert sum(isinstance(m, FusedNorm) for m in twin.modules()) == 2
    assert type(model.first) is nn.LayerNorm and isinstance(model.head, nn.Linear)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # Inductor's import
def test_what_stands_behind_the_last_layer_is_refused() -> None:
    words = _samples(4, 1)
    for compile_ in ("none", "default"):
        plan = TrainPlan(kernels=("fused-linear-cross-entropy",), compile=compile_)
        assert words.labels is not None
        with pytest.raises(BadInputError, match="not that of head"):
            Forward(_made(Capped), next_word, plan).gradients(words.inputs, words.labels)


def _shifted(output: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output[:, :-1].flatten(0, 1), words[:, 1:].flatten())


class _Square(nn.Module):
    def forward(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (output - labels).square().mean()


FORMS = [
    (functional.cross_entropy, (-100, 0.0, True)),
    (partial(functional.cross_entropy, label_smoothing=0.1), (-100, 0.1, True)),
    (nn.CrossEntropyLoss(ignore_index=3), (3, 0.0, True)),
    (next_word, (-100, 0.0, True)),
    (_shifted, (-100, 0.0, True)),
    (lambda o, y: functional.cross_entropy(o * 2, y), (-100, 0.0, False)),
    (lambda o, y: functional.cross_entropy(o.transpose(1, 2), y), (-100, 0.0, False)),
    (lambda o, y: functional.cross_entropy(o.view(-1, WORDS), y.view(-1)), (-100, 0.0, False)),
    (lambda o, y: functional.cross_entropy(o.clamp(-50, 50), y), (-100, 0.0, False)),
    (lambda o, y: functional.cross_entropy(o.relu(), y), (-100, 0.0, False)),
    (lambda o, y: functional.cross_entropy(o.double(), y), (-100, 0.0, False)),
    (lambda o, y: 2 * functional.cross_entropy(o, y), None),
    (lambda o, y: functional.cross_entropy(o, y) if o.sum() > 0 else o.sum(), None),
    (nn.CrossEntropyLoss(reduction="sum"), None),
    (nn.CrossEntropyLoss(weight=torch.ones(3)), None),
    (_Square(), None),
    (None, None),
]


@pytest.mark.parametrize(("loss", "expected"), FORMS, ids=[str(i) for i in range(len(FORMS))])
def test_forms_of_losses(loss: Any, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    form = cross_entropy_form(loss)
    found = form and (form.ignore_index, form.label_smoothing, form.takes_rows())
    assert found == expected
    assert capsys.readouterr().err == ""


def test_rows_refuse_what_they_do_not_fit() -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for row, loss, words in (
        ("fused-norm", next_word, "no layer norm"),
        ("fused-cross-entropy", functional.mse_loss, "torch's mean cross-entropy"),
        ("fused-linear-cross-entropy", functional.cross_entropy, "without bias"),
    ):
        with pytest.raises(BadInputError, match=words):
            put_in_place(dense, loss, TrainPlan(kernels=(row,)))
    smooth = partial(functional.cross_entropy, label_smoothing=0.1)
    for model, loss, words in (
        (_made(Words), smooth, "smoothing"),
        (_made(Words), functional.mse_loss, "mean cross-entropy of the outputs' rows"),
        (nn.ReLU(), next_word, "no last linear layer"),
    ):
        with pytest.raises(BadInputError, match=words):
            put_in_place(model, loss, TrainPlan(kernels=("fused-linear-cross-entropy",)))
    with pytest.raises(BadInputError, match="fused-norm"):
        put_in_place(dense, next_word, TrainPlan(kernels=("no-such",)))


def test_the_search_on_a_gpu_is_offered_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "present", lambda name: name == "triton")
    model, workload = _made(Words), words_recipe().workload
    assert set(rows_for(model, "cuda:0")) == {"fused-norm"}
    found = rows_for(model, "cuda:0", workload)
    assert set(found) == {"fused-norm", "fused-cross-entropy", "fused-norm,fused-cross-entropy"}
    monkeypatch.setattr(triton_rows, "_MANY_CLASSES", WORDS)
    found = rows_for(model, "cuda:0", workload)
    assert "fused-norm,fused-linear-cross-entropy" in found
    assert rows_for(model, "cpu", workload) == {}
    monkeypatch.setattr(fused_loss, "_MANY_CLASSES", WORDS)
    assert set(rows_for(model, "cpu", workload)) == {"fused-loss"}
    assert rows_for(model, "cpu") == {}
    other = replace(workload, loss=functional.mse_loss)
    assert set(rows_for(model, "cuda:0", other)) == {"fused-norm"}
    machine = Situation(
        device="cuda:0",
        cores=2,
        objective="throughput",
        batch=128,
        present=frozenset({"eager", "inductor", "native"}),
        capability="9.0",
    )
    situation = TrainSituation(machine=machine, images=False, kernels=found)
    plans = [TrainPlan.from_plan(c.plan) for c in train_candidates(situation, eager_ms=50.0)]
    offered = {(plan.kernels, plan.compile) for plan in plans if plan.kernels}
    for names in found:
        assert {(tuple(names.split(",")), mode) for mode in ("none", "default")} <= offered
    assert all(plan.precision == "bf16" for plan in plans if plan.kernels)
    monkeypatch.setattr(triton_rows, "present", lambda name: False)
    assert rows_for(model, "cuda:0", workload) == {}


def test_a_plan_keeps_rows_of_its_own_kind_of_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = TrainPlan(device="cuda:0", kernels=("fused-norm",))
    assert usable(gpu) == gpu
    assert usable(gpu.with_(device="cpu")).kernels == ()
    here = TrainPlan(kernels=("fused-loss",))
    monkeypatch.setattr(kernels, "present", lambda: False)
    assert usable(here) == here
    assert usable(TrainPlan(kernels=("fused-cnn",))).kernels == ()


# Through Triton's interpreter, which has to be chosen before Triton is imported.
_INTERPRETED = """
import torch
from suanli.base.train_plan import TrainPlan
from suanli.kernels import configuration
from suanli.kernels.operators import cross_entropy, linear_cross_entropy, norms
from suanli.training.forward import Forward
from tests.test_train_rows import Words, _made, _samples, next_word

found = {}
ran = []
real = configuration.choose
for module in (cross_entropy, linear_cross_entropy, norms):
    module.usable = lambda *given: True
    module.choose = lambda kernel, inputs, example: (
        ran.append(kernel.name) or kernel.default_for(kernel.sizes(inputs), "fp32")
    )
words = _samples(2, 1)
for rows in ((), ("fused-norm", "fused-cross-entropy"), ("fused-linear-cross-entropy",)):
    model = _made(Words)
    loss = Forward(model, next_word, TrainPlan(kernels=rows)).gradients(words.inputs, words.labels)
    found[rows] = {"loss": loss, **{n: p.grad for n, p in model.named_parameters()}}
plain = found.pop(())
for rows, values in found.items():
    for name, right in plain.items():
        torch.testing.assert_close(values[name], right, rtol=2e-4, atol=2e-6, msg=f"{rows} {name}")
print(sorted(set(ran)))
"""


@pytest.mark.skipif(not present("triton"), reason="Triton is not installed")
def test_the_triton_code_itself_learns_the_same() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("cross_entropy", "linear_cross_entropy", "norm"):
        assert f"'{name}'" in done.stdout
        assert f"'{name}_backward'" in done.stdout


def test_a_loss_with_other_targets_is_left_to_torch() -> None:
    model, scores = nn.Linear(4, 3), torch.randn(5, 4)
    shares = torch.softmax(torch.randn(5, 3), dim=1)
    plan = TrainPlan(kernels=("fused-cross-entropy",))
    expected = functional.cross_entropy(model(scores), shares)
    found = Forward(copy.deepcopy(model), functional.cross_entropy, plan).gradients(
        (scores,), shares
    )
    torch.testing.assert_close(found, expected.detach())
