"""Values: honest rounding passes, hidden shifts do not, and buffers are not trusted."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from suanli.measure import _bias
from suanli.measure.values import check_runner, compare, joined, tensors_of


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return functional.relu(x + self.norm(self.conv(x)))


class _Convolutional(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(_Block(16), nn.Conv2d(16, 32, 2, stride=2), _Block(32))
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _Perceptron(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.GELU(),
            nn.Linear(256, 256),
            nn.GELU(),
            nn.Linear(256, classes),
        )

    def forward(self, x):
        return self.layers(x)


class _Attentive(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.flatten(1).view(-1, 8, 8))).mean(1))


_NETWORKS = (_Perceptron, _Convolutional, _Attentive)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(digits.target)[order]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small run faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def perceptron():
    """A perceptron trained on digits: its inputs, float64 and bf16 eager answers."""
    torch.manual_seed(0)
    images, labels = _digits()
    model = _Perceptron(10)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(5):
        for start in range(0, 1000, 50):
            optimizer.zero_grad()
            logits = model(images[start : start + 50])
            functional.cross_entropy(logits, labels[start : start + 50]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    held = images[1000:1512]
    reference = copy.deepcopy(model).double()(held.double())
    assert (reference.argmax(1) == labels[1000:1512]).double().mean() > 0.9
    return model, held, reference, _eager16(model, held)


def _eager16(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(model).bfloat16()(inputs.bfloat16()).float()


def _rounded(model: nn.Module, inputs: torch.Tensor, dither: float, seed: int) -> torch.Tensor:
    """fp32 sums in another order (dither, relative), rounded to bf16 after every layer."""
    generator = torch.Generator().manual_seed(seed)

    def hook(_module, _inputs, output):
        shaken = output * (1 + dither * torch.randn(output.shape, generator=generator))
        return shaken.bfloat16().float()

    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for module in rounded.modules():
        if not list(module.children()):
            module.register_forward_hook(hook)
    return rounded(inputs.bfloat16().float())


def _honest(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(inputs).float()
    return {
        "fp32": model(inputs),
        "autocast": autocast,
        "rounded": _rounded(model, inputs, 0.0, 0),
        "other order": _rounded(model, inputs, 2**-10, 1),
    }


def test_the_same_values_pass_with_no_error_to_speak_of():
    reference = torch.randn(64, 10, dtype=torch.float64)
    eager = reference.float()
    found = compare([eager], [reference], [eager])
    assert found.ok
    assert found.k == 2.0
    assert found.batches == (64,)
    assert found.outputs[0].rms == found.outputs[0].eager_rms
    assert compare([reference], [reference], [reference]).outputs[0].rms_ratio == 0


def test_errors_are_what_they_say():
    reference = torch.zeros(100, 2, dtype=torch.float64)
    reference[:, 1] = 1.0
    eager, mine = reference.float(), reference.float()
    eager[0, 0] = 0.3
    mine[:4, 0] = 0.3
    error = compare([mine], [reference], [eager]).outputs[0]
    assert error.eager_rms == pytest.approx(math.sqrt(0.09 / 200))
    assert error.rms_ratio == pytest.approx(2)
    assert error.eager_max_abs == error.max_abs == pytest.approx(0.3)


@pytest.mark.parametrize("network", _NETWORKS)
def test_honest_bf16_passes_on_random_networks(network):
    """Every kind of honest rounding, 6 networks of 10 and 6 of 100 channels."""
    images, _ = _digits()
    for seed in range(12):
        torch.manual_seed(seed)
        model = network(10 if seed % 2 else 100).eval().requires_grad_(False)
        inputs = images[64 * seed : 64 * seed + 64]
        reference = copy.deepcopy(model).double()(inputs.double())
        eager = _eager16(model, inputs)
        for name, answer in _honest(model, inputs).items():
            found = compare([answer], [reference], [eager])
            assert found.ok, f"{name}, seed {seed}: {found.reason}"


def test_honest_fp32_passes_in_other_orders_and_layouts(perceptron):
    model, inputs, reference, _ = perceptron
    eager = model(inputs)
    one_by_one = torch.cat([model(inputs[i : i + 1]) for i in range(len(inputs))])
    assert compare([one_by_one], [reference], [eager]).ok
    torch.manual_seed(1)
    conv = _Convolutional(10).eval().requires_grad_(False)
    reference = copy.deepcopy(conv).double()(inputs.double())
    eager = conv(inputs)
    other = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    swapped = other(inputs.to(memory_format=torch.channels_last))
    assert compare([swapped], [reference], [eager]).ok


def test_bf16_does_not_pass_for_fp32(perceptron):
    model, inputs, reference, eager16 = perceptron
    found = compare([eager16], [reference], [model(inputs)])
    assert not found.ok
    assert "rms error" in found.reason


@pytest.mark.parametrize("n", [64, 512])
@pytest.mark.parametrize("kind", ["gain", "shift"])
def test_one_percent_on_one_class_is_found_beneath_the_rounding(perceptron, n, kind):
    """Planted on every class of every honest variant, and named."""
    model, inputs, reference, eager = perceptron
    reference, eager = reference[:n], eager[:n]
    for name, answer in (_honest(model, inputs[:n]) | {"eager": eager}).items():
        for wrong in range(10):
            planted = answer.clone()
            if kind == "gain":
                planted[:, wrong] *= 1.01
            else:
                planted[:, wrong] += 0.01 * reference[:, wrong].std()
            found = compare([planted], [reference], [eager])
            error = found.outputs[0]
            assert not found.ok, f"{name}, class {wrong}"
            assert max(error.bias_ratio, error.gain_ratio) > 2
            assert error.worst_channel == wrong


def test_a_hidden_shift_breaks_no_other_limit(perceptron):
    """What makes the test of single channels necessary: all the others pass."""
    _, _, reference, eager = perceptron
    hidden = 0
    for wrong in range(10):
        planted = eager.clone()
        planted[:, wrong] *= 1.01
        error = compare([planted], [reference], [eager]).outputs[0]
        hidden += error.rms_ratio < 2 and error.max_ratio < 2
    assert hidden >= 1


def test_one_percent_on_one_class_of_a_normalised_network_is_found():
    """bf16 batch norm makes eager itself biased; there the plant takes more samples to see."""
    torch.manual_seed(0)
    images, labels = _digits()
    model = _Convolutional(10)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for start in range(0, 1000, 50):
        optimizer.zero_grad()
        logits = model(images[start : start + 50])
        functional.cross_entropy(logits, labels[start : start + 50]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    inputs = images[1000:1512]
    reference = copy.deepcopy(model).double()(inputs.double())
    eager = _eager16(model, inputs)
    caught = tried = 0
    for answer in _honest(model, inputs).values():
        assert compare([answer], [reference], [eager]).ok
        for wrong in range(10):
            planted = answer.clone()
            planted[:, wrong] *= 1.01
            caught += not compare([planted], [reference], [eager]).ok
            tried += 1
    assert caught >= 0.8 * tried


def _synthetic(seed: int, scale: float, channels: int, n: int) -> list[torch.Tensor]:
    """A reference, and eager and a candidate with errors of one kind: bias, gain and noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference = normal(n, channels) + normal(channels)
    answers = [
        reference * (1 + 0.2 * scale * normal(channels))
        + 0.7 * scale * normal(channels)
        + scale * normal(n, channels) * (0.5 + reference.abs())
        for _ in range(2)
    ]
    return [reference, *answers]


