"""`suanli predict`: layouts, ranking, the verb and its JSON."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import torch

from suanli.base import schema
from suanli.base.errors import BadInputError
from suanli.base.hardware import Ceiling, Ceilings, DeviceInfo
from suanli.base.prediction import ParallelLayout
from suanli.cost.layouts import checked, legal_splits, micro_batches
from suanli.devices import catalogue, find_sheet
from suanli.predicting import choose as choosing
from suanli.predicting import verb
from suanli.predicting.ask import Ask, parse_layout
from suanli.predicting.choose import Limits, rank
from suanli.predicting.one import predict_on
from suanli.predicting.prices import Prices
from suanli.predicting.subject import Subject, subject
from suanli.reports import predict_text
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.resolve import resolve
from tests.test_cli import Call, call
from tests.test_predict_memory import Tower, ids, shape

__all__ = ["call"]
H100, T4 = find_sheet("h100-sxm5-80gb"), find_sheet("t4")


@cache
def tower(training: bool = True, precision: str = "fp32") -> Subject:
    workload = Workload(name="tower", make_model=Tower, make_inputs=lambda b: Inputs(args=ids(b)))
    return subject(workload, training=training, precision=precision)


@cache
def vision(training: bool = True, precision: str = "fp32") -> Subject:
    return subject(resolve("resnet18"), training=training, precision=precision)


# -- layouts --------------------------------------------------------------------------------------


def test_legal_splits_divide_batch_heads_and_layers() -> None:
    found = set(legal_splits(shape(), devices=8, batch=16, together=8))
    assert found == {
        (8, 1, 1),
        (4, 2, 1),
        (2, 4, 1),
        (1, 8, 1),
        (4, 1, 2),
        (2, 1, 4),
        (2, 2, 2),
    } | {
        (1, 4, 2),
        (1, 2, 4),
    }
    assert all(tp <= 2 for _, tp, _ in legal_splits(shape(), devices=8, batch=16, together=2))
    plain = replace(shape(), heads=0, kv_heads=0)
    assert set(legal_splits(plain, devices=8, batch=16, together=8)) == {(8, 1, 1)}


@pytest.mark.parametrize(
    ("layout", "devices", "message"),
    [
        (ParallelLayout(dp=3), 4, "3 devices, not 4"),
        (ParallelLayout(dp=3), 3, "batch of 16"),
        (ParallelLayout(tp=3), 3, "8 attention heads"),
        (ParallelLayout(pp=3), 3, "4 layers"),
        (ParallelLayout(dp=0), 1, "at least 1"),
    ],
)
def test_a_layout_that_does_not_divide_says_why(layout, devices, message) -> None:
    with pytest.raises(BadInputError, match=message):
        checked(shape(), layout, devices=devices, batch=16)


def test_more_micro_batches_with_stages() -> None:
    assert micro_batches(8, 1) == [1, 2, 4, 8]
    assert micro_batches(64, 4)[0] == 16


def test_layouts_as_they_are_typed() -> None:
    assert parse_layout("dp=2, tp=4,micro=8,sharded") == ParallelLayout(
        dp=2, tp=4, micro_batches=8, sharded=True
    )
    for wrong in ("dp=two", "dp=\u0664", f"dp={'9' * 5000}"):
        with pytest.raises(BadInputError, match="no layout"):
            parse_layout(wrong)


# -- one card and several -------------------------------------------------------------------------


def test_a_faster_card_and_a_larger_batch() -> None:
    ask = Ask(training=True, batch=64, dtype="fp16")
    fast, slow = predict_on(vision(), H100, ask), predict_on(vision(), T4, ask)
    assert fast.step_ms.p50 < 0.3 * slow.step_ms.p50
    assert fast.step_ms.lo90 < fast.step_ms.p50 < fast.step_ms.hi90
    assert fast.samples_per_s == pytest.approx(64e3 / fast.step_ms.p50)
    twice = predict_on(vision(), T4, replace(ask, batch=128))
    assert 1.7 < twice.step_ms.p50 / slow.step_ms.p50 < 2.1
    assert twice.memory.activations_bytes > 1.9 * slow.memory.activations_bytes
    assert 0 < slow.sol.fraction < 1
    assert slow.energy_j == pytest.approx((slow.power_w or 0) * slow.step_ms.p50 / 1e3, rel=1e-6)


def test_what_does_not_fit_says_so() -> None:
    small = replace(T4, memory_gb=2)
    found = predict_on(vision(), small, Ask(training=True, batch=512, layout="dp=1"))
    assert not found.fits
    assert found.memory.total_bytes > found.usable_bytes
    # left to itself it cuts the batch into parts that fit, one after the other
    cut = predict_on(vision(), small, Ask(training=True, batch=512))
    assert cut.fits and cut.layout.micro_batches > 1
    assert cut.memory.total_bytes < found.memory.total_bytes


def test_several_cards_share_a_step() -> None:
    one = predict_on(vision(), H100, Ask(training=True, batch=256, dtype="bf16"))
    eight = predict_on(vision(), H100, Ask(training=True, batch=256, dtype="bf16", devices=8))
    assert eight.layout.dp == 8
    assert one.step_ms.p50 / 8 < eight.step_ms.p50 < one.step_ms.p50
    assert eight.communication_ms > 0 and eight.n_devices == 8
    assert (eight.energy_j or 0) > (one.energy_j or 0)


def test_beyond_a_server_the_network_is_said() -> None:
    ask = Ask(training=True, batch=256, dtype="bf16", devices=64)
    usual = predict_on(vision(), H100, ask)
    assert any("400 GB/s" in note for note in usual.notes)
    # bridges join two cards, the bus all eight of a server
    bridged = predict_on(vision(), find_sheet("rtx-3090"), replace(ask, devices=4))
    assert not any("network" in note for note in bridged.notes)
    slow = predict_on(vision(), H100, replace(ask, network_gb_per_s=5.0))
    assert slow.step_ms.p50 > usual.step_ms.p50


def test_a_given_layout_is_kept() -> None:
    ask = Ask(training=True, batch=16, devices=4, layout="tp=2,pp=2,micro=4,recompute")
    found = predict_on(tower(), H100, ask)
    assert found.layout == ParallelLayout(tp=2, pp=2, micro_batches=4, recompute=True)
    with pytest.raises(BadInputError, match="3 micro-batches"):
        predict_on(tower(), H100, replace(ask, layout="tp=2,pp=2,micro=3"))
    with pytest.raises(BadInputError, match="layouts of training"):
        predict_on(tower(False), H100, replace(ask, training=False))


def test_keys_and_values_of_earlier_tokens() -> None:
    ask = Ask(batch=4, dtype="bf16", context=1000)
    found = predict_on(tower(False, "bf16"), H100, ask)
    assert found.memory.kv_cache_bytes == 4 * 2 * 16 * 2 * 1000 * 4
    without, longer = (
        predict_on(tower(False, "bf16"), H100, replace(ask, context=tokens))
        for tokens in (0, 1_000_000)
    )
    # they are read in every step
    read_ms = 1e3 * longer.memory.kv_cache_bytes / 3.35e12
    assert longer.step_ms.p50 > max(read_ms, without.step_ms.p50)
    assert read_ms <= longer.sol.ms < longer.step_ms.p50
    with pytest.raises(BadInputError, match="attention"):
        predict_on(vision(False), H100, ask)


def test_the_update_follows_the_model() -> None:
    assert tower().optimizer == "adamw" and vision().optimizer == "sgd-momentum"
    assert predict_on(tower(), H100, Ask(training=True)).memory.optimizer_bytes > 0
    with pytest.raises(BadInputError, match="unknown optimizer"):
        subject(resolve("mnist-mlp"), training=True, precision="fp32", optimizer="lion")


def test_the_workloads_own_loss_and_update() -> None:
    found = subject(resolve("mnist-mlp"), training=True, precision="fp32")
    assert found.optimizer == "sgd-momentum" and not found.notes
    assert any("nll_loss" in op.name for op in found.work(64).operators)


# -- choosing -------------------------------------------------------------------------------------

CARDS = [find_sheet(n) for n in ("t4", "l4", "a100-sxm4-80gb", "h100-sxm5-80gb", "gtx-1080-ti")]


def chosen(limits: Limits | None = None, prices: Prices | None = None, **fields):
    ask = Ask(**({"training": True, "batch": 64, "dtype": "fp16"} | fields))
    return rank(vision(), CARDS, ask, limits or Limits(), prices=prices)


def test_the_fastest_comes_first_and_who_lacks_the_type_is_out() -> None:
    ranked, excluded = chosen()
    assert [entry.gpu for entry in ranked] == ["h100-sxm5-80gb", "a100-sxm4-80gb", "l4", "t4"]
    assert [(e.gpu, e.reason) for e in excluded] == [("gtx-1080-ti", "no fp16")]
    assert ranked[0].pareto
    assert {e.gpu for e in chosen(dtype="bf16")[1]} == {"t4", "gtx-1080-ti"}
    assert any(e.reason == "no fp8" for e in chosen(training=False, dtype="fp8")[1])


def test_what_no_card_can_do_is_refused_once() -> None:
    with pytest.raises(BadInputError, match="no layout of 3"):
        chosen(devices=3)
    with pytest.raises(BadInputError, match="tp=2 needs"):
        chosen(devices=2, layout="tp=2")


def test_a_rate_that_is_not_in_the_sheet_is_not_called_absent() -> None:
    bare = replace(CARDS[0], dense_tflops={"fp32": 8.1})
    cards, ask = [bare, *CARDS[1:]], Ask(batch=4, dtype="int8")
    _, excluded = rank(vision(False), cards, ask, Limits(), prices=None)
    assert {e.gpu: e.reason for e in excluded} == {"t4": "its int8 rate is unknown"}


def test_with_prices_the_cheapest_comes_first() -> None:
    prices = Prices(currency="EUR", per_hour={"t4": 0.01, "h100-sxm5-80gb": 10.0})
    ranked, _ = chosen(prices=prices)
    assert ranked[0].gpu == "t4" and ranked[0].job_cost is not None
    assert ranked[-1].job_cost is None
    assert {e.gpu for e in ranked if e.pareto} >= {"t4", "h100-sxm5-80gb"}


def test_limits_put_cards_out_with_the_reason() -> None:
    prices = Prices(currency="EUR", per_hour={"t4": 1.0, "h100-sxm5-80gb": 10.0})
    for limits, card, reason in (
        (Limits(max_power_w=300), "h100-sxm5-80gb", "power: 700 W"),
        (Limits(deadline_s=600), "t4", "time: "),
        (Limits(max_cost=1e-6), "t4", "cost: "),
        (Limits(max_cost=1e-6), "l4", "it has no price"),
    ):
        _, excluded = chosen(limits, prices)
        assert next(e.reason for e in excluded if e.gpu == card).startswith(reason)
    _, excluded = chosen(batch=20_000, layout="dp=1")
    assert any(e.gpu == "t4" and e.reason.startswith("memory: ") for e in excluded)


def test_limits_that_make_no_sense() -> None:
    for limits, message in (
        (Limits(max_cost=1.0), "--prices"),
        (Limits(samples=0), "--samples"),
        (Limits(samples=10**400), "--samples"),
        (Limits(max_power_w=-1.0), "--max-power"),
    ):
        with pytest.raises(BadInputError, match=message):
            limits.checked(None)


def test_pareto_needs_one_that_is_better_in_nothing() -> None:
    ranked, _ = chosen()
    worse = replace(ranked[0], job_s=ranked[0].job_s * 2, job_energy_j=ranked[0].job_energy_j)
    assert choosing._beaten(worse, ranked)
    assert not choosing._beaten(ranked[0], [ranked[0]])


# -- the verb -------------------------------------------------------------------------------------


def cpu_ceilings(*_: object, **__: object) -> Ceilings:
    device = DeviceInfo(name="cpu", title="test", fingerprint="x", memory_bytes=2**34)
    items = (
        Ceiling(what="matmul", unit="FLOP/s", dtype="fp32", hardware=2e11, achieved=1.5e11),
        Ceiling(what="read", unit="B/s", achieved=2e10, working_set_bytes=2**20),
        Ceiling(what="call_overhead", unit="s", achieved=2e-6),
    )
    return Ceilings(device=device, items=items, threads=2, measured_at="2026-01-01")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement of this machine, and few cards."""
    monkeypatch.setattr(verb, "ceilings", cpu_ceilings)
    monkeypatch.setattr(verb, "catalogue", lambda: tuple(CARDS))


