"""`suanli predict`: what a person asks, prices, and cards that `suanli doctor` measured."""

from dataclasses import replace
from pathlib import Path

import pytest

import suanli
from suanli import api_predict
from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.hardware import Ceiling, Ceilings, DeviceInfo
from suanli.base.plan import Plan
from suanli.base.work import Operator, Work
from suanli.cost.predictor import predict_operators
from suanli.devices import find_sheet
from suanli.predicting import measured
from suanli.predicting.ask import Ask
from suanli.predicting.choose import parse_time
from suanli.predicting.one import predict_on
from suanli.predicting.prices import Prices, read_prices
from tests.test_predict import H100, T4, vision


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "fp12"}, "unknown dtype"),
        ({"dtype": "int8", "training": True}, "training in int8"),
        ({"batch": 0}, "--batch"),
        ({"devices": 0}, "--gpus"),
        ({"context": -1}, "--context"),
        ({"network_gb_per_s": 0.0}, "--network"),
        ({"network_gb_per_s": float("nan")}, "--network"),
        ({"network_gb_per_s": float("inf")}, "--network"),
        ({"network_gb_per_s": 1e-300}, "--network"),
        ({"optimizer": "adam"}, "--optimizer is of training"),
        ({"context": 9, "training": True}, "of inference"),
        ({"batch": "4"}, "batch must be a whole number"),
        ({"batch": 2.5}, "batch must be a whole number"),
        ({"devices": None}, "devices must be a whole number"),
        ({"context": True}, "context must be a whole number"),
        ({"plan": "quick"}, "eager, compiled or a plan's file"),
    ],
)
def test_what_makes_no_sense_is_named(fields, message) -> None:
    with pytest.raises(BadInputError, match=message):
        Ask(**fields).checked()


def test_a_field_that_is_none_is_named_with_those_that_are() -> None:
    with pytest.raises(BadInputError, match="predict has no 'train'") as caught:
        api_predict.options(train=True)
    assert "training" in str(caught.value)


def test_a_plans_file_gives_precision_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(codec.dumps(Plan(backend="tensorrt", precision="fp16", device="cuda:0")))
    ask = Ask(plan=str(path)).checked()
    assert (ask.dtype, ask.kind) == ("fp16", "compiled")
    assert predict_on(vision(False), T4, ask).plan.backend == "tensorrt"


def test_prices_are_by_card(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('currency = "EUR"\n[per_hour]\nT4 = 0.5\n"H100-SXM5-80GB" = 3\n')
    prices = read_prices(path)
    assert prices == Prices(currency="EUR", per_hour={"t4": 0.5, "h100-sxm5-80gb": 3.0})
    path.write_text("[per_hour]\nt4 = -0.0\n")
    assert str(read_prices(path).per_hour["t4"]) == "0.0"
    found = predict_on(vision(False), T4, Ask(batch=8), prices=prices)
    assert found.cost is not None
    assert found.cost.per_step == pytest.approx(0.5 * found.step_ms.p50 / 3.6e6)
    assert predict_on(vision(False), find_sheet("l4"), Ask(), prices=prices).cost is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[per_hour]\nt4 = -1\n", "negative"),
        ('[per_hour]\nt4 = "much"\n', "no number"),
        ("[per_hour]\nt4 = nan\n", "no number"),
        ("[per_hour]\nt44 = 1\n", "no GPU 't44'"),
        (f"[per_hour]\nt4 = 1{'0' * 400}\n", "no number"),
        ('[per_hour]\nt4 = 1\n"tesla t4" = 2\n', "two prices of t4"),
        ("[per_hour]\nt4 = 1e300\n", "above"),
        pytest.param(f"[per_hour]\nt4 = {'9' * 5000}\n", "no price file", id="digits"),
        pytest.param(f"a = {'[' * 5000}{']' * 5000}\n", "no price file", id="nested"),
        ('currency = ["EUR"]\n[per_hour]\nt4 = 1\n', "currency"),
        ('currency = "\\u001b[31mEUR"\n[per_hour]\nt4 = 1\n', "currency"),
        ("t4 = 1\n", "no prices"),
        ("t4 = ", "no price file"),
    ],
)
def test_prices_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=message):
        read_prices(path)
    with pytest.raises(BadInputError, match="no file"):
        read_prices(tmp_path / "absent.toml")