@pytest.mark.parametrize(("channels", "n"), [(10, 64), (10, 1000), (200, 64)])
def test_the_rate_of_false_rejection_is_small(channels, n):
    """Candidates exactly as good as eager, with independent biases: about 2 %, see `ratios`."""
    rejected = 0
    for seed in range(200):
        reference, eager, mine = _synthetic(seed, 5e-3, channels, n)
        rejected += not compare([mine.float()], [reference], [eager.float()]).ok
    assert rejected <= 12


@pytest.mark.parametrize("shape", [(32, 6, 12, 12), (4, 6, 24, 24)])
def test_one_channel_of_an_image_is_found_on_dimension_one(shape):
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(shape, generator=generator, dtype=torch.float64)

    def noisy() -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (reference * (1 + 4e-3 * noise)).float()

    eager, honest, planted = noisy(), noisy(), noisy()
    planted[:, 4] *= 1.01
    assert compare([honest], [reference], [eager]).ok
    found = compare([planted], [reference], [eager])
    assert not found.ok
    assert found.outputs[0].worst_channel == 4
    assert found.outputs[0].rms_ratio < 2
    # As one heap of numbers the plant is thinner, and there is no channel to name.
    assert (
        compare([planted], [reference], [eager], channel_dims=[None]).outputs[0].worst_channel
        is None
    )