def held_to_schema(text: str, verb_name: str) -> dict:
    found = json.loads(text)
    jsonschema.validate(found, json.loads(schema.text(verb_name)))
    return found


def test_json_of_one_card(call: Call) -> None:
    line = "predict mnist-cnn --gpu h100-sxm5-80gb --train --batch 256 --dtype bf16 --json"
    code, out, _ = call(*line.split())
    assert code == 0
    found = held_to_schema(out, "predict")
    assert {"n_devices", "layout", "plan", "step_ms", "samples_per_s", "fits"} <= found.keys()
    assert {"memory", "energy_j", "cost", "sol", "bound_by", "sources"} <= found.keys()
    assert {"dp", "tp", "pp"} <= found["layout"].keys()
    assert found["step_ms"].keys() == {"p50", "lo90", "hi90"}
    assert all(key.endswith("_bytes") for key in found["memory"])
    parts = {k: v for k, v in found["memory"].items() if k != "total_bytes"}
    assert sum(parts.values()) == found["memory"]["total_bytes"]
    assert found["device"]["name"] == "h100-sxm5-80gb" and found["fits"]


def test_json_of_a_ranking(call: Call, quick: None, tmp_path: Path) -> None:
    prices = tmp_path / "p.toml"
    prices.write_text("[per_hour]\nt4 = 0.4\nl4 = 0.7\n")
    line = f"predict mnist-cnn --choose --batch 64 --measure --prices {prices} --json"
    code, out, err = call(*line.split())
    assert code == 0, err
    found = held_to_schema(out, "choose")
    assert found["ranked"][0]["gpu"] in ("t4", "l4")
    assert found["here"]["measured_ms"] > 0
    assert {e["gpu"] for e in found["excluded"]} <= {"gtx-1080-ti"}


