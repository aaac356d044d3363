"""`suanli doctor`: what it says fits its schema, is measured once, and survives a broken torch."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from suanli import api, cli
from suanli.base import codec, schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event
from suanli.base.hardware import Ceilings
from suanli.base.results import DoctorResult
from suanli.devices import cpu_info, device
from suanli.engines.backends import backends
from suanli.measure import ceilings as measuring
from tests import planted_results as planted

SCHEMA = json.loads((schema.FOLDER / "doctor.json").read_text(encoding="utf-8"))
Measure = Callable[..., Ceilings]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own; measuring is refused."""
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring, "measure_device", no_measuring)
    return tmp_path


@pytest.fixture
def kept(cache: Path) -> Path:
    """The same with ceilings that were measured before."""
    path = measuring.cache_path(device("cpu"))
    path.parent.mkdir(parents=True)
    # its figures are rough, and have been measured as often as that is done
    many = replace(planted.ceilings(), rounds=4)
    path.write_text(codec.dumps(many), encoding="utf-8")
    return path


def no_measuring(*_: Any, **__: Any) -> Ceilings:
    raise AssertionError("nothing had to be measured")


def doctor(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["suanli", "doctor", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.usefixtures("kept")
def test_json_fits_its_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(monkeypatch, "--json") == 0
    said = capsys.readouterr()
    assert said.err == ""
    plain = json.loads(said.out)
    jsonschema.validate(plain, SCHEMA)
    result = codec.from_json(DoctorResult, plain)
    assert (result.schema.name, result.verb, result.workload) == ("suanli.doctor", "doctor", None)
    assert result.ceilings == planted.ceilings().items
    assert result.measured_at == planted.ceilings().measured_at
    assert result.cpu.model == cpu_info().model
    assert result.environment.libraries["torch"]


def test_schema_refuses_what_is_no_result() -> None:
    plain = codec.to_json(planted.doctor_result())
    jsonschema.validate(plain, SCHEMA)
    for broken in ({**plain, "extra": 1}, {**plain, "ceilings": [{"what": "luck", "unit": "s"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


@pytest.mark.usefixtures("kept")
def test_every_backend_is_present_or_says_how_to_get_it() -> None:
    rows = {row.name: row for row in api.doctor(device="cpu").backends}
    assert rows.keys() == backends().keys()
    assert rows["eager"].present
    for row in rows.values():
        assert row.install
        assert row.version if row.present else row.reason


@pytest.mark.usefixtures("kept")
def test_an_absent_backend_is_shown_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # what makes an import fail
    row = next(row for row in api.doctor(device="cpu").backends if row.name == "openvino")
    assert not row.present
    assert "openvino" in row.reason
    assert row.install.startswith("pip install")


@pytest.mark.usefixtures("kept")
def test_text_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor(monkeypatch) == 0
    out = capsys.readouterr().out
    assert cpu_info().model in out
    assert "123 GFLOP/s" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.usefixtures("kept")
def test_kept_ceilings_are_not_said_to_be_measured() -> None:
    seen: list[Event] = []
    api.doctor(device="cpu", on_event=seen.append)
    assert seen
    assert not [event for event in seen if "measuring" in event.text]


def test_refresh_measures_and_keeps(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Event] = []

    def measured(target: Any, *, progress: Callable[[str], None], **_: Any) -> Ceilings:
        progress("reading 1 MiB")
        (item, *_others) = planted.ceilings().items
        return Ceilings(device=target.info, items=(item,), threads=2, measured_at="now")

    monkeypatch.setattr(measuring, "measure_device", measured)
    result = api.doctor(device="cpu", refresh=True, on_event=seen.append)
    assert len(result.ceilings) == 1
    assert result.measured_at == "now"
    assert codec.read(Ceilings, kept).items == result.ceilings
    assert [e.text for e in seen if "reading 1 MiB" in e.text]


@pytest.mark.usefixtures("cache")
def test_a_real_measurement_in_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    short = functools.partial(measuring.measure_device, seconds=2)
    monkeypatch.setattr(measuring, "measure_device", short)
    result = api.doctor(device="cpu", refresh=True)
    jsonschema.validate(json.loads(codec.dumps(result)), SCHEMA)
    found = {item.what for item in result.ceilings}
    assert {"matmul", "read", "call_overhead"} <= found
    assert {item.dtype for item in result.ceilings} >= {"fp32"}
    assert all(item.best and item.best > 0 for item in result.ceilings)
    assert result.measured_at
    assert result.seconds_spent > 0


@pytest.mark.usefixtures("cache")
def test_no_such_device() -> None:
    with pytest.raises(BadInputError, match="cuda:7"):
        api.doctor(device="cuda:7")


def test_a_broken_torch_is_the_first_problem(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcudart.so.13: no such file')\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parent.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "suanli.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    plain = json.loads(done.stdout)
    jsonschema.validate(plain, SCHEMA)
    assert plain["problems"][0]["what"] == "torch does not import: libcudart.so.13: no such file"
    assert plain["problems"][0]["mend"].startswith("pip install")
    assert plain["ceilings"] == plain["backends"] == []