def test_one_channel_of_a_sequence_is_found_on_the_last_dimension():
    generator = torch.Generator().manual_seed(5)
    reference = torch.randn(2, 100, 12, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, *reference.shape, generator=generator, dtype=torch.float64)
    eager, planted = (reference * (1 + 3e-3 * part) for part in noise)
    planted[..., 7] += 0.01
    found = compare([planted.float()], [reference], [eager.float()], names=["logits"])
    assert not found.ok
    assert found.outputs[0].worst_channel == 7
    assert found.reason.startswith("logits: ")


def test_channels_in_blocks_give_the_same(monkeypatch):
    reference, eager, mine = _synthetic(1, 1e-2, 37, 50)
    whole = compare([mine], [reference], [eager])
    monkeypatch.setattr(_bias, "_BLOCK_ELEMENTS", 200)
    assert compare([mine], [reference], [eager]).outputs[0].bias_ratio == pytest.approx(
        whole.outputs[0].bias_ratio
    )


def test_moments_agree_with_formulas_written_out():
    reference, mine, _ = _synthetic(2, 1e-2, 3, 40)
    found = _bias.moments(_bias.arranged(mine, 1), _bias.arranged(reference, 1))
    for c in range(3):
        r, e = reference[:, c], (mine - reference)[:, c]
        design = torch.stack([torch.ones(40, dtype=torch.float64), r - r.mean()], dim=1)
        solution = torch.linalg.lstsq(design, e[:, None]).solution[:, 0]
        assert found.bias[c] == pytest.approx(float(solution[0]))
        assert found.gain[c] == pytest.approx(float(solution[1]))
        residual = e - design @ solution
        inverse = torch.linalg.inv(design.T @ design)
        leverage = (design @ inverse * design).sum(dim=1)
        middle = design.T @ torch.diag((residual / (1 - leverage)) ** 2) @ design
        assert found.gain_se[c] == pytest.approx(float((inverse @ middle @ inverse)[1, 1].sqrt()))
        assert found.bias_se[c] == pytest.approx(float(e.std() / math.sqrt(40)))


def test_few_rows_get_no_test_of_bias():
    reference = torch.randn(4, 10, dtype=torch.float64)
    eager = (reference * 1.001).float()
    error = compare([eager], [reference], [eager]).outputs[0]
    assert (error.bias_ratio, error.gain_ratio, error.worst_channel) == (0.0, 0.0, None)


def test_an_exact_eager_does_not_fail_what_is_within_four_ulps():
    reference = torch.randn(256, 8, dtype=torch.float64).float().double()
    eager = reference.float()
    epsilon = torch.finfo(torch.float32).eps
    signs = torch.randn(256, 8, dtype=torch.float64).sign()
    near = (reference + signs * 2 * epsilon).float()
    far = (reference + signs * 30 * epsilon).float()
    assert compare([near], [reference], [eager]).ok
    assert not compare([far], [reference], [eager]).ok