def test_the_text_fits(call: Call, quick: None) -> None:
    for line in (
        "predict mnist-cnn --gpu a100-sxm4-80gb --gpus 2 --train --batch 64",
        "predict mnist-cnn --choose --train --batch 64 --dtype fp16",
        "predict mnist-mlp --gpu cpu --batch 4",
        "predict --list",
    ):
        code, out, err = call(*line.split())
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 80
    assert "L4" not in out and "l4 " in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predict mnist-mlp --gpu h100", "which h100"),
        ("predict mnist-mlp --gpu h1000", "no GPU"),
        ("predict mnist-mlp", "--gpu NAME or --choose"),
        ("predict mnist-mlp --gpu t4 --choose", "--gpu NAME or --choose"),
        ("predict --gpu t4", "needs a workload"),
        ("predict mnist-mlp --gpu t4 --dtype bf16", "no bf16"),
        ("predict mnist-mlp --gpu t4 --gpus 3 --batch 4", "no layout of 3"),
        ("predict mnist-mlp --gpu t4 --gpus 2 --layout tp=2 --batch 4", "tp=2 needs"),
        ("predict mnist-mlp --gpu t4 --layout micro=0 --train", "at least 1"),
        ("predict mnist-mlp --gpu t4 --optimizer adam", "of training"),
        ("predict mnist-mlp --choose --deadline soon", "no time"),
        ("predict mnist-mlp --choose --max-cost 3", "--prices"),
        ("predict mnist-mlp --gpu t4 --max-cost -3", "go with --choose"),
        ("predict mnist-mlp --gpu t4 --deadline 2h", "go with --choose"),
        ("predict mnist-mlp --gpu cpu --gpus 4", "not of the CPU"),
    ],
)
def test_bad_input_is_one_line_and_two(call: Call, line: str, message: str) -> None:
    code, out, err = call(*line.split())
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_a_workload_that_cannot_be_captured(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x[x > 0]\n"
        "def model():\n    return M(), torch.ones(1, 3)\n"
    )
    code, _, err = call("predict", f"{file}:model", "--gpu", "t4")
    assert code == 2 and "own.py:4" in err and err.count("\n") == 1