def test_times_as_they_are_typed() -> None:
    assert [parse_time(t) for t in ("90", "90s", "30m", "2h", "1.5 d")] == [
        *(90, 90, 1800, 7200),
        129600,
    ]
    for wrong in ("soon", "-3h", "0", "2 weeks"):
        with pytest.raises(BadInputError, match="no time"):
            parse_time(wrong)


def doctored(**changes: float) -> Ceilings:
    device = DeviceInfo(name="cuda:0", title="Tesla T4", fingerprint="x", memory_bytes=2**34)
    rates = {"fp16": 25e12} | changes
    items = [
        Ceiling(what="matmul", unit="FLOP/s", dtype=d, achieved=r, how=f"torch {d} 8192x8192x8192")
        for d, r in rates.items()
    ]
    copy = Ceiling(what="copy", unit="B/s", achieved=220e9, working_set_bytes=2**30)
    return Ceilings(device=device, items=(*items, copy), threads=2, measured_at="2026-01-01")


def test_a_measured_card_gives_back_what_was_measured() -> None:
    sheet = measured.with_ceilings(T4, doctored())
    n = 8192
    product = Operator(
        name="mm",
        dtype="fp16",
        flops=2 * n**3,
        bytes_read=4 * n * n,
        bytes_written=2 * n * n,
        input_shapes=((n, n), (n, n)),
        output_shapes=((n, n),),
        matmul=True,
    )
    work = Work(
        operators=(product,),
        batch=1,
        parameters=0,
        parameter_bytes=0,
        input_bytes=0,
        output_bytes=0,
    )
    ms = predict_operators(work, sheet, dtype="fp16").step_ms.p50
    assert 2 * n**3 / ms / 1e9 == pytest.approx(25, rel=0.02)
    assert sheet.mark == "measured" and sheet.dense_tflops["fp32"] == T4.dense_tflops["fp32"]
    assert "suanli doctor" in (sheet.source_of("dense_tflops.fp16") or "")


@pytest.mark.parametrize("rate", [2.5e12, 5e12])
def test_a_measured_rate_has_the_clock_in_it(rate: float) -> None:
    """Where the power limit holds the clock low, the sheet's rate alone would change nothing."""
    sheet = measured.with_ceilings(T4, doctored(fp32=rate))
    n = 8192
    product = measured._product(n, n, n, "fp32")
    ms = predict_operators(product, sheet, dtype="fp32").step_ms.p50
    assert 2e3 * n**3 / ms == pytest.approx(rate, rel=0.02)
    assert rate < 1e12 * sheet.dense_tflops["fp32"] < 1.2 * rate


def test_the_slowest_measured_link_is_taken() -> None:
    links = [Ceiling(what="link", unit="B/s", achieved=r) for r in (12e9, 9e9)]
    found = doctored()
    found = replace(found, items=(*found.items, *links))
    sheet = measured.with_ceilings(T4, found)
    assert sheet.link_gb_per_s == 9 and "doctor" in (sheet.source_of("link_gb_per_s") or "")


def test_the_measured_file_wins_over_the_datasheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))
    assert measured.as_measured(T4) is T4
    folder = tmp_path / "ceilings"
    folder.mkdir()
    (folder / "cuda-0-x.json").write_text(codec.dumps(doctored()))
    assert measured.as_measured(T4).mark == "measured"
    assert measured.as_measured(H100) is H100


def test_a_card_without_a_name_is_refused() -> None:
    with pytest.raises(BadInputError, match="gpu must be a card's name, not None"):
        suanli.predict("mnist-mlp", gpu=None)  # type: ignore[arg-type]