def test_one_wild_element_is_found():
    reference = torch.randn(1000, 50, dtype=torch.float64)
    noise = torch.randn(1000, 50, dtype=torch.float64)
    eager = (reference + 1e-2 * noise).float()
    wild = eager.clone()
    wild[500, 20] += 0.2
    found = compare([wild], [reference], [eager])
    assert found.outputs[0].rms_ratio < 1.1
    assert not found.ok
    assert "largest error" in found.reason


def test_constant_channels_do_not_break_the_test():
    reference = torch.randn(64, 4, dtype=torch.float64)
    reference[:, 1] = 3.0
    reference[:, 2] = 0.0
    noise = 1e-3 * torch.randn(64, 4, dtype=torch.float64)
    eager = (reference + noise).float()
    eager[:, 2] = 0
    assert compare([eager], [reference], [eager]).ok
    all_constant = torch.full((64, 4), 2.0, dtype=torch.float64)
    assert compare([all_constant.float()], [all_constant], [all_constant.float()]).ok
    assert not compare([all_constant.float() * 1.1], [all_constant], [all_constant.float()]).ok
    zeros = torch.zeros(64, 4)
    assert compare([zeros], [zeros.double()], [zeros]).ok
    assert not compare([zeros + 1e-30], [zeros.double()], [zeros]).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_pass(bad):
    reference = torch.randn(64, 10, dtype=torch.float64)
    eager = reference.float()
    broken = eager.clone()
    broken[3, 3] = bad
    found = compare([broken], [reference], [eager], k=1e30)
    assert not found.ok
    assert "the plan gives" in found.reason
    found = compare([eager], [broken.double()], [eager])
    assert not found.ok


def test_infinities_of_the_reference_itself_must_be_met():
    reference = torch.randn(64, 10, dtype=torch.float64)
    reference[:, 0] = -math.inf
    eager = reference.float()
    assert compare([eager], [reference], [eager]).ok
    other = eager.clone()
    other[5, 0] = math.inf
    assert not compare([other], [reference], [eager]).ok
    other[5, 0] = -1e9
    assert not compare([other], [reference], [eager]).ok


def test_what_does_not_fit_never_passes():
    reference = torch.randn(8, 4, dtype=torch.float64)
    eager = reference.float()
    assert "shape" in compare([eager[:, :3]], [reference], [eager]).reason
    assert "shape" in compare([eager[:1]], [reference], [eager]).reason
    assert "dtype" in compare([eager.bfloat16()], [reference], [eager]).reason
    assert "dtype" in compare([eager.long()], [reference], [eager.long()]).reason
    assert "outputs" in compare([eager, eager], [reference], [eager]).reason
    assert "outputs" in compare([], [reference], [eager]).reason


def test_integers_may_differ_as_often_as_eager_times_k():
    reference = torch.arange(100)
    eager, mine = reference.clone(), reference.clone()
    assert compare([mine], [reference], [eager]).ok
    mine[:2] = 99
    assert not compare([mine], [reference], [eager]).ok
    eager[50] = 0
    assert compare([mine], [reference], [eager]).ok
    mine[2] = 99
    assert not compare([mine], [reference], [eager]).ok
    flags = reference > 50
    assert compare([flags], [flags], [flags]).ok
    assert not compare([~flags], [flags], [flags]).ok


def test_odd_kinds_of_outputs():
    scalar = torch.tensor(1.5, dtype=torch.float64)
    assert compare([scalar.float()], [scalar], [scalar.float()]).ok
    assert not compare([scalar.float() * 1.1], [scalar], [scalar.float()]).ok
    waves = torch.randn(32, 5, dtype=torch.complex128)
    assert compare([waves.to(torch.complex64)], [waves], [waves.to(torch.complex64)]).ok
    turned = waves.to(torch.complex64) * 1j
    assert not compare([turned], [waves], [waves.to(torch.complex64)]).ok
    empty = torch.zeros(0, 4)
    assert compare([empty], [empty.double()], [empty]).ok
    half = torch.randn(64, 3, dtype=torch.float64)
    assert compare([half.bfloat16()], [half], [half.bfloat16()]).ok