def test_a_model_that_computes_nothing_is_one_line() -> None:
    workload = Workload(
        name="nothing",
        make_model=torch.nn.Identity,
        make_inputs=lambda b: Inputs(args=(torch.zeros(b, 4),)),
    )
    made = subject(workload, training=False, precision="fp32")
    with pytest.raises(BadInputError, match="computes nothing"):
        predict_on(made, T4, Ask(batch=4))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_of_one_batch_is_predicted_at_it(training: bool) -> None:
    workload = Workload(
        name="fixed",
        make_model=lambda: torch.nn.Linear(8, 8),
        make_inputs=lambda b: Inputs(args=(torch.zeros(1, 8),)),
        dynamic_batch=False,
    )
    made = subject(workload, training=training, precision="fp32")
    assert predict_on(made, T4, Ask(training=training)).batch == 1
    with pytest.raises(BadInputError, match="batch of 1 only"):
        predict_on(made, T4, Ask(training=training, batch=2))


def test_of_a_table_only_the_rows_taken_bound_the_step() -> None:
    workload = Workload(
        name="table",
        make_model=lambda: torch.nn.Sequential(
            torch.nn.Embedding(2_000_000, 64), torch.nn.Linear(64, 8)
        ),
        make_inputs=lambda b: Inputs(args=(torch.zeros(b, dtype=torch.int64),)),
    )
    made = subject(workload, training=False, precision="fp32")
    found = predict_on(made, H100, Ask(batch=256))
    assert found.sol.fraction < 0.1  # the whole table would be 0.15 ms