def test_k_is_the_callers():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 10, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 10, generator=generator, dtype=torch.float64)
    eager, mine = (reference + 1e-2 * noise).float(), (reference + 1.5e-2 * noise.flip(0)).float()
    assert compare([mine], [reference], [eager]).ok
    assert not compare([mine], [reference], [eager], k=1.2).ok
    assert compare([mine], [reference], [eager], k=1.2).k == 1.2


def test_tensors_of_any_nesting():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in tensors_of({"x": a, "y": [b, (c, None)]})] == [1, 2, 3]
    assert tensors_of(a)[0] is a
    assert tensors_of(None) == []


def test_joining_along_the_samples():
    found = joined([[torch.ones(2, 3), torch.tensor(1.0)], [torch.ones(4, 3), torch.tensor(2.0)]])
    assert found[0].shape == (6, 3)
    assert found[1].tolist() == [1.0, 2.0]


def _batches() -> list[torch.Tensor]:
    return [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_an_honest_runner_gives_its_answers_in_order():
    batches = _batches()
    outputs, reason = check_runner(lambda x: {"twice": x * 2, "index": x.argmax(1)}, batches)
    assert reason == ""
    for answer, batch in zip(outputs, batches, strict=True):
        assert torch.equal(answer[0], batch * 2)
        assert torch.equal(answer[1], batch.argmax(1))


def test_answers_that_share_memory_are_found():
    buffer = torch.zeros(4, 3)
    _, reason = check_runner(buffer.copy_, _batches())
    assert "changed when another batch was run" in reason


class _Unwritten:
    """Answers in one buffer after another and leaves the last row as it finds it."""

    def __init__(self) -> None:
        self.pool = [torch.zeros(4, 3) for _ in range(4)]
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        buffer = self.pool[self.calls % 4]
        self.calls += 1
        buffer[:3] = x[:3]
        return buffer


def test_unwritten_outputs_show_as_nan():
    outputs, reason = check_runner(_Unwritten(), _batches())
    assert reason == ""
    assert all(answer[0][3].isnan().all() for answer in outputs)
    reference = joined([[batch.double()] for batch in _batches()])
    eager = joined([[batch] for batch in _batches()])
    assert "NaN" in compare(joined(outputs), reference, eager).reason


def test_stale_answers_are_those_of_another_batch():
    kept: list[torch.Tensor] = []

    def late(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.clone())
        return kept[-2 if len(kept) > 1 else -1].clone()

    outputs, _ = check_runner(late, _batches())
    reference = joined([[batch.double()] for batch in _batches()])
    assert not compare(joined(outputs), reference, [t.float() for t in reference]).ok


def test_inputs_and_constants_survive():
    batches = _batches()
    copies = [batch.clone() for batch in batches]
    constant = torch.arange(3.0)

    def greedy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x += constant
        return x, constant

    outputs, reason = check_runner(greedy, batches)
    assert reason == ""
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True))
    assert torch.equal(constant, torch.arange(3.0))
    assert all(torch.equal(o[0], b + constant) for o, b in zip(outputs, copies, strict=True))


def test_answers_made_in_inference_mode_and_inputs_of_any_nesting():
    @torch.inference_mode()
    def run(batch: dict) -> torch.Tensor:
        return batch["x"][0] + batch["y"]

    batches = [{"x": (torch.ones(2, 2) * i,), "y": 1} for i in range(2)]
    outputs, reason = check_runner(run, batches)
    assert reason == ""
    assert float(outputs[1][0][0, 0]) == 2.0


def test_one_batch_is_enough_to_see_shared_memory_that_changes():
    counter = torch.zeros(2, 2)
    _, reason = check_runner(lambda _x: counter.add_(1), [torch.ones(2, 2)])
    assert "changed" in reason