def test_in_python_a_module_as_it_is() -> None:
    import suanli

    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU())
    found = suanli.predict(model, torch.randn(1, 64), gpu="t4", batch=32, dtype="fp16")
    assert found.fits and found.batch == 32 and found.verb == "predict"


def test_seventy_billion_parameters_need_no_memory() -> None:
    pytest.importorskip("transformers")
    code = (
        "import resource, suanli\n"
        "ref = 'hf:llama?hidden_size=8192&num_hidden_layers=80&num_attention_heads=64'\n"
        "ref += '&num_key_value_heads=8&intermediate_size=28672'\n"
        "r = suanli.predict(ref, gpu='h100-sxm5-80gb', devices=8, dtype='bf16', batch=8)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "assert r.parameters > 68e9 and r.fits, r.fits\n"
        "assert r.layout.tp * r.layout.pp > 1, r.layout\n"
        "assert peak < 4e9, peak\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_card_can_be_asked_for() -> None:
    """What a sheet lacks widens the interval; nothing breaks."""
    for sheet in catalogue():
        found = predict_on(vision(False), sheet, Ask(batch=8))
        assert found.step_ms.p50 > 0, sheet.name
        assert found.widened or sheet.multiprocessors, sheet.name


def test_prices_without_a_currency_leave_no_gap(call: Call, tmp_path: Path) -> None:
    prices = tmp_path / "my prices.toml"
    prices.write_text("[per_hour]\nt4 = 0.4\n")
    code, out, err = call(
        "predict", "mnist-mlp", "--gpu", "t4", "--prices", str(prices), "--batch", "64"
    )
    assert code == 0, err
    line = next(line for line in out.splitlines() if "a million samples" in line)
    assert "  " not in line.partition("cost")[2].strip()


def test_what_takes_next_to_nothing_is_not_told() -> None:
    import suanli

    layer = torch.nn.Linear(64, 64)
    result = suanli.predict(layer, torch.zeros(1, 64), gpu="t4", batch=2**20)
    assert 0.0 < result.overhead_ms < 1e-4 * result.step_ms.p50
    told = dict(predict_text._findings(result))["bound by"]
    assert "overhead" not in told and told.startswith("compute")


def test_reports_name_no_figure_twice() -> None:
    assert predict_text._sources(("a", "b", "a")) == "a; b"
